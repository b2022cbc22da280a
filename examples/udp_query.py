"""Ask a time server over UDP (SNTP, RFC 4330), from one source.

python examples/udp_query.py 'if!eth0' pool.ntp.org
"""

import asyncio
from datetime import UTC, datetime, timedelta

from command_line import run

import aiobind


class Answer(asyncio.DatagramProtocol):
    """One answer, or why there is none."""

    def __init__(self) -> None:
        self.received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if not self.received.done():
            self.received.set_result(data)

    def error_received(self, exc: Exception) -> None:  # nobody listens there, or the link has gone
        if not self.received.done():
            self.received.set_exception(exc)


async def main(source: str, host: str, port: str = "123") -> None:
    async with aiobind.Connector(source) as connector, asyncio.timeout(5):
        transport, answer = await connector.create_datagram_endpoint(Answer, remote_addr=(host, int(port)))
        transport.sendto(bytes([0b00_100_011]).ljust(48, b"\0"))  # version 4, mode 3: a client asks
        print(datetime(1900, 1, 1, tzinfo=UTC) + timedelta(seconds=int.from_bytes((await answer.received)[40:44])))
        print(f"asked from {aiobind.bound_source(transport).address}")
        transport.close()


if __name__ == "__main__":
    run(main)
