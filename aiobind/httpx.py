"""Law: httpx's own transport, once for each source: that keeps what httpx pools apart by source. Ours is the rest.

    handle_async_request    for each source in its turn: send the request, until one has connected
    _send                   httpx's ``handle_async_request``, of that source's transport
    _Backend.connect_tcp    httpcore wants a connection: our dial, from the source whose turn it is
    _Body                   tells when the response is done with

HTTP/1.1, HTTP/2, proxies, timeouts, retries and ``limits`` are httpx's and httpcore's own. httpx2 is the same in new
hands: whichever has made the request is used, and neither is imported here.

The one private thing that is touched is ``AsyncHTTPTransport._pool._network_backend``, in `_new_pool`; a test holds it,
and what is documented but unusual, against the oldest and the newest supported versions.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import sys
import time
import weakref
from collections import Counter
from contextlib import aclosing, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn, cast
from urllib.parse import urlsplit

import anyio
import idna

from ._connector import Sourced, make_dialer, seconds
from ._errors import AiobindError, is_sources_fault, merged
from ._faults import destination_of, place_of
from ._guest import hosted, in_trio
from ._httpcore import BoundBackend, Stream, connected, error_of
from ._sockets import BoundSocket, finders

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
    from typing import Self, TypeAlias

    import httpx
    import httpx2

    from ._dial import Dialer
    from ._events import Event
    from ._origin import Origin, SourceStats
    from ._policy import Policy
    from ._roster import Route, Turn
    from ._sockets import BoundSource, SocketOption
    from ._sources import Source

    Proxy: TypeAlias = str | httpx.URL | httpx.Proxy | httpx2.URL | httpx2.Proxy
    Certificate: TypeAlias = str | tuple[str, str] | tuple[str, str, str]

    class _Transport(httpx.AsyncBaseTransport, httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request | httpx2.Request) -> Any: ...
        async def aclose(self) -> None: ...
        async def __aenter__(self) -> Self: ...
        async def __aexit__(self, *error: object) -> None: ...

else:

    class _Transport: ...  # it is known by what it can do


__all__ = ["BoundBackend", "BoundTransport"]

_log = logging.getLogger("aiobind")

_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443, "socks5": 1080, "socks5h": 1080}
#: The keep-alive time of httpx (``httpx.Limits``), in seconds.
_KEPT = 5.0


class BoundTransport(Sourced, _Transport):
    """A transport for ``httpx.AsyncClient`` and ``httpx2.AsyncClient`` whose connections leave from named sources.

    As in ``httpx.AsyncClient(transport=BoundTransport("if!eth0"))``, on asyncio, uvloop and trio. The device and the
    source address are in place before the SYN. A keep-alive connection belongs to its source: a request for one source
    never rides on another's. The policy chooses for each request. When a source cannot connect for a reason of its
    own, the request goes to the next one: nothing of it has been sent by then. What fails once it has connected, be it
    TLS or the answer of a proxy, is the request.

    A request is pinned by ``extensions={"source": "if!wwan0"}``, or where it is made inside ``use_source``; what
    is pinned never moves to another source, and redirects keep to it.

    Do not give ``AsyncClient(proxy=...)`` or ``mounts=`` beside it: httpx sends those requests by other transports,
    unpinned, and a transport cannot know. Give *proxy* here. Of HTTP_PROXY and the like httpx takes no notice when it
    is given a transport.

    Args:
        sources: one or more sources, as for ``aiobind.Connector``.
        policy, happy_eyeballs_delay, local_ports, dns, ttl_dns_cache: as for ``aiobind.Connector``.
        strict, borrow, direct, fast_connect, sticky_prefix, on_event: likewise.
        socket_options: as for ``aiobind.Connector``: before the connect, not after it as with httpx.
        limit_per_source: how many requests of one source may be under way at the same time, up to the end of the
            response; 0 (the default) for no limit. With HTTP/1.1 that is its connections in use. A source with room
            goes before one without; where none has, a request waits for the first that gets some, in the order of
            arrival, for as long as httpx's pool timeout lasts.
        limit_per_source_host: the same, for each source and destination host.
        rate_per_source, rate_per_source_host: as for ``aiobind.Connector``. Only new connections count. The wait for a
            turn has httpx's pool timeout as well.
        abort_on_link_down: cut the connections in use whose interface goes down, or away, or loses their address: the
            request fails with an ``httpx.ReadError``. Idle ones are closed in any case.
        verify, cert, trust_env: as for ``httpx.AsyncHTTPTransport``. The one SSL context for all sources is made with
            the first request, in a thread, unless *verify* is one.
        http1, http2, retries: as for ``httpx.AsyncHTTPTransport``. *retries* are of the same source.
        limits: an ``httpx.Limits``, for each source: it has a pool of its own. Default: httpx's. The idle connections
            of a source that is not used for their keep-alive time are closed with the next request of any.
        proxy: the URL of a proxy (``http``, ``https``, ``socks5``), or an ``httpx.Proxy``: the connection to it is what
            leaves from the source, and it is the proxy that looks names up.

    Raises:
        InvalidSource: a text names no source.
        TypeError: no source was named, or *local_ports* or *direct* is of a wrong type.
        ValueError: see ``aiobind.Connector``.
        ImportError: *http2* needs the package h2, *dns* needs ``aiobind[dns]``, a rate ``aiobind[limits]``.

    Errors of a request are httpx's own, with ours as ``__cause__``: ``ConnectError`` with a ``BindError``,
    ``ConnectError`` or ``ResolveError``; ``ConnectTimeout`` with a ``ConnectError`` (ETIMEDOUT); ``PoolTimeout`` when
    no source has room. ``aiobind.bound_source(response)`` tells where a response came to.
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
        verify: ssl.SSLContext | str | bool = True,
        cert: Certificate | None = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        limits: httpx.Limits | httpx2.Limits | None = None,
        proxy: Proxy | None = None,
        retries: int = 0,
    ) -> None:
        if http2 and find_spec("h2") is None:
            raise ImportError('http2=True needs the package h2: pip install "httpx[http2]"')
        delay = seconds("happy_eyeballs_delay", happy_eyeballs_delay)
        self._tls = verify, cert, trust_env
        self._options: dict[str, Any] = {"http1": http1, "http2": http2, "proxy": proxy, "retries": retries}
        if limits is not None:
            self._options["limits"] = limits
        kept = _KEPT if limits is None else limits.keepalive_expiry
        self._kept = math.inf if kept is None else kept
        self._proxy = _proxy_of(proxy)
        #: of the client: known by its first request
        self._httpx: Any = None
        self._context: ssl.SSLContext | None = None
        self._body: Callable[..., Any] = _Body
        self._pools: dict[Source, _Pool] = {}
        #: since when nobody has used which of them; the longest first
        self._unused: dict[Source, float] = {}
        #: those that are not used any more, until their last response is done with
        self._retired: set[_Pool] = set()
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
            pooled=True,
            limit_per_source=limit_per_source,
            limit_per_source_host=limit_per_source_host,
            rate_per_source=rate_per_source,
            rate_per_source_host=rate_per_source_host,
            abort_on_link_down=abort_on_link_down,
            sticky_prefix=sticky_prefix,
            on_event=on_event,
        )
        self._dialer.on_lost = weakref.WeakMethod(self._on_lost)
        self._backend = _Backend(self._dialer, delay)

    def __repr__(self) -> str:
        return f"BoundTransport({', '.join(repr(str(origin.source)) for origin in self._dialer.roster.listed)})"

    # ── a request ──

    async def handle_async_request(self, request: httpx.Request | httpx2.Request) -> Any:
        """Send *request* from the source whose turn it is; return the response of httpx's own transport.

        Raises:
            httpx.TransportError: see the class.
            InvalidSource: ``extensions={"source": ...}`` names no source.
            RuntimeError: the transport is closed, or belongs to another event loop; or its policy named no source.
            TypeError: this transport serves a client of the other httpx already.
        """
        if self._context is None or not isinstance(request, self._httpx.Request):
            await self._begin(request)
        self._let_go()
        url, proxy, towards = request.url, *self._proxy
        host, port = url.raw_host.decode("ascii"), url.port or _PORTS.get(url.scheme, 0)
        patience = request.extensions.get("timeout", {}).get("pool")
        tunnels = url.scheme in ("https", "wss") or proxy.startswith("socks")
        route = self._dialer.route(host, port, request.extensions.get("source"), towards=towards)
        failures: list[AiobindError] = []
        held_back: list[AiobindError] = []
        kind: Any = None
        try:
            while (turn := route.first() or await self._next(route, host, patience)) is not None:
                dial = _Dial(turn, host, patience, tunnels=tunnels)
                try:
                    return await self._send(request, dial, route)
                except self._httpx.TransportError as error:
                    kind, ours = type(error), error.__cause__
                    if not dial.connecting or not isinstance(ours, AiobindError):
                        raise
                    (held_back if turn.held_back else failures).append(ours)
                    if not is_sources_fault(ours):
                        break
        finally:
            route.close()
        if not (failures or held_back):
            raise RuntimeError(f"the policy named no source for {host}")
        cause = merged(failures or held_back)
        raise kind(str(cause)) from cause

    async def _begin(self, request: object) -> None:
        """Learn from the first request who the client is."""
        known = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
        client = next((each for each in known if isinstance(request, each.Request)), None)
        if client is None:
            raise TypeError(f"a request of httpx or httpx2, not {type(request).__name__}")
        if self._httpx not in (None, client):
            raise TypeError(f"this transport serves a client of {self._httpx.__name__}: make another one")
        self._httpx = client
        self._body = type("_Body", (_Body, client.AsyncByteStream), {})
        verify, cert, trust_env = self._tls
        make = partial(client.create_ssl_context, verify=verify, cert=cert, trust_env=trust_env)
        # To read all certificate authorities takes 10 to 20 ms.
        context = make() if isinstance(verify, ssl.SSLContext) else await anyio.to_thread.run_sync(make)
        if self._context is None:
            self._context = context

    async def _next(self, route: Route, host: str, patience: float | None) -> Turn | None:
        try:
            with anyio.fail_after(patience):  # the wait for a place counts as httpx's own wait does
                return await hosted(route.next())
        except TimeoutError as error:
            text = f"no source has room for a request to {host} within {patience:g} s"
            raise self._httpx.PoolTimeout(text) from error

    async def _send(self, request: Any, dial: _Dial, route: Route) -> Any:
        """Send *request* from the source of *dial*; count it until the response is done with."""
        turn = dial.turn
        try:
            pool = self._pools.get(turn.origin.source) or self._new_pool(turn.origin)
        except BaseException:
            route.leave(turn)
            raise
        route.keep(turn)
        turn.origin.handed_out()
        pool.users += 1
        self._unused.pop(turn.origin.source, None)
        done = partial(self._ended, pool, route, turn)
        token = _dialling.set(dial)
        try:
            with _ours_as_cause():
                response = await pool.transport.handle_async_request(request)
            if dial.stream is not None:
                dial.stream.sock.unfinished = False
        except BaseException:
            done()
            if dial.stream is not None and dial.stream.sock.unfinished:  # amid SOCKS httpcore forgets it
                await dial.stream.end()
            if pool.forgotten:
                self._retire(turn.origin.source)
            raise
        finally:
            _dialling.reset(token)
            dial.end()
        response.stream = self._body(response.stream, done)
        return response

    def _ended(self, pool: _Pool, route: Route, turn: Turn) -> None:
        """Count a request as ended; any thread may do that, where the collector does."""
        pool.users -= 1
        turn.origin.given_back()
        route.release(turn)
        if pool in self._retired:
            _soon(partial(self._drain, pool))
        elif not pool.users:
            self._unused[turn.origin.source] = time.monotonic()

    # ── the pools ──

    def _new_pool(self, origin: Origin) -> _Pool:
        transport = self._httpx.AsyncHTTPTransport(verify=self._context, **self._options)
        core = transport._pool  # noqa: SLF001
        core._network_backend = self._backend  # noqa: SLF001 - httpx passes none on
        pool = self._pools[origin.source] = _Pool(origin.source, transport, core)
        return pool

    def _let_go(self) -> None:
        """Retire the pools that nobody has used for the keep-alive time."""
        past = time.monotonic() - self._kept
        while self._unused and (oldest := next(iter(self._unused.items())))[1] <= past:
            self._retire(oldest[0])

    def _retire(self, source: Source) -> None:
        """Begin no request in the pool of *source* any more; close what lies idle there, and the rest when it is."""
        self._unused.pop(source, None)
        pool = self._pools.pop(source, None)
        if pool is not None:
            self._retired.add(pool)
            _soon(partial(self._drain, pool))

    async def _drain(self, pool: _Pool) -> None:
        await pool.drain()
        if not pool.users:
            self._retired.discard(pool)

    # ── Sourced ──

    def stats(self) -> tuple[SourceStats, ...]:
        """Return the figures of each source, as ``aiobind.Connector.stats`` does.

        ``in_use`` counts connections here as well: with HTTP/2 several requests may share one.
        """
        return tuple(figures._replace(in_use=max(figures.connections - figures.idle, 0)) for figures in super().stats())

    def _idle_of(self) -> Mapping[Source, int]:
        idle: Counter[Source] = Counter()
        for pool in (*self._pools.values(), *self._retired):
            idle[pool.source] += len(pool.idle)
        return idle

    def _place(self, host: str) -> str:
        if not host.isascii():
            with suppress(UnicodeError):  # as httpx spells it: by IDNA 2008
                return idna.encode(host.lower()).decode()
        return host

    def _removed(self, origin: Origin) -> None:
        self._retire(origin.source)

    def _on_lost(self, lost: Iterable[BoundSocket], _cut: bool) -> None:
        """Close the idle connections of sources whose interface or address has gone: the kernel never would."""
        for source in {sock.bound.source for sock in lost if sock.bound is not None}:
            self._retire(source)

    async def aclose(self) -> None:
        """Close all connections."""
        self._dialer.close()
        pools = (*self._pools.values(), *self._retired)
        self._pools.clear()
        self._unused.clear()
        self._retired.clear()
        for pool in pools:
            await pool.transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def handle_request(self, request: object) -> NoReturn:
        """Refuse the *request* of a synchronous client.

        Raises:
            TypeError: always.
        """
        raise TypeError("BoundTransport is for httpx.AsyncClient: a synchronous client would block the event loop")

    def __enter__(self) -> NoReturn:
        self.handle_request(None)


def _proxy_of(proxy: Proxy | None) -> tuple[str, tuple[str, int] | None]:
    """Return its scheme, and its host and port."""
    url = urlsplit(str(getattr(proxy, "url", proxy or "")))
    return url.scheme, (url.hostname, url.port or _PORTS.get(url.scheme, 0)) if url.hostname else None


# ── one source's share ──


class _Pool:
    """httpx's transport for the connections of one source."""

    def __init__(self, source: Source, transport: Any, core: Any) -> None:
        self.source, self.transport, self._core = source, transport, core
        #: requests under way, up to the end of the response
        self.users = 0

    @property
    def idle(self) -> list[Any]:
        return [each for each in self._core.connections if each.is_idle() and not each.is_closed()]

    @property
    def forgotten(self) -> bool:
        """Whether httpcore takes a connection for used that nobody uses.

        It does for ever when a request was cancelled between the connect and the first byte (httpcore 1.0.9), and when
        TLS has failed in a tunnel.
        """
        return sum(not (each.is_idle() or each.is_closed()) for each in self._core.connections) > self.users

    async def drain(self) -> None:
        """Close what nobody uses."""
        if not self.users:
            await self.transport.aclose()
            return
        for connection in self.idle:
            await connection.aclose()


#: What runs for nobody that waits; a loop holds its tasks weakly.
_running: set[asyncio.Task[None]] = set()


def _soon(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Have *work* done, by a task of whatever loop this is."""

    async def run() -> None:
        try:
            await work()
        except Exception:
            _log.exception("closing idle connections")

    if in_trio():
        sys.modules["trio"].lowlevel.spawn_system_task(run)
        return
    with suppress(RuntimeError):  # outside of any loop: the end of the transport sees to it
        loop = asyncio.get_running_loop()
        task = loop.create_task(run())
        _running.add(task)
        task.add_done_callback(_running.discard)


# ── a connection ──


class _Dial:
    """A request's turn: whence, and how far it has come. The context carries it past httpcore's pool."""

    def __init__(self, turn: Turn, host: str, patience: float | None, *, tunnels: bool) -> None:
        self.turn, self.host, self.patience = turn, host, patience
        #: TLS, or a proxy's answer, comes before the request
        self.tunnels = tunnels
        #: our connect is under way, or has failed; and what it has come to
        self.connecting, self.stream = False, cast("Stream | None", None)

    def end(self) -> None:
        """Let go: a context lives on in what was first begun in it, as in a reader."""
        self.stream = None
        del self.turn


_dialling: ContextVar[_Dial] = ContextVar("aiobind_dialling")


class _Backend:
    """Makes connections for httpcore, from the sources of the requests that need them."""

    def __init__(self, dialer: Dialer, delay: float | None) -> None:
        self._dialer, self._delay = dialer, delay

    async def connect_tcp(self, host: str, port: int, timeout: float | None = None, **_: object) -> Stream:
        dial = _dialling.get()
        dial.stream, dial.connecting = None, True
        source, limits = dial.turn.origin.source, self._dialer.limits
        if limits.paced:
            place = place_of(dial.host)
            try:
                with anyio.fail_after(dial.patience):
                    await hosted(limits.pace(dial.turn.origin, place))
            except TimeoutError as error:
                text = f"{source} may begin no connection to {place} within {dial.patience:g} s (its rate)"
                raise error_of("PoolTimeout", text) from error
        host = host.replace("%25", "%", 1)  # a zone is written "%25eth0" in a URL (RFC 6874)
        connecting = self._connect(dial.turn, host, port)
        dial.stream = await connected(connecting, destination_of(host, port), timeout, source=source)
        dial.stream.sock.unfinished, dial.connecting = dial.tunnels, False
        return dial.stream

    async def _connect(self, turn: Turn, host: str, port: int) -> BoundSocket:
        self._dialer.enter()
        targets = await self._dialer.targets(turn.origin, host, port)
        return await self._dialer.dial(turn, host, targets, delay=self._delay)

    sleep = staticmethod(anyio.sleep)


# ── the response ──


class _Body:
    """The body of a response, which says once when it is done with."""

    def __init__(self, stream: Any, done: Callable[[], object]) -> None:
        self._stream = stream
        self._done: Callable[[], object] | None = done

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            with _ours_as_cause():
                async with aclosing(aiter(self._stream)) as parts:  # trio warns of one that is left to the collector
                    async for part in parts:
                        yield part
        except BaseException:
            self._finish()
            raise

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._finish()

    def _finish(self) -> None:
        done, self._done = self._done, None
        if done is not None:
            done()

    def __del__(self) -> None:
        self._finish()


@contextmanager
def _ours_as_cause() -> Iterator[None]:
    """Make our error the cause of httpx's, where it is the argument of httpcore's, which stands between them."""
    try:
        yield
    except Exception as error:
        ours = next(iter(getattr(error.__cause__, "args", ())), None)
        if isinstance(ours, AiobindError):
            raise error from ours
        raise


def _bound_response(response: Any) -> BoundSource | None:
    extensions = getattr(response, "extensions", None)
    stream: Any = extensions.get("network_stream") if isinstance(extensions, dict) else None
    sock = stream.get_extra_info("socket") if hasattr(stream, "get_extra_info") else None
    return sock.bound if isinstance(sock, BoundSocket) else None


finders.append(_bound_response)
