"""psycopg 3: default | never (prepare_threshold None) | always (0, evicting) | pool | async"""

import asyncio
import sys
import time

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from said import RUN, right, tasks, threads

HOW = sys.argv[1]
INSERT = "INSERT INTO written VALUES (%s, %s, 'x')"


def settle(connection):
    connection.autocommit = True
    if HOW == "never":
        connection.prepare_threshold = None
    if HOW == "always":
        connection.prepare_threshold = 0
        connection.prepared_max = 2


def work(worker, connection):
    """The units of work on a connection that `connection()` gives, and takes back."""

    def auto():
        with connection() as c:
            c.execute(INSERT, (RUN, worker.id()))

    def transaction():
        with connection() as c, c.transaction():
            c.execute(INSERT, (RUN, worker.id()))
            with c.transaction():
                c.execute(INSERT, (RUN, worker.id()))

    def read():
        with connection() as c:
            for wanted in range(3):
                right(c.execute("SELECT %s::int + 1, 'x'", (wanted,)).fetchone(), (wanted + 1, "x"))
                right(c.execute(f"SELECT {wanted} + %s", (wanted,)).fetchone(), (wanted * 2,))

    def copy_in():
        with connection() as c, c.cursor() as cursor:
            with cursor.copy("COPY written (run, id) FROM STDIN") as copy:
                copy.write_row((RUN, worker.id()))
                time.sleep(0.02)
                copy.write_row((RUN, worker.id()))
            right(cursor.rowcount, 2)

    def copy_in_transaction():
        with connection() as c, c.transaction(), c.cursor() as cursor:
            with cursor.copy("COPY written (run, id) FROM STDIN (FORMAT binary)") as copy:
                copy.set_types(["int4", "int8"])
                copy.write_row((RUN, worker.id()))
            c.execute(INSERT, (RUN, worker.id()))

    def copy_out():
        with connection() as c, c.cursor() as cursor:
            with cursor.copy("COPY (SELECT generate_series(1, 500)) TO STDOUT") as copy:
                right(len(list(copy.rows())), 500)

    def named_cursor():
        with connection() as c, c.transaction(), c.cursor(name="a cursor") as cursor:
            cursor.execute("SELECT generate_series(1, %s)", (30,))
            for _ in range(3):
                time.sleep(0.005)
                right(len(cursor.fetchmany(10)), 10)

    def hold_cursor():
        with connection() as c, c.cursor(name="held", withhold=True) as cursor:
            cursor.execute("SELECT generate_series(1, 30)")
            for _ in range(3):
                time.sleep(0.005)
                right(len(cursor.fetchmany(10)), 10)

    def executemany():
        with connection() as c, c.cursor() as cursor:
            cursor.executemany(INSERT, [(RUN, worker.id()) for _ in range(3)])

    def pipeline():
        with connection() as c, c.pipeline(), c.transaction():
            for _ in range(3):
                c.execute(INSERT, (RUN, worker.id()))
            right(c.execute("SELECT 7").fetchone(), (7,))

    def deallocate():
        with connection() as c:
            c.execute("PREPARE mine (int) AS SELECT $1 + 1")
            right(c.execute("EXECUTE mine (3)").fetchone(), (4,))
            c.execute("DEALLOCATE mine")
            c.execute("DEALLOCATE ALL")

    return [auto, transaction, read, copy_in, copy_in_transaction, copy_out, named_cursor,
            hold_cursor, executemany, pipeline, deallocate]


def plain(worker):
    connection = psycopg.connect("")
    settle(connection)

    class Lent:
        def __enter__(self):
            return connection

        def __exit__(self, *_):
            pass

    def after():
        connection.rollback()

    return work(worker, Lent), after


async def asynchronous():
    pool = AsyncConnectionPool("", min_size=2, max_size=4, open=False, kwargs={"autocommit": True})
    await pool.open()

    async def body(worker):
        async def auto():
            async with pool.connection() as c:
                await c.execute(INSERT, (RUN, worker.id()))

        async def transaction():
            async with pool.connection() as c, c.transaction():
                await c.execute(INSERT, (RUN, worker.id()))
                async with c.transaction():
                    await c.execute(INSERT, (RUN, worker.id()))

        async def copy_in():
            async with pool.connection() as c, c.cursor() as cursor:
                async with cursor.copy("COPY written (run, id) FROM STDIN") as copy:
                    await copy.write_row((RUN, worker.id()))
                    await asyncio.sleep(0.02)
                    await copy.write_row((RUN, worker.id()))

        async def pipeline():
            async with pool.connection() as c, c.pipeline(), c.cursor() as cursor:
                await cursor.executemany(INSERT, [(RUN, worker.id()) for _ in range(3)])

        async def server_cursor():
            async with pool.connection() as c, c.transaction(), c.cursor(name="c") as cursor:
                await cursor.execute("SELECT generate_series(1, 30)")
                right(len([row async for row in cursor]), 30)

        async def after():
            pass

        return [auto, transaction, copy_in, pipeline, server_cursor], after

    await tasks(body)
    await pool.close()


if HOW == "async":
    asyncio.run(asynchronous())
elif HOW == "pool":
    pool = ConnectionPool("", min_size=2, max_size=4, open=True, check=ConnectionPool.check_connection,
                          kwargs={"autocommit": True})
    threads(lambda worker: (work(worker, pool.connection), lambda: None))
    pool.close()
else:
    threads(plain)
