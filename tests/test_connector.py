from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import math
import os
import pickle
import socket
import ssl
import subprocess
import sys
import textwrap
import time
import warnings
import weakref
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import aiolimiter  # noqa: F401 - else the first connector with a rate would read it on the loop
import pytest
import trustme
from dns_server import DnsServer

import aiobind
import aiobind.dns
from aiobind._binding import Target
from aiobind._interfaces import LinkGoneError
from aiobind.lab import Namespace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aiobind.lab import Lab

pytestmark = pytest.mark.anyio

HOST = "127.0.0.1"


class _Peer(asyncio.Protocol):
    """Tell the client who it is, and stay open."""

    def connection_made(self, transport: Any) -> None:
        transport.write(transport.get_extra_info("peername")[0].encode() + b"\n")


@asynccontextmanager
async def serving(host: str = HOST, **options: Any) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(_Peer, host, 0, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with serving() as number:
        yield number


def free_port() -> int:
    with socket.create_server((HOST, 0)) as sock:
        return sock.getsockname()[1]


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            gc.collect()
            await asyncio.sleep(0.001)


def open_connections(connector: aiobind.Connector) -> list[int]:
    return [figures.connections for figures in connector.stats()]


# ── connect ──


@pytest.mark.parametrize(
    ("source", "seen", "interface"),
    [
        ("127.0.0.2", "127.0.0.2", None),
        ("if!lo", "127.0.0.1", "lo"),
        ("ifhost!lo!127.0.0.1", "127.0.0.1", "lo"),
        ("ifhost!lo!127.0.0.5", "127.0.0.5", "lo"),
        ("host!localhost", "127.0.0.1", None),
        ("net!127.9.9.9/32", "127.9.9.9", None),
    ],
)
async def test_a_connected_socket_from_each_kind_of_source(
    port: int, source: str, seen: str, interface: str | None
) -> None:
    async with aiobind.Connector(source) as connector:
        sock = await connector.connect(HOST, port)
        assert sock.gettimeout() == 0
        assert not os.get_inheritable(sock.fileno())
        assert sock.getpeername() == (HOST, port)
        assert aiobind.bound_source(sock) == (aiobind.parse_source(source), interface, seen, sock.getsockname()[1])
        assert (await asyncio.get_running_loop().sock_recv(sock, 100)).decode().strip() == seen
        sock.close()
        with pytest.raises(LookupError, match="closed"):
            aiobind.bound_source(sock)


async def test_one_shot(port: int) -> None:
    with await aiobind.connect(HOST, port, source="127.0.0.3", socket_options=[(6, socket.TCP_NODELAY, 1)]) as sock:
        assert sock.getsockname()[0] == "127.0.0.3"
        assert sock.getsockopt(6, socket.TCP_NODELAY)


async def test_options_are_set_before_the_syn() -> None:
    """The peer learns the maximum segment size from the SYN, and never again."""
    async with aiobind.Connector("if!lo", socket_options=[(6, socket.TCP_MAXSEG, 600)]) as connector:
        server = socket.create_server((HOST, 0))
        server.setblocking(False)
        sock = await connector.connect(HOST, server.getsockname()[1])
        peer, _ = await asyncio.get_running_loop().sock_accept(server)
        assert peer.getsockopt(6, socket.TCP_MAXSEG) <= 600
        for one in (sock, peer, server):
            one.close()


async def test_a_literal_takes_no_task_and_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((HOST, 0)) as server:  # nobody accepts, for that would make tasks
        port = server.getsockname()[1]
        connector = aiobind.Connector("if!lo")
        (await connector.connect(HOST, port)).close()  # the first one reads the interfaces
        loop = asyncio.get_running_loop()
        tasks, made = asyncio.all_tasks(), []
        if isinstance(loop, asyncio.BaseEventLoop):  # uvloop's methods cannot be replaced
            for name in ("create_task", "call_later", "call_at", "run_in_executor"):
                monkeypatch.setattr(loop, name, lambda *_, name=name, **__: made.append(name))
        connecting = connector.connect(HOST, port)
        sock = await connecting
        assert made == []
        assert asyncio.all_tasks() == tasks
        sock.close()
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("host", "number", "error", "words"),
    [
        (HOST, 0, ValueError, "the port must be 1 to 65535, not 0"),
        (HOST, 65536, ValueError, "not 65536"),
        (HOST, "80", TypeError, "the port must be a number, not str"),
        (b"127.0.0.1", 80, TypeError, "the host must be a text, not bytes"),
        ("fe80::1%nix", 80, aiobind.ResolveError, "no interface of this host is named 'nix', as its zone says"),
        ("a" * 64 + ".test", 80, aiobind.ResolveError, "cannot be resolved"),
        ("x" * 10**6, 80, aiobind.ResolveError, r"^.{0,400}$"),
        ("a\nb", 80, aiobind.ResolveError, r"a\\nb"),
        ("", 80, ValueError, "the host must be a name or an address without brackets, not ''"),
        ("[::1]", 80, ValueError, "without brackets"),
    ],
)
async def test_a_senseless_destination(host: Any, number: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        await aiobind.connect(host, number, source="if!lo")


async def test_a_destination_without_an_address_of_the_family() -> None:
    with pytest.raises(aiobind.ResolveError, match=r"connect to 127\.0\.0\.1:80: the destination has no IPv6 address"):
        await aiobind.connect(HOST, 80, source="if!lo", family=socket.AF_INET6)


# ── the doors of asyncio ──


async def test_streams(port: int) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        reader, writer = await connector.open_connection(HOST, port, limit=64)
        assert await reader.readline() == b"127.0.0.2\n"
        assert aiobind.bound_source(writer).address == "127.0.0.2"
        assert aiobind.bound_source(writer.transport).address == "127.0.0.2"
        assert open_connections(connector) == [1]
        writer.close()
        await writer.wait_closed()
        await settled(lambda: open_connections(connector) == [0])
        with pytest.raises(LookupError, match="not made by aiobind, or is closed"):
            aiobind.bound_source(writer)


async def test_the_readers_limit(port: int) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        reader, writer = await connector.open_connection(HOST, port, limit=2)
        with pytest.raises(ValueError, match="limit"):
            await reader.readline()
        writer.close()
        await writer.wait_closed()


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


async def test_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = contexts
    async with serving(ssl=server) as port, aiobind.Connector("127.0.0.2") as connector:
        reader, writer = await connector.open_connection(
            "localhost", port, ssl=client, family=socket.AF_INET, ssl_handshake_timeout=20
        )
        assert await reader.readline() == b"127.0.0.2\n"
        assert aiobind.bound_source(writer).address == "127.0.0.2"
        writer.close()
        await writer.wait_closed()

        with pytest.raises(ssl.SSLCertVerificationError):
            await connector.open_connection(HOST, port, ssl=client)  # the certificate is not for the address
        reader, writer = await connector.open_connection(HOST, port, ssl=client, server_hostname="localhost")
        assert await reader.readline() == b"127.0.0.2\n"
        writer.close()
        await writer.wait_closed()
        await settled(lambda: open_connections(connector) == [0])


async def test_what_create_connection_refuses(port: int) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        for name in ("local_addr", "sock"):
            with pytest.raises(TypeError, match=f"{name} is not taken here: the source names the local end"):
                await connector.create_connection(asyncio.Protocol, HOST, port, **{name: ("127.0.0.9", 0)})
        with pytest.raises(TypeError, match="all_errors"):
            await connector.create_connection(asyncio.Protocol, HOST, port, all_errors=True)
        with pytest.raises(ValueError, match="ssl"):
            await connector.create_connection(asyncio.Protocol, HOST, port, server_hostname="x")
        with pytest.raises(TypeError):
            await connector.create_connection(asyncio.Protocol, HOST, port, no_such_option=1)
        assert open_connections(connector) == [0], "the socket of a refused call is closed"


async def test_a_protocol_factory_that_fails_leaves_nothing_open(port: int) -> None:
    def fail() -> asyncio.Protocol:
        raise LookupError("no protocol today")

    async with aiobind.Connector("127.0.0.2") as connector:
        with pytest.raises(LookupError):
            await connector.create_connection(fail, HOST, port)
        assert open_connections(connector) == [0]


# ── which source ──


async def test_sources_take_turns(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", "127.0.0.4") as connector:
        seen = []
        for _ in range(6):
            with await connector.connect(HOST, port) as sock:
                seen.append(sock.getsockname()[0])
        assert seen == ["127.0.0.2", "127.0.0.3", "127.0.0.4"] * 2
        assert [figures.connects for figures in connector.stats()] == [2, 2, 2]


class _Last:
    def order(self, sources: Any, host: str) -> Iterator[Any]:
        yield sources[-1]


async def test_a_policy_of_ones_own(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=_Last()) as connector:
        with await connector.connect(HOST, port) as sock:
            assert sock.getsockname()[0] == "127.0.0.3"


async def test_a_policy_that_names_no_source(port: int) -> None:
    class Nobody:
        def order(self, sources: Any, host: str) -> list[Any]:
            return []

    async with aiobind.Connector("127.0.0.2", policy=Nobody()) as connector:
        with pytest.raises(RuntimeError, match="the policy named no source"):
            await connector.connect(HOST, port)


@pytest.mark.parametrize("broken", ["if!nix", "192.0.2.77", "host!nowhere.invalid", "ifhost!lo!192.0.2.77", "::1"])
async def test_the_next_source_when_one_fails_for_a_reason_of_its_own(port: int, broken: str) -> None:
    async with aiobind.Connector(broken, "127.0.0.2") as connector:
        with await connector.connect(HOST, port) as sock:
            assert sock.getsockname()[0] == "127.0.0.2"


async def test_no_other_source_when_the_target_refuses() -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3") as connector:
        with pytest.raises(ConnectionRefusedError) as caught:
            await connector.connect(HOST, free_port())
    assert isinstance(caught.value, aiobind.ConnectError)
    assert [str(attempt.source) for attempt in caught.value.attempts] == ["127.0.0.2"]


async def test_a_pinned_connection_never_moves(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3") as connector:
        with pytest.raises(aiobind.BindError, match=r"from if!nix to 127\.0\.0\.1"):
            await connector.connect(HOST, port, source="if!nix")
        with connector.use_source("if!nix"), pytest.raises(aiobind.BindError):
            await connector.connect(HOST, port)
        with aiobind.use_source("if!nix"), pytest.raises(aiobind.BindError):
            await connector.connect(HOST, port)
        assert [figures.connects for figures in connector.stats()] == [0, 0]


async def test_the_nearest_pin_wins(port: int) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:

        async def address(**options: Any) -> str:
            with await connector.connect(HOST, port, **options) as sock:
                return sock.getsockname()[0]

        with connector.use_source("127.0.0.3"), aiobind.use_source("127.0.0.4"):
            assert await address() == "127.0.0.3"
            assert await address(source="127.0.0.5") == "127.0.0.5"
            assert await asyncio.create_task(address()) == "127.0.0.3"
        with aiobind.use_source("127.0.0.4"):
            assert await address() == "127.0.0.4"
        assert await address() == "127.0.0.2"


async def test_a_source_from_outside_is_counted_while_it_has_connections(port: int) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        two = [await connector.connect(HOST, port, source="127.0.0.9") for _ in range(2)]
        assert [(str(s.source), s.connections, s.in_use) for s in connector.stats()] == [
            ("127.0.0.2", 0, 0),
            ("127.0.0.9", 2, 2),
        ]
        two.pop().close()
        assert open_connections(connector) == [0, 1]
        two.pop().close()
        assert open_connections(connector) == [0]
        with pytest.raises(ConnectionRefusedError):
            await connector.connect(HOST, free_port(), source="127.0.0.9")
        assert open_connections(connector) == [0]


# ── counting ──


async def test_connections_are_counted_until_they_end(port: int) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        closed, detached, collected = [await connector.connect(HOST, port) for _ in range(3)]
        assert open_connections(connector) == [3]
        closed.close()
        closed.close()
        assert open_connections(connector) == [2]
        os.close(detached.detach())
        assert open_connections(connector) == [1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del collected
            await settled(lambda: open_connections(connector) == [0])
        assert [warning.category for warning in caught] == [ResourceWarning]
        assert [figures.connects for figures in connector.stats()] == [3]


async def test_an_aborted_transport_is_counted_out(port: int) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        transport, _ = await connector.create_connection(asyncio.Protocol, HOST, port)
        assert open_connections(connector) == [1]
        transport.abort()
        await settled(lambda: open_connections(connector) == [0])


# ── errors ──


async def test_refused() -> None:
    number = free_port()
    with pytest.raises(aiobind.ConnectError) as caught:
        await aiobind.connect(HOST, number, source="127.0.0.2")
    error = caught.value
    assert str(error) == f"[Errno 111] connect from 127.0.0.2 to 127.0.0.1:{number}: connection refused"
    assert (error.errno, error.source, error.destination) == (
        errno.ECONNREFUSED,
        aiobind.Address("127.0.0.2"),
        f"{HOST}:{number}",
    )
    assert [(attempt.address, attempt.error.errno) for attempt in error.attempts] == [(f"{HOST}:{number}", 111)]
    assert isinstance(error, ConnectionRefusedError)
    assert isinstance(error.__cause__, ExceptionGroup)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.attempts[0][:2]) == (type(error), str(error), error.attempts[0][:2])


async def test_each_address_that_was_tried_is_told(resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts="127.0.0.1 three.test\n127.0.0.2 three.test\n::1 three.test\n")
    number = free_port()
    for delay in (0.25, None):
        async with aiobind.Connector("if!lo", happy_eyeballs_delay=delay) as connector:
            with pytest.raises(aiobind.ConnectError) as caught:
                await connector.connect("three.test", number)
        tried = [attempt.address for attempt in caught.value.attempts]
        assert sorted(tried) == [f"127.0.0.1:{number}", f"127.0.0.2:{number}", f"[::1]:{number}"]
        assert tried[1 if tried[0].startswith("127") else 0].startswith("[::1]"), "the families alternate"
        for address in tried:
            assert f"{address}: connection refused" in str(caught.value)


async def test_what_was_not_tried_is_told_too(resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts="127.0.0.1 both.test\n::1 both.test\n")
    with pytest.raises(aiobind.ConnectError, match=r"not tried: the source has no IPv6 address") as caught:
        await aiobind.connect("both.test", free_port(), source="127.0.0.2")
    assert len(caught.value.attempts) == 1


async def test_every_source_failed_for_its_own_reason(port: int) -> None:
    async with aiobind.Connector("if!nix", "192.0.2.77", "host!nowhere.invalid") as connector:
        with pytest.raises(aiobind.BindError) as caught:
            await connector.connect(HOST, port)
    error = caught.value
    assert error.errno == errno.ENODEV
    assert error.source == aiobind.Interface("nix")
    for words in ("from if!nix: no interface named", "from 192.0.2.77: 192.0.2.77 is not usable", "nowhere.invalid"):
        assert words in str(error)
    assert isinstance(error.__cause__, ExceptionGroup)
    assert len(error.__cause__.exceptions) == 3
    assert pickle.loads(pickle.dumps(error)).errno == errno.ENODEV


async def test_a_bind_failure_is_not_hidden_by_a_refusal(port: int) -> None:
    async with aiobind.Connector("if!nix", "127.0.0.2") as connector:
        with pytest.raises(aiobind.ConnectError) as caught:
            await connector.connect(HOST, free_port())
    assert [attempt.error.errno for attempt in caught.value.attempts] == [errno.ENODEV, errno.ECONNREFUSED]
    assert caught.value.errno == errno.ENODEV
    assert "from if!nix: no interface named 'nix'" in str(caught.value)


async def test_a_prefix_that_is_not_routed_here() -> None:
    with _namespace(), pytest.raises(aiobind.AiobindError, match=r"ip route add local 198\.51\.100\.0/24 dev lo"):
        await aiobind.connect("203.0.113.1", 80, source="net!198.51.100.0/24")


async def test_the_callers_range_of_ports_holds(port: int) -> None:
    """IP_LOCAL_PORT_RANGE, Linux 6.3: high half the last port, low half the first."""
    option = (socket.SOL_IP, 51, (40009 << 16 | 40000).to_bytes(4, sys.byteorder))
    async with aiobind.Connector("127.0.0.2", "if!lo", socket_options=[option]) as connector:
        for _ in range(2):
            try:
                with await connector.connect(HOST, port) as sock:
                    assert 40000 <= sock.getsockname()[1] <= 40009
            except aiobind.ConnectError as error:
                pytest.skip(f"no IP_LOCAL_PORT_RANGE here: {error}")


async def test_a_port_connected_to_itself_is_no_connection() -> None:
    """Where nobody listens, connect(2) may choose the very port that it is to reach (simultaneous open)."""
    with _namespace() as namespace:
        namespace.sysctl("ipv4.ip_local_port_range", "40000 40003")
        async with aiobind.Connector("127.0.0.1", "if!lo") as connector:
            for _ in range(60):
                with pytest.raises(ConnectionRefusedError):
                    await connector.connect(HOST, 40002)
            assert open_connections(connector) == [0, 0]


async def test_a_failure_leaves_no_cycle() -> None:
    """Else the dialer, and the netlink descriptor with it, would stay until the collector comes by."""
    gc.collect()
    gc.disable()
    try:
        connector = aiobind.Connector("if!lo", "127.0.0.2", happy_eyeballs_delay=None)
        dialer = weakref.ref(connector._dialer)
        for source in (None, "if!nix"):
            with contextlib.suppress(aiobind.AiobindError):
                await connector.connect(HOST, free_port(), source=source)
        del connector
        await asyncio.sleep(0)
        assert dialer() is None
    finally:
        gc.enable()


async def test_no_descriptor_left() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with aiobind.Connector("127.0.0.2") as connector:
        used = os.dup(0)
        os.close(used)
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        try:
            with pytest.raises(aiobind.ConnectError, match=r"(?i)too many open files") as caught:
                await connector.connect(HOST, 80)
            assert caught.value.errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ── construction ──


@pytest.mark.parametrize(
    ("sources", "options", "error", "words"),
    [
        ((), {}, TypeError, "name at least one source"),
        (("eth0",), {}, aiobind.InvalidSource, "if!eth0"),
        (("if!a", "if!a"), {}, ValueError, "a source is named twice"),
        ((["if!a", "if!b"],), {}, TypeError, "not list"),
        ((7,), {}, TypeError, "not int"),
        (("if!a",), {"dns": "192.0.2.53"}, ValueError, r'as in dns=\("192.0.2.53",\), not \'192.0.2.53\''),
        (("if!a",), {"direct": "localhost"}, TypeError, r"as in direct=\('localhost',\)"),
        (("if!a",), {"direct": [7]}, TypeError, "direct holds texts, not int"),
        (("if!a",), {"direct": ["10.0.0.1/8"]}, ValueError, "'10.0.0.1/8' is no host.*has host bits set"),
        (("if!a",), {"direct": ["*.example"]}, ValueError, "is no host, no address and no network"),
        (("if!a",), {"direct": [""]}, ValueError, "'' is no host"),
        (("if!a",), {"direct": ["127.1"]}, ValueError, "'127.1' is no host"),
        (("if!a",), {"direct": ["fe80::1%lo"]}, ValueError, "without a zone"),
        (("if!a",), {"direct": ["::ffff:10.0.0.0/104"]}, ValueError, "IPv4 as IPv4"),
        (("if!a",), {"local_ports": (1, 9)}, TypeError, "is a range, as in .* not tuple"),
        (("if!a",), {"local_ports": range(9, 9)}, ValueError, "a range of ports from 1 to 65535"),
        (("if!a",), {"local_ports": range(9)}, ValueError, "a range of ports from 1 to 65535"),
        (("if!a",), {"local_ports": range(9, 65537)}, ValueError, "a range of ports from 1 to 65535"),
        (("if!a",), {"local_ports": range(9, 20, 2)}, ValueError, "without a step"),
        (("if!a",), {"policy": aiobind.RoundRobin}, TypeError, r"as in policy=aiobind.RoundRobin\(\), not <class"),
        (("if!a",), {"policy": "round-robin"}, TypeError, "an object with a method order, .* not 'round-robin'"),
        (("if!a",), {"on_event": 5}, TypeError, "on_event is a plain function of one Event, not 5"),
        (("if!a",), {"on_event": asyncio.sleep}, TypeError, "on_event is a plain function of one Event"),
        (("if!a",), {"happy_eyeballs_delay": "x"}, TypeError, "happy_eyeballs_delay is a number of seconds"),
        (("if!a",), {"happy_eyeballs_delay": -1}, ValueError, "happy_eyeballs_delay is .* 0 or more, or None, not -1"),
        (("if!a",), {"ttl_dns_cache": "x"}, TypeError, "ttl_dns_cache is a number of seconds"),
        (("if!a",), {"limit_per_source": -1}, ValueError, "limit_per_source is a number of connections"),
        (("if!a",), {"rate_per_source": 0}, ValueError, "rate_per_source is a number of connects per second"),
    ],
)
def test_a_senseless_connector(sources: Any, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        aiobind.Connector(*sources, **options)


@pytest.mark.parametrize(
    ("host", "seconds", "error", "words"),
    [
        (None, None, TypeError, "the host must be a text, not NoneType"),
        ("", None, ValueError, "must be a name or an address, not ''"),
        ("http://a.test/", None, ValueError, "must be a name or an address, not 'http://a.test/'"),
        ("a.test", "60", TypeError, "seconds is a number, as in seconds=60, not '60'"),
        ("a.test", -1, ValueError, "seconds is how long the ban lasts, 0 or more, not -1"),
        ("a.test", float("nan"), ValueError, "0 or more, not nan"),
    ],
)
def test_a_senseless_report(host: Any, seconds: Any, error: type[Exception], words: str) -> None:
    connector = aiobind.Connector("127.0.0.2")
    with pytest.raises(error, match=words):
        connector.report("127.0.0.2", host=host, seconds=seconds)


async def test_one_of_whom_others_wait_for_may_be_added(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", limit_per_source=1) as connector:
        with await connector.connect(HOST, port):
            waiting = [asyncio.create_task(connector.connect(HOST, port)) for _ in range(2)]
            await asyncio.sleep(0.02)
            assert not any(task.done() for task in waiting)
            connector.add("127.0.0.3")
            with await asyncio.wait_for(waiting[0], 10) as sock:
                assert sock.getsockname()[0] == "127.0.0.3"
        with await asyncio.wait_for(waiting[1], 10):
            pass


async def test_nobody_who_waits_gets_a_source_that_was_removed(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", limit_per_source=1) as connector:
        first, second = [await connector.connect(HOST, port) for _ in range(2)]
        waiting = asyncio.create_task(connector.connect(HOST, port))
        await asyncio.sleep(0.02)
        connector.remove("127.0.0.2")
        first.close()
        await asyncio.sleep(0.02)
        assert not waiting.done()
        second.close()
        with await asyncio.wait_for(waiting, 10) as sock:
            assert sock.getsockname()[0] == "127.0.0.3"


async def test_who_waits_hears_of_a_source_that_is_back(lab: Lab) -> None:
    with lab.far:
        listener = socket.create_server((lab.target_v4, 80))
    with listener:
        async with aiobind.Connector("if!n0", "if!n1", limit_per_source=1) as connector:
            (await connector.connect(lab.target_v4, 80)).close()
            lab.near.ip("link set n1 down")
            await settled(lambda: connector.stats()[1].suspended_until is not None)
            with await connector.connect(lab.target_v4, 80):
                waiting = asyncio.create_task(connector.connect(lab.target_v4, 80))
                await asyncio.sleep(0.05)
                assert not waiting.done()
                lab.near.ip("link set n1 up", "route add default via 198.18.1.1 dev n1 metric 1001")
                with await asyncio.wait_for(waiting, 10) as sock:
                    assert aiobind.bound_source(sock).interface == "n1"


async def test_a_report_of_one_that_was_removed_meanwhile_harms_nobody(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=aiobind.Failover()) as connector:
        with await connector.connect(HOST, port):
            connector.remove("127.0.0.2")
            connector.report("127.0.0.2", host=HOST)
        with pytest.raises(ValueError, match="no source of this connector"):
            connector.report("127.0.0.4", host=HOST)


async def test_ports_of_a_single_source_are_forgotten(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiobind._origin._TIME_WAIT", 0.05)
    async with aiobind.Connector("127.0.0.2") as connector:
        for _ in range(20):
            (await connector.connect(HOST, port)).close()
        await asyncio.sleep(0.1)
        (await connector.connect(HOST, port)).close()
        (origin,) = connector._dialer.roster.listed
        assert len(origin._lingering) <= 1


@pytest.mark.parametrize(("kind", "blamed"), [(aiobind.BindError, True), (LinkGoneError, False)])
def test_who_is_blamed_for_a_link_that_went(kind: type[aiobind.BindError], blamed: bool) -> None:
    """The roster hears of it by the interfaces, and of its return, which may be before the attempt has ended."""
    dialer = aiobind.Connector("127.0.0.2", "127.0.0.3")._dialer
    origin = dialer.roster.find("127.0.0.2")
    dialer._judge(origin, Target.of(ip_address(HOST), 80), f"{HOST}:80", kind(errno.ENETUNREACH, "n1 is down"), 0.0)
    assert bool(origin.breakers) is blamed


def test_a_connector_with_dns_is_gone_as_soon_as_it_is_forgotten() -> None:
    gc.disable()
    try:
        connector = aiobind.Connector("127.0.0.2", dns=("192.0.2.53",))
        dialer = weakref.ref(connector._dialer)
        del connector
        assert dialer() is None
    finally:
        gc.enable()


async def test_many_sources_that_fail_do_not_hold_the_loop(port: int) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with aiobind.Connector(*(f"192.0.2.{number}" for number in range(1, 201))) as connector:
        task = asyncio.create_task(others())
        await asyncio.sleep(0)
        before = turns
        with pytest.raises(aiobind.BindError):
            await connector.connect(HOST, port)
        assert turns - before >= 9  # each 20 sources
        task.cancel()
        await asyncio.wait([task])


async def test_the_message_of_many_sources_that_fail_is_short(port: int) -> None:
    sources = [f"192.0.2.{number}" for number in range(1, 101)]
    async with aiobind.Connector(*sources) as connector:
        with pytest.raises(aiobind.BindError, match="and from 80 others") as caught:
            await connector.connect(HOST, port)
    assert len(str(caught.value)) < 5000
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 100


def test_repr() -> None:
    assert repr(aiobind.Connector("if!a", "192.0.2.7")) == "Connector('if!a', '192.0.2.7')"


# ── life ──


async def test_closed(port: int) -> None:
    connector = aiobind.Connector("127.0.0.2")
    sock = await connector.connect(HOST, port)
    await connector.aclose()
    await connector.aclose()
    with pytest.raises(RuntimeError, match="the connector is closed"):
        await connector.connect(HOST, port)
    assert sock.fileno() >= 0, "an open connection belongs to its caller"
    sock.close()


def test_a_second_loop_is_refused() -> None:
    connector = aiobind.Connector("127.0.0.2")

    async def use() -> None:
        async with serving() as port:
            (await connector.connect(HOST, port)).close()

    asyncio.run(use())
    with pytest.raises(RuntimeError, match="belongs to another event loop"):
        asyncio.run(use())


def netlink_sockets() -> int:
    return sum(map(_is_netlink, range(256)))


def _is_netlink(descriptor: int) -> bool:
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        return False
    family = sock.family
    sock.detach()
    return family == socket.AF_NETLINK


async def test_one_watch_for_all_connectors_of_the_loop(port: int) -> None:
    connectors = [aiobind.Connector("if!lo") for _ in range(5)]
    for connector in connectors:
        (await connector.connect(HOST, port)).close()
    assert netlink_sockets() == 1
    for connector in connectors[:4]:
        await connector.aclose()
    assert netlink_sockets() == 1
    del connector
    connectors.clear()  # the last one is merely forgotten
    await settled(lambda: netlink_sockets() == 0)


async def test_one_shot_from_an_address_needs_no_watch(port: int) -> None:
    (await aiobind.connect(HOST, port, source="127.0.0.2")).close()
    assert netlink_sockets() == 0


def run_script(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.parametrize("runner", ["asyncio.run", "__import__('uvloop').run"])
def test_a_forgotten_connector_warns_of_nothing(runner: str) -> None:
    done = run_script(
        f"""
        import asyncio, aiobind

        async def main():
            global connector  # outlives the loop
            server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            connector = aiobind.Connector("if!lo")
            (await connector.connect("127.0.0.1", port)).close()
            await asyncio.sleep(0.05)
            server.close()

        {runner}(main())
        print("done")
        """,
        "-X",
        "dev",
        "-W",
        "error",
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("runner", ["asyncio.run", "__import__('uvloop').run"])
def test_three_thousand_connects_cancelled_at_random(runner: str) -> None:
    """Nothing is left behind: no descriptor, no task, no warning."""
    done = run_script(
        f"""
        import asyncio, os, random, aiobind

        random.seed(8305)

        async def main():
            class Closing(asyncio.Protocol):
                def connection_made(self, transport):
                    transport.close()

            loop = asyncio.get_running_loop()
            servers = [await loop.create_server(Closing, "127.0.0.1", 0, backlog=4000)]
            port = servers[0].sockets[0].getsockname()[1]
            connector = aiobind.Connector("if!lo", "127.0.0.2", "net!127.3.0.0/16", happy_eyeballs_delay=0.0005)
            (await connector.connect("127.0.0.1", port)).close()
            before = set(os.listdir("/proc/self/fd"))
            ends = dict.fromkeys(("connected", "cancelled"), 0)

            async def one(target):
                try:
                    async with asyncio.timeout(random.random() ** 3 * 0.1):
                        (await connector.connect(target, port)).close()
                        ends["connected"] += 1
                except TimeoutError:
                    ends["cancelled"] += 1

            for _ in range(60):
                targets = random.choices(["127.0.0.1", "localhost"], k=50)
                await asyncio.gather(*map(one, targets))
            for server in servers:
                server.close()
            for _ in range(500):  # the server's own tasks
                if len(asyncio.all_tasks()) > 1:
                    await asyncio.sleep(0.01)
            assert asyncio.all_tasks() == {{asyncio.current_task()}}
            assert [s.connections for s in connector.stats()] == [0, 0, 0], connector.stats()
            left = set(os.listdir("/proc/self/fd")) - before
            assert len(left) <= 1, left  # listdir's own
            assert min(ends.values()) > 50, ends

        {runner}(main())
        print("done")
        """,
        "-X",
        "dev",
        "-W",
        "error",
    )
    assert done.stdout == "done\n", done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr[-3000:]


# ── sources that come and go ──


async def addresses(connector: aiobind.Connector, port: int, count: int, host: str = HOST) -> list[str]:
    """Return from where *count* connections leave, one after the other, by their last numbers."""
    seen = []
    for _ in range(count):
        with await connector.connect(host, port) as sock:
            seen.append(sock.getsockname()[0].rpartition(".")[2])
    return seen


async def test_a_source_more_and_less(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3") as connector:
        assert await addresses(connector, port, 2) == ["2", "3"]
        connector.add("127.0.0.4")
        assert await addresses(connector, port, 3) == ["4", "2", "3"]
        connector.remove(aiobind.Address("127.0.0.3"))
        assert set(await addresses(connector, port, 4)) == {"2", "4"}
        assert repr(connector) == "Connector('127.0.0.2', '127.0.0.4')"


async def test_before_the_first_use_as_well(port: int) -> None:
    connector = aiobind.Connector("127.0.0.2")
    connector.add("127.0.0.3")
    connector.remove("127.0.0.2")
    async with connector:
        assert await addresses(connector, port, 2) == ["3", "3"]
    connector.add("127.0.0.4")  # and after the last
    assert [str(figures.source) for figures in connector.stats()] == ["127.0.0.3", "127.0.0.4"]


@pytest.mark.parametrize("method", ["remove", "report"])
async def test_what_is_no_source_of_it(method: str) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3") as connector:
        options = {"host": "example.com"} if method == "report" else {}
        with pytest.raises(ValueError, match=r"127\.0\.0\.9 is no source of this connector \(it has 127"):
            getattr(connector, method)("127.0.0.9", **options)
        with pytest.raises(aiobind.InvalidSource):
            getattr(connector, method)("eth0", **options)
        with pytest.raises(ValueError, match="is a source of this connector already"):
            connector.add("127.0.0.3")
        connector.remove("127.0.0.3")
        with pytest.raises(ValueError, match="is the only source of this connector: add another one first"):
            connector.remove("127.0.0.2")


async def test_a_removed_source_keeps_its_connections(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3") as connector:
        reader, writer = await connector.open_connection(HOST, port)
        connector.remove("127.0.0.2")
        assert await reader.readline() == b"127.0.0.2\n"
        assert [(str(s.source), s.connections) for s in connector.stats()] == [("127.0.0.3", 0), ("127.0.0.2", 1)]
        writer.close()
        await writer.wait_closed()
        await settled(lambda: [str(s.source) for s in connector.stats()] == ["127.0.0.3"])


async def test_the_connections_of_a_removed_source_are_cut(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3") as connector:
        reader, writer = await connector.open_connection(HOST, port)
        await reader.readline()
        sock, other = [await connector.connect(HOST, port, source=f"127.0.0.{n}") for n in (2, 3)]
        connector.remove("127.0.0.2", drain=False)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(sock, 100)
        assert (await asyncio.get_running_loop().sock_recv(other, 100)) == b"127.0.0.3\n"
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()
        sock.close()
        other.close()


# ── bans ──


async def test_others_go_where_a_source_is_banned(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=InOrder()) as connector:
        connector.report("127.0.0.2", host=HOST)
        assert await addresses(connector, port, 2) == ["3", "3"]
        assert await addresses(connector, port, 1, "localhost") == ["2"]
        connector.report("127.0.0.3", host=HOST, seconds=5)
        assert await addresses(connector, port, 1) == ["3"]  # whose ban ends first
        connector.report("127.0.0.2", host=HOST, ok=True)
        assert await addresses(connector, port, 1) == ["2"]
        connector.report("127.0.0.2", host=HOST, seconds=0.01)
        await asyncio.sleep(0.02)
        assert await addresses(connector, port, 1) == ["2"]
        with await connector.connect(HOST, port, source="127.0.0.3") as sock:  # a pin is a pin
            assert sock.getsockname()[0] == "127.0.0.3"
        assert [figures.suspended_until for figures in connector.stats()] == [None, None]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "localhost.", "LocalHost."])
async def test_a_ban_is_for_the_host_however_it_is_written(port: int, host: str) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=InOrder()) as connector:
        connector.report("127.0.0.2", host=host)
        for same in ("localhost", "Localhost"):
            assert await addresses(connector, port, 1, same) == ["3"]
        connector.report("127.0.0.2", host=host.swapcase(), ok=True)
        assert await addresses(connector, port, 1, "localhost") == ["2"]


# ── figures ──


async def test_the_figures_of_a_source(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "192.0.2.77", policy=InOrder()) as connector:
        source = aiobind.Address("127.0.0.2")
        assert connector.stats()[0] == (source, 0, 0, 0, 0, {}, None, None, None, 0, 0, {})
        started = time.perf_counter()
        reader, writer = await connector.open_connection(HOST, port)
        took = time.perf_counter() - started
        line = await reader.readline()
        writer.write(b"12345")
        await settled(lambda: connector.stats()[0].bytes_sent == 5)
        figures = connector.stats()[0]
        assert figures[:6] == (source, 1, 1, 0, 1, {})
        assert figures.suspended_until is None
        assert figures.latency_p50 is not None
        assert figures.latency_p50 == figures.latency_p99
        assert 0 < figures.latency_p50 < took * 1.1 + 0.0001
        assert figures[9:] == (5, len(line), {f"{HOST}:{port}": 1})
        writer.close()
        await writer.wait_closed()
        await settled(lambda: open_connections(connector) == [0, 0])
        with pytest.raises(ConnectionRefusedError):
            await connector.connect(HOST, free_port())
        figures = connector.stats()[0]
        assert figures[1:6] == (0, 0, 0, 1, {"ECONNREFUSED": 1})
        assert figures[9:] == (5, len(line), {f"{HOST}:{port}": 1})  # in TIME_WAIT


async def test_until_when_a_source_is_suspended(port: int) -> None:
    events: list[aiobind.Event] = []
    async with aiobind.Connector("192.0.2.77", "127.0.0.2", policy=InOrder(), on_event=events.append) as connector:
        before = time.monotonic()
        await addresses(connector, port, 3)
        until = connector.stats()[0].suspended_until
        assert until is not None
        # Nobody holds the address; so it is until somebody does, as soon as the interfaces have been told.
        assert until == math.inf or before + 0.5 <= until <= time.monotonic() + 1.0
        assert connector.stats()[1].suspended_until is None
        assert {event.kind for event in events if event.source == aiobind.Address("192.0.2.77")} <= {
            "failed",
            "suspended",
        }
        connected = [event for event in events if event.kind == "connected"]
        assert [(str(event.source), event.destination) for event in connected] == [("127.0.0.2", f"{HOST}:{port}")] * 3
        assert all(event.seconds is not None and 0 < event.seconds < 5 for event in connected)


async def test_what_on_event_raises_harms_no_connection(port: int, caplog: pytest.LogCaptureFixture) -> None:
    def on_event(event: aiobind.Event) -> None:
        raise LookupError("no ears")

    async with aiobind.Connector("127.0.0.2", on_event=on_event) as connector:
        assert await addresses(connector, port, 2) == ["2", "2"]
        with pytest.raises(ConnectionRefusedError):
            await connector.connect(HOST, free_port())
    assert [record.getMessage().partition(" at ")[0] for record in caplog.records] == ["on_event failed"] * 3


# ── limits ──


def places(connector: aiobind.Connector) -> tuple[int, int]:
    """Return how many places are taken, of the sources and of their hosts."""
    limits = connector._dialer.limits
    limits._settle()
    return sum(limits._held.values()), sum(limits._held_at.values())


async def turns_of_the_loop() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def waiting(connector: aiobind.Connector, count: int) -> None:
    await settled(lambda: sum(map(len, connector._dialer.limits._lines.values())) == count)


async def test_a_source_with_room_goes_before_one_without(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=InOrder(), limit_per_source=2) as connector:
        held = [await connector.connect(HOST, port) for _ in range(4)]
        assert [sock.getsockname()[0][-1] for sock in held] == ["2", "2", "3", "3"]
        held.pop(1).close()
        held.append(await connector.connect(HOST, port))
        assert held[-1].getsockname()[0] == "127.0.0.2"
        for sock in held:
            sock.close()


async def test_where_none_has_room_the_first_that_gets_some_serves_the_first_that_came(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=InOrder(), limit_per_source=1) as connector:
        held = [await connector.connect(HOST, port) for _ in range(2)]
        done: list[tuple[int, str]] = []

        async def one(number: int) -> None:
            sock = await connector.connect(HOST, port)
            done.append((number, sock.getsockname()[0]))
            held.append(sock)

        tasks = []
        for number in range(3):
            tasks.append(asyncio.create_task(one(number)))
            await waiting(connector, number + 1)
        held[1].close()
        await settled(lambda: len(done) == 1)
        held[0].close()
        await settled(lambda: len(done) == 2)
        held[-2].close()
        await asyncio.gather(*tasks)
        assert done == [(0, "127.0.0.3"), (1, "127.0.0.2"), (2, "127.0.0.3")]
        for sock in held:
            sock.close()
        assert places(connector) == (0, 0)


async def test_a_limit_for_each_host(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", limit_per_source_host=1) as connector:
        first = await connector.connect(HOST, port)
        (await connector.connect("localhost", port)).close()  # another host, as it is written
        second = asyncio.create_task(connector.connect(HOST, port))
        await waiting(connector, 1)
        first.close()
        (await second).close()
        assert places(connector) == (0, 0)


async def test_a_pin_waits_for_its_own_source(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", limit_per_source=1) as connector:
        first = await connector.connect(HOST, port, source="127.0.0.9")
        second = asyncio.create_task(connector.connect(HOST, port, source="127.0.0.9"))
        await waiting(connector, 1)
        first.close()
        with await second as sock:
            assert sock.getsockname()[0] == "127.0.0.9"


async def test_whoever_gives_up_waiting_takes_no_place(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", limit_per_source=1) as connector:
        held = await connector.connect(HOST, port)
        for moment in ("before", "after", "in the same moment"):
            one, other = (asyncio.create_task(connector.connect(HOST, port)) for _ in range(2))
            await waiting(connector, 2)
            if moment == "before":
                one.cancel()
                await turns_of_the_loop()
            held.close()
            if moment == "after":
                connector._dialer.limits._settle()  # it has been given the place, and does not know yet
            one.cancel()
            held = await other
            with pytest.raises(asyncio.CancelledError):
                await one
            assert places(connector) == (1, 0)
        held.close()
        assert places(connector) == (0, 0)


async def test_whoever_waits_when_the_connector_is_closed(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", limit_per_source=1, rate_per_source=1000) as connector:
        held = await connector.connect(HOST, port)
        tasks = [asyncio.create_task(connector.connect(HOST, port)) for _ in range(3)]
        await waiting(connector, 3)
        await connector.aclose()
        for task in tasks:
            with pytest.raises(RuntimeError, match="the connector is closed"):
                await task
        held.close()
        assert places(connector) == (0, 0)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_however_it_ends_the_place_is_given_back_once(port: int, make_silent: Callable[[], int]) -> None:
    silent = make_silent()

    def fail() -> asyncio.Protocol:
        raise LookupError

    async def closed() -> None:
        sock = await connector.connect(HOST, port)
        sock.close()
        sock.close()

    async def detached() -> None:
        os.close((await connector.connect(HOST, port)).detach())

    async def forgotten() -> None:
        await connector.connect(HOST, port)

    async def refused() -> None:
        with pytest.raises(ConnectionRefusedError):
            await connector.connect(HOST, free_port())

    async def of_its_own() -> None:
        with pytest.raises(aiobind.BindError):
            await connector.connect(HOST, port, source="192.0.2.77")

    async def nameless() -> None:
        with pytest.raises(aiobind.ResolveError):
            await connector.connect("fe80::1%nix", port)

    async def given_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connector.connect(HOST, silent)

    async def without_a_protocol() -> None:
        with pytest.raises(LookupError):
            await connector.create_connection(fail, HOST, port)

    async def aborted() -> None:
        transport, _ = await connector.create_connection(asyncio.Protocol, HOST, port)
        transport.abort()

    async def refused_by_asyncio() -> None:
        with pytest.raises(TypeError):
            await connector.create_connection(asyncio.Protocol, HOST, port, no_such_option=1)

    async with aiobind.Connector("127.0.0.2", limit_per_source=1, limit_per_source_host=1) as connector:
        for end in (
            closed, detached, forgotten, refused, of_its_own, nameless, given_up, without_a_protocol, aborted,
            refused_by_asyncio,
        ):  # fmt: skip
            await end()
            await settled(lambda: places(connector) == (0, 0))
            assert [origin.connecting for origin in connector._dialer.roster.listed] == [0]
            async with asyncio.timeout(5):
                (await connector.connect(HOST, port)).close()


@pytest.mark.parametrize("options", [{"rate_per_source": 10}, {"rate_per_source_host": 10}])
async def test_connects_per_second(port: int, options: dict[str, Any]) -> None:
    async with aiobind.Connector("127.0.0.2", **options) as connector:
        started = time.perf_counter()
        assert await addresses(connector, port, 4) == ["2"] * 4
        assert time.perf_counter() - started > 0.25
        started = time.perf_counter()
        await asyncio.gather(*(addresses(connector, port, 1) for _ in range(4)))
        assert time.perf_counter() - started > 0.25


async def test_the_next_source_whose_turn_has_come(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=InOrder(), rate_per_source=2) as connector:
        assert await addresses(connector, port, 2) == ["2", "3"]
        started = time.perf_counter()
        both = await asyncio.gather(*(addresses(connector, port, 1) for _ in range(2)))
        assert sorted(both) == [["2"], ["3"]]  # each where the fewest wait
        assert time.perf_counter() - started > 0.3


async def test_a_rate_and_a_limit_together(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", rate_per_source=20, limit_per_source=2) as connector:
        assert await asyncio.gather(*(addresses(connector, port, 2) for _ in range(3))) == [["2", "2"]] * 3
        assert places(connector) == (0, 0)


async def test_whoever_gives_up_in_the_line_of_a_rate_holds_no_place(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", rate_per_source=1, limit_per_source=5) as connector:
        (await connector.connect(HOST, port)).close()
        tasks = [asyncio.create_task(connector.connect(HOST, port)) for _ in range(3)]
        await settled(lambda: connector._dialer.limits.waiting(connector._dialer.roster.listed[0]) == 3)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert places(connector) == (0, 0)
        assert connector._dialer.limits._pacing == {}


# ── what a source has failed at, in the story of a connect ──


class InOrder:
    def order(self, sources: Any, host: str) -> Iterator[Any]:
        return iter(sources)


@pytest.fixture
def make_silent() -> Iterator[Callable[..., int]]:
    """Make a port that answers no SYN: the kernel drops it while the backlog of the listener is full."""
    socks: list[socket.socket] = []

    def make(host: str = HOST, port: int = 0) -> int:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, port), family=family, backlog=0)
        socks.append(server)
        for _ in range(3):
            sock = socket.socket(family)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(server.getsockname())
            socks.append(sock)
        return server.getsockname()[1]

    yield make
    for sock in socks:
        sock.close()


# ── the short way of a single source ──


class Asked(InOrder):
    """Notes for which hosts it was asked."""

    def __init__(self) -> None:
        self.hosts: list[str] = []

    def order(self, sources: Any, host: str) -> Iterator[Any]:
        self.hosts.append(host)
        return iter(sources)


async def test_a_policy_of_the_callers_own_is_asked_though_there_is_one_source(port: int) -> None:
    policy = Asked()
    async with aiobind.Connector("127.0.0.2", policy=policy) as connector:
        for _ in range(3):
            (await connector.connect(HOST, port)).close()
        policy.order = lambda *_: iter(())  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="named no source"):
            await connector.connect(HOST, port)
    assert policy.hosts == [HOST] * 3


async def story(connector: aiobind.Connector, port: int, silent: int) -> list[aiobind.SourceStats]:
    """Do what leaves a trace in every figure; return the figures on the way, without those of time."""
    told: list[aiobind.SourceStats] = []

    def note() -> None:
        figures = connector.stats()[0]
        assert (figures.latency_p50 is None) is (figures.connects == 0)
        told.append(figures._replace(latency_p50=None, latency_p99=None))

    note()
    held = [await connector.connect(HOST, port) for _ in range(3)]
    note()
    held.pop().close()
    note()
    with pytest.raises(aiobind.ConnectError) as caught:
        await connector.connect(HOST, 1)
    assert caught.value.errno == errno.ECONNREFUSED
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await connector.connect(HOST, silent)
    note()
    _, writer = await connector.open_connection(HOST, port)
    writer.write(b"12345")
    await settled(lambda: connector.stats()[0].bytes_sent == 5)
    writer.close()
    await writer.wait_closed()
    note()
    for sock in held:
        sock.close()
    await settled(lambda: connector.stats()[0].connections == 0)
    note()
    return told


async def test_the_figures_are_the_same_by_the_short_way(port: int, make_silent: Callable[..., int]) -> None:
    silent, stories = make_silent(), []
    for options in ({}, {"policy": InOrder()}, {"limit_per_source": 50}, {"socket_options": [(1, 9, 1)]}):
        async with aiobind.Connector("127.0.0.2", **options) as connector:  # type: ignore[arg-type]
            stories.append(await story(connector, port, silent))
    for told in stories[1:]:
        # What the server has sent by the time that the third was closed, nobody knows.
        assert [figures._replace(bytes_received=0) for figures in told] == [
            figures._replace(bytes_received=0) for figures in stories[0]
        ]


def interpose(connector: aiobind.Connector, after: Callable[[], object]) -> None:
    """Do something right after the next connect has ended, before whoever waits for it goes on."""
    dialer = connector._dialer
    way = dialer._way
    assert way is not None

    async def interposed(sock: socket.socket, address: Any) -> None:
        dialer._way = way
        await way(sock, address)
        after()

    dialer._way = interposed


@pytest.mark.parametrize("times", [1, 3], ids=["first", "repeated"])
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
async def test_the_only_source_is_exchanged_while_it_connects(port: int, times: int, name: str) -> None:
    """Whoever waits goes on with the new one, as with the next one of several."""
    async with aiobind.Connector("127.0.0.2") as connector:
        assert await addresses(connector, port, times) == ["2"] * times

        def exchange() -> None:
            connector.add("127.0.0.3")
            connector.remove("127.0.0.2", drain=False)

        interpose(connector, exchange)
        assert await addresses(connector, port, 2, name) == ["3"] * 2


async def test_who_connects_while_it_is_closed_opens_no_watch_anew(port: int) -> None:
    connector = aiobind.Connector("if!lo")
    assert await addresses(connector, port, 3) == ["1"] * 3
    assert netlink_sockets() == 1
    interpose(connector, connector._dialer.close)
    (await connector.connect(HOST, port)).close()
    await settled(lambda: netlink_sockets() == 0)  # though the connector is still there


async def test_no_other_source_is_tried_once_it_is_closed(lab: Lab) -> None:
    with lab.far:
        server = socket.create_server(("", 80))
    connector = aiobind.Connector("if!n1", "if!n2", policy=InOrder())
    with server:
        (await connector.connect(lab.target_v4, 80)).close()

        def close() -> None:
            connector._dialer.close()
            lab.near.ip("link set n1 down")

        interpose(connector, close)
        with pytest.raises(RuntimeError, match="the connector is closed"):
            await connector.connect(lab.target_v4, 80)


async def test_what_is_learned_between_two_connects_counts_at_once(port: int) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        assert await addresses(connector, port, 3) == ["2"] * 3
        connector.report("127.0.0.2", host=HOST, ok=False, seconds=60)
        assert await addresses(connector, port, 1) == ["2"]  # there is no other one
        connector.add("127.0.0.3")
        assert await addresses(connector, port, 2) == ["3"] * 2
        connector.report("127.0.0.2", host=HOST, ok=True)
        assert sorted(await addresses(connector, port, 2)) == ["2", "3"]
        connector.remove("127.0.0.2")
        assert await addresses(connector, port, 2) == ["3"] * 2
        with aiobind.use_source("127.0.0.4"):
            assert await addresses(connector, port, 1) == ["4"]
        assert await addresses(connector, port, 1) == ["3"]


def failed(connector: aiobind.Connector, which: int, family: int = socket.AF_INET, *, due: bool = False) -> Any:
    """Have a source fail, and its time be over if it is *due*; return what stands before it."""
    origin = connector._dialer.roster.listed[which]
    connector._dialer.roster.fails(origin, family, aiobind.BindError(errno.ENETUNREACH, "made up"))
    breaker = origin.breakers[family]
    if due:
        breaker.until = time.monotonic()
        connector._dialer.roster._renew()
    else:
        breaker.until = time.monotonic() + 60
    return breaker


@pytest.mark.parametrize("options", [{}, {"limit_per_source": 1}, {"rate_per_source": 1000}], ids=str)
@pytest.mark.parametrize("source", ["127.0.0.2", "if!lo", "host!localhost"])
@pytest.mark.parametrize("silent", [False, True])
async def test_cancelled_at_each_step(
    port: int, make_silent: Callable[..., int], source: str, options: dict[str, Any], *, silent: bool
) -> None:
    """The place is given back, the probe is somebody else's, and nothing stays open."""
    number = make_silent() if silent else port
    async with aiobind.Connector(source, "192.0.2.77", policy=InOrder(), **options) as connector:
        (await connector.connect(HOST, port)).close()
        outcomes = []
        for steps in range(12):
            breaker = failed(connector, 0, due=True)
            task = asyncio.create_task(connector.connect(HOST, number, family=socket.AF_INET))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            try:
                (await task).close()
                outcomes.append("connected")
            except asyncio.CancelledError:
                outcomes.append("cancelled")
            assert places(connector) == (0, 0)
            assert not breaker.probing
            assert [origin.connecting for origin in connector._dialer.roster.listed] == [0, 0]
            assert open_connections(connector)[0] == 0
            assert connector._dialer.limits._pacing == {}
            (await connector.connect(HOST, port)).close()
            assert connector._dialer.roster.listed[0].breakers == {}
        assert outcomes[0] == "cancelled"
        assert ("connected" in outcomes) is not silent


async def test_a_probe_has_little_time_and_the_next_source_serves(port: int, make_silent: Callable[..., int]) -> None:
    """While it is under way, others take no notice of the source."""
    silent = make_silent()
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=InOrder()) as connector:
        breaker = failed(connector, 0, due=True)
        started = time.perf_counter()
        probe = asyncio.create_task(connector.connect(HOST, silent))
        await settled(lambda: breaker.probing)
        assert await addresses(connector, port, 3) == ["3", "3", "3"]
        await settled(lambda: not breaker.probing)
        assert time.perf_counter() - started > 0.35
        assert (breaker.failures, breaker.suspended(time.monotonic())) == (2, True)
        assert str(breaker.error).endswith("it has failed before, and gets no answer within 0.4 s")
        assert not probe.done()  # it waits by the other source
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        assert connector._dialer.roster.listed[1].breakers == {}


async def test_a_probe_that_works_ends_the_suspension(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=InOrder()) as connector:
        failed(connector, 0)
        connector._dialer.roster._renew()
        assert await addresses(connector, port, 2) == ["3", "3"]
        failed(connector, 0, due=True)
        assert await addresses(connector, port, 2) == ["2", "2"]
        assert connector._dialer.roster.listed[0].breakers == {}


async def test_a_probe_that_is_refused_by_the_target_has_worked(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=InOrder()) as connector:
        failed(connector, 0, due=True)
        with pytest.raises(ConnectionRefusedError):
            await connector.connect(HOST, free_port())
        assert await addresses(connector, port, 1) == ["2"]


async def test_a_family_that_works_has_all_the_time_beside_a_probe(
    make_silent: Callable[..., int], resolv_conf: Callable[..., None]
) -> None:
    resolv_conf("", hosts="127.0.0.1 both.test\n::1 both.test\n")
    number = make_silent()
    make_silent("::1", number)
    async with aiobind.Connector("if!lo", "127.0.0.3", policy=InOrder(), happy_eyeballs_delay=0.05) as connector:
        origin = connector._dialer.roster.listed[0]
        origin.works.add(socket.AF_INET6)
        breaker = failed(connector, 0, due=True)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.8):
                await connector.connect("both.test", number)
        assert (set(origin.breakers), breaker.failures, breaker.probing) == ({socket.AF_INET}, 1, False)


async def test_a_family_that_has_failed_is_left_out(resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts="127.0.0.1 both.test\n::1 both.test\n")
    tried: list[str | None] = []
    async with aiobind.Connector(
        "if!lo", happy_eyeballs_delay=None, on_event=lambda event: tried.append(event.destination)
    ) as connector:
        connector._dialer.roster.listed[0].works.add(socket.AF_INET6)
        failed(connector, 0)
        tried.clear()
        number = free_port()
        with pytest.raises(ConnectionRefusedError):
            await connector.connect("both.test", number)
        assert tried == [f"[::1]:{number}"]
        with pytest.raises(ConnectionRefusedError):  # where nothing is left, it is tried all the same
            await connector.connect(HOST, number)
        assert tried[1] == f"{HOST}:{number}"


@pytest.mark.parametrize("options", [{}, {"limit_per_source": 1}, {"rate_per_source": 5}], ids=str)
async def test_nobody_is_refused_because_of_what_was(port: int, options: dict[str, Any]) -> None:
    """Also when the turn of the only source comes after a wait, and it has failed meanwhile."""
    async with aiobind.Connector("if!lo", **options) as connector:
        first = await connector.connect(HOST, port)
        connector._dialer.roster.listed[0].works.add(socket.AF_INET6)
        failed(connector, 0)
        second = asyncio.create_task(connector.connect(HOST, port, family=socket.AF_INET))
        await turns_of_the_loop()
        first.close()
        async with asyncio.timeout(5):
            (await second).close()
        assert places(connector) == (0, 0)


async def test_what_is_exempt_says_nothing_about_the_source(port: int) -> None:
    with _namespace():  # without a route anywhere
        async with aiobind.Connector("127.0.0.2", "127.0.0.3", direct=["203.0.113.0/24"]) as connector:
            for _ in range(2):
                with pytest.raises(aiobind.AiobindError):
                    await connector.connect("203.0.113.7", 80)
            assert [figures.suspended_until for figures in connector.stats()] == [None, None]
            assert [figures.failures for figures in connector.stats()] == [{"ENETUNREACH": 2}, {"ENETUNREACH": 2}]
    async with aiobind.Connector("127.0.0.2", "127.0.0.3", policy=InOrder(), direct=[HOST]) as connector:
        breaker = failed(connector, 0, due=True)
        (await connector.connect(HOST, port)).close()
        with pytest.raises(ConnectionRefusedError):
            await connector.connect(HOST, free_port())
        assert connector._dialer.roster.listed[0].breakers == {socket.AF_INET: breaker}


async def test_a_policy_is_free_again_when_no_connector_came_of_it(port: int) -> None:
    policy = aiobind.Failover()
    try:
        aiobind.Connector("127.0.0.2", policy=policy, direct="localhost")
    except TypeError:
        async with aiobind.Connector("127.0.0.2", policy=policy) as connector:
            assert await addresses(connector, port, 1) == ["2"]


async def test_a_connection_that_has_survived_one_loss_is_told_of_the_next(lab: Lab) -> None:
    with lab.far:
        server = socket.create_server(("203.0.113.80", 80))
    gone: list[set[str]] = []
    connector = aiobind.Connector("if!n1", "if!n2", policy=InOrder())
    connector._dialer.on_lost = lambda: lambda socks, _: gone.append({sock.getsockname()[0] for sock in socks})
    with server:
        async with connector:
            with await connector.connect("203.0.113.80", 80):
                for times in (1, 2, 3):
                    lab.near.ip("link set n1 down")
                    await settled(lambda times=times: len(gone) == times)
                    lab.near.ip("link set n1 up")
                    await settled(lambda: connector.stats()[0].suspended_until is None)
    assert gone == [{"198.18.1.2"}] * 3


# ── ports ──


async def test_ten_ports_hold_ten_connections_to_each_of_five_destinations() -> None:
    """A bind that leaves the port to connect(2) shares it among destinations; asyncio's local_addr reserves it."""
    with _namespace() as namespace:
        namespace.sysctl("ipv4.ip_local_port_range", "50000 50009")
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(asyncio.Protocol, f"127.1.0.{n}", 80) for n in range(5)]
        held: list[socket.socket] = []
        async with aiobind.Connector("127.0.0.2") as connector:
            for n in range(5):
                held += [await connector.connect(f"127.1.0.{n}", 80) for _ in range(10)]
            assert len({sock.getsockname() for sock in held}) == 10
            with pytest.raises(aiobind.BindError, match="port is left for this destination") as caught:
                await connector.connect("127.1.0.0", 80)
            assert caught.value.errno == errno.EADDRNOTAVAIL
        for sock in held:
            sock.close()

        transports = []
        with pytest.raises(OSError, match=r"(?i)address already in use"):  # noqa: PT012
            for n in range(50):
                local = ("127.0.0.4", 0)
                made = await loop.create_connection(asyncio.Protocol, f"127.1.0.{n % 5}", 80, local_addr=local)
                transports.append(made[0])
        assert len(transports) == 10
        for transport in transports:
            transport.abort()
        for server in servers:
            server.close()


def _namespace() -> Any:
    try:
        return _Entered(Namespace.new())
    except OSError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no namespace: {error}")


class _Entered:
    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    def __enter__(self) -> Namespace:
        self._namespace.__enter__()
        return self._namespace

    def __exit__(self, *_: object) -> None:
        self._namespace.__exit__()
        self._namespace.close()


# ── names ──


@pytest.fixture
def dns(resolv_conf: Callable[..., None]) -> Iterator[DnsServer]:
    with DnsServer() as server:
        resolv_conf(server.resolv_conf)
        yield server


async def test_fifty_connects_from_one_slow_name(dns: DnsServer) -> None:
    dns.add("slow.test", "127.0.0.7", delay=1.5)
    lags: list[float] = []

    async def measure() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - started)

    async with serving() as port, aiobind.Connector("host!slow.test") as connector:
        measuring = asyncio.create_task(measure())
        started = time.perf_counter()
        socks = await asyncio.gather(*(connector.connect(HOST, port) for _ in range(50)))
        took = time.perf_counter() - started
        measuring.cancel()
    assert {sock.getsockname()[0] for sock in socks} == {"127.0.0.7"}
    assert dns.queries["slow.test", "A"] == 1
    assert 1.4 < took < 4
    assert sorted(lags)[len(lags) * 99 // 100] < 0.1, "the loop never waits for the name"
    for sock in socks:
        sock.close()
