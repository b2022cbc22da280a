"""Law: one socket. It is opened and bound as decided, once or again and again; on any other way out it is closed.

A connected one knows where it leaves from, and tells its connector once when it ends: by ``close`` (asyncio),
by ``detach`` (uvloop, which closes the descriptor itself), or by being collected.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from ._advice import advice
from ._binding import zoneless
from ._errors import BindError, shown
from ._platform import platform
from ._platform.base import sockaddr
from ._ports import ANY_PORT, claim, claim_of, enter, release
from ._wait import is_uvloop

if TYPE_CHECKING:
    import asyncio
    import weakref
    from collections.abc import Callable, Sequence

    from ._binding import Binding, IPAddress, Target
    from ._ports import Claim, LocalPorts
    from ._sources import Source

__all__ = [
    "ANY_KIND",
    "IPPROTO_MPTCP",
    "TCP",
    "BoundSocket",
    "BoundSource",
    "Kind",
    "Opening",
    "SocketOption",
    "bound_source",
    "finders",
    "handed_over",
    "is_own",
]

SocketOption: TypeAlias = "tuple[int, int, int | bytes]"

#: The levels of options that sockets of every kind have.
ANY_KIND = (socket.SOL_SOCKET, socket.IPPROTO_IP, socket.IPPROTO_IPV6)

#: Python has the name only where it was built with it.
IPPROTO_MPTCP: int = getattr(socket, "IPPROTO_MPTCP", 262)


class Kind(NamedTuple):
    """What kind of socket.

    Attributes:
        type: ``SOCK_STREAM`` or ``SOCK_DGRAM``.
        proto: the protocol number; 0: the usual one.
        options: to set on it besides the connector's.
    """

    type: int
    proto: int = 0
    options: tuple[tuple[int, int, int], ...] = ()


#: What nearly all are; compared by identity.
TCP = Kind(socket.SOCK_STREAM)
#: TCP_FASTOPEN_CONNECT of linux/tcp.h (Linux 4.11), for which Python has no name.
_FASTOPEN = (socket.IPPROTO_TCP, 30)


class BoundSource(NamedTuple):
    """Where a connection really leaves from.

    Attributes:
        source: the source that was asked for.
        interface: the interface that it is pinned to; None when the egress is not promised (a literal address is
            only an address: the routing table chooses the interface).
        address: the local IP address.
        port: the local port.
    """

    source: Source
    interface: str | None
    address: str
    port: int


#: Where the open connections leave from, by descriptor: asyncio and uvloop hide the socket, but not its number.
_open: dict[int, BoundSource] = {}

#: How an edge finds what its client library hides. Each returns None for what is not its own.
finders: list[Callable[[object], BoundSource | None]] = []


def bound_source(connection: object) -> BoundSource:
    """Return where a connection really leaves from: its source, interface, local address and port.

    Args:
        connection: a socket, transport, ``StreamWriter``, stream of anyio's or aiohttp websocket, as long as it is
            open; or a response of aiohttp, httpx, httpcore or Scrapy, also when its body has been read and its
            connection went back to the pool.

    Raises:
        LookupError: the connection was not made by aiobind, or is closed.
    """
    if isinstance(connection, BoundSocket) and connection.bound is not None and connection.fileno() >= 0:
        return connection.bound
    for find in finders:
        found = find(connection)
        if found is not None:
            return found
    descriptor = _descriptor(connection)
    if descriptor in _open:
        return _open[descriptor]
    raise LookupError(f"{connection!r} was not made by aiobind, or is closed")


def _descriptor(connection: object) -> int:
    get_extra_info: Callable[[str], object] | None = getattr(connection, "get_extra_info", None)
    try:
        sock = get_extra_info("socket") if get_extra_info is not None else connection
        descriptor: int = getattr(sock, "fileno", lambda: -1)()
    except (AttributeError, OSError, ValueError):
        return -1  # closed: a file has no descriptor any more, and asyncio's TLS transport knows nothing at all
    return descriptor


#: Bytes sent and received; whether to close it now leaves its port in TIME_WAIT; whether bytes are left to send then:
#: `Platform.traffic`.
Traffic: TypeAlias = "tuple[int, int, bool, bool]"

#: Is told of the end of a socket: which, its descriptor before, and what it has carried.
OnEnd: TypeAlias = "Callable[[BoundSocket, int, Traffic | None], object]"


class BoundSocket(socket.socket):
    """A socket that knows where it leaves from, and reports its end once."""

    __slots__ = (
        "_carried",
        "_on_end",
        "bound",
        "claimed",
        "cut",
        "family",
        "ifindex",
        "interface",
        "local",
        "lost",
        "name",
        "promised",
        "stood",
        "target",
        "type",
        "unfinished",
        "user",
    )

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:  # noqa: A002
        super().__init__(family, type, proto, fileno)
        # The properties of socket.socket make these members of an enum each time, which a loop asks for ten times for
        # each connection: a tenth of what ``loop.sock_connect`` costs.
        self.family: socket.AddressFamily = _FAMILIES.get(family) or super().family  # pyright: ignore[reportIncompatibleMethodOverride]
        self.type: socket.SocketKind = _KINDS.get(type) or super().type  # pyright: ignore[reportIncompatibleMethodOverride]
        #: the source address that it is bound to, and the same as text, without its zone; None: none
        self.local: IPAddress | None = None
        self.promised: str | None = None
        #: the interface that it is pinned to, and its index; None and 0: none
        self.interface: str | None = None
        self.ifindex = 0
        #: what it has connected from, by getsockname(2)
        self.name: tuple[str, int] = _NAMELESS
        self.bound: BoundSource | None = None
        self.target: Target | None = None
        #: whether the interface and the address were there last
        self.stood = False
        #: either has gone, so that it is not to be used again for now; and it was cut
        self.lost = self.cut = False
        #: TLS, or a proxy's tunnel, is being made: nobody uses it yet
        self.unfinished = False
        #: what the client library makes of it
        self.user: weakref.ref[Any] | None = None
        self.claimed: Claim | None = None
        self._carried: Traffic | None = None
        self._on_end: OnEnd | None = None

    def register(self, on_end: OnEnd) -> None:
        """Count this connection as open, until *on_end* is told that it has ended, and what it has carried."""
        self._on_end = on_end if self._on_end is None else _both(self._on_end, on_end)
        if self.bound is not None:
            _open[self.fileno()] = self.bound

    def traffic(self) -> Traffic | None:
        """Return what the connection has carried so far; None: nobody can tell.

        uvloop closes the descriptor before it detaches the socket: then it is what was known when this was asked last.
        """
        if self.fileno() >= 0:
            self._carried = platform.traffic(self) or self._carried
        return self._carried

    def abort(self) -> None:
        """End the connection at once: who uses it is told ECONNRESET; with a datagram socket it is its transport's end.

        To connect that one to nowhere would take its pin away (``__udp_disconnect``, udp(7)).
        """
        self.traffic()  # which is lost then
        self.lost = self.cut = True
        if self.type == socket.SOCK_STREAM:
            platform.abort(self)
        elif self.user is not None and (transport := self.user()) is not None:
            transport.abort()

    def claim(self, local: IPAddress, target: Target) -> bool:
        """Enter the source address and the target of this socket; return whether it must reserve its port."""
        pinned = self.interface is not None or _zone(local) is not None
        self.claimed, reserve = claim(zoneless(local), target, pinned=pinned)
        return reserve

    def close(self) -> None:
        """Close the socket."""
        descriptor = self.fileno()
        last = self._last() if descriptor >= 0 else None
        try:
            super().close()
        finally:
            if self.fileno() < 0:  # not while a makefile() object keeps it open
                self._end(descriptor, last)

    def detach(self) -> int:
        """Give the descriptor away; the connection counts as ended, for nobody can tell any more when it does."""
        last = self._last() if self.fileno() >= 0 else self._carried
        descriptor = super().detach()
        # Where uvloop has closed it already and nobody has asked before: this end has most likely closed first.
        self._end(descriptor, last or (0, 0, True, False))
        return descriptor

    def __del__(self) -> None:
        if not hasattr(self, "_on_end"):  # the system gave none
            return
        if self.claimed is not None or self._on_end is not None:
            self._end(self.fileno(), self._last() if self.fileno() >= 0 else self._carried)
        super().__del__()  # type: ignore[misc]  # closes it, with the ResourceWarning of an unclosed socket

    def _last(self) -> Traffic | None:
        """Return what can be told only while it is open."""
        # Of what is pinned, whether it has bytes left to send: see `_ports`.
        if self._on_end is not None or (self.claimed is not None and self.claimed[3]):
            return platform.traffic(self) or self._carried
        return None

    def _end(self, descriptor: int, last: Traffic | None) -> None:
        ended = self.claimed
        if ended is not None:
            self.claimed = None
            release(ended, unsent=last is not None and last[3] and ended[3])
        on_end = self._on_end
        if on_end is not None:
            self._on_end = None
            # The number may belong to another connection by now, opened by another thread.
            if _open.get(descriptor) is self.bound:
                del _open[descriptor]
            on_end(self, descriptor, last)


def _both(first: OnEnd, second: OnEnd) -> OnEnd:
    def tell(sock: BoundSocket, descriptor: int, last: Traffic | None) -> None:
        first(sock, descriptor, last)
        second(sock, descriptor, last)

    return tell


_NAMELESS = ("", 0)
_FAMILIES: dict[int, socket.AddressFamily] = {each: each for each in (socket.AF_INET, socket.AF_INET6)}
_KINDS: dict[int, socket.SocketKind] = {
    each | flags: each for each in (socket.SOCK_STREAM, socket.SOCK_DGRAM) for flags in (0, platform.socket_flags)
}


class handed_over:  # noqa: N801 - a function to its callers
    """Give *sock* to a transport of *loop* in this context.

    When the peer resets it before TLS has begun, uvloop (0.23) closes the descriptor before it has noted whose it is.
    *sock* would close that number once more, when it may be another connection's: so it is made to forget it.
    """

    __slots__ = ("_inode", "_sock")

    def __init__(self, sock: BoundSocket, loop: asyncio.AbstractEventLoop) -> None:
        self._sock = sock
        self._inode = os.fstat(sock.fileno()).st_ino if is_uvloop(loop) else 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is not None and self._inode:
            descriptor = self._sock.fileno()
            if descriptor >= 0 and not _has_inode(descriptor, self._inode):
                self._sock.detach()


def _has_inode(descriptor: int, inode: int) -> bool:
    try:
        return os.fstat(descriptor).st_ino == inode
    except OSError:
        return False


class _Recipe(NamedTuple):
    """What is done to a socket when nothing about it depends on the moment, and what it is then."""

    options: tuple[tuple[int, int, int], ...]
    address: tuple[Any, ...]
    local: IPAddress
    interface: str | None
    ifindex: int
    mine: Claim
    other: Claim


class Opening:
    """How the sockets for one target from one source are made: worked out once, done for each of them.

    The source address is always bound, so that no route can name another one: the address that the kernel itself would
    choose where the binding allows that, else the best one that it allows.

    Args:
        binding: the decision.
        target: where it is going to connect.
        kind: what kind of socket.
        options: the caller's.
        strict: a pin that is not permitted is an error; if not, the source address alone will do, and ``interface`` is
            None.
        ports: the local ports to choose from.
        borrow: the address need not be the interface's.
    """

    __slots__ = (
        "_only",
        "_options",
        "_recipe",
        "_strict",
        "_type",
        "binding",
        "defers",
        "kind",
        "ports",
        "sockaddr",
        "stood",
        "target",
        "watched",
    )

    def __init__(
        self,
        binding: Binding,
        target: Target,
        *,
        kind: Kind = TCP,
        options: Sequence[SocketOption] = (),
        strict: bool = True,
        ports: LocalPorts = ANY_PORT,
        borrow: bool = False,
    ) -> None:
        self.binding = binding
        self.target = target
        self.sockaddr = target.sockaddr
        self.ports = ports
        #: what the interfaces are watched for while one connects
        self.watched = (binding.owner, target, borrow)
        #: whether what its sockets are bound to is there; None: none has connected yet
        self.stood: bool | None = None
        self.kind = kind
        #: whether connect(2) may send nothing, and then says nothing of the source
        self.defers = kind.type == socket.SOCK_DGRAM or any(option[:2] == _FASTOPEN for option in options)
        self._type = int(kind.type) | platform.socket_flags
        self._options = options
        self._strict = strict
        # Where it does not depend on the moment.
        only = binding.local[0] if len(binding.local) == 1 else None
        self._only = None if only is None or _needs_zone(only) or _zone(only) else only
        #: not written down yet; None: there is none
        self._recipe: _Recipe | Literal[False] | None = False
        if options or ports is not ANY_PORT or binding.freebind:
            self._recipe = None

    def _write_down(self) -> _Recipe | None:
        device, owner, ip = self.binding.device, self.binding.owner, self._only
        ifindex = 0 if owner is None else owner.index
        options = platform.recipe(ifindex)
        if ip is None or options is None or (device is not None and owner is None):
            return None
        claims = (claim_of(zoneless(ip), self.target, pinned=pinned) for pinned in (device is not None, device is None))
        return _Recipe(options, sockaddr(ip), ip, device, ifindex, *claims)

    def repeat(self) -> BoundSocket:
        """Do what `open` does and has done before; where that is the same each time, without working it out again.

        Raises:
            OSError: as `open` does.
        """
        recipe = self._recipe
        if recipe is False:
            recipe = self._recipe = self._write_down()
        if recipe is None:
            return self.open()
        options, address, local, interface, ifindex, mine, other = recipe
        sock = BoundSocket(self.target.family, self._type, self.kind.proto)
        try:
            for level, name, value in options:
                sock.setsockopt(level, name, value)
            sock.claimed = mine
            if not enter(mine, other):
                sock.bind(address)
                sock.local, sock.promised = local, mine[0]
                sock.interface, sock.ifindex = interface, ifindex
                return sock
        except OSError:  # `open` says why
            pass
        except BaseException:
            sock.close()
            raise
        sock.close()
        return self.open()

    def open(self, port: int | None = None) -> BoundSocket:
        """Return a non-blocking socket with the caller's options and the binding applied.

        Args:
            port: one of ``ports.ways()``.

        Raises:
            BindError: the pin or the source address was refused.
            OSError: no socket could be made (EMFILE), or an option of the caller was refused.
        """
        binding, target = self.binding, self.target
        sock = BoundSocket(target.family, self._type, self.kind.proto)
        local: IPAddress | None = None
        if target.reach == "any":
            port = port or 0  # there is no connect(2) to choose it
        try:
            if not platform.socket_flags:
                sock.setblocking(False)
            self.ports.prepare(sock)
            # The caller's come first: should one of them name a device, ours holds, or is refused.
            for level, name, value in self._options:
                try:
                    sock.setsockopt(level, name, value)
                except OSError as error:
                    raise OSError(
                        error.errno, f"socket option ({level}, {name}) refused: {error.strerror}"
                    ) from error.with_traceback(None)
            if binding.device is not None:
                _pin(sock, binding, strict=self._strict)
            local = self._only or _source_address(sock, binding, target, self._options)
            if local is not None:
                _bind(sock, local, target, port, freebind=binding.freebind)
            elif port is not None:
                platform.bind(sock, _ANY[target.family], port)
            if binding.owner is not None:
                sock.ifindex = binding.owner.index
        except BindError as error:
            sock.close()
            if error.errno != errno.EADDRNOTAVAIL or len(binding.local) < 2 or local is None:
                raise
        except BaseException:
            sock.close()
            raise
        else:
            return sock
        # A name may stand for addresses of several hosts: the next one may be ours. By another socket, for to try a
        # link-local address has pinned this one.
        rest = binding._replace(local=tuple(ip for ip in binding.local if ip.packed != local.packed))  # without zones
        return Opening(
            rest,
            target,
            kind=self.kind,
            options=self._options,
            strict=self._strict,
            ports=self.ports,
        ).open(port)


_ANY: dict[int, IPAddress] = {socket.AF_INET: IPv4Address(0), socket.AF_INET6: IPv6Address(0)}


def _pin(sock: BoundSocket, binding: Binding, *, strict: bool) -> None:
    device, owner = binding.device, binding.owner
    assert device is not None
    try:
        platform.pin(sock, device, owner.index if owner is not None else 0)
    except OSError as error:
        refused = _refused("pin", error, device)
        if error.errno == errno.EPERM and (device, strict) not in _unpinned:
            _unpinned.add((device, strict))
            what = "connections from it fail"
            if not strict:
                what = "connections from it have one of its addresses, and may leave by any interface (strict=False)"
            _log.warning("the pin to %s is not permitted: %s", shown(device), what)
        if error.errno != errno.EPERM or strict:
            raise refused from error.with_traceback(None)
    else:
        sock.interface = device


#: Interfaces whose missing pin has been logged, and with which option.
_unpinned: set[tuple[str, bool]] = set()
_log = logging.getLogger("aiobind")


def _source_address(
    sock: BoundSocket, binding: Binding, target: Target, options: Sequence[SocketOption]
) -> IPAddress | None:
    """Return the source address to try: the kernel's own choice, where the binding allows that."""
    local = binding.local
    ip = local[0] if local else None
    if len(local) != 1 and not binding.freebind and target.reach != "any":
        chosen = _kernels_choice(sock.interface, target, options)
        if chosen is not None and (not local or chosen in local):
            ip = chosen
    if ip is not None and sock.interface is None and (binding.device or target.scope_id) and _needs_zone(ip):
        # Without the pin it is the zone that tells where a link-local address is.
        return IPv6Address(f"{ip}%{binding.device or socket.if_indextoname(target.scope_id)}")
    return ip


def _zone(ip: IPAddress) -> str | None:
    return ip.scope_id if ip.version == 6 else None


def _needs_zone(ip: IPAddress) -> bool:
    return ip.version == 6 and ip.is_link_local and ip.scope_id is None


def _kernels_choice(device: str | None, target: Target, options: Sequence[SocketOption]) -> IPAddress | None:
    """Return the source address by RFC 6724 and the routes: to connect a UDP socket sends nothing (udp(7))."""
    try:
        with socket.socket(target.family, socket.SOCK_DGRAM | platform.socket_flags) as probe:
            for level, name, value in options:
                if level in ANY_KIND:  # a mark may choose the route
                    with suppress(OSError):
                        probe.setsockopt(level, name, value)
            if device is not None:
                platform.pin(probe, device)
            probe.connect(target.sockaddr)
            return ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:  # no route: connect will say so
        return None


def is_own(target: Target) -> bool:
    """Return whether *target* is this host itself: from an address of its own the kernel goes to that very address."""
    return target.reach == "loopback" or _kernels_choice(None, target, ()) == ip_address(target.host)


def _bind(sock: BoundSocket, ip: IPAddress, target: Target, port: int | None, *, freebind: bool) -> None:
    # With a datagram socket connect(2) takes a port that nobody else has, whomever it is for.
    stream = sock.type == socket.SOCK_STREAM
    reserve = stream and sock.claim(ip, target)
    try:
        if port and stream:
            # Lets several destinations share the port, as connect(2) does with those that it chooses itself. What is
            # reserved must be nobody else's, also when the caller's options say otherwise.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(not reserve))
            if reserve and hasattr(socket, "SO_REUSEPORT"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        platform.bind(sock, ip, 0 if reserve and port is None else port, freebind=freebind)
    except OSError as error:
        circumstance = _circumstance(sock, ip, error.errno or errno.EINVAL)
        raise _refused("bind", error, ip, circumstance, family=f"IPv{ip.version}") from error.with_traceback(None)
    sock.local, sock.promised = ip, zoneless(ip)
    # To bind a link-local address is to pin the socket (ipv6(7), sin6_scope_id).
    sock.interface = sock.interface or _zone(ip)


def _circumstance(sock: socket.socket, ip: IPAddress, number: int) -> str:
    """Return in which of the circumstances of `_advice` a bind has failed."""
    if number == errno.EINVAL:
        host, port = sock.getsockname()[:2]
        if port or not ip_address(host.partition("%")[0]).is_unspecified:
            return "bound"
        return "no zone" if _needs_zone(ip) else ""
    if number == errno.EADDRNOTAVAIL and not platform.has_address(ip.version):
        return "no address"
    return "jail" if platform.place == "jail" else ""


def _refused(step: str, error: OSError, subject: object, circumstance: str = "", **about: object) -> BindError:
    number = error.errno or errno.EINVAL
    text = advice(step, number, circumstance, subject=subject, place=platform.place, **about)
    return BindError(number, text or f"{subject}: {error.strerror or os.strerror(number)}")
