"""Publish a message to NATS by nats-py, from one source, also whenever the client reconnects.

Run: python examples/nats_client.py 'if!eth0' nats://nats.example.com:4222
"""

import asyncio
from urllib.parse import ParseResult

from command_line import run, say
from nats.aio import client, transport

import aiobind


class BoundTransport(transport.TcpTransport):
    """nats-py's own transport, on streams of a connector. It has no hook for this: its private names stay in here."""

    def __init__(self, nc: client.Client, connector: aiobind.Connector) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.via, nc._transport = connector, self  # noqa: SLF001

    def __bool__(self) -> bool:  # False would have the client make a transport of its own
        return True

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        self.io = await asyncio.wait_for(self.via.open_connection(str(uri.hostname), uri.port or 4222), connect_timeout)
        self._io_reader, self._io_writer = self._bare_io_reader, self._bare_io_writer = self.io


async def main(source: str, url: str) -> None:
    async with aiobind.Connector(source) as connector, client.Client() as nc:
        way = BoundTransport(nc, connector)
        await nc.connect(url, error_cb=say, max_reconnect_attempts=1, reconnect_time_wait=1)
        await nc.publish("greeting", b"hello")
        print("published from", aiobind.bound_source(way.io[1]).address)


if __name__ == "__main__":
    run(main)
