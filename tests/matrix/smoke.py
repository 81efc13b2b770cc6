"""What a driver does, once each, through a listener: `smoke.py CONNINFO` with asyncpg and psycopg installed."""
import asyncio
import sys

import asyncpg
import psycopg
from psycopg.conninfo import conninfo_to_dict

conninfo = sys.argv[1]
words = conninfo_to_dict(conninfo)


def by_psycopg():
    with psycopg.connect(conninfo, autocommit=True) as connection:
        with connection.cursor() as cursor:
            for _ in range(8):
                cursor.execute("SELECT %s::int + 1", (41,))
                assert cursor.fetchone() == (42,)
        with connection.transaction():
            cursor = connection.cursor()
            cursor.execute("CREATE TEMP TABLE p (i int, t text) ON COMMIT DROP")
            with cursor.copy("COPY p FROM STDIN") as copy:
                for number in range(100):
                    copy.write_row((number, "å" * number))
            cursor.executemany("INSERT INTO p VALUES (%s, %s)", [(1000 + n, "x") for n in range(50)])
            assert cursor.execute("SELECT count(*) FROM p").fetchone() == (150,)
        with connection.pipeline():
            cursors = [connection.execute("SELECT %s::int", (n,)) for n in range(20)]
            assert [c.fetchone()[0] for c in cursors] == list(range(20))
        try:
            connection.execute("SELECT 1/0")
        except psycopg.errors.DivisionByZero:
            pass
        assert connection.execute("SELECT 1").fetchone() == (1,)
        return connection.info.server_version


async def by_asyncpg():
    connection = await asyncpg.connect(
        host=words["host"], port=int(words["port"]), user=words["user"], password=words["password"],
        database=words["dbname"], ssl=False, timeout=30)
    try:
        for number in range(8):
            assert await connection.fetchval("SELECT $1::int + 1", number) == number + 1
        async with connection.transaction():
            await connection.execute("CREATE TEMP TABLE a (i int, t text) ON COMMIT DROP")
            await connection.copy_records_to_table("a", records=[(n, "z") for n in range(100)])
            await connection.executemany("INSERT INTO a VALUES ($1, $2)", [(n, "y") for n in range(50)])
            found = 0
            async for row in connection.cursor("SELECT i FROM a", prefetch=7):
                found += 1
            assert found == 150, found
        try:
            await connection.fetch("SELECT pg_sleep(60)", timeout=0.3)
        except asyncio.TimeoutError:
            pass
        assert await connection.fetchval("SELECT 1") == 1
    finally:
        await connection.close()


print("psycopg", psycopg.__version__, "server", by_psycopg())
asyncio.run(by_asyncpg())
print("asyncpg", asyncpg.__version__)
