"""Ask a name server from one source by dnspython: by UDP, and by TCP if the answer is too long for that.

python examples/dns_query.py 'if!eth0' 192.0.2.53 example.com MX
"""

from typing import Any

import dns._asyncio_backend as theirs  # private: the classes that the public make_socket returns; until 2.8 without _
from command_line import run
from dns.asyncresolver import resolve_at

import aiobind

names = ("DatagramProtocol", "DatagramSocket", "StreamSocket")
Protocol, Datagrams, Stream = (vars(theirs).get(f"_{name}") or vars(theirs)[name] for name in names)


class BoundBackend(theirs.Backend):
    """dnspython's own, on sockets of a connector; but it asks over HTTPS, and over QUIC, in its own way."""

    def __init__(self, connector: aiobind.Connector) -> None:
        self.connector = connector

    async def make_socket(self, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        af, _, _, _, destination, *rest = arguments
        if destination is None:  # datagrams have theirs later
            return Datagrams(af, *await self.connector.create_datagram_endpoint(Protocol, family=af))
        tls = dict(zip(("ssl", "server_hostname"), rest[1:], strict=False))
        streams = self.connector.open_connection(*destination, **tls)
        return Stream(af, *await self.wait_for(streams, rest[0]))  # type: ignore[no-untyped-call]


async def main(source: str, server: str, name: str, kind: str) -> None:
    print(*await resolve_at(server, name, kind, backend=BoundBackend(aiobind.Connector(source))), sep="\n")


if __name__ == "__main__":
    run(main)
