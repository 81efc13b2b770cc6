"""psycopg2, with its pool or without."""

import io
import time

import psycopg2
from psycopg2.extras import execute_batch, execute_values
from said import RUN, right, threads

INSERT = "INSERT INTO written VALUES (%s, %s, 'x')"


def body(worker):
    connection = psycopg2.connect("")

    def auto():
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute(INSERT, (RUN, worker.id()))
        finally:
            connection.autocommit = False

    def transaction():
        with connection, connection.cursor() as cursor:
            cursor.execute(INSERT, (RUN, worker.id()))
            cursor.execute("SAVEPOINT s")
            cursor.execute(INSERT, (RUN, worker.id()))
            cursor.execute("RELEASE s")

    def read():
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT %s + 1", (4,))
            right(cursor.fetchone(), (5,))

    def copy_in():
        with connection, connection.cursor() as cursor:
            rows = f"{RUN}\t{worker.id()}\n{RUN}\t{worker.id()}\n"
            cursor.copy_expert("COPY written (run, id) FROM STDIN", io.StringIO(rows))

    def copy_in_alone():
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                rows = io.StringIO(f"{RUN}\t{worker.id()}\n")
                cursor.copy_from(rows, "written", columns=("run", "id"))
        finally:
            connection.autocommit = False

    def copy_out():
        with connection, connection.cursor() as cursor:
            out = io.StringIO()
            cursor.copy_expert("COPY (SELECT generate_series(1, 500)) TO STDOUT", out)
            right(out.getvalue().count("\n"), 500)

    def named_cursor():
        with connection, connection.cursor("a cursor") as cursor:
            cursor.execute("SELECT generate_series(1, 30)")
            for _ in range(3):
                right(len(cursor.fetchmany(10)), 10)
                time.sleep(0.005)

    def scroll_cursor():
        with connection, connection.cursor("hold", scrollable=True) as cursor:
            cursor.execute("SELECT 'with hold', generate_series(1, 30)")
            right(len(cursor.fetchmany(10)), 10)
            cursor.scroll(-5)
            right(len(cursor.fetchmany(10)), 10)

    def hold_cursor():
        cursor = connection.cursor("held", withhold=True)
        cursor.execute("SELECT generate_series(1, 30)")
        connection.commit()
        for _ in range(3):
            right(len(cursor.fetchmany(10)), 10)
            time.sleep(0.005)
        cursor.close()
        connection.commit()

    def prepared():
        with connection, connection.cursor() as cursor:
            cursor.execute("PREPARE mine (int, bigint) AS INSERT INTO written VALUES ($1, $2, 'p')")
            cursor.execute("EXECUTE mine (%s, %s)", (RUN, worker.id()))
            cursor.execute("DEALLOCATE mine")

    def batches():
        with connection, connection.cursor() as cursor:
            execute_values(cursor, "INSERT INTO written VALUES %s", [(RUN, worker.id(), "v") for _ in range(3)])
            execute_batch(cursor, INSERT, [(RUN, worker.id()) for _ in range(3)])

    return [auto, transaction, read, copy_in, copy_in_alone, copy_out, named_cursor, scroll_cursor,
            hold_cursor, prepared, batches], connection.rollback


threads(body)
