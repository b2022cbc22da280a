"""Law: the doors of asyncio. Each one routes, dials, and hands the connected socket to asyncio's own machinery."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from ._dial import Dialer, lies_at
from ._errors import AiobindError, is_sources_fault, merged
from ._faults import place_of
from ._limits import Limits
from ._origin import Origin
from ._scope import scoped
from ._sockets import handed_over

if TYPE_CHECKING:
    import ssl as ssl_module
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

    from ._binding import Target
    from ._events import Event
    from ._origin import SourceStats
    from ._policy import Policy
    from ._roster import Route, Turn
    from ._sockets import BoundSocket, SocketOption
    from ._sources import Source

__all__ = ["Connector", "connect"]

_ProtocolT = TypeVar("_ProtocolT", bound=asyncio.BaseProtocol)


def make_dialer(
    sources: Sequence[str | Source],
    *,
    dns: str | Sequence[str],
    ttl: float | None,
    limit_per_source: int,
    limit_per_source_host: int,
    rate_per_source: float | None,
    rate_per_source_host: float | None,
    **options: Any,
) -> Dialer:
    """Return the dialer of a connector, by the options that all connectors have in common."""
    ttl = seconds("ttl_dns_cache", ttl)
    options["limits"] = Limits[Origin](
        connections=limit_per_source,
        connections_per_host=limit_per_source_host,
        rate=rate_per_source,
        rate_per_host=rate_per_source_host,
    )
    if dns == "system":
        return Dialer(sources, ttl=ttl, **options)
    if dns != "source" and (isinstance(dns, (str, bytes)) or not isinstance(dns, Iterable)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f'dns is "system", "source" or a sequence of addresses, as in dns=("192.0.2.53",), not {dns!r}'
        )
    from .dns import SourceLookup  # noqa: PLC0415 - an extra

    servers = None if dns == "source" else dns
    return Dialer(sources, ttl=ttl, lookup=lambda reach: SourceLookup(reach, servers, ttl=ttl), **options)


def seconds(option: str, value: float | None) -> float | None:
    """Return *value*, a time or None."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{option} is a number of seconds, or None, not {value!r}")
    if not value >= 0:
        raise ValueError(f"{option} is a number of seconds, 0 or more, or None, not {value}")
    return value


class Sourced:
    """What every connector can do with its sources."""

    _dialer: Dialer

    def use_source(self, source: str | Source) -> AbstractContextManager[Source]:
        """Pin what this connector connects inside the ``with`` block to *source*, which need not be one of its own.

        What is pinned never moves to another source. This wins over ``aiobind.use_source``; an argument ``source=``
        wins over both. Tasks created inside inherit it.

        Raises:
            InvalidSource: *source* names no source.
        """
        return scoped(self._dialer.scope, source)

    def add(self, source: str | Source) -> None:
        """Choose from *source* as well, from now on; it comes behind the others.

        Raises:
            InvalidSource: *source* names no source.
            ValueError: it is one of this connector's already.
        """
        self._dialer.add(source)

    def remove(self, source: str | Source, *, drain: bool = True) -> None:
        """Choose *source* no more, from now on. It stays in ``stats()`` while it has connections.

        Args:
            source: one of this connector's.
            drain: let its connections do what they are doing: those of a pool are closed as soon as they are idle.
                False cuts them: whoever uses one is told ECONNRESET.

        Raises:
            InvalidSource: *source* names no source.
            ValueError: it is none of this connector's, or the only one.
        """
        self._removed(self._dialer.remove(source, drain=drain))

    def _removed(self, origin: Origin) -> None:
        """Close what lies idle of a source that was removed."""

    def report(self, source: str | Source, *, host: str, ok: bool = False, seconds: float | None = None) -> None:
        """Say that *source* is banned at *host*, as by a status 429 or 403: others go there for a while.

        Everything else from *source* goes on. Where all sources are banned, the one whose ban ends first is used.

        Args:
            source: one of this connector's, or one from outside that has connections.
            host: the destination.
            ok: True: it is not banned any more.
            seconds: for how long, as in ``Retry-After``; default: half a minute, and twice as long each further time,
                up to an hour.

        Raises:
            InvalidSource: *source* names no source.
            TypeError: the host is no text, or *seconds* no number.
            ValueError: the source is none of this connector's; the host is empty or a URL; or *seconds* is negative or
                not finite.
        """
        self._dialer.report(source, self._place(host), ok=ok, seconds=seconds)

    def _place(self, host: str) -> str:
        """Return *host* as requests spell it."""
        return host

    def stats(self) -> tuple[SourceStats, ...]:
        """Return the figures of each source; one from outside the list is there while it has connections.

        Any thread may ask.
        """
        return self._dialer.stats(self._idle_of())

    def _idle_of(self) -> Mapping[Source, int]:
        """Return how many connections lie idle, for each source."""
        return {}


class Connector(Sourced):
    """Makes outgoing connections from the sources that you name, on one event loop.

    A connection leaves from the source that the policy chooses, or fails; it never leaves by another one. When a
    source fails for a reason of its own (its interface is gone, its address is not on this host, it has no route, no
    port is left), the next one is tried: nothing has been sent yet.

    Args:
        sources: one or more sources, as texts or values: ``"if!eth0"``, ``"192.0.2.7"``, ``"host!crawler3.example"``,
            ``"ifhost!eth0!192.0.2.7"``, ``"net!2001:db8:7::/64"``.
        policy: chooses the source of each connection; default ``RoundRobin()``. An instance serves one connector.
        happy_eyeballs_delay: RFC 8305's Connection Attempt Delay, in seconds: how long an attempt may take before the
            next address is tried beside it. None tries one address after the other.
        local_ports: the local ports to connect from, as in ``range(40000, 40100)``; default: the automatic range
            (net.ipv4.ip_local_port_range). Within that the kernel chooses (IP_LOCAL_PORT_RANGE, Linux 6.3); outside, or
            where some are in net.ipv4.ip_local_reserved_ports, each connection is given one, shared among destinations,
            and up to 1,000 are tried. On such ports no other process's connection can take the 4-tuple of ours. UDP
            queries for names leave from any port.
        socket_options: ``(level, option, value)`` to set on each socket before it is bound and connected.
        dns: who is asked for names: ``"system"``, the operating system's resolver, which goes its own way, outside the
            pin; ``"source"``, the servers of ``/etc/resolv.conf``, from the source of the connection; or the addresses
            of servers, as in ``("192.0.2.53",)``, likewise. The last two need the extra ``aiobind[dns]``, and heed
            ``/etc/hosts`` and the search list. A name in ``ifhost!`` is asked for through its interface; that of
            ``host!``, which has none, by whatever way the routing table names. Servers are asked at port 53.
        strict: False: where the pin to an interface is not permitted (EPERM: Linux before 5.7 without CAP_NET_RAW, a
            sandbox), bind one of the interface's addresses alone, as curl does. Egress is not promised then: it is
            logged once as a warning, and ``bound_source(...).interface`` is None.
        borrow: the source address may belong to another interface of this host (unnumbered links, WireGuard, PPP, an
            address on ``lo``), where the pinned one has none that serves; ``ifhost!`` takes any. The pin stays.
        direct: hosts and networks that are exempt from every source, as in ``("localhost", "127.0.0.0/8")``: they are
            connected to as the routing table has it, and ``bound_source(...).interface`` is None. A host is exempt by
            that very name, which the operating system looks up whatever *dns* says; a network by address. DNS servers
            never are.
        fast_connect: wait for connects on an epoll that all of the loop share, instead of ``loop.sock_connect``: less
            CPU for each (``bench/results`` says how much). uvloop has it always; where there is no epoll, or the loop
            reads no descriptors, nobody has it.
        ttl_dns_cache: how long the addresses of a name (of a destination or of a ``host!`` source) are kept, in
            seconds. 0 asks each time, None keeps them for as long as the loop lives. With ``dns`` not for longer than
            the answer itself says.
        limit_per_source: how many connections of one source may be open or being made at the same time; 0 (the
            default) for no limit. A source with room goes before one without; where none has, a connection waits for
            the first that gets some, in the order of arrival.
        limit_per_source_host: the same, for each source and destination host.
        rate_per_source: how many connections one source may begin per second, evenly spaced; None for no limit. Needs
            the extra ``aiobind[limits]``.
        rate_per_source_host: the same, for each source and destination host.
        abort_on_link_down: cut the established connections whose interface goes down, or away, or loses their address:
            whoever uses one is told ECONNRESET at once. By default they are left alone: the kernel tells them nothing,
            and they go on should the interface come back in time.
        sticky_prefix: an address of ``net!`` is kept for each destination host, as long as the connector lives, instead
            of a fresh one for each connection.
        on_event: is called on the event loop with each ``Event``: attempts, and sources that are suspended or recover.

    Raises:
        InvalidSource: a text names no source.
        TypeError: no source was named, or something else than texts and sources; or *local_ports* or *direct* is of a
            wrong type.
        ValueError: a source was named twice; or *local_ports*, *direct*, *dns* or a limit makes no sense; or *policy*
            serves another connector.
        ImportError: *dns* needs ``aiobind[dns]``, a rate ``aiobind[limits]``.

    There is no timeout: use ``asyncio.timeout``. A connector belongs to the event loop of its first use.
    """

    def __init__(
        self,
        *sources: str | Source,
        policy: Policy | None = None,
        happy_eyeballs_delay: float | None = 0.25,
        local_ports: range | None = None,
        socket_options: Iterable[SocketOption] = (),
        dns: str | Sequence[str] = "system",
        strict: bool = True,
        borrow: bool = False,
        direct: Sequence[str] = (),
        fast_connect: bool = False,
        ttl_dns_cache: float | None = 10.0,
        limit_per_source: int = 0,
        limit_per_source_host: int = 0,
        rate_per_source: float | None = None,
        rate_per_source_host: float | None = None,
        abort_on_link_down: bool = False,
        sticky_prefix: bool = False,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        self._delay = seconds("happy_eyeballs_delay", happy_eyeballs_delay)
        self._dialer = make_dialer(
            sources,
            policy=policy,
            local_ports=local_ports,
            socket_options=socket_options,
            dns=dns,
            strict=strict,
            borrow=borrow,
            direct=direct,
            fast_connect=fast_connect,
            ttl=ttl_dns_cache,
            limit_per_source=limit_per_source,
            limit_per_source_host=limit_per_source_host,
            rate_per_source=rate_per_source,
            rate_per_source_host=rate_per_source_host,
            abort_on_link_down=abort_on_link_down,
            sticky_prefix=sticky_prefix,
            on_event=on_event,
        )

    def __repr__(self) -> str:
        return f"Connector({', '.join(repr(str(origin.source)) for origin in self._dialer.roster.listed)})"

    async def connect(
        self, host: str, port: int, *, source: str | Source | None = None, family: int = 0
    ) -> socket.socket:
        """Return a connected, non-blocking socket. The caller owns it and closes it.

        Args:
            host: a name or a literal IP address of the destination, with its zone where it needs one.
            port: its TCP port, 1 to 65535.
            source: the source of this connection, which need not be one of the connector's; it wins over the policy
                and over ``use_source``, and no other source is tried.
            family: ``socket.AF_INET`` or ``socket.AF_INET6`` to use only that; 0 for both.

        Raises:
            BindError: each source failed for a reason of its own (EPERM, ENODEV, EADDRNOTAVAIL, EADDRINUSE, EINVAL,
                ENETUNREACH when it cannot lead there, EHOSTUNREACH when it has no carrier); nothing was sent.
            ConnectError: the destination was tried and could not be reached; errno is the first attempt's
                (ECONNREFUSED, ENETUNREACH, EHOSTUNREACH, ETIMEDOUT, ...), and ``.attempts`` has them all.
            ResolveError: the destination, or a ``host!`` source, has no address.
            InvalidSource: *source* names no source.
            TypeError: the host is no text, or the port no number.
            ValueError: the host is empty or in brackets, or the port not 1 to 65535.
            RuntimeError: the connector is closed, or belongs to another event loop; or its policy named no source.
        """
        return await self._connect(host, port, source, family, delay=self._delay)

    async def create_connection(
        self,
        protocol_factory: Callable[[], _ProtocolT],
        host: str,
        port: int,
        *,
        source: str | Source | None = None,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        ssl: bool | ssl_module.SSLContext | None = None,
        server_hostname: str | None = None,
        **options: Any,
    ) -> tuple[asyncio.Transport, _ProtocolT]:
        """Connect as ``loop.create_connection`` does, from a source.

        Args:
            protocol_factory: makes the protocol.
            host: as in ``connect``.
            port: as in ``connect``.
            source: as in ``connect``.
            family: as in ``connect``.
            proto: 0 or ``IPPROTO_TCP``.
            flags: ``AI_*`` flags for looking up the destination.
            ssl: True or an ``ssl.SSLContext`` for TLS.
            server_hostname: the name that the certificate must have; default *host*.
            **options: ``happy_eyeballs_delay`` and ``interleave`` for this connection; all others are passed on to
                ``loop.create_connection``: ``ssl_handshake_timeout``, ``ssl_shutdown_timeout``.

        Raises:
            TypeError: ``local_addr`` or ``sock`` was given: the source is what names the local end.
            ssl.SSLError: the TLS handshake failed.
            AiobindError: as in ``connect``.
        """
        for name in ("local_addr", "sock"):
            if name in options:
                raise TypeError(f"{name} is not taken here: the source names the local end, as in source='192.0.2.7'")
        if "all_errors" in options:
            raise TypeError("all_errors is not taken here: a ConnectError always has them all in .attempts")
        if proto not in (0, socket.IPPROTO_TCP):
            # asyncio's sock_connect looks even a literal up for any other protocol (EAI_SOCKTYPE).
            raise NotImplementedError("proto: only TCP is available yet")
        delay = options.pop("happy_eyeballs_delay", self._delay)
        count = options.pop("interleave", None) or 1
        if ssl and server_hostname is None:
            server_hostname = host
        sock = await self._connect(host, port, source, family, flags=flags, delay=delay, first_family_count=count)
        try:
            protocol = protocol_factory()
        except BaseException:
            sock.close()
            raise
        try:
            sock.unfinished = True
            loop = asyncio.get_running_loop()
            with handed_over(sock, loop):
                transport, _ = await loop.create_connection(
                    lambda: protocol, sock=sock, ssl=ssl, server_hostname=server_hostname, **options
                )
        except (TypeError, ValueError) as error:
            # Arguments that asyncio refuses, before a transport takes the socket; later it is the transport that closes
            # it. A certificate's failure is a ValueError too, and an OSError.
            if not isinstance(error, OSError):
                sock.close()
            raise
        sock.unfinished = False
        return transport, protocol

    async def open_connection(
        self, host: str, port: int, *, limit: int = 2**16, **options: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect as ``asyncio.open_connection`` does, from a source.

        Args:
            host: as in ``connect``.
            port: as in ``connect``.
            limit: the buffer limit of the reader, in bytes.
            **options: as in ``create_connection``, *source* and *family* among them.

        Raises:
            AiobindError: as in ``connect``.
        """
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        transport, protocol = await self.create_connection(
            lambda: asyncio.StreamReaderProtocol(reader, loop=loop), host, port, **options
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def aclose(self) -> None:
        """Refuse new connections. Those that are open belong to their callers and stay open.

        To forget this leaks nothing.
        """
        self._dialer.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _connect(
        self,
        host: str,
        port: int,
        source: str | Source | None,
        family: int,
        *,
        delay: float | None,
        flags: int = 0,
        first_family_count: int = 1,
    ) -> BoundSocket:
        """Connect from the only source, or try several in their order."""
        dialer = self._dialer
        dialer.enter()
        literal = _literal(host, port) if isinstance(host, str) else _check(host, port)  # pyright: ignore[reportUnnecessaryIsInstance]
        if family:
            literal = None
        if literal is not None:
            turn = dialer.obvious(source)
            if turn is not None:
                try:
                    return await dialer.dial(turn, host, literal, delay=delay)
                except AiobindError as error:
                    if not (turn.origin.removed and is_sources_fault(error)):  # else there are others by now
                        raise
        route = dialer.route(host, port, source)
        look_up = partial(
            dialer.targets, host=host, port=port, family=family, flags=flags, first_family_count=first_family_count
        )
        return await self._connect_by(route, host, literal, look_up, delay)

    async def _connect_by(
        self,
        route: Route,
        host: str,
        literal: Sequence[Target] | None,
        look_up: Callable[[Origin], Awaitable[Sequence[Target]]],
        delay: float | None,
    ) -> BoundSocket:
        """Try the sources of *route*, until one works or the failure is not its own."""
        dialer = self._dialer
        failures: list[AiobindError] = []
        held_back: list[AiobindError] = []
        try:
            while (turn := route.first() or await route.next()) is not None:
                try:
                    dialer.enter()
                    targets = literal or await look_up(turn.origin)
                    if dialer.limits.paced:
                        await dialer.limits.pace(turn.origin, place_of(host))
                    sock = await dialer.dial(turn, host, targets, delay=delay)
                except AiobindError as error:
                    route.leave(turn)
                    (held_back if turn.held_back else failures).append(error)
                    if not is_sources_fault(error):
                        break
                except BaseException:
                    route.leave(turn)
                    raise
                else:
                    route.keep(turn)
                    if dialer.limits.limited:
                        sock.register(partial(_give_back, route, turn))
                    return sock
        finally:
            route.close()
        if not (failures or held_back):
            raise RuntimeError(f"the policy named no source for {host}")
        try:
            raise merged(failures or held_back)
        finally:
            del failures, held_back  # which hold this very frame


def _give_back(route: Route, turn: Turn, *_: object) -> None:
    route.release(turn)


@lru_cache(maxsize=1024, typed=True)
def _literal(host: str, port: int) -> tuple[Target] | None:
    """Return the target of an address that is always the same; None: it is a name, or has a zone. Check both."""
    _check(host, port)
    with suppress(OSError):  # the errors of what is no good come with its source
        if "%" not in host and (target := lies_at(host, port)) is not None:  # a zone's number may change
            return (target,)
    return None


def _check(host: str, port: int) -> None:
    if not isinstance(host, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the host must be a text, not {type(host).__name__}")
    if not host or host[0] == "[":
        raise ValueError(f"the host must be a name or an address without brackets, not {host!r}")
    if not isinstance(port, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the port must be a number, not {type(port).__name__}")
    if not 0 < port < 65536:
        raise ValueError(f"the port must be 1 to 65535, not {port}")


async def connect(host: str, port: int, *, source: str | Source, family: int = 0, **options: Any) -> socket.socket:
    """Return a connected, non-blocking socket from *source*. The caller owns it and closes it.

    One shot of ``Connector(source, **options).connect(host, port, family=family)``, whose errors it raises.

    Args:
        host: a name or a literal IP address of the destination.
        port: its TCP port, 1 to 65535.
        source: the source to connect from.
        family: ``socket.AF_INET`` or ``socket.AF_INET6`` to use only that; 0 for both.
        **options: the keywords of ``Connector``.
    """
    async with Connector(source, **options) as connector:
        connector._dialer.listens = False  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - it is gone in a moment
        return await connector.connect(host, port, source=source, family=family)
