"""Law: the doors of asyncio. Each one routes, dials, and hands the connected socket to asyncio's own machinery."""

from __future__ import annotations

import asyncio
import errno
import socket
import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache, partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ._as_loop import LoopOfSources
from ._dial import Dialer, lies_at
from ._errors import AiobindError, BindError, is_sources_fault, merged
from ._faults import destination_of, place_of, with_context
from ._limits import Limits
from ._origin import Origin
from ._scope import scoped
from ._sockets import IPPROTO_MPTCP, TCP, Kind, handed_over
from ._sources import parse_source

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
_DatagramProtocolT = TypeVar("_DatagramProtocolT", bound=asyncio.DatagramProtocol)

#: The destination of what is going to send to whomever it is told: no name that anybody has.
_ANYBODY = "*"
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


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
        socket_options: ``(level, option, value)`` to set on each socket before it is bound and connected; on a UDP
            socket those of the levels SOL_SOCKET, IPPROTO_IP and IPPROTO_IPV6. With TCP_FASTOPEN_CONNECT (RFC 7413) a
            connect to where a cookie is known ends at once, before anything is sent: the SYN goes with the first
            write, and a refusal (ECONNREFUSED, ETIMEDOUT) comes to the first read or write, when it is too late for
            another address or source.
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
        self, host: str, port: int, *, source: str | Source | None = None, family: int = 0, proto: int = 0
    ) -> socket.socket:
        """Return a connected, non-blocking socket. The caller owns it and closes it.

        Args:
            host: a name or a literal IP address of the destination, with its zone where it needs one.
            port: its TCP port, 1 to 65535.
            source: the source of this connection, which need not be one of the connector's; it wins over the policy
                and over ``use_source``, and no other source is tried.
            family: ``socket.AF_INET`` or ``socket.AF_INET6`` to use only that; 0 for both.
            proto: 0 or ``IPPROTO_TCP``; or ``IPPROTO_MPTCP``, Multipath TCP (RFC 8684, Linux 5.6), with a connector of
                ``strict=False``: the source holds for the first subflow only. The kernel opens further ones, at any
                time, from the addresses and by the interfaces that ``ip mptcp endpoint`` names, or that the peer asks
                for where ``ip mptcp limits`` allows that. So ``bound_source(...).interface`` is None, and the bytes in
                ``stats()`` are those of the first; what is cut is told ENOTCONN. With a peer that speaks TCP alone it
                is a TCP connection.

        Raises:
            BindError: each source failed for a reason of its own (EPERM, ENODEV, EADDRNOTAVAIL, EADDRINUSE, EINVAL,
                ENETUNREACH when it cannot lead there, EHOSTUNREACH when it has no carrier); nothing was sent.
            ConnectError: the destination was tried and could not be reached; errno is the first attempt's
                (ECONNREFUSED, ENETUNREACH, EHOSTUNREACH, ETIMEDOUT, ...), and ``.attempts`` has them all. A system
                without MPTCP says EPROTONOSUPPORT, or ENOPROTOOPT where net.mptcp.enabled is 0.
            ResolveError: the destination, or a ``host!`` source, has no address.
            InvalidSource: *source* names no source.
            TypeError: the host is no text, or the port no number.
            ValueError: the host is empty or in brackets, the port not 1 to 65535, or *proto* another one.
            RuntimeError: the connector is closed, or belongs to another event loop; or its policy named no source.
        """
        return await self._connect(host, port, source, family, proto=proto, delay=self._delay)

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
            proto: as in ``connect``.
            flags: ``AI_*`` flags for looking up the destination.
            ssl: True or an ``ssl.SSLContext`` for TLS.
            server_hostname: the name that the certificate must have; default *host*.
            **options: ``happy_eyeballs_delay`` and ``interleave`` for this connection; all others are passed on to
                ``loop.create_connection``: ``ssl_handshake_timeout``, ``ssl_shutdown_timeout``.

        Raises:
            TypeError: ``local_addr`` or ``sock`` was given, for the source is what names the local end; or
                ``all_errors``, for a ``ConnectError`` always has them all.
            ssl.SSLError: the TLS handshake failed.
            AiobindError: as in ``connect``.
        """
        _refuse(local_addr=options.pop("local_addr", None), sock=options.pop("sock", None))
        if options.pop("all_errors", False):
            raise TypeError("all_errors is not taken here: a ConnectError always has them all in .attempts")
        if not (ssl is None or isinstance(ssl, bool) or hasattr(ssl, "wrap_bio")):
            # asyncio itself finds out in the middle of it, and leaves the connection open
            raise TypeError(f"ssl is True or an ssl.SSLContext, not {type(ssl).__name__}")
        delay = options.pop("happy_eyeballs_delay", self._delay)
        count = options.pop("interleave", None) or 1
        if ssl and server_hostname is None:
            server_hostname = host
        sock = await self._connect(
            host, port, source, family, proto=proto, flags=flags, delay=delay, first_family_count=count
        )
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

    async def create_datagram_endpoint(
        self,
        protocol_factory: Callable[[], _DatagramProtocolT],
        local_addr: None = None,
        remote_addr: tuple[str, int] | tuple[str, int, int, int] | None = None,
        *,
        source: str | Source | None = None,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        reuse_port: bool | None = None,
        allow_broadcast: bool | None = None,
        sock: None = None,
    ) -> tuple[asyncio.DatagramTransport, _DatagramProtocolT]:
        """Make a UDP endpoint as ``loop.create_datagram_endpoint`` does, with a source.

        It is pinned and bound before it sends, so that every datagram leaves from the source, or not at all: what the
        system refuses later comes to ``error_received`` (ENETUNREACH when the interface or the address has gone). It
        counts as a connection of its source until its transport closes; what it carries is not counted.
        ``abort_on_link_down`` and ``remove(drain=False)`` close it: ``connection_lost``.

        With *remote_addr* it is connected: it sends to that address and hears nobody else. It is the first address of
        the name that a source can serve, for nobody answers; nothing is sent.

        Without, it sends to whom ``sendto`` names, in one family: *family*, or else that of the source's address, IPv4
        where it has both. It sends to broadcast and multicast addresses as well, by the interface of the source. To
        ``direct`` it sends from the source. A zone (scope id) that ``sendto`` is given names the interface of that
        datagram, whatever the pin: give that of the source, or none.

        Args:
            protocol_factory: makes the protocol.
            local_addr: is refused: the source names it. Its port is as in ``local_ports``.
            remote_addr: a host, as in ``connect``, and a port; or an IPv6 address as getaddrinfo(3) has it.
            source: as in ``connect``.
            family: as in ``connect``.
            proto: 0 or ``IPPROTO_UDP``.
            flags: ``AI_*`` flags for looking up the host.
            reuse_port: set SO_REUSEPORT before it is bound.
            allow_broadcast: set SO_BROADCAST; only without *remote_addr*.
            sock: is refused, as *local_addr*.

        Raises:
            TypeError: *local_addr* or *sock* was given; or as in ``connect``.
            ValueError: the host is, or stands for, a multicast group, or *allow_broadcast* comes with *remote_addr*: no
                answer comes from either, so leave it away; or another *family* or *proto*; or as in ``connect``.
            ConnectError: a broadcast address (EACCES), likewise.
            AiobindError: as in ``connect``.

        To a policy, and to limits by host, what is not connected has the host ``"*"``.
        """
        _refuse(local_addr=local_addr, sock=sock)
        if proto not in (0, socket.IPPROTO_UDP):
            raise ValueError(f"proto is 0 or IPPROTO_UDP, not {proto}")
        if family not in (0, *_FAMILIES):
            raise ValueError(f"family is 0, AF_INET or AF_INET6, not {family}")
        host, port = (_ANYBODY, 0) if remote_addr is None else _zoned(remote_addr)
        if remote_addr is not None:
            if allow_broadcast:
                raise ValueError(
                    "allow_broadcast: leave remote_addr away, for no answer comes from a broadcast address"
                )
            _check(host, port)
        flags_set = ((reuse_port, "SO_REUSEPORT"), (allow_broadcast, "SO_BROADCAST"))
        options = tuple((socket.SOL_SOCKET, getattr(socket, name), 1) for wanted, name in flags_set if wanted)

        async def look_up(origin: Origin) -> Sequence[Target]:
            if remote_addr is None:
                return [await dialer.anywhere(origin, family)]
            found = await dialer.targets(origin, host, port, family=family, flags=flags)
            for ip in (ip_address(target.host) for target in found):
                if ip.is_multicast:
                    raise ValueError(f"remote_addr: {ip} is a multicast group, from which no answer comes: see sendto")
            return found

        dialer, loop = self._dialer, self._dialer.enter()
        kind = Kind(socket.SOCK_DGRAM, proto, options)
        bound = await self._connect_by(dialer.route(host, port, source), host, None, look_up, delay=None, kind=kind)
        try:
            protocol = protocol_factory()
        except BaseException:
            bound.close()
            raise
        making = loop.create_task(loop.create_datagram_endpoint(lambda: protocol, sock=bound))
        try:
            with handed_over(bound, loop):
                transport, _ = await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_close)  # uvloop (0.23) leaves it open when it is cancelled here itself
            raise
        bound.user = weakref.ref(transport)
        if bound.cut:
            transport.abort()
            assert bound.bound is not None
            gone = BindError(errno.ENETDOWN, "it was removed, or its interface went, meanwhile")
            raise with_context(gone, bound.bound.source, destination_of(host, port))
        return transport, protocol

    def as_loop(self, *, source: str | Source | None = None) -> asyncio.AbstractEventLoop:
        """Return what is the running loop to a library that only takes ``loop=``, and connects from a source.

        Its ``create_connection`` and ``create_datagram_endpoint`` are this connector's, with its ``dns``, its errors,
        and what it refuses (``local_addr``). A socket of the library's own (``sock=``) is passed on as it is. All else
        is the running loop's, under which it goes: tasks, timers, threads, servers, Unix sockets; and so are
        ``getaddrinfo`` and ``sock_connect``, by which a library would go its own way.

        It equals the running loop, and ``isinstance`` takes it for one; but it is another object: to
        ``asyncio.all_tasks`` and, from Python 3.14 on, ``asyncio.current_task`` it is a loop without tasks, and what is
        made with ``asyncio.Future(loop=...)`` of it, instead of by its ``create_future``, cannot be awaited.

        Args:
            source: pins what is connected so, as in ``connect``.

        Raises:
            InvalidSource: *source* names no source.
            RuntimeError: no loop runs; or the connector is closed, or belongs to another event loop.
        """
        loop = self._dialer.enter()
        connect, associate = self.create_connection, self.create_datagram_endpoint
        if source is not None:
            pin = parse_source(source)
            connect, associate = partial(connect, source=pin), partial(associate, source=pin)
        return cast("asyncio.AbstractEventLoop", LoopOfSources(loop, connect, associate))

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
        proto: int = 0,
        flags: int = 0,
        first_family_count: int = 1,
    ) -> BoundSocket:
        """Connect from the only source, or try several in their order."""
        dialer = self._dialer
        dialer.enter()
        literal = _literal(host, port) if isinstance(host, str) else _check(host, port)  # pyright: ignore[reportUnnecessaryIsInstance]
        kind = self._kind(proto) if proto else TCP
        if family:
            literal = None
        if literal is not None:
            turn = dialer.obvious(source)
            if turn is not None:
                try:
                    return await dialer.dial(turn, host, literal, delay=delay, kind=kind)
                except AiobindError as error:
                    if not (turn.origin.removed and is_sources_fault(error)):  # else there are others by now
                        raise
        route = dialer.route(host, port, source)
        look_up = partial(
            dialer.targets, host=host, port=port, family=family, flags=flags, first_family_count=first_family_count
        )
        return await self._connect_by(route, host, literal, look_up, delay=delay, kind=kind)

    def _kind(self, proto: int) -> Kind:
        if proto == socket.IPPROTO_TCP:
            return TCP
        if proto != IPPROTO_MPTCP:
            raise ValueError(f"proto is 0, IPPROTO_TCP or IPPROTO_MPTCP, not {proto}")
        if self._dialer.strict:
            raise ValueError(
                "proto: of MPTCP only the first subflow leaves from the source, the others as ip mptcp endpoint says: "
                "strict=False permits that"
            )
        return Kind(socket.SOCK_STREAM, IPPROTO_MPTCP)

    async def _connect_by(
        self,
        route: Route,
        host: str,
        literal: Sequence[Target] | None,
        look_up: Callable[[Origin], Awaitable[Sequence[Target]]],
        *,
        delay: float | None,
        kind: Kind,
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
                    sock = await dialer.dial(turn, host, targets, delay=delay, kind=kind)
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


def _close(making: asyncio.Task[tuple[asyncio.DatagramTransport, object]]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result()[0].abort()


def _zoned(address: tuple[Any, ...]) -> tuple[str, int]:
    """Return host and port of a socket's *address*, which may have the flow label and the zone behind (ipv6(7))."""
    host, port, _, zone = address if len(address) == 4 else (*address, 0, 0)
    return f"{host.partition('%')[0]}%{zone}" if zone else host, port


def _refuse(**given: object) -> None:
    """Refuse what would name the local end."""
    for name, value in given.items():
        if value is not None:
            raise TypeError(f"{name} is not taken here: the source names the local end, as in source='192.0.2.7'")


def _check(host: str, port: int) -> None:
    if not isinstance(host, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the host must be a text, not {type(host).__name__}")
    if not host or host[0] == "[":
        raise ValueError(f"the host must be a name or an address without brackets, not {host!r}")
    if not isinstance(port, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the port must be a number, not {type(port).__name__}")
    if not 0 < port < 65536:
        raise ValueError(f"the port must be 1 to 65535, not {port}")


async def connect(
    host: str, port: int, *, source: str | Source, family: int = 0, proto: int = 0, **options: Any
) -> socket.socket:
    """Return a connected, non-blocking socket from *source*. The caller owns it and closes it.

    One shot of ``Connector(source, **options).connect(host, port, family=..., proto=...)``, whose errors it raises.

    Args:
        host: a name or a literal IP address of the destination.
        port: its TCP port, 1 to 65535.
        source: the source to connect from.
        family: ``socket.AF_INET`` or ``socket.AF_INET6`` to use only that; 0 for both.
        proto: as in ``Connector.connect``.
        **options: the keywords of ``Connector``.
    """
    async with Connector(source, **options) as connector:
        connector._dialer.listens = False  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - it is gone in a moment
        return await connector.connect(host, port, source=source, family=family, proto=proto)
