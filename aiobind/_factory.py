"""Law: the synchronous form. A socket bound to its source, not yet connected, for clients that connect themselves."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, TypeAlias

from ._binding import Refusal, Target, bind_any
from ._errors import BindError, explained
from ._interfaces import Interfaces
from ._plan import not_routed
from ._platform import platform
from ._resolve import literal
from ._sockets import Kind, Opening
from ._sources import Address, Host, Interface, Prefix, parse_source

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable
    from typing import Any

    from ._binding import Binding, IPAddress
    from ._interfaces import InterfaceTable
    from ._sockets import SocketOption
    from ._sources import Source

__all__ = ["socket_factory"]

AddrInfo: TypeAlias = "tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[Any, ...]]"


def socket_factory(
    source: str | Source, *, socket_options: Iterable[SocketOption] = ()
) -> Callable[[AddrInfo], socket.socket]:
    """Return a function that makes a socket bound to *source*, to be connected by others.

    For ``aiohttp.TCPConnector(socket_factory=...)`` and ``aiohappyeyeballs.start_connection``, which hand it one of
    getaddrinfo's tuples. Prefer ``BoundTCPConnector`` and ``Connector``: only they try other sources, keep idle
    connections apart by source, and hold the local address of a connection against the promise.

    Args:
        source: an interface, an address or a prefix. A ``host!`` name would have to be looked up, which blocks.
        socket_options: ``(level, option, value)`` to set before the socket is bound.

    Returns:
        A function of ``(family, type, proto, canonname, sockaddr)`` that returns a non-blocking socket, and raises
        ``BindError`` with the errno of what failed (EPERM, ENODEV, EADDRNOTAVAIL, ENETUNREACH) as ``Connector`` does.

    Raises:
        InvalidSource: *source* names no source.
        TypeError: *source* is or contains a host name.
    """
    parsed = parse_source(source)
    if isinstance(parsed, Host) or (isinstance(parsed, Interface) and isinstance(parsed.local, Host)):
        raise TypeError(
            f"{parsed} has a name that must be looked up, which a socket factory cannot do without blocking the"
            " event loop: use aiobind.Connector or aiobind.aiohttp.BoundTCPConnector"
        )
    options = tuple(socket_options)
    lock = threading.Lock()  # of two readers of the news each would get one half, in threads as after a fork
    interfaces: Interfaces | None = None
    process = os.getpid()

    def table() -> InterfaceTable:
        nonlocal interfaces, process
        try:
            if interfaces is None or process != os.getpid():
                interfaces, process = Interfaces(platform.feed()), os.getpid()
            return interfaces.caught_up()
        except OSError as error:
            reason = f"the interfaces of this host cannot be read: {error.strerror}"
            raise BindError(error.errno or errno.EINVAL, reason) from error

    def on_address(ip: IPAddress, target: Target, *, freebind: bool = False) -> Binding | Refusal:
        own = table().own if ip.is_loopback and target.reach != "loopback" else ()
        return bind_any((ip,), target, own=own, freebind=freebind)

    def decide(target: Target) -> Binding | Refusal:
        match parsed:
            case Interface(name, Address(ip)):
                return table().bind(name, target, (ip,))
            case Interface(name):
                return table().bind(name, target)
            case Prefix():
                ip = parsed.pick()
                decision = on_address(ip, target, freebind=True)
                return decision if isinstance(decision, Refusal) else not_routed(parsed, ip) or decision
            case Address(ip):
                return on_address(ip, target)

    def factory(addr_info: AddrInfo) -> socket.socket:
        family, kind, proto, _, sockaddr = addr_info
        address = literal(str(sockaddr[0]))
        if address is None:
            raise ValueError(f"a socket factory takes addresses, not names: {sockaddr[0]!r}")
        target = Target.of(address.ip, sockaddr[1], address.scope_id or (sockaddr[3:] or (0,))[0])
        try:
            if target.family != family:
                raise BindError(errno.EADDRNOTAVAIL, "an IPv4-mapped address: give the IPv4 address")
            with lock:
                decision = decide(target)
            if isinstance(decision, Refusal):
                raise BindError(*decision)
            return Opening(decision, target, kind=Kind(kind, proto), options=options).open()
        except BindError as error:
            text = explained(parsed, str(target), error.strerror or "")
            number = error.errno or errno.EINVAL
            raise BindError(number, text, source=parsed, destination=str(target)) from error.__cause__

    return factory
