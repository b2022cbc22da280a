"""How much memory does this process take for each connection that it holds?

    python -m bench.memory [--quick] [--json FILE]

Each peer opens its connections in a fresh process. Counted is what is this process's own afterwards beyond what was
there before (PSS of ``/proc/self/smaps_rollup``), and how many blocks Python's allocator has handed out
(``sys.getallocatedblocks``), for each connection. The kernel's memory, the same for all of them, is in neither.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiobind
from aiobind.lab import Lab
from bench import table
from bench.apart import LOOPS, apart, files, run, served
from bench.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiobind.lab import Nic

#: A pool reuses what is idle, unless it is to another port: so many at once go to each one.
AT_ONCE, PORT = 100, 8000

#: Opens a connection to an address and port, and returns what holds it.
Open = Callable[[str, int], Awaitable[Any]]


# --- the peers ------------------------------------------------------------------------------------------------


def sockets_by_hand(nic: Nic) -> Open:
    async def open_one(host: str, port: int) -> Any:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, nic.name.encode())
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
        return sock

    return open_one


def sockets(nic: Nic) -> Open:
    return aiobind.Connector(f"if!{nic.name}").connect


def streams_by_asyncio(nic: Nic) -> Open:
    async def open_one(host: str, port: int) -> Any:
        return await asyncio.open_connection(host, port, local_addr=(nic.v4, 0))

    return open_one


def streams(nic: Nic) -> Open:
    return aiobind.Connector(f"if!{nic.name}").open_connection


def _pool(connector: Any) -> Open:
    import aiohttp

    session = aiohttp.ClientSession(connector=connector)

    async def open_one(host: str, port: int) -> Any:
        async with session.get(f"http://{host}:{port}/") as response:
            await response.read()
        return session

    return open_one


def pool_by_aiohttp(nic: Nic) -> Open:
    import aiohttp

    return _pool(aiohttp.TCPConnector(local_addr=(nic.v4, 0), limit=0, keepalive_timeout=600))


def pool(nic: Nic) -> Open:
    from aiobind.aiohttp import BoundTCPConnector

    return _pool(BoundTCPConnector(f"if!{nic.name}", limit=0, keepalive_timeout=600))


#: In pairs: the other's, and ours.
PEERS: dict[str, Callable[[Nic], Open]] = {
    "sockets by hand": sockets_by_hand,
    "aiobind sockets": sockets,
    "asyncio streams, local_addr": streams_by_asyncio,
    "aiobind streams": streams,
    "aiohttp pool, local_addr": pool_by_aiohttp,
    "BoundTCPConnector pool": pool,
}


# --- the measurement ------------------------------------------------------------------------------------------


def hold(label: str, loop: str, nic: Nic, host: str, ports: Sequence[int]) -> tuple[float, float]:
    """Return the KiB and the blocks of each connection."""
    files(AT_ONCE * len(ports) + 1000)
    return run(loop, _hold(label, nic, host, ports))


async def _hold(label: str, nic: Nic, host: str, ports: Sequence[int]) -> tuple[float, float]:
    open_one = PEERS[label](nic)
    held: list[Any] = []
    start = 0.0, 0
    for at, port in enumerate(ports):
        if at == 1:  # what everything takes but once is there now
            start = _taken()
        held += await asyncio.gather(*(open_one(host, port) for _ in range(AT_ONCE)))
    kib, blocks = _taken()
    count = AT_ONCE * (len(ports) - 1)
    opened = _open_sockets()
    assert opened >= AT_ONCE * len(ports), f"of {AT_ONCE * len(ports)} connections {opened} are there"
    await _end(held)
    return (kib - start[0]) / count, (blocks - start[1]) / count


async def _end(held: list[Any]) -> None:
    if hasattr(held[0], "cookie_jar"):  # a session
        await held[0].close()
        return
    for one in held:
        if isinstance(one, tuple):  # of streams
            one[1].transport.abort()
        else:
            one.close()
    await asyncio.sleep(0.01)  # asyncio ends a transport a turn later


def _open_sockets() -> int:
    return sum(map(_is_socket, Path("/proc/self/fd").iterdir()))


def _is_socket(descriptor: Path) -> bool:
    try:
        return str(descriptor.readlink()).startswith("socket:")
    except OSError:  # the one by which they are listed
        return False


def _taken() -> tuple[float, int]:
    gc.collect()
    blocks = sys.getallocatedblocks()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("Pss:"))), blocks


def measure(quick: bool) -> Iterator[Table]:
    count, rounds = (500, 1) if quick else (10_000, 1)
    what = f"connection held, at {count:,}"
    titles = f"Memory of the process for each {what}", f"Blocks of Python's allocator for each {what}"
    once = "Once, each in a process of its own."
    tables = [
        Table(name, title, unit, ["KiB" if unit == "KiB" else "blocks"], note=f"{once} {note}")
        for name, title, unit, note in (
            ("memory", titles[0], "KiB", "Without the kernel's, which is the same for all of them."),
            ("memory-blocks", titles[1], "blocks", "uvloop has memory of its own beside these."),
        )
    ]
    ports = range(PORT, PORT + count // AT_ONCE + 1)
    files(20_000)
    with Lab(nics=1) as lab:
        # What a process leaves at its end would keep its ports from the next one for a minute.
        lab.near.sysctl("ipv4.tcp_max_tw_buckets", 0)
        with lab.far:
            listeners = [socket.create_server((lab.target_v4, port), backlog=1024) for port in ports]
        with served(*listeners):
            found: dict[tuple[str, str], list[tuple[float, float]]] = {}
            for _ in range(rounds):
                for label in PEERS:
                    for loop in LOOPS:
                        values = apart(hold, label, loop, lab.nics[0], lab.target_v4, ports)
                        found.setdefault((label, loop), []).append(values)
            for (label, loop), pairs in found.items():
                for one, values in zip(tables, zip(*pairs, strict=True), strict=True):
                    one.add(label, one.columns[0], values, loop)
    yield from tables


if __name__ == "__main__":
    table.main(measure)
