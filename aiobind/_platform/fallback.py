"""Law: an operating system without a file of its own can bind an address, and refuses to pretend more."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from .base import sockaddr

if TYPE_CHECKING:
    from aiobind._binding import IPAddress

    from .base import Feed

__all__ = ["Fallback"]


class Fallback:
    """Literal addresses work, as everywhere; interfaces do not yet."""

    place = "host"
    socket_flags = 0

    def __init__(self, name: str) -> None:
        self._name = name

    def prepare(self, sock: socket.socket) -> None:
        """Do nothing."""

    def pin(self, sock: socket.socket, device: str, ifindex: int = 0) -> None:
        """Refuse."""
        self._refuse("pinning a connection to an interface")

    def bind(self, sock: socket.socket, ip: IPAddress, port: int | None, *, freebind: bool = False) -> None:
        """Bind *ip*; the port is reserved at once, for want of IP_BIND_ADDRESS_NO_PORT."""
        if freebind:
            self._refuse("a net! source")
        sock.bind(sockaddr(ip, port or 0))

    def recipe(self, ifindex: int) -> tuple[tuple[int, int, int], ...] | None:
        """Return None: sockets are made step by step."""
        return None

    def has_address(self, version: int) -> bool:
        """Return True: nobody can tell."""
        return True

    def sent(self, sock: socket.socket) -> bool:
        """Return False: nobody can tell."""
        return False

    def silent_hop(self, ifindex: int, target: str, source: str) -> str | None:
        """Return None: nobody can tell."""
        return None

    def routed_here(self, ip: IPAddress) -> bool | None:
        """Return None: nobody can tell."""
        return None

    def abort(self, sock: socket.socket) -> None:
        """Shut the connection down: to those who read it that is its end."""
        with suppress(OSError):  # it has ended by itself
            sock.shutdown(socket.SHUT_RDWR)

    def traffic(self, sock: socket.socket) -> tuple[int, int, bool, bool] | None:
        """Return None: nobody can tell."""
        return None

    def port_count(self) -> int:
        """Return the size of the range that IANA names dynamic (RFC 6335 section 6), 49152 to 65535."""
        return 16384

    def keeps_to(self, ports: range) -> bool:
        """Return False: no option here keeps connect(2) to a range."""
        return False

    def limit(self, sock: socket.socket, ports: range) -> None:
        """Do nothing, as `keeps_to` says."""

    def feed(self) -> Feed:
        """Refuse."""
        self._refuse("looking up the addresses of an interface")

    def _refuse(self, what: str) -> NoReturn:
        raise OSError(errno.EOPNOTSUPP, f"{what} is not supported on this platform yet ({self._name})")
