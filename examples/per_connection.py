"""A proxy that chooses, for each connection, the source that it leaves from: by the network or domain it goes to.

    python examples/per_connection.py 8888 10.0.0.0/8='if!tun0' example.com='if!wwan0' '*=if!eth0'
    curl --proxytunnel --proxy http://127.0.0.1:8888 https://www.example.com/

It speaks HTTP's CONNECT. The first rule that fits decides; what fits none is refused.
"""

import asyncio
import sys
from contextlib import closing, suppress
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import aiobind

TUNNELS = 100  # at the same time; one more is refused


def fits(where: IPv4Network | IPv6Network | str, host: str) -> bool:
    """Tell whether *host* is in the network, or in the domain, *where*."""
    if isinstance(where, str):
        return where == "*" or f".{host}".endswith(f".{where}")
    with suppress(ValueError):  # *host* is a name
        return ip_address(host) in where
    return False


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes, no faster than it is taken, and at last its end; the other direction may go on."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


class Gateway:
    """Tunnels by rules, each a network, a domain or ``*``, then ``=`` and the source."""

    def __init__(self, rules: list[str]) -> None:
        pairs = [(where, aiobind.parse_source(source)) for where, _, source in (rule.partition("=") for rule in rules)]
        self.rules = [(ip_network(where) if "/" in where else where, source) for where, source in pairs]
        self.connector = aiobind.Connector(*dict.fromkeys(source for _, source in pairs))
        self.free = asyncio.Semaphore(TUNNELS)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client: connect as it asks for, and pass on both ways until both have ended."""
        with closing(writer):
            if self.free.locked():
                writer.write(b"HTTP/1.1 503 too many tunnels\r\n\r\n")
                return
            async with self.free:
                try:
                    far_reader, far_writer = await self.connect(reader)
                except (OSError, ValueError, EOFError, asyncio.LimitOverrunError) as error:
                    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    writer.write(f"HTTP/1.1 502 {reason}\r\n\r\n".encode())
                    return
                with closing(far_writer), suppress(OSError):
                    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                    await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    async def connect(self, reader: asyncio.StreamReader) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Read a CONNECT request, and open the connection from the source that is for its destination."""
        async with asyncio.timeout(30):
            method, target, _ = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split(" ", 2)
            host, _, port = target.rpartition(":")
            host = host.strip("[]")
            source = next((source for where, source in self.rules if fits(where, host)), None)
            if method != "CONNECT" or source is None:
                raise ValueError(f"no rule for {method} {target}")
            streams = await self.connector.open_connection(host, int(port), source=source)
        print(f"{target} from {source}: {aiobind.bound_source(streams[1]).address}", flush=True)
        return streams


async def main(port: int, rules: list[str]) -> None:
    gateway, tunnels = Gateway(rules), set[asyncio.Task[None]]()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: at Ctrl-C Python 3.11 complains of the tasks that start_server makes.
        tunnels.add(task := asyncio.create_task(gateway.accept(reader, writer)))
        task.add_done_callback(tunnels.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", port)
    print("listening on {}:{}".format(*server.sockets[0].getsockname()), flush=True)
    try:
        await asyncio.Event().wait()  # not serve_forever(), whose end waits for that of every tunnel
    finally:
        server.close()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: per_connection.py PORT WHERE=SOURCE ...")
    try:
        asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
    except (ValueError, OSError, OverflowError) as error:  # a wrong rule, a port that is taken
        sys.exit(f"per_connection: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
