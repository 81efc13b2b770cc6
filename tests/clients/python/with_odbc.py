"""psqlodbc by pyodbc; the words of the connection string are arguments: UseServerSidePrepare=0"""

import os
import sys

import pyodbc
from said import RUN, right, threads

LOGIN = (
    "Driver={{{}}};Server={};Port={};Database={};Uid={};Pwd={{{}}};".format(
        os.environ.get("ODBC_DRIVER", "PostgreSQL Unicode"),
        *(os.environ[it] for it in ("PGHOST", "PGPORT", "PGDATABASE", "PGUSER", "PGPASSWORD")),
    )
    + ";".join(sys.argv[1:])
)
INSERT = "INSERT INTO written VALUES (?, ?, 'x')"
pyodbc.pooling = False


def body(worker):
    connection = pyodbc.connect(LOGIN, autocommit=True)
    cursor = connection.cursor()

    def auto():
        cursor.execute(INSERT, RUN, worker.id())

    def transaction():
        connection.autocommit = False
        try:
            cursor.execute(INSERT, RUN, worker.id())
            connection.cursor().execute("SELECT 1").fetchall()
            connection.execute(INSERT, RUN, worker.id())
            connection.commit()
        except Exception:
            connection.rollback()
            raise
        finally:
            connection.autocommit = True

    def read():
        for wanted in range(3):
            right(cursor.execute("SELECT CAST(? AS int) + 1", wanted).fetchval(), wanted + 1)
            right(cursor.execute(f"SELECT CAST(? AS int) + {wanted}", wanted).fetchval(), 2 * wanted)

    def many():
        cursor.executemany(INSERT, [(RUN, worker.id()) for _ in range(3)])

    def rows():
        right(len(cursor.execute("SELECT generate_series(1, 300)").fetchall()), 300)

    def slices():
        connection.autocommit = False
        try:
            one = connection.execute("SELECT generate_series(1, 300)")
            right(len(one.fetchmany(150)), 150)
            connection.execute(INSERT, RUN, worker.id())
            right(len(one.fetchall()), 150)
            one.close()
            connection.commit()
        except Exception:
            connection.rollback()
            raise
        finally:
            connection.autocommit = True

    return [auto, transaction, read, many, rows, slices], lambda: cursor.execute("SELECT 1").fetchall()


threads(body)
