"""Law: what the rest of aiobind may ask of an operating system, and the records in which it answers."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from aiobind._binding import zoneless

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiobind._binding import IPAddress, LinkAddress

__all__ = ["AddressGone", "AddressSeen", "Feed", "LinkGone", "LinkSeen", "ListEnd", "Platform", "Record", "sockaddr"]


def sockaddr(ip: IPAddress, port: int = 0) -> tuple[str, int] | tuple[str, int, int, int]:
    """Return *ip* and *port* as ``socket.bind`` takes them.

    Raises:
        OSError: ENODEV (the zone of *ip* is no interface).
    """
    zone = ip.scope_id if ip.version == 6 else None
    if zone is None:
        return zoneless(ip), port
    try:
        index = socket.if_nametoindex(zone)
    except OSError as error:  # it carries no errno
        raise OSError(errno.ENODEV, f"no interface named {zone!r}") from error
    # Python drops the zone of a text address in bind(): only the 4-tuple carries it.
    return zoneless(ip), port, 0, index


class LinkSeen(NamedTuple):
    """An interface exists, or has changed."""

    ifindex: int
    name: str
    loopback: bool
    kind: str
    master: int
    altnames: tuple[str, ...]
    up: bool = True
    carrier: bool = True


class LinkGone(NamedTuple):
    """An interface is no more."""

    ifindex: int


class AddressSeen(NamedTuple):
    """An interface holds an address, or the address has changed.

    Attributes:
        ifindex: the interface.
        address: the address.
        entry: tells it from other entries of the interface with the same address.
    """

    ifindex: int
    address: LinkAddress
    entry: bytes = b""


class AddressGone(NamedTuple):
    """An interface has lost an address, or one of its entries with that address."""

    ifindex: int
    ip: IPAddress
    entry: bytes = b""


class ListEnd(NamedTuple):
    """Everything that `Feed.ask` asked for has been told.

    Attributes:
        whole: False when something changed meanwhile, so that the list must be asked for once more.
    """

    whole: bool


Record: TypeAlias = LinkSeen | LinkGone | AddressSeen | AddressGone | ListEnd


class Feed(Protocol):
    """What the system tells of its interfaces: a stream of records, read without ever blocking."""

    #: whether the descriptor is readable before the call that makes a change returns
    announces: bool

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is something to read."""
        ...

    def quiet(self) -> bool:
        """Return whether there is nothing to read."""
        ...

    def ask(self) -> None:
        """Ask for a record of every interface and address, and a `ListEnd` behind them."""
        ...

    def read(self) -> Sequence[Record] | None:
        """Return what has come, or None when nothing has.

        Raises:
            OSError: the system refused, or (ENOBUFS) records were lost: those that had come have been dropped as well,
                with the list that was being told, and a new one must be asked for.
        """
        ...

    def close(self) -> None:
        """Close the descriptor."""
        ...


class Platform(Protocol):
    """What an operating system can do for a source."""

    #: what this system calls the place whose addresses a process may use: "network namespace", "jail", "host"
    place: str

    #: flags of socket(2) that make the new socket non-blocking and not inherited, where there are such
    socket_flags: int

    def prepare(self, sock: socket.socket) -> None:
        """Have connect(2) choose the port of *sock* from all that there are; the caller's own options come after it."""
        ...

    def pin(self, sock: socket.socket, device: str, ifindex: int = 0) -> None:
        """Let every packet of *sock* leave by *device*, whose index that is where it is known; or raise OSError."""
        ...

    def bind(self, sock: socket.socket, ip: IPAddress, port: int | None, *, freebind: bool = False) -> None:
        """Give *sock* the source address *ip*, or raise OSError.

        Args:
            sock: the socket.
            ip: the address.
            port: None leaves the port to connect(2), which shares it among destinations where the system can; 0
                reserves one now, for this socket alone.
            freebind: no interface needs to hold *ip*.
        """
        ...

    def recipe(self, ifindex: int) -> tuple[tuple[int, int, int], ...] | None:
        """Return the options that `prepare`, `pin` by *ifindex* (0: none) and `bind` without a port set.

        None: they do not set the same each time. Whoever sets them by himself does all of it by the methods if the
        system refuses one.
        """
        ...

    def has_address(self, version: int) -> bool:
        """Return whether any interface has an address of IP *version*; True when nobody can tell."""
        ...

    def sent(self, sock: socket.socket) -> bool:
        """Return whether *sock* has sent anything; False when nobody can tell."""
        ...

    def silent_hop(self, ifindex: int, target: str, source: str) -> str | None:
        """Return the next hop from *source* to *target* by an interface, if nobody answers for it on the link."""
        ...

    def routed_here(self, ip: IPAddress) -> bool | None:
        """Return whether packets to *ip* are delivered to this host; None when nobody can tell. Never blocks."""
        ...

    def abort(self, sock: socket.socket) -> None:
        """End the connection of *sock* at once: who reads or writes it, by any loop, is told ECONNRESET.

        Where the system cannot say so, they are told its end. Nothing happens to one that is closed. The figures of
        `traffic` may be lost: take them before.
        """
        ...

    def traffic(self, sock: socket.socket) -> tuple[int, int, bool, bool] | None:
        """Return what a connection has carried; None when nobody can tell, or there is none.

        Returns:
            The bytes of payload that the peer has acknowledged; those that have come from it; whether to close it now
            leaves its local port in TIME_WAIT here, which is so where the peer has not closed first; and whether there
            are bytes that the peer has not acknowledged, and that the system goes on to send then.
        """
        ...

    def port_count(self) -> int:
        """Return how many local ports connect(2) has to choose from, for each source address and destination."""
        ...

    def keeps_to(self, ports: range) -> bool:
        """Return whether connect(2) itself can be told, by `limit`, to choose from *ports* and nothing else."""
        ...

    def limit(self, sock: socket.socket, ports: range) -> None:
        """Have connect(2), or a bind to port 0, choose the port of *sock* from *ports*."""
        ...

    def feed(self) -> Feed:
        """Open the stream of what happens to the interfaces, or raise OSError."""
        ...
