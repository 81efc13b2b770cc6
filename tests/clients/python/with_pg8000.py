"""pg8000: native and DB-API."""

import io
import os

import pg8000.dbapi
import pg8000.native
from said import RUN, right, threads

LOGIN = {
    "user": os.environ["PGUSER"],
    "host": os.environ["PGHOST"],
    "port": int(os.environ["PGPORT"]),
    "database": os.environ["PGDATABASE"],
    "password": os.environ["PGPASSWORD"],
}


def body(worker):
    native, dbapi = pg8000.native.Connection(**LOGIN), pg8000.dbapi.connect(**LOGIN)

    def auto():
        native.run("INSERT INTO written VALUES (:run, :id, 'x')", run=RUN, id=worker.id())

    def prepared():
        statement = native.prepare("SELECT CAST(:a AS int) + 1")
        for wanted in range(3):
            right(statement.run(a=wanted), [[wanted + 1]])
        statement.close()

    def transaction():
        cursor = dbapi.cursor()
        cursor.execute("INSERT INTO written VALUES (%s, %s, 'x')", (RUN, worker.id()))
        cursor.executemany("INSERT INTO written VALUES (%s, %s, 'x')", [(RUN, worker.id())] * 1)
        dbapi.commit()

    def copy_in():
        cursor = dbapi.cursor()
        rows = io.BytesIO(f"{RUN}\t{worker.id()}\n{RUN}\t{worker.id()}\n".encode())
        cursor.execute("COPY written (run, id) FROM STDIN", stream=rows)
        dbapi.commit()

    def copy_out():
        cursor, out = dbapi.cursor(), io.BytesIO()
        cursor.execute("COPY (SELECT generate_series(1, 500)) TO STDOUT", stream=out)
        right(out.getvalue().count(b"\n"), 500)
        dbapi.rollback()

    return [auto, prepared, transaction, copy_in, copy_out], dbapi.rollback


threads(body)
