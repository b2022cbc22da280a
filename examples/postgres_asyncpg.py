"""Ask PostgreSQL for its version by asyncpg, from one source, and so for all connections of a pool.

Run: python examples/postgres_asyncpg.py 'if!eth0' 'postgresql://me@db.example.com/app?sslmode=verify-full'
"""

import asyncpg
from command_line import run

import aiobind


async def main(source: str, dsn: str) -> None:
    async with (
        aiobind.Connector(source) as connector,
        asyncpg.create_pool(dsn, loop=connector.as_loop(), min_size=1) as pool,
    ):
        print(await pool.fetchval("SELECT inet_client_addr() || ': ' || version()"))


if __name__ == "__main__":
    run(main)
