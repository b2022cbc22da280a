"""The system calls, on real sockets; the netlink parser, on what the kernel says and on nonsense; the fallback."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import socket
import ssl
import struct
import subprocess
import sys
import time
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from aiobind._binding import LinkAddress
from aiobind._interfaces import InterfaceTable
from aiobind._platform import linux as linux_module
from aiobind._platform import platform
from aiobind._platform.base import AddressGone, AddressSeen, LinkGone, LinkSeen, ListEnd, sockaddr
from aiobind._platform.fallback import Fallback
from aiobind._platform.linux import Linux, Netlink, messages, parse
from aiobind.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aiobind._platform.base import Record

ROOT = Path(__file__).parent.parent
LINUX = Linux()
IP_BIND_ADDRESS_NO_PORT, IP_LOCAL_PORT_RANGE, IP_FREEBIND, IPV6_FREEBIND = 24, 51, 15, 78

families = pytest.mark.parametrize("version", [4, 6])
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
LOOPBACK = {4: ip_address("127.0.0.1"), 6: ip_address("::1")}
NOWHERE = {4: ip_address("192.0.2.99"), 6: ip_address("2001:db8:99::99")}


@pytest.fixture
def new_socket() -> Iterator[Callable[..., socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield lambda *args: stack.enter_context(socket.socket(*args))


@contextlib.contextmanager
def raises(number: int, text: str = "") -> Iterator[None]:
    with pytest.raises(OSError, match=text or None) as caught:
        yield
    assert errno.errorcode.get(caught.value.errno or 0) == errno.errorcode[number]


# --- pin ----------------------------------------------------------------------------------------------------


def pinned_to(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")


@families
def test_a_pin_needs_no_capability(
    lab: Lab, no_capabilities: None, new_socket: Callable[..., socket.socket], version: int
) -> None:
    sock = new_socket(FAMILY[version])
    LINUX.pin(sock, "n1")
    assert pinned_to(sock) == b"n1"


def test_a_second_pin_does(lab: Lab, request: pytest.FixtureRequest, new_socket: Callable[..., socket.socket]) -> None:
    sock = new_socket()
    LINUX.pin(sock, "n1")
    LINUX.pin(sock, "n2")
    assert pinned_to(sock) == b"n2"
    request.getfixturevalue("no_capabilities")
    with raises(errno.EPERM):
        LINUX.pin(sock, "n1")
    assert pinned_to(sock) == b"n2"


@pytest.mark.parametrize("name", ["n9", "n", "N1", "lo:1", "\udcff"])
def test_a_pin_to_no_interface(lab: Lab, new_socket: Callable[..., socket.socket], name: str) -> None:
    with raises(errno.ENODEV):
        LINUX.pin(new_socket(), name)


@pytest.mark.parametrize("raw", [b"fifteen-letters", "é1".encode(), b"\xff1", b"a!b"])
def test_a_pin_to_an_odd_name(lab: Lab, new_socket: Callable[..., socket.socket], raw: bytes) -> None:
    lab.near.ip("link set n1 down")
    sock = new_socket()
    fcntl.ioctl(sock, 0x8923, struct.pack("16s16s", b"n1", raw))  # SIOCSIFNAME: ip would not take them all
    (name,) = (name for _, name in socket.if_nameindex() if os.fsencode(name) == raw)
    LINUX.pin(sock, name)
    assert pinned_to(sock) == raw


# --- bind ---------------------------------------------------------------------------------------------------


@families
def test_bind_reserves_no_port(new_socket: Callable[..., socket.socket], version: int) -> None:
    with socket.create_server((str(LOOPBACK[version]), 0), family=FAMILY[version]) as server:
        sock = new_socket(FAMILY[version])
        LINUX.bind(sock, LOOPBACK[version], None)
        assert sock.getsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT) == 1
        assert sock.getsockname()[:2] == (str(LOOPBACK[version]), 0)
        sock.connect(server.getsockname())
        assert sock.getsockname()[0] == str(LOOPBACK[version])
        assert sock.getsockname()[1] != 0


@families
def test_port_0_reserves_one(lab: Lab, new_socket: Callable[..., socket.socket], version: int) -> None:
    lab.near.sysctl("ipv4.ip_local_port_range", "5001 5001")
    with socket.create_server((str(LOOPBACK[version]), 7001), family=FAMILY[version]) as server:
        sharing = new_socket(FAMILY[version])
        LINUX.bind(sharing, LOOPBACK[version], None)
        assert sharing.getsockname()[1] == 0
        reserving = new_socket(FAMILY[version])
        LINUX.bind(reserving, LOOPBACK[version], 0)
        assert reserving.getsockname()[1] == 5001
        with raises(errno.EADDRNOTAVAIL):  # connect(2) leaves it alone
            sharing.connect(server.getsockname())
        with raises(errno.EADDRINUSE):  # and bind(2) too
            LINUX.bind(new_socket(FAMILY[version]), LOOPBACK[version], 0)


@families
def test_a_port_may_be_given(lab: Lab, new_socket: Callable[..., socket.socket], version: int) -> None:
    sock = new_socket(FAMILY[version])
    LINUX.bind(sock, LOOPBACK[version], 7007)
    assert sock.getsockname()[:2] == (str(LOOPBACK[version]), 7007)
    with raises(errno.EADDRINUSE):
        LINUX.bind(new_socket(FAMILY[version]), LOOPBACK[version], 7007)


def test_a_low_port_takes_a_capability(
    lab: Lab, no_capabilities: None, new_socket: Callable[..., socket.socket]
) -> None:
    with raises(errno.EACCES):
        LINUX.bind(new_socket(), LOOPBACK[4], 80)


@families
def test_one_port_serves_every_destination(lab: Lab, new_socket: Callable[..., socket.socket], version: int) -> None:
    lab.near.sysctl("ipv4.ip_local_port_range", "5001 5001")
    ports = set()
    for port in (7001, 7002, 7003):
        with socket.create_server((str(LOOPBACK[version]), port), family=FAMILY[version]) as server:
            sock = new_socket(FAMILY[version])
            LINUX.bind(sock, LOOPBACK[version], None)
            sock.connect(server.getsockname())
            ports.add(sock.getsockname()[1])
    assert ports == {5001}


@families
@pytest.mark.parametrize("how", ["pin", "bind"])
def test_the_range_of_ports_is_set(new_socket: Callable[..., socket.socket], version: int, how: str) -> None:
    """Its presence makes the kernel look at ports of both parities from the start."""
    with socket.create_server((str(LOOPBACK[version]), 0), family=FAMILY[version]) as server:
        ports = set()
        for _ in range(24):
            sock = new_socket(FAMILY[version])
            LINUX.prepare(sock)
            if how == "pin":
                LINUX.pin(sock, "lo")
            else:
                LINUX.bind(sock, LOOPBACK[version], None)
            try:
                value = sock.getsockopt(socket.SOL_IP, IP_LOCAL_PORT_RANGE, 4)
            except OSError as error:
                pytest.skip(f"this kernel has no IP_LOCAL_PORT_RANGE (Linux 6.3): {error}")
            assert struct.unpack("=I", value)[0] == 65535 << 16 | 1
            sock.connect(server.getsockname())
            ports.add(sock.getsockname()[1])
    assert {port % 2 for port in ports} == {0, 1}


def needs_a_range(linux: Linux) -> None:
    with socket.socket() as sock:
        linux.limit(sock, range(5001, 5002))
    if not linux._has_port_range:
        pytest.skip("this kernel has no IP_LOCAL_PORT_RANGE (Linux 6.3)")


@families
@pytest.mark.parametrize("port", [None, 0])
@pytest.mark.parametrize("ports", [range(5100, 5101), range(5100, 5104)])
def test_connect_keeps_to_a_range(
    lab: Lab, new_socket: Callable[..., socket.socket], version: int, ports: range, port: int | None
) -> None:
    linux = Linux()
    needs_a_range(linux)
    lab.near.sysctl("ipv4.ip_local_port_range", "5001 5999")
    assert linux.keeps_to(ports)
    with socket.create_server((str(LOOPBACK[version]), 7001), family=FAMILY[version], backlog=10) as server:

        def connected() -> int:
            sock = new_socket(FAMILY[version])
            linux.prepare(sock)
            linux.limit(sock, ports)
            linux.bind(sock, LOOPBACK[version], port)
            sock.connect(server.getsockname())
            return int(sock.getsockname()[1])

        assert {connected() for _ in ports} == set(ports)
        with raises(errno.EADDRNOTAVAIL if port is None else errno.EADDRINUSE):
            connected()


@pytest.mark.parametrize(
    ("automatic", "reserved", "ports", "kept"),
    [
        ("5001 5999", "", range(5001, 6000), True),
        ("5001 5999", "", range(5500, 5501), True),
        ("5001 5999", "", range(5000, 5002), False),
        ("5001 5999", "", range(5999, 6001), False),
        ("5001 5999", "", range(80, 81), False),
        ("5001 5999", "", range(40000, 40100), False),
        ("5001 5999", "5099,5104-5110,8080", range(5100, 5104), True),
        ("5001 5999", "5100", range(5100, 5104), False),
        ("5001 5999", "5103", range(5100, 5104), False),
        ("5001 5999", "5101-5102", range(5100, 5104), False),
        ("5001 5999", "5090-5100", range(5100, 5104), False),
        ("5001 5999", "5103-5200", range(5100, 5104), False),
        ("5001 5999", "5001-5999", range(5100, 5104), False),
        ("5001 5999", "8080,5103", range(5100, 5104), False),
        ("5001 5999", "", range(5100, 5104, 2), False),
    ],
)
def test_what_the_system_keeps_to(lab: Lab, automatic: str, reserved: str, ports: range, *, kept: bool) -> None:
    linux = Linux()
    needs_a_range(linux)
    lab.near.sysctl("ipv4.ip_local_port_range", automatic)
    lab.near.sysctl("ipv4.ip_local_reserved_ports", reserved)
    assert linux.keeps_to(ports) is kept


def test_outside_of_the_automatic_range_the_system_keeps_to_nothing(
    lab: Lab, new_socket: Callable[..., socket.socket]
) -> None:
    """Why it is asked."""
    linux = Linux()
    needs_a_range(linux)
    lab.near.sysctl("ipv4.ip_local_port_range", "5001 5999")
    with socket.create_server(("127.0.0.1", 7001)) as server:
        sock = new_socket()
        linux.limit(sock, range(7100, 7200))
        linux.bind(sock, LOOPBACK[4], None)
        sock.connect(server.getsockname())
        assert sock.getsockname()[1] not in range(7100, 7200)
        lab.near.sysctl("ipv4.ip_local_reserved_ports", "5100")
        sock = new_socket()
        linux.limit(sock, range(5100, 5101))
        linux.bind(sock, LOOPBACK[4], None)
        with raises(errno.EADDRNOTAVAIL):
            sock.connect(server.getsockname())


@pytest.mark.parametrize(
    ("automatic", "reserved", "count"),
    [
        ("32768 60999", "", 28232),
        ("5001 5999", "", 999),
        ("5001 5001", "", 1),
        ("5001 5999", "5100", 998),
        ("5001 5999", "80,4990-5010,5100-5104,5995-6010,8080", 999 - 10 - 5 - 5),
        ("5001 5999", "5001-5999", 0),
        ("5001 5999", "4000-7000", 0),
    ],
)
def test_how_many_ports_there_are(lab: Lab, automatic: str, reserved: str, count: int) -> None:
    lab.near.sysctl("ipv4.ip_local_port_range", automatic)
    lab.near.sysctl("ipv4.ip_local_reserved_ports", reserved)
    assert Linux().port_count() == count


def test_so_many_connections_are_made_and_no_more(lab: Lab, new_socket: Callable[..., socket.socket]) -> None:
    linux = Linux()
    lab.near.sysctl("ipv4.ip_local_port_range", "5001 5010")
    lab.near.sysctl("ipv4.ip_local_reserved_ports", "5003-5004,5010")
    with socket.create_server(("127.0.0.1", 7001), backlog=50) as server:
        for _ in range(linux.port_count()):
            sock = new_socket()
            linux.prepare(sock)
            linux.bind(sock, LOOPBACK[4], None)
            sock.connect(server.getsockname())
        sock = new_socket()
        linux.prepare(sock)
        linux.bind(sock, LOOPBACK[4], None)
        with raises(errno.EADDRNOTAVAIL):
            sock.connect(server.getsockname())


@pytest.mark.parametrize("text", [None, "", "none\n", "5001\n", "5001 5999 7\n"])
def test_a_range_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def read(name: str) -> str:
        if text is None:
            raise FileNotFoundError(errno.ENOENT, name)
        return text

    monkeypatch.setattr(linux_module, "_procfs", read)
    assert not Linux().keeps_to(range(5100, 5104))  # it is not kept to
    assert Linux().port_count() == 28232  # the default


# --- the end of a connection, and what it has carried -------------------------------------------------------


@contextlib.contextmanager
def connected(version: int = 4) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection, from both ends."""
    with socket.create_server((str(LOOPBACK[version]), 0), family=FAMILY[version]) as server:
        near = socket.create_connection(server.getsockname()[:2])
        far, _ = server.accept()
    with near, far:
        far.settimeout(5)
        near.settimeout(5)
        yield near, far


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


Traffic: TypeAlias = "tuple[int, int, bool, bool]"


def settled(sock: socket.socket, expected: Traffic) -> Traffic | None:
    """Return the traffic of *sock*, once the kernel has taken in what is under way."""
    deadline = time.monotonic() + 5
    while (found := LINUX.traffic(sock)) != expected and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


@families
@pytest.mark.parametrize("waiting", [b"", b"what had come before"])
def test_an_abort_is_a_reset_to_both_ends(version: int, waiting: bytes) -> None:
    with connected(version) as (near, far):
        far.sendall(waiting)
        LINUX.abort(near)
        for end in (near, far):
            with raises(errno.ECONNRESET):
                end.recv(100)
    with connected(version) as (near, far):
        LINUX.abort(near)
        with raises(errno.ECONNRESET):
            near.send(b"x")


def test_an_abort_of_what_has_ended() -> None:
    with connected() as (near, far):
        far.shutdown(socket.SHUT_WR)
        assert near.recv(100) == b""
        LINUX.abort(near)
        with raises(errno.ECONNRESET):
            near.recv(100)
        LINUX.abort(near)
    LINUX.abort(near)  # it is closed


def test_an_abort_where_connect_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def connect(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(linux_module, "libc", Refusing)
    with connected() as (near, far):
        LINUX.abort(near)
        assert (near.recv(100), far.recv(100)) == (b"", b"")


class Meeting(asyncio.Protocol):
    """Notes what its transport says."""

    def __init__(self) -> None:
        self.received = b""
        self.began, self.ended = asyncio.Event(), asyncio.Event()
        self.eof, self.error = False, None

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.began.set()

    def eof_received(self) -> None:
        self.eof = True

    def connection_lost(self, error: Exception | None) -> None:
        self.error = error
        self.ended.set()


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.configure_trust(ours)
    authority.issue_cert("127.0.0.1").configure_cert(theirs)
    return ours, theirs


@pytest.mark.anyio
@pytest.mark.parametrize("secure", [False, True], ids=["TCP", "TLS"])
@pytest.mark.parametrize("doing", ["transport", "reading", "writing", "paused"])
async def test_an_aborted_transport_tells_of_a_reset(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], doing: str, *, secure: bool
) -> None:
    """An end of the stream would be a lie: it is how many a body ends."""
    loop, open_there = asyncio.get_running_loop(), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_there.append(writer)
        writer.write(b"begun")

    ours, theirs = tls if secure else (None, None)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=theirs)
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | LINUX.socket_flags)
    await loop.sock_connect(sock, server.sockets[0].getsockname())
    options: dict[str, Any] = {"sock": sock, "ssl": ours, "server_hostname": "127.0.0.1" if secure else None}
    try:
        async with asyncio.timeout(10):
            if doing in {"transport", "paused"}:
                transport, meeting = await loop.create_connection(Meeting, **options)
                await meeting.began.wait()
                if doing == "paused":
                    transport.pause_reading()
                LINUX.abort(sock)
                if doing == "paused":
                    transport.resume_reading()
                await meeting.ended.wait()
                assert (meeting.received, meeting.eof) == (b"begun", False)
                assert isinstance(meeting.error, ConnectionResetError)
                assert meeting.error.errno == errno.ECONNRESET
            else:
                reader, writer = await asyncio.open_connection(**options)
                open_there.append(writer)
                assert await reader.readexactly(5) == b"begun"
                if doing == "writing":
                    writer.write(bytes(1 << 24))  # nobody reads it
                loop.call_later(0.01, LINUX.abort, sock)
                with raises(errno.ECONNRESET):
                    await reader.read(100)
                with pytest.raises(ConnectionResetError):
                    await writer.drain()
    finally:
        for writer in open_there:
            writer.transport.abort()
        server.close()


@families
def test_what_a_connection_has_carried(version: int) -> None:
    with connected(version) as (near, far):
        assert LINUX.traffic(near) == (0, 0, True, False)
        near.sendall(b"x" * 1000)
        far.sendall(b"y" * 77)
        assert settled(near, (1000, 77, True, False)) == (1000, 77, True, False)
        assert (len(near.recv(100)), len(far.recv(2000))) == (77, 1000)
        assert LINUX.traffic(near) == (1000, 77, True, False)


def peer_closes_first(near: socket.socket, far: socket.socket) -> None:
    far.shutdown(socket.SHUT_WR)


def we_close_first(near: socket.socket, far: socket.socket) -> None:
    near.shutdown(socket.SHUT_WR)


def the_peer_resets(near: socket.socket, far: socket.socket) -> None:
    reset(far)


def we_then_the_peer(near: socket.socket, far: socket.socket) -> None:
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    far.close()


def the_peer_then_we(near: socket.socket, far: socket.socket) -> None:
    far.shutdown(socket.SHUT_WR)
    assert near.recv(1) == b""
    near.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    ("end", "lingers"),
    [
        (peer_closes_first, False),
        (we_close_first, True),
        (the_peer_resets, False),
        (we_then_the_peer, False),  # it is there already, and no longer this socket's
        (the_peer_then_we, False),
    ],
)
def test_no_end_of_a_connection_counts_as_payload(
    end: Callable[[socket.socket, socket.socket], None], *, lingers: bool
) -> None:
    with connected() as (near, far):
        near.sendall(b"x" * 1000)
        far.sendall(b"y" * 77)
        assert (len(far.recv(2000)), len(near.recv(100))) == (1000, 77)
        assert settled(near, (1000, 77, True, False)) == (1000, 77, True, False)
        end(near, far)
        assert settled(near, (1000, 77, lingers, False)) == (1000, 77, lingers, False)
        time.sleep(0.01)
        assert LINUX.traffic(near) == (1000, 77, lingers, False)


@pytest.mark.parametrize("first", ["near", "far"])
def test_who_closes_first_has_the_port_in_time_wait(lab: Lab, first: str) -> None:
    """Held against the kernel's own list."""
    with connected() as (near, far):
        port = near.getsockname()[1]
        if first == "far":
            far.close()
            assert near.recv(1) == b""
        else:
            near.sendall(b"x")
        found = LINUX.traffic(near)
        assert found is not None
        assert found[2] == (first == "near")
        near.close()
        if first == "near":
            assert far.recv(10) == b"x"
            assert far.recv(10) == b""
        far.close()
        ends = [line.split()[1:4:2] for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]]
        assert ([local.endswith(f":{port:04X}") for local, state in ends if state == "06"] == [True]) == found[2]


def test_what_is_not_acknowledged_does_not_count(lab: Lab) -> None:
    with lab.far:
        server = socket.create_server((lab.target_v4, 80))
    with server, socket.create_connection((lab.target_v4, 80)) as near:
        far, _ = server.accept()
        with far:
            near.sendall(b"x" * 1000)
            assert settled(near, (1000, 0, True, False)) == (1000, 0, True, False)
            lab.far.ip("link set f0 down")
            near.sendall(b"x" * 500)
            time.sleep(0.5)  # it is sent again meanwhile
            assert LINUX.traffic(near) == (1000, 0, True, True)
            near.shutdown(socket.SHUT_WR)
            assert LINUX.traffic(near) == (1000, 0, True, True)


class Answering(socket.socket):
    """A socket whose kernel answers as one of another version."""

    length: int

    def getsockopt(self, level: int, option: int, length: int = 0) -> Any:
        return super().getsockopt(level, option, min(length, self.length))


@pytest.mark.parametrize(("length", "known"), [(136, False), (148, True), (192, True)])
def test_an_old_kernel_tells_less_of_the_traffic(length: int, *, known: bool) -> None:
    with connected() as (near, _):
        near.sendall(b"x" * 1000)
        assert settled(near, (1000, 0, True, False)) == (1000, 0, True, False)
        old = Answering(fileno=near.detach())
        old.length = length
        with old:
            assert LINUX.traffic(old) == ((1000, 0, True, False) if known else None)


def test_nobody_can_tell_the_traffic_of_what_is_no_connection(new_socket: Callable[..., socket.socket]) -> None:
    assert LINUX.traffic(new_socket(socket.AF_INET, socket.SOCK_DGRAM)) is None
    sock = new_socket()
    assert LINUX.traffic(sock) == (0, 0, False, False)
    sock.close()
    assert LINUX.traffic(sock) is None


@families
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_an_address_of_nobody_needs_freebind(new_socket: Callable[..., socket.socket], version: int, kind: int) -> None:
    with raises(errno.EADDRNOTAVAIL):
        LINUX.bind(new_socket(FAMILY[version], kind), NOWHERE[version], None)
    sock = new_socket(FAMILY[version], kind)
    LINUX.bind(sock, NOWHERE[version], None, freebind=True)
    assert sock.getsockname()[:2] == (str(NOWHERE[version]), 0)
    level, option = (socket.SOL_IP, IP_FREEBIND) if version == 4 else (socket.IPPROTO_IPV6, IPV6_FREEBIND)
    assert sock.getsockopt(level, option) == 1


def test_an_address_that_is_still_being_checked(lab: Lab, new_socket: Callable[..., socket.socket]) -> None:
    lab.near.sysctl("ipv6.conf.n1.accept_dad", 1)
    lab.near.sysctl("ipv6.conf.n1.dad_transmits", 50)
    lab.near.ip("addr add 2001:db8:1::7/64 dev n1", "addr add 2001:db8:1::8/64 dev n1 nodad preferred_lft 0")
    with raises(errno.EADDRNOTAVAIL):
        LINUX.bind(new_socket(socket.AF_INET6), ip_address("2001:db8:1::7"), None)
    LINUX.bind(new_socket(socket.AF_INET6), ip_address("2001:db8:1::8"), None)  # deprecated


@families
def test_bind_again(new_socket: Callable[..., socket.socket], version: int) -> None:
    sock = new_socket(FAMILY[version])
    with raises(errno.EADDRNOTAVAIL):
        LINUX.bind(sock, NOWHERE[version], None)
    LINUX.bind(sock, LOOPBACK[version], None)  # the next address of a name
    sock.bind((str(LOOPBACK[version]), 0))  # it has no port, so this is the first bind that counts
    LINUX.bind(sock, LOOPBACK[version], None)
    with socket.create_server((str(LOOPBACK[version]), 0), family=FAMILY[version]) as server:
        sock.connect(server.getsockname())
        with raises(errno.EINVAL):
            LINUX.bind(sock, LOOPBACK[version], None)


@pytest.mark.parametrize("bind", [LINUX.bind, Fallback("beos").bind], ids=["linux", "fallback"])
def test_a_link_local_address_is_bound_with_its_zone(
    lab: Lab, new_socket: Callable[..., socket.socket], bind: Callable[..., None]
) -> None:
    ip = lab.nic("n1").link_local
    sock = new_socket(socket.AF_INET6)
    bind(sock, ip_address(f"{ip}%n1"), None)
    assert (sock.getsockname()[0], sock.getsockname()[3]) == (ip, socket.if_nametoindex("n1"))
    with raises(errno.EADDRNOTAVAIL):
        bind(new_socket(socket.AF_INET6), ip_address(f"{ip}%n2"), None)
    with raises(errno.ENODEV, "no interface named 'n9'"):
        bind(new_socket(socket.AF_INET6), ip_address(f"{ip}%n9"), None)


def test_a_socket_address() -> None:
    assert sockaddr(ip_address("192.0.2.7")) == ("192.0.2.7", 0)
    assert sockaddr(ip_address("2001:db8::7")) == ("2001:db8::7", 0)
    assert sockaddr(ip_address("fe80::7%lo")) == ("fe80::7", 0, 0, socket.if_nametoindex("lo"))


@families
def test_multipath_tcp(new_socket: Callable[..., socket.socket], version: int) -> None:
    try:
        sock = new_socket(FAMILY[version], socket.SOCK_STREAM, 262)
    except OSError as error:
        pytest.skip(f"this kernel has no MPTCP: {error}")
    LINUX.pin(sock, "lo")
    LINUX.bind(sock, LOOPBACK[version], None)
    assert (pinned_to(sock), sock.getsockname()[:2]) == (b"lo", (str(LOOPBACK[version]), 0))


def test_a_protocol_without_the_range_of_ports(new_socket: Callable[..., socket.socket]) -> None:
    linux = Linux()
    linux.prepare(new_socket(socket.AF_UNIX))  # answers EOPNOTSUPP, as MPTCP once did
    sock = new_socket()
    linux.prepare(sock)  # the others still get it
    with contextlib.suppress(OSError):
        assert sock.getsockopt(socket.SOL_IP, IP_LOCAL_PORT_RANGE, 4) != bytes(4)


class OldKernel(socket.socket):
    """A socket of a kernel that lacks some options of IP."""

    lacks: dict[int, int]

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        self.asked_for = [*getattr(self, "asked_for", []), option]
        if level == socket.SOL_IP and option in self.lacks:
            raise OSError(self.lacks[option], "old")
        super().setsockopt(level, option, *value)


def test_an_old_kernel_is_asked_once_for_the_range_of_ports() -> None:
    linux = Linux()
    for number in range(3):
        with OldKernel() as sock:
            sock.lacks = {IP_LOCAL_PORT_RANGE: errno.ENOPROTOOPT, IP_BIND_ADDRESS_NO_PORT: errno.ENOPROTOOPT}
            linux.prepare(sock)
            linux.bind(sock, LOOPBACK[4], None)
            assert sock.getsockname()[1] != 0  # reserved at once, as everywhere else
            linux.limit(sock, range(40000, 40100))
            assert not linux.keeps_to(range(40000, 40100))
            assert sock.asked_for == [*[IP_LOCAL_PORT_RANGE] * (number == 0), IP_BIND_ADDRESS_NO_PORT]


def test_an_old_kernel_keeps_to_no_range_also_before_the_first_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiobind._platform.linux.IP_LOCAL_PORT_RANGE", 9999)  # ENOPROTOOPT, as before Linux 6.3
    assert not Linux().keeps_to(range(40000, 40100))


class Heedless(socket.socket):
    """A socket of a system that takes the pin by index, as it takes any option, and does nothing (gVisor)."""

    asked_for = 0

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        if (level, option) == (socket.SOL_SOCKET, linux_module.SO_BINDTOIFINDEX):
            self.asked_for += 1
        else:
            super().setsockopt(level, option, *value)


class Lacking(Heedless):
    """A socket of a kernel that has no pin by index (before Linux 5.0)."""

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        super().setsockopt(level, option, *value)
        if (level, option) == (socket.SOL_SOCKET, linux_module.SO_BINDTOIFINDEX):
            raise OSError(errno.ENOPROTOOPT, "old")


@pytest.mark.parametrize("kind", [Heedless, Lacking])
def test_a_pin_by_index_that_is_none_is_made_by_name(kind: type[Heedless]) -> None:
    linux, index = Linux(), socket.if_nametoindex("lo")
    for number in range(3):
        with kind() as sock:
            linux.pin(sock, "lo", index)
            assert pinned_to(sock) == b"lo"
            assert sock.asked_for == (number == 0)
            assert linux.recipe(index) is None


def test_a_pin_by_index_is_believed_once_it_is_seen(new_socket: Callable[..., socket.socket]) -> None:
    linux, index = Linux(), socket.if_nametoindex("lo")
    assert linux.recipe(index) is None
    sock = new_socket()
    linux.prepare(sock)
    linux.pin(sock, "lo", index)
    assert pinned_to(sock) == b"lo"
    assert (linux.recipe(index) is None) is (not linux._has_port_range)


@pytest.mark.parametrize("version", [4, 6])
def test_whether_there_is_any_address(make_lab: Callable[[int], Lab], version: int) -> None:
    lab = make_lab(0)
    assert LINUX.has_address(version)
    lab.near.ip("link set lo down", "addr flush dev lo")
    assert not LINUX.has_address(version)


@pytest.mark.parametrize("option", [IP_LOCAL_PORT_RANGE, IP_BIND_ADDRESS_NO_PORT])
def test_another_refusal_is_no_old_kernel(option: int) -> None:
    with OldKernel() as sock:
        sock.lacks = {option: errno.EPERM}
        linux = Linux()
        with raises(errno.EPERM):
            linux.prepare(sock)
            linux.bind(sock, LOOPBACK[4], None)


def test_new_sockets_neither_block_nor_are_inherited(new_socket: Callable[..., socket.socket]) -> None:
    sock = new_socket(socket.AF_INET, socket.SOCK_STREAM | LINUX.socket_flags)
    assert fcntl.fcntl(sock, fcntl.F_GETFL) & os.O_NONBLOCK
    assert fcntl.fcntl(sock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


# --- the feed -----------------------------------------------------------------------------------------------


@pytest.fixture
def feed() -> Iterator[Netlink]:
    feed = Netlink()
    yield feed
    feed.close()


def told(feed: Netlink) -> list[Record]:
    """Read until there is no more."""
    records: list[Record] = []
    while (some := feed.read()) is not None:
        records += some
    return records


def test_a_list_is_told_to_its_end(lab: Lab, no_capabilities: None, feed: Netlink) -> None:
    assert feed.read() is None
    feed.ask()
    *records, end = told(feed)
    assert end == ListEnd(whole=True)
    assert feed.read() is None
    links = {record.name: record for record in records if isinstance(record, LinkSeen)}
    assert list(links) == ["lo", "n0", "n1", "n2"]
    assert links["lo"] == LinkSeen(1, "lo", True, "", 0, (), True, True)
    assert links["n1"] == LinkSeen(socket.if_nametoindex("n1"), "n1", False, "veth", 0, (), True, True)
    held = {(record.ifindex, str(record.address.ip)) for record in records if isinstance(record, AddressSeen)}
    expected = {(links[nic.name].ifindex, ip) for nic in lab.nics for ip in (nic.v4, nic.v6, nic.link_local)}
    assert held == expected | {(1, "127.0.0.1"), (1, "::1")}


def test_the_descriptor_is_readable_while_there_is_something_to_read(lab: Lab, feed: Netlink) -> None:
    assert fcntl.fcntl(feed.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    lab.near.ip("addr add 198.18.1.7/24 dev n1")
    index = socket.if_nametoindex("n1")
    assert told(feed) == [AddressSeen(index, LinkAddress(ip_address("198.18.1.7")), b"\x18\xc6\x12\x01\x07")]
    lab.near.ip("addr del 198.18.1.7/24 dev n1")
    assert told(feed) == [AddressGone(index, ip_address("198.18.1.7"), b"\x18\xc6\x12\x01\x07")]


def test_it_is_quiet_while_there_is_nothing_to_read(lab: Lab, no_capabilities: None, feed: Netlink) -> None:
    assert feed.quiet()
    feed.ask()
    assert not feed.quiet()
    told(feed)
    assert feed.quiet()


def test_news_are_there_when_the_change_is_made(lab: Lab, feed: Netlink) -> None:
    for change in ("addr add 198.18.1.7/24 dev n1", "addr del 198.18.1.7/24 dev n1", "link set n1 down", "link del n2"):
        told(feed)
        lab.near.ip(change)
        assert not feed.quiet(), change
        assert not feed.quiet()  # to ask takes nothing away
        assert told(feed)
    told(feed)
    lab.near.ip("addr add 198.18.0.7/24 dev n0")
    assert feed.read() is not None
    assert feed.read() is None


def test_what_was_dropped_is_not_quiet(lab: Lab, feed: Netlink) -> None:
    """Also when the queue has been read to its end."""
    feed._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    for _ in range(2):  # the second drop counts as the first did
        assert feed.quiet()
        lab.near.ip(*[f"addr {command} 198.18.1.7/24 dev n1" for command in ("add", "del")] * 30)
        assert not feed.quiet()
        with contextlib.suppress(BlockingIOError):
            while feed._socket.recv(65536):
                pass
        assert not feed.quiet()
        with raises(errno.ENOBUFS):
            feed.read()
        assert feed.quiet()  # but what was asked for anew is due


def test_quiet_of_a_closed_feed(feed: Netlink) -> None:
    feed.close()
    with raises(errno.EBADF):
        feed.quiet()


def test_a_list_asked_for_while_one_is_told_ends_that_one_as_cut(lab: Lab, feed: Netlink) -> None:
    for reads in range(3):  # at once, among the links, among the addresses
        feed.ask()
        for _ in range(reads):
            feed.read()
        feed.ask()
        feed.ask()
        assert told(feed)[-1] == ListEnd(whole=False)
        feed.ask()
        assert told(feed)[-1] == ListEnd(whole=True)


def test_a_list_that_could_not_be_asked_for_can_be_asked_for_again(
    lab: Lab, feed: Netlink, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def __init__(self, sock: socket.socket, allowed: int) -> None:
            self._sock = sock
            self._allowed = allowed

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

        def sendto(self, *args: Any) -> int:
            self._allowed -= 1
            if self._allowed < 0:
                raise PermissionError(errno.EPERM, "by a security module")
            return self._sock.sendto(*args)

    for allowed in (0, 1):  # the links, the addresses
        with monkeypatch.context() as patch:
            patch.setattr(feed, "_socket", Refusing(feed._socket, allowed))
            with raises(errno.EPERM):
                feed.ask()
                told(feed)
        told(feed)
        feed.ask()
        assert told(feed)[-1] == ListEnd(whole=True)


def test_an_overflow_is_told_once_and_leaves_an_empty_queue(lab: Lab, feed: Netlink) -> None:
    feed._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    changes = [f"addr {command} 198.18.1.7/24 dev n1" for command in ("add", "del")] * 30
    for listing in (False, True):
        if listing:
            feed.ask()
            feed.read()
        lab.near.ip(*changes)
        with raises(errno.ENOBUFS):
            told(feed)
        assert feed.read() is None
        feed.ask()
        assert told(feed)[-1] == ListEnd(whole=True)


def test_nobody_but_the_kernel_has_a_say(lab: Lab, feed: Netlink) -> None:
    news = message(LINK_GONE, link_body(3))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as other:
        try:
            other.sendto(news, feed._socket.getsockname())
        except PermissionError:
            pytest.skip("needs CAP_NET_ADMIN in the initial user namespace")
        assert feed.read() == []
    assert feed.read() is None


def test_a_forgotten_feed_is_closed_without_a_warning() -> None:
    feed = Netlink()
    inode = os.fstat(feed.fileno()).st_ino
    fd = feed.fileno()
    del feed
    gc.collect()
    with contextlib.suppress(OSError):
        assert os.fstat(fd).st_ino != inode


# --- netlink messages ---------------------------------------------------------------------------------------

LINK_SEEN, LINK_GONE, ADDRESS_SEEN, ADDRESS_GONE, ERROR, DONE = 16, 17, 20, 21, 2, 3
IFNAME, MASTER, WIRELESS, LINKINFO, PROP_LIST, ALT_IFNAME, INFO_KIND = 3, 10, 11, 18, 52, 53, 1
ADDRESS, LOCAL, FLAGS = 1, 2, 8
UP, IS_LOOPBACK, LOWER_UP = 0x1, 0x8, 0x10000
NESTED = 0x8000


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes, *, flags: int = 0, sequence: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)


def link_body(index: int, *attributes: bytes, family: int = 0, flags: int = 0) -> bytes:
    return struct.pack("=BxHiII", family, 1, index, flags, 0) + b"".join(attributes)


def address_body(index: int, *attributes: bytes, length: int = 24, flags: int = 0, scope: int = 0) -> bytes:
    return struct.pack("=BBBBI", 2, length, flags, scope, index) + b"".join(attributes)


NAME = attribute(IFNAME, b"eth0\0")
V4, PEER, V6 = ip_address("192.0.2.7"), ip_address("192.0.2.8"), ip_address("2001:db8::7")


def a_link(**more: Any) -> LinkSeen:
    plain = LinkSeen(7, "eth0", loopback=False, kind="", master=0, altnames=(), up=False, carrier=False)
    return plain._replace(**more)


PARSED: dict[str, tuple[int, bytes, Record | None]] = {
    "a link": (LINK_SEEN, link_body(7, NAME), a_link()),
    "a link that is up": (
        LINK_SEEN,
        link_body(7, NAME, flags=UP | LOWER_UP | 0x1040),
        a_link(up=True, carrier=True),
    ),
    "up without a carrier": (LINK_SEEN, link_body(7, NAME, flags=UP), a_link(up=True)),
    "a loopback": (LINK_SEEN, link_body(7, NAME, flags=IS_LOOPBACK), a_link(loopback=True)),
    "a name of 15 bytes": (
        LINK_SEEN,
        link_body(7, attribute(IFNAME, b"fifteen-letters\0")),
        a_link(name="fifteen-letters"),
    ),
    "a name that is no text": (LINK_SEEN, link_body(7, attribute(IFNAME, b"\xff0\0")), a_link(name="\udcff0")),
    "a VRF": (
        LINK_SEEN,
        link_body(7, NAME, attribute(LINKINFO | NESTED, attribute(INFO_KIND, b"vrf\0") + attribute(2, bytes(8)))),
        a_link(kind="vrf"),
    ),
    "a port": (LINK_SEEN, link_body(7, NAME, attribute(MASTER, struct.pack("=I", 5))), a_link(master=5)),
    "a master of the wrong size": (LINK_SEEN, link_body(7, NAME, attribute(MASTER, b"\5\0")), a_link()),
    "alternative names": (
        LINK_SEEN,
        link_body(
            7,
            NAME,
            attribute(
                PROP_LIST | NESTED,
                attribute(ALT_IFNAME, b"wan\0") + attribute(99, b"no") + attribute(ALT_IFNAME, b"enp1s0\0"),
            ),
        ),
        a_link(altnames=("wan", "enp1s0")),
    ),
    "unknown attributes": (LINK_SEEN, link_body(7, attribute(60, bytes(9)), NAME, attribute(3999, b"")), a_link()),
    "a link without a name": (LINK_SEEN, link_body(7, attribute(MASTER, bytes(4))), None),
    "a wireless event, which has nothing but the name": (
        LINK_SEEN,
        link_body(7, NAME, attribute(WIRELESS, b"x")),
        None,
    ),
    "a bridge tells of its port": (LINK_SEEN, link_body(7, NAME, family=7), None),
    "a port leaves its bridge": (LINK_GONE, link_body(7, NAME, family=7), None),
    "a link is gone": (LINK_GONE, link_body(7, NAME), LinkGone(7)),
    "IPv4": (
        ADDRESS_SEEN,
        address_body(7, attribute(ADDRESS, V4.packed), attribute(LOCAL, V4.packed)),
        AddressSeen(7, LinkAddress(V4), b"\x18" + V4.packed),
    ),
    "IPv4 with a peer": (
        ADDRESS_SEEN,
        address_body(7, attribute(ADDRESS, PEER.packed), attribute(LOCAL, V4.packed), length=32),
        AddressSeen(7, LinkAddress(V4), b"\x20" + PEER.packed),
    ),
    "IPv6": (ADDRESS_SEEN, address_body(7, attribute(ADDRESS, V6.packed)), AddressSeen(7, LinkAddress(V6))),
    "IPv6 with a peer": (
        ADDRESS_SEEN,
        address_body(7, attribute(ADDRESS, NOWHERE[6].packed), attribute(LOCAL, V6.packed)),
        AddressSeen(7, LinkAddress(V6)),
    ),
    "its scope": (
        ADDRESS_SEEN,
        address_body(7, attribute(ADDRESS, V6.packed), scope=253),
        AddressSeen(7, LinkAddress(V6, 253)),
    ),
    "an address is gone": (
        ADDRESS_GONE,
        address_body(7, attribute(ADDRESS, PEER.packed), attribute(LOCAL, V4.packed), length=32),
        AddressGone(7, V4, b"\x20" + PEER.packed),
    ),
    "an IPv6 address is gone": (ADDRESS_GONE, address_body(7, attribute(ADDRESS, V6.packed)), AddressGone(7, V6)),
    "no address": (ADDRESS_SEEN, address_body(7), None),
    "an address of the wrong size": (ADDRESS_SEEN, address_body(7, attribute(ADDRESS, bytes(5))), None),
    "another message": (24, bytes(64), None),
    "a link, cut": (LINK_SEEN, link_body(7)[:-1], None),
    "an address, cut": (ADDRESS_SEEN, address_body(7)[:-1], None),
    "nothing": (LINK_GONE, b"", None),
}


@pytest.mark.parametrize(("kind", "body", "record"), PARSED.values(), ids=PARSED)
def test_a_message_becomes_a_record(kind: int, body: bytes, record: Record | None) -> None:
    assert parse(kind, body) == record


OPTIMISTIC, DADFAILED, DEPRECATED, TENTATIVE, PERMANENT = 0x04, 0x08, 0x20, 0x40, 0x80


@pytest.mark.parametrize(
    ("flags", "tentative", "deprecated"),
    [
        (PERMANENT, False, False),
        (TENTATIVE, True, False),
        (DEPRECATED | PERMANENT, False, True),
        (TENTATIVE | DADFAILED, True, False),
        (PERMANENT | DADFAILED, True, False),
        (TENTATIVE | OPTIMISTIC, False, True),
        (TENTATIVE | OPTIMISTIC | DADFAILED, True, True),
    ],
)
def test_the_flags_of_an_address(flags: int, tentative: bool, deprecated: bool) -> None:
    expected = AddressSeen(7, LinkAddress(V6, 0, tentative, deprecated))
    wide = attribute(FLAGS, struct.pack("=I", flags | 0x100))
    assert parse(ADDRESS_SEEN, address_body(7, attribute(ADDRESS, V6.packed), flags=flags)) == expected
    # the wide ones win; those of the wrong size do not count
    assert parse(ADDRESS_SEEN, address_body(7, attribute(ADDRESS, V6.packed), wide, flags=0x68)) == expected
    odd = attribute(FLAGS, b"\x68")
    assert parse(ADDRESS_SEEN, address_body(7, attribute(ADDRESS, V6.packed), odd, flags=flags)) == expected


def test_a_datagram_is_split() -> None:
    data = message(16, b"a", sequence=1) + message(17, b"bcde", flags=2, sequence=3) + message(20, b"")
    assert list(messages(data)) == [(16, 0, 1, b"a"), (17, 2, 3, b"bcde"), (20, 0, 0, b"")]
    assert list(messages(data[:-1])) == [(16, 0, 1, b"a"), (17, 2, 3, b"bcde")]
    assert list(messages(message(16, b"a")[:-3])) == [(16, 0, 0, b"a")]  # the last one needs no padding


@pytest.mark.parametrize("length", [0, 1, 15, 18, 2**32 - 1])
def test_a_senseless_length_ends_the_datagram(length: int) -> None:
    good = message(16, b"good")
    assert list(messages(good + struct.pack("=IHHII", length, 17, 0, 0, 0) + b"x")) == [(16, 0, 0, b"good")]


def test_a_refusal_of_the_list_is_raised(lab: Lab, feed: Netlink) -> None:
    def answer(sequence: int, kind: int = ERROR, code: int = -errno.EPERM, flags: int = 0) -> list[Record]:
        return list(feed._records(message(kind, struct.pack("=i", code), flags=flags, sequence=sequence)))

    feed.ask()
    assert answer(feed._sequence - 1) == []  # of a list before
    with raises(errno.EPERM):
        answer(feed._sequence)
    told(feed)
    feed.ask()
    with raises(errno.EBADF):
        answer(feed._sequence, DONE, -errno.EBADF)
    told(feed)
    feed.ask()  # and can be asked for again
    assert told(feed)[-1] == ListEnd(whole=True)


@pytest.mark.parametrize("kind", [LINK_SEEN, DONE])
def test_an_interrupted_list_ends_as_cut(lab: Lab, feed: Netlink, kind: int) -> None:
    """NLM_F_DUMP_INTR: something changed between two pieces, so that one may have been skipped."""
    feed.ask()
    while feed._listing != 22:  # RTM_GETADDR
        feed.read()
    body = link_body(7, NAME) if kind == LINK_SEEN else bytes(4)
    records = list(feed._records(message(kind, body, flags=0x10, sequence=feed._sequence))) + told(feed)
    assert next(record for record in records if isinstance(record, ListEnd)) == ListEnd(whole=False)


# --- nonsense -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datagrams() -> list[bytes]:
    """What a kernel says: two lists, and news."""
    seen: list[bytes] = []

    class Recorder(Netlink):
        def _records(self, data: bytes) -> Iterator[Record]:
            seen.append(data)
            return super()._records(data)

    feed = Recorder()
    try:
        feed.ask()
        told(feed)
        with contextlib.suppress(OSError, RuntimeError), Lab(2) as lab:
            feed = Recorder()
            feed.ask()
            told(feed)
            lab.near.ip(
                "link add br0 type bridge",
                "link set n1 master br0",
                "link property add dev n1 altname wan",
                "addr add 192.0.2.1 peer 192.0.2.2 dev br0",
                "addr add 2001:db8:7::1 peer 2001:db8:7::2 dev br0",
                "link set br0 up",
                "link del br0",
                "link del n1",
            )
            told(feed)
    finally:
        feed.close()
    return seen


def take_in(data: bytes) -> None:
    """Go the whole way of a datagram; what comes out is well-formed, and little."""
    table = InterfaceTable()
    split = list(messages(data))
    assert len(split) <= len(data) // 16
    for kind, _, _, body in split:
        record = parse(kind, body)
        match record:
            case LinkSeen(index, name, loopback, what, master, altnames):
                assert (type(index), type(loopback), type(master)) == (int, bool, int)
                for text in (name, what, *altnames):
                    os.fsencode(text)
            case AddressSeen(index, address, entry):
                assert (type(index), type(address.scope), type(entry)) == (int, int, bytes)
                assert address.ip.version in {4, 6}
            case LinkGone() | AddressGone():
                pass
            case _:
                assert record is None
        if record is not None:
            table.apply(record)


@given(data=st.binary(max_size=4096))
def test_arbitrary_bytes(data: bytes) -> None:
    take_in(data)


@given(
    kind=st.sampled_from([LINK_SEEN, LINK_GONE, ADDRESS_SEEN, ADDRESS_GONE]),
    head=st.binary(max_size=16),
    attributes=st.lists(
        st.builds(
            lambda length, kind, value: struct.pack("=HH", (length or len(value) + 4) % 65536, kind) + value,
            st.sampled_from([0, 0, 0, 1, 3, 4, 5, 65535]),
            st.sampled_from([1, 2, 3, 8, 10, 11, 18, 29, 52, 53]) | st.integers(0, 65535),
            st.binary(max_size=40),
        ),
        max_size=8,
    ),
)
def test_arbitrary_attributes(kind: int, head: bytes, attributes: Sequence[bytes]) -> None:
    padded = b"".join(value + bytes(-len(value) % 4) for value in attributes)
    take_in(message(kind, head + padded))


@given(st.data())
def test_what_the_kernel_says_damaged(datagrams: list[bytes], data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(datagrams)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)), max_size=20)):
        damaged[at] = value
    start = data.draw(st.integers(0, 64) | st.just(0))
    end = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    take_in(bytes(damaged[start:end]) + data.draw(st.binary(max_size=64)))


def test_what_the_kernel_says(datagrams: list[bytes]) -> None:
    kinds = set()
    for datagram in datagrams:
        take_in(datagram)
        kinds |= {kind for kind, *_ in messages(datagram)}
    assert {LINK_SEEN, ADDRESS_SEEN, DONE} <= kinds


def test_the_longest_nonsense_is_quickly_done() -> None:
    """The shortest messages with the shortest attributes that there can be."""
    start = time.perf_counter()
    take_in(message(ADDRESS_SEEN, address_body(7, attribute(99, b"") * 8192)))
    take_in(message(LINK_GONE, b"") * 2048)
    take_in(message(LINK_SEEN, link_body(7, NAME, attribute(PROP_LIST, attribute(ALT_IFNAME, b"") * 8000))))
    assert time.perf_counter() - start < 2


# --- what arrives here --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ip", "here"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("198.18.1.2", True),
        ("2001:db8:1::2", True),
        ("198.18.1.1", False),
        ("2001:db8:1::1", False),
        ("198.18.1.99", False),  # on the link
        ("203.0.113.80", False),
        ("192.0.2.9", True),
        ("192.0.3.9", False),
        ("2001:db8:7::9", True),
        ("2001:db8:7:1::9", False),
        ("2001:db8:7::", True),
        ("198.51.100.9", False),  # a black hole
        ("2001:db8:dead::9", False),
    ],
)
def test_what_is_routed_here(lab: Lab, no_capabilities: None, ip: str, *, here: bool) -> None:
    routes = ["local 192.0.2.0/24 dev lo", "local 2001:db8:7::/64 dev lo"]
    routes += ["blackhole 198.51.100.0/24", "unreachable 2001:db8:dead::/48"]
    with_capabilities(lab, *(f"route add {route}" for route in routes))
    assert LINUX.routed_here(ip_address(ip)) is here


def with_capabilities(lab: Lab, *commands: str) -> None:
    lab.near.ip(*commands)  # the children of root have them all


@families
def test_without_any_route_nothing_is_routed_here(make_lab: Callable[[int], Lab], version: int) -> None:
    make_lab(0)
    assert LINUX.routed_here(NOWHERE[version]) is False


@families
@pytest.mark.parametrize(
    ("table", "rule", "here"),
    [
        (1000, "", False),  # no rule leads there
        (1000, "fwmark 7 lookup 1000", None),
        (1000, "iif n1 lookup 1000", None),
        (1000, "fwmark 7 lookup 1001", False),
        (7, "fwmark 7 lookup 7", None),
        (254, "", True),
    ],
)
def test_nobody_can_tell_by_which_rule_packets_arrive(
    lab: Lab, version: int, table: int, rule: str, here: bool | None
) -> None:
    prefix, host, other = {
        4: ("192.0.2.0/24", "192.0.2.9", "192.0.3.9"),
        6: ("2001:db8:7::/64", "2001:db8:7::9", "2001:db8:7:1::9"),
    }[version]
    lab.near.ip(f"route add local {prefix} dev lo table {table}")
    if rule:
        with lab.near:
            subprocess.run(["ip", f"-{version}", "rule", "add", *rule.split()], check=True)
    assert LINUX.routed_here(ip_address(host)) is here
    assert LINUX.routed_here(ip_address(other)) is False


def test_a_host_with_many_addresses_is_asked_as_quickly(lab: Lab) -> None:
    """Without RTM_F_FIB_MATCH the kernel went through them all: 4 ms each."""
    lab.near.ip(*(f"addr add 2001:db8:1::{number:x}/128 dev n1 nodad" for number in range(0x1000, 0x2000)))
    ip = ip_address("2001:db8:1::1777")
    started = time.process_time()
    for _ in range(200):
        assert LINUX.routed_here(ip) is True
    assert time.process_time() - started < 0.1  # 0.004; and 0.3 without


# --- other systems ------------------------------------------------------------------------------------------


@families
def test_the_fallback_binds_an_address(new_socket: Callable[..., socket.socket], version: int) -> None:
    sock = new_socket(FAMILY[version], socket.SOCK_STREAM | Fallback("beos").socket_flags)
    Fallback("beos").bind(sock, LOOPBACK[version], None)
    assert sock.getsockname()[0] == str(LOOPBACK[version])
    assert sock.getsockname()[1] != 0  # reserved at once, for want of a way to wait
    reserving, given = new_socket(FAMILY[version]), new_socket(FAMILY[version])
    Fallback("beos").bind(reserving, LOOPBACK[version], 0)
    port = reserving.getsockname()[1]
    assert port != 0
    with raises(errno.EADDRINUSE):
        Fallback("beos").bind(given, LOOPBACK[version], port)
    reserving.close()
    Fallback("beos").bind(given, LOOPBACK[version], port)
    assert given.getsockname()[1] == port
    with raises(errno.EADDRNOTAVAIL):
        Fallback("beos").bind(new_socket(FAMILY[version]), NOWHERE[version], None)


def test_the_fallback_pretends_nothing(new_socket: Callable[..., socket.socket]) -> None:
    sock, fallback = new_socket(), Fallback("beos")
    text = r"is not supported on this platform yet \(beos\)"
    with raises(errno.EOPNOTSUPP, f"pinning a connection to an interface {text}"):
        fallback.pin(sock, "lo")
    with raises(errno.EOPNOTSUPP, f"a net! source {text}"):
        fallback.bind(sock, LOOPBACK[4], None, freebind=True)
    with raises(errno.EOPNOTSUPP, f"looking up the addresses of an interface {text}"):
        fallback.feed()
    assert not fallback.keeps_to(range(40000, 40100))
    assert fallback.routed_here(LOOPBACK[4]) is None
    assert fallback.port_count() == 16384
    fallback.limit(sock, range(40000, 40100))
    assert (pinned_to(sock), sock.getsockname()) == (b"", ("0.0.0.0", 0))


def test_the_fallback_ends_a_connection() -> None:
    fallback = Fallback("beos")
    with connected() as (near, far):
        assert fallback.traffic(near) is None
        fallback.abort(near)
        assert (near.recv(100), far.recv(100)) == (b"", b"")
        far.close()
        fallback.abort(near)
    fallback.abort(near)


def test_this_platform_is_chosen() -> None:
    assert type(platform).__name__ == {"linux": "Linux"}.get(sys.platform, "Fallback")


ELSEWHERE = """
import asyncio, errno, socket, sys, threading, hypothesis  # which look at the platform themselves
sys.platform = "beos"
import aiobind
assert "aiobind._platform.linux" not in sys.modules
assert "aiobind._platform.fallback" in sys.modules

async def main():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    sock = await aiobind.connect("127.0.0.1", port, source="127.0.0.1")
    print(sock.getsockname()[0], sock.getblocking(), sock.get_inheritable())
    sock.close()
    for source in ("if!lo", "ifhost!lo!127.0.0.1", "net!127.1.0.0/24"):
        try:
            await aiobind.connect("127.0.0.1", port, source=source)
        except aiobind.BindError as error:
            print(error.errno == errno.EOPNOTSUPP, error.strerror.partition(": ")[2])
    server.close()

asyncio.run(main())
"""


def test_another_system_takes_the_fallback() -> None:
    run = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", ELSEWHERE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    connected, *refused = run.stdout.splitlines()
    assert connected == "127.0.0.1 False False"
    assert len(refused) == 3
    for line, what in zip(refused, ["looking up the addresses of an interface"] * 2 + ["a net! source"], strict=True):
        assert line.startswith("True ")
        assert f"{what} is not supported on this platform yet (beos)" in line
