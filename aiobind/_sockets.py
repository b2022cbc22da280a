"""Law: one attempt. A socket is opened, bound as decided, connected by the loop; on any other way out it is closed.

A connected socket knows where it leaves from, and tells its connector once when it ends: by ``close`` (asyncio),
by ``detach`` (uvloop, which closes the descriptor itself), or by being collected.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ._errors import BindError
from ._platform import platform

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from ._binding import Binding, IPAddress, Target
    from ._sources import Source

__all__ = ["BoundSocket", "BoundSource", "SocketOption", "bound_source", "connect", "finders", "open_bound"]

SocketOption: TypeAlias = "tuple[int, int, int | bytes]"


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
        connection: a socket, transport, ``StreamWriter`` or aiohttp websocket, as long as it is open; or an aiohttp
            response, also when its body has been read and its connection went back to the pool.

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


class BoundSocket(socket.socket):
    """A socket that knows where it leaves from, and reports its end once."""

    bound: BoundSource | None = None
    target: Target | None = None
    _on_end: Callable[[], None] | None = None

    def register(self, on_end: Callable[[], None]) -> None:
        """Count this connection as open, until *on_end* is told that it has ended."""
        self._on_end = on_end
        if self.bound is not None:
            _open[self.fileno()] = self.bound

    def close(self) -> None:
        """Close the socket."""
        descriptor = self.fileno()
        try:
            super().close()
        finally:
            if self.fileno() < 0:  # not while a makefile() object keeps it open
                self._end(descriptor)

    def detach(self) -> int:
        """Give the descriptor away; the connection counts as ended, for nobody can tell any more when it does."""
        descriptor = super().detach()
        self._end(descriptor)
        return descriptor

    def __del__(self) -> None:
        self._end(self.fileno())
        super().__del__()  # type: ignore[misc]  # closes it, with the ResourceWarning of an unclosed socket

    def _end(self, descriptor: int) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            # The number may belong to another connection by now, opened by another thread.
            if _open.get(descriptor) is self.bound:
                del _open[descriptor]
            on_end()


def open_bound(
    binding: Binding,
    family: int,
    *,
    kind: int = socket.SOCK_STREAM,
    proto: int = 0,
    options: Sequence[SocketOption] = (),
) -> BoundSocket:
    """Return a non-blocking socket with the caller's options and the binding applied.

    Raises:
        BindError: the pin or the source address was refused.
        OSError: no socket could be made (EMFILE), or an option of the caller was refused.
    """
    sock = BoundSocket(family, kind | platform.socket_flags, proto)
    try:
        if sock.gettimeout() != 0:
            sock.setblocking(False)
        platform.prepare(sock)
        # The caller's come first: should one of them name a device, ours holds, or is refused.
        for level, name, value in options:
            try:
                sock.setsockopt(level, name, value)
            except OSError as error:
                raise OSError(
                    error.errno, f"socket option ({level}, {name}) refused: {error.strerror}"
                ) from error.with_traceback(None)
        if binding.device is not None:
            _pin(sock, binding.device)
        if binding.local:
            _bind(sock, binding.local, freebind=binding.freebind)
    except BaseException:
        sock.close()
        raise
    return sock


def _pin(sock: socket.socket, device: str) -> None:
    try:
        platform.pin(sock, device)
    except OSError as error:
        raise _refused(error, _PIN_ADVICE, device) from error.with_traceback(None)


def _bind(sock: socket.socket, local: tuple[IPAddress, ...], *, freebind: bool) -> None:
    for ip in local:
        try:
            platform.bind(sock, ip, freebind=freebind)
        except OSError as error:
            # A name may stand for addresses of several hosts: the next one may be ours.
            if error.errno == errno.EADDRNOTAVAIL and ip != local[-1]:
                continue
            raise _refused(error, _BIND_ADVICE, ip) from error.with_traceback(None)
        return


_PIN_ADVICE = {
    errno.EPERM: "the pin to {} was refused: this system wants CAP_NET_RAW for it (Linux before 5.7,"
    " a sandbox, or socket_options that named a device already)",
    errno.ENODEV: "no interface named {}",
}
_BIND_ADVICE = {
    errno.EADDRNOTAVAIL: "{} is not usable on this host: no interface of this network namespace holds it,"
    " or it is still tentative",
    errno.EADDRINUSE: "no port is left on {} for this destination",
    errno.ENODEV: "the zone of {} is no interface of this host",
}


def _refused(error: OSError, advice: dict[int, str], subject: object) -> BindError:
    number = error.errno or errno.EINVAL
    reason = advice.get(number)
    text = reason.format(subject) if reason else f"{subject}: {error.strerror or os.strerror(number)}"
    return BindError(number, text)


async def connect(loop: asyncio.AbstractEventLoop, sock: socket.socket, target: Target) -> None:
    """Connect *sock* by ``loop.sock_connect``, which is given literals only: both loops resolve a name on the way.

    Raises:
        OSError: the system's answer.
    """
    address: Any = target.sockaddr
    if target.scope_id and _is_uvloop(loop):
        # uvloop drops the scope of a 4-tuple (EINVAL follows), but not that of the text. By number, for libuv looks it
        # up in a thread that may have been started in another network namespace, where the name means nothing.
        address = (f"{target.host}%{target.scope_id}", target.port)
    await loop.sock_connect(sock, address)


def _is_uvloop(loop: asyncio.AbstractEventLoop) -> bool:
    return any(kind.__module__.partition(".")[0] == "uvloop" for kind in type(loop).__mro__)
