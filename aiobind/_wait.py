"""Law: a connect is waited for in one of two ways, and which one is decided here, once for each loop.

``loop.sock_connect`` is the contract with every loop, and the default on asyncio. It is wrong for uvloop, whose own one
drops the scope of an IPv6 address, and hands even a literal address to libuv's four threads: behind fifty slow names
each SYN left seconds after the last look at the interfaces; and it costs most.

The other way is an epoll instance of aiobind's own, which the loop reads like any descriptor (epoll(7): it is readable
when one of those in it is ready). Each pending connect is put into it for one event, so that it needs neither the
selector of the loop nor a handle. It is the way on uvloop, and on asyncio for ``fast_connect=True``.

Where there is no epoll, or a loop reads no descriptors (Proactor), it is always ``loop.sock_connect``.

A datagram socket has nobody to wait for: it is `associate`.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

from ._loops import PerLoop

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable
    from typing import Any, Self

__all__ = ["UNDER_WAY", "Connect", "NoPeerError", "Pending", "associate", "is_uvloop", "way_of"]

#: Connects a non-blocking socket to a literal address: the SYN leaves before this first waits. Raises OSError, the
#: system's answer.
Connect: TypeAlias = "Callable[[socket.socket, Any], Awaitable[None]]"

#: What connect(2) answers when it goes on; EAGAIN is no such answer for TCP and UDP.
UNDER_WAY = (errno.EINPROGRESS, errno.EALREADY, errno.EINTR)
_WRITABLE, _ONCE = getattr(select, "EPOLLOUT", 0x4), getattr(select, "EPOLLONESHOT", 0x40000000)


def way_of(loop: asyncio.AbstractEventLoop, *, fast: bool = False) -> Connect:
    """Return how to connect on *loop*.

    Args:
        loop: the running one.
        fast: by the shared epoll also where ``loop.sock_connect`` is right.
    """
    if (fast or is_uvloop(loop)) and hasattr(select, "epoll"):
        with suppress(NotImplementedError):  # no add_reader
            return Pending.of(loop).connect
    return loop.sock_connect


class NoPeerError(OSError):
    """The address is that of nobody in particular."""


async def associate(sock: socket.socket, address: Any) -> None:
    """Connect a datagram socket, which sends nothing and is done at once (udp(7)).

    ``loop.sock_connect`` would take EAGAIN, by which Linux says that no port is left, for a reason to wait; and then,
    since the socket is writable, for success.

    Raises:
        NoPeerError: a broadcast address.
        OSError: the system's answer; EADDRNOTAVAIL where no port is left.
    """
    number = sock.connect_ex(address)
    if number == errno.EAGAIN:
        number = errno.EADDRNOTAVAIL
    elif number == errno.EACCES:  # a prohibition of the routing table says the same
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if not sock.connect_ex(address):
            raise NoPeerError(number, "a broadcast address, from which no answer comes")
    if number:
        raise OSError(number, os.strerror(number))


class Pending(PerLoop):
    """The connects of one loop that are under way, in an epoll instance."""

    @classmethod
    def _open(cls, loop: asyncio.AbstractEventLoop) -> Self:
        return cls(loop, select.epoll())

    def __init__(self, loop: asyncio.AbstractEventLoop, epoll: select.epoll) -> None:
        super().__init__(loop, epoll)
        self._new_future = loop.create_future
        self._epoll = epoll
        self._waiting: dict[int, asyncio.Future[int]] = {}

    async def connect(self, sock: socket.socket, address: Any) -> None:
        """Connect *sock*, which is non-blocking, to a literal *address*.

        Raises:
            OSError: the system's answer.
        """
        number = sock.connect_ex(address)
        if number in UNDER_WAY:
            descriptor = sock.fileno()
            ready = self._waiting[descriptor] = self._new_future()
            try:
                self._epoll.register(descriptor, _WRITABLE | _ONCE)
                events = await ready
            except BaseException:
                self._give_up(descriptor, ready)
                raise
            if events == _WRITABLE:
                return
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))

    def _give_up(self, descriptor: int, ready: asyncio.Future[int]) -> None:
        if self._waiting.get(descriptor) is ready:
            del self._waiting[descriptor]
            with suppress(OSError, ValueError):  # closed already
                # To close it is not enough where another process has it as well (a fork): an event would come under a
                # number that is another connection's by then.
                self._epoll.unregister(descriptor)

    def on_readable(self) -> None:
        """Wake those whose connect has ended."""
        for descriptor, events in self._epoll.poll(0):
            ready = self._waiting.pop(descriptor, None)
            if ready is not None and not ready.done():
                ready.set_result(events)


def is_uvloop(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether *loop* is uvloop's, or derived from that."""
    kind = type(loop)
    known = _uvloops.get(kind)
    if known is None:
        known = _uvloops[kind] = any(base.__module__.partition(".")[0] == "uvloop" for base in kind.__mro__)
    return known


#: Whether a kind of loop is uvloop's.
_uvloops: weakref.WeakKeyDictionary[type[asyncio.AbstractEventLoop], bool] = weakref.WeakKeyDictionary()
