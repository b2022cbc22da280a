"""Law: ``anyio.connect_tcp`` from a source, on asyncio, uvloop and trio. What it returns is anyio's; so are its ways.

from aiobind.anyio import connect_tcp

async with await connect_tcp("example.com", 443, source="if!eth0", tls=True) as stream: ...

connector = aiobind.Connector("if!eth0", "if!wwan0", policy=aiobind.Failover())
stream = await connect_tcp("example.com", 80, connector=connector)
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, cast, overload

import anyio
from anyio.abc import ByteStreamConnectable
from anyio.streams.tls import TLSStream

from ._connector import connect
from ._errors import AiobindError
from ._guest import hosted
from ._scope import pinned
from ._sources import parse_source
from ._streams import stream_of

if TYPE_CHECKING:
    import ssl
    from ipaddress import IPv4Address, IPv6Address
    from typing import Literal, TypedDict, Unpack

    from anyio.abc import SocketStream

    from ._connector import Connector
    from ._sockets import BoundSocket
    from ._sources import Source

    class _Options(TypedDict, total=False):
        source: str | Source | None
        connector: Connector | None
        tls_standard_compatible: bool
        happy_eyeballs_delay: float | None


__all__ = ["TCPConnectable", "connect_tcp"]


@overload
async def connect_tcp(
    remote_host: str | IPv4Address | IPv6Address,
    remote_port: int,
    *,
    tls_hostname: str,
    tls: bool = ...,
    ssl_context: ssl.SSLContext | None = ...,
    **options: Unpack[_Options],
) -> TLSStream: ...


@overload
async def connect_tcp(
    remote_host: str | IPv4Address | IPv6Address,
    remote_port: int,
    *,
    ssl_context: ssl.SSLContext,
    tls: bool = ...,
    tls_hostname: str | None = ...,
    **options: Unpack[_Options],
) -> TLSStream: ...


@overload
async def connect_tcp(
    remote_host: str | IPv4Address | IPv6Address,
    remote_port: int,
    *,
    tls: Literal[True],
    ssl_context: ssl.SSLContext | None = ...,
    tls_hostname: str | None = ...,
    **options: Unpack[_Options],
) -> TLSStream: ...


@overload
async def connect_tcp(
    remote_host: str | IPv4Address | IPv6Address,
    remote_port: int,
    *,
    tls: Literal[False] = ...,
    ssl_context: None = ...,
    tls_hostname: None = ...,
    **options: Unpack[_Options],
) -> SocketStream: ...


@overload
async def connect_tcp(
    remote_host: str | IPv4Address | IPv6Address,
    remote_port: int,
    *,
    tls: bool,
    ssl_context: ssl.SSLContext | None = ...,
    tls_hostname: str | None = ...,
    **options: Unpack[_Options],
) -> SocketStream | TLSStream: ...


async def connect_tcp(
    remote_host: str | IPv4Address | IPv6Address,
    remote_port: int,
    *,
    source: str | Source | None = None,
    connector: Connector | None = None,
    local_host: object = None,
    local_port: object = None,
    tls: bool = False,
    ssl_context: ssl.SSLContext | None = None,
    tls_standard_compatible: bool = True,
    tls_hostname: str | None = None,
    happy_eyeballs_delay: float | None = None,
) -> SocketStream | TLSStream:
    """Connect as ``anyio.connect_tcp`` does, from a source.

    One of *source* and *connector* names it; with neither it is the one that ``aiobind.use_source`` pins. A connector
    is worth having for more than a few connections: it knows the names and the interfaces already, counts, limits, and
    leaves alone what has failed. One connector serves one run of one event loop, trio's as any other.

    Args:
        remote_host: the name or the IP address of the destination.
        remote_port: its TCP port, 1 to 65535.
        source: the source to connect from; with a *connector* it need not be one of that one's, and no other is tried.
        connector: chooses among its sources, where nothing is pinned.
        local_host: refused: the source names the local end.
        local_port: refused likewise; a connector has ``local_ports``.
        tls: True: make TLS before returning. To give *ssl_context* or *tls_hostname* asks for the same.
        ssl_context: default: anyio's, ``ssl.create_default_context()``.
        tls_standard_compatible: False: close without TLS's closing handshake, and let the peer do so, as with HTTP.
        tls_hostname: the name that the certificate must have; default *remote_host*.
        happy_eyeballs_delay: RFC 8305's Connection Attempt Delay, in seconds; ``math.inf`` tries one address after the
            other. Default: that of *connector*, or 0.25.

    Returns:
        anyio's ``SocketStream``, or its ``TLSStream`` over that. ``aiobind.bound_source(stream)`` tells where it leaves
        from.

    Raises:
        AiobindError: as ``Connector.connect`` does. Each is an OSError, as what ``anyio.connect_tcp`` raises, but with
            its errno.
        ssl.SSLError: the TLS handshake failed.
        anyio.BrokenResourceError: the connection was lost in it.
        TypeError: nothing names the source, or *local_host* or *local_port* was given.
        InvalidSource: *source* names no source.
        ValueError: as ``Connector.connect`` does.
    """
    if local_host is not None or local_port is not None:
        which = "local_port" if local_host is None else "local_host"
        raise TypeError(f"{which} is not taken here: the source names the local end, as in source='192.0.2.7'")
    sock = await hosted(_connect(str(remote_host), remote_port, source, connector, happy_eyeballs_delay))
    sock.unfinished = tls = tls or ssl_context is not None or tls_hostname is not None
    stream = stream_of(sock)
    if not tls:
        return stream
    try:
        secured = await TLSStream.wrap(
            stream,
            server_side=False,
            hostname=tls_hostname or str(remote_host),
            ssl_context=ssl_context,
            standard_compatible=tls_standard_compatible,
        )
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise
    sock.unfinished = False
    return secured


async def _connect(
    host: str, port: int, source: str | Source | None, connector: Connector | None, delay: float | None
) -> BoundSocket:
    if connector is not None:
        delay = connector._delay if delay is None else delay  # noqa: SLF001
        return await connector._connect(host, port, source, 0, delay=None if delay == math.inf else delay)  # noqa: SLF001
    source = pinned(None) if source is None else source
    if source is None:
        raise TypeError("no source: name one, as in source='if!eth0', or give connector=aiobind.Connector(...)")
    delay = 0.25 if delay is None else delay
    sock = await connect(host, port, source=source, happy_eyeballs_delay=None if delay == math.inf else delay)
    return cast("BoundSocket", sock)


@dataclass
class TCPConnectable(ByteStreamConnectable):
    """A destination and whence it is connected to, for what takes anyio's connectables.

    Args:
        host: the name or the IP address of the destination.
        port: its TCP port, 1 to 65535.
        source: as in ``connect_tcp``.
        connector: as in ``connect_tcp``.

    Raises:
        InvalidSource: *source* names no source.
        ValueError: the port is not 1 to 65535.
    """

    host: str | IPv4Address | IPv6Address
    port: int
    _: KW_ONLY
    source: str | Source | None = None
    connector: Connector | None = None

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"the port must be 1 to 65535, not {self.port}")
        if self.source is not None:
            parse_source(self.source)

    async def connect(self) -> SocketStream:
        """Return a connected stream.

        Raises:
            anyio.ConnectionFailed: with the errno and the words of an AiobindError, which is its cause.
            TypeError: nothing names the source.
        """
        try:
            return await connect_tcp(self.host, self.port, source=self.source, connector=self.connector)
        except AiobindError as error:
            raise anyio.ConnectionFailed(error.errno, error.strerror) from error
