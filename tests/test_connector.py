from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
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
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from dns_server import DnsServer

import aiobind
from aiobind.lab import Namespace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

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


async def test_only_tcp() -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        with pytest.raises(NotImplementedError, match="proto: only TCP is available yet"):
            await connector.create_connection(asyncio.Protocol, HOST, 80, proto=socket.IPPROTO_MPTCP)


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
        (("if!a",), {"fast_connect": True}, NotImplementedError, "fast_connect=True is not available yet"),
    ],
)
def test_a_senseless_connector(sources: Any, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        aiobind.Connector(*sources, **options)


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
