"""SQLAlchemy's engine over psycopg | psycopg2 | pg8000 | asyncpg (with pool_pre_ping)"""

import asyncio
import sys

from sqlalchemy import BigInteger, Column, Integer, MetaData, Table, Text, create_engine, func, select, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import create_async_engine
from said import RUN, right, tasks, threads
import os

HOW = sys.argv[1]
URL_OF_IT = URL.create(
    f"postgresql+{HOW}",
    os.environ["PGUSER"],
    os.environ["PGPASSWORD"],
    os.environ["PGHOST"],
    int(os.environ["PGPORT"]),
    os.environ["PGDATABASE"],
)
WRITTEN = Table(
    "written", MetaData(), Column("run", Integer), Column("id", BigInteger), Column("note", Text)
)
SERIES = select(func.generate_series(1, 30))


def body(engine):
    def of(worker):
        def row():
            return {"run": RUN, "id": worker.id(), "note": "x"}

        def insert():
            with engine.begin() as c:
                c.execute(WRITTEN.insert(), row())

        def nested():
            with engine.begin() as c:
                c.execute(WRITTEN.insert(), row())
                with c.begin_nested():
                    c.execute(WRITTEN.insert(), row())

        def auto():
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as c:
                c.execute(WRITTEN.insert(), row())

        def many():
            with engine.begin() as c:
                c.execute(WRITTEN.insert(), [row() for _ in range(3)])

        def read():
            with engine.connect() as c:
                right(c.execute(text("SELECT CAST(:x AS int) + 1"), {"x": 4}).scalar(), 5)

        def stream():
            with engine.connect() as c:
                rows = c.execution_options(stream_results=True, max_row_buffer=10).execute(SERIES)
                right(len(rows.all()), 30)

        ops = [insert, nested, auto, many, read, stream]
        return [op for op in ops if HOW != "pg8000" or op is not stream], lambda: None

    return of


async def asynchronous():
    engine = create_async_engine(URL_OF_IT, pool_size=2, max_overflow=2, pool_pre_ping=True)

    async def of(worker):
        def row():
            return {"run": RUN, "id": worker.id(), "note": "x"}

        async def insert():
            async with engine.begin() as c:
                await c.execute(WRITTEN.insert(), row())

        async def nested():
            async with engine.begin() as c:
                await c.execute(WRITTEN.insert(), row())
                async with c.begin_nested():
                    await c.execute(WRITTEN.insert(), row())

        async def many():
            async with engine.begin() as c:
                await c.execute(WRITTEN.insert(), [row() for _ in range(3)])

        async def stream():
            async with engine.connect() as c:
                rows = await c.stream(SERIES)
                right(len(await rows.all()), 30)

        async def after():
            pass

        return [insert, nested, many, stream], after

    await tasks(of)
    await engine.dispose()


if HOW == "asyncpg":
    asyncio.run(asynchronous())
else:
    engine = create_engine(URL_OF_IT, pool_size=2, max_overflow=2)
    threads(body(engine))
    engine.dispose()
