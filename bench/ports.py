"""How many connections can one source hold, and what does each cost while the local ports run out?

    python -m bench.ports [--quick] [--json FILE]

A socket that is bound by ``bind((address, 0))`` takes a port for all destinations. One that leaves the choice to
connect(2) shares its port among destinations; but the kernel's search prefers every other port of the range, and once
those are taken it passes them all in each connect. aiobind avoids both.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import random
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import aiobind
from aiobind.lab import Lab
from bench import table
from bench.apart import LOOPS, RESET, apart, cpu, files, run, served
from bench.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiobind.lab import Nic

PORT = 8080
IP_BIND_ADDRESS_NO_PORT, IP_LOCAL_PORT_RANGE = 24, 51
DESTINATIONS = (1, 2, 5, 19)
#: How much of the range is held, in percent: 49 and 52 are before and behind the half, where the search turns bad.
FILLED = (0, 49, 52, 90, 99)

#: Connects to an address and port, and returns a socket or transport.
Connect = Callable[[str, int], Awaitable[Any]]


# --- the peers ------------------------------------------------------------------------------------------------


def by_aiobind(nic: Nic, **options: Any) -> Connect:
    return aiobind.Connector(f"if!{nic.name}", **options).connect


def by_asyncio(nic: Nic) -> Connect:
    async def connect(host: str, port: int) -> Any:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, host, port, local_addr=(nic.v4, 0))
        return transport

    return connect


def by_anyio(nic: Nic) -> Connect:
    import anyio

    async def connect(host: str, port: int) -> Any:
        return await anyio.connect_tcp(host, port, local_host=nic.v4)

    return connect


class ByHand(NamedTuple):
    """What a program does by itself with ``loop.sock_connect``."""

    device: bool = False
    address: bool = False
    no_port: bool = False
    reuse: bool = False

    def open(self, nic: Nic) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if self.device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, nic.name.encode())
        if self.no_port:
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        if self.reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return sock

    @property
    def reserves(self) -> bool:
        """Whether bind(2) takes a port."""
        return self.address and not self.no_port

    def bind(self, sock: socket.socket, nic: Nic, port: int = 0) -> None:
        if self.address:
            sock.bind((nic.v4, port))

    def peer(self, nic: Nic) -> Connect:
        async def connect(host: str, port: int) -> Any:
            sock = self.open(nic)
            try:
                self.bind(sock, nic)
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
            except BaseException:
                sock.close()
                raise
            return sock

        return connect


RESERVED, DEVICE, SHARED = ByHand(address=True), ByHand(device=True), ByHand(address=True, no_port=True)
#: What aiobind's sockets are to the kernel.
BOTH = ByHand(device=True, address=True, no_port=True)

HOLDERS: dict[str, Callable[[Nic], Connect]] = {
    "aiobind": by_aiobind,
    "asyncio local_addr": by_asyncio,
    "bind((address, 0)) by hand, as Go": RESERVED.peer,
    "anyio": by_anyio,
}


class Filler(NamedTuple):
    """A peer, and the sockets that fill the range for it: of the kind that its own are, on each loop."""

    connect: Callable[[Nic], Connect]
    kinds: dict[str, ByHand]


FILLERS = {
    "aiobind": Filler(by_aiobind, dict.fromkeys(LOOPS, BOTH)),
    "aiobind fast_connect": Filler(lambda nic: by_aiobind(nic, fast_connect=True), {"asyncio": BOTH}),
    # libuv sets SO_REUSEADDR before each bind(2).
    "asyncio local_addr": Filler(by_asyncio, {loop: RESERVED._replace(reuse=loop == "uvloop") for loop in LOOPS}),
    "sock_connect by hand, device": Filler(DEVICE.peer, dict.fromkeys(LOOPS, DEVICE)),
    "sock_connect by hand, address and NO_PORT": Filler(SHARED.peer, dict.fromkeys(LOOPS, SHARED)),
}


def end(connection: Any) -> None:
    """End a connection at once: a socket or a transport."""
    if isinstance(connection, socket.socket):
        connection.setsockopt(*RESET)
        connection.close()
    else:
        connection.get_extra_info("socket").setsockopt(*RESET)
        connection.abort()


# --- how many can be held -------------------------------------------------------------------------------------


def hold(label: str, loop: str, ports: int, destinations: Sequence[int]) -> list[int]:
    """Return how many connections are held when no port is left towards so many destinations."""
    files(ports * destinations[-1] + 1000)
    with Lab(nics=1) as lab:
        lab.near.sysctl("ipv4.ip_local_port_range", f"5000 {5000 + ports - 1}")
        hosts = [f"203.0.113.{1 + at}" for at in range(destinations[-1])]
        for host in hosts:
            lab.add_target(host)
        with lab.far:
            # Nobody accepts: what waits for that is established.
            listeners = [socket.create_server((host, PORT), backlog=2 * ports) for host in hosts]
        counts = run(loop, _hold(HOLDERS[label](lab.nics[0]), hosts))
        for listener in listeners:
            listener.close()
        return [counts[count - 1] for count in destinations]


async def _hold(connect: Connect, hosts: Sequence[str]) -> list[int]:
    counts, held = list[int](), list[Any]()
    for host in hosts:
        with suppress(OSError):
            while True:
                try:
                    held.append(await connect(host, PORT))
                except OSError as error:
                    # anyio has no errno; all others must have run out of ports, not of anything else.
                    if error.errno not in {errno.EADDRNOTAVAIL, errno.EADDRINUSE, None}:
                        raise AssertionError(f"unexpected: {error}") from error
                    raise
        counts.append(len(held))
    for connection in held:
        if hasattr(connection, "aclose"):
            await connection.aclose()
        else:
            end(connection)
    await asyncio.sleep(0.01)  # asyncio ends a transport a turn later
    return counts


def measure_held(quick: bool) -> Table:
    ports = 50 if quick else min(1000, (files(20_000) - 1000) // DESTINATIONS[-1])
    found = Table(
        "ports-held",
        f"Connections held from one source with {ports:,} local ports; more is better",
        "connections",
        [str(count) for count in DESTINATIONS],
        baseline="1",
        note="They are opened until no port is left. Whoever binds the address reserves a port for all destinations.",
        kind="lines",
        axis="destinations",
    )
    for label in HOLDERS:
        if label == "anyio" and not find_spec("anyio"):
            found.skipped[label] = "not installed"
            continue
        for loop in LOOPS:
            for count, held in zip(DESTINATIONS, apart(hold, label, loop, ports, DESTINATIONS), strict=True):
                found.add(label, str(count), held, loop)
    return found


# --- what each costs as the range fills -----------------------------------------------------------------------


class Settings(NamedTuple):
    low: int
    high: int
    rounds: int
    #: connects in a round, and after how many seconds it ends in any case
    connects: int
    longest: float


#: What Linux comes with: 28,232 ports.
FULL = Settings(32768, 60999, rounds=7, connects=100, longest=0.1)
QUICK = Settings(32768, 33767, rounds=2, connects=10, longest=0.05)


def fill(label: str, loop: str, settings: Settings) -> list[tuple[list[float], list[float]]]:
    """Return the microseconds of CPU and of time for each connect, of each round, by how much is held."""
    files(settings.high - settings.low + 1000)
    filler = FILLERS[label]
    with Lab(nics=1) as lab:
        lab.near.sysctl("ipv4.ip_local_port_range", f"{settings.low} {settings.high}")
        with lab.far:
            listener = socket.create_server((lab.target_v4, PORT), backlog=4096)
        with served(listener):
            held: list[socket.socket] = []
            try:
                main = _fill(
                    filler.connect(lab.nics[0]), filler.kinds[loop], lab.nics[0], lab.target_v4, settings, held
                )
                return run(loop, main)
            finally:
                for sock in held:
                    sock.close()


async def _fill(
    connect: Connect, kind: ByHand, nic: Nic, host: str, settings: Settings, held: list[socket.socket]
) -> list[tuple[list[float], list[float]]]:
    order = _order(range(settings.low, settings.high + 1), reserved=kind.reserves)
    found: list[tuple[list[float], list[float]]] = []
    for share in FILLED:
        more = order[len(held) : len(order) * share // 100]
        held += [_on(kind, nic, (host, PORT), port) for port in more]
        gc.collect()
        gc.freeze()  # the collector shall not look through what is held: that is Python's cost, and not the ports'
        cpus, times = list[float](), list[float]()
        for turn in range(settings.rounds + 1):
            begun, start, count = time.monotonic(), cpu(), 0
            while count < settings.connects and (count < 10 or time.monotonic() - begun < settings.longest):
                end(await connect(host, PORT))
                count += 1
            await asyncio.sleep(0)  # asyncio ends a transport a turn later
            if turn:  # the first one warms up
                cpus.append((cpu() - start) / count * 1e6)
                times.append((time.monotonic() - begun) / count * 1e6)
        await asyncio.sleep(0.01)  # no port of these is to be in the way of those that fill
        found.append((cpus, times))
    return found


def _order(ports: range, *, reserved: bool) -> list[int]:
    """Return the ports as they would be taken, one after the other.

    connect(2) looks first at those with the parity of the lowest, bind(2) at the others (``inet_csk_find_open_port``:
    "to not pollute connect users").
    """
    first, second = list(ports[1 if reserved else 0 :: 2]), list(ports[0 if reserved else 1 :: 2])
    generator = random.Random(1)
    generator.shuffle(first)
    generator.shuffle(second)
    return first + second


def _on(kind: ByHand, nic: Nic, target: tuple[str, int], port: int) -> socket.socket:
    """Return a socket of this kind that is connected from *port*: the kernel's choice, of which nothing else is left.

    That is what it would be in the end by the kernel's search alone, which takes minutes for all of the range.
    """
    sock = kind.open(nic)
    sock.setblocking(True)
    sock.setsockopt(*RESET)
    if kind.reserves:
        kind.bind(sock, nic, port)
    else:
        kind.bind(sock, nic)
        sock.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, (port << 16 | port).to_bytes(4, sys.byteorder))
    sock.connect(target)
    assert sock.getsockname()[1] == port
    return sock


def _has_ranges() -> bool:
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, b"\0\0\0\0")
        except OSError:
            return False
        return True


def measure_fill(quick: bool) -> Iterator[Table]:
    settings = QUICK if quick else FULL
    wanted = settings.high - settings.low + 1
    ports = min(wanted, files(wanted + 1000) - 1000)
    settings = settings._replace(high=settings.low + ports - 1)
    tables = [
        Table(
            name,
            f"{what} of each connect and close, as {ports:,} local ports towards one destination fill",
            f"µs of {what}",
            [str(share) for share in FILLED],
            baseline="0",
            note="So much of the range is held by connections of the same kind to the same destination. The server is "
            "another process. One peer after the other, and for each one share after the other.",
            kind="lines",
            axis="% of the range held",
        )
        for name, what in (("ports-fill", "CPU"), ("ports-fill-time", "time"))
    ]
    missing = ""
    if ports < 1000:
        missing = f"no more than {ports + 1000:,} files may be open"
    elif not _has_ranges():
        missing = "the kernel has no IP_LOCAL_PORT_RANGE (Linux 6.3), by which the range is filled"
    for label, filler in FILLERS.items():
        if missing:
            for one in tables:
                one.skipped[label] = missing
            continue
        for loop in filler.kinds:
            found = apart(fill, label, loop, settings)
            for share, rounds in zip(FILLED, found, strict=True):
                for one, values in zip(tables, rounds, strict=True):
                    one.add(label, str(share), values, loop)
    yield from tables


def measure(quick: bool) -> Iterator[Table]:
    yield measure_held(quick)
    yield from measure_fill(quick)


if __name__ == "__main__":
    table.main(measure)
