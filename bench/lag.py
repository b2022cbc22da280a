"""What happens to an event loop while 50 source names take two seconds each to be looked up?

    python -m bench.lag [--quick] [--json FILE]

Each of 50 connections leaves from the address of a name of its own, ``host!`` in aiobind and ``local_addr=(name, 0)``
elsewhere, at the same time on one loop. Measured is when the last one is connected, how late the loop was at worst
for a timer of a millisecond, and how long another program's ``loop.getaddrinfo`` of a name that is answered at once
takes beside it.
"""

from __future__ import annotations

import asyncio
import heapq
import select
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import aiobind
from aiobind.lab import Lab, replace_file
from bench import table
from bench.apart import LOOPS, Apart, apart, run, served
from bench.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT, SERVER = 8080, "127.0.0.53"
COLUMNS = ("all connected", "lag", "other look-up")
#: getaddrinfo asks this server alone, and neither repeats a question nor gives up meanwhile.
FILES = {
    "/etc/resolv.conf": f"nameserver {SERVER}\noptions timeout:120 attempts:1\n",
    "/etc/hosts": "127.0.0.1 localhost\n",
    "/etc/nsswitch.conf": "hosts: files dns\n",
}

#: Has a connection from the address of a name, to a host, and ends it.
Connect = Callable[[str, str], Coroutine[Any, Any, None]]


# --- the name server ------------------------------------------------------------------------------------------


def answer(server: socket.socket) -> None:
    """Answer ``a7.2000.test`` with 198.18.0.107 after 2000 ms, and that it has no IPv6 address; until killed."""
    waiting: list[tuple[float, bytes, Any]] = []
    while True:
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        if select.select([server], [], [], wait)[0]:
            question, peer = server.recvfrom(512)
            first = question[13 : 13 + question[12]]
            second = question[14 + len(first) :][: question[13 + len(first)]]
            heapq.heappush(waiting, (time.monotonic() + int(second) / 1000, question, peer))
        while waiting and waiting[0][0] <= time.monotonic():
            _, question, peer = heapq.heappop(waiting)
            end = question.index(b"\0", 12) + 5
            (kind,) = struct.unpack_from("!H", question, end - 4)
            number = int(question[14 : 13 + question[12]])
            address = b""
            if kind == 1:
                address = struct.pack("!HHHIH4B", 0xC00C, 1, 1, 0, 4, 198, 18, 0, 100 + number)
            flags = struct.pack("!5H", 0x8180, 1, int(kind == 1), 0, 0)
            server.sendto(question[:2] + flags + question[12:end] + address, peer)


# --- the peers ------------------------------------------------------------------------------------------------


def by_aiobind() -> Connect:
    connector = aiobind.Connector("127.0.0.1")

    async def connect(name: str, host: str) -> None:
        (await connector.connect(host, PORT, source=f"host!{name}")).close()

    return connect


def by_asyncio() -> Connect:
    async def connect(name: str, host: str) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, host, PORT, local_addr=(name, 0))
        transport.abort()

    return connect


def by_aiohttp() -> Connect:
    import aiohttp

    async def connect(name: str, host: str) -> None:
        # One connector for each address, as aiohttp has it.
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(name, 0))) as session,
            session.get(f"http://{host}:{PORT}/") as response,
        ):
            await response.read()

    return connect


PEERS: dict[str, Callable[[], Connect]] = {
    "aiobind": by_aiobind,
    "asyncio local_addr": by_asyncio,
    "aiohttp local_addr": by_aiohttp,
}


async def _connect_all(connect: Connect, host: str, names: int, delay: int, turn: int) -> list[float]:
    """Return the milliseconds of `COLUMNS`."""
    loop = asyncio.get_running_loop()
    late, ended = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal late
        while not ended.is_set():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            late = max(late, time.monotonic() - before - 0.001)

    async def look_up() -> float:
        before = time.monotonic()
        await loop.getaddrinfo(f"a0.0.r{turn}.test", 80, type=socket.SOCK_STREAM)
        return time.monotonic() - before

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.1)
    late, start = 0.0, time.monotonic()
    connecting = [asyncio.create_task(connect(f"a{at}.{delay}.r{turn}.test", host)) for at in range(1, names + 1)]
    other = asyncio.create_task(look_up())
    await asyncio.gather(*connecting)
    all_connected = time.monotonic() - start
    taken = await other
    ended.set()
    await watching
    return [all_connected * 1000, late * 1000, taken * 1000]


def connect_all(label: str, loop: str, host: str, names: int, delay: int, turn: int) -> list[float]:
    async def main() -> list[float]:
        return await _connect_all(PEERS[label](), host, names, delay, turn)

    return run(loop, main())


# --- the measurement ------------------------------------------------------------------------------------------


def measure(quick: bool) -> Iterator[Table]:
    names, delay, rounds, longest = (10, 300, 2, 2.0) if quick else (50, 2000, 7, 30.0)
    found = Table(
        "names",
        f"{names} connections from {names} source names that take {delay / 1000:g} s each",
        "ms",
        list(COLUMNS),
        note="lag: how late a timer of 1 ms was at worst. Other look-up: a name that is answered at once, asked for by "
        f"loop.getaddrinfo at the same time. What was not done in {longest:g} s was ended: it stands as {longest:g} s. "
        "One peer after the other, all but aiobind once.",
    )
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(nics=1))
        for path, text in FILES.items():
            stack.enter_context(replace_file(path, text))
        nic = lab.nics[0]
        lab.near.ip(*(f"address add 198.18.0.{100 + at}/24 dev {nic.name}" for at in range(names + 1)))
        with lab.far:
            stack.enter_context(served(socket.create_server((lab.target_v4, PORT), backlog=1024)))
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        server.bind((SERVER, 53))
        stack.callback(Apart(answer, server).kill)
        server.close()
        for label in PEERS:
            for loop in LOOPS:
                measured: list[list[float]] = []
                for turn in range(rounds if label == "aiobind" else 1):  # the others take half a minute each
                    try:
                        values = apart(connect_all, label, loop, lab.target_v4, names, delay, turn, within=longest)
                    except TimeoutError:
                        values = [longest * 1000] * len(COLUMNS)
                    measured.append(values)
                for column, found_each in zip(COLUMNS, zip(*measured, strict=True), strict=True):
                    found.add(label, column, found_each, loop)
    yield found


if __name__ == "__main__":
    table.main(measure)
