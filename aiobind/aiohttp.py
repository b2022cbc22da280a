"""Law: aiohttp's own connector, with the source in three places: choosing, connecting, and the idle connections.

    connect                     for each source in its turn: aiohttp's ``connect``, with the source in the key
    _create_connection          notes where the new connection leaves from
    _wrap_create_connection     our race instead of aiohappyeyeballs'; TLS is aiohttp's
    _get                        no idle connection beyond ``limit_per_host``
    _release                    the connection is no longer in use by its source

What aiohttp keeps by key is keyed by source as well, so that no request rides on another source's connection. Only
``limit_per_host`` counts by host alone (`_PerHost`), and ``limit`` needs no key. These methods and ``_conns``,
``_acquired_per_host``, ``_factory``, ``_loop``, ``_ssl_shutdown_timeout``, ``cert_errors``, ``ssl_errors``,
``ClientResponse._protocol`` and ``ResponseHandler._payload`` are aiohttp's private names; nothing else of aiobind
touches one, and a test holds them against the oldest and the newest supported aiohttp.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import weakref
from collections import Counter, defaultdict
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.client_exceptions import cert_errors, ssl_errors
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from ._connector import Sourced, make_dialer, seconds
from ._dial import lies_at
from ._errors import AiobindError, BindError, ResolveError, is_sources_fault, merged
from ._faults import destination_of, gone, place_of
from ._race import interleave
from ._resolve import resolve
from ._sockets import BoundSource, finders, handed_over
from ._wait import is_uvloop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence

    from aiohttp.abc import ResolveResult
    from aiohttp.client_reqrep import ClientRequest, ConnectionKey
    from aiohttp.connector import AddrInfoType, Connection
    from aiohttp.tracing import Trace

    from ._binding import Target
    from ._dial import Dialer
    from ._events import Event
    from ._origin import Origin
    from ._policy import Policy
    from ._resolve import Resolved
    from ._roster import Route, Turn
    from ._sockets import BoundSocket, SocketOption
    from ._sources import Source

__all__ = ["BoundTCPConnector"]


class _SourcedKey(NamedTuple):
    """What aiohttp keeps idle connections and waiting requests by: its own key, and the source."""

    host_key: ConnectionKey
    origin: Origin

    @property
    def is_ssl(self) -> bool:
        return self.host_key.is_ssl


class _PerHost(defaultdict[Any, set[Any]]):
    """The connections in use to each host, over all sources: aiohttp's table for ``limit_per_host``."""

    def __getitem__(self, key: Any) -> set[Any]:
        return super().__getitem__(_host_key(key))

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(_host_key(key))

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_host_key(key), default)


def _host_key(key: Any) -> Any:
    return key.host_key if isinstance(key, _SourcedKey) else key


class _SourcedRequest:
    """A request as aiohttp's pool shall see it: the same, with a key that has the source."""

    def __init__(self, request: ClientRequest, turn: Turn) -> None:
        self.request = request
        self.turn = turn
        self.connection_key = _SourcedKey(request.connection_key, turn.origin)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.request, name)


class _Dial:
    """One new connection: whence, and what came of it. The context carries it past aiohttp's proxy code."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.sock: BoundSocket | None = None


_dialling: ContextVar[_Dial] = ContextVar("aiobind_dialling")


class _LinkLost(aiohttp.ClientOSError, aiohttp.ClientPayloadError):
    """The connection was cut in the middle of a body: by the name of what fails at once, and by that of what is cut."""


_LinkLost.__name__ = _LinkLost.__qualname__ = "ClientOSError"


class _Handler(ResponseHandler):
    """aiohttp's protocol, which knows its socket; also when the connection went back to the pool."""

    __slots__ = ("sock",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.sock: BoundSocket | None = None


class _UvloopHandler(_Handler):
    """uvloop closes the descriptor before it tells the socket, which could not say then what it has carried."""

    __slots__ = ()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.sock is not None:
            self.sock.traffic()
        super().connection_lost(exc)


def _bound_response(thing: object) -> BoundSource | None:
    if not isinstance(thing, aiohttp.ClientResponse):
        return None
    protocol = thing._protocol  # noqa: SLF001
    sock = protocol.sock if isinstance(protocol, _Handler) else None
    return sock.bound if sock is not None else None


finders.append(_bound_response)


class _SystemResolver(AbstractResolver):
    """The operating system's resolver, in aiobind's own threads; aiohttp's cache stands before it."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        try:
            found = await resolve(host, family=family, flags=socket.AI_ADDRCONFIG, ttl=0)
        except socket.gaierror as error:
            destination = destination_of(host, port)
            text = f"connect to {destination}: the destination's name cannot be resolved: {error.strerror}"
            raise ResolveError(error.errno or socket.EAI_FAIL, text, destination=destination) from error
        return _results(host, port, found)

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""


class _SourceResolver(AbstractResolver):
    """Asks from the source of the connection that is being made; the cache is `aiobind.dns`'s own, by source."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return _results(host, port, await self._dialer.find(_dialling.get().turn.origin, host, port, family=family))

    async def close(self) -> None:
        """Do nothing: it ends with the connector."""


def _results(host: str, port: int, found: Iterable[Resolved]) -> list[ResolveResult]:
    return [
        {
            "hostname": host,
            "host": f"{ip}%{scope_id}" if scope_id else str(ip),
            "port": port,
            "family": socket.AF_INET6 if ip.version == 6 else socket.AF_INET,
            "proto": 0,
            "flags": socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        }
        for ip, scope_id in found
    ]


class BoundTCPConnector(Sourced, aiohttp.TCPConnector):
    """An ``aiohttp.TCPConnector`` whose connections leave from the sources that you name.

    A keep-alive connection belongs to its source: a request for one source never rides on another's. The policy
    chooses for each request. When a source fails for a reason of its own, the request goes to the next one.

    Args:
        sources: one or more sources, as for ``aiobind.Connector``.
        policy: chooses the source of each request; default ``RoundRobin()``. An instance serves one connector.
        limit_per_source: how many connections of one source may be in use or being made at the same time; 0 (the
            default) for no limit. A source with room goes before one without; where none has, a request waits for the
            first that gets some, in the order of arrival. ``limit`` and ``limit_per_host`` keep aiohttp's meaning, over
            all sources together.
        limit_per_source_host: the same, for each source and destination host.
        rate_per_source, rate_per_source_host: as for ``aiobind.Connector``. Only new connections count.
        abort_on_link_down: cut the connections in use whose interface goes down, or away, or loses their address: the
            request fails with an ``aiohttp.ClientOSError``. Idle ones are closed in any case.
        sticky_prefix, on_event: as for ``aiobind.Connector``.
        happy_eyeballs_delay: RFC 8305's Connection Attempt Delay in seconds; None tries one address after the other.
        interleave: RFC 8305's First Address Family Count; default 1.
        local_ports, dns, strict, borrow, direct, fast_connect: as for ``aiobind.Connector``.
        socket_options: as for ``aiobind.Connector``.
        use_dns_cache: keep the addresses of names, of destinations as well as of ``host!`` sources.
        ttl_dns_cache: for how long, in seconds; None for as long as the loop lives. With *dns* not for longer than the
            answer itself says.
        resolver: one of aiohttp's resolvers, for destinations; default: the operating system's, in threads that
            neither block each other nor hold the end of the program.
        **keywords: every other keyword of ``aiohttp.TCPConnector``.

    Raises:
        InvalidSource: a text names no source.
        TypeError: no source was named; or ``local_addr`` or ``socket_factory``, whose place the source takes; or
            *local_ports* or *direct* is of a wrong type.
        ValueError: a source was named twice; or ``dns`` and ``resolver`` together; or *local_ports*, *direct*, *dns* or
            a limit makes no sense; or *policy* serves another connector.
        ImportError: *dns* needs ``aiobind[dns]``, a rate ``aiobind[limits]``.

    Errors of a request are aiohttp's own: a ``ClientConnectorError`` with the ``BindError``, ``ConnectError`` or
    ``ResolveError`` as its ``os_error``, and its errno.
    """

    def __init__(
        self,
        *sources: str | Source,
        policy: Policy | None = None,
        limit_per_source: int = 0,
        happy_eyeballs_delay: float | None = 0.25,
        interleave: int | None = None,
        local_ports: range | None = None,
        socket_options: Iterable[SocketOption] = (),
        dns: str | Sequence[str] = "system",
        strict: bool = True,
        borrow: bool = False,
        direct: Sequence[str] = (),
        fast_connect: bool = False,
        limit_per_source_host: int = 0,
        rate_per_source: float | None = None,
        rate_per_source_host: float | None = None,
        abort_on_link_down: bool = False,
        sticky_prefix: bool = False,
        on_event: Callable[[Event], object] | None = None,
        use_dns_cache: bool = True,
        ttl_dns_cache: int | None = 10,
        resolver: AbstractResolver | None = None,
        **keywords: Any,
    ) -> None:
        for name in ("local_addr", "socket_factory"):
            if name in keywords:
                raise TypeError(f"{name} is not taken here: the source names the local end, as in '192.0.2.7'")
        if dns != "system" and resolver is not None:
            raise ValueError("dns= and resolver= both say how names are looked up: give one")
        self._delay = seconds("happy_eyeballs_delay", happy_eyeballs_delay)
        # First, so that a wrong source leaves no half-made connector behind.
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
            ttl=ttl_dns_cache if use_dns_cache else 0,
            pooled=True,
            limit_per_source=limit_per_source,
            limit_per_source_host=limit_per_source_host,
            rate_per_source=rate_per_source,
            rate_per_source_host=rate_per_source_host,
            abort_on_link_down=abort_on_link_down,
            sticky_prefix=sticky_prefix,
            on_event=on_event,
        )
        self._caches_names = use_dns_cache
        if resolver is None:
            resolver = _SystemResolver() if dns == "system" else _SourceResolver(self._dialer)
        self._first_family_count = interleave or 1
        self._limit_per_source = limit_per_source
        try:
            super().__init__(
                happy_eyeballs_delay=happy_eyeballs_delay,
                interleave=interleave,
                # aiohttp's cache knows of no sources; the one that does is `aiobind.dns`'s own.
                use_dns_cache=use_dns_cache and dns == "system",
                ttl_dns_cache=ttl_dns_cache,
                resolver=resolver,
                **keywords,
            )
        except BaseException:
            self._dialer.close()  # the policy is free again
            raise
        self._acquired_per_host = _PerHost(set)
        self._no_limit_per_host = not self.limit_per_host
        handler = _UvloopHandler if is_uvloop(self._loop) else _Handler
        self._factory = cast("partial[ResponseHandler]", partial(handler, loop=self._loop))
        self._dialer.on_lost = weakref.WeakMethod(self._on_lost)

    @property
    def use_dns_cache(self) -> bool:
        """Whether the addresses of names are kept."""
        return self._caches_names

    def clear_dns_cache(self, host: str | None = None, port: int | None = None) -> None:
        """Drop the addresses of destinations that are kept: of *host* at *port*, or all.

        What the operating system has said of the names in ``host!`` and in *direct* stays for its time.
        """
        super().clear_dns_cache(host, port)
        self._dialer.forget(host)

    @property
    def limit_per_source(self) -> int:
        """How many connections of one source may be in use or being made; 0 for no limit."""
        return self._limit_per_source

    def _place(self, host: str) -> str:
        with suppress(ValueError):  # as aiohttp spells it: yarl goes by IDNA 2008
            return URL.build(scheme="http", host=host.strip("[]")).raw_host or host
        return host

    def _idle_of(self) -> Mapping[Source, int]:
        return Counter(key.origin.source for key, protocol in self._idle() if protocol.is_connected())

    def _removed(self, origin: Origin) -> None:
        for key, protocol in self._idle():
            if key.origin is origin:
                _end(protocol)

    def _on_lost(self, lost: Iterable[BoundSocket], cut: bool) -> None:
        """Close the idle connections whose interface or address has gone: the kernel never would."""
        idle = {protocol for _, protocol in self._idle()}
        for sock in lost:
            protocol = None if sock.user is None else sock.user()
            if not isinstance(protocol, ResponseHandler):
                continue
            if protocol in idle:
                _end(protocol)
            elif cut and (payload := protocol._payload) is not None and not payload.is_eof():  # noqa: SLF001
                # In the middle of a body aiohttp would make a ClientPayloadError of it, without an errno.
                text = "the interface or address of the connection has gone"
                payload.set_exception(_LinkLost(errno.ECONNRESET, text))
                protocol._payload = None  # noqa: SLF001

    def _idle(self) -> list[tuple[_SourcedKey, ResponseHandler]]:
        pool = cast("dict[object, Sequence[tuple[ResponseHandler, float]]]", self._conns)
        return [
            (key, protocol)
            for key, connections in pool.copy().items()
            if isinstance(key, _SourcedKey)  # aiohttp 3.12 keeps a proxy's tunnel as well, under its own key
            for protocol, _ in tuple(connections)
        ]

    def close(self, **keywords: Any) -> Coroutine[Any, Any, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Close all connections, as ``aiohttp.TCPConnector.close`` does."""
        self._dialer.close()
        return super().close(**keywords)

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout) -> Connection:
        """Get a connection for *req*, from the pool or a new one, from the source that is its turn."""
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError("this connector belongs to another event loop: make one for each loop")
        turn, route = self._dialer.obvious(), None
        if turn is None:
            route = self._route(req)
            turn = route.first()
        if turn is not None and req.proxy is None and self._no_limit_per_host:
            # What nearly every request finds: a connection that lies idle, as the first thing aiohttp looks for.
            key: Any = _SourcedKey(req.connection_key, turn.origin)
            if key in self._conns:
                try:
                    connection = await super()._get(key, traces)
                except BaseException:
                    if route is not None:
                        route.leave(turn)
                        route.close()
                    raise
                if connection is not None:
                    turn.origin.handed_out()
                    if route is not None:
                        route.keep(turn)  # `_release` gives it back
                        route.close()
                    return connection
        if route is None:
            assert turn is not None
            try:
                return await self._connect_from(turn, None, req, traces, timeout)
            except aiohttp.ClientConnectorError as error:
                cause = getattr(error, "os_error", None)
                if not (turn.origin.removed and isinstance(cause, AiobindError) and is_sources_fault(cause)):
                    raise
            route, turn = self._route(req), None  # there are others by now
        return await self._connect_by(route, turn, req, traces, timeout)

    def _route(self, req: ClientRequest) -> Route:
        url, proxy = req.url, req.proxy
        towards = None if proxy is None else (proxy.raw_host or "", proxy.port or 0)
        return self._dialer.route(url.raw_host or "", url.port or 0, towards=towards)

    async def _connect_by(
        self, route: Route, turn: Turn | None, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        """Try the sources of *route*, of which *turn* is the first if nobody can have to wait for it."""
        failures: list[aiohttp.ClientConnectorError] = []
        held_back: list[aiohttp.ClientConnectorError] = []
        try:
            while (turn := turn or await self._next(route, timeout)) is not None:
                try:
                    return await self._connect_from(turn, route, req, traces, timeout)
                except aiohttp.ClientConnectorError as error:
                    # ClientConnectorCertificateError had no os_error in aiohttp 3.12.
                    if not isinstance(getattr(error, "os_error", None), AiobindError):
                        raise
                    (held_back if turn.held_back else failures).append(error)
                    if not is_sources_fault(error.os_error):
                        break
                turn = None
        except RuntimeError as error:
            if not self.closed:
                raise
            raise aiohttp.ClientConnectionError("Connector is closed") from error
        finally:
            route.close()
        errors = failures or held_back
        if not errors:
            raise RuntimeError(f"the policy named no source for {req.url.raw_host}")
        try:
            if len(errors) == 1:
                raise errors[0]
            cause = merged([cast("AiobindError", error.os_error) for error in errors])
            raise type(errors[-1])(errors[-1].args[0], cause) from errors[-1]
        finally:
            del errors, failures, held_back  # which hold this very frame

    async def _connect_from(
        self, turn: Turn, route: Route | None, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        try:
            connection = await super().connect(cast("ClientRequest", _SourcedRequest(req, turn)), traces, timeout)
        except BaseException:
            if route is not None:
                route.leave(turn)
            raise
        turn.origin.handed_out()
        if route is not None:
            route.keep(turn)
        sock = cast("_Handler", connection.protocol).sock
        if sock is None or not sock.lost:
            return connection
        # It was lost in the very moment in which it was made: nothing has been sent.
        connection.close()
        raise aiohttp.ClientConnectorError(req.connection_key, _gone(turn.origin.source, req.url))

    async def _next(self, route: Route, timeout: aiohttp.ClientTimeout) -> Turn | None:
        if not self._dialer.limits.limited:
            return await route.next()
        async with _deadline(timeout.connect):  # the wait for a place counts as aiohttp's own wait does
            return await route.next()

    async def _get(self, key: Any, traces: list[Trace]) -> Connection | None:
        # aiohttp hands out an idle connection without a look at the limit: with one key for each host, one that is idle
        # means that one less is in use than the limit allows. With one for each source it does not.
        limit = self.limit_per_host
        if limit and isinstance(key, _SourcedKey) and len(self._acquired_per_host.get(cast("Any", key), ())) >= limit:
            return None
        return await super()._get(cast("Any", key), traces)

    def _release(self, key: Any, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        if not isinstance(key, _SourcedKey):  # the tunnel of a proxy, which is released under aiohttp's own key
            super()._release(key, protocol, should_close=should_close)
            return
        origin = key.origin
        sock: BoundSocket | None = protocol.sock  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        if origin.removed or (sock is not None and sock.lost):  # though its transport may not know of that yet
            should_close = True
        super()._release(key, protocol, should_close=should_close)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        origin.given_back()
        if self._dialer.limits.limited:
            self._dialer.limits.release(origin, place_of(key.host_key.host))

    async def _create_connection(
        self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        sourced = cast("_SourcedRequest", req)
        dial = _Dial(sourced.turn)
        if self._dialer.limits.paced:
            await self._dialer.limits.pace(dial.turn.origin, place_of(sourced.request.url.raw_host or ""))
        token = _dialling.set(dial)
        try:
            protocol = await super()._create_connection(sourced.request, traces, timeout)
        except aiohttp.ClientError as error:
            if dial.sock is None or not dial.sock.lost:
                raise
            # Amid the answer of a proxy, or its TLS.
            raise aiohttp.ClientConnectorError(req.connection_key, _gone(dial.turn.origin.source, req.url)) from error
        finally:
            _dialling.reset(token)
        if dial.sock is not None:
            cast("_Handler", protocol).sock = dial.sock
            dial.sock.user, dial.sock.unfinished = weakref.ref(protocol), False
        return protocol

    async def _wrap_create_connection(  # type: ignore[override]
        self,
        *args: Any,
        addr_infos: list[AddrInfoType],
        req: ClientRequest,
        timeout: aiohttp.ClientTimeout,
        client_error: type[aiohttp.ClientConnectorError] = aiohttp.ClientConnectorError,
        **keywords: Any,
    ) -> tuple[asyncio.Transport, ResponseHandler]:
        dial = _dialling.get()
        if keywords.get("ssl") and getattr(self, "_ssl_shutdown_timeout", None):
            keywords["ssl_shutdown_timeout"] = self._ssl_shutdown_timeout
        failure: Exception | None = None
        try:
            targets = interleave([_target(info, req.url) for info in addr_infos], self._first_family_count)
            while targets:
                if self.closed:
                    raise aiohttp.ClientConnectionError("Connector is closed")
                begun: list[Target] = []
                dial.sock = None
                self._dialer.enter()
                try:
                    async with _deadline(timeout.sock_connect):
                        dial.sock = await self._dialer.dial(
                            dial.turn, req.url.raw_host or "", targets, delay=self._delay, begun=begun
                        )
                        dial.sock.unfinished = True  # so that another source may still serve the request
                        with handed_over(dial.sock, self._loop):
                            return await self._hand_over(req, client_error, *args, sock=dial.sock, **keywords)
                except (aiohttp.ClientConnectorError, TimeoutError) as error:
                    # As aiohttp does, on with the others: TLS failed at the one that was reached, or none was in time.
                    if dial.sock is not None and dial.sock.lost:
                        raise _gone(dial.turn.origin.source, req.url) from error
                    failure = error
                    done = begun if dial.sock is None else [dial.sock.target]
                    targets = [target for target in targets if done and target not in done]
        except AiobindError as error:
            if failure is None or not is_sources_fault(error):  # else the source cannot serve those that were left
                failure = client_error(req.connection_key, error)
                failure.__cause__ = error
        except (TypeError, ValueError) as error:
            # An argument that asyncio refuses before a transport has taken the socket (failures of TLS are OSErrors).
            if dial.sock is not None and not isinstance(error, OSError):
                dial.sock.close()
            raise
        addr_infos.clear()  # aiohttp's own loop would drop one address of each family, and race the others again
        assert failure is not None
        try:
            raise failure
        finally:
            del failure  # which holds this very frame

    async def _hand_over(
        self, req: ClientRequest, client_error: type[aiohttp.ClientConnectorError], *args: Any, **keywords: Any
    ) -> tuple[asyncio.Transport, ResponseHandler]:
        """Do what ``_wrap_existing_connection`` does, without its deadline: there is one for TCP and TLS together."""
        try:
            return await self._loop.create_connection(*args, **keywords)
        except cert_errors as error:
            raise aiohttp.ClientConnectorCertificateError(req.connection_key, error) from error
        except ssl_errors as error:
            raise aiohttp.ClientConnectorSSLError(req.connection_key, error) from error
        except OSError as error:
            if error.errno is None and isinstance(error, TimeoutError):
                raise
            raise client_error(req.connection_key, error) from error


def _gone(source: Source, url: URL) -> BindError:
    return gone(source, destination_of(url.raw_host or "", url.port or 0))


def _end(protocol: ResponseHandler) -> None:
    # Not `close`: TLS would wait for the peer's last word.
    if protocol.transport is not None:
        protocol.transport.abort()


def _deadline(seconds: float | None) -> asyncio.Timeout:
    return asyncio.timeout(seconds if seconds and seconds > 0 else None)  # 0 is none, for aiohttp


def _target(info: AddrInfoType, url: URL) -> Target:
    text, port = str(info[4][0]), int(info[4][1])
    if text == url.raw_host:
        text = text.replace("%25", "%", 1)  # a zone is written "%25eth0" in a URL (RFC 6874), and only there
    try:
        target = lies_at(text, port)
        reason = "the resolver gave a name instead of an address"
    except OSError as error:
        target, reason = None, error.strerror or ""
    if target is None:
        destination = destination_of(text, port)
        raise ResolveError(socket.EAI_NONAME, f"connect to {destination}: {reason}", destination=destination)
    return target
