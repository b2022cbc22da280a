"""One attempt: bound as decided, closed on any other way out, and its end reported once."""

from __future__ import annotations

import asyncio
import errno
import gc
import io
import logging
import os
import resource
import socket
import ssl
import struct
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, cast

import pytest
import trustme
import uvloop
from opened import connect, open_bound
from sandbox import Sandbox

from aiobind import Address, BindError, BoundSource, _sockets, bound_source
from aiobind._binding import Binding, Link, Target
from aiobind._platform import platform
from aiobind._ports import LocalPorts
from aiobind._sockets import BoundSocket, Kind, Opening, _open
from aiobind._wait import is_uvloop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aiobind.lab import Lab, Witness

pytestmark = pytest.mark.anyio

V4, V6 = socket.AF_INET, socket.AF_INET6
HERE = {V4: Target.of(ip_address("127.0.0.1"), 9), V6: Target.of(ip_address("::1"), 9)}
WIDE = {V4: Target.of(ip_address("203.0.113.80"), 80), V6: Target.of(ip_address("2001:db8:ffff::80"), 80)}
SO_BINDTODEVICE, IP_FREEBIND = 25, 15  # Python 3.11 has no name for the second
SOURCE = Address("127.0.0.2")
LOCAL = ip_address("127.0.0.2")


def fds() -> set[tuple[str, str]]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one of listdir
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def device(sock: socket.socket) -> str:
    return sock.getsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, 16).rstrip(b"\0").decode()


def to(listener: socket.socket) -> Target:
    host, port = listener.getsockname()[:2]
    return Target.of(ip_address(host), port)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield listener


class Connection:
    """A connected, registered socket, and how often its end was reported."""

    def __init__(self, listener: socket.socket) -> None:
        self.sock: BoundSocket = open_bound(Binding(local=(LOCAL,)), to(listener))
        with suppress(BlockingIOError):
            self.sock.connect(listener.getsockname())
        self.fd = self.sock.fileno()
        self.ends = 0
        self.register()

    def register(self) -> None:
        address, port = self.sock.getsockname()
        self.bound = self.sock.bound = BoundSource(SOURCE, None, address, port)
        self.sock.register(self.on_end)

    def on_end(self, *_: object) -> None:
        self.ends += 1


@pytest.fixture
def connection(listener: socket.socket) -> Iterator[Connection]:
    connection = Connection(listener)
    yield connection
    if hasattr(connection, "sock"):
        connection.sock.close()
    assert not _open


# --- the end of a connection --------------------------------------------------------------------------------


def by_close(sock: BoundSocket) -> None:
    sock.close()


def by_with(sock: BoundSocket) -> None:
    with sock:
        pass


def by_detach(sock: BoundSocket) -> None:
    os.close(sock.detach())


def by_detach_and_close(sock: BoundSocket) -> None:
    descriptor = sock.detach()
    sock.close()
    os.close(descriptor)


def by_shutdown_and_close(sock: BoundSocket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


@pytest.mark.parametrize("again", [by_close, by_detach_and_close, None], ids=["close", "detach", "collection"])
@pytest.mark.parametrize(
    "end", [by_close, by_with, by_detach, by_detach_and_close, by_shutdown_and_close], ids=lambda end: end.__name__
)
def test_the_end_is_reported_once(
    connection: Connection, end: Callable[[BoundSocket], None], again: Callable[[BoundSocket], None] | None
) -> None:
    assert connection.ends == 0
    assert bound_source(connection.sock) == connection.bound
    end(connection.sock)
    assert connection.ends == 1
    if again is not None:
        with suppress(OSError):  # there is no descriptor any more
            again(connection.sock)
        del connection.sock
        gc.collect()
    assert connection.ends == 1
    assert not _open


def test_collection_is_an_end_with_a_warning(connection: Connection) -> None:
    with pytest.warns(ResourceWarning, match="unclosed"):
        connection.__dict__.pop("sock")
    assert connection.ends == 1
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(connection.fd)


def test_collection_of_a_cycle_is_an_end(connection: Connection) -> None:
    connection.sock.user = lambda sock=connection.sock: sock  # type: ignore[misc,assignment]  # a cycle
    del connection.sock
    assert connection.ends == 0
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()
    assert connection.ends == 1


def test_a_file_keeps_the_connection_open(connection: Connection) -> None:
    connection.sock.setblocking(True)
    file = connection.sock.makefile("rb")
    connection.sock.close()
    assert connection.ends == 0
    assert bound_source(file) == connection.bound
    file.close()
    assert connection.ends == 1
    assert not _open


def test_a_file_that_is_closed_first_is_no_end(connection: Connection) -> None:
    connection.sock.setblocking(True)
    connection.sock.makefile("rb").close()
    assert connection.ends == 0
    connection.sock.close()
    assert connection.ends == 1


def test_a_copy_is_not_counted(connection: Connection) -> None:
    with connection.sock.dup() as copy:
        assert isinstance(copy, BoundSocket)
        with pytest.raises(LookupError):
            bound_source(copy)
    assert connection.ends == 0
    with connection.sock.dup():
        connection.sock.close()
        assert connection.ends == 1
    assert connection.ends == 1


def test_the_end_is_reported_even_when_closing_fails(connection: Connection) -> None:
    os.close(connection.fd)  # behind its back
    with pytest.raises(OSError, match="descriptor"):
        connection.sock.close()
    assert connection.ends == 1
    assert not _open


def test_a_socket_that_was_never_counted_ends_silently() -> None:
    sock = open_bound(Binding(), HERE[V4])
    sock.close()
    sock.close()
    del sock
    with pytest.raises(OSError, match="not supported"):
        BoundSocket(-7)
    BoundSocket.__new__(BoundSocket)
    gc.collect()  # what __del__ raises is a warning, hence a failure


def test_a_number_that_is_another_connections_by_now(connection: Connection, listener: socket.socket) -> None:
    """Another thread may get the number between the system's close and the report."""
    other = Connection(listener)
    os.close(socket.socket.detach(connection.sock))
    old_number = other.sock.detach()
    assert other.ends == 1
    other.sock = BoundSocket(fileno=os.dup2(old_number, connection.fd, inheritable=False))
    os.close(old_number)
    other.register()
    connection.sock._end(connection.fd, None)
    assert (connection.ends, other.ends) == (1, 1)
    assert bound_source(other.sock) == other.bound
    assert _open == {connection.fd: other.bound}
    other.sock.close()
    assert other.ends == 2


# --- where it leaves from -----------------------------------------------------------------------------------


class Wrapper:
    """What a transport or stream is to ``bound_source``."""

    def __init__(self, sock: object) -> None:
        self.sock = sock

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self.sock if name == "socket" else default


class Handle:
    """Like the sockets that asyncio and uvloop show of their transports."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def fileno(self) -> int:
        return self.descriptor


def test_bound_source_by_what_is_at_hand(connection: Connection) -> None:
    sock = connection.sock
    for thing in (sock, Handle(sock.fileno()), Wrapper(sock), Wrapper(Handle(sock.fileno()))):
        assert bound_source(thing) is connection.bound
    assert connection.bound == (SOURCE, None, *sock.getsockname())
    assert connection.bound.address == "127.0.0.2"
    sock.close()
    for thing in (sock, Handle(sock.fileno()), Handle(connection.fd), Wrapper(sock), Wrapper(Handle(connection.fd))):
        with pytest.raises(LookupError, match=r"was not made by aiobind, or is closed$"):
            bound_source(thing)


@pytest.mark.parametrize(
    "thing", [None, 0, "127.0.0.2", object(), Wrapper(None), Wrapper(object()), Handle(-1), Handle(1), io.BytesIO()]
)
def test_bound_source_of_what_has_none(thing: object) -> None:
    with pytest.raises(LookupError, match="aiobind"):
        bound_source(thing)


def test_bound_source_of_sockets_of_others(listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()) as foreign, open_bound(Binding(), HERE[V4]) as unconnected:
        for sock in (foreign, listener, unconnected):
            with pytest.raises(LookupError):
                bound_source(sock)


@pytest.mark.parametrize("end", [by_close, by_detach], ids=lambda end: end.__name__)
def test_a_number_that_is_used_again_is_another_connection(
    connection: Connection, end: Callable[[BoundSocket], None]
) -> None:
    with socket.socket() as foreign:
        end(connection.sock)
        os.dup2(foreign.fileno(), connection.fd, inheritable=False)
        with socket.socket(fileno=connection.fd) as again, pytest.raises(LookupError):
            bound_source(again)


# --- in the hands of a loop ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of a server and of a client that trusts it."""
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


class Peer(asyncio.Protocol):
    """The other end."""

    transport: asyncio.Transport | None = None
    greeting = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is not derived from it
        self.transport.write(self.greeting)


@asynccontextmanager
async def serving(listener: socket.socket, context: ssl.SSLContext | None = None) -> AsyncIterator[Peer]:
    peer = Peer()
    server = await asyncio.get_running_loop().create_server(lambda: peer, sock=listener, ssl=context)
    try:
        yield peer
    finally:
        if peer.transport is not None:
            peer.transport.abort()
        server.close()


ENDS: dict[str, Callable[[asyncio.Transport, asyncio.Transport], object]] = {
    "close": lambda transport, _: transport.close(),
    "close twice": lambda transport, _: [transport.close(), transport.close()],
    "close while writing": lambda transport, _: [transport.write(b"x" * 100_000), transport.close()],
    "abort": lambda transport, _: transport.abort(),
    "close and abort": lambda transport, _: [transport.close(), transport.abort()],
    "the peer's close": lambda _, peer: peer.close(),
    "the peer's reset": lambda _, peer: [
        peer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)),
        peer.abort(),
    ],
}


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_a_transport(
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
    listener: socket.socket,
    with_tls: bool,
    end: Callable[[asyncio.Transport, asyncio.Transport], object],
) -> None:
    async with serving(listener, tls[0] if with_tls else None) as peer:
        connection = Connection(listener)
        transport, _ = await asyncio.get_running_loop().create_connection(
            asyncio.Protocol,
            sock=connection.__dict__.pop("sock"),
            ssl=tls[1] if with_tls else None,
            server_hostname="localhost" if with_tls else None,
        )
        await until(lambda: peer.transport)
        assert peer.transport is not None
        assert connection.ends == 0
        things = (transport, transport.get_extra_info("socket"))
        for thing in things:
            assert bound_source(thing) is connection.bound
        end(transport, peer.transport)
        await until(lambda: connection.ends)
        for thing in things:
            with pytest.raises(LookupError):
                bound_source(thing)
        del transport, thing, things
        gc.collect()
        assert connection.ends == 1
    assert not _open


async def test_a_stream_writer(listener: socket.socket) -> None:
    async with serving(listener):
        connection = Connection(listener)
        _, writer = await asyncio.open_connection(sock=connection.__dict__.pop("sock"))
        assert bound_source(writer) is connection.bound
        writer.close()
        await writer.wait_closed()
        await until(lambda: connection.ends)
        with pytest.raises(LookupError):
            bound_source(writer)
    assert connection.ends == 1


async def test_a_tls_handshake_that_fails(tls: tuple[ssl.SSLContext, ssl.SSLContext], listener: socket.socket) -> None:
    async with serving(listener) as peer:
        connection = Connection(listener)
        peer.greeting = b"This is not TLS.\r\n"
        with pytest.raises(ssl.SSLError):
            await asyncio.open_connection(sock=connection.__dict__.pop("sock"), ssl=tls[1], server_hostname="localhost")
        await until(lambda: connection.ends)
        gc.collect()
        assert connection.ends == 1
    assert not _open


async def test_a_datagram_transport(listener: socket.socket) -> None:
    sock = open_bound(Binding(local=(LOCAL,)), to(listener), kind=Kind(socket.SOCK_DGRAM))
    sock.connect(listener.getsockname())
    ends: list[None] = []
    sock.bound = BoundSource(SOURCE, None, *sock.getsockname())
    sock.register(lambda *_: ends.append(None))
    bound = sock.bound
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, sock=sock)
    del sock
    assert bound_source(transport) is bound
    transport.close()
    await until(lambda: ends)
    gc.collect()
    assert len(ends) == 1


# --- opening ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default_timeout", [None, 5.0])
@pytest.mark.parametrize("flags", [platform.socket_flags, 0], ids=["flags of socket(2)", "no such flags"])
def test_it_is_non_blocking_and_not_inherited(
    monkeypatch: pytest.MonkeyPatch, default_timeout: float | None, flags: int
) -> None:
    monkeypatch.setattr(platform, "socket_flags", flags)
    if flags:  # there is nothing left to do
        monkeypatch.setattr(BoundSocket, "setblocking", None)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(default_timeout)
    try:
        sock = open_bound(Binding(), HERE[V4])
    finally:
        socket.setdefaulttimeout(before)
    with sock:
        assert sock.gettimeout() == 0
        assert not os.get_blocking(sock.fileno())
        assert not sock.get_inheritable()


@pytest.mark.parametrize("family", [V4, V6])
@pytest.mark.parametrize(("kind", "proto"), [(socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, 0)])
def test_family_kind_and_protocol(family: int, kind: int, proto: int) -> None:
    with open_bound(Binding(), HERE[family], kind=Kind(kind, proto)) as sock:
        assert (sock.family, sock.type, sock.proto) == (family, kind, proto)
        assert (device(sock), sock.interface) == ("", None)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("text", ["127.0.0.2", "::1"])
def test_it_has_the_address_and_no_port_yet(text: str, kind: int) -> None:
    ip = ip_address(text)
    with open_bound(Binding(local=(ip,)), HERE[V6 if ip.version == 6 else V4], kind=Kind(kind)) as sock:
        assert sock.getsockname()[:2] == (text, 0)
        assert (sock.local, sock.interface) == (ip, None)


def test_it_has_device_and_address(lab: Lab) -> None:
    nic = lab.nic("n1")
    for text, family in ((nic.v4, V4), (nic.v6, V6)):
        with open_bound(Binding("n1", (ip_address(text),)), WIDE[family]) as sock:
            assert device(sock) == sock.interface == "n1"
            assert sock.getsockname()[0] == str(sock.local) == text


def test_a_link_local_address_keeps_its_zone(lab: Lab) -> None:
    nic = lab.nic("n1")
    local = ip_address(f"{nic.link_local}%n1")
    with open_bound(Binding(local=(local,)), Target.of(ip_address("fe80::1"), 80, socket.if_nametoindex("n1"))) as sock:
        assert sock.getsockname() == (nic.link_local, 0, 0, socket.if_nametoindex("n1"))
        assert device(sock) == sock.interface == "n1"  # by the bind itself
        assert sock.local == local


# --- which address ------------------------------------------------------------------------------------------

SECOND = ("addr add 198.18.1.7/24 dev n1", "addr add 2001:db8:1::7/64 dev n1 nodad")
TO4, TO6 = "203.0.113.80 via 198.18.1.1 dev n1", "2001:db8:ffff::80 via 2001:db8:1::1 dev n1"
BOTH = {V4: ("198.18.1.2", "198.18.1.7"), V6: ("2001:db8:1::2", "2001:db8:1::7")}
OTHER = {V4: "198.18.0.2", V6: "2001:db8::2"}


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
@pytest.mark.parametrize("chosen", [0, 1, None], ids=["the first", "the second", "another NIC's"])
@pytest.mark.parametrize("pin", ["n1", None])
def test_the_kernels_own_choice_where_it_is_allowed(
    lab: Lab, family: int, order: int, chosen: int | None, pin: str | None
) -> None:
    """A route names the address, and connect(2) would obey, pin or no pin."""
    texts = BOTH[family]
    hint = OTHER[family] if chosen is None else texts[chosen]
    lab.near.ip(*SECOND, f"route add {TO4 if family == V4 else TO6} src {hint} metric 1")
    local = tuple(map(ip_address, texts[::order]))
    expected = str(local[0]) if chosen is None else texts[chosen]
    with open_bound(Binding(pin, local), WIDE[family]) as sock:
        assert (str(sock.local), sock.interface) == (expected, pin)
        assert sock.getsockname()[:2] == (expected, 0)
        with suppress(BlockingIOError):
            sock.connect(WIDE[family].sockaddr)
        assert sock.getsockname()[0] == expected


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_without_a_route_the_best_address_is_bound(lab: Lab, family: int, order: int) -> None:
    target = Target.of(ip_address("192.0.2.1" if family == V4 else "2001:db8:99::1"), 80)
    lab.near.ip(*SECOND, f"route add unreachable {target.host} metric 1")
    local = tuple(map(ip_address, BOTH[family][::order]))
    with open_bound(Binding(None, local), target) as sock:
        assert sock.local == local[0]


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_the_only_address_and_one_of_a_prefix_are_not_asked_about(lab: Lab, family: int) -> None:
    lab.near.ip(*SECOND, f"route add {TO4 if family == V4 else TO6} src {BOTH[family][1]} metric 1")
    first, hinted = map(ip_address, BOTH[family])
    nobodys = ip_address("198.51.100.7" if family == V4 else "2001:db8:7::7")
    for binding in (Binding("n1", (first,)), Binding(None, (first,)), Binding(None, (nobodys, hinted), freebind=True)):
        with open_bound(binding, WIDE[family]) as sock:
            assert sock.local == binding.local[0]


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize(("pin", "expected"), [(None, "n0"), ("n1", "n1"), ("n2", "n2")])
def test_where_any_address_will_do_the_kernels_choice_is_bound(
    lab: Lab, family: int, pin: str | None, expected: str
) -> None:
    nic = lab.nic(expected)
    with open_bound(Binding(pin), WIDE[family]) as sock:
        assert sock.getsockname()[:2] == (nic.v4 if family == V4 else nic.v6, 0)
        assert (str(sock.local), sock.interface) == (sock.getsockname()[0], pin)
    lab.near.ip(f"route add {TO4 if family == V4 else TO6} src {OTHER[family]} metric 1")
    with open_bound(Binding("n1"), WIDE[family]) as sock:  # to borrow
        assert str(sock.local) == OTHER[family]


def test_without_a_route_any_address_is_left_to_connect(lab: Lab) -> None:
    lab.near.ip("route add unreachable 192.0.2.1")
    for port, expected in ((None, False), (0, True), (5001, True)):
        with open_bound(Binding(), Target.of(ip_address("192.0.2.1"), 80), port=port) as sock:
            assert (sock.local, sock.interface) == (None, None)
            assert (sock.getsockname()[0], sock.getsockname()[1] != 0) == ("0.0.0.0", expected)


def test_the_callers_options_choose_the_route_and_with_it_the_address(lab: Lab) -> None:
    lab.near.ip(*SECOND, f"route add {TO4} src 198.18.1.7 table 77", "rule add fwmark 7 lookup 77")
    binding = Binding("n1", tuple(map(ip_address, BOTH[V4])))
    mark = (socket.SOL_SOCKET, 36, 7)  # SO_MARK
    for options, expected in (
        ((), "198.18.1.2"),
        ((mark,), "198.18.1.7"),
        (((socket.SOL_TCP, 1, 1), mark), "198.18.1.7"),
    ):
        with open_bound(binding, WIDE[V4], options=options) as sock:
            assert str(sock.local) == expected


def test_an_address_that_goes_meanwhile_is_passed_over(lab: Lab) -> None:
    lab.near.ip("addr flush dev n1", "addr add 198.18.1.7/24 dev n1")
    with open_bound(Binding("n1", tuple(map(ip_address, BOTH[V4]))), WIDE[V4]) as sock:
        assert str(sock.local) == sock.getsockname()[0] == "198.18.1.7"


# --- once more ----------------------------------------------------------------------------------------------


def state(sock: BoundSocket) -> dict[str, Any]:
    """Return all that one can tell from a socket that has not connected."""
    options = {
        "device": device(sock),
        "range": sock.getsockopt(socket.SOL_IP, 51),  # IP_LOCAL_PORT_RANGE
        "no port": sock.getsockopt(socket.SOL_IP, 24),  # IP_BIND_ADDRESS_NO_PORT
        "freebind": sock.getsockopt(socket.SOL_IP, 15),
        "keepalive": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        "reuse": sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR),
    }
    names = ("family", "type", "proto", "local", "promised", "interface", "ifindex", "claimed", "bound", "target")
    known = {name: getattr(sock, name) for name in names}
    return options | known | {"name": sock.getsockname(), "blocks": sock.getblocking(), "timeout": sock.gettimeout()}


def plain(device: str | None, *local: str, owner: bool = True, freebind: bool = False) -> Binding:
    link = Link(socket.if_nametoindex(device), device) if device and owner else None
    return Binding(device, tuple(map(ip_address, local)), freebind, link)


@pytest.mark.parametrize(
    ("device", "local", "host", "more", "short"),
    [
        ("n1", ["198.18.1.2"], "203.0.113.80", {}, True),
        ("n1", ["2001:db8:1::2"], "2001:db8:ffff::80", {}, True),
        (None, ["198.18.1.2"], "203.0.113.80", {}, True),
        (None, ["2001:db8:1::2"], "2001:db8:ffff::80", {}, True),
        ("n1", ["198.18.1.2", "198.18.1.7"], "203.0.113.80", {}, False),
        ("n1", [], "203.0.113.80", {}, False),
        ("n1", ["198.18.1.2"], "203.0.113.80", {"owner": False}, False),
        (None, ["192.0.2.7"], "203.0.113.80", {"freebind": True}, False),
        ("n1", ["198.18.1.2"], "203.0.113.80", {"options": [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]}, False),
        ("n1", ["198.18.1.2"], "203.0.113.80", {"ports": LocalPorts(range(40000, 40100))}, False),
    ],
)
def test_to_repeat_is_to_open_once_more(
    lab: Lab, device: str | None, local: list[str], host: str, more: dict[str, Any], *, short: bool
) -> None:
    lab.near.ip(*SECOND)
    binding = plain(device, *local, owner=more.pop("owner", True), freebind=more.pop("freebind", False))
    opening = Opening(binding, Target.of(ip_address(host), 80), **more)
    opening.open().close()  # as the first one always is
    opening.repeat().close()
    assert (opening._recipe is not None) is short
    with opening.open() as first, opening.repeat() as second, opening.repeat() as third:
        assert state(first) == state(second) == state(third)
    gc.collect()


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ("addr del 198.18.1.2/24 dev n1", errno.EADDRNOTAVAIL),
        ("link del n1", errno.EADDRNOTAVAIL),  # SO_BINDTOIFINDEX takes any number
    ],
)
def test_what_refuses_to_be_repeated_is_said_as_for_the_first(lab: Lab, change: str, number: int) -> None:
    opening = Opening(plain("n1", "198.18.1.2"), Target.of(ip_address("203.0.113.80"), 80))
    opening.repeat().close()
    lab.near.ip(change)
    before = fds()
    texts = set()
    for make in (opening.repeat, opening.open):
        with pytest.raises(BindError) as caught:
            make()
        assert caught.value.errno == number
        texts.add(str(caught.value))
        del caught
    assert len(texts) == 1
    assert fds() == before


def test_a_repeated_socket_takes_no_port_of_the_other_kind(lab: Lab) -> None:
    """One that is pinned and one that is not share no port: the second one reserves its own, by the long way."""
    target = Target.of(ip_address("203.0.113.80"), 80)
    pinned = Opening(plain("n1", "198.18.1.2"), target)
    other = Opening(plain(None, "198.18.1.2"), target)
    with pinned.repeat() as first:
        with other.repeat() as second:
            assert (first.getsockname()[1] == 0) is True
            assert second.getsockname()[1] > 0
        with pinned.repeat() as third:
            assert third.getsockname()[1] == 0
    with other.repeat() as fourth:
        assert fourth.getsockname()[1] == 0


# --- which port ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_port_is_left_to_connect_reserved_or_given(lab: Lab, family: int) -> None:
    lab.near.sysctl("ipv4.ip_local_port_range", "5001 5003")
    binding = Binding(None, (ip_address(BOTH[family][0]),))
    with open_bound(binding, WIDE[family]) as sock:
        assert sock.getsockname()[1] == 0
    with open_bound(binding, WIDE[family], port=0) as sock:
        assert sock.getsockname()[1] in range(5001, 5004)
    with open_bound(binding, WIDE[family], port=7001) as sock:
        assert sock.getsockname()[1] == 7001


def test_a_given_port_serves_several_destinations_and_a_reserved_one_does_not(lab: Lab) -> None:
    lab.near.sysctl("ipv4.ip_local_port_range", "5001 5001")
    binding, other = Binding(None, (LOCAL,)), Target.of(ip_address("127.0.0.1"), 10)
    with open_bound(binding, HERE[V4], port=7001), open_bound(binding, other, port=7001) as sock:
        assert sock.getsockname()[1] == 7001
    before = fds()
    for port in (0, 5001):
        with open_bound(binding, HERE[V4], port=0), pytest.raises(BindError) as caught:
            open_bound(binding, other, port=port)
        assert (caught.value.errno, caught.value.strerror) == (
            errno.EADDRINUSE,
            "no port is left on 127.0.0.2 for this destination",
        )
    del caught
    assert fds() == before


def test_a_port_that_takes_a_capability(lab: Lab, no_capabilities: None) -> None:
    with pytest.raises(
        BindError, match=r"^\[Errno 13\] 127\.0\.0\.2: a port below net\.ipv4\.ip_unprivileged"
    ) as caught:
        open_bound(Binding(None, (LOCAL,)), HERE[V4], port=80)
    assert caught.value.errno == errno.EACCES


def test_the_callers_range_of_ports_is_kept_to_by_the_system(lab: Lab) -> None:
    lab.near.sysctl("ipv4.ip_local_port_range", "5001 5999")
    with socket.create_server(("127.0.0.1", 0)) as server:
        for port in (None, 0):
            with open_bound(
                Binding(None, (LOCAL,)), to(server), ports=LocalPorts(range(5100, 5102)), port=port
            ) as sock:
                with suppress(BlockingIOError):
                    sock.connect(server.getsockname())
                assert sock.getsockname()[1] in (5100, 5101)


# --- without a pin ------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sockets, "_unpinned", set[str]())


def test_a_pin_that_is_not_permitted_is_refused(lab: Lab) -> None:
    def work() -> None:
        before = fds()
        with pytest.raises(BindError, match=r"the pin to n1 was refused: .*CAP_NET_RAW") as caught:
            open_bound(Binding("n1", (ip_address("198.18.1.2"),)), WIDE[V4])
        assert caught.value.errno == errno.EPERM
        assert fds() == before

    Sandbox("setsockopt", errno.EPERM, (2, SO_BINDTODEVICE)).run(work)


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_where_it_need_not_be_strict_the_address_alone_will_do(
    lab: Lab, nothing_logged: None, caplog: pytest.LogCaptureFixture, family: int
) -> None:
    lab.near.ip(*SECOND, f"route add {TO4 if family == V4 else TO6} src {BOTH[family][1]} metric 1")
    local = tuple(map(ip_address, BOTH[family]))

    def work() -> None:
        for name in ("n1", "n1", "n2", "n1"):
            with open_bound(Binding(name, local), WIDE[family], strict=False) as sock:
                assert (device(sock), sock.interface) == ("", None)
                # the choice of the kernel is that of an unpinned socket
                assert str(sock.local) == sock.getsockname()[0] == BOTH[family][1]

    Sandbox("setsockopt", errno.EPERM, (2, SO_BINDTODEVICE)).run(work)
    assert [(record.name, record.levelno) for record in caplog.records] == [("aiobind", logging.WARNING)] * 2
    for record, name in zip(caplog.records, ("n1", "n2"), strict=True):  # once for each
        assert record.getMessage() == (
            f"the pin to {name} is not permitted: connections from it have one of its addresses, and may leave by any"
            " interface (strict=False)"
        )


def test_where_a_pin_is_permitted_it_is_set_however_strict(
    lab: Lab, nothing_logged: None, caplog: pytest.LogCaptureFixture
) -> None:
    with open_bound(Binding("n1", (ip_address("198.18.1.2"),)), WIDE[V4], strict=False) as sock:
        assert device(sock) == sock.interface == "n1"
    with pytest.raises(BindError) as caught:  # it is the permission alone that one can do without
        open_bound(Binding("n9", (ip_address("198.18.1.2"),)), WIDE[V4], strict=False)
    assert caught.value.errno == errno.ENODEV
    assert not caplog.records


def test_a_link_local_address_without_a_pin_is_where_its_zone_is(lab: Lab, nothing_logged: None) -> None:
    nic = lab.nic("n1")
    target = Target.of(ip_address(nic.gateway_link_local), 80, socket.if_nametoindex("n1"))

    def work() -> None:
        with open_bound(Binding("n1", (ip_address(nic.link_local),)), target, strict=False) as sock:
            assert sock.getsockname()[0] == nic.link_local
            assert device(sock) == sock.interface == "n1"
            assert str(sock.local) == f"{nic.link_local}%n1"

    Sandbox("setsockopt", errno.EPERM, (2, SO_BINDTODEVICE)).run(work)


def test_a_device_of_the_callers_is_none_of_ours(
    lab: Lab, nothing_logged: None, no_capabilities: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the second device of a socket that takes CAP_NET_RAW."""
    options = [(socket.SOL_SOCKET, SO_BINDTODEVICE, b"n0\0")]
    local = (ip_address("198.18.1.2"),)
    for _ in range(2):
        with open_bound(Binding("n1", local), WIDE[V4], options=options, strict=False) as sock:
            assert (device(sock), sock.interface, sock.local) == ("n0", None, local[0])
    assert len(caplog.records) == 1


# --- what the caller wants, and what is refused -------------------------------------------------------------


@pytest.mark.parametrize(("text", "family"), [("198.51.100.7", V4), ("2001:db8:7::7", V6)])
def test_an_address_that_no_interface_holds(text: str, family: int) -> None:
    with open_bound(Binding(local=(ip_address(text),), freebind=True), HERE[family]) as sock:
        assert sock.getsockname()[0] == text
    with pytest.raises(BindError) as caught:
        open_bound(Binding(local=(ip_address(text),)), HERE[family])
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_the_first_address_that_is_ours_is_taken() -> None:
    foreign, own, other = map(ip_address, ("198.51.100.7", "127.0.0.2", "127.0.0.3"))
    for local in ((foreign, own, other), (foreign, foreign, own), (own, foreign)):
        with open_bound(Binding(local=local), HERE[V4]) as sock:
            assert sock.getsockname()[0] == "127.0.0.2"
            assert sock.local == own


def test_the_options_of_the_caller_are_set_before_the_socket_is_bound() -> None:
    options = [(socket.SOL_IP, IP_FREEBIND, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, (1).to_bytes(4, "little"))]
    with open_bound(Binding(local=(ip_address("198.51.100.7"),)), HERE[V4], options=options) as sock:
        assert sock.getsockname()[0] == "198.51.100.7"  # refused without the option
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_device_of_the_callers_options_never_wins(lab: Lab) -> None:
    options = [(socket.SOL_SOCKET, SO_BINDTODEVICE, b"n0\0")]
    with open_bound(Binding("n1"), WIDE[V4], options=options) as sock:
        assert device(sock) == sock.interface == "n1"
    with open_bound(Binding(), WIDE[V4], options=options) as sock:
        assert device(sock) == "n0"  # where we pin none, it is the caller's business


def test_nor_without_capabilities(lab: Lab, no_capabilities: None) -> None:
    options = [(socket.SOL_SOCKET, SO_BINDTODEVICE, b"n0\0")]
    before = fds()
    with pytest.raises(BindError, match=r"the pin to n1 was refused: .*CAP_NET_RAW") as caught:
        open_bound(Binding("n1"), WIDE[V4], options=options)
    assert caught.value.errno == errno.EPERM
    assert fds() == before
    with open_bound(Binding("n1"), WIDE[V4]) as sock:
        assert device(sock) == "n1"


NOT_HERE = "is not usable on this host: no interface of this network namespace holds it, or it is still tentative"


@pytest.mark.parametrize(
    ("binding", "options", "error", "number", "text"),
    [
        (Binding("no-such-nic"), (), BindError, errno.ENODEV, "no interface named no-such-nic"),
        (
            Binding(local=(ip_address("198.51.100.7"),)),
            (),
            BindError,
            errno.EADDRNOTAVAIL,
            f"198.51.100.7 {NOT_HERE}",
        ),
        (
            Binding(local=(ip_address("198.51.100.7"), ip_address("198.51.100.8"))),
            (),
            BindError,
            errno.EADDRNOTAVAIL,
            f"198.51.100.8 {NOT_HERE}",
        ),
        (
            Binding(local=(ip_address("fe80::1%no-nic"),)),
            (),
            BindError,
            errno.ENODEV,
            "the zone of fe80::1%no-nic is no interface of this host",
        ),
        (  # only an address that is another host's is passed over
            Binding(local=(ip_address("fe80::1%no-nic"), ip_address("2001:db8:7::7"))),
            (),
            BindError,
            errno.ENODEV,
            "the zone of fe80::1%no-nic is no interface of this host",
        ),
        (
            Binding("lo"),
            [(socket.SOL_SOCKET, 9999, 1)],
            OSError,
            errno.ENOPROTOOPT,
            f"socket option ({socket.SOL_SOCKET}, 9999) refused: Protocol not available",
        ),
        (
            Binding(),
            [(socket.SOL_SOCKET, SO_BINDTODEVICE, b"no-nic\0")],
            OSError,
            errno.ENODEV,
            f"socket option ({socket.SOL_SOCKET}, {SO_BINDTODEVICE}) refused: No such device",
        ),
    ],
    ids=["device", "address", "last address", "zone", "first zone", "option", "option's device"],
)
def test_what_is_refused(binding: Binding, options: Any, error: type[OSError], number: int, text: str) -> None:
    family = V6 if binding.local and binding.local[0].version == 6 else V4
    before = fds()
    with pytest.raises(error) as caught:
        open_bound(binding, HERE[family], options=options)
    assert type(caught.value) is error
    assert (caught.value.errno, caught.value.strerror) == (number, text)
    assert isinstance(caught.value.__cause__, OSError)
    assert fds() == before


@pytest.mark.parametrize("option", [("not", "an", "option"), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1 << 99), ()])
def test_nonsense_for_an_option_leaves_nothing_open(option: Any) -> None:
    before = fds()
    with pytest.raises((TypeError, ValueError, OverflowError)):
        open_bound(Binding(), HERE[V4], options=[option])
    assert fds() == before


def test_no_descriptor_left() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            open_bound(Binding(), HERE[V4])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    gc.collect()


# --- connecting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_of", [("127.0.0.1", V4), ("::1", V6)], ids=["IPv4", "IPv6"])
async def test_connect(target_of: tuple[str, int]) -> None:
    host, family = target_of
    with socket.create_server((host, 0), family=family) as listener, open_bound(Binding(), to(listener)) as sock:
        port = listener.getsockname()[1]
        await connect(asyncio.get_running_loop(), sock, to(listener))
        assert sock.getpeername()[:2] == (host, port)


async def test_connect_is_told_what_the_system_answers(listener: socket.socket) -> None:
    host, port = listener.getsockname()
    listener.close()
    with open_bound(Binding(), HERE[V4]) as sock, pytest.raises(ConnectionRefusedError) as caught:
        await connect(asyncio.get_running_loop(), sock, Target.of(ip_address(host), port))
    assert caught.value.errno == errno.ECONNREFUSED


@pytest.mark.parametrize("pin", [None, "n1"], ids=["no device", "device"])
@pytest.mark.parametrize("bind", [False, True], ids=["no address", "address"])
async def test_the_scope_of_a_link_local_target(lab: Lab, witness: Witness, pin: str | None, bind: bool) -> None:
    nic, index = lab.nic("n1"), socket.if_nametoindex("n1")
    with lab.far:
        server = socket.create_server(("::", 80), family=V6)
    local = (ip_address(f"{nic.link_local}%n1"),) if bind else ()
    target = Target.of(ip_address(nic.gateway_link_local), 80, index)
    with server, open_bound(Binding(pin, local), target) as sock:
        await connect(asyncio.get_running_loop(), sock, target)
        assert sock.getpeername() == (nic.gateway_link_local, 80, 0, index)
        assert sock.getsockname()[0] == nic.link_local
    syns = [(packet.nic, packet.source) for packet in witness.packets() if packet.syn]
    assert syns == [("n1", nic.link_local)]


async def test_a_scope_that_is_no_interface() -> None:
    with open_bound(Binding(), HERE[V6]) as sock, pytest.raises(OSError) as caught:  # noqa: PT011 - the loops differ
        await connect(asyncio.get_running_loop(), sock, Target.of(ip_address("fe80::1"), 80, 9999))
    assert caught.value.errno in {errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.ENETUNREACH}


class DerivedLoop(uvloop.Loop):
    """Of a module of its own."""


def test_uvloop_is_recognised() -> None:
    for kind, expected in ((uvloop.Loop, True), (DerivedLoop, True), (asyncio.SelectorEventLoop, False)):
        loop = kind()
        assert is_uvloop(loop) is expected
        loop.close()


def test_an_address_that_was_passed_over_leaves_no_pin(lab: Lab) -> None:
    """bind(2) of a link-local address sets the device of the socket before it finds that the address is not ours."""
    local = tuple(map(ip_address, ("fe80::99%n1", lab.nic("n2").v6)))
    with open_bound(Binding(None, local), Target.of(ip_address(lab.target_v6), 80)) as sock:
        assert str(sock.local) == lab.nic("n2").v6
        device = sock.getsockopt(socket.SOL_SOCKET, 25, 16).rstrip(b"\0")
        assert (device, sock.interface) == (b"", None)
