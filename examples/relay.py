"""A relay on the loop for clients that take no hook, such as those in C. They must not block it. TLS passes through."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from weakref import WeakSet

from per_connection import copy

import aiobind


@asynccontextmanager
async def relay(connector: aiobind.Connector, host: str, port: int) -> AsyncIterator[int]:
    """Yield a port of 127.0.0.1 that leads to *host*; where it does not, the client's error has ours as its cause."""
    tasks, failures = WeakSet[asyncio.Task[object]](), list[OSError]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.update(filter(None, [asyncio.current_task()]))  # its protocol keeps it
        with closing(writer), suppress(asyncio.CancelledError):
            try:
                far_reader, far_writer = await connector.open_connection(host, port)
            except OSError as error:
                failures[:] = [error]
                return
            failures.clear()
            with closing(far_writer), suppress(OSError):
                await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        try:
            yield server.sockets[0].getsockname()[1]
        except Exception as error:
            raise error from (failures[0] if failures else error.__cause__)
        finally:
            for task in tasks:
                task.cancel()
