"""Law: a connected socket of ours as anyio's stream: the same one on asyncio, uvloop and trio.

The stream owns the very socket, so that the connection counts as ended when the stream is closed, or collected. By
``SocketStream.from_socket``, anyio's hook, it would not do: on trio that refuses subclasses of ``socket.socket``; on
asyncio and uvloop a transport gets the socket, and (anyio 4.10 to 4.16) reads all that comes, without end, until the
first ``receive()`` has to wait; and a peer that has reset the connection already is a ValueError.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio.abc import SocketAttribute, SocketStream
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled

from ._sockets import bound_source, finders

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._sockets import BoundSocket, BoundSource

__all__ = ["stream_of"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def stream_of(sock: BoundSocket) -> SocketStream:
    """Return the stream of a connected *sock*, which belongs to it from now on."""
    return _Stream(sock)


class _Stream(SocketStream):
    """The stream of one connection, with the errors of anyio's own; each call but ``extra`` is a checkpoint."""

    def __init__(self, sock: BoundSocket) -> None:
        self._sock = sock
        self._receiving = anyio.ResourceGuard("reading from")
        self._sending = anyio.ResourceGuard("writing to")
        with suppress(OSError):  # as all others do; one that the peer has reset says so when it is used
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def _raw_socket(self) -> socket.socket:  # the base class makes the attributes of it
        return self._sock

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if max_bytes < 1:
            raise ValueError("max_bytes must be a positive integer")
        with self._receiving:
            data = await self._as_soon_as(anyio.wait_readable, self._sock.recv, max_bytes)
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        rest = memoryview(item)
        with self._sending:
            while True:
                rest = rest[await self._as_soon_as(anyio.wait_writable, self._sock.send, rest) :]
                if not rest:
                    return

    async def send_eof(self) -> None:
        with self._sending:
            await checkpoint()
            with suppress(OSError):  # the connection has ended already
                self._sock.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        if self._sock.fileno() >= 0:
            anyio.notify_closing(self._sock)
            self._sock.close()
        await checkpoint()

    async def _as_soon_as(
        self, ready: Callable[[BoundSocket], Awaitable[None]], operation: Callable[[_In], _Out], what: _In
    ) -> _Out:
        """Return what the system call has done: once, and not at all for who is cancelled."""
        await checkpoint_if_cancelled()
        waited = False
        while True:
            try:
                done = operation(what)
            except BlockingIOError:
                await ready(self._sock)
                waited = True
            except OSError as error:
                if self._sock.fileno() < 0:
                    raise anyio.ClosedResourceError from None
                raise anyio.BrokenResourceError from error
            else:
                if not waited:
                    await cancel_shielded_checkpoint()
                return done


def _find(connection: object) -> BoundSource | None:
    """Find it in what anyio calls a stream: ours, or TLS over it."""
    if isinstance(connection, anyio.TypedAttributeProvider):
        with suppress(LookupError):  # a stream of memory; or a closed one
            return bound_source(connection.extra(SocketAttribute.raw_socket))
    return None


finders.append(_find)
