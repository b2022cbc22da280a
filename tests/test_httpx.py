"""BoundTransport and BoundBackend: httpx and httpx2, on asyncio, uvloop and trio, judged by the far side."""

from __future__ import annotations

import contextlib
import errno
import gc
import inspect
import os
import socket
import ssl
import subprocess
import sys
import threading
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiolimiter  # noqa: F401 - it reads a file when it is imported
import anyio
import h11
import httpcore
import httpcore2
import httpx
import httpx2
import pytest
import servers
import trustme
from anyio.abc import SocketListener
from anyio.streams.tls import TLSListener
from dns_server import DnsServer
from with_trio import BACKENDS, anyio_backend, no_tasks_left_in_trio, until  # noqa: F401 - fixtures

import aiobind
from aiobind import BindError, ConnectError, ResolveError, _httpcore, _sockets, bound_source
from aiobind import httpx as edge
from aiobind.httpx import BoundBackend, BoundTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from aiobind.lab import Lab, Packet, Witness

pytestmark = pytest.mark.anyio

A, B, C = "127.0.0.2", "127.0.0.3", "127.0.0.4"
OUTSIDE = "127.0.0.9"
HERE = "127.0.0.1"
MISSING = "if!missing0"
V4, V6 = "203.0.113.80", "2001:db8:ffff::80"

ONE_LOOP = pytest.mark.parametrize("anyio_backend", [BACKENDS["asyncio"]], ids=["asyncio"])
CORES = {httpx: httpcore, httpx2: httpcore2}


@pytest.fixture(params=CORES, ids=lambda module: module.__name__)
def web(request: pytest.FixtureRequest) -> Any:
    """The client: httpx or httpx2."""
    return request.param


# --- the other side -----------------------------------------------------------------------------------------


class Server:
    """A real HTTP/1.1 server (h11). It answers with the address of its client, and remembers it."""

    def __init__(self, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self.peers: list[tuple[str, int]] = []
        self.bodies: list[bytes] = []
        self.begun = anyio.Event()  # a request has come
        self.go = anyio.Event()  # what ``/hold`` and ``/half`` wait for
        self.open: set[Any] = set()

    @property
    def sources(self) -> list[str]:
        return [host for host, _ in self.peers]

    def url(self, path: str = "/", host: str = HERE, scheme: str = "http") -> str:
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}{path}"

    async def serve(self, stream: Any) -> None:
        self.open.add(stream)
        try:
            with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, h11.RemoteProtocolError):
                async with stream:
                    await self._speak(stream, h11.Connection(h11.SERVER))
        finally:
            self.open.discard(stream)

    async def _speak(self, stream: Any, http: h11.Connection) -> None:
        body, request = b"", None
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await receive(stream))
            elif isinstance(event, h11.Request):
                request, body = event, b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert request is not None
                self.bodies.append(body)
                await self._answer(stream, http, request.target.decode())
                if http.our_state is not h11.DONE:
                    return
                http.start_next_cycle()
            else:
                return

    async def _answer(self, stream: Any, http: h11.Connection, path: str) -> None:
        peer = stream.extra(anyio.abc.SocketAttribute.remote_address)[:2]
        self.peers.append(peer)
        self.begun.set()
        text, status, headers = peer[0].encode(), 200, []
        match path.split("/")[1:]:
            case ["hold"]:
                await self.go.wait()
            case ["status", code]:
                status = int(code)
            case ["redirect"]:
                status, headers = 302, [("Location", "/")]
            case ["close"]:
                headers = [("Connection", "close")]
            case ["then-close"]:
                pass
            case _:
                pass
        headers.append(("Content-Length", str(len(text))))
        await stream.send(http.send(h11.Response(status_code=status, headers=headers)))
        if path == "/half":
            await stream.send(http.send(h11.Data(data=text[:3])))
            await self.go.wait()
            text = text[3:]
        await stream.send(http.send(h11.Data(data=text)) + (http.send(h11.EndOfMessage()) or b""))
        if path == "/then-close":
            await stream.aclose()


async def receive(stream: Any) -> bytes:
    try:
        return await stream.receive()
    except anyio.EndOfStream:
        return b""


@contextlib.asynccontextmanager
async def serving(
    *, lab: Lab | None = None, tls: ssl.SSLContext | None = None, serve: Callable[[Any], Awaitable[None]] | None = None
) -> AsyncIterator[Server]:
    """Serve on a port of 127.0.0.1, or on port 80 of the far side of *lab*."""
    if lab is None:
        sockets = [socket.create_server((HERE, 0), backlog=100)]
    else:
        with lab.far:
            sockets = [socket.create_server(("", 80), family=family) for family in (socket.AF_INET, socket.AF_INET6)]
    listeners: list[Any] = [await SocketListener.from_socket(sock) for sock in sockets]
    if tls is not None:
        listeners = [TLSListener(listener, tls, standard_compatible=False) for listener in listeners]
    server = Server(sockets[0])
    try:
        async with anyio.create_task_group() as tasks:
            for listener in listeners:
                tasks.start_soon(listener.serve, serve or server.serve)
            yield server
            tasks.cancel_scope.cancel()
    finally:
        for sock in sockets:
            sock.close()


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """Yield a port that answers no SYN: its queue is full."""
    with socket.socket() as listener, socket.socket() as filler:
        listener.bind((HERE, 0))
        listener.listen(0)
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def refusing() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind((HERE, 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="session")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of a server named good.test, and of its clients."""
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("good.test", HERE, V4).configure_cert(ours)
    authority.configure_trust(theirs)
    return ours, theirs


# --- this side ----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def client(web: Any, *sources: str, timeout: Any = 10, **options: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Yield an AsyncClient, and its transport; when it ends nothing may be left open."""
    options.setdefault("verify", ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    transport = BoundTransport(*sources, **options)
    async with web.AsyncClient(transport=transport, timeout=timeout) as session:
        yield session, transport
    assert {figures.connections for figures in transport.stats()} == {0}
    assert {origin.held for origin in transport._dialer.roster.listed} == {0}
    assert {origin.connecting for origin in transport._dialer.roster.listed} == {0}
    transport._dialer.limits._settle()
    assert transport._dialer.limits._held == {}


def figures(transport: BoundTransport) -> dict[str, tuple[int, int, int]]:
    """Return for each source how many connections there are, how many in use, and how many idle."""
    return {str(stats.source): (stats.connections, stats.in_use, stats.idle) for stats in transport.stats()}


async def failure(awaitable: Awaitable[Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - whatever it is, the caller compares it
        await awaitable
    caught.value.__traceback__ = None
    return caught.value


async def together(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    results: dict[int, Any] = {}

    async def one(number: int, call: Callable[[], Awaitable[Any]]) -> None:
        results[number] = await call()

    async with anyio.create_task_group() as tasks:
        for number, call in enumerate(calls):
            tasks.start_soon(one, number, call)
    return [results[number] for number in sorted(results)]


# --- the source, on the wire --------------------------------------------------------------------------------


def flows(packets: list[Packet]) -> set[tuple[str, str]]:
    """Return by which NIC packets came from where; what the far side has said to itself does not count."""
    return {(packet.nic, packet.source) for packet in packets if packet.nic != "lo"}


@pytest.mark.parametrize(
    ("source", "target", "nic", "address", "interface"),
    [
        ("if!n1", V4, "n1", "198.18.1.2", "n1"),
        ("if!n2", V6, "n2", "2001:db8:2::2", "n2"),
        ("if!n1", "far.test", "n1", "2001:db8:1::2", "n1"),
        ("ifhost!n2!198.18.2.2", "far.test", "n2", "198.18.2.2", "n2"),
        ("198.18.1.2", V4, "n0", "198.18.1.2", None),
    ],
)
async def test_source_and_egress(
    lab: Lab,
    witness: Witness,
    resolv_conf: Callable[..., None],
    web: Any,
    source: str,
    target: str,
    nic: str,
    address: str,
    interface: str | None,
) -> None:
    resolv_conf("", hosts=f"{V6} far.test\n{V4} far.test\n")
    async with serving(lab=lab) as server, client(web, source) as (session, transport):
        for _ in range(2):
            response = await session.get(server.url(host=target))
            assert response.text == address
            bound = bound_source(response)
            assert (str(bound.source), *bound[1:3]) == (source, interface, address)
            assert (address, bound.port) == response.extensions["network_stream"].get_extra_info("client_addr")
        assert len(set(server.peers)) == 1
        assert figures(transport) == {source: (1, 0, 1)}
    assert flows(witness.packets()) == {(nic, address)}


async def test_the_zone_of_a_link_local_address(lab: Lab, witness: Witness, web: Any) -> None:
    nic = lab.nic("n1")
    async with serving(lab=lab) as server, client(web, "if!n1") as (session, _):
        response = await session.get(server.url(host=f"{nic.gateway_link_local}%25n1"))
        assert response.text.partition("%")[0] == nic.link_local
    assert flows(witness.packets()) == {("n1", nic.link_local)}


async def test_the_device_is_set_before_the_syn_and_options_as_well(lab: Lab, witness: Witness, web: Any) -> None:
    """TCP_MAXSEG is in the SYN or nowhere."""
    mss = (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 800)
    async with serving(lab=lab) as server, client(web, "if!n1", socket_options=[mss]) as (session, _):
        response = await session.get(server.url(host=V4))
        sock = response.extensions["network_stream"].get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= 800
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"n1"
    assert flows(witness.packets()) == {("n1", "198.18.1.2")}


@pytest.fixture
def dns(lab: Lab, resolv_conf: Callable[..., None]) -> Iterator[DnsServer]:
    with DnsServer(V4, namespace=lab.far) as dns:
        resolv_conf(f"nameserver {V4}\n")
        yield dns


async def test_names_are_asked_for_through_the_source(lab: Lab, dns: DnsServer, witness: Witness, web: Any) -> None:
    dns.add("far.test", V4)
    async with serving(lab=lab) as server, client(web, "if!n2", dns="source") as (session, _):
        assert (await session.get(server.url(host="far.test"))).text == "198.18.2.2"
    assert flows(witness.packets()) == {("n2", "198.18.2.2")}
    assert dns.queries["far.test", "A"] == 1


# --- the pools ----------------------------------------------------------------------------------------------


async def test_a_keep_alive_connection_belongs_to_its_source(web: Any) -> None:
    async with serving() as server, client(web, A, B, C) as (session, transport):
        for _ in range(12):
            await session.get(server.url())
        assert server.sources == [A, B, C] * 4
        assert len(set(server.peers)) == 3
        assert figures(transport) == dict.fromkeys((A, B, C), (1, 0, 1))


async def test_a_pinned_request_goes_by_its_source_alone(web: Any) -> None:
    async with serving() as server, client(web, A, B) as (session, transport):
        pin = {"source": OUTSIDE}
        with transport.use_source(C), aiobind.use_source(B):
            for extensions, source in ((pin, OUTSIDE), ({}, C), ({"source": aiobind.Address(A)}, A)):
                response = await session.get(server.url(), extensions=extensions)
                assert response.text == source
        with aiobind.use_source(B):
            assert [(await session.get(server.url())).text for _ in range(3)] == [B] * 3
            error = await failure(session.get(server.url(), extensions={"source": MISSING}))
        assert isinstance(error, web.ConnectError)  # though there are others that work
        assert isinstance(error.__cause__, BindError)
        assert [(await session.get(server.url())).text for _ in range(2)] == [A, B]  # nobody has moved
        response = await session.get(server.url("/redirect"), extensions=pin, follow_redirects=True)
        assert (response.text, len(response.history)) == (OUTSIDE, 1)
        for each in (response, *response.history):
            assert bound_source(each).address == OUTSIDE
        with pytest.raises(aiobind.InvalidSource, match="eth0"):
            await session.get(server.url(), extensions={"source": "eth0"})


async def test_a_source_is_let_go_when_it_has_been_idle(web: Any) -> None:
    limits = web.Limits(keepalive_expiry=30)
    async with serving() as server, client(web, A, limits=limits) as (session, transport):
        for number in range(5):
            await session.get(server.url(), extensions={"source": f"127.0.1.{number}"})
        assert [str(stats.source) for stats in transport.stats()][1:] == [f"127.0.1.{number}" for number in range(5)]
        assert transport._kept == 30
        transport._kept = 0  # as if that time were over
        await session.get(server.url())
        await until(lambda: figures(transport) == {A: (1, 0, 1)})
        assert (len(transport._pools), transport._retired) == (1, set())
        gc.collect()
        assert not [*transport._dialer.roster._guests]


async def test_httpx_limits_are_for_each_source(web: Any) -> None:
    timeout = web.Timeout(10, pool=0.05)
    limits = web.Limits(max_connections=1)
    async with serving() as server, client(web, A, B, limits=limits, timeout=timeout) as (session, transport):
        async with session.stream("GET", server.url()), session.stream("GET", server.url()):
            assert figures(transport) == {A: (1, 1, 0), B: (1, 1, 0)}
            error = await failure(session.get(server.url()))
            assert type(error) is web.PoolTimeout
        assert figures(transport) == {A: (0, 0, 0), B: (0, 0, 0)}  # for nobody has read to the end
        assert transport._dialer.roster.listed[0].held == 0


async def test_limits_of_a_source(web: Any) -> None:
    async with (
        serving() as server,
        client(web, A, B, limit_per_source=1, timeout=web.Timeout(10, pool=0.05)) as (session, _),
    ):
        async with session.stream("GET", server.url()), session.stream("GET", server.url()) as second:
            error = await failure(session.get(server.url()))
            assert type(error) is web.PoolTimeout
            assert str(error) == f"no source has room for a request to {HERE} within 0.05 s"
            await second.aread()  # its place is free
            assert (await session.get(server.url())).text == B
        # However a request ends.
        for path, ends in (("/hold", 0.02), ("/half", 0.02)):
            for _ in range(3):
                with anyio.move_on_after(ends):
                    await session.get(server.url(path))
        for _ in range(3):
            await failure(session.get(f"http://{HERE}:{refusing()}/"))
        forgotten = [await session.send(session.build_request("GET", server.url()), stream=True) for _ in range(2)]
        assert [response.status_code for response in forgotten] == [200, 200]
        for response in forgotten:
            await response.aclose()
        assert sorted([(await session.get(server.url())).text for _ in range(2)]) == [A, B]


async def test_a_place_is_given_back_with_a_forgotten_response(web: Any) -> None:
    async with serving() as server:
        transport = BoundTransport(A, limit_per_source=1, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        request = web.Request("GET", server.url())
        response = await transport.handle_async_request(request)
        assert transport._dialer.roster.listed[0].held == 1
        del response
        gc.collect()
        assert transport._dialer.roster.listed[0].held == 0
        with anyio.fail_after(5):
            response = await transport.handle_async_request(request)
        await response.aread()
        await response.aclose()
        await transport.aclose()


async def test_the_rate_of_a_source(web: Any) -> None:
    async with (
        serving() as server,
        client(web, A, rate_per_source=1, timeout=web.Timeout(10, pool=0.05)) as (session, _),
    ):
        assert (await session.get(server.url("/close"))).text == A
        error = await failure(session.get(server.url()))
        assert type(error) is web.PoolTimeout
        assert str(error) == f"{A} may begin no connection to {HERE} within 0.05 s (its rate)"


async def test_idle_connections_of_a_removed_source_are_closed_at_once(web: Any) -> None:
    async with serving() as server, client(web, A, B) as (session, transport):
        for _ in range(2):
            await session.get(server.url())
        transport.remove(A)
        await until(lambda: figures(transport) == {B: (1, 0, 1)})
        assert (await session.get(server.url())).text == B
        transport.add(A)
        assert sorted([(await session.get(server.url())).text for _ in range(2)]) == [A, B]
        # One in use does what it is doing, and is closed with that.
        transport.remove(B)
        async with session.stream("GET", server.url("/half"), extensions={"source": B}) as response:
            transport.add(B)
            transport.remove(B)
            assert figures(transport)[B] == (1, 1, 0)
            server.go.set()
            assert await response.aread() == B.encode()
        await until(lambda: B not in figures(transport))


@pytest.mark.parametrize("how", ["by RST", "where a sandbox forbids that"])
async def test_to_remove_without_draining_cuts(web: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how != "by RST":  # then it is a shutdown, after which there is nothing to read: as at the end of many a body
        monkeypatch.setattr(_sockets.platform, "abort", lambda sock: sock.shutdown(socket.SHUT_RDWR))
    async with serving() as server, client(web, A, B) as (session, transport):
        async with session.stream("GET", server.url("/half")) as response:
            transport.remove(A, drain=False)
            error = await failure(response.aread())
            assert {origin.held for origin in transport._dialer.roster._guests.values()} == {0}  # closed or not
        assert type(error) is web.ReadError
        assert isinstance(error.__cause__, BindError)
        assert (await session.get(server.url())).text == B
        await until(lambda: figures(transport) == {B: (1, 0, 1)})


@pytest.mark.parametrize("idle", [False, True], ids=["a new connection", "an idle one"])
async def test_what_was_sent_is_sent_by_nobody_else(web: Any, *, idle: bool) -> None:
    """Though it was the source that has failed, and there is another one."""
    errors: list[BaseException] = []
    async with serving() as server, client(web, A, B, policy=aiobind.Failover()) as (session, transport):

        async def ask() -> None:
            errors.append(await failure(session.post(server.url("/hold"), content=b"once")))

        if idle:
            assert (await session.get(server.url())).text == A
            server.begun = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await server.begun.wait()
            transport.remove(A, drain=False)
        assert type(errors[0]) is web.ReadError
        assert isinstance(errors[0].__cause__, BindError)
        assert set(server.peers) == {server.peers[0]}
        assert server.bodies[-1] == b"once"


async def test_a_connection_that_the_server_closes_is_not_used_again(web: Any) -> None:
    async with serving() as server, client(web, A) as (session, transport):
        for path in ("/then-close", "/close", "/then-close", "/"):
            assert (await session.get(server.url(path))).text == A
            await anyio.sleep(0.01)
        assert len(set(server.peers)) == 4
        assert figures(transport) == {A: (1, 0, 1)}


@pytest.mark.parametrize("abort", [False, True], ids=["left alone", "abort_on_link_down"])
async def test_connections_whose_link_goes(lab: Lab, web: Any, *, abort: bool) -> None:
    async with (
        serving(lab=lab) as server,
        client(web, "if!n1", "if!n2", abort_on_link_down=abort) as (session, transport),
    ):
        for _ in range(2):
            await session.get(server.url(host=V4))
        async with session.stream("GET", server.url("/half", V4)) as response:
            await until(lambda: figures(transport) == {"if!n1": (1, 1, 0), "if!n2": (1, 0, 1)})
            # One more, which lies idle.
            await session.get(server.url(host=V4), extensions={"source": "if!n1"})
            assert figures(transport)["if!n1"] == (2, 1, 1)
            lab.near.ip("link set n1 down")
            await until(lambda: figures(transport)["if!n1"][2] == 0)
            if abort:
                error = await failure(response.aread())
                assert type(error) is web.ReadError
                assert isinstance(error.__cause__, BindError)
                assert error.__cause__.errno == errno.ENETDOWN
                gone = "its interface or address has gone since it connected"
                assert str(error) == f"[Errno {errno.ENETDOWN}] connect from if!n1 to {V4}:80: {gone}"
            else:
                assert figures(transport)["if!n1"] == (1, 1, 0)
        assert [(await session.get(server.url(host=V4))).text for _ in range(2)] == ["198.18.2.2"] * 2
        await until(lambda: figures(transport)["if!n1"] == (0, 0, 0))


# --- errors -------------------------------------------------------------------------------------------------


async def test_errors_are_the_clients_own_with_ours_as_cause(web: Any, resolv_conf: Callable[..., None]) -> None:
    resolv_conf("nameserver 127.0.0.1\noptions attempts:1 timeout:1\n")
    with silent() as dumb:
        refused = refusing()
        rows: list[tuple[list[str], str, str, type[OSError], int, str]] = [
            ([MISSING], f"{HERE}:{refused}", "ConnectError", BindError, errno.ENODEV, "no interface named 'missing0'"),
            (["192.0.2.7"], f"{HERE}:{refused}", "ConnectError", BindError, errno.EADDRNOTAVAIL, "192.0.2.7"),
            ([A], f"{HERE}:{refused}", "ConnectError", ConnectError, errno.ECONNREFUSED, "connection refused"),
            ([A], f"{HERE}:{dumb}", "ConnectTimeout", ConnectError, errno.ETIMEDOUT, "no connection within 0.05 s"),
            ([A, B], f"{HERE}:{dumb}", "ConnectTimeout", ConnectError, errno.ETIMEDOUT, "no connection within 0.05 s"),
            ([A], "nobody.invalid:80", "ConnectError", ResolveError, 0, "name cannot be resolved"),
            ([A], "[2001:db8::1]:80", "ConnectError", BindError, errno.EADDRNOTAVAIL, A),
            (["host!no.invalid"], f"{HERE}:{refused}", "ConnectError", ResolveError, 0, "no.invalid"),
            ([MISSING, "if!missing1"], f"{HERE}:{refused}", "ConnectError", BindError, errno.ENODEV, "missing1"),
            ([MISSING, A], f"{HERE}:{refused}", "ConnectError", ConnectError, errno.ENODEV, "connection refused"),
        ]
        for sources, place, name, cause, number, words in rows:
            async with client(web, *sources, timeout=web.Timeout(10, connect=0.05 if "no con" in words else 10)) as (
                session,
                transport,
            ):
                error = await failure(session.get(f"http://{place}/"))
                assert type(error) is getattr(web, name), (sources, place, error)
                assert isinstance(error.__cause__, cause), (sources, place, error.__cause__)
                assert isinstance(error.__cause__, aiobind.AiobindError)
                assert number in (0, error.__cause__.errno)
                assert str(error) == str(error.__cause__)
                tried = sources if name != "ConnectTimeout" else sources[:1]
                for part in (words, place, *(tried if "nobody" not in place else ())):
                    assert part in str(error)
                assert error.__cause__.destination == place
                assert error.request.url.host in place  # type: ignore[attr-defined]
                assert not any(stats.connections or stats.in_use for stats in transport.stats())
                if name == "ConnectTimeout":  # whose fault it is nobody knows
                    assert B not in str(error)


@ONE_LOOP
async def test_a_timeout_of_the_systems_own() -> None:
    """As httpx has it: one of TCP's is a ConnectTimeout as well. It comes with the first SYN that is repeated."""
    impatient = (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10)
    with silent() as dumb:
        async with client(httpx, A, socket_options=[impatient], timeout=None) as (session, _):
            error = await failure(session.get(f"http://{HERE}:{dumb}/"))
    assert type(error) is httpx.ConnectTimeout
    assert isinstance(error.__cause__, ConnectError)
    assert error.__cause__.errno == errno.ETIMEDOUT


async def test_other_timeouts_are_the_clients_own(web: Any) -> None:
    async with serving() as server, client(web, A, timeout=web.Timeout(5, read=0.05)) as (session, transport):
        for path in ("/hold", "/half"):
            assert type(await failure(session.get(server.url(path)))) is web.ReadTimeout
        assert figures(transport) == {A: (0, 0, 0)}
        await session.get(server.url())
        async with session.stream("GET", server.url("/half")) as response:
            for stream in [*server.open]:
                stream.extra(anyio.abc.SocketAttribute.raw_socket).setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                )
                await anyio.aclose_forcefully(stream)
            error = await failure(response.aread())
        assert type(error) in (web.ReadError, web.RemoteProtocolError)


async def test_a_link_that_goes_in_the_very_moment_of_the_connect(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream_of, lost = _httpcore.stream_of, []

    def losing(sock: Any) -> Any:
        if not lost:
            lost.append(sock)
            sock.lost = True
        return stream_of(sock)

    monkeypatch.setattr(_httpcore, "stream_of", losing)
    async with serving() as server, client(web, A, B) as (session, transport):
        assert (await session.get(server.url())).text == B
        assert lost[0].fileno() == -1
        assert figures(transport) == {A: (0, 0, 0), B: (1, 0, 1)}


async def test_the_next_source_when_one_has_failed_for_a_reason_of_its_own(web: Any) -> None:
    begun = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal begun
        begun += 1
        yield b"once "
        yield b"only"

    async with serving() as server, client(web, MISSING, "if!missing1", A) as (session, transport):
        response = await session.post(server.url(), content=body())
        assert response.text == A
        assert (begun, server.bodies) == (1, [b"once only"])
        assert [stats.failures for stats in transport.stats()] == [{"ENODEV": 1}, {"ENODEV": 1}, {}]
        # What the destination answers is nobody's fault.
        error = await failure(session.get(f"http://{HERE}:{refusing()}/"))
        assert isinstance(error.__cause__, ConnectError)


async def test_a_source_that_is_banned_at_a_host_is_passed_over(web: Any) -> None:
    async with serving() as server, client(web, A, B) as (session, transport):
        transport.report(A, host=HERE)
        assert [(await session.get(server.url())).text for _ in range(3)] == [B] * 3
        assert transport._place("straße.example") == web.URL("http://straße.example").raw_host.decode()


async def test_a_policy_that_names_no_source(web: Any) -> None:
    class Nobody:
        def order(self, sources: Any, host: str) -> Any:
            return ()

    async with client(web, A, policy=Nobody()) as (session, _):
        with pytest.raises(RuntimeError, match=r"the policy named no source for 127\.0\.0\.1"):
            await session.get(f"http://{HERE}/")


# --- TLS and HTTP/2 -----------------------------------------------------------------------------------------


async def test_tls(web: Any, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async with serving(tls=tls[0]) as server, client(web, A, B, verify=tls[1]) as (session, transport):
        for source in (A, B, A):
            response = await session.get(server.url(scheme="https"))
            assert response.text == source
            assert bound_source(response).address == source
            assert response.extensions["network_stream"].get_extra_info("ssl_object").version() == "TLSv1.3"
        assert figures(transport) == {A: (1, 0, 1), B: (1, 0, 1)}
        error = await failure(
            session.get(server.url(scheme="https", host="127.0.0.8").replace("127.0.0.8", "localhost"))
        )
        assert isinstance(error, web.ConnectError)


async def test_tls_that_fails(web: Any, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async with (
        serving(tls=tls[0]) as server,
        client(web, A, B, verify=ssl.create_default_context()) as (session, bound),
    ):
        error = await failure(session.get(server.url(scheme="https")))
        assert type(error) is web.ConnectError
        assert "certificate verify failed" in str(error)
        assert figures(bound) == {A: (0, 0, 0), B: (0, 0, 0)}
        assert bound.stats()[1].connects == 0  # that is no fault of the source


async def test_tls_that_is_not_answered(web: Any) -> None:
    async def say_nothing(stream: Any) -> None:
        async with stream:
            await anyio.sleep_forever()

    async with serving(serve=say_nothing) as server, client(web, A, timeout=0.1) as (session, transport):
        assert type(await failure(session.get(server.url(scheme="https")))) is web.ConnectTimeout
        assert figures(transport) == {A: (0, 0, 0)}


async def test_one_ssl_context_for_all_sources(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ssl.SSLContext] = []
    create = web.create_ssl_context

    def counted(**keywords: Any) -> ssl.SSLContext:
        assert threading.current_thread() is not threading.main_thread()  # it reads files
        made.append(create(**keywords))
        return made[-1]

    monkeypatch.setattr(web, "create_ssl_context", counted)
    async with serving() as server, client(web, A, B, verify=True) as (session, transport):
        for _ in range(4):
            await session.get(server.url())
        assert len(made) == 1
        assert {pool.transport._pool._ssl_context for pool in transport._pools.values()} == {*made}


@pytest.fixture
def far_https(lab: Lab, tmp_path: Path) -> Iterator[ssl.SSLContext]:
    """nginx with HTTP/2 on port 443 of the far side; the value is the context of its clients."""
    context = ssl.create_default_context()
    servers.CA.configure_trust(context)
    with servers.nginx_tls(lab, tmp_path):
        yield context


async def test_http2(lab: Lab, witness: Witness, far_https: ssl.SSLContext, web: Any) -> None:
    witness.packets()
    async with client(web, "if!n1", "if!n2", verify=far_https, http2=True) as (session, transport):
        for _ in range(2):
            await session.get(f"https://{V4}/")
        responses = await together(*[partial(session.get, f"https://{V4}/")] * 20)
        assert {response.http_version for response in responses} == {"HTTP/2"}
        assert Counter(response.text for response in responses) == {"198.18.1.2": 10, "198.18.2.2": 10}
        assert len({bound_source(response).port for response in responses}) == 2  # one connection of each
        assert figures(transport) == {"if!n1": (1, 0, 1), "if!n2": (1, 0, 1)}
        for response in responses:
            assert bound_source(response).address == response.text
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(session.stream("GET", f"https://{V4}/"))
            assert figures(transport) == {"if!n1": (1, 1, 0), "if!n2": (1, 1, 0)}
        # httpcore would use the idle connection again, for it looks at no HTTP/2 socket.
        lab.near.ip("link set n1 down")
        await until(lambda: figures(transport)["if!n1"] == (0, 0, 0))
        assert [(await session.get(f"https://{V4}/")).text for _ in range(2)] == ["198.18.2.2"] * 2
    assert flows(witness.packets()) == {("n1", "198.18.1.2"), ("n2", "198.18.2.2")}


# --- proxies ------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path) -> Iterator[str]:
    """A proxy on the far side; the value is its URL, "" for none."""
    name = getattr(request, "param", "")
    folder = tmp_path / f"proxy {name}"
    folder.mkdir()
    (folder / "conf").write_text("Port 8888\nTimeout 30\nMaxClients 20\nConnectPort 443\nLogLevel Critical\n")
    match name:
        case "tinyproxy":
            command, port, url = ["-d", "-c", "conf"], 8888, f"http://{V4}:8888"
        case "microsocks":
            command, port, url = ["-p", "1080"], 1080, f"socks5://{V4}:1080"
        case _:
            yield ""
            return
    with servers.run(lab, folder, [servers.program(name, name), *command], port):
        yield url


@pytest.mark.parametrize("proxy", ["tinyproxy", "microsocks"], indirect=True)
async def test_proxies(lab: Lab, witness: Witness, far_https: ssl.SSLContext, proxy: str, web: Any) -> None:
    witness.packets()
    async with (
        serving(lab=lab) as server,
        client(web, MISSING, "if!n1", proxy=proxy, verify=far_https) as (session, transport),
    ):
        for url in (server.url(host=V4), f"https://{V4}/"):
            for _ in range(2):
                response = await session.get(url)
                assert response.text == V4  # the proxy's
                assert bound_source(response)[1:3] == ("n1", "198.18.1.2")
                assert not response.extensions["network_stream"].get_extra_info("socket").unfinished
        idle = 1 if "8888" in proxy else 2  # tinyproxy keeps no connection alive but tunnels
        assert figures(transport) == {MISSING: (0, 0, 0), "if!n1": (idle, 0, idle)}
        error = await failure(session.get(f"https://{V4}:1/"))
        assert type(error) is web.ProxyError
        await until(lambda: figures(transport)["if!n1"] == (idle, 0, idle))
        packets = witness.packets()
    assert flows(packets) == {("n1", "198.18.1.2")}
    assert {packet.dport for packet in packets if packet.nic != "lo"} == {int(proxy.rpartition(":")[2])}


@pytest.mark.parametrize("proxy", ["tinyproxy"], indirect=True)
async def test_tls_that_fails_in_a_tunnel_takes_no_place(far_https: ssl.SSLContext, proxy: str, web: Any) -> None:
    """httpcore takes the connection for used for ever after (1.0.9)."""
    async with client(
        web,
        "if!n1",
        proxy=proxy,
        verify=ssl.create_default_context(),
        limits=web.Limits(max_connections=1),
        timeout=web.Timeout(10, pool=0.5),
    ) as (session, transport):
        for _ in range(2):
            assert "certificate verify failed" in str(await failure(session.get(f"https://{V4}/")))
        assert figures(transport) == {"if!n1": (0, 0, 0)}


async def test_a_proxy_that_cannot_be_reached(web: Any) -> None:
    for scheme in ("http", "socks5"):
        for url in ("http://far.test/", "https://far.test/"):
            port = refusing()
            async with client(web, A, proxy=f"{scheme}://{HERE}:{port}") as (session, transport):
                error = await failure(session.get(url))
                assert type(error) is web.ConnectError
                assert str(error) == f"[Errno 111] connect from {A} to {HERE}:{port}: connection refused"
                assert figures(transport) == {A: (0, 0, 0)}


async def test_a_source_short_of_ports_towards_the_proxy_is_passed_over(web: Any) -> None:
    async with serving() as server, client(web, A, B, proxy=server.url()) as (session, transport):
        origin = transport._dialer.roster.listed[0]
        transport._dialer.roster.shun(origin, f"{HERE}:{server.port}", OSError(errno.EADDRNOTAVAIL, "no port is left"))
        assert [(await session.get("http://far.test/")).text for _ in range(2)] == [B, B]


@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_who_is_cancelled_amid_a_proxys_answer_leaves_nothing(web: Any, scheme: str) -> None:
    asked = anyio.Event()

    async def say_nothing(stream: Any) -> None:
        async with stream:
            await receive(stream)
            asked.set()
            await anyio.sleep_forever()

    async with (
        serving(serve=say_nothing) as server,
        client(web, A, proxy=server.url(scheme=scheme)) as (session, transport),
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(session.get, "https://far.test/")
        await asked.wait()
        assert figures(transport) == {A: (1, 1, 0)}
        tasks.cancel_scope.cancel()
    assert figures(transport) == {A: (0, 0, 0)}


@pytest.mark.parametrize("amid", ["TLS", "http", "socks5"])
async def test_a_link_that_goes_amid_tls_or_a_proxys_answer(lab: Lab, web: Any, amid: str) -> None:
    """The request fails at once, though nobody has asked to cut connections; another source is not tried."""
    asked = anyio.Event()

    async def say_nothing(stream: Any) -> None:
        async with stream:
            await receive(stream)
            asked.set()
            await anyio.sleep_forever()

    async with (
        serving(serve=say_nothing, lab=lab) as server,
        client(
            web, "if!n1", "if!n2", timeout=None, proxy=None if amid == "TLS" else server.url(scheme=amid, host=V4)
        ) as (session, transport),
        anyio.create_task_group() as tasks,
    ):
        errors: list[BaseException] = []

        async def ask() -> None:
            errors.append(await failure(session.get(server.url(host=V4, scheme="https"))))

        tasks.start_soon(ask)
        await asked.wait()
        lab.near.ip("link set n1 down")
        await until(lambda: errors)
        (error,) = errors
        assert type(error) is (web.ConnectError if amid == "TLS" else web.ReadError)
        assert isinstance(error.__cause__, BindError)
        assert error.__cause__.errno == errno.ENETDOWN
        assert str(error) == str(error.__cause__)
        assert "connect from if!n1 to" in str(error)
        assert [stats.connects for stats in transport.stats()] == [1, 0]
        assert {numbers[0] for numbers in figures(transport).values()} == {0}


async def test_a_proxy_of_the_client_goes_round_the_transport(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As documented: httpx mounts another transport for it. Of the environment's it takes no notice, beside ours."""
    async with serving() as server:
        transport = BoundTransport(A)
        async with web.AsyncClient(transport=transport, proxy=server.url()) as session:
            assert (await session.get("http://far.test/")).text == HERE  # and not A
        monkeypatch.setenv("HTTP_PROXY", f"http://{HERE}:{refusing()}")
        async with client(web, A) as (session, _):
            assert (await session.get(server.url())).text == A


# --- cancellation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["connect", "place", "rate", "headers", "body", "TLS", "httpx's pool"])
async def test_who_is_cancelled_leaves_nothing(web: Any, at: str) -> None:
    options: dict[str, Any] = {"limit_per_source": 1, "limits": web.Limits(max_connections=1)}
    if at == "httpx's pool":
        options["limit_per_source"] = 0
    if at == "rate":
        options = {"rate_per_source": 0.01}

    async def say_nothing(stream: Any) -> None:
        async with stream:
            await anyio.sleep_forever()

    async with (
        serving(serve=say_nothing if at == "TLS" else None) as server,
        client(web, A, timeout=None, **options) as (session, transport),
    ):
        with silent() as dumb:
            url = {
                "connect": f"http://{HERE}:{dumb}/",
                "headers": server.url("/hold"),
                "body": server.url("/half"),
            }.get(at, server.url(scheme="https" if at == "TLS" else "http"))
            async with contextlib.AsyncExitStack() as stack:
                if at in ("place", "httpx's pool"):
                    await stack.enter_async_context(session.stream("GET", server.url()))
                if at == "rate":
                    await session.get(server.url("/close"))
                for _ in range(2):
                    with anyio.move_on_after(0.02) as scope:
                        await session.get(url)
                    assert scope.cancelled_caught
            await until(lambda: transport.stats()[0].in_use == 0)
            origin = transport._dialer.roster.listed[0]
            assert (origin.held, origin.connecting) == (0, 0)
        if at not in ("TLS", "rate"):
            assert (await session.get(server.url())).text == A


async def test_requests_that_come_and_go_at_random(web: Any) -> None:
    async with serving() as server, client(web, A, B, C, limit_per_source=2, timeout=None) as (session, transport):

        async def one(number: int) -> None:
            with anyio.move_on_after(0.0005 * (number % 17)):
                await session.get(server.url("/" if number % 3 else "/close"))

        for _ in range(4):
            await together(*(partial(one, number) for number in range(40)))
        await until(lambda: all(in_use == 0 for _, in_use, _ in figures(transport).values()))
        assert {origin.held for origin in transport._dialer.roster.listed} == {0}
        with anyio.fail_after(5):
            responses = await together(*[partial(session.get, server.url())] * 12)
        assert {response.text for response in responses} == {A, B, C}


# --- use and misuse -----------------------------------------------------------------------------------------


async def test_wrong_use(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for keyword in ("local_address", "uds"):  # what would go round the source
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            BoundTransport(A, **{keyword: "x"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name at least one source"):
        BoundTransport()
    with pytest.raises(aiobind.InvalidSource):
        BoundTransport("eth0")
    with pytest.raises(TypeError, match="happy_eyeballs_delay"):
        BoundTransport(A, happy_eyeballs_delay="soon")  # type: ignore[arg-type]
    monkeypatch.setattr(edge, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install \"httpx\[http2\]\""):
        BoundTransport(A, http2=True)
    assert repr(BoundTransport(A, "if!n1")) == f"BoundTransport('{A}', 'if!n1')"


async def test_a_synchronous_client_is_refused(web: Any) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for use in (web.Client.__enter__, lambda session: session.get(f"http://{HERE}/")):
        with pytest.raises(TypeError, match=r"BoundTransport is for httpx\.AsyncClient"):
            use(web.Client(transport=BoundTransport(A, verify=context)))


async def test_a_transport_serves_one_kind_of_client(web: Any) -> None:
    other = httpx if web is httpx2 else httpx2
    async with serving() as server, client(web, A) as (session, transport):
        await session.get(server.url())
        with pytest.raises(TypeError, match=f"this transport serves a client of {web.__name__}: make another one"):
            await other.AsyncClient(transport=transport).get(server.url())
        with pytest.raises(TypeError, match="a request of httpx or httpx2, not str"):
            await transport.handle_async_request("GET")


async def test_a_closed_transport(web: Any) -> None:
    async with serving() as server:
        async with client(web, A) as (session, transport):
            response = await session.get(server.url())
        assert bound_source(response).address == A  # what came is still known
        with pytest.raises(RuntimeError, match="the connector is closed"):
            await transport.handle_async_request(web.Request("GET", server.url()))
        await transport.aclose()  # again


async def test_a_wrong_proxy_leaves_no_count(web: Any) -> None:
    async with client(web, A, proxy="gopher://127.0.0.1/", limit_per_source=1) as (session, transport):
        for _ in range(2):
            with pytest.raises(ValueError, match="gopher"):
                await session.get(f"http://{HERE}/")
        assert transport.stats()[0].in_use == 0


async def test_a_forgotten_transport_is_gone_at_once(web: Any) -> None:
    async with serving() as server:
        transport = BoundTransport(A, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        response = await transport.handle_async_request(web.Request("GET", server.url("/close")))
        await response.aread()
        await response.aclose()
        gone = weakref.ref(transport)
        gc.disable()
        try:
            del transport, response
            assert gone() is None
        finally:
            gc.enable()


# --- httpcore alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", ["sources", "connector"])
async def test_the_backend_alone(lab: Lab, witness: Witness, web: Any, pinned: str) -> None:
    core = CORES[web]
    backend = BoundBackend("if!n1") if pinned == "sources" else BoundBackend(connector=aiobind.Connector("if!n1"))
    nodelay = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    async with (
        serving(lab=lab) as server,
        core.AsyncConnectionPool(network_backend=backend, socket_options=[nodelay]) as pool,
    ):
        response = await pool.request("GET", server.url(host=V4))
        assert response.content == b"198.18.1.2"
        assert bound_source(response)[1:3] == ("n1", "198.18.1.2")
        stream = response.extensions["network_stream"]
        assert stream.get_extra_info("server_addr") == (V4, 80)
        assert stream.get_extra_info("socket").getsockopt(*nodelay[:2]) == 0
        assert stream.get_extra_info("what") is None
        with backend.connector.use_source("if!n2"):  # the pool knows nothing of that
            assert (await pool.request("GET", server.url(host=V4))).content == b"198.18.1.2"
            assert (await pool.request("GET", server.url(host=V6))).content == b"2001:db8:2::2"
        assert sum(stats.connections for stats in backend.connector.stats()) == 2
    assert sum(stats.connections for stats in backend.connector.stats()) == 0
    assert flows(witness.packets()) == {("n1", "198.18.1.2"), ("n2", "2001:db8:2::2")}
    await backend.connector.aclose()


async def test_errors_of_the_backend_alone(web: Any) -> None:
    core = CORES[web]
    with silent() as dumb:
        for source, port, kind, number in (
            (MISSING, dumb, core.ConnectError, errno.ENODEV),
            (A, refusing(), core.ConnectError, errno.ECONNREFUSED),
            (A, dumb, core.ConnectTimeout, errno.ETIMEDOUT),
        ):
            backend = BoundBackend(source)
            async with core.AsyncConnectionPool(network_backend=backend, retries=1) as pool:
                with pytest.raises(kind) as caught:
                    await pool.request("GET", f"http://{HERE}:{port}/", extensions={"timeout": {"connect": 0.05}})
                ours = caught.value.args[0]
                assert isinstance(ours, aiobind.AiobindError)
                assert ours.errno == number
                assert f"{HERE}:{port}" in str(caught.value)
            await backend.connector.aclose()
    backend = BoundBackend(A)

    async def speak_no_tls(stream: Any) -> None:
        async with stream:
            await stream.send(b"SSH-2.0-a\r\n")

    async with serving(serve=speak_no_tls) as server, core.AsyncConnectionPool(network_backend=backend) as pool:
        with pytest.raises(core.ConnectError, match="SSL"):
            await pool.request("GET", server.url(scheme="https"))
        assert backend.connector.stats()[0].connections == 0
    bad = (socket.IPPROTO_TCP, 999, 1)
    async with serving() as server, core.AsyncConnectionPool(network_backend=backend, socket_options=[bad]) as pool:
        with pytest.raises(core.ConnectError, match="Protocol not available"):
            await pool.request("GET", server.url())
        assert backend.connector.stats()[0].connections == 0
    device = (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    for wrong, words in (
        ({"local_address": A}, "local_address is not taken here"),
        ({"socket_options": [device]}, "the source names the interface"),
        ({"uds": "/nowhere"}, "a Unix domain socket has no source"),
    ):
        async with core.AsyncConnectionPool(network_backend=backend, **wrong) as pool:
            with pytest.raises(TypeError, match=words):
                await pool.request("GET", f"http://{HERE}:1/")
    for arguments in ({"sources": ()}, {"sources": (A,), "connector": backend.connector}):
        with pytest.raises(TypeError, match=r"name at least one source|either sources, .* or a connector"):
            BoundBackend(*arguments.pop("sources"), **arguments)
    await backend.connector.aclose()


async def test_the_streams_of_the_backend(web: Any) -> None:
    core, backend = CORES[web], BoundBackend(A)
    with socket.create_server((HERE, 0)) as server:  # which reads nothing
        server.setblocking(False)
        stream = await backend.connect_tcp(HERE, server.getsockname()[1], timeout=5)
        with pytest.raises(core.ReadTimeout):
            await stream.read(1, timeout=0.01)
        with pytest.raises(core.WriteTimeout):
            await stream.write(bytes(50_000_000), timeout=0.05)
        await stream.write(b"")
        assert not stream.get_extra_info("is_readable")
        server.accept()[0].close()  # with all of that unread, so it is a reset
        await until(lambda: stream.get_extra_info("is_readable"))
        await stream.aclose()
        assert stream.get_extra_info("is_readable")
        with pytest.raises(core.ReadError):
            await stream.read(1)
        with pytest.raises(core.WriteError):
            await stream.write(b"more")
        stream = await backend.connect_tcp(HERE, server.getsockname()[1], timeout=5)
        server.accept()[0].close()
        assert await stream.read(1, timeout=5) == b""
        await stream.aclose()
    assert backend.connector.stats()[0].connections == 0
    await backend.connector.aclose()


async def test_a_link_that_goes_amid_tls_of_the_backend_alone(lab: Lab, web: Any) -> None:
    hello, errors, backend = anyio.Event(), [], BoundBackend("if!n1")

    async def say_nothing(stream: Any) -> None:
        async with stream:
            await receive(stream)
            hello.set()
            await anyio.sleep_forever()

    async with serving(serve=say_nothing, lab=lab), anyio.create_task_group() as tasks:
        stream = await backend.connect_tcp(V4, 80)

        async def secure() -> None:
            errors.append(await failure(stream.start_tls(ssl.create_default_context(), "good.test")))

        tasks.start_soon(secure)
        await hello.wait()
        lab.near.ip("link set n1 down")
        await until(lambda: errors)
    assert isinstance(errors[0], CORES[web].ConnectError)
    assert errors[0].args[0].errno == errno.ENETDOWN
    assert backend.connector.stats()[0].connections == 0
    await backend.connector.aclose()


# --- what httpx and httpcore have to keep -------------------------------------------------------------------


def changed(what: str) -> str:
    return f"{what} has changed: see aiobind/httpx.py"


@ONE_LOOP
async def test_contract(web: Any) -> None:
    """What is used of them that is private, or documented nowhere. CI runs this at the oldest and newest versions."""
    core = CORES[web]
    transport = web.AsyncHTTPTransport()
    assert isinstance(transport._pool, core.AsyncConnectionPool), changed("AsyncHTTPTransport._pool")
    assert hasattr(transport._pool, "_network_backend"), changed("AsyncConnectionPool._network_backend")
    assert transport._pool.connections == [], changed("AsyncConnectionPool.connections")
    for proxy in ("http://127.0.0.1:1", "socks5://127.0.0.1:1"):
        pool = web.AsyncHTTPTransport(proxy=proxy)._pool
        for url in (core.Origin(b"http", b"a", 80), core.Origin(b"https", b"a", 443)):
            pool._network_backend = object()
            connection = pool.create_connection(url)
            connection = getattr(connection, "_connection", None) or connection
            assert connection._network_backend is pool._network_backend, changed("create_connection")
    for name in ("is_idle", "is_closed", "aclose"):
        assert hasattr(core.AsyncConnectionInterface, name), changed(f"AsyncConnectionInterface.{name}")
    assert web.Limits().keepalive_expiry == edge._KEPT, changed("Limits.keepalive_expiry")
    parameters = inspect.signature(web.AsyncHTTPTransport).parameters
    ours = {name: parameters[name].default for name in ("http1", "http2", "proxy", "retries", "verify", "cert")}
    mine = inspect.signature(BoundTransport).parameters
    assert ours == {name: mine[name].default for name in ours}, changed("the defaults of AsyncHTTPTransport")
    known = {*ours, "trust_env", "limits", "uds", "local_address", "socket_options"}
    assert set(parameters) <= known, changed(f"the keywords of AsyncHTTPTransport: {sorted(set(parameters) - known)}")
    assert all(isinstance(_httpcore.error_of("ConnectError", "why"), each.ConnectError) for each in CORES.values())
    with pytest.MonkeyPatch.context() as patch:  # as httpx2.alias_httpx() has it
        for each in CORES.values():
            patch.setitem(sys.modules, each.__name__, core)
        assert type(_httpcore.error_of("ConnectError", "why")) is core.ConnectError
    assert set(inspect.signature(web.create_ssl_context).parameters) >= {"verify", "cert", "trust_env"}
    for method in ("connect_tcp", "connect_unix_socket", "sleep"):
        theirs = inspect.signature(getattr(core.AsyncNetworkBackend, method)).parameters
        assert [*theirs] == [*inspect.signature(getattr(BoundBackend, method)).parameters], changed(method)
    for method in ("read", "write", "aclose", "start_tls", "get_extra_info"):
        theirs = inspect.signature(getattr(core.AsyncNetworkStream, method)).parameters
        assert [*theirs] == [*inspect.signature(getattr(_httpcore.Stream, method)).parameters], changed(method)


# --- the example --------------------------------------------------------------------------------------------


@ONE_LOOP
def test_the_example(lab: Lab, witness: Witness, tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "httpx_client.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(aiobind.__file__).parent.parent)}
    with servers.nginx(lab, tmp_path) as port:
        for url, sources, status, words in (
            (f"http://{V4}:{port}/", ["if!n1", "if!n2"], 0, "200 from if!n2: 198.18.2.2 by n2\n200 from if!n2 again\n"),
            (
                f"http://{V4}:{port}/",
                ["if!n9"],
                1,
                f"httpx_client: connect from if!n9 to {V4}:{port}: no interface named",
            ),
            (f"http://{V4}:{port}/", ["n1"], 1, "httpx_client: invalid source 'n1'"),
            (f"http://{V4}:{port}/", [], 1, "usage: httpx_client.py URL SOURCE"),
        ):
            command = [sys.executable, "-W", "error", str(example), url, *sources]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
            assert done.returncode == status, done
            assert words in done.stdout + done.stderr
    assert flows(witness.packets()) == {("n1", "198.18.1.2"), ("n2", "198.18.2.2")}
