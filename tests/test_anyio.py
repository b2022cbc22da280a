"""``connect_tcp`` on asyncio, uvloop and trio: the source on the wire, anyio's ways, and nothing left behind."""

from __future__ import annotations

import errno
import math
import os
import socket
import ssl
import struct
from collections import Counter
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_address
from threading import Thread
from typing import TYPE_CHECKING, Any

import aiolimiter  # noqa: F401 - it reads a file when it is imported first
import anyio
import anyio.lowlevel
import pytest
import trustme
from anyio.abc import ByteStreamConnectable, SocketAttribute, SocketListener, SocketStream
from anyio.streams.tls import TLSAttribute, TLSConnectable, TLSListener, TLSStream
from dns_server import DnsServer
from with_trio import anyio_backend, no_tasks_left_in_trio, until  # noqa: F401 - fixtures

import aiobind
from aiobind._guest import hosted
from aiobind._streams import stream_of
from aiobind.anyio import TCPConnectable, connect_tcp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from aiobind.lab import Lab, Witness

    Serve = Callable[[SocketStream], Awaitable[None]]

pytestmark = pytest.mark.anyio

V4, V6 = "203.0.113.80", "2001:db8:ffff::80"
HOST = "127.0.0.1"
#: On the link of n1, and nobody's: `silent` has the SYN sent there.
BLACK_HOLE = "198.18.1.99"
#: To close is to reset.
LINGER_0 = struct.pack("ii", 1, 0)


async def greet(stream: SocketStream) -> None:
    """Tell the peer who it is, and echo what it says."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        async with stream:
            await stream.send(stream.extra(SocketAttribute.remote_address)[0].encode() + b"\n")
            async for data in stream:
                await stream.send(data)


async def be_silent(stream: SocketStream) -> None:
    async with stream:
        await anyio.sleep_forever()


@asynccontextmanager
async def serving(serve: Serve = greet, *, lab: Lab | None = None, tls: ssl.SSLContext | None = None) -> Any:
    """Serve on a port of 127.0.0.1, which is the value, or on port 80 of the far side of *lab*."""
    if lab is None:
        sockets = [socket.create_server((HOST, 0))]
    else:
        with lab.far:
            sockets = [socket.create_server(("", 80), family=family) for family in (socket.AF_INET, socket.AF_INET6)]
    listeners: list[Any] = [await SocketListener.from_socket(sock) for sock in sockets]
    if tls is not None:
        listeners = [TLSListener(listener, tls, standard_compatible=False) for listener in listeners]
    try:
        async with anyio.create_task_group() as tasks:
            for listener in listeners:
                tasks.start_soon(listener.serve, serve)
            yield sockets[0].getsockname()[1]
            tasks.cancel_scope.cancel()
    finally:
        for sock in sockets:
            sock.close()


def connections(connector: aiobind.Connector) -> list[int]:
    return [figures.connections for figures in connector.stats()]


def syns(witness: Witness) -> Counter[tuple[str, str]]:
    begun = {(packet.nic, packet.source, packet.sport) for packet in witness.packets() if packet.syn}
    return Counter((nic, source) for nic, source, _ in begun)


def silent(lab: Lab, nic: str = "n1") -> None:
    lab.near.ip(f"neigh add {BLACK_HOLE} lladdr 02:00:00:00:00:99 dev {nic}")


# ── the source, on the wire ──


@pytest.mark.parametrize(
    ("by", "source", "target", "nic", "address", "interface"),
    [
        ("source", "if!n1", V4, "n1", "198.18.1.2", "n1"),
        ("source", "if!n2", V6, "n2", "2001:db8:2::2", "n2"),
        ("source", "198.18.1.2", V4, "n0", "198.18.1.2", None),
        ("source", "2001:db8:2::2", V6, "n0", "2001:db8:2::2", None),
        ("source", "ifhost!n1!198.18.1.2", V4, "n1", "198.18.1.2", "n1"),
        ("source", "ifhost!n2!2001:db8:2::2", V6, "n2", "2001:db8:2::2", "n2"),
        ("connector", "if!n1", V4, "n1", "198.18.1.2", "n1"),
        ("connector", "if!n2", V6, "n2", "2001:db8:2::2", "n2"),
        ("pin of a connector", "if!n1", V4, "n1", "198.18.1.2", "n1"),
        ("use_source", "if!n1", V6, "n1", "2001:db8:1::2", "n1"),
        ("connectable", "if!n1", V4, "n1", "198.18.1.2", "n1"),
    ],
)
async def test_source_and_egress(
    lab: Lab, witness: Witness, by: str, source: str, target: str, nic: str, address: str, interface: str | None
) -> None:
    other = aiobind.Connector("if!n0")
    connector = aiobind.Connector(source)
    async with serving(lab=lab):
        with anyio.fail_after(10):
            match by:
                case "source":
                    stream = await connect_tcp(target, 80, source=source)
                case "connector":
                    stream = await connect_tcp(ip_address(target), 80, connector=connector)
                case "pin of a connector":
                    stream = await connect_tcp(target, 80, connector=other, source=source)
                case "use_source":
                    with aiobind.use_source(source):
                        stream = await connect_tcp(target, 80)
                case _:
                    stream = await TCPConnectable(target, 80, source=source).connect()
        async with stream:
            assert await stream.receive() == f"{address}\n".encode()
            bound = aiobind.bound_source(stream)
            assert bound[1:3] == (interface, address)
            assert str(bound.source) == source
            assert stream.extra(SocketAttribute.local_address) == (address, bound.port)
            assert stream.extra(SocketAttribute.local_port) == bound.port
            assert stream.extra(SocketAttribute.remote_address) == (target, 80)
            assert stream.extra(SocketAttribute.remote_port) == 80
            assert stream.extra(SocketAttribute.family) == (socket.AF_INET6 if ":" in target else socket.AF_INET)
            assert stream.extra(SocketAttribute.raw_socket).getsockname()[:2] == (address, bound.port)
    with pytest.raises(LookupError, match="not made by aiobind, or is closed"):
        aiobind.bound_source(stream)
    assert syns(witness) == {(nic, address): 1}
    await connector.aclose()
    await other.aclose()


async def test_bound_source_of_streams_that_anyio_made(anyio_backend_name: str) -> None:
    async with serving() as port:
        foreign = await anyio.connect_tcp(HOST, port)
        streams = [foreign]
        if anyio_backend_name == "asyncio":  # which takes a socket of ours
            sock = await aiobind.connect(HOST, port, source="127.0.0.2")
            streams.append(await SocketStream.from_socket(sock))
            assert aiobind.bound_source(streams[1]).address == "127.0.0.2"
        with pytest.raises(LookupError, match="not made by aiobind"):
            aiobind.bound_source(foreign)
        for stream in streams:
            await stream.aclose()
            await anyio.sleep(0.01)
            with pytest.raises(LookupError, match="not made by aiobind, or is closed"):
                aiobind.bound_source(stream)


async def test_an_argument_wins_over_what_the_context_pins() -> None:
    async with serving() as port:
        with aiobind.use_source("127.0.0.9"):
            async with await connect_tcp(HOST, port, source="127.0.0.5") as stream:
                assert await stream.receive() == b"127.0.0.5\n"


async def test_a_connectors_own_pin() -> None:
    async with serving() as port, aiobind.Connector("127.0.0.2", "127.0.0.3") as connector:
        with connector.use_source("127.0.0.4"), aiobind.use_source("127.0.0.9"):
            async with await connect_tcp(HOST, port, connector=connector) as stream:
                assert await stream.receive() == b"127.0.0.4\n"


# ── errors ──


async def test_a_missing_interface(lab: Lab, witness: Witness) -> None:
    for call in (
        lambda: connect_tcp(V4, 80, source="if!n9"),
        lambda: connect_tcp(V4, 80, source="if!n9", tls=True),
        TCPConnectable(V4, 80, source="if!n9").connect,
    ):
        with pytest.raises(OSError, match="no interface named 'n9'") as caught:  # as anyio's users catch it
            await call()
        assert caught.value.errno == errno.ENODEV
    # anyio promises ConnectionFailed of connectables, and of them only (4.10 to 4.16).
    assert type(caught.value) is anyio.ConnectionFailed
    assert isinstance(caught.value.__cause__, aiobind.BindError)
    assert not witness.packets()


async def test_refused() -> None:
    with socket.socket() as nobody:
        nobody.bind((HOST, 0))
        async with aiobind.Connector("127.0.0.2") as connector:
            with pytest.raises(ConnectionRefusedError) as caught:
                await connect_tcp(HOST, nobody.getsockname()[1], connector=connector)
            assert isinstance(caught.value, aiobind.ConnectError)
            (figures,) = connector.stats()
            assert (figures.connections, figures.failures) == (0, {"ECONNREFUSED": 1})


async def test_what_is_refused_before_anything_is_tried() -> None:
    for local in ("local_host", "local_port"):
        with pytest.raises(TypeError, match=f"{local} is not taken here: the source names the local end"):
            await connect_tcp(HOST, 80, source="127.0.0.2", **{local: 0})  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="no source: name one, as in source='if!eth0', or give connector="):
        await connect_tcp(HOST, 80)
    with pytest.raises(TypeError, match="no source"):
        await TCPConnectable(HOST, 80).connect()
    with pytest.raises(aiobind.InvalidSource):
        await connect_tcp(HOST, 80, source="eth0")
    with pytest.raises(aiobind.InvalidSource):
        TCPConnectable(HOST, 80, source="eth0")
    for port in (0, 65536):
        with pytest.raises(ValueError, match=f"the port must be 1 to 65535, not {port}"):
            TCPConnectable(HOST, port)
        with pytest.raises(ValueError, match=f"the port must be 1 to 65535, not {port}"):
            await connect_tcp(HOST, port, source="127.0.0.2")


async def test_connectables_wherever_anyio_takes_one(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = contexts
    async with serving(tls=server) as port:
        plain = TCPConnectable(HOST, port, source="127.0.0.2")
        assert isinstance(plain, ByteStreamConnectable)
        assert anyio.as_connectable(plain) is plain
        secured = TLSConnectable(plain, hostname="localhost", ssl_context=client, standard_compatible=False)
        async with await secured.connect() as stream:
            assert await stream.receive() == b"127.0.0.2\n"
            assert aiobind.bound_source(stream).address == "127.0.0.2"


# ── TLS ──


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.mark.parametrize("compatible", [True, False])
async def test_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext], *, compatible: bool) -> None:
    server, client = contexts
    async with serving(tls=server) as port, aiobind.Connector("127.0.0.2") as connector:
        for name in ({"tls_hostname": "localhost"}, {}):
            stream = await connect_tcp(
                HOST if name else "localhost",
                port,
                connector=connector,
                ssl_context=client,
                tls_standard_compatible=compatible,
                **name,
            )
            assert isinstance(stream, TLSStream)
            assert await stream.receive() == b"127.0.0.2\n"
            assert aiobind.bound_source(stream)[1:3] == (None, "127.0.0.2")
            assert stream.extra(SocketAttribute.remote_port) == port
            assert stream.extra(TLSAttribute.standard_compatible) == compatible
            assert connections(connector) == [1]
            assert stream.extra(SocketAttribute.raw_socket).unfinished is False
            if compatible:
                await anyio.aclose_forcefully(stream)
            else:
                await stream.aclose()
            assert connections(connector) == [0]


async def test_tls_with_the_wrong_name(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = contexts
    async with serving(tls=server) as port, aiobind.Connector("127.0.0.2") as connector:
        with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
            await connect_tcp(HOST, port, connector=connector, ssl_context=client)
        assert connections(connector) == [0]
        with pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed|unable to get local issuer"):
            await connect_tcp("localhost", port, connector=connector, tls=True)
        assert connections(connector) == [0]


async def test_a_tls_handshake_that_hangs_is_cancelled() -> None:
    async with serving(be_silent) as port, aiobind.Connector("127.0.0.2") as connector:
        with anyio.move_on_after(0.1) as scope:
            await connect_tcp(HOST, port, connector=connector, tls=True)
        assert scope.cancelled_caught
        assert connections(connector) == [0]


async def test_a_tls_handshake_that_the_peer_resets() -> None:
    async def reset(stream: SocketStream) -> None:
        await stream.receive()
        await reset_by(stream)

    async with serving(reset) as port, aiobind.Connector("127.0.0.2") as connector:
        with pytest.raises(anyio.BrokenResourceError) as caught, anyio.fail_after(10):
            await connect_tcp(HOST, port, connector=connector, tls=True)
        assert isinstance(caught.value.__cause__, OSError)
        assert connections(connector) == [0]


async def test_a_tls_handshake_ends_with_its_link(lab: Lab) -> None:
    async with serving(be_silent, lab=lab), aiobind.Connector("if!n1") as connector:
        async with anyio.create_task_group() as tasks:
            attempt = Attempt(tasks, V4, 80, connector=connector, tls=True)
            await until(lambda: connections(connector) == [1])
            await anyio.sleep(0.05)
            lab.near.ip("link set n1 down")
            assert isinstance(await attempt.error(), anyio.BrokenResourceError)
        assert connections(connector) == [0]


# ── cancellation ──


class Attempt:
    """A call of ``connect_tcp`` in a task of its own."""

    def __init__(self, tasks: anyio.abc.TaskGroup, host: str, port: int, **options: Any) -> None:
        self.done = anyio.Event()
        self.failure: Exception | None = None
        self.stream: Any = None
        tasks.start_soon(self._run, host, port, options)

    async def _run(self, host: str, port: int, options: dict[str, Any]) -> None:
        try:
            self.stream = await connect_tcp(host, port, **options)
        except Exception as error:
            self.failure = error
        finally:
            self.done.set()

    async def error(self) -> Exception | None:
        with anyio.fail_after(10):
            await self.done.wait()
        return self.failure


async def test_a_connect_that_gets_no_answer_is_cancelled(lab: Lab, witness: Witness) -> None:
    silent(lab)
    async with aiobind.Connector("if!n1", "if!n2") as connector:
        with anyio.move_on_after(0.1) as scope:
            await connect_tcp(BLACK_HOLE, 80, connector=connector)
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.1):
                await connect_tcp(BLACK_HOLE, 80, source="if!n1")
        async with anyio.create_task_group() as tasks:
            attempts = [Attempt(tasks, BLACK_HOLE, 80, connector=connector, source="if!n1") for _ in range(20)]
            await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()
        assert all(attempt.done.is_set() and attempt.stream is None for attempt in attempts)
        assert connections(connector) == [0, 0]
        assert {nic for nic, _ in syns(witness)} == {"n1"}


async def test_a_scope_that_was_cancelled_before() -> None:
    async with serving() as port, aiobind.Connector("127.0.0.2") as connector:
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with await connect_tcp(HOST, port, connector=connector):
                await anyio.sleep(0)
                pytest.fail("not cancelled")
        assert connections(connector) == [0]


async def test_a_cancellation_at_any_turn_loses_no_socket() -> None:
    async with serving() as port, aiobind.Connector("127.0.0.2") as connector:
        for turns in range(12):
            async with anyio.create_task_group() as tasks:
                attempt = Attempt(tasks, HOST, port, connector=connector)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            if attempt.stream is not None:
                await attempt.stream.aclose()
            assert connections(connector) == [0]


async def test_a_race_is_cancelled(lab: Lab, resolv_conf: Callable[..., None]) -> None:
    """anyio cancels a task of asyncio's again and again, also while it cleans up."""
    dead = [f"198.18.1.{number}" for number in range(90, 99)]
    lab.near.ip(*(f"neigh add {address} lladdr 02:00:00:00:00:99 dev n1" for address in dead))
    resolv_conf("", hosts="".join(f"{address} dead.test\n" for address in dead))
    async with aiobind.Connector("if!n1", happy_eyeballs_delay=0.002) as connector:
        with anyio.move_on_after(0.1) as scope:
            await connect_tcp("dead.test", 80, connector=connector)
        assert scope.cancelled_caught
        assert connections(connector) == [0]


def in_a_thread(function: Callable[..., object], *args: Any, **options: Any) -> None:
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **options))
        except BaseException as error:
            future.set_exception(error)

    thread = Thread(target=run)  # a new one, for it shall be in this lab
    thread.start()
    thread.join()
    future.result()


def test_a_run_that_ends_amid_a_connect_and_with_a_forgotten_connector(lab: Lab, anyio_backend: Any) -> None:  # noqa: F811
    async def main() -> None:
        connector = aiobind.Connector("if!n1")
        async with anyio.create_task_group() as tasks:
            Attempt(tasks, BLACK_HOLE, 80, connector=connector)
            await anyio.sleep(0.05)
            raise LookupError

    silent(lab)
    with pytest.raises(ExceptionGroup, match=r"unhandled|Exceptions"):
        in_a_thread(anyio.run, main, backend=anyio_backend[0], backend_options=anyio_backend[1])


# ── several sources ──


async def test_failover(lab: Lab, witness: Witness) -> None:
    async with serving(lab=lab), aiobind.Connector("if!n9", "if!n1", policy=aiobind.Failover()) as connector:
        for _ in range(3):
            async with await connect_tcp(V4, 80, connector=connector) as stream:
                assert aiobind.bound_source(stream).interface == "n1"
        with pytest.raises(aiobind.BindError, match="no interface named 'n9'"):  # what is pinned stays
            await connect_tcp(V4, 80, connector=connector, source="if!n9")
        lab.near.ip("link set n1 down")
        with pytest.raises(aiobind.BindError) as caught:
            await connect_tcp(V4, 80, connector=connector)
        assert caught.value.errno in (errno.ENODEV, errno.ENETUNREACH)
    assert syns(witness) == {("n1", "198.18.1.2"): 3}


async def test_an_attempt_ends_with_its_link(lab: Lab) -> None:
    silent(lab)
    async with aiobind.Connector("if!n1") as connector, anyio.create_task_group() as tasks:
        attempt = Attempt(tasks, BLACK_HOLE, 80, connector=connector)
        await anyio.sleep(0.1)
        assert not attempt.done.is_set()
        lab.near.ip("link set n1 down")
        error = await attempt.error()
        assert isinstance(error, aiobind.BindError)
        assert error.errno == errno.ENETUNREACH
        assert "since the attempt began" in str(error)


async def test_established_connections_are_cut_where_asked(lab: Lab) -> None:
    async with serving(lab=lab), aiobind.Connector("if!n1", abort_on_link_down=True) as connector:
        async with await connect_tcp(V4, 80, connector=connector) as stream:
            await stream.receive()
            lab.near.ip("link set n1 down")
            with pytest.raises(anyio.BrokenResourceError) as caught, anyio.fail_after(10):
                await stream.receive()
            assert isinstance(caught.value.__cause__, ConnectionResetError)
        assert connections(connector) == [0]


async def test_a_second_one_waits_for_room() -> None:
    async with (
        serving() as port,
        aiobind.Connector("127.0.0.2", limit_per_source=1) as connector,
        anyio.create_task_group() as tasks,
    ):
        first = await connect_tcp(HOST, port, connector=connector)
        waiting = [Attempt(tasks, HOST, port, connector=connector) for _ in range(2)]
        await anyio.sleep(0.05)
        assert not any(attempt.done.is_set() for attempt in waiting)
        with anyio.move_on_after(0.01):
            await connect_tcp(HOST, port, connector=connector)
            pytest.fail("there is no room")
        await first.aclose()
        await until(lambda: any(attempt.done.is_set() for attempt in waiting))
        await anyio.sleep(0.01)
        waiting.sort(key=lambda attempt: not attempt.done.is_set())  # trio starts tasks in no order
        second, third = waiting
        assert await second.error() is None
        assert not third.done.is_set()
        with pytest.warns(ResourceWarning, match="unclosed"):
            second.stream = None  # forgotten, not closed
        assert await third.error() is None
        await third.stream.aclose()
        assert connections(connector) == [0]


async def test_figures() -> None:
    async with serving() as port, aiobind.Connector("127.0.0.2") as connector:
        stream = await connect_tcp(HOST, port, connector=connector)
        await stream.receive()
        await stream.send(b"x" * 100)
        received = 0
        while received < 100:
            received += len(await stream.receive())
        assert connections(connector) == [1]
        await stream.aclose()
        await stream.aclose()
        (figures,) = connector.stats()
        assert (figures.connections, figures.connects, figures.bytes_sent, figures.bytes_received) == (0, 1, 100, 110)

        stream = await connect_tcp(HOST, port, connector=connector)
        with pytest.warns(ResourceWarning, match="unclosed"):
            del stream  # forgotten
        assert connections(connector) == [0]


async def test_what_a_connector_can_do_outside_of_a_connect() -> None:
    """All that does not wait needs no loop of asyncio's around it."""
    async with serving() as port:
        connector = aiobind.Connector("127.0.0.2", policy=aiobind.Failover(), limit_per_source=1)
        first = await connect_tcp(HOST, port, connector=connector)
        async with anyio.create_task_group() as tasks:
            attempt = Attempt(tasks, HOST, port, connector=connector)
            await anyio.sleep(0.02)
            assert not attempt.done.is_set()
            connector.add("127.0.0.3")  # which has room
            assert await attempt.error() is None
            assert aiobind.bound_source(attempt.stream).address == "127.0.0.3"
        connector.report("127.0.0.2", host=HOST, seconds=100)
        await attempt.stream.aclose()
        await first.aclose()
        async with await connect_tcp(HOST, port, connector=connector) as stream:
            assert aiobind.bound_source(stream).address == "127.0.0.3"
            await stream.receive()
            connector.remove("127.0.0.3", drain=False)
            with pytest.raises(anyio.BrokenResourceError), anyio.fail_after(10):
                await stream.receive()
        assert connections(connector) == [0]
        # It is forgotten, not closed, and takes the interface watch along while the run goes on.


async def test_the_pace_of_a_source() -> None:
    async with serving() as port, aiobind.Connector("127.0.0.2", rate_per_source=19) as connector:
        start = anyio.current_time()
        for _ in range(3):
            async with await connect_tcp(HOST, port, connector=connector):
                pass
        assert anyio.current_time() - start > 0.09


async def test_one_connector_serves_one_run() -> None:
    connector = aiobind.Connector("127.0.0.2")
    async with serving() as port:
        await (await connect_tcp(HOST, port, connector=connector)).aclose()

        async def main() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                await connect_tcp(HOST, port, connector=connector)

        await anyio.to_thread.run_sync(partial(anyio.run, main, backend="trio"))
        await connector.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await connect_tcp(HOST, port, connector=connector)


# ── names ──


@pytest.fixture
def dns(lab: Lab) -> Iterator[DnsServer]:
    """A name server on the far side."""
    with DnsServer(V4, V6, namespace=lab.far) as server:
        yield server


async def test_names_are_asked_for_in_the_pin(lab: Lab, witness: Witness, dns: DnsServer) -> None:
    dns.add("both.test", V4, V6)
    async with serving(lab=lab), aiobind.Connector("if!n1", dns=(V4,)) as connector:
        with anyio.fail_after(10):
            async with await connect_tcp("both.test", 80, connector=connector) as stream:
                assert aiobind.bound_source(stream).interface == "n1"
        with pytest.raises(aiobind.ResolveError) as caught:
            await connect_tcp("no.test", 80, connector=connector)
        assert isinstance(caught.value, socket.gaierror)
    asked = {(packet.nic, packet.dport) for packet in witness.packets() if packet.dport == 53 or packet.syn}
    assert asked == {("n1", 53), ("n1", 80)}


async def test_fifty_slow_names_hold_up_nobody(lab: Lab, dns: DnsServer, resolv_conf: Callable[..., None]) -> None:
    resolv_conf(f"nameserver {V4}\noptions timeout:30 attempts:1\n")
    names = [f"held{number}.test" for number in range(50)]
    for name in names:
        dns.add(name, "198.18.1.2", delay=math.inf)
    async with serving(lab=lab), anyio.create_task_group() as tasks:
        attempts = [Attempt(tasks, V4, 80, source=f"host!{name}") for name in names]
        await until(lambda: dns.queries)
        for _ in range(50):
            await anyio.lowlevel.checkpoint()
        with anyio.fail_after(20):
            async with await connect_tcp(V4, 80, source="if!n1") as stream:  # meanwhile
                await stream.receive()
        assert not any(attempt.done.is_set() for attempt in attempts)
        for name in names:
            dns.release(name)
        for attempt in attempts:
            assert await attempt.error() is None
            assert aiobind.bound_source(attempt.stream).address == "198.18.1.2"
            await attempt.stream.aclose()


async def test_a_look_up_that_two_wait_for_outlives_the_first(lab: Lab, dns: DnsServer) -> None:
    dns.add("held.test", V4, delay=math.inf)
    async with serving(lab=lab), aiobind.Connector("if!n1", dns=(V4,)) as connector, anyio.create_task_group() as tasks:
        async with anyio.create_task_group() as first:
            Attempt(first, "held.test", 80, connector=connector)
            await until(lambda: dns.queries)
            second = Attempt(tasks, "held.test", 80, connector=connector)
            await anyio.sleep(0.05)
            first.cancel_scope.cancel()
        assert not second.done.is_set()
        dns.release("held.test")
        assert await second.error() is None
        await second.stream.aclose()
    assert set(dns.queries.values()) == {1}


@pytest.mark.parametrize("delay", [None, 0.01, math.inf])
async def test_happy_eyeballs(lab: Lab, resolv_conf: Callable[..., None], delay: float | None) -> None:
    silent(lab)
    resolv_conf("", hosts=f"{BLACK_HOLE} both.test\n{V4} both.test\n")
    async with serving(lab=lab), aiobind.Connector("if!n1", happy_eyeballs_delay=0.02) as connector:
        for options in ({"source": "if!n1"}, {"connector": connector}):
            stream = None
            with anyio.move_on_after(0.2 if delay == math.inf else 10):
                stream = await connect_tcp("both.test", 80, happy_eyeballs_delay=delay, **options)  # type: ignore[arg-type]
            if delay == math.inf:
                assert stream is None
            else:
                assert stream is not None
                assert stream.extra(SocketAttribute.remote_address) == (V4, 80)
                await stream.aclose()
        assert connections(connector) == [0]


# ── the stream ──


async def reset_by(stream: SocketStream) -> None:
    sock = stream.extra(SocketAttribute.raw_socket)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    await anyio.aclose_forcefully(stream)


async def test_much_data_both_ways() -> None:
    payload = os.urandom(1 << 24)
    async with serving() as port, await connect_tcp(HOST, port, source="127.0.0.2") as stream:
        await stream.receive(100)
        assert stream.extra(SocketAttribute.raw_socket).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        got = bytearray()

        async def receive() -> None:
            async for data in stream:
                got.extend(data)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive)
                await stream.send(b"")
                await stream.send(payload)
                await stream.send_eof()
        assert bytes(got) == payload


async def test_what_is_not_received_is_not_read() -> None:
    """The peer is held up by the window, as it is with ``anyio.connect_tcp``."""
    sent = 0

    async def flood(stream: SocketStream) -> None:
        nonlocal sent
        with suppress(anyio.BrokenResourceError):
            async with stream:
                while True:
                    await stream.send(bytes(1 << 16))
                    sent += 1 << 16

    async with serving(flood) as port, await connect_tcp(HOST, port, source="127.0.0.2"):
        last = -1
        while last != sent and sent < 100 << 20:
            last = sent
            await anyio.sleep(0.1)
        assert sent < 50 << 20


async def test_the_errors_of_a_stream() -> None:
    async with serving() as port:
        stream = await connect_tcp(HOST, port, source="127.0.0.2")
        with pytest.raises(ValueError, match="max_bytes"):
            await stream.receive(0)
        assert await stream.receive(4) == b"127."
        assert await stream.receive() == b"0.0.2\n"
        with anyio.move_on_after(0.01):
            await stream.receive()
            pytest.fail("there is nothing")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await stream.send(b"not this")
        await stream.send(b"this")
        with anyio.fail_after(10):
            assert await stream.receive() == b"this"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(closed_error, stream.receive)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await stream.receive()
            await stream.aclose()
        for call in (stream.receive, lambda: stream.send(b"x")):
            await closed_error(call)
        await stream.send_eof()


async def test_each_call_lets_others_run() -> None:
    async with serving() as port, await connect_tcp(HOST, port, source="127.0.0.2") as stream:
        await stream.receive()
        await stream.send(bytes(100))
        await anyio.wait_readable(stream.extra(SocketAttribute.raw_socket))
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            for call in (partial(stream.receive, 1), partial(stream.send, b"x"), stream.send_eof, stream.aclose):
                before = turns
                for _ in range(10):
                    await call()
                assert turns >= before + 5, call  # trio runs the tasks of a turn in no order
            tasks.cancel_scope.cancel()
        assert stream.extra(SocketAttribute.family) == socket.AF_INET


async def closed_error(call: Callable[[], Awaitable[object]]) -> None:
    with anyio.fail_after(10), pytest.raises(anyio.ClosedResourceError):
        await call()


async def test_a_peer_that_resets_at_once() -> None:
    """Before anybody has made a stream of it, and when it has no peer name any more."""
    with socket.create_server((HOST, 0)) as server:
        server.setblocking(False)
        for _ in range(5):
            sock = await aiobind_connect(server)
            with server.accept()[0] as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
            async with stream_of(sock) as stream:
                with anyio.fail_after(10), pytest.raises(anyio.BrokenResourceError) as caught:
                    await stream.receive()
                assert isinstance(caught.value.__cause__, ConnectionResetError)
                with pytest.raises(anyio.BrokenResourceError):
                    await stream.send(b"x")
                await stream.send_eof()
                assert aiobind.bound_source(stream).address == "127.0.0.2"
                with pytest.raises(anyio.TypedAttributeLookupError):
                    stream.extra(SocketAttribute.remote_address)


async def aiobind_connect(server: socket.socket) -> Any:
    return await hosted(aiobind.connect(*server.getsockname(), source="127.0.0.2"))


async def test_the_end_of_the_stream() -> None:
    async def end(stream: SocketStream) -> None:
        async with stream:
            await stream.send(b"bye")

    async with serving(end) as port, await connect_tcp(HOST, port, source="127.0.0.2") as stream:
        with anyio.fail_after(10):
            assert [data async for data in stream] == [b"bye"]
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()


# ── what is relied on ──


def test_the_one_private_name_of_anyio() -> None:
    """``SocketStream`` makes its attributes of it."""
    assert isinstance(SocketStream._raw_socket, property)  # type: ignore[attr-defined]
