"""BoundTCPConnector: real requests over real sockets, judged by the server and by the far side of the NICs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import inspect
import itertools
import math
import pickle
import random
import re
import socket
import ssl
import subprocess
import sys
import time
import types
import weakref
from collections import Counter
from hashlib import sha256
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import aiohttp
import pytest
import trustme
from aiohttp import web
from aiohttp.abc import AbstractResolver
from dns_server import DnsServer
from yarl import URL

import aiobind
from aiobind import BindError, BoundSource, ConnectError, InvalidSource, ResolveError, bound_source
from aiobind.aiohttp import BoundTCPConnector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from aiobind.lab import Lab, Packet, Witness

pytestmark = pytest.mark.anyio

A, B, C = "127.0.0.2", "127.0.0.3", "127.0.0.4"
HERE, ALSO_HERE = "127.0.0.1", "127.0.0.9"
MISSING = "if!missing0"
NOT_OURS = "192.0.2.7"


# --- the other side -----------------------------------------------------------------------------------------


class Server:
    """A real aiohttp server. It answers with the address and port of its client, and remembers both."""

    def __init__(self) -> None:
        self.peers: list[tuple[str, int]] = []
        self.accepted = 0
        self.go = asyncio.Event()  # what ``/hold`` waits for
        self.look: Callable[[web.Request], object] = lambda _: None  # at each request, while it is under way
        self.hosts: Counter[str] = Counter()
        self.port = 0

    @property
    def sources(self) -> list[str]:
        return [host for host, _ in self.peers]

    def url(self, path: str = "/", host: str = HERE, scheme: str = "http") -> str:
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}{path}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peer = request.transport.get_extra_info("peername")[:2]
        self.peers.append(peer)
        self.hosts[request.host] += 1
        self.look(request)
        match request.path.split("/")[1:]:
            case ["hold"]:
                await self.go.wait()
            case ["pause"]:
                await asyncio.sleep(0.002)
            case ["status", code]:
                return web.Response(status=int(code))
            case ["redirect"]:
                response = web.Response(status=302, headers={"Location": "/cookies"})
                response.set_cookie("from", peer[0])
                return response
            case ["cookies"]:
                return web.json_response(dict(request.cookies))
            case ["upload"]:
                chunks = [chunk async for chunk in request.content.iter_any()]
                return web.Response(text=f"{request.headers.get('Transfer-Encoding')} {len(b''.join(chunks))}")
            case ["stream"]:
                stream = web.StreamResponse()
                await stream.prepare(request)
                for number in range(3):
                    await stream.write(f"{number}\n".encode())
                    await self.go.wait()
                return stream
            case ["socket"]:
                websocket = web.WebSocketResponse()
                await websocket.prepare(request)
                async for message in websocket:
                    await websocket.send_str(f"{peer[0]} {message.data}")
                return websocket
            case _:
                pass
        self.hosts[request.host] -= 1
        return web.Response(text=f"{peer[0]} {peer[1]}")


#: Below the ephemeral ones, so that no connection has the port at another address, where a test listens as well.
_PORTS = itertools.cycle(range(20000, 32000))


@contextlib.asynccontextmanager
async def serving(host: str = HERE, *, sock: socket.socket | None = None, **keywords: Any) -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server._answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    if sock is None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, next(_PORTS)), family=family, backlog=1024)
    server.port = sock.getsockname()[1]
    await web.SockSite(runner, sock, **keywords).start()
    try:
        yield server
    finally:
        server.go.set()
        await runner.cleanup()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


@contextlib.contextmanager
def silent(host: str = HERE, port: int = 0) -> Any:
    """Yield a port of *host* that answers no SYN: its queue is full."""
    with socket.socket() as listener, socket.socket() as filler:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def refusing() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind((HERE, 0))
        return int(sock.getsockname()[1])


class Names(AbstractResolver):
    """A resolver with a table, that counts what it is asked."""

    def __init__(self, **hosts: list[str]) -> None:
        self.hosts = {name.replace("_", "."): addresses for name, addresses in hosts.items()}
        self.asked: Counter[str] = Counter()

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> Any:
        self.asked[host] += 1
        return [
            {"hostname": host, "host": ip, "port": port, "family": 0, "proto": 0, "flags": 0} for ip in self.hosts[host]
        ]

    async def close(self) -> None:
        pass


@pytest.fixture
def dns(resolv_conf: Callable[..., None]) -> Iterator[DnsServer]:
    with DnsServer() as dns:
        resolv_conf(dns.resolv_conf)
        yield dns


class Certificates:
    def __init__(self) -> None:
        authority = trustme.CA()
        self.client = ssl.create_default_context()
        authority.configure_trust(self.client)
        self.good, self.other = (self._server(authority.issue_cert(name)) for name in ("good.test", "other.test"))

    def _server(self, certificate: trustme.LeafCert) -> tuple[ssl.SSLContext, bytes]:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(context)
        der = ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode())
        return context, sha256(der).digest()


@pytest.fixture(scope="session")
def certificates() -> Certificates:
    return Certificates()


# --- this side ----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def session(*sources: str, timeout: Any = None, **keywords: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """A session with a bound connector; without sources, one with aiohttp's own, to compare."""
    connector = (BoundTCPConnector(*sources, **keywords)) if sources else aiohttp.TCPConnector(**keywords)
    timeout = timeout or aiohttp.ClientTimeout(total=20)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
        _connectors[client] = connector
        yield client


#: A closed session has forgotten its connector.
_connectors: weakref.WeakKeyDictionary[aiohttp.ClientSession, aiohttp.TCPConnector] = weakref.WeakKeyDictionary()


def connector_of(client: aiohttp.ClientSession) -> BoundTCPConnector:
    connector = _connectors[client]
    assert isinstance(connector, BoundTCPConnector)
    return connector


class Figures(NamedTuple):
    connections: int
    in_use: int
    idle: int
    connects: int


def figures(client: aiohttp.ClientSession) -> dict[str, Figures]:
    return {str(stats.source): Figures(*stats[1:5]) for stats in connector_of(client).stats()}


async def get(client: aiohttp.ClientSession, url: str | URL, **keywords: Any) -> str:
    """Return the address that the server saw."""
    async with client.get(url, **keywords) as response:
        return (await response.text()).split()[0]


async def failure(client: aiohttp.ClientSession, url: str | URL, **keywords: Any) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - whatever it is, the caller compares it
        await get(client, url, **keywords)
    caught.value.__traceback__ = None
    return caught.value


async def until(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.001)


async def together(*awaitables: Awaitable[Any]) -> list[Any]:
    return await asyncio.gather(*awaitables)


# --- the pool's short way -----------------------------------------------------------------------------------


class Asked:
    """A policy of the caller's own, which notes that it was asked."""

    def __init__(self) -> None:
        self.hosts: list[str] = []

    def order(self, sources: Any, host: str) -> Any:
        self.hosts.append(host)
        return iter(sources)


async def test_a_policy_of_the_callers_own_is_asked_for_each_request(server: Server) -> None:
    policy = Asked()
    async with session(A, policy=policy) as client:
        for _ in range(3):
            await get(client, server.url())
    assert policy.hosts == [HERE] * 3
    assert len(set(server.peers)) == 1


async def calls_of_a_request(server: Server, sources: int) -> int:
    """Count the calls of Python functions that getting an idle connection, and giving it back, takes."""
    async with session(*(f"127.0.1.{number}" for number in range(1, sources + 1))) as client:
        for _ in range(2 * sources):
            await get(client, server.url())
        connector = connector_of(client)
        request = types.SimpleNamespace(url=URL(server.url()), proxy=None)
        (key, *_) = connector._conns
        request.connection_key = cast("Any", key).host_key
        counts: list[int] = []
        for _ in range(5):
            calls = 0

            def count(frame: object, event: str, argument: object) -> None:
                nonlocal calls
                calls += event in {"call", "c_call"}

            sys.setprofile(count)
            try:
                connection = await connector.connect(cast("Any", request), [], aiohttp.ClientTimeout())
                connection.release()
            finally:
                sys.setprofile(None)
            counts.append(calls)
        assert figures(client)["127.0.1.1"][2] == 1  # it is idle again
    return min(counts)


async def test_a_pooled_request_costs_the_same_from_any_number_of_sources(server: Server) -> None:
    one, ten, hundred = [await calls_of_a_request(server, sources) for sources in (1, 10, 100)]
    assert 10 < one < 100
    assert hundred == ten
    assert ten <= one + 60


# --- the pool -----------------------------------------------------------------------------------------------


async def test_a_keep_alive_connection_belongs_to_its_source(server: Server) -> None:
    async with session(A, B, C) as client:
        for _ in range(12):
            await get(client, server.url())
        assert server.sources == [A, B, C] * 4
        assert len(set(server.peers)) == 3
        assert figures(client) == dict.fromkeys((A, B, C), (1, 0, 1, 1))
    assert {numbers.connections for numbers in figures(client).values()} == {0}


async def test_a_pinned_interface_and_its_address_do_not_share_connections(server: Server) -> None:
    async with session("if!lo", HERE) as client:  # the server cannot tell them apart, and the promises differ
        for _ in range(6):
            await get(client, server.url())
        assert figures(client) == {"if!lo": (1, 0, 1, 1), HERE: (1, 0, 1, 1)}


async def test_sources_rotate_without_keep_alive_too(server: Server) -> None:
    async with session(A, B, C, force_close=True) as client:
        for _ in range(6):
            await get(client, server.url())
        await until(lambda: figures(client) == dict.fromkeys((A, B, C), (0, 0, 0, 2)))
    assert server.sources == [A, B, C] * 2
    assert len(set(server.peers)) == 6


async def test_a_policy_sees_the_host_and_chooses_for_each_request(server: Server) -> None:
    class Last:
        hosts: list[str] = []  # noqa: RUF012

        def order(self, sources: Any, host: str) -> Any:
            self.hosts.append(host)
            return reversed(sources)

    async with session(A, B, policy=Last()) as client:
        assert [await get(client, server.url()) for _ in range(3)] == [B] * 3
    assert Last.hosts == [HERE] * 3


async def test_a_policy_that_names_no_source(server: Server) -> None:
    class Nobody:
        def order(self, sources: Any, host: str) -> Any:
            return ()

    async with session(A, policy=Nobody()) as client:
        assert str(await failure(client, server.url())) == "the policy named no source for 127.0.0.1"


async def test_the_limit_counts_connections_in_use_over_all_sources(server: Server) -> None:
    async with session(A, B, limit=4) as client:
        in_use: list[int] = []

        def look(_: object = None) -> None:
            in_use.append(sum(numbers.in_use for numbers in figures(client).values()))

        async def one() -> None:
            async with client.get(server.url("/pause")) as response:
                look()
                await response.read()
                look()

        server.look = look
        await together(*(one() for _ in range(60)))
        assert max(in_use) == 4
        made = {source: numbers.connects for source, numbers in figures(client).items()}
        assert sum(made.values()) <= 8
        assert len(set(server.peers)) == sum(made.values())
        assert Counter(server.sources) == {A: 30, B: 30}


async def test_limit_per_host_counts_idle_connections_of_no_other_source() -> None:
    async with serving("0.0.0.0") as server, session(A, B, limit_per_host=3) as client:
        for source in (A, B):  # three idle ones of each
            with aiobind.use_source(source):
                assert await together(*(get(client, server.url("/pause")) for _ in range(3))) == [source] * 3
        most = 0

        def look(_: web.Request) -> None:
            nonlocal most
            most = max(most, server.hosts[f"{HERE}:{server.port}"])

        server.look = look
        tasks: list[asyncio.Task[str]] = []
        for source in (A, B):
            with aiobind.use_source(source):
                tasks += [asyncio.create_task(get(client, server.url("/pause"))) for _ in range(3)]
        await together(*tasks)
        assert most <= 3


async def test_limit_per_host_counts_over_all_sources() -> None:
    async with serving("0.0.0.0") as server, session(A, B, C, limit_per_host=2) as client:
        at_once: Counter[str] = Counter()

        def look(request: web.Request) -> None:
            at_once[request.host] = max(at_once[request.host], server.hosts[request.host])

        server.look = look
        hosts = [HERE, ALSO_HERE] * 15
        await together(*(get(client, server.url("/pause", host)) for host in hosts))
        assert at_once == {f"{host}:{server.port}": 2 for host in (HERE, ALSO_HERE)}
        assert not connector_of(client)._acquired_per_host
        assert Counter(server.sources) == {A: 10, B: 10, C: 10}


# --- limit_per_source ---------------------------------------------------------------------------------------


def assert_free(client: aiohttp.ClientSession) -> None:
    """Nothing is in use any more, by our own books and by aiohttp's."""
    connector = connector_of(client)
    assert {numbers.in_use for numbers in figures(client).values()} == {0}
    assert not connector._acquired
    assert not connector._acquired_per_host
    assert not connector._waiters
    limits = connector._dialer.limits
    limits._settle()
    assert not limits._held
    assert not limits._held_at


async def test_limit_per_source_counts_for_each_source(server: Server) -> None:
    async with session(A, B, limit_per_source=2) as client:
        assert connector_of(client).limit_per_source == 2
        in_use: list[dict[str, int]] = []
        server.look = lambda _: in_use.append({source: numbers.in_use for source, numbers in figures(client).items()})
        await together(*(get(client, server.url("/pause")) for _ in range(30)))
        assert max(numbers[A] for numbers in in_use) == max(numbers[B] for numbers in in_use) == 2
        assert max(sum(numbers.values()) for numbers in in_use) == 4
        assert len(set(server.peers)) == 4
        assert_free(client)


async def test_a_source_whose_slots_are_taken_is_passed_over(server: Server) -> None:
    async with session(A, B, limit_per_source=1) as client:
        held = asyncio.create_task(get(client, server.url("/hold")))
        await until(lambda: server.sources == [A])
        assert [await get(client, server.url()) for _ in range(4)] == [B] * 4
        server.go.set()
        assert await held == A
        assert sorted([await get(client, server.url()) for _ in range(4)]) == [A, A, B, B]
        assert_free(client)


async def test_a_failing_source_gives_its_slot_back(server: Server) -> None:
    async with session(MISSING, A, limit_per_source=1) as client:
        assert [await get(client, server.url()) for _ in range(6)] == [A] * 6
        held = asyncio.create_task(get(client, server.url("/hold")))
        await until(lambda: len(server.peers) == 7)
        waiting = [asyncio.create_task(get(client, server.url())) for _ in range(4)]
        await asyncio.sleep(0.02)
        assert len(server.peers) == 7  # they wait for A, whoever's turn it is
        server.go.set()
        assert await together(held, *waiting) == [A] * 5
        assert_free(client)


async def test_bytes_are_counted_to_the_end(server: Server) -> None:
    async with session(A, force_close=True) as client:
        assert await get(client, server.url()) == A
        (origin,) = connector_of(client)._dialer.roster.listed
        await until(lambda: not origin.connections)  # and nobody has asked for figures until then
        (numbers,) = connector_of(client).stats()
        assert numbers.bytes_sent > len("GET / HTTP/1.1")
        assert numbers.bytes_received > len("HTTP/1.1 200 OK")


async def test_a_connector_that_could_not_be_made_leaves_the_policy_free() -> None:
    policy = aiobind.RoundRobin()
    with pytest.raises(TypeError, match="bogus") as caught:
        BoundTCPConnector(A, policy=policy, bogus=1)
    await BoundTCPConnector(A, policy=policy).close()
    assert caught.value is not None


async def test_who_waits_takes_the_first_source_that_has_room() -> None:
    async with serving() as one, serving() as two, session(A, B, limit_per_source=1) as client:
        first = asyncio.create_task(get(client, one.url("/hold")))
        await until(lambda: one.sources == [A])
        second = asyncio.create_task(get(client, two.url("/hold")))
        await until(lambda: two.sources == [B])
        third = asyncio.create_task(get(client, one.url("/pause")))  # it is A's turn
        await asyncio.sleep(0.02)
        two.go.set()
        assert await asyncio.wait_for(third, 10) == B
        one.go.set()
        assert await together(first, second) == [A, B]
        assert_free(client)


async def test_slots_are_given_in_the_order_of_asking(server: Server) -> None:
    order: list[str] = []
    server.look = lambda request: order.append(request.path)
    async with session(A, limit_per_source=1) as client:
        tasks = [asyncio.create_task(get(client, server.url("/hold")))]
        await until(lambda: order)
        for number in range(8):
            tasks.append(asyncio.create_task(get(client, server.url(f"/{number}"))))
            await asyncio.sleep(0)
        server.go.set()
        await together(*tasks)
    assert order == ["/hold", *(f"/{number}" for number in range(8))]


@pytest.mark.parametrize("ticks", range(6))
async def test_a_cancelled_waiter_frees_nothing(server: Server, ticks: int) -> None:
    async with session(A, limit_per_source=1) as client:
        held = asyncio.create_task(get(client, server.url("/hold")))
        await until(lambda: server.peers)
        first, second = (asyncio.create_task(get(client, server.url("/pause"))) for _ in range(2))
        await asyncio.sleep(0.001)
        if ticks:  # cancelled about the moment in which its turn comes; else while it waits
            server.go.set()
            await held
            for _ in range(ticks - 1):
                await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        in_use: list[int] = []
        server.look = lambda _: in_use.append(figures(client)[A].in_use)
        server.go.set()
        assert await second == A
        assert await together(*(get(client, server.url()) for _ in range(3))) == [A] * 3
        assert max(in_use) == 1
        assert_free(client)


@pytest.mark.parametrize("keywords", [{"limit_per_source": 1}, {"limit": 1}], ids=str)
async def test_timeout_connect_holds_while_a_request_waits(server: Server, keywords: dict[str, int]) -> None:
    timeout = aiohttp.ClientTimeout(total=20, connect=0.05)
    errors: list[BaseException] = []
    for sources in ((), (A,)):
        async with session(*sources, **(keywords if sources else {"limit": 1})) as client:
            server.go.clear()
            held = asyncio.create_task(get(client, server.url("/hold")))
            await until(lambda: server.go._waiters)
            errors.append(await failure(client, server.url(), timeout=timeout))
            server.go.set()
            await held
            if sources:
                assert_free(client)
    assert type(errors[0]) is type(errors[1])
    assert isinstance(errors[1], aiohttp.ServerTimeoutError)
    assert str(errors[0]) == str(errors[1])


async def test_a_guest_has_slots_of_its_own(server: Server) -> None:
    async with session(A, limit_per_source=1) as client:
        with connector_of(client).use_source(C):
            in_use: list[int] = []
            server.look = lambda _: in_use.append(figures(client)[C].in_use)
            assert await together(*(get(client, server.url("/pause")) for _ in range(5))) == [C] * 5
            assert set(in_use) == {1}


async def test_requests_cancelled_at_random_moments_leave_nothing(certificates: Certificates) -> None:
    random.seed(7)
    names = Names(several_test=["127.0.0.77", HERE, ALSO_HERE], good_test=[HERE])
    async with (
        serving("0.0.0.0") as server,
        serving(ssl_context=certificates.good[0]) as tls,
        serving("127.0.0.77") as _,
        session(A, B, MISSING, resolver=names, limit=12, limit_per_host=10, limit_per_source=5) as client,
    ):
        urls = [server.url(path, "several.test") for path in ("/", "/pause", "/stream", "/redirect")]
        urls += [server.url("/status/500"), tls.url("/", "good.test", "https")]
        server.go.set()
        ended: Counter[str] = Counter()
        longest = 0.05

        async def one() -> None:
            task = asyncio.create_task(get(client, random.choice(urls), ssl=certificates.client))
            handle = asyncio.get_running_loop().call_later(random.uniform(0, longest), task.cancel)
            await asyncio.wait([task])
            handle.cancel()
            ended["cancelled" if task.cancelled() else type(task.exception()).__name__] += 1

        for _ in range(60):
            before = ended["cancelled"]
            await together(*(one() for _ in range(50)))
            # However busy the machine is: about half of them shall come to their end.
            longest *= 1.25 if ended["cancelled"] - before > 25 else 0.8
        assert ended["cancelled"] > 50
        assert ended["NoneType"] > 50
        assert not ended.keys() - {"cancelled", "NoneType", "IndexError"}, ended
        await until(lambda: not connector_of(client)._acquired)
        assert_free(client)
        assert {await get(client, server.url()) for _ in range(3)} == {A, B}
    await until(lambda: {numbers.connections for numbers in figures(client).values()} == {0})


# --- pins ---------------------------------------------------------------------------------------------------


async def test_a_pin_wins_over_the_policy_and_the_nearer_one_over_the_other(server: Server) -> None:
    async with session(A, B) as client, session(A, B) as other:
        ours = connector_of(client).use_source
        with aiobind.use_source(B):
            assert [await get(client, server.url()) for _ in range(2)] == [B, B]
            with ours(A):
                assert [await get(client, server.url()) for _ in range(2)] == [A, A]
                assert [await get(other, server.url()) for _ in range(2)] == [B, B]
            assert await get(client, server.url()) == B
        with ours(A), aiobind.use_source(B):
            assert [await get(client, server.url()) for _ in range(2)] == [A, A]
            assert await get(other, server.url()) == B
        assert [await get(client, server.url()) for _ in range(2)] == [A, B]


async def test_tasks_inherit_a_pin_and_others_do_not_see_it(server: Server) -> None:
    async with session(A) as client:
        with connector_of(client).use_source(B) as pin:
            assert pin == aiobind.parse_source(B)
            inside = [asyncio.create_task(get(client, server.url())) for _ in range(3)]
        outside = [asyncio.create_task(get(client, server.url())) for _ in range(3)]
        assert await together(*inside, *outside) == [B] * 3 + [A] * 3


async def test_a_source_from_outside_the_list_is_in_the_stats_while_it_has_connections(server: Server) -> None:
    async with session(A) as client:
        with connector_of(client).use_source(C):
            async with client.get(server.url("/stream")) as response:
                assert figures(client) == {A: (0, 0, 0, 0), C: (1, 1, 0, 1)}
                server.go.set()
                await response.read()
                assert figures(client) == {A: (0, 0, 0, 0), C: (1, 0, 1, 1)}
            await get(client, server.url(), headers={"Connection": "close"})  # over the same connection
        await until(lambda: figures(client) == {A: (0, 0, 0, 0)})


async def test_a_pinned_request_never_moves(server: Server) -> None:
    async with session(A, B, limit_per_source=1) as client:
        await get(client, server.url())
        for pin in (MISSING, NOT_OURS):
            with connector_of(client).use_source(pin):
                error = await failure(client, server.url())
                assert isinstance(error, aiohttp.ClientConnectorError)
                assert isinstance(error.os_error, BindError)
                assert str(error.os_error.source) == pin
        with connector_of(client).use_source(A):  # nor when its slot is taken
            held = asyncio.create_task(get(client, server.url("/hold")))
            await until(lambda: len(server.peers) == 2)
            waiting = asyncio.create_task(get(client, server.url()))
            await asyncio.sleep(0.02)
            assert len(server.peers) == 2
            server.go.set()
            assert await together(held, waiting) == [A, A]
        with pytest.raises(InvalidSource), connector_of(client).use_source("eth0"):
            pass


# --- failover -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [MISSING, NOT_OURS, f"ifhost!lo!{NOT_OURS}", "::1", "host!nobody.test"])
async def test_a_source_that_fails_by_itself_hands_over_to_the_next(server: Server, bad: str, dns: DnsServer) -> None:
    async with session(bad, A) as client:
        assert [await get(client, server.url()) for _ in range(4)] == [A] * 4
        assert figures(client)[bad] == (0, 0, 0, 0)
        assert figures(client)[A] == (1, 0, 1, 1)


async def test_no_other_source_is_tried_when_the_target_refuses(server: Server) -> None:
    async with session(A, B, C) as client:
        for source in (A, B, C, A):
            error = await failure(client, f"http://{HERE}:{refusing()}/")
            assert isinstance(error, aiohttp.ClientConnectorError)
            assert isinstance(error.os_error, ConnectError)
            assert [str(attempt.source) for attempt in error.os_error.attempts] == [source]


async def test_when_every_source_fails_the_error_names_them_all(server: Server) -> None:
    async with session(MISSING, NOT_OURS) as client:
        error = await failure(client, server.url())
        assert type(error) is aiohttp.ClientConnectorError
        assert type(error.os_error) is BindError
        assert error.errno == error.os_error.errno == errno.ENODEV
        assert MISSING in str(error)
        assert f"{NOT_OURS} is not usable" in str(error)
        assert error.os_error.destination == f"{HERE}:{server.port}"
        again = await failure(client, server.url())
        assert again.errno == errno.ENODEV  # the one that has failed longest ago goes first
    assert not server.peers


# --- errors -------------------------------------------------------------------------------------------------

ERRORS = {
    "refused": (A, "http://127.0.0.1:{refusing}/", aiohttp.ClientConnectorError, ConnectError, errno.ECONNREFUSED),
    "no interface": (MISSING, "http://127.0.0.1:1/", aiohttp.ClientConnectorError, BindError, errno.ENODEV),
    "not our address": (NOT_OURS, "http://127.0.0.1:1/", aiohttp.ClientConnectorError, BindError, errno.EADDRNOTAVAIL),
    "no way": ("if!lo", "http://192.0.2.1:1/", aiohttp.ClientConnectorError, BindError, errno.ENETUNREACH),
    "other family": (A, "http://[::1]:1/", aiohttp.ClientConnectorError, BindError, errno.EADDRNOTAVAIL),
    "no such zone": (
        "::1",
        "http://[fe80::1%25nope]:1/",
        aiohttp.ClientConnectorError,
        ResolveError,
        socket.EAI_NONAME,
    ),
    "no such name": (A, "http://nobody.test:1/", aiohttp.ClientConnectorDNSError, ResolveError, socket.EAI_NONAME),
    "no such source": (
        "host!nobody.test",
        "http://127.0.0.1:1/",
        aiohttp.ClientConnectorError,
        ResolveError,
        socket.EAI_NONAME,
    ),
}


@pytest.mark.parametrize(("source", "url", "kind", "cause", "number"), ERRORS.values(), ids=list(ERRORS))
async def test_errors_are_aiohttps_own_with_ours_inside(
    source: str, url: str, kind: type, cause: type, number: int, dns: DnsServer
) -> None:
    target = url.format(refusing=refusing())
    async with session(source) as client:
        error = await failure(client, target)
    assert type(error) is kind
    assert isinstance(error, aiohttp.ClientConnectorError)
    inner = error.os_error
    assert isinstance(inner, cause)
    assert isinstance(inner, aiobind.AiobindError)
    assert error.errno == inner.errno == number
    assert error.__cause__ is inner
    assert error.strerror == inner.strerror
    assert inner.strerror is not None
    assert inner.strerror in str(error)
    assert inner.strerror.startswith(("connect from", "connect to"))
    assert inner.destination == URL(target).raw_authority.replace("%25", "%")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert type(copy.os_error) is type(inner)
    assert (copy.os_error.errno, copy.os_error.source) == (number, inner.source)
    assert getattr(copy.os_error, "attempts", ()) == () or len(copy.os_error.attempts) == len(inner.attempts)


async def test_a_refused_connection_is_a_connection_refused_error() -> None:
    async with session(A) as client:
        error = await failure(client, f"http://{HERE}:{refusing()}/")
        assert isinstance(error, aiohttp.ClientConnectorError)
        assert isinstance(error.os_error, ConnectionRefusedError)
        assert not isinstance(error.os_error, BindError)


TIMEOUTS = {
    "sock_connect": {"sock_connect": 0.05},
    "connect": {"connect": 0.05},
    "total": {"total": 0.05},
    "connect before sock_connect": {"connect": 0.05, "sock_connect": 5},
    "total before both": {"total": 0.05, "connect": 5, "sock_connect": 5},
}


@pytest.mark.parametrize("seconds", TIMEOUTS.values(), ids=list(TIMEOUTS))
async def test_timeouts_end_a_connect_as_they_do_without_us(seconds: dict[str, float]) -> None:
    timeout = aiohttp.ClientTimeout(**({"total": 20} | seconds))
    with silent() as port:
        errors = []
        for sources in ((), (A,)):
            async with session(*sources, timeout=timeout) as client:
                start = time.monotonic()
                errors.append(await failure(client, f"http://{HERE}:{port}/"))
                assert time.monotonic() - start < 4
                if sources:
                    await until(lambda: figures(client)[A] == (0, 0, 0, 0))
    assert type(errors[0]) is type(errors[1])
    assert str(errors[0]) == str(errors[1])
    assert isinstance(errors[1], asyncio.TimeoutError)


@pytest.mark.parametrize("nothing", [0, None, -1])
async def test_a_timeout_of_nothing_is_none(server: Server, nothing: float | None) -> None:
    timeout = aiohttp.ClientTimeout(total=20, connect=nothing, sock_connect=nothing)
    for keywords in ({}, {"limit_per_source": 1}):
        async with session(A, timeout=timeout, **keywords) as client:
            assert await get(client, server.url()) == A


async def test_the_deadline_of_a_connect_does_not_keep_it_from_the_next_address(server: Server) -> None:
    names = Names(slow_test=["127.0.0.11", "127.0.0.12", HERE])
    timeout = aiohttp.ClientTimeout(total=20, sock_connect=0.15)
    with silent("127.0.0.11", server.port), silent("127.0.0.12", server.port):
        for delay in (None, 10):
            async with session(A, resolver=names, timeout=timeout, happy_eyeballs_delay=delay) as client:
                assert await get(client, server.url("/", "slow.test")) == A
        async with session(A, resolver=names, timeout=timeout, happy_eyeballs_delay=None) as client:
            error = await failure(client, URL(server.url("/", "slow.test")).with_port(1))
            assert isinstance(error, aiohttp.ClientConnectorError)


async def test_the_deadline_of_a_connect_holds_while_the_source_is_looked_up(server: Server, dns: DnsServer) -> None:
    dns.add("slow.test", A, delay=math.inf)
    timeout = aiohttp.ClientTimeout(total=20, sock_connect=0.1)
    async with session("host!slow.test", timeout=timeout) as client:
        assert isinstance(await failure(client, server.url()), aiohttp.ServerTimeoutError)
        dns.release("slow.test")
        assert await get(client, server.url(), timeout=aiohttp.ClientTimeout(total=20)) == A


# --- several addresses --------------------------------------------------------------------------------------


def attempts(packets: list[Packet]) -> list[tuple[str, str]]:
    """By which NIC and whither each connection was begun: the kernel repeats a SYN that gets no answer in time."""
    syns = [(packet.nic, packet.destination, packet.sport) for packet in packets if packet.syn]
    return [syn[:2] for syn in dict.fromkeys(syns)]


EIGHT = [f"127.0.1.{number}" for number in range(1, 9)]


@pytest.mark.parametrize("delay", [0.25, None])
async def test_eight_refusing_addresses_cost_eight_attempts(delay: float | None) -> None:
    names = Names(many_test=EIGHT)
    async with session(A, resolver=names, happy_eyeballs_delay=delay) as client:
        error = await failure(client, f"http://many.test:{refusing()}/")
        assert isinstance(error, aiohttp.ClientConnectorError)
        assert isinstance(error.os_error, ConnectError)
        assert [attempt.address.partition(":")[0] for attempt in error.os_error.attempts] == EIGHT
        assert error.errno == errno.ECONNREFUSED


@pytest.mark.parametrize("silently", [False, True], ids=["refusing", "silent"])
@pytest.mark.parametrize("delay", [0.03, None])
async def test_each_address_is_tried_once(lab: Lab, witness: Witness, silently: bool, delay: float | None) -> None:
    v4, v6 = ([f"{prefix}{number}" for number in range(1, 5)] for prefix in ("203.0.113.", "2001:db8:ffff::"))
    if not silently:  # else far has no route there, and forwards nothing
        lab.far.ip(*(f"addr add {ip} dev lo" for ip in v4), *(f"addr add {ip} dev lo nodad" for ip in v6))
    seconds = 10 if not silently else 0.08 if delay is None else 0.7
    timeout = aiohttp.ClientTimeout(total=20, sock_connect=seconds)
    names = Names(many_test=v4 + v6)
    async with session("if!n1", resolver=names, happy_eyeballs_delay=delay, timeout=timeout) as client:
        error = await failure(client, "http://many.test/")
    assert isinstance(error, aiohttp.ServerTimeoutError if silently else aiohttp.ClientConnectorError)
    tried = attempts(witness.packets())
    expected = [("n1", ip) for pair in zip(v4, v6, strict=True) for ip in pair]
    if delay is None:
        assert tried == expected
    else:  # the first SYN waits for its neighbour's address, and another may overtake it
        assert sorted(tried) == sorted(expected)


async def test_happy_eyeballs_delay(server: Server) -> None:
    names = Names(slow_test=["127.0.0.11", HERE])
    url = server.url("/", "slow.test")
    with silent("127.0.0.11", server.port):
        async with session(A, resolver=names, happy_eyeballs_delay=0.02) as client:
            assert await get(client, url) == A
            assert figures(client)[A] == (1, 0, 1, 1)
        for late in (30, None):
            timeout = aiohttp.ClientTimeout(total=0.35)
            async with session(A, resolver=names, happy_eyeballs_delay=late, timeout=timeout) as client:
                assert isinstance(await failure(client, url), TimeoutError)
    assert len(server.peers) == 1


async def test_interleave_and_family_are_honoured(lab: Lab, witness: Witness) -> None:
    v4, v6 = (["203.0.113.1", "203.0.113.2"], ["2001:db8:ffff::1", "2001:db8:ffff::2"])
    lab.far.ip(*(f"addr add {ip} dev lo" for ip in v4), *(f"addr add {ip} dev lo nodad" for ip in v6))
    for keywords, expected in (
        ({"interleave": 2}, [*v4, *v6]),
        ({"interleave": 1}, [v4[0], v6[0], v4[1], v6[1]]),
        ({"family": socket.AF_INET6}, v6),
        ({"family": socket.AF_INET}, v4),
    ):
        names = Names(many_test=v4 + v6)
        async with session("if!n0", resolver=names, happy_eyeballs_delay=10, **keywords) as client:
            error = await failure(client, "http://many.test/")
        assert isinstance(error, aiohttp.ClientConnectorError)
        assert attempts(witness.packets()) == [("n0", ip) for ip in expected]


# --- TLS ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def tls(certificates: Certificates) -> AsyncIterator[Server]:
    async with serving(ssl_context=certificates.good[0]) as server:
        yield server


async def test_tls(tls: Server, server: Server, certificates: Certificates) -> None:
    names = Names(good_test=[HERE], bad_test=[HERE])
    good, bad = tls.url("/", "good.test", "https"), tls.url("/", "bad.test", "https")
    async with session(A, resolver=names, ssl=certificates.client) as client:
        assert [await get(client, good) for _ in range(3)] == [A] * 3
        assert len(set(tls.peers)) == 1
        assert figures(client)[A] == (1, 0, 1, 1)
        assert await get(client, bad, ssl=False) == A
        assert await get(client, bad, ssl=aiohttp.Fingerprint(certificates.good[1])) == A
        assert await get(client, good, ssl=aiohttp.Fingerprint(certificates.good[1])) == A
        seen = len(tls.peers)
        wrong = await failure(client, good, ssl=aiohttp.Fingerprint(certificates.other[1]))
        assert isinstance(wrong, aiohttp.ServerFingerprintMismatch)
        unnamed = await failure(client, bad)
        assert isinstance(unnamed, aiohttp.ClientConnectorCertificateError)
        assert "bad.test" in str(unnamed)
        untrusted = await failure(client, good, ssl=ssl.create_default_context())
        assert isinstance(untrusted, aiohttp.ClientConnectorCertificateError)
        no_tls = await failure(client, server.url("/", "good.test", "https"))
        assert isinstance(no_tls, aiohttp.ClientConnectorSSLError)
        assert len(tls.peers) == seen
        assert_free(client)
        if "server_hostname" in inspect.signature(aiohttp.ClientSession._request).parameters:
            headers = {"Host": "good.test"}
            assert await get(client, bad, headers=headers, server_hostname="good.test") == A


async def test_ssl_shutdown_timeout(tls: Server, certificates: Certificates) -> None:
    async def seconds(connector: aiohttp.TCPConnector) -> float | None:
        async with aiohttp.ClientSession(connector=connector) as client:
            tls.go.clear()
            async with client.get(tls.url("/stream", "good.test", "https"), ssl=certificates.client) as response:
                assert response.connection is not None
                protocol = getattr(response.connection.transport, "_ssl_protocol", None)  # uvloop hides it
                tls.go.set()
                await response.read()
                return getattr(protocol, "_ssl_shutdown_timeout", None)

    names = Names(good_test=[HERE])
    assert await seconds(BoundTCPConnector(A, resolver=names)) == await seconds(aiohttp.TCPConnector(resolver=names))
    if "ssl_shutdown_timeout" in inspect.signature(aiohttp.TCPConnector).parameters:
        for given in (0, 7, None):
            with pytest.warns(DeprecationWarning, match="ssl_shutdown_timeout"):
                ours = BoundTCPConnector(A, resolver=names, ssl_shutdown_timeout=given)
            with pytest.warns(DeprecationWarning, match="ssl_shutdown_timeout"):
                theirs = aiohttp.TCPConnector(resolver=names, ssl_shutdown_timeout=given)
            assert await seconds(ours) == await seconds(theirs), given


# Not on uvloop, which closes the descriptor and leaves the socket object in the dark.
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_asyncio_refuses_leaves_no_socket(tls: Server, certificates: Certificates) -> None:
    names = Names(good_test=[HERE])
    async with session(A, resolver=names, ssl=certificates.client) as client:
        error = await failure(client, tls.url("/", "good.test", "https"), server_hostname=".good.test")
        assert isinstance(error, ValueError)
        await until(lambda: figures(client)[A] == (0, 0, 0, 1))
        assert_free(client)


V6, V4 = "::1", HERE


@contextlib.asynccontextmanager
async def no_tls(port: int, *, hangs: bool) -> AsyncIterator[list[str]]:
    """Listen at 127.0.0.1 and ::1, and speak no TLS; yield where somebody came."""

    async def meet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        met.append(writer.get_extra_info("sockname")[0])
        writers.append(writer)
        if not hangs:
            writer.write(b"this is no TLS\n")
            writer.close()

    met: list[str] = []
    writers: list[asyncio.StreamWriter] = []
    servers = [await asyncio.start_server(meet, host, port) for host in (V4, V6)]
    try:
        yield met
    finally:
        for each in (*servers, *writers):
            each.close()
        for writer in writers:
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


AFTER_TLS = {
    "the next": ([V4, ALSO_HERE], False),
    "the next after a refusal": (["127.0.0.88", V4, ALSO_HERE], False),
    "the other family": ([V6, ALSO_HERE], False),
    "the other family, one more": ([V6, V4, ALSO_HERE], False),
    "after a deadline": ([V6, V4, ALSO_HERE], True),
}


@pytest.mark.parametrize(("addresses", "hangs"), AFTER_TLS.values(), ids=list(AFTER_TLS))
async def test_tls_that_fails_at_one_address_goes_on_to_the_next(
    addresses: list[str], hangs: bool, certificates: Certificates
) -> None:
    names = Names(good_test=addresses)
    timeout = aiohttp.ClientTimeout(total=20, sock_connect=0.25 if hangs else 5)
    async with (
        serving(ALSO_HERE, ssl_context=certificates.good[0]) as server,
        no_tls(server.port, hangs=hangs) as met,
        session("if!lo", resolver=names, ssl=certificates.client, timeout=timeout) as client,
    ):
        url = server.url("/", "good.test", "https")
        assert await get(client, url) == HERE
        assert met == [ip for ip in addresses if ip in (V4, V6)]
        await until(lambda: figures(client)["if!lo"].connections == 1)
        # When there is no other, the last failure of TLS is the error, though another family could not be served.
        names.hosts["good.test"] = [V4, V6]
        connector_of(client).clear_dns_cache()
        with connector_of(client).use_source(A):
            error = await failure(client, url)
        assert isinstance(error, aiohttp.ServerTimeoutError if hangs else aiohttp.ClientConnectorSSLError)


async def test_an_address_that_lost_the_race_has_another_chance_when_tls_fails_at_the_winner(
    certificates: Certificates,
) -> None:
    async def fail(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        filler.close()
        await slow.start_serving()
        writer.write(b"this is no TLS\n")
        writer.close()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):  # it is the filler
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nslow")
        writer.close()

    names = Names(good_test=["127.0.0.11", HERE])
    with socket.create_server(("127.0.0.11", 0), backlog=0) as listener, socket.socket() as filler:
        port = listener.getsockname()[1]
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.11", port))
        slow = await asyncio.start_server(answer, sock=listener, ssl=certificates.good[0], start_serving=False)
        async with (
            slow,
            await asyncio.start_server(fail, HERE, port),
            session(A, resolver=names, ssl=certificates.client, happy_eyeballs_delay=0.02) as client,
        ):
            assert await get(client, f"https://good.test:{port}/") == "slow"


async def test_a_deadline_after_a_failure_of_tls_ends_it_all(server: Server, certificates: Certificates) -> None:
    timeout = aiohttp.ClientTimeout(total=10, sock_connect=0.2)
    names = Names(good_test=[HERE, "127.0.0.11"])
    with silent("127.0.0.11", server.port):
        async with session(A, resolver=names, ssl=certificates.client, timeout=timeout) as client:
            error = await failure(client, server.url("/", "good.test", "https"))
    assert isinstance(error, aiohttp.ConnectionTimeoutError)


async def test_a_wrong_fingerprint_goes_on_to_the_next_address(certificates: Certificates) -> None:
    async with serving(ALSO_HERE, ssl_context=certificates.good[0]) as server:
        sock = socket.create_server((HERE, server.port))
        async with serving(sock=sock, ssl_context=certificates.other[0]) as other:
            async with session(A, resolver=Names(good_test=[HERE, ALSO_HERE])) as client:
                pin = aiohttp.Fingerprint(certificates.good[1])
                assert await get(client, server.url("/", "good.test", "https"), ssl=pin) == A
            assert not other.peers
            assert server.sources == [A]


# --- proxies ------------------------------------------------------------------------------------------------


class Proxy:
    """A tiny HTTP proxy; for it, every name means 127.0.0.1."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.methods: list[str] = []
        self.peers: list[str] = []
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.peers.append(writer.get_extra_info("peername")[0])
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            method, url = head.decode().split()[:2]
            self.methods.append(method)
            port = URL(f"//{url}" if method == "CONNECT" else url).port
            up_reader, up_writer = await asyncio.open_connection(HERE, port)
            if method == "CONNECT":
                writer.write(self._answer)
            else:
                up_writer.write(head)
            await together(self._pipe(reader, up_writer), self._pipe(up_reader, writer))
        writer.close()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def proxying(answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n", **keywords: Any) -> AsyncIterator[Proxy]:
    proxy = Proxy(answer)
    async with await asyncio.start_server(proxy.serve, HERE, 0, **keywords) as server:
        scheme = "https" if keywords.get("ssl") else "http"
        proxy.url = f"{scheme}://good.test:{server.sockets[0].getsockname()[1]}"
        try:
            yield proxy
        finally:
            await proxy.end()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("outer", ["http", "https"], ids=["plain proxy", "TLS proxy"])
async def test_the_hop_to_the_proxy_is_pinned(scheme: str, outer: str, certificates: Certificates) -> None:
    names = Names(good_test=[HERE], bad_test=[HERE])
    context = certificates.good[0]
    async with (
        serving(**({"ssl_context": context} if scheme == "https" else {})) as server,
        proxying(**({"ssl": context} if outer == "https" else {})) as proxy,
        session(A, B, resolver=names, ssl=certificates.client, limit_per_source=3) as client,
    ):
        url = server.url("/", "good.test", scheme)
        for _ in range(4):
            async with client.get(url, proxy=proxy.url) as response:
                assert (await response.text()).split()[0] == HERE
                bound = bound_source(response)
                assert str(bound.source) == bound.address
        assert proxy.peers == [A, B]
        assert proxy.methods == ["CONNECT" if scheme == "https" else "GET"] * 2
        assert figures(client) == dict.fromkeys((A, B), (1, 0, 1, 1))
        if (outer, scheme) == ("http", "https"):  # asyncio 3.11 stumbles over a failure of TLS in TLS
            error = await failure(client, server.url("/", "bad.test", scheme), proxy=proxy.url)
            assert isinstance(error, aiohttp.ClientConnectorCertificateError)
        assert_free(client)


async def test_a_tunnel_whose_answer_has_a_length_of_nothing(tls: Server, certificates: Certificates) -> None:
    """By it aiohttp 3.12 takes the tunnel for idle, and keeps it beside ours."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    async with (
        proxying(answer) as proxy,
        session(A, resolver=Names(good_test=[HERE]), ssl=certificates.client) as client,
    ):
        for _ in range(3):
            with contextlib.suppress(aiohttp.ClientError):
                await get(client, tls.url("/", "good.test", "https"), proxy=proxy.url)
        assert figures(client)[A].in_use == 0
        assert_free(client)


async def test_proxy_errors(tls: Server, certificates: Certificates) -> None:
    url = tls.url("/", "good.test", "https")
    names = Names(good_test=[HERE])
    async with session(A, B, resolver=names, ssl=certificates.client, limit_per_source=1) as client:
        error = await failure(client, url, proxy=f"http://good.test:{refusing()}")
        assert type(error) is aiohttp.ClientProxyConnectionError
        assert isinstance(error.os_error, ConnectError)
        assert error.errno == errno.ECONNREFUSED
        assert len(error.os_error.attempts) == 1
        async with proxying(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n") as proxy:
            error = await failure(client, url, proxy=proxy.url)
            assert isinstance(error, aiohttp.ClientHttpProxyError)
            assert error.status == 502
        assert_free(client)
        async with proxying() as proxy, session(MISSING, A, resolver=names, ssl=certificates.client) as other:
            assert await get(other, url, proxy=proxy.url) == HERE
            assert proxy.peers == [A]
            with connector_of(other).use_source(MISSING):
                error = await failure(other, url, proxy=proxy.url)
                assert type(error) is aiohttp.ClientProxyConnectionError
                assert isinstance(error.os_error, BindError)


# --- what aiohttp does besides ------------------------------------------------------------------------------


async def test_redirects_and_cookies(server: Server) -> None:
    async with session(A, B) as client:
        client.cookie_jar._unsafe = True  # type: ignore[attr-defined]  # an IP address may have cookies
        async with client.get(server.url("/redirect")) as response:
            assert await response.json() == {"from": A}
            assert [bound_source(old).address for old in response.history] == [A]
            assert bound_source(response).address == B
    assert server.sources == [A, B]


async def test_websockets(server: Server) -> None:
    async with session(A) as client:
        async with client.ws_connect(server.url("/socket")) as websocket:
            assert figures(client)[A] == (1, 1, 0, 1)
            for word in ("one", "two"):
                await websocket.send_str(word)
                assert await websocket.receive_str() == f"{A} {word}"
            bound = bound_source(websocket)
            assert bound == BoundSource(aiobind.parse_source(A), None, A, server.peers[0][1])
        await until(lambda: figures(client)[A] == (0, 0, 0, 1))
        with pytest.raises(LookupError):
            bound_source(websocket)


async def test_uploads_and_streams(server: Server) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * 10_000

    async with session(A, B) as client:
        async with client.post(server.url("/upload"), data=chunks()) as response:
            assert await response.text() == "chunked 640000"
        async with client.post(server.url("/upload"), data=b"y" * 100_000) as response:
            assert await response.text() == "None 100000"
        async with client.get(server.url("/stream")) as response:
            assert await response.content.readline() == b"0\n"
            assert bound_source(response).address == A
            assert figures(client)[A][1:3] == (1, 0)
            server.go.set()
            assert await response.read() == b"1\n2\n"
        assert figures(client)[A][1:3] == (0, 1)


async def test_bound_source_of_a_response(server: Server) -> None:
    for source, interface in (("if!lo", "lo"), (A, None), ("ifhost!lo!127.0.0.1", "lo"), ("net!127.9.0.0/16", None)):
        async with session(source) as client:
            server.go.clear()
            async with client.get(server.url("/stream")) as response:
                before = bound_source(response)
                assert response.connection is not None
                assert bound_source(response.connection.transport) == before
                server.go.set()
                await response.read()
                assert bound_source(response) == before
            assert response.connection is None
            assert (str(before.source), before.interface) == (source, interface)
            assert (before.address, before.port) == server.peers[-1]
            async with client.get(server.url("/status/500")) as error:
                assert bound_source(error) == before
                with pytest.raises(aiohttp.ClientResponseError):
                    error.raise_for_status()
            assert bound_source(response) == before
        assert bound_source(response) == before
    async with session() as client, client.get(server.url()) as response:
        with pytest.raises(LookupError):
            bound_source(response)


SCENARIOS = {
    "one after the other": {},
    "one at a time": {"limit": 1},
    "no reuse": {"force_close": True},
    "no cache": {"use_dns_cache": False},
}


@pytest.mark.parametrize("keywords", SCENARIOS.values(), ids=list(SCENARIOS))
async def test_traces_tell_what_they_tell_without_us(server: Server, keywords: dict[str, Any]) -> None:
    names = [name for name in dir(aiohttp.TraceConfig) if name.startswith("on_")]
    assert len(names) > 15

    async def events(*sources: str) -> list[str]:
        def note(name: str) -> Any:
            async def noted(*_: object) -> None:
                told.append(name)

            return noted

        told: list[str] = []
        config = aiohttp.TraceConfig()
        for name in names:
            getattr(config, name).append(note(name))
        config.freeze()
        async with session(*sources, resolver=Names(name_test=[HERE]), **keywords) as client:
            client._trace_configs.append(config)
            for path in ("/", "/redirect", "/upload"):
                await get(client, server.url(path, "name.test"))
            await failure(client, f"http://name.test:{refusing()}/")
            server.go.clear()
            held = asyncio.create_task(get(client, server.url("/hold", "name.test")))
            await until(lambda: server.go._waiters)
            waiting = asyncio.create_task(get(client, server.url("/", "name.test")))
            if "limit" in keywords:
                await until(lambda: "on_connection_queued_start" in told)
            else:
                await waiting
            server.go.set()
            await together(held, waiting)
        return told

    told = [await events(), await events(A)]
    assert told[0] == told[1]
    assert {"on_connection_create_end", "on_request_exception", "on_dns_resolvehost_end"} <= set(told[1])
    assert ("on_connection_queued_end" in told[1]) is ("limit" in keywords)


async def test_keepalive_timeout(server: Server) -> None:
    async with session(A, keepalive_timeout=0.02) as client:
        for made in (1, 2):
            await get(client, server.url())
            await until(lambda: figures(client)[A][:3] == (0, 0, 0))
            assert figures(client)[A].connects == made


async def test_a_connection_that_the_server_closes_is_no_longer_idle(server: Server) -> None:
    async with session(A) as client:
        await get(client, server.url())
        ((idle, _),) = next(iter(connector_of(client)._conns.values()))
        assert idle.transport is not None
        idle.transport.abort()
        await until(lambda: figures(client)[A] == (0, 0, 0, 1))
        assert await get(client, server.url()) == A
        assert figures(client)[A] == (1, 0, 1, 2)


# --- the end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["connector", "session"])
async def test_close_ends_requests_under_way(server: Server, how: str) -> None:
    errors = []
    with silent() as port:
        for sources in ((), (A,)):
            server.peers.clear()
            async with session(*sources) as client:
                assert client.connector is not None
                await get(client, server.url())
                reading = asyncio.create_task(get(client, server.url("/hold")))
                connecting = asyncio.create_task(get(client, f"http://{HERE}:{port}/"))
                await until(lambda: len(server.peers) == 2)
                if sources:
                    assert figures(client)[A].in_use == 1
                await (client.connector if how == "connector" else client).close()
                await asyncio.wait([reading])
                errors.append(reading.exception())
                connecting.cancel()  # aiohttp leaves it be, and so do we
                await asyncio.wait([connecting])
                with pytest.raises(RuntimeError, match="Session is closed"):
                    await get(client, server.url())
                if sources:
                    await until(lambda: figures(client)[A][:3] == (0, 0, 0))
    assert type(errors[0]) is type(errors[1])
    assert errors[1] is not None


async def test_a_connect_that_ends_after_close_is_closed(server: Server) -> None:
    class Slow(Names):
        async def resolve(self, *args: Any, **keywords: Any) -> Any:
            found = await super().resolve(*args, **keywords)
            await go.wait()
            return found

    async def kind(*sources: str) -> type:
        names = Slow(name_test=[HERE])
        go.clear()
        async with session(*sources, resolver=names, use_dns_cache=False) as client:
            task = asyncio.create_task(get(client, server.url("/", "name.test")))
            await until(lambda: names.asked)
            assert client.connector is not None
            await client.connector.close()
            go.set()
            await asyncio.wait([task])
            return type(task.exception())

    go = asyncio.Event()
    kinds = [await kind(), await kind(A)]
    assert issubclass(kinds[1], aiohttp.ClientConnectionError)
    assert kinds[0] is kinds[1]
    assert not server.peers


async def test_close_wakes_those_who_wait_for_a_slot(server: Server) -> None:
    async with session(A, limit_per_source=1) as client, client.get(server.url("/stream")) as response:
        waiting = [asyncio.create_task(get(client, server.url())) for _ in range(3)]
        await asyncio.sleep(0.005)
        await connector_of(client).close()
        await asyncio.wait(waiting, timeout=5)
        assert [type(task.exception()) for task in waiting] == [aiohttp.ClientConnectionError] * 3
        assert response.status == 200
    assert len(server.peers) == 1


async def test_close_lets_go_of_the_watch_on_the_interfaces(server: Server) -> None:
    async with session("if!lo") as client:
        await get(client, server.url())
        watch = weakref.ref(connector_of(client)._dialer._planner._watch)
        assert watch() is not None
    gc.collect()
    assert watch() is None
    assert connector_of(client).closed


FORGETFUL = """
import asyncio, gc, aiohttp
from aiohttp import web
from aiobind.aiohttp import BoundTCPConnector

async def main():
    app = web.Application()
    app.router.add_get("/", lambda _: asyncio.sleep(0, web.Response(text="hello")))
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    connector = {connector}
    session = aiohttp.ClientSession(connector=connector, connector_owner=False)
    async with session.get(f"http://127.0.0.1:{{site._server.sockets[0].getsockname()[1]}}/") as response:
        await response.read()
    await session.close()
    del connector, session, response
    gc.collect()
    await asyncio.sleep(0.02)
    await runner.cleanup()

asyncio.run(main())
"""


def test_a_forgotten_close_is_told_as_without_us() -> None:
    told = []
    for connector in ("aiohttp.TCPConnector()", "BoundTCPConnector('if!lo')"):
        command = [sys.executable, "-X", "dev", "-W", "always", "-c", FORGETFUL.format(connector=connector)]
        root = Path(__file__).parent.parent
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        told.append(re.findall(r"\w+Warning: \w+ \w+|^\w+ \w+$", run.stderr, re.MULTILINE))
    assert told[0] == told[1]
    assert "ResourceWarning: Unclosed connector" in told[1]


def test_a_second_loop_is_refused() -> None:
    timeout = aiohttp.ClientTimeout(total=None)

    async def begin() -> tuple[aiohttp.ClientSession, contextlib.AsyncExitStack, str]:
        stack = contextlib.AsyncExitStack()
        server = await stack.enter_async_context(serving())
        client = await stack.enter_async_context(session(A, timeout=timeout))
        assert await get(client, server.url()) == A
        return client, stack, server.url()

    with asyncio.Runner() as first, asyncio.Runner() as second:
        client, stack, url = first.run(begin())
        with pytest.raises(RuntimeError, match="event loop"):
            second.run(get(client, url))  # with a connection in the pool
        with pytest.raises(RuntimeError, match="event loop"):
            second.run(get(client, url.replace(HERE, ALSO_HERE)))
        assert first.run(get(client, url)) == A
        first.run(stack.aclose())


# --- the keywords -------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "verify_ssl": True,
    "fingerprint": None,
    "use_dns_cache": False,
    "ttl_dns_cache": 7,
    "dns_cache_max_size": 7,
    "family": socket.AF_INET,
    "ssl_context": None,
    "ssl": False,
    "keepalive_timeout": 7,
    "force_close": True,
    "limit": 7,
    "limit_per_host": 7,
    "enable_cleanup_closed": False,
    "timeout_ceil_threshold": 7,
    "happy_eyeballs_delay": 0.7,
    "interleave": 2,
    "ssl_shutdown_timeout": 0.7,
}
TAKEN_BY_THE_SOURCE = {"local_addr", "socket_factory"}
#: What may differ: what aiohttp makes anew for each connector, and the resolver, which is ours.
OWN = {"_resolver", "_resolver_owner", "_factory", "_cached_hosts", "_placeholder_future", "_source_traceback"}


async def test_every_keyword_of_aiohttps_connector_is_taken() -> None:
    parameters = inspect.signature(aiohttp.TCPConnector).parameters
    loop = asyncio.get_running_loop()
    for name, parameter in parameters.items():
        if name in TAKEN_BY_THE_SOURCE:
            continue
        values: list[Any] = [VALUES[name]] if name in VALUES else []
        if name == "loop":
            values = [loop]
        if name == "resolver":
            values = [Names()]
        assert values, f"aiohttp {aiohttp.__version__} has a new keyword {name}: does it work with a source?"
        for value in (*values, parameter.default):
            with contextlib.ExitStack() as stack:
                if name == "ssl_shutdown_timeout":
                    stack.enter_context(
                        pytest.warns(DeprecationWarning, match=name) if value == 0.7 else contextlib.nullcontext()
                    )
                theirs = aiohttp.TCPConnector(**{name: value})
                ours = BoundTCPConnector(A, **{name: value})
            state = {key: val for key, val in vars(theirs).items() if key not in OWN}
            assert {key: vars(ours)[key] for key in state} == state, name
            assert vars(ours._cached_hosts) == vars(theirs._cached_hosts)
            await ours.close()
            await theirs.close()


async def test_the_options_reach_the_connections(server: Server, resolv_conf: Callable[..., None]) -> None:
    resolv_conf("")
    keywords: dict[str, Any] = {"local_ports": range(21000, 21050), "direct": ["localhost"], "borrow": True}
    async with aiohttp.ClientSession(connector=BoundTCPConnector("192.0.2.99", **keywords)) as session:
        async with session.get(server.url(host="localhost")) as response:
            bound = aiobind.bound_source(response)
        assert (str(bound.source), bound.interface, bound.address) == ("192.0.2.99", None, HERE)
        with aiobind.use_source("ifhost!lo!127.0.0.2"):
            async with session.get(server.url()) as response:
                assert aiobind.bound_source(response)[1:3] == ("lo", "127.0.0.2")
        with pytest.raises(aiohttp.ClientConnectorError, match=r"192\.0\.2\.99 is not usable"):
            await session.get(server.url())
    assert all(port in range(21000, 21050) for _, port in server.peers)


REFUSED = {
    "local_addr": ({"local_addr": (A, 0)}, TypeError, "local_addr is not taken here: the source names"),
    "local_addr of None": ({"local_addr": None}, TypeError, "local_addr"),
    "socket_factory": ({"socket_factory": socket.socket}, TypeError, "socket_factory is not taken here: the source"),
    "dns and resolver": ({"dns": "source", "resolver": Names()}, ValueError, "dns= and resolver="),
    "local_ports": ({"local_ports": range(5000, 5000)}, ValueError, "local_ports is a range of ports"),
    "dns": ({"dns": "192.0.2.53"}, ValueError, 'dns is "system", "source" or a sequence'),
    "direct": ({"direct": "localhost"}, TypeError, "direct is a sequence"),
    "unknown": ({"colour": "red"}, TypeError, "colour"),
    "force_close": ({"force_close": True, "keepalive_timeout": 3}, ValueError, "force_close"),
}


@pytest.mark.parametrize(("keywords", "kind", "text"), REFUSED.values(), ids=list(REFUSED))
async def test_keywords_that_are_refused(keywords: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        BoundTCPConnector(A, **keywords)


async def test_sources_that_are_refused() -> None:
    with pytest.raises(TypeError, match="name at least one source"):
        BoundTCPConnector()
    with pytest.raises(InvalidSource, match="if!eth0"):
        BoundTCPConnector("eth0")
    with pytest.raises(ValueError, match="named twice"):
        BoundTCPConnector(A, A)


async def test_socket_options_are_set(server: Server) -> None:
    option = (socket.SOL_SOCKET, socket.SO_PRIORITY, 5)
    async with session(A, socket_options=[option]) as client, client.get(server.url("/stream")) as response:
        assert response.connection is not None
        assert response.connection.transport is not None
        sock = response.connection.transport.get_extra_info("socket")
        assert sock.getsockopt(*option[:2]) == 5


# --- names --------------------------------------------------------------------------------------------------


async def test_use_dns_cache_and_its_ttl(server: Server) -> None:
    url = server.url("/", "name.test")
    for keywords, questions in (({}, 1), ({"use_dns_cache": False}, 3), ({"ttl_dns_cache": 0}, 3)):
        names = Names(name_test=[HERE])
        async with session(A, resolver=names, force_close=True, **keywords) as client:
            for _ in range(3):
                await get(client, url)
            assert names.asked["name.test"] == questions, keywords
            connector_of(client).clear_dns_cache("name.test", server.port)
            await get(client, url)
            connector_of(client).clear_dns_cache()
            await get(client, url)
            assert names.asked["name.test"] == questions + 2, keywords


async def test_names_are_looked_up_by_the_system(server: Server, resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts=f"{HERE} site.test\n{A} crawler.test\n::1 six.test\n")
    async with session("host!crawler.test", C) as client:
        url = server.url("/", "site.test")
        assert [await get(client, url) for _ in range(4)] == [A, C, A, C]
        assert figures(client)["host!crawler.test"] == (1, 0, 1, 1)
        async with client.get(url) as response:
            assert str(bound_source(response).source) == "host!crawler.test"
    async with serving("::1") as six, session("if!lo") as client:
        assert await get(client, six.url("/", "six.test")) == "::1"


async def test_the_cache_is_aiohttps_and_there_is_no_other_behind_it(
    server: Server, resolv_conf: Callable[..., None]
) -> None:
    with socket.create_server((ALSO_HERE, server.port)) as sock:
        async with serving(sock=sock) as moved:
            for keywords, seen in (({}, 2), ({"use_dns_cache": False}, 1), ({"ttl_dns_cache": 0}, 1)):
                resolv_conf("", hosts=f"{HERE} moving.test\n")
                server.peers.clear()
                moved.peers.clear()
                async with session(A, force_close=True, **keywords) as client:
                    await get(client, server.url("/", "moving.test"))
                    resolv_conf("", hosts=f"{ALSO_HERE} moving.test\n")
                    await get(client, server.url("/", "moving.test"))
                    assert (len(server.peers), len(moved.peers)) == (seen, 2 - seen), keywords
                    connector_of(client).clear_dns_cache()
                    await get(client, server.url("/", "moving.test"))
                    assert len(moved.peers) == 3 - seen, keywords


@pytest.mark.parametrize(("keywords", "then"), [({}, A), ({"use_dns_cache": False}, B), ({"ttl_dns_cache": 0}, B)])
async def test_the_cache_is_for_the_names_of_sources_too(
    server: Server, resolv_conf: Callable[..., None], keywords: dict[str, Any], then: str
) -> None:
    resolv_conf("", hosts=f"{A} moving.test\n")
    async with session("host!moving.test", force_close=True, **keywords) as client:
        assert await get(client, server.url()) == A
        resolv_conf("", hosts=f"{B} moving.test\n")
        assert await get(client, server.url()) == then


# --- the lab: what the far side saw -------------------------------------------------------------------------

FLEET4, FLEET6 = "198.51.100.0/24", "2001:db8:7::/64"
#: source, the NIC by which it must leave, its address or prefix, by IP version
EGRESS: dict[str, tuple[str, dict[int, str]]] = {
    "if!n1": ("n1", {4: "198.18.1.2", 6: "2001:db8:1::2"}),
    "if!n2": ("n2", {4: "198.18.2.2", 6: "2001:db8:2::2"}),
    "198.18.1.2": ("n0", {4: "198.18.1.2"}),  # only an address: the routing table prefers n0
    "2001:db8:2::2": ("n0", {6: "2001:db8:2::2"}),
    "ifhost!n2!198.18.2.2": ("n2", {4: "198.18.2.2"}),
    "ifhost!n1!2001:db8:1::2": ("n1", {6: "2001:db8:1::2"}),
    "ifhost!n1!crawler.test": ("n1", {4: "198.18.1.2"}),
    "host!crawler.test": ("n0", {4: "198.18.1.2"}),
    f"net!{FLEET4}": ("n0", {4: FLEET4}),
    f"net!{FLEET6}": ("n0", {6: FLEET6}),
}


@contextlib.asynccontextmanager
async def far_servers(lab: Lab) -> AsyncIterator[dict[int, Server]]:
    with lab.far:
        four = socket.create_server((lab.target_v4, 80))
        six = socket.create_server(("::", 80), family=socket.AF_INET6)
    async with serving(sock=four) as server4, serving(sock=six) as server6:
        yield {4: server4, 6: server6}


@pytest.mark.parametrize("capable", [True, False], ids=["root", "no capabilities"])
async def test_requests_leave_as_the_source_says(
    lab: Lab, witness: Witness, capable: bool, request: pytest.FixtureRequest, resolv_conf: Callable[..., None]
) -> None:
    lab.near.ip(f"route add local {FLEET4} dev lo", f"route add local {FLEET6} dev lo")
    lab.far.ip(f"route add {FLEET4} via 198.18.0.2", f"route add {FLEET6} via 2001:db8::2")
    resolv_conf("", hosts=f"198.18.1.2 crawler.test\n{lab.target_v4} site.test\n{lab.target_v6} site.test\n")
    if not capable:
        request.getfixturevalue("no_capabilities")
    async with far_servers(lab) as servers:
        for source, (nic, addresses) in EGRESS.items():
            for version, address in addresses.items():
                url = f"http://{lab.target_v4 if version == 4 else f'[{lab.target_v6}]'}/"
                async with session(source, force_close=True) as client:
                    seen = {await get(client, url) for _ in range(3)}
                    assert all(ip_address(ip) in ip_network(address) for ip in seen), source
                    assert len(seen) == (3 if source.startswith("net!") else 1)
                    assert {str(key): numbers.connects for key, numbers in figures(client).items()} == {source: 3}
                packets = [packet for packet in witness.packets() if packet.protocol == "tcp"]
                assert {packet.nic for packet in packets} == {nic}, source
                assert {packet.source for packet in packets} == seen, source
                assert len(attempts(packets)) == 3
        async with session("if!n2", "if!n1") as client:
            for _ in range(4):
                await get(client, "http://site.test/")
        assert [nic for nic, _ in attempts(witness.packets())] == ["n2", "n1"]
        assert servers[4].peers


async def test_link_local_urls(lab: Lab, witness: Witness) -> None:
    nic = lab.nic("n1")
    async with far_servers(lab):
        for source, zone in (("if!n1", ""), ("if!n1", "%n1"), ("if!n1", "%25n1"), (f"{nic.link_local}%n1", "%25n1")):
            async with session(source) as client, client.get(f"http://[{nic.gateway_link_local}{zone}]/") as response:
                assert (await response.text()).split()[0].partition("%")[0] == nic.link_local
                assert bound_source(response).interface == "n1"
                assert bound_source(response).address == nic.link_local
        async with session("if!n2") as client:
            error = await failure(client, f"http://[{nic.gateway_link_local}%25n1]/")
            assert isinstance(error, aiohttp.ClientConnectorError)
            assert error.errno == errno.ENETUNREACH
    packets = [packet for packet in witness.packets() if packet.syn]
    assert {(packet.nic, packet.source) for packet in packets} == {("n1", nic.link_local)}


async def test_a_request_moves_on_from_a_nic_that_is_down(lab: Lab, witness: Witness) -> None:
    async with far_servers(lab), session("if!n1", "if!n2", force_close=True) as client:
        url = f"http://{lab.target_v4}/"
        assert {await get(client, url) for _ in range(4)} == {"198.18.1.2", "198.18.2.2"}
        lab.near.ip("link set n1 down", "addr flush dev n1")
        witness.packets()
        assert {await get(client, url) for _ in range(4)} == {"198.18.2.2"}
        assert {packet.nic for packet in witness.packets() if packet.syn} == {"n2"}


# --- the only source, while a request looks up its name -------------------------------------------------------


class Held(Names):
    """It answers when it is let go."""

    def __init__(self, **hosts: list[str]) -> None:
        super().__init__(**hosts)
        self.go = asyncio.Event()

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> Any:
        answer = await super().resolve(host, port, family)
        await self.go.wait()
        return answer


async def test_a_request_is_not_refused_because_of_what_another_one_has_met_with(lab: Lab) -> None:
    names = Held(slow_test=[lab.target_v4])
    async with far_servers(lab), session("198.18.1.9", resolver=names) as client:
        slow = asyncio.ensure_future(get(client, "http://slow.test/"))
        await until(lambda: names.asked)
        error = await failure(client, f"http://{lab.target_v4}/")
        assert isinstance(error, aiohttp.ClientConnectorError)
        assert error.errno == errno.EADDRNOTAVAIL  # from now on it is suspended
        assert connector_of(client).stats()[0].suspended_until is not None
        lab.near.ip("addr add 198.18.1.9/24 dev n1")
        names.go.set()
        assert await slow == "198.18.1.9"
        assert connector_of(client).stats()[0].suspended_until is None


async def test_the_only_source_is_exchanged_while_a_request_looks_up_its_name(server: Server) -> None:
    names = Held(slow_test=[HERE])
    async with session(A, resolver=names) as client:
        assert await get(client, server.url()) == A
        slow = asyncio.ensure_future(get(client, server.url(host="slow.test")))
        await until(lambda: names.asked)
        connector_of(client).add(B)
        connector_of(client).remove(A, drain=False)
        names.go.set()
        assert await slow == B
