"""What breaks while a connection is made: each fault ends in a right answer or a clear error; nothing leaks or hangs.

Faults that other files show, not repeated here:

- no descriptor for the very first socket, or for the look-up: test_connector, test_sockets, test_resolve;
- all ports taken from a literal address, for each destination by itself: test_connector;
- a black hole before an address that answers: test_egress; the timeouts of aiohttp: test_aiohttp;
- an attempt whose link or address goes away: test_egress; a failed handshake of TLS, the next address: test_aiohttp;
- a netlink queue that overflows (ENOBUFS), a list refused, cut or interrupted: test_interfaces, test_platform;
- a resolver that is silent when the program ends, by a timeout and by Ctrl-C: test_resolve;
- each rcode of a DNS server, no thread, no descriptor: test_resolve; a race cancelled in any turn, two winners in the
  same turn, on a scripted clock: test_race; thousands of connects cancelled at random: test_connector, test_aiohttp;
- a connector used in a second loop after the first: test_connector, test_aiohttp; one watch for each loop:
  test_interfaces; threads that share a factory: test_factory.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import gc
import platform
import resource
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import count
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import pytest
import trustme
from dns_server import NXDOMAIN, SERVFAIL, DnsServer

import aiobind
from aiobind.aiohttp import BoundTCPConnector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator

    from aiobind.lab import Lab, Namespace, Witness

V4, V6 = "203.0.113.80", "2001:db8:ffff::80"
HOST = "127.0.0.1"
ROOT = Path(__file__).parents[1]
LINGER_NOT = struct.pack("ii", 1, 0)  # close() sends a reset (socket(7), SO_LINGER)

on_loops = pytest.mark.anyio
#: Where a kernel's second of waiting passes: eager tasks would only make it longer.
on_two_loops = pytest.mark.parametrize("anyio_backend", [("asyncio", {}), ("asyncio", {"use_uvloop": True})])


# --- what the tests stand on --------------------------------------------------------------------------------


def descriptors() -> set[int]:
    """Return the open descriptors; os.listdir would open one more, and may block."""
    found = set()
    for descriptor in range(512):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_GETFD)
            found.add(descriptor)
    return found


async def settled(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Wait for *condition*; without the collector, for nothing that was closed may hang on to a cycle."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


async def closed_but(before: set[int]) -> None:
    """Wait until no other descriptors are open than *before*."""
    with contextlib.suppress(TimeoutError):
        await settled(lambda: descriptors() <= before)
    assert descriptors() <= before


def open_connections(connector: Any) -> int:
    return sum(figures.connections + figures.in_use for figures in connector.stats())


@contextmanager
def full(host: str = HOST, port: int = 0) -> Iterator[socket.socket]:
    """A listener whose queue is full: what comes now is dropped without an answer."""
    with socket.create_server((host, port), backlog=0) as listener, socket.socket() as first:
        first.setblocking(False)
        first.connect_ex(listener.getsockname())
        yield listener


def listen(where: Namespace | None = None, *, family: int = socket.AF_INET, backlog: int = 100) -> socket.socket:
    """A listener, in another namespace on port 80. The kernel completes the handshakes, and nobody needs to accept."""
    with where or contextlib.nullcontext():
        return socket.create_server(("", 80) if where else (HOST, 0), family=family, backlog=backlog)


class Web(asyncio.Protocol):
    """Answers each piece of data as a web server does."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@asynccontextmanager
async def serving(
    sock: socket.socket, protocol: Callable[[], asyncio.Protocol] = Web, **options: Any
) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(protocol, sock=sock, **options)
    try:
        yield sock.getsockname()[1]
    finally:
        server.close()


@asynccontextmanager
async def resetting(listener: socket.socket) -> AsyncIterator[int]:
    """Reset each connection in the moment in which it is there."""

    def run() -> None:
        while True:
            connection = listener.accept()[0]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
            connection.close()
            if ended:
                return

    ended: list[bool] = []
    thread = threading.Thread(target=run)
    with listener:
        address = listener.getsockname()
        thread.start()
        try:
            yield address[1]
        finally:
            ended.append(True)
            with socket.socket() as last:
                last.setblocking(False)
                last.connect_ex(address)
                await settled(lambda: not thread.is_alive())


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.fixture
def dns(resolv_conf: Callable[..., None]) -> Iterator[DnsServer]:
    with DnsServer() as server:
        resolv_conf(server.resolv_conf)
        yield server


def run_program(program: str, *, warnings: str = "error") -> str:
    command = [sys.executable, "-X", "dev", "-W", warnings, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr[-3000:]
    return done.stdout


runners = pytest.mark.parametrize("runner", ["asyncio.run", "__import__('uvloop').run"], ids=["asyncio", "uvloop"])


# --- descriptors --------------------------------------------------------------------------------------------


@contextmanager
def one_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = next(number for number in count() if number not in descriptors())
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@on_loops
@on_two_loops
@pytest.mark.parametrize("first", ["answers late", "refuses late", "never answers"])
async def test_descriptors_run_out_in_the_middle_of_a_race(resolv_conf: Callable[..., None], first: str) -> None:
    """The first attempt has the last descriptor and is under way; for the second one there is none."""
    resolv_conf("", hosts="127.0.0.1 two.test\n127.0.0.3 two.test\n")
    before = descriptors()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(full())
        port = listener.getsockname()[1]
        stack.enter_context(socket.create_server(("127.0.0.3", port)))
        connector = aiobind.Connector("127.0.0.2", happy_eyeballs_delay=0.01)
        with pytest.raises(aiobind.ConnectError):
            await connector.connect("two.test", 9)  # so that the name need not be asked for
        with one_descriptor_left():
            attempt = asyncio.create_task(connector.connect("two.test", port))
            await asyncio.sleep(0.1)
            assert not attempt.done(), "the first attempt goes on"
        if first == "answers late":
            listener.setblocking(False)
            listener.accept()[0].close()
            with await asyncio.wait_for(attempt, 20) as sock:  # its SYN is repeated after a second
                assert sock.getpeername() == (HOST, port)
        elif first == "refuses late":
            listener.close()
            with pytest.raises(aiobind.ConnectError) as caught:
                await asyncio.wait_for(attempt, 20)
            assert caught.value.errno == errno.ECONNREFUSED
            errors = [tried.error.errno for tried in caught.value.attempts]
            assert errors == [errno.ECONNREFUSED, errno.EMFILE]
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(attempt, 0.1)
        (await connector.connect("two.test", port)).close()
        assert open_connections(connector) == 0
    await connector.aclose()
    del attempt, connector
    await closed_but(before)


# --- ports --------------------------------------------------------------------------------------------------


@on_loops
@pytest.mark.parametrize(
    ("source", "other", "host"),
    [
        ("if!n1", "if!n2", V4),
        ("if!n1", "if!n2", V6),
        ("ifhost!n1!198.18.1.2", "198.18.2.2", V4),
        ("2001:db8:1::2", "if!n2", V6),
        ("host!near.test", "if!n2", V4),
    ],
)
async def test_ports_run_out(lab: Lab, resolv_conf: Callable[..., None], source: str, other: str, host: str) -> None:
    resolv_conf("", hosts="198.18.1.2 near.test\n")
    lab.near.sysctl("ipv4.ip_local_port_range", "50000 50009")
    with contextlib.ExitStack() as stack:
        stack.enter_context(listen(lab.far, family=socket.AF_INET6 if ":" in host else socket.AF_INET))
        connector = aiobind.Connector(source, other)
        with pytest.raises(aiobind.BindError) as caught:  # noqa: PT012
            for _ in range(11):
                pinned = connector.connect(host, 80, source=source)
                stack.enter_context(await asyncio.wait_for(pinned, 10))
        assert caught.value.errno == errno.EADDRNOTAVAIL
        assert "port is left for this destination" in str(caught.value)
        assert f"connect from {source} to " in str(caught.value)
        held = connector.stats()[0].connections
        assert held > 0
        for _ in range(3):  # whosever turn it is, the other one serves
            sock = stack.enter_context(await asyncio.wait_for(connector.connect(host, 80), 10))
            assert str(aiobind.bound_source(sock).source) == other
        assert [figures.connections for figures in connector.stats()] == [held, 3]
    assert [figures.connections for figures in connector.stats()] == [0, 0]


# --- what the way and the target answer ---------------------------------------------------------------------

#: The source, the target, a route to it (ip-route(8), "types of routes"), and the errno; None: nobody answers.
#: The far side is the router to 192.0.2.0/24 and to 2001:db8:80::/64.
ANSWERS = [
    ("if!n1", V4, "", errno.ECONNREFUSED),
    ("if!n1", V6, "", errno.ECONNREFUSED),
    ("if!n1", "192.0.2.1", "far unreachable", errno.EHOSTUNREACH),
    ("if!n1", "192.0.2.2", "far prohibit", errno.EHOSTUNREACH),
    ("if!n1", "192.0.2.3", "far blackhole", None),
    ("if!n1", "2001:db8:80::1", "far unreachable", errno.ENETUNREACH),  # ICMPv6's "no route to destination"
    ("if!n1", "2001:db8:80::2", "far prohibit", errno.EACCES),
    ("if!n1", "2001:db8:80::3", "far blackhole", None),
    ("198.18.1.2", "192.0.2.5", "far unreachable", errno.EHOSTUNREACH),
    ("198.18.1.2", "192.0.2.6", "near unreachable", errno.EHOSTUNREACH),
    ("198.18.1.2", "192.0.2.7", "near prohibit", errno.EACCES),
    ("198.18.1.2", "192.0.2.8", "near blackhole", errno.EINVAL),
    ("2001:db8:1::2", "2001:db8:80::6", "near unreachable", errno.EHOSTUNREACH),
    ("2001:db8:1::2", "2001:db8:80::7", "near prohibit", errno.EACCES),
    ("2001:db8:1::2", "2001:db8:80::8", "near blackhole", errno.EINVAL),
]


@on_loops
async def test_what_the_network_answers_is_told(lab: Lab, witness: Witness) -> None:
    lab.far.sysctl("ipv4.ip_forward", 1)
    lab.far.sysctl("ipv6.conf.all.forwarding", 1)
    lab.far.sysctl("ipv4.icmp_ratelimit", 0)
    lab.far.sysctl("ipv6.icmp.ratelimit", 0)
    for _, host, route, _ in ANSWERS:
        side, _, kind = route.partition(" ")
        if kind:
            {"near": lab.near, "far": lab.far}[side].ip(f"route add {kind} {host}")
    before = descriptors()

    async def outcome(connector: aiobind.Connector, source: str, host: str, _: str, expected: int | None) -> int | None:
        # ICMP that arrives while connect(2) holds the socket is told with the next SYN, a second later.
        seconds = 0.3 if expected is None else 10
        try:
            sock = await asyncio.wait_for(connector.connect(host, 80, source=source), seconds)
        except TimeoutError:
            return None
        except aiobind.AiobindError as error:
            told = isinstance(error, (aiobind.BindError, aiobind.ConnectError)) and host in str(error)
            return error.errno if told and f"connect from {source} to " in str(error) else -1
        sock.close()
        return 0

    async with aiobind.Connector("if!n1") as connector:
        numbers = await asyncio.gather(*(outcome(connector, *row) for row in ANSWERS))
        assert dict(zip(ANSWERS, numbers, strict=True)) == {row: row[3] for row in ANSWERS}
        assert open_connections(connector) == 0
    seen = {(packet.nic, packet.source, packet.destination) for packet in witness.packets()}
    assert {host for _, _, host in seen} == {host for _, host, route, _ in ANSWERS if not route.startswith("near")}
    pinned = {host for source, host, *_ in ANSWERS if source == "if!n1"}
    assert {(nic, source) for nic, source, host in seen if host in pinned} == {
        ("n1", lab.nic("n1").v4),
        ("n1", lab.nic("n1").v6),
    }
    await closed_but(before)


@on_loops
async def test_a_reset_right_after_the_connect(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """The connection is there, or the error is; the count is right, and whoever reads or shakes hands is told."""
    async with serving(listen()):  # libuv opens /dev/null with the first stream of a loop, and keeps it
        pass
    before = descriptors()
    ends: Counter[str] = Counter()
    async with resetting(listen()) as port:
        async with aiobind.Connector("if!lo", "127.0.0.2") as connector:
            for _ in range(50):
                try:
                    (await asyncio.wait_for(connector.connect(HOST, port), 10)).close()
                    ends["connected"] += 1
                except aiobind.ConnectError as error:
                    ends["reset" if error.errno == errno.ECONNRESET else str(error)] += 1
                with pytest.raises(ConnectionError):  # noqa: PT012
                    reader, writer = await asyncio.wait_for(connector.open_connection(HOST, port), 10)
                    try:
                        await asyncio.wait_for(reader.read(), 10)
                    finally:
                        writer.transport.abort()
                with pytest.raises(ConnectionError):
                    await asyncio.wait_for(connector.open_connection(HOST, port, ssl=contexts[1]), 10)
            await settled(lambda: open_connections(connector) == 0)
        async with aiohttp.ClientSession(connector=BoundTCPConnector("if!lo", limit=1)) as session:
            for scheme in ["http", "https", "https"] * 30:
                with pytest.raises(aiohttp.ClientConnectionError):
                    await asyncio.wait_for(session.get(f"{scheme}://{HOST}:{port}/", ssl=contexts[1]), 10)
            await settled(lambda: open_connections(session.connector) == 0)
    assert ends.total() == 50
    assert ends.keys() <= {"connected", "reset"}
    await closed_but(before)


@on_loops
async def test_a_reset_before_the_handshake_of_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """The descriptor is closed once: uvloop 0.23 leaves its number to the socket, which may be another's by then."""
    with listen() as listener:
        port = listener.getsockname()[1]
        listener.setblocking(False)

        def reset() -> asyncio.Protocol:
            """Make a protocol: that is after the connect, and before the transport."""
            peer = listener.accept()[0]
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
            peer.close()
            return make()

        async def by_connector() -> None:
            await connector.create_connection(reset, HOST, port, ssl=contexts[1], server_hostname="x")

        async def by_aiohttp() -> None:
            async with aiohttp.ClientSession(connector=web, connector_owner=False) as session:
                await session.get(f"https://{HOST}:{port}/", ssl=contexts[1])

        connector, web = aiobind.Connector("if!lo"), BoundTCPConnector("if!lo")
        web_protocol, web._factory = web._factory, reset  # type: ignore[assignment]
        for number in range(6):
            make = web_protocol if number % 2 else asyncio.Protocol
            doing = by_aiohttp() if number % 2 else by_connector()
            with pytest.raises((ConnectionError, aiohttp.ClientConnectionError)):
                await doing
            with contextlib.ExitStack() as stack:
                others = [stack.enter_context(socket.socket()) for _ in range(10)]
                gc.collect()
                assert {other.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) for other in others} == {1}
        await settled(lambda: not open_connections(connector) and not open_connections(web))
        await web.close()


# --- loss, and queues that are full -------------------------------------------------------------------------

_SO_ATTACH_FILTER, _TCP_INFO_RETRANSMITS = 26, 100  # struct tcp_info, tcpi_total_retrans
#: Classic BPF: drop where a random number is below the threshold (linux/filter.h, SKF_AD_OFF + SKF_AD_RANDOM).
LOSS = ctypes.create_string_buffer(
    b"".join(
        struct.pack("HBBI", *line)
        for line in (
            (0x20, 0, 0, 0xFFFFF000 + 56),  # ld #random
            (0x35, 1, 0, int(0.3 * 2**32)),  # jge #30 %, keep
            (0x06, 0, 0, 0),  # ret #0: drop
            (0x06, 0, 0, 0x40000),  # keep
        )
    )
)
LOSSY = (socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(LOSS)))


@on_loops
@on_two_loops
async def test_every_third_segment_is_lost(lab: Lab) -> None:
    """In both directions: what the server gets is filtered on its socket, what we get on ours, the handshake too."""
    # Else the pause doubles each time.
    for name, value in {"syn_linear_timeouts": 30, "thin_linear_timeouts": 1, "rto_max_ms": 1000}.items():
        for namespace in (lab.near, lab.far):
            with contextlib.suppress(FileNotFoundError):  # Linux 6.5, 6.15
                namespace.sysctl(f"ipv4.tcp_{name}", value)
    listener = listen(lab.far)
    listener.setsockopt(*LOSSY)
    request, answer = b"x" * 1000, b"ok"

    class Server(asyncio.Protocol):
        missing = len(request)

        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            stack.callback(transport.abort)  # our end may be lost, too

        def data_received(self, data: bytes) -> None:
            self.missing -= len(data)
            if not self.missing:
                self.transport.write(answer)

    async def transfer(connector: aiobind.Connector) -> int:
        reader, writer = await connector.open_connection(V4, 80)
        writer.write(request)
        assert await reader.readexactly(len(answer)) == answer
        info = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        writer.transport.abort()
        return struct.unpack_from("I", info, _TCP_INFO_RETRANSMITS)[0]

    stack = contextlib.ExitStack()
    async with serving(listener, Server):
        connector = aiobind.Connector("if!n1", "if!n2", socket_options=[LOSSY])
        repeated = 0
        async with asyncio.timeout(50):
            while not repeated:  # once in fifty times, none of the first five loses what we would repeat
                repeated += sum(await asyncio.gather(*(transfer(connector) for _ in range(5))))
        stack.close()
        await settled(lambda: open_connections(connector) == 0)


@on_loops
@on_two_loops
async def test_a_full_queue_of_connections() -> None:
    """The target keeps silent: the timeout is the caller's. When there is room again, the next SYN is answered."""
    before = descriptors()
    with full() as listener:
        port = listener.getsockname()[1]
        async with aiobind.Connector("if!lo", "127.0.0.2") as connector:
            for _ in range(4):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(connector.connect(HOST, port), 0.05)
            assert open_connections(connector) == 0
            patient = asyncio.create_task(connector.connect(HOST, port))
            await asyncio.sleep(0.05)
            listener.setblocking(False)
            listener.accept()[0].close()
            with await asyncio.wait_for(patient, 20) as sock:
                assert sock.getpeername() == (HOST, port)
    await closed_but(before)


@on_loops
@on_two_loops
@pytest.mark.parametrize("abort", [0, 1])
async def test_a_queue_that_overflows_after_the_handshake(lab: Lab, abort: int) -> None:
    """For us the connection is there. Then it is reset (net.ipv4.tcp_abort_on_overflow), or waits for its turn."""
    lab.far.sysctl("ipv4.tcp_abort_on_overflow", abort)
    listener = listen(lab.far, backlog=2)
    # The server takes a connection for complete with its first data (tcp(7)), so that two can be half there beside
    # the two that fill the queue. Then there is room for one of them.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    async with aiobind.Connector("if!n1") as connector:
        streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        for _ in range(2):
            pair = [await asyncio.wait_for(connector.open_connection(V4, 80), 10) for _ in range(2)]
            for _, writer in pair:
                writer.write(b"x")
            streams += pair
        assert connector.stats()[0].connections == 4
        reading = [asyncio.create_task(reader.read(1)) for reader, _ in streams]
        if abort:
            done, waiting = await asyncio.wait(reading, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            assert [type(task.exception()) for task in done] == [ConnectionResetError]
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
        else:
            async with serving(listener):
                answers = await asyncio.wait_for(asyncio.gather(*reading), 20)
            assert answers == [b"H"] * 4
        for _, writer in streams:
            writer.transport.abort()
        await settled(lambda: open_connections(connector) == 0)
    listener.close()


# --- names --------------------------------------------------------------------------------------------------

RCODES = [(NXDOMAIN, socket.EAI_NONAME), (SERVFAIL, socket.EAI_AGAIN)]


@on_loops
@pytest.mark.parametrize(("rcode", "number"), RCODES, ids=["NXDOMAIN", "SERVFAIL"])
async def test_a_destination_without_an_answer_is_no_sources_fault(dns: DnsServer, rcode: int, number: int) -> None:
    dns.add("broken.test", rcode=rcode)
    async with aiobind.Connector("127.0.0.2", "127.0.0.3") as connector:
        with pytest.raises(aiobind.ResolveError) as caught:
            await asyncio.wait_for(connector.connect("broken.test", 80), 10)
        assert (caught.value.errno, caught.value.source) == (number, None)
        assert caught.value.destination == "broken.test:80"
    assert dns.queries["broken.test", "A"] == 1, "no other source is tried"


@on_loops
@pytest.mark.parametrize(("rcode", "number"), RCODES, ids=["NXDOMAIN", "SERVFAIL"])
@pytest.mark.parametrize("source", ["host!broken.test", "ifhost!lo!broken.test"])
async def test_a_source_without_an_answer_lets_the_next_one_try(
    dns: DnsServer, source: str, rcode: int, number: int
) -> None:
    dns.add("broken.test", rcode=rcode)
    with listen() as listener:
        port = listener.getsockname()[1]
        async with aiobind.Connector(source, "127.0.0.3") as connector:
            for _ in range(4):
                with await asyncio.wait_for(connector.connect(HOST, port), 10) as sock:
                    assert sock.getsockname()[0] == "127.0.0.3"
            with pytest.raises(aiobind.ResolveError) as caught:
                await asyncio.wait_for(connector.connect(HOST, port, source=source), 10)
            assert (caught.value.errno, str(caught.value.source)) == (number, source)
            assert [figures.connections for figures in connector.stats()] == [0, 0]


@on_loops
@pytest.mark.parametrize("source", ["127.0.0.2", "host!silent.test", "ifhost!lo!silent.test"])
async def test_while_names_get_no_answer_others_connect(dns: DnsServer, source: str) -> None:
    """The timeout is the caller's; what needs no name does not wait for those who do."""
    dns.add("silent.test", delay=inf)
    host = HOST if "silent" in source else "silent.test"
    with listen() as listener:
        port = listener.getsockname()[1]
        async with aiobind.Connector(source, "127.0.0.3") as connector:
            waiting = [asyncio.create_task(connector.connect(host, port, source=source)) for _ in range(20)]
            with await asyncio.wait_for(connector.connect(HOST, port, source="127.0.0.3"), 10) as sock:
                assert sock.getsockname()[0] == "127.0.0.3"
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(connector.connect(host, port, source=source), 0.1)
            for task in waiting:
                assert not task.done()
                task.cancel()
            done, _ = await asyncio.wait(waiting, timeout=10)
            assert [task.cancelled() for task in done] == [True] * 20
            assert [figures.connections for figures in connector.stats()] == [0, 0]
    assert dns.queries["silent.test", "A"] == 1
    dns.add("silent.test", rcode=SERVFAIL)
    dns.release("silent.test")  # its thread ends with the answer


@on_loops
async def test_no_name_server_at_all(resolv_conf: Callable[..., None]) -> None:
    resolv_conf(DnsServer.resolv_conf)  # and nobody listens there
    async with aiobind.Connector("host!source.test", "127.0.0.3") as connector:
        with pytest.raises(aiobind.ResolveError) as caught:
            await asyncio.wait_for(connector.connect("target.test", 80), 10)
        assert (caught.value.errno, caught.value.source) == (socket.EAI_AGAIN, None)
        with listen() as listener:
            (await asyncio.wait_for(connector.connect(HOST, listener.getsockname()[1]), 10)).close()


# --- netlink refused ----------------------------------------------------------------------------------------

#: A sandbox: from here on socket(2) fails for netlink (seccomp(2); a filter of classic BPF over struct seccomp_data).
SANDBOX = """
import ctypes, errno, os, platform, struct, sys

def forbid_netlink(number):
    nr = {"x86_64": 41, "aarch64": 198}[platform.machine()]  # socket(2)
    lines = (
        (0x20, 0, 0, 0),  # ld [nr]
        (0x15, 0, 3, nr),  # jeq #socket, next, allow
        (0x20, 0, 0, 16),  # ld [args[0], low half]
        (0x15, 0, 1, 16),  # jeq #AF_NETLINK, next, allow
        (0x06, 0, 0, 0x00050000 | number),  # SECCOMP_RET_ERRNO
        (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    fprog = ctypes.create_string_buffer(struct.pack("HP", len(lines), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, fprog, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        print("no seccomp: " + os.strerror(ctypes.get_errno()))
        sys.exit()
"""


@runners
@pytest.mark.parametrize("name", ["EMFILE", "ENOBUFS"])  # what stands for a refusal has the interfaces polled
def test_netlink_refused(runner: str, name: str) -> None:
    if platform.machine() not in {"x86_64", "aarch64"}:
        pytest.skip(f"the number of socket(2) on {platform.machine()} is not known here")
    program = f"""
{SANDBOX}
import asyncio, gc, socket, aiobind

async def main():
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def fails(connector, **options):
        try:
            (await connector.connect("127.0.0.1", port, **options)).close()
        except aiobind.BindError as error:
            assert error.errno == errno.{name}, error
            assert "the interfaces of this host cannot be read" in str(error), error
            assert str(error.source) in ("if!lo", "ifhost!lo!127.0.0.1"), error
        else:
            raise AssertionError("connected")

    async with aiobind.Connector("if!lo", "127.0.0.2", "ifhost!lo!127.0.0.1") as connector:
        (await connector.connect("127.0.0.1", port, source="127.0.0.2")).close()
        before = os.listdir("/proc/self/fd")
        for _ in range(20):
            await fails(connector, source="if!lo")
            await fails(connector, source="ifhost!lo!127.0.0.1")
            with await connector.connect("127.0.0.1", port) as sock:  # whosever turn it is
                assert sock.getsockname()[0] == "127.0.0.2"
        gc.collect()
        await asyncio.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) <= len(before), "a descriptor is left"
    try:
        aiobind.socket_factory("if!lo")((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)))
    except aiobind.BindError as error:
        assert error.errno == errno.{name}
    else:
        raise AssertionError("made")
    server.close()

forbid_netlink(errno.{name})
{runner}(main())
print("done")
"""
    printed = run_program(program)
    if printed.startswith("no seccomp"):
        pytest.skip(printed)
    assert printed == "done\n"


# --- links that come and go ---------------------------------------------------------------------------------


@on_loops
@on_two_loops
@pytest.mark.parametrize("how", ["down and up", "no carrier"])
async def test_a_link_that_flaps_under_load(lab: Lab, how: str) -> None:
    """Ten times a second, for 1.5 s, under 20 tasks that connect: the other NIC is not concerned."""
    witness = lab.witness(syn_only=True)
    ended = threading.Event()
    again = "route replace default via 198.18.1.1 dev n1 metric 1001"

    def flap() -> None:
        for _ in range(15):
            (lab.near if how == "down and up" else lab.far).ip(
                f"link set {'n1' if how == 'down and up' else 'f1'} down"
            )
            time.sleep(0.05)
            if how == "down and up":
                lab.near.ip("link set n1 up", again)
            else:
                lab.far.ip("link set f1 up")
            time.sleep(0.05)
        ended.set()

    ends: Counter[tuple[str, str]] = Counter()

    async def keep_connecting(connector: aiobind.Connector, source: str) -> None:
        while not ended.is_set():
            try:
                with await asyncio.wait_for(connector.connect(V4, 80, source=source), 10) as sock:
                    bound = aiobind.bound_source(sock)
                    assert (bound.interface, bound.address) == (source[3:], lab.nic(source[3:]).v4)
                ends[source, "connected"] += 1
            except (aiobind.BindError, aiobind.ConnectError) as error:
                ends[str(error.source), errno.errorcode[error.errno or 0]] += 1
            await asyncio.sleep(0.005)

    class Closing(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.abort()

    async with serving(listen(lab.far, backlog=4000), Closing):
        before = descriptors()
        connector = aiobind.Connector("if!n1", "if!n2")
        flapping = threading.Thread(target=flap)
        flapping.start()
        try:
            sources = ["if!n1", "if!n2"] * 10
            # The longest attempt began before the last flap, and its SYN is repeated after 1, 2, 3 s.
            await asyncio.wait_for(asyncio.gather(*(keep_connecting(connector, source) for source in sources)), 20)
        finally:
            await settled(lambda: not flapping.is_alive(), 20)
        for source in sources[:2]:  # and in the end all is as before
            (await asyncio.wait_for(connector.connect(V4, 80, source=source), 10)).close()
        assert open_connections(connector) == 0
        await connector.aclose()
        await closed_but(before)
    assert ends["if!n1", "connected"] > 0
    assert {end for source, end in ends if source == "if!n2"} == {"connected"}
    # Of a carrier the kernel tells once in a second at most, so that most attempts just wait for it.
    if how == "down and up":
        assert ends["if!n1", "ENETUNREACH"] > 0, "the link was never seen down"
    begun = {(packet.nic, packet.source) for packet in witness.packets()}
    assert begun == {(name, lab.nic(name).v4) for name in ("n1", "n2")}


# --- cancellation -------------------------------------------------------------------------------------------


class Wait(NamedTuple):
    """The *number*-th time that a task waits, and how it is cancelled there."""

    number: int
    how: str


def cancel(task: Any, waited_for: Any) -> None:
    if waited_for is not None:
        waited_for.add_done_callback(lambda _: task.cancel())  # comes before the task's own
    else:
        task.get_loop().call_soon(task.cancel)


@types.coroutine
def driven(coroutine: Coroutine[Any, Any, Any], at: Wait) -> Generator[Any, Any, Any]:
    """Run *coroutine* as its task would do, and cancel the task *at* one of its waits."""
    thrown: BaseException | None = None
    for number in count():
        try:
            waited_for = coroutine.send(None) if thrown is None else coroutine.throw(thrown)
        except StopIteration as end:
            return end.value
        finally:
            thrown = None  # whose traceback holds this very frame
        if number == at.number or (number == at.number + 1 and at.how == "twice"):
            cancel(asyncio.current_task(), waited_for if at.how == "with the answer" else None)
        try:
            yield waited_for
        except BaseException as error:
            thrown = error
    raise AssertionError


async def in_turn(operation: Callable[[], Coroutine[Any, Any, Any]], at: Wait) -> asyncio.Task[Any]:
    """Start *operation*, cancel it in the loop's turn of that number if it is not done; return its task, done."""
    task = asyncio.create_task(operation())
    for _ in range(at.number):
        if task.done():
            break
        await asyncio.sleep(0)
    else:
        task.cancel()
    await asyncio.wait([task], timeout=10)
    return task


async def at_wait(operation: Callable[[], Coroutine[Any, Any, Any]], at: Wait) -> asyncio.Task[Any]:
    async def run() -> Any:
        return await driven(operation(), at)

    task = asyncio.create_task(run())
    await asyncio.wait([task], timeout=10)
    return task


class Doors(NamedTuple):
    """What the operations to cancel connect to: a web server, and one with TLS."""

    port: int
    tls_port: int
    context: ssl.SSLContext


async def connect(connector: Any, doors: Doors, host: str = HOST, **options: Any) -> None:
    (await connector.connect(host, doors.port, **options)).close()


async def create_connection(connector: Any, doors: Doors) -> None:
    made = connector.create_connection(
        asyncio.Protocol, HOST, doors.tls_port, ssl=doors.context, server_hostname="localhost"
    )
    (await made)[0].abort()


async def open_connection(connector: Any, doors: Doors) -> None:
    _, writer = await connector.open_connection(HOST, doors.port)
    writer.transport.abort()


async def request(connector: Any, doors: Doors, url: str) -> None:
    async with (
        aiohttp.ClientSession(connector=connector, connector_owner=False) as session,
        session.get(url.format(port=doors.port, tls_port=doors.tls_port), ssl=doors.context) as response,
    ):
        assert await response.read() == b"ok"


class Closable(aiobind.Connector):
    close = aiobind.Connector.aclose


def connector_of(*sources: str) -> Closable:
    return Closable(*sources, happy_eyeballs_delay=0, ttl_dns_cache=0)


def web_connector_of(*sources: str) -> BoundTCPConnector:
    # With one slot in all, one that is lost is missed at once.
    return BoundTCPConnector(*sources, happy_eyeballs_delay=0, use_dns_cache=False, limit=1, limit_per_source=1)


#: What is cancelled: the connector, what is asked of it, and how often it waits at least.
OPERATIONS: dict[str, tuple[Callable[[], Any], Callable[[Any, Doors], Coroutine[Any, Any, None]], int]] = {
    "if!": (lambda: connector_of("if!lo"), connect, 2),
    "an address": (lambda: connector_of("127.0.0.2"), connect, 1),
    "host!": (lambda: connector_of("host!source.test"), connect, 2),
    "ifhost!": (lambda: connector_of("ifhost!lo!source.test"), connect, 2),
    "the second source": (lambda: connector_of("if!nix", "127.0.0.2"), connect, 2),
    "a race": (lambda: connector_of("if!lo"), lambda *them: connect(*them, host="many.test"), 2),
    "create_connection with TLS": (lambda: connector_of("if!lo"), create_connection, 4),
    "open_connection": (lambda: connector_of("127.0.0.2"), open_connection, 2),
    "a request": (lambda: web_connector_of("if!lo"), lambda *them: request(*them, "http://many.test:{port}/"), 4),
    "a request with TLS": (
        lambda: web_connector_of("127.0.0.2"),
        lambda *them: request(*them, "https://localhost:{tls_port}/"),
        4,
    ),
}


@on_loops
@pytest.mark.parametrize("how", ["at once", "with the answer", "twice", "in each turn of the loop"])
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_cancelled_wherever_it_waits(
    resolv_conf: Callable[..., None], contexts: tuple[ssl.SSLContext, ssl.SSLContext], operation: str, how: str
) -> None:
    """It is cancelled there, leaves no descriptor, task or count, and the connector goes on serving."""
    many = "127.0.0.9 many.test\n127.0.0.8 many.test\n127.0.0.1 many.test\n127.0.0.1 localhost\n"
    resolv_conf("", hosts=f"{many}127.0.0.4 source.test\n")
    make, act, least = OPERATIONS[operation]
    run = in_turn if how.startswith("in each turn") else at_wait
    async with serving(listen()) as port, serving(listen(), ssl=contexts[0]) as tls_port:
        with full("127.0.0.8", port):  # and at 127.0.0.9 nobody is there
            doors = Doors(port, tls_port, contexts[1])
            before, tasks = descriptors(), asyncio.all_tasks()
            cancelled = 0
            for number in count():
                connector = make()
                task = await run(partial(act, connector, doors), Wait(number, how))
                assert task.done(), f"wait {number}: it hangs"
                ended = not task.cancelled()
                if ended:
                    task.result()
                cancelled += not ended
                await settled(partial(nothing_left, connector, "in_use", tasks))
                await asyncio.wait_for(act(connector, doors), 10)
                await connector.close()
                await settled(partial(nothing_left, connector, "connections", tasks))
                del connector, task
                await closed_but(before)
                if ended and number >= cancelled + 2:  # in the turns of the loop, it may have been quicker once
                    break
    assert cancelled >= least


def nothing_left(connector: Any, what: str, tasks: set[Any]) -> bool:
    return asyncio.all_tasks() == tasks and not any(getattr(figures, what) for figures in connector.stats())


# --- two at once --------------------------------------------------------------------------------------------


@on_loops
@on_two_loops  # of eager tasks the first has won before the second begins
async def test_two_winners_at_the_same_instant(resolv_conf: Callable[..., None]) -> None:
    """Both have connected, one is returned; the other one is closed before the caller has it."""
    resolv_conf("", hosts="127.0.0.1 two.test\n127.0.0.3 two.test\n")
    before, loop = descriptors(), asyncio.get_running_loop()
    rounds, accepted = 3, 0
    for _ in range(rounds):
        with full("127.0.0.1") as first, full("127.0.0.3", first.getsockname()[1]) as second:
            async with aiobind.Connector("if!lo", happy_eyeballs_delay=0) as connector:
                attempt = asyncio.create_task(connector.connect("two.test", first.getsockname()[1]))
                await asyncio.sleep(0.2)
                # Both SYNs were dropped, and are repeated after a second, in the same tick.
                for listener in (first, second):
                    listener.setblocking(False)
                    listener.accept()[0].close()
                with await asyncio.wait_for(attempt, 10) as sock:
                    winner = sock.getpeername()
                    assert connector.stats()[0].connections == 1
                    await asyncio.sleep(0.05)
                    for listener in (first, second):
                        with contextlib.suppress(BlockingIOError), listener.accept()[0] as peer:
                            accepted += 1
                            peer.setblocking(False)
                            if listener.getsockname() == winner:
                                sock.send(b"x")
                            expected = b"x" if listener.getsockname() == winner else b""
                            with contextlib.suppress(ConnectionResetError):
                                assert await asyncio.wait_for(loop.sock_recv(peer, 10), 10) == expected
                assert open_connections(connector) == 0
    assert accepted > rounds, "there was never a second winner"
    await closed_but(before)


# --- processes and threads ----------------------------------------------------------------------------------


@runners
def test_a_fork_with_a_live_connector(lab: Lab, runner: str) -> None:
    """The child makes its own connectors, and takes nothing from its parent: no news, no connection, no loop."""
    links = "link add d0 type veth peer name d1", "link set d1 up", "link set d0 up", "addr add 192.0.2.1/32 dev d0"
    lab.near.ip(*links)
    program = f"""
        import asyncio, errno, os, socket, subprocess, sys, warnings, aiobind
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)

        def info(port):
            return (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", port))

        NEW = "ifhost!d0!192.0.2.9"  # an address that comes later

        async def there(connector, port):
            try:
                (await connector.connect("192.0.2.1", port, source=NEW)).close()
            except aiobind.BindError as error:
                assert error.errno == errno.EADDRNOTAVAIL
                return False
            return True

        def made(port):
            try:
                factory(info(port)).close()
            except aiobind.BindError as error:
                assert error.errno == errno.EADDRNOTAVAIL
                return False
            return True

        async def child(port, parents):
            try:
                await parents.connect("127.0.0.1", port)
            except RuntimeError as error:
                assert "another event loop" in str(error)
            else:
                raise AssertionError("the parent's connector serves two loops")
            async with aiobind.Connector("if!lo", "127.0.0.2", "host!localhost") as connector:
                for _ in range(3):
                    (await asyncio.wait_for(connector.connect("127.0.0.1", port), 10)).close()
                assert [figures.connects for figures in connector.stats()] == [1, 1, 1]
                assert not await there(connector, port)
                assert not made(port)
                subprocess.run(["ip", "addr", "add", "192.0.2.9/32", "dev", "d0"], check=True)
                assert await there(connector, port)
                assert made(port)

        async def main():
            listener = socket.create_server(("0.0.0.0", 0), backlog=100)
            port = listener.getsockname()[1]
            async with aiobind.Connector("if!d0", "if!lo") as connector:
                held = await connector.connect("127.0.0.1", port, source="if!lo")
                (await connector.connect("192.0.2.1", port, source="if!d0")).close()
                (await connector.connect("localhost", port, source="if!lo", family=socket.AF_INET)).close()
                assert not await there(connector, port)
                assert not made(port)
                pid = os.fork()
                if not pid:
                    status = 1
                    try:
                        {runner}(child(port, connector))
                        status = 0
                    except BaseException:
                        sys.excepthook(*sys.exc_info())
                    finally:
                        sys.stderr.flush()
                        os._exit(status)
                for _ in range(1000):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        break
                    await asyncio.sleep(0.01)
                assert (ended, status) == (pid, 0), (ended, status)
                assert await there(connector, port), "the child took the parent's news"
                assert made(port), "the child took the factory's news"
                with held:
                    held.send(b"x")
                    assert connector.stats()[1].connections == 1
                (await asyncio.wait_for(connector.connect("127.0.0.1", port), 10)).close()
            listener.close()

        factory = aiobind.socket_factory(NEW)
        {runner}(main())
        print("done")
    """
    assert run_program(program) == "done\n"


@on_loops
async def test_a_second_loop_in_another_thread(lab: Lab) -> None:
    """Each loop has its connector and its news of the interfaces; one connector never serves two loops at a time."""
    ready, outcome = threading.Event(), list[BaseException | int]()

    async def use(connector: aiobind.Connector) -> int:
        for number in range(100):
            with await asyncio.wait_for(connector.connect(V4, 80, source=f"if!n{number % 3}"), 10) as sock:
                assert sock.getsockname()[0] == lab.nics[number % 3].v4
        return sum(figures.connects for figures in connector.stats())

    async def other() -> int:
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            await first.connect(V4, 80)
        ready.set()
        async with aiobind.Connector("if!n0", "if!n1", "if!n2") as second:
            return await use(second)

    def run() -> None:
        try:
            outcome.append(asyncio.run(other()))
        except BaseException as error:
            outcome.append(error)
            ready.set()

    async with serving(listen(lab.far, backlog=1000)):
        before = descriptors()
        first = aiobind.Connector("if!n0", "if!n1", "if!n2")
        (await first.connect(V4, 80)).close()
        thread = threading.Thread(target=run)
        thread.start()
        await settled(ready.is_set, 10)
        assert await use(first) == 101
        await settled(lambda: not thread.is_alive(), 20)
        assert outcome == [100]
        await first.aclose()
        await closed_but(before)
