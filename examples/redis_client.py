"""Set and get a key of Redis by redis-py, from one source, whenever the pool reconnects as well.

Run: python examples/redis_client.py 'if!eth0' redis.example.com 6379
"""

import asyncio
from typing import Any

from command_line import run
from redis.asyncio import Connection, ConnectionPool, Redis

import aiobind


class BoundConnection(Connection):
    """redis-py's own connection, dialled by a connector; with TLS: ``class ...(BoundConnection, SSLConnection)``."""

    def __init__(self, *, connector: aiobind.Connector, **options: Any) -> None:
        super().__init__(**options)
        self.connector = connector

    async def _connect(self) -> None:  # what a connection class has to define
        async with asyncio.timeout(self.socket_connect_timeout):
            self._reader, self._writer = await self.connector.open_connection(**self._connection_arguments())


async def main(source: str, host: str, port: str) -> None:
    async with aiobind.Connector(source) as connector:
        pool = ConnectionPool(connection_class=BoundConnection, connector=connector, host=host, port=int(port))
        async with Redis.from_pool(pool) as client:
            await client.set("greeting", "hello", ex=60)
            print(await client.get("greeting"), "from", (await client.client_info())["addr"])


if __name__ == "__main__":
    run(main)
