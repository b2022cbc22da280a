"""Law: many sources under one session, and NICs that come and go: what must be seen from both sides of the links.

The links are real (veth pairs), so are the server, the requests and the connections. The far side is the judge: it
knows which NIC each SYN came by, and whose address each request had.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import itertools
import logging
import math
import os
import random
import re
import socket
import struct
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

import aiobind
from aiobind.aiohttp import BoundTCPConnector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiobind.lab import Lab, Nic, Witness

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize(
        "anyio_backend", [("asyncio", {}), ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"]
    ),
]

V4, V6 = "203.0.113.80", "2001:db8:ffff::80"
NAMES = ("n0", "n1", "n2")
SOURCES = tuple(f"if!{name}" for name in NAMES)

#: What takes longer has waited for something dead. The promise is 0.5 s for a request, 50 ms for an idle connection;
#: what was measured is printed, and the bound leaves room for a machine that does other things as well.
SOON = 3.0


# --- the other side -----------------------------------------------------------------------------------------


class Far:
    """A web server at the far side. ``/NUMBER/MILLISECONDS/LENGTH/HOW`` is answered after so long, by so many bytes.

    HOW is any of: ``close``, the connection ends with the answer; ``halves``, half of the answer comes at once.
    """

    def __init__(self) -> None:
        self.accepted: list[tuple[str, int]] = []
        self.asked: defaultdict[str, list[str]] = defaultdict(list)  # the addresses that asked for this number
        self.ended = 0
        self.open: set[asyncio.Transport] = set()

    @property
    def shares(self) -> Counter[str]:
        return Counter(itertools.chain.from_iterable(self.asked.values()))


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, far: Far) -> None:
        self.far = far
        self.read = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        peer = transport.get_extra_info("peername")
        if peer is None:  # it has been reset already
            transport.abort()
            return
        self.peer = peer[:2]
        self.far.accepted.append(self.peer)
        self.far.open.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.far.ended += 1
        self.far.open.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.read += data
        while b"\r\n\r\n" in self.read:
            head, _, self.read = self.read.partition(b"\r\n\r\n")
            number, delay, length, how = head.split(b" ")[1].decode().strip("/").split("/")
            self.far.asked[number].append(self.peer[0])
            body = number.encode().ljust(int(length), b".")
            close = "close" in how
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (
                len(body),
                b"Connection: close\r\n" if close else b"",
                body,
            )
            at_once = len(answer) - len(body) // 2 if "halves" in how else 0
            if at_once:
                self.transport.write(answer[:at_once])
            asyncio.get_running_loop().call_later(int(delay) / 1000, self._answer, answer[at_once:], close)

    def _answer(self, rest: bytes, close: bool) -> None:
        if self.transport.is_closing():
            return  # uvloop raises, whereas asyncio says nothing
        self.transport.write(rest)
        if close:
            self.transport.close()


@pytest.fixture
async def far(lab: Lab) -> AsyncIterator[Far]:
    far, loop = Far(), asyncio.get_running_loop()
    with lab.far:
        socks = [
            socket.create_server(("", 80), family=family, backlog=1024) for family in (socket.AF_INET, socket.AF_INET6)
        ]
    servers = [await loop.create_server(lambda: _Connection(far), sock=sock) for sock in socks]
    try:
        yield far
    finally:
        for server in servers:
            server.close()
        while far.open:
            for transport in tuple(far.open):
                transport.abort()  # a link that is down lets nothing end by itself
            await asyncio.sleep(0)


def new(lab: Lab, nic: Nic) -> None:
    """Make a NIC that was deleted."""
    far_fd = f"/proc/{os.getpid()}/fd/{lab.far.fileno()}"
    lab.near.ip(f"link add {nic.name} type veth peer name {nic.far_name} netns {far_fd}")


def restore(lab: Lab, name: str) -> None:
    """Bring the NIC to the state in which the lab was made: up, with its addresses and routes, at both ends."""
    nic = lab.nic(name)
    lab.far.ip(
        f"link set {nic.far_name} up",
        f"addr replace {nic.gateway_v4}/24 dev {nic.far_name}",
        f"addr replace {nic.gateway_v6}/64 dev {nic.far_name} nodad",
    )
    metric = 1000 + NAMES.index(name)
    lab.near.ip(
        f"link set {name} up",
        f"addr replace {nic.v4}/24 dev {name}",
        f"addr replace {nic.v6}/64 dev {name} nodad",
        f"route replace default via {nic.gateway_v4} dev {name} metric {metric}",
        f"route replace default via {nic.gateway_v6} dev {name} metric {metric}",
    )


#: What can happen to a NIC, and how it is undone before it is restored.
LOSSES: dict[str, tuple[Callable[[Lab, Nic], object], Callable[[Lab, Nic], object] | None]] = {
    "down": (lambda lab, nic: lab.near.ip(f"link set {nic.name} down"), None),
    "deleted": (lambda lab, nic: lab.near.ip(f"link del {nic.name}"), new),
    "renamed": (
        lambda lab, nic: lab.near.ip(f"link set {nic.name} name w{nic.name}"),
        lambda lab, nic: lab.near.ip(f"link set w{nic.name} name {nic.name}"),
    ),
    "no address": (lambda lab, nic: lab.near.ip(f"addr flush dev {nic.name} scope global"), None),
    "no carrier": (lambda lab, nic: lab.far.ip(f"link set {nic.far_name} down"), None),
}


def lose(lab: Lab, name: str, how: str) -> None:
    LOSSES[how][0](lab, lab.nic(name))


def regain(lab: Lab, name: str, how: str) -> None:
    undo = LOSSES[how][1]
    if undo is not None:
        undo(lab, lab.nic(name))
    restore(lab, name)


# --- this side ----------------------------------------------------------------------------------------------


def stats(connector: Any) -> dict[str, aiobind.SourceStats]:
    return {str(figures.source): figures for figures in connector.stats()}


def url(path: str, host: str = V4) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}/{path}"


async def ask(session: aiohttp.ClientSession, far: Far, path: str | None = None, host: str = V4) -> str:
    """Ask one question; return the address that the far side was asked by."""
    path = path or f"{len(far.asked)}/0/10/keep"
    async with session.post(url(path, host)) as response:
        await response.read()
    return far.asked[path.partition("/")[0]][-1]


@contextlib.asynccontextmanager
async def both_doors(*sources: str, on_event: Any = None, policy: Any = None) -> AsyncIterator[dict[str, Any]]:
    """Yield each kind of connector, with a function that connects by it and ends the connection."""
    doors = {"Connector": aiobind.Connector, "aiohttp": BoundTCPConnector}
    streams, pooled = (door(*sources, policy=copy.copy(policy), on_event=on_event) for door in doors.values())

    async def get_stream(host: str = V4, *, sock_connect: float | None = None) -> None:
        sock = await streams.connect(host, 80)
        sock.close()

    async def get_request(host: str = V4, *, sock_connect: float | None = None) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=sock_connect)
        async with session.post(url("1/0/10/close", host), timeout=timeout) as response:
            await response.read()

    async with streams, aiohttp.ClientSession(connector=pooled) as session:
        yield {"Connector": (streams, get_stream), "aiohttp": (pooled, get_request)}


async def until(condition: Callable[[], object], what: str, seconds: float = 10.0) -> float:
    """Wait for *condition*; return how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.001)
    return time.monotonic() - began


# --- the proof ----------------------------------------------------------------------------------------------

_REQUESTS, _TOGETHER, _AFTERWARDS = 5000, 100, 300


class Client:
    """Asks questions, and asks again when an answer was cut off."""

    def __init__(self, session: aiohttp.ClientSession, far: Far) -> None:
        self.session = session
        self.far = far
        self.answered = 0
        self.cut: list[tuple[float, list[str], aiohttp.ClientError]] = []  # when, by which address it was asked, how
        self.waits: list[tuple[float, float]] = []  # when, and how much longer than the answer took
        self.numbers = itertools.count()
        self.random = random.Random(4)

    async def ask(self, count: int, *how: str) -> None:
        """Ask *count* questions, many of them at the same time."""
        left = iter(range(count))

        async def worker() -> None:
            for _ in left:
                await self._ask(self.random.choice(how))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(_TOGETHER):
                tasks.create_task(worker())

    async def _ask(self, how: str) -> None:
        number = next(self.numbers)
        delay, length = self.random.choice((0, 5, 50, 100, 500)), self.random.choice((10, 1000, 50_000))
        for attempt in itertools.count():
            name, began = f"{number}.{attempt}", time.monotonic()
            try:
                # aiohttp asks again by itself what is idempotent: nobody would see that it was cut.
                async with self.session.post(url(f"{name}/{delay}/{length}/{how}", (V4, V6)[number % 2])) as response:
                    assert response.status == 200
                    assert await response.read() == name.encode().ljust(length, b".")
                    self.answered += 1
                    return
            except aiohttp.ClientConnectorError:
                raise  # no connection was cut: none could be made
            except aiohttp.ClientOSError as error:  # before the headers as well as in a body
                self.cut.append((time.monotonic(), self.far.asked[name], error))
            finally:
                self.waits.append((began, time.monotonic() - began - delay / 1000))


class Weather:
    """NICs that come and go: each in each of the ways, one or two at a time, and some that flap."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.losses: list[tuple[float, str, str]] = []
        self.random = random.Random(7)
        self.names: dict[str, str] = {}  # whose far end had which index: the witness cannot ask for one that is gone
        self._note_names()

    def _note_names(self) -> None:
        with self.lab.far:
            ends = socket.if_nameindex()
        self.names |= {f"#{index}": name.replace("f", "n") for index, name in ends}

    async def blow(self, calm: Callable[[], bool]) -> None:
        for how in itertools.cycle([*LOSSES, "flaps"]):
            # In a thread: the loop goes on meanwhile, and sees the NIC in every state between.
            await asyncio.to_thread(self._gust, how)
            await asyncio.sleep(self.random.uniform(0, 0.5))
            if calm():
                break

    def _gust(self, how: str) -> None:
        flaps = how == "flaps"
        how, names = (
            ("down" if flaps else how),
            self.random.sample(NAMES, 1 if flaps else self.random.choice((1, 1, 2))),
        )
        for _ in range(5 if flaps else 1):
            for name in names:
                self.losses.append((time.monotonic(), name, how))
                lose(self.lab, name, how)
            time.sleep(0 if flaps else self.random.uniform(0.05, 0.6))
            for name in names:
                regain(self.lab, name, how)
            self._note_names()


@pytest.mark.timeout(180)
async def test_proof(lab: Lab, far: Far) -> None:
    witness = lab.witness(syn_only=True)
    weather = Weather(lab)
    events: list[aiobind.Event] = []
    connector = BoundTCPConnector(*SOURCES, limit=0, abort_on_link_down=True, on_event=events.append)
    owner = {address: nic.name for nic in lab.nics for address in (nic.v4, nic.v6)}
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=20)) as session:
        client = Client(session, far)
        began = time.monotonic()
        asking = asyncio.create_task(client.ask(_REQUESTS, "keep", "keep", "halves", "close"))
        await asyncio.gather(asking, weather.blow(asking.done))
        took = time.monotonic() - began

        # Every question was answered; if not at once, then because its NIC was lost, and the client knew soon.
        assert client.answered == _REQUESTS
        assert client.cut
        for when, asked_by, error in client.cut:
            names = {owner[address] for address in asked_by} or set(NAMES)  # it may not have got so far
            lost = [name for at, name, _ in weather.losses if at < when < at + SOON]
            assert not names.isdisjoint(lost), error
        # The kernel tells of a carrier up to a second late (net/core/link_watch.c), and TCP repeats ever less often.
        late = [at for at, _, how in weather.losses if how == "no carrier"]
        waits = [
            wait for at, wait in client.waits if not any(at < lost + 1.7 and lost < at + wait + 0.1 for lost in late)
        ]
        print(
            f"{_REQUESTS:,} requests in {took:.1f} s, {len(weather.losses)} losses, {len(client.cut)} cut; "
            f"longest wait {max(waits):.3f} s, with lost carriers {max(wait for _, wait in client.waits):.3f} s"
        )
        assert max(wait for _, wait in client.waits) < SOON

        # Every SYN came by the NIC whose address it bears; each connection began with one, each other one has failed.
        syns = witness.packets()
        assert all(weather.names.get(syn.nic, syn.nic) == owner[syn.source] for syn in syns)
        for name, figures in stats(connector).items():
            mine = [syn for syn in syns if f"if!{owner[syn.source]}" == name]
            unanswered = sum(event.kind == "suspended" and str(event.source) == name for event in events)  # probes
            assert figures.connects <= len(mine)
            assert len({(syn.source, syn.sport) for syn in mine}) <= (
                figures.connects + sum(figures.failures.values()) + unanswered
            )

        # When all is well again the shares are the policy's.
        async with asyncio.timeout(70):
            while not is_well(events) or any(figures.connections for figures in connector.stats()):
                await client.ask(30, "close")
        assert [figures.suspended_until for figures in connector.stats()] == [None, None, None]
        witness.packets()
        before, asked, accepted = stats(connector), far.shares, len(far.accepted)
        await client.ask(_AFTERWARDS, "close")
        each = _AFTERWARDS // len(SOURCES)
        asked_now = Counter(owner[address] for address in (far.shares - asked).elements())
        assert asked_now == dict.fromkeys(NAMES, each)
        # And what the far side counts is what `stats()` counts.
        connects = {name: figures.connects - before[name].connects for name, figures in stats(connector).items()}
        assert connects == dict.fromkeys(SOURCES, each)
        begun = {(syn.nic, syn.source, syn.sport) for syn in witness.packets()}
        assert Counter(f"if!{owner[source]}" for _, source, _ in begun) == connects
        assert Counter(f"if!{owner[source]}" for source, _ in far.accepted[accepted:]) == connects


def is_well(events: list[aiobind.Event]) -> bool:
    """Return whether no source is suspended, or waits for its probe."""
    last = {event.source: event.kind for event in events if event.kind in ("suspended", "recovered")}
    return "suspended" not in last.values()


# --- a NIC goes, and comes back -----------------------------------------------------------------------------


def carrier_news(index: int) -> asyncio.Future[float]:
    """Return when the system tells that this NIC has no carrier: rtnetlink(7), up to a second after it was lost."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    sock.bind((0, 1))  # RTMGRP_LINK

    def listen() -> float:
        with sock:
            sock.settimeout(10)
            while True:
                message = sock.recv(65536)
                kind, which, flags = struct.unpack_from("4xH14xiI", message)
                if (kind, which) == (16, index) and not flags & 0x10000:  # RTM_NEWLINK, IFF_LOWER_UP
                    return time.monotonic()

    return asyncio.ensure_future(asyncio.to_thread(listen))


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("source", ["if!n1", "198.18.1.2"])
async def test_idle_connections_go_with_their_nic(lab: Lab, far: Far, source: str, how: str) -> None:
    connector = BoundTCPConnector(source, "if!n2", policy=aiobind.Failover())
    follows = source == "if!n1" or how != "renamed"  # whose address is still there, on the same NIC
    async with aiohttp.ClientSession(connector=connector) as session:
        assert await ask(session, far) == "198.18.1.2"
        assert stats(connector)[source].idle == 1

        news = carrier_news(socket.if_nametoindex("n1")) if how == "no carrier" else None
        lose(lab, "n1", how)
        told = time.monotonic()  # the kernel has queued its news before it lets ip(8) go on
        if follows:
            await until(lambda: not stats(connector)[source].connections, "the idle connection is closed", SOON)
            closed = time.monotonic()
            if news is not None:
                told = await news
            print(f"closed {(closed - told) * 1000:.1f} ms after the news")
            assert stats(connector)[source].suspended_until == math.inf
            assert await ask(session, far) == "198.18.2.2"
        else:
            await asyncio.sleep(0.1)
            assert stats(connector)[source].idle == 1
            assert stats(connector)[source].suspended_until is None

        regain(lab, "n1", how)
        await until(lambda: stats(connector)[source].suspended_until is None, "the suspension ends")
        async with asyncio.timeout(10):
            while await ask(session, far) != "198.18.1.2":
                await asyncio.sleep(0.01)


async def test_connection_that_was_in_use_when_its_nic_went(lab: Lab, far: Far) -> None:
    """It is used again if its NIC is back in time, and closed when that goes once more."""
    connector = BoundTCPConnector("if!n1", "if!n2")
    async with aiohttp.ClientSession(connector=connector) as session:
        with connector.use_source("if!n1"):
            async with session.post(url("1/300/1000/halves")) as response:
                lose(lab, "n1", "down")
                await until(lambda: stats(connector)["if!n1"].suspended_until, "the link is down")
                regain(lab, "n1", "down")
                await until(lambda: stats(connector)["if!n1"].suspended_until is None, "the link is up")
                assert len(await response.read()) == 1000
            assert stats(connector)["if!n1"].idle == 1
            await ask(session, far)
            assert stats(connector)["if!n1"].connects == 1
        lose(lab, "n1", "down")
        await until(lambda: not stats(connector)["if!n1"].connections, "the idle connection is closed", SOON)


async def test_connection_of_a_nic_that_has_another_name_is_not_used_again(lab: Lab, far: Far) -> None:
    """It goes on, for a socket follows its NIC; but it is no connection by n1 any more."""
    connector = BoundTCPConnector("if!n1", "if!n2")
    async with aiohttp.ClientSession(connector=connector) as session:
        with connector.use_source("if!n1"):
            async with session.post(url("1/300/1000/halves")) as response:
                lose(lab, "n1", "renamed")
                await until(lambda: stats(connector)["if!n1"].suspended_until, "the name is gone")
                assert len(await response.read()) == 1000
        await until(lambda: not stats(connector)["if!n1"].connections, "it is closed", SOON)


@pytest.mark.parametrize("how", [how for how in LOSSES if how != "renamed"])  # an attempt follows its NIC's new name
@pytest.mark.parametrize("door", ["Connector", "aiohttp"])
async def test_attempts_go_on_from_the_next_source(lab: Lab, far: Far, witness: Witness, door: str, how: str) -> None:
    lab.far.ip("route add blackhole 198.18.1.2/32")  # n1's SYN gets no answer
    async with both_doors("if!n1", "if!n0", policy=aiobind.Failover()) as doors:
        connector, get = doors[door]
        attempt = asyncio.create_task(get())
        await until(lambda: any(packet.nic == "n1" for packet in witness.packets()), "a SYN by n1")
        lose(lab, "n1", how)
        began = time.monotonic()
        async with asyncio.timeout(20):
            await attempt
        print(f"{time.monotonic() - began:.3f} s")
        assert time.monotonic() < began + SOON
        assert [figures.connects for figures in connector.stats()] == [0, 1]
        assert sum(connector.stats()[0].failures.values()) == 1


@pytest.mark.parametrize("how", ["down", "deleted", "no address"])
async def test_attempts_from_an_address_go_on_as_well(lab: Lab, far: Far, witness: Witness, how: str) -> None:
    lab.far.ip("route add blackhole 198.18.1.2/32")
    async with aiobind.Connector("198.18.1.2", "if!n2", policy=aiobind.Failover()) as connector:
        (await connector.connect(V4, 80, source="if!n2")).close()  # the interfaces are known
        attempt = asyncio.create_task(connector.connect(V4, 80))
        await until(lambda: any(packet.source == "198.18.1.2" for packet in witness.packets()), "a SYN")
        lose(lab, "n1", how)
        began = time.monotonic()
        with await asyncio.wait_for(attempt, 20) as sock:
            assert aiobind.bound_source(sock).interface == "n2"
        assert time.monotonic() < began + SOON


@pytest.mark.parametrize("how", [how for how in LOSSES if how != "deleted"])
@pytest.mark.parametrize("source", ["if!n1", "198.18.1.2"])
async def test_connections_in_use_are_left_alone(lab: Lab, far: Far, source: str, how: str) -> None:
    connector, streams = BoundTCPConnector(source, "if!n0"), aiobind.Connector(source, "if!n0")
    async with aiohttp.ClientSession(connector=connector) as session, streams:
        with connector.use_source(source):
            async with session.post(url("1/300/50000/halves")) as response:
                reader, writer = await streams.open_connection(V4, 80, source=source)
                writer.write(b"GET /2/300/50000/halves HTTP/1.1\r\n\r\n")
                lose(lab, "n1", how)
                if source == "if!n1" or how != "renamed":
                    await until(lambda: stats(connector)[source].suspended_until == math.inf, "the loss is noticed")
                    await until(lambda: stats(streams)[source].suspended_until == math.inf, "the loss is noticed")
                assert stats(connector)[source].in_use == stats(streams)[source].connections == 1
                regain(lab, "n1", how)
                async with asyncio.timeout(30):
                    assert len(await response.read()) == 50_000
                    await reader.readuntil(b"\r\n\r\n")
                    assert len(await reader.readexactly(50_000)) == 50_000
                writer.close()


@pytest.mark.parametrize("how", LOSSES)
async def test_abort_on_link_down(lab: Lab, far: Far, how: str) -> None:
    connector = BoundTCPConnector("if!n1", "if!n0", abort_on_link_down=True)
    streams = aiobind.Connector("if!n1", "if!n0", abort_on_link_down=True)
    took: dict[str, float] = {}
    lost = math.inf

    async def before_the_headers() -> None:
        with pytest.raises(aiohttp.ClientOSError) as caught:
            await session.post(url("1/60000/10/keep"))
        assert caught.value.errno == errno.ECONNRESET
        took["before the headers"] = time.monotonic() - lost

    async def in_the_body() -> None:
        async with session.post(url("2/60000/1000/halves")) as response:
            with pytest.raises(aiohttp.ClientOSError) as caught:  # where aiohttp's own word is ClientPayloadError
                await response.read()
            assert caught.value.errno == errno.ECONNRESET
        took["in the body"] = time.monotonic() - lost

    async def in_a_body_that_is_read_later() -> None:
        async with session.post(url("4/60000/1000/halves")) as response:
            await until(lambda: not stats(connector)["if!n1"].connections, "it is cut")
            with pytest.raises(aiohttp.ClientOSError) as caught:
                await response.read()
            assert caught.value.errno == errno.ECONNRESET

    async def a_stream() -> None:
        reader, writer = await streams.open_connection(V4, 80, source="if!n1")
        writer.write(b"GET /3/60000/1000/halves HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        took["a stream"] = time.monotonic() - lost
        writer.close()

    async with aiohttp.ClientSession(connector=connector) as session, streams:
        # One that stays: other sources are not touched.
        with connector.use_source("if!n0"):
            other = asyncio.create_task(ask(session, far, "9/1500/10/keep"))
            await until(lambda: far.asked["9"], "the request has arrived")
        with connector.use_source("if!n1"):
            async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                for work in (before_the_headers, in_the_body, in_a_body_that_is_read_later, a_stream):
                    tasks.create_task(work())
                await until(lambda: {"1", "2", "3", "4", "9"} <= far.asked.keys(), "all have arrived")
                await asyncio.sleep(0.05)  # the halves have come as well
                lose(lab, "n1", how)
                lost = time.monotonic()
        print({what: f"{seconds * 1000:.1f} ms" for what, seconds in took.items()})
        assert all(seconds < SOON for seconds in took.values())
        assert await other == "198.18.0.2"


# --- a source that fails behind a link that is up -----------------------------------------------------------


@pytest.mark.parametrize("door", ["Connector", "aiohttp"])
async def test_black_hole(lab: Lab, far: Far, witness: Witness, door: str) -> None:
    """A source that waits in vain where another one gets an answer is left alone, until its probe is answered."""
    events: list[aiobind.Event] = []
    async with both_doors("if!n0", "if!n1", on_event=events.append) as doors:
        connector, get = doors[door]
        for _ in range(4):
            await get()
        assert [figures.connects for figures in connector.stats()] == [2, 2]
        lab.far.ip("route add blackhole 198.18.1.2/32")

        await get()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await get(sock_connect=1.5)
        await get()  # n0 reaches it, before or after n1's attempt: that is what tells the one from the other
        until_when = stats(connector)["if!n1"].suspended_until
        assert until_when is not None
        assert until_when < time.monotonic() + 1.0
        assert "if!n1" in [str(event.source) for event in events if event.kind == "suspended"]

        # Nobody waits for it: not while it is suspended, and not when its time is over and the path still dark; then
        # one of many is the probe, and those that come meanwhile use the other.
        await asyncio.gather(*(get() for _ in range(10)))
        await until(lambda: stats(connector)["if!n1"].suspended_until is None, "its time is over")
        witness.packets()
        began = time.monotonic()
        await asyncio.gather(*(get() for _ in range(30)))
        print(f"with a probe: {time.monotonic() - began:.3f} s")
        assert time.monotonic() < began + SOON
        assert len({packet.sport for packet in witness.packets() if packet.syn and packet.nic == "n1"}) == 1
        again = stats(connector)["if!n1"].suspended_until
        assert again is not None
        assert again > until_when

        lab.far.ip("route del blackhole 198.18.1.2/32")
        await until(lambda: stats(connector)["if!n1"].suspended_until is None, "its time is over again")
        while not is_well(events):
            await get()
        before = stats(connector)
        for _ in range(10):
            await get()
        assert [figures.connects - before[str(figures.source)].connects for figures in connector.stats()] == [5, 5]


@pytest.mark.parametrize("door", ["Connector", "aiohttp"])
async def test_target_that_is_down_suspends_nobody(lab: Lab, far: Far, door: str) -> None:
    lab.far.ip("route add blackhole 203.0.113.99/32")
    events: list[aiobind.Event] = []
    async with both_doors("if!n0", "if!n1", on_event=events.append) as doors:
        connector, get = doors[door]

        async def in_vain() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.3):
                    await get("203.0.113.99", sock_connect=1.2)

        await asyncio.gather(*(in_vain() for _ in range(6)))
        assert [figures.failures for figures in connector.stats()] == [{"ETIMEDOUT": 3}, {"ETIMEDOUT": 3}]
        for _ in range(4):
            await get()
        assert [figures.connects for figures in connector.stats()] == [2, 2]
        assert not [event for event in events if event.kind == "suspended"]


def no_route(lab: Lab, name: str) -> str:
    # Without an IPv4 route Linux takes any destination of a pinned socket for a neighbour (net/ipv4/route.c).
    return f"route del default via {lab.nic(name).gateway_v6} dev {name}"


async def test_source_without_a_route(lab: Lab, far: Far) -> None:
    """It fails for a reason of its own, and recovers with the first probe after the route is back."""
    events: list[aiobind.Event] = []
    async with both_doors("if!n0", "if!n1", policy=aiobind.RoundRobin(), on_event=events.append) as doors:
        connector, get = doors["Connector"]
        lab.near.ip(no_route(lab, "n1"))
        for _ in range(10):
            await get(V6)
        figures = stats(connector)["if!n1"]
        assert figures.failures == {"ENETUNREACH": 1}
        assert figures.suspended_until is not None
        assert time.monotonic() - 1.0 < figures.suspended_until < time.monotonic() + 1.0
        restore(lab, "n1")
        await until(lambda: stats(connector)["if!n1"].suspended_until is None, "its time is over")
        await get(V6)
        await get(V6)
        assert is_well(events)
        assert stats(connector)["if!n1"].connects == 1


async def test_family_that_has_failed_does_not_hold_up_the_other(lab: Lab, far: Far) -> None:
    async with both_doors("if!n0", "if!n1") as doors:
        connector, get = doors["Connector"]
        for _ in range(4):
            await get()
        lab.near.ip(no_route(lab, "n1"))
        for _ in range(2):
            await get(V6)
        assert stats(connector)["if!n1"].failures == {"ENETUNREACH": 1}
        assert stats(connector)["if!n1"].suspended_until is None
        before = stats(connector)
        await asyncio.gather(*(get() for _ in range(20)))
        await asyncio.sleep(1.0)  # its time is over: from now on a probe is due, for IPv6
        await asyncio.gather(*(get() for _ in range(20)))
        assert [figures.connects - before[str(figures.source)].connects for figures in connector.stats()] == [20, 20]


async def test_address_that_is_not_here_yet(lab: Lab, far: Far) -> None:
    async with both_doors("198.18.1.77", "if!n0", policy=aiobind.Failover()) as doors:
        connector, get = doors["Connector"]
        await get()
        assert [figures.connects for figures in connector.stats()] == [0, 1]
        await until(lambda: connector.stats()[0].suspended_until == math.inf, "nobody holds the address")
        lab.near.ip("addr add 198.18.1.77/24 dev n1")
        await until(lambda: connector.stats()[0].suspended_until is None, "somebody holds it")
        await get()
        assert [figures.connects for figures in connector.stats()] == [1, 1]


async def test_all_are_suspended(lab: Lab, far: Far) -> None:
    """Who has failed longest ago is tried, rather than nobody."""
    events: list[aiobind.Event] = []
    async with both_doors("if!n0", "if!n1", policy=aiobind.Failover(), on_event=events.append) as doors:
        connector, get = doors["Connector"]
        lab.near.ip(no_route(lab, "n0"), no_route(lab, "n1"))
        with pytest.raises(aiobind.BindError):
            await get(V6)
        with pytest.raises(aiobind.BindError), connector.use_source("if!n0"):
            await get(V6)
        assert all(figures.suspended_until for figures in connector.stats())
        restore(lab, "n1")
        events.clear()
        await get(V6)
        assert [(event.kind, str(event.source)) for event in events if event.destination] == [("connected", "if!n1")]


# --- what the application does ------------------------------------------------------------------------------


async def test_report(lab: Lab, far: Far) -> None:
    events: list[aiobind.Event] = []
    connector = BoundTCPConnector(*SOURCES, on_event=events.append)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def shares(host: str) -> list[int]:
            asked = Counter([await ask(session, far, host=host) for _ in range(12)])
            return [asked[address] for nic in lab.nics for address in (nic.v6 if ":" in host else nic.v4,)]

        connector.report("if!n1", host=V4)
        n0, n1, n2 = await shares(V4)
        assert (n1, n0 + n2) == (0, 12)
        assert n0
        assert n2
        assert await shares(V6) == [4, 4, 4]
        assert stats(connector)["if!n1"].suspended_until is None

        connector.report("if!n1", host=V4, ok=True)
        assert await shares(V4) == [4, 4, 4]

        for source, seconds in zip(SOURCES, (300, 100, 200), strict=True):
            connector.report(source, host=V4, seconds=seconds)
        assert await shares(V4) == [0, 12, 0]  # of those that are all banned, the one whose ban ends first

        for source in SOURCES:
            connector.report(source, host=V4, ok=True)
        connector.report("if!n2", host=V4, seconds=0.2)
        await asyncio.sleep(0.25)
        assert await shares(V4) == [4, 4, 4]
    told = [(event.kind, str(event.source), event.destination) for event in events if event.kind == "recovered"]
    assert told == [("recovered", source, V4) for source in ("if!n1", *SOURCES)]


async def test_sources_come_and_go_under_load(lab: Lab, far: Far) -> None:
    witness = lab.witness(syn_only=True)
    connector = BoundTCPConnector("if!n0", "if!n1", limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        client = Client(session, far)
        asking = asyncio.create_task(client.ask(1000, "keep", "halves", "close"))
        await until(lambda: client.answered > 100, "requests are under way")

        connector.add("if!n2")
        await until(lambda: far.shares["198.18.2.2"], "the new one is used")

        connector.remove("if!n1")  # what is under way goes on, and then its connections end
        asked = far.shares["198.18.1.2"], far.shares["2001:db8:1::2"]
        begun = sum(packet.nic == "n1" for packet in witness.packets())
        assert begun
        await until(lambda: "if!n1" not in stats(connector), "it is drained")
        assert not client.cut

        with connector.use_source("if!n0"):
            held = asyncio.create_task(session.post(url("held/60000/10/keep")))
            await until(lambda: far.asked["held"], "it is under way")
        connector.remove("if!n0", drain=False)
        with pytest.raises(aiohttp.ClientOSError) as caught:
            async with asyncio.timeout(SOON):
                await held
        assert caught.value.errno == errno.ECONNRESET

        await asking
        cut = [owner for _, asked_by, _ in client.cut for owner in asked_by]
        assert client.answered == 1000
        assert set(cut) <= {"198.18.0.2", "2001:db8::2"}
        assert (far.shares["198.18.1.2"], far.shares["2001:db8:1::2"]) <= (asked[0] + 100, asked[1] + 100)
        assert not [packet for packet in witness.packets() if packet.nic == "n1"]
        assert list(stats(connector)) == ["if!n2"]


async def test_ports(lab: Lab, far: Far) -> None:
    """Past half of its ports for a destination another source goes first; at the end the next one, and then nobody."""
    ports = range(40000, 40020)
    async with aiobind.Connector("if!n1", "if!n2", policy=aiobind.Failover(), local_ports=ports) as connector:
        socks = [await connector.connect(V4, 80) for _ in range(12)]
        assert [sock.getsockname()[0] for sock in socks] == ["198.18.1.2"] * 11 + ["198.18.2.2"]
        assert [figures.ports for figures in connector.stats()] == [{f"{V4}:80": 11}, {f"{V4}:80": 1}]
        socks += [await connector.connect(V4, 80) for _ in range(28)]
        assert {sock.getsockname()[1] for sock in socks} == set(ports)
        assert [figures.ports for figures in connector.stats()] == [{f"{V4}:80": 20}, {f"{V4}:80": 20}]
        with pytest.raises(aiobind.BindError, match="port from 40000 to 40019 is left") as caught:
            await connector.connect(V4, 80)
        assert caught.value.errno == errno.EADDRNOTAVAIL
        # That is a matter of this destination.
        assert [[*origin.avoid] for origin in connector._dialer.roster.listed] == [[f"{V4}:80"]] * 2
        assert [figures.suspended_until for figures in connector.stats()] == [None, None]
        socks.append(await connector.connect(V4, 80, source="if!n0"))
        socks.append(await connector.connect(V6, 80))
        assert socks[-1].getsockname()[0] == "2001:db8:1::2"
        for sock in socks:
            sock.close()


# --- what is told of it -------------------------------------------------------------------------------------


async def test_events_and_log(lab: Lab, far: Far, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="aiobind")
    events: list[aiobind.Event] = []
    async with both_doors("if!n1", "if!n0", policy=aiobind.Failover(), on_event=events.append) as doors:
        connector, get = doors["Connector"]
        await get()
        lose(lab, "n1", "down")
        await until(lambda: connector.stats()[0].suspended_until, "the link is down")
        await get()
        regain(lab, "n1", "down")
        await until(lambda: connector.stats()[0].suspended_until is None, "the link is back")
        await get()
    n0, n1, destination = aiobind.Interface("n0"), aiobind.Interface("n1"), f"{V4}:80"
    assert [event[:3] for event in events] == [
        ("connected", n1, destination),
        ("suspended", n1, None),
        ("connected", n0, destination),
        ("recovered", n1, None),
        ("connected", n1, destination),
    ]
    error, seconds = events[1][3:]
    assert (error.errno, error.strerror, seconds) == (errno.ENETUNREACH, "n1 is down", math.inf)
    assert [(record.levelname, re.sub(r"\d+\.\d ms", "0.0 ms", record.message)) for record in caplog.records] == [
        ("DEBUG", f"if!n1 to {destination}: connected in 0.0 ms"),
        ("INFO", "if!n1 is suspended until its interface is back: n1 is down"),
        ("DEBUG", f"if!n0 to {destination}: connected in 0.0 ms"),
        ("INFO", "if!n1 has recovered"),
        ("DEBUG", f"if!n1 to {destination}: connected in 0.0 ms"),
    ]
