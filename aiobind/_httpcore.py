"""Law: what httpcore asks of a network, from a source: connections, and streams over them.

    BoundBackend.connect_tcp    httpcore asks for a connection
    connected                   our connect, with the errors and the timeout of httpcore
    Stream                      what httpcore reads and writes: anyio's stream of our socket, or TLS over that

httpcore2 is httpcore in new hands: both are served, and neither is imported. Their errors carry ours as the argument
(``httpcore.ConnectError(error)``), which is httpcore's own way to do that: a cause would be lost where it says
``raise exc from None``.
"""

from __future__ import annotations

import errno
import socket
import ssl
import sys
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import anyio
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSAttribute, TLSStream

from ._connector import Connector
from ._errors import AiobindError, Attempt, BindError, ConnectError, explained
from ._faults import destination_of, gone
from ._guest import hosted
from ._streams import stream_of

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator

    import httpcore
    import httpcore2

    from ._sockets import BoundSocket
    from ._sources import Source

    class _NetworkBackend(httpcore.AsyncNetworkBackend, httpcore2.AsyncNetworkBackend):
        async def connect_tcp(self, *args: Any, **keywords: Any) -> Any: ...
        async def connect_unix_socket(self, *args: Any, **keywords: Any) -> Any: ...
        async def sleep(self, seconds: float) -> None: ...

else:

    class _NetworkBackend: ...  # it is known by what it can do


__all__ = ["BoundBackend", "Stream", "connected", "error_of"]

#: Options that would undo a pin, once connected.
_PINS = {(socket.SOL_SOCKET, number) for number in (getattr(socket, "SO_BINDTODEVICE", 25), 62)}  # SO_BINDTOIFINDEX
_EXTRAS = {
    "ssl_object": TLSAttribute.ssl_object,
    "client_addr": SocketAttribute.local_address,
    "server_addr": SocketAttribute.remote_address,
}
_DAMAGED = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, ssl.SSLError)


class BoundBackend(_NetworkBackend):
    """An ``AsyncNetworkBackend`` for httpcore and httpcore2, whose connections leave from the sources that you name.

    As in ``httpcore.AsyncConnectionPool(network_backend=BoundBackend("if!eth0"))``. httpcore's pool knows of no
    sources: it uses an idle connection again for whatever request comes next. So give a pool one source, or several and
    a policy that chooses for each new *connection*. ``use_source`` too is about those that are made inside, only.
    ``BoundTransport`` keeps them apart.

    Args:
        sources: one or more sources, as for ``aiobind.Connector``.
        connector: connects, instead of a new one for *sources*.
        **options: the keywords of ``aiobind.Connector``.

    Attributes:
        connector: what connects: ``stats()``, ``use_source()``, ``add()``, ``remove()`` and ``report()`` are there.

    Raises:
        TypeError: both *sources* and a *connector* were given, or neither.
        InvalidSource: a text names no source.
        ValueError, ImportError: as ``aiobind.Connector``.
    """

    def __init__(self, *sources: str | Source, connector: Connector | None = None, **options: Any) -> None:
        if connector is not None and (sources or options):
            raise TypeError("give either sources, with their options, or a connector that has them")
        self.connector = Connector(*sources, **options) if connector is None else connector

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[tuple[Any, ...]] | None = None,
    ) -> Any:
        """Return an ``AsyncNetworkStream`` that is connected from a source.

        Args:
            host: a name or a literal IP address.
            port: its TCP port, 1 to 65535.
            timeout: in seconds; None: none.
            local_address: refused: the source names the local end.
            socket_options: are set once it is connected, as httpcore does; ``BoundBackend(socket_options=...)`` sets
                them before.

        Raises:
            TypeError: *local_address* was given, or an option that would undo the pin.
            httpcore.ConnectTimeout: there was no connection in time; ``.args[0]`` is the ``ConnectError``.
            httpcore.ConnectError: there is none; ``.args[0]`` is the ``AiobindError``.
        """
        if local_address is not None:
            raise TypeError("local_address is not taken here: the source names the local end, as in '192.0.2.7'")
        options = [*(socket_options or ())]
        if any(option[:2] in _PINS for option in options):
            raise TypeError("socket_options: the source names the interface, as in 'if!eth0'")
        connecting = cast("Coroutine[Any, Any, BoundSocket]", self.connector.connect(host, port))
        return await connected(connecting, destination_of(host, port), timeout, options=options)

    async def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Any = None) -> Any:
        """Refuse *path*, with whatever *timeout* and *socket_options*: a Unix domain socket leaves by no interface."""
        raise TypeError("a Unix domain socket has no source: httpcore's own backend connects to it")

    async def sleep(self, seconds: float) -> None:
        """Wait for so many *seconds*."""
        await anyio.sleep(seconds)


async def connected(
    connecting: Coroutine[Any, Any, BoundSocket],
    destination: str,
    timeout: float | None,
    *,
    source: Source | None = None,
    options: Iterable[tuple[Any, ...]] = (),
) -> Stream:
    """Return the stream of the socket that *connecting*, a connect of ours, returns; *source* is for messages."""
    try:
        with anyio.fail_after(timeout):
            sock = await hosted(connecting)
    except AiobindError as error:
        silent = isinstance(error, ConnectError) and error.errno == errno.ETIMEDOUT
        raise error_of("ConnectTimeout" if silent else "ConnectError", error) from error
    except TimeoutError as error:
        reason = f"no connection within {timeout:g} s"
        text = f"connect to {destination}: {reason}" if source is None else explained(source, destination, reason)
        attempts = [Attempt(source, destination, TimeoutError(errno.ETIMEDOUT, reason))]
        late = ConnectError(errno.ETIMEDOUT, text, source=source, destination=destination, attempts=attempts)
        raise error_of("ConnectTimeout", late) from error
    stream = Stream(stream_of(sock), sock, destination)
    try:
        for option in options:
            sock.setsockopt(*option)
        if (lost := stream.lost()) is not None:  # in the very moment in which it was made
            raise lost
    except Exception as error:
        sock.close()
        if isinstance(error, OSError):
            raise error_of("ConnectError", error) from error
        raise
    return stream


class Stream:
    """An ``AsyncNetworkStream`` over a stream of anyio's.

    Attributes:
        sock: the socket below, whatever there is between.
    """

    def __init__(self, stream: ByteStream, sock: BoundSocket, destination: str) -> None:
        self._stream = stream
        self._destination = destination
        self.sock = sock

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._errors("ReadTimeout", "ReadError"), anyio.fail_after(timeout):
            try:
                return await self._stream.receive(max_bytes)
            except anyio.EndOfStream:
                if self.sock.lost:  # the system may end what it was told to cut as if the peer had
                    raise
                return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if buffer:
            with self._errors("WriteTimeout", "WriteError"), anyio.fail_after(timeout):
                await self._stream.send(buffer)

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Stream:
        self.sock.unfinished = True  # should the link go meanwhile, it is ended at once
        try:
            with self._errors("ConnectTimeout", "ConnectError"), anyio.fail_after(timeout):
                secured = await TLSStream.wrap(
                    self._stream,
                    ssl_context=ssl_context,
                    hostname=server_hostname,
                    standard_compatible=False,
                    server_side=False,
                )
        except BaseException:
            await self.end()
            raise
        self.sock.unfinished = False
        return Stream(secured, self.sock, self._destination)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def end(self) -> None:
        """Close it at once, also for who is cancelled."""
        await anyio.aclose_forcefully(self._stream)

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return _has_ended(self.sock)
        if info == "socket":
            return self.sock
        return self._stream.extra(_EXTRAS[info], None) if info in _EXTRAS else None

    def lost(self) -> BindError | None:
        """Return what has become of the connection, if its interface or address has gone."""
        bound = self.sock.bound
        return gone(bound.source, self._destination) if self.sock.lost and bound is not None else None

    @contextmanager
    def _errors(self, late: str, broken: str) -> Iterator[None]:
        """Raise httpcore's errors of these names instead of anyio's."""
        try:
            yield
        except TimeoutError as error:
            raise error_of(late, self.lost() or error) from error
        except _DAMAGED as error:
            raise error_of(broken, self.lost() or error) from error


def _has_ended(sock: BoundSocket) -> bool:
    """Return whether an idle connection is of no use any more: all that there can be to read is its end."""
    if sock.lost:
        return True
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:  # closed, also by us
        pass
    return True


def error_of(name: str, error: Exception | str) -> Exception:
    """Return httpcore's error of that name; who has loaded both httpcores gets one that is an error of both."""
    # Of `httpx2.alias_httpx` both are the same.
    kinds = dict.fromkeys(getattr(sys.modules[core], name) for core in ("httpcore", "httpcore2") if core in sys.modules)
    return _one_of(*kinds)(error)


@lru_cache
def _one_of(*kinds: type[Exception]) -> type[Exception]:
    return kinds[0] if len(kinds) == 1 else type(kinds[0].__name__, kinds, {})
