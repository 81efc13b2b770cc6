"""asyncpg's pool: default | uncached (statement_cache_size=0)"""

import asyncio
import sys

import asyncpg
from said import RUN, right, tasks

INSERT = "INSERT INTO written VALUES ($1, $2, 'x')"


async def main():
    cache = {"statement_cache_size": 0} if sys.argv[1] == "uncached" else {}
    pool = await asyncpg.create_pool(min_size=2, max_size=4, **cache)

    async def body(worker):
        async def auto():
            await pool.execute(INSERT, RUN, worker.id())

        async def transaction():
            async with pool.acquire() as c, c.transaction():
                await c.execute(INSERT, RUN, worker.id())
                async with c.transaction():
                    await c.execute(INSERT, RUN, worker.id())

        async def prepared():
            async with pool.acquire() as c:
                statement = await c.prepare("SELECT $1::int + 1")
                for wanted in range(3):
                    right(await statement.fetchval(wanted), wanted + 1)
                    await asyncio.sleep(0.002)

        async def many():
            async with pool.acquire() as c:
                await c.executemany(INSERT, [(RUN, worker.id()) for _ in range(3)])

        async def copy_in():
            async with pool.acquire() as c:
                rows = [(RUN, worker.id()), (RUN, worker.id())]
                done = await c.copy_records_to_table("written", records=rows, columns=["run", "id"])
                right(done, "COPY 2")

        async def copy_out():
            async with pool.acquire() as c:
                seen = bytearray()

                async def take(data):
                    seen.extend(data)

                await c.copy_from_query("SELECT generate_series(1, $1::int)", 500, output=take)
                right(seen.count(b"\n"), 500)

        async def cursor():
            async with pool.acquire() as c, c.transaction():
                rows = [row async for row in c.cursor("SELECT generate_series(1, 30)", prefetch=10)]
                right(len(rows), 30)

        async def script():
            async with pool.acquire() as c:
                await c.execute(f"INSERT INTO written VALUES ({RUN}, {worker.id()}); SELECT 1")

        async def after():
            pass

        return [auto, transaction, prepared, many, copy_in, copy_out, cursor, script], after

    await tasks(body)
    await asyncio.wait_for(pool.close(), 10)


asyncio.run(main())
