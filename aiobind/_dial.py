"""Law: the story of one connect, from a destination and a source to a connected socket or one clear error.

    route      the policy orders the sources; a pinned one stands alone
    targets    the destination's addresses (a literal asks nobody)
    plan       for each target, what its socket is bound to; what the source cannot serve is dropped
    race       attempts by RFC 8305: open, pin, bind, connect
    verify     the source keeps its promise, in the moment before the SYN and again before a first byte
    count      the connection belongs to its source until it ends

The edges call ``route``, ``targets`` and ``dial``; whatever they wrap around, the story is told here only.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import weakref
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

from ._advice import advice
from ._binding import Binding, Exempt, Refusal, Target
from ._errors import AiobindError, Attempt, BindError, ConnectError, ResolveError, explained, shown
from ._interfaces import NoNeighbourError
from ._plan import Planner
from ._platform import platform
from ._policy import RoundRobin
from ._ports import ANY_PORT, LocalPorts
from ._race import interleave, race
from ._resolve import SystemLookup, literal
from ._scope import pinned
from ._sockets import ANY_KIND, BoundSocket, BoundSource, connect, open_bound
from ._sources import Prefix, parse_source

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from ._policy import Policy
    from ._resolve import Lookup, Resolved
    from ._sockets import SocketOption
    from ._sources import Source

__all__ = ["Dialer", "Origin", "Reach", "SourceStats"]

#: How a look-up gets a socket to ask with: `Dialer.reach`.
Reach: TypeAlias = "Callable[[Source | None, Target, int], Awaitable[BoundSocket]]"

#: Local ports that one turn of the loop tries at most: 1 ms.
_TRIES_PER_TURN = 50


class SourceStats(NamedTuple):
    """The figures of one source.

    Attributes:
        source: the source.
        connections: open now, idle keep-alive ones included.
        in_use: those of them that are in use.
        idle: those of them that wait in a pool for the next request.
        connects: how many connections have been made in all.
    """

    source: Source
    connections: int
    in_use: int
    idle: int
    connects: int


class Origin:
    """One source in the care of a dialer, with its live figures."""

    __slots__ = ("__weakref__", "connections", "connects", "held", "pooled", "source")

    def __init__(self, source: Source, *, pooled: bool) -> None:
        self.source = source
        self.pooled = pooled
        self.connections = 0
        self.connects = 0
        #: connections that the pool, where there is one, has handed out
        self.held = 0

    @property
    def in_use(self) -> int:
        """Connections in use now: without a pool, all that are open."""
        return self.held if self.pooled else self.connections

    def opened(self) -> None:
        """Count a connection as open."""
        self.connections += 1
        self.connects += 1

    def ended(self) -> None:
        """Count a connection as ended."""
        self.connections -= 1


class Dialer:
    """Makes connections from a set of sources, on one event loop."""

    def __init__(
        self,
        sources: Sequence[str | Source],
        *,
        policy: Policy | None,
        socket_options: Iterable[SocketOption],
        ttl: float | None,
        pooled: bool = False,
        local_ports: range | None = None,
        lookup: Callable[[Reach], Lookup] | None = None,
        strict: bool = True,
        borrow: bool = False,
        direct: Iterable[str] = (),
    ) -> None:
        if not sources:
            raise TypeError("name at least one source, for example 'if!eth0' or '192.0.2.7'")
        origins = {source: Origin(source, pooled=pooled) for source in map(parse_source, sources)}
        if len(origins) < len(sources):
            raise ValueError("a source is named twice: " + ", ".join(map(str, sources)))
        #: each serves one loop and one set of sources, in the order in which they were named
        self.origins = tuple(origins.values())
        #: stands for this dialer in `_scope`, without holding it
        self.scope = object()
        self._listed = origins
        # Sources pinned from outside the list live as long as somebody connects from them, or is connected.
        self._guests: weakref.WeakValueDictionary[Source, Origin] = weakref.WeakValueDictionary()
        self._policy: Policy = RoundRobin() if policy is None else policy
        self._options = tuple((level, name, value) for level, name, value in socket_options)
        self._pooled = pooled
        self._ports = LocalPorts(local_ports) if local_ports is not None else ANY_PORT
        self._strict = strict
        self._direct = Exempt(direct) if direct else None
        self._system = SystemLookup(ttl)
        self._lookup: Lookup = self._system if lookup is None else lookup(self.reach)
        self._planner = Planner(lookup=self._lookup, borrow=borrow)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def enter(self) -> asyncio.AbstractEventLoop:
        """Return the running loop, which must be the one of the first use.

        Raises:
            RuntimeError: this is another loop, or the connector is closed.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise RuntimeError("this connector belongs to another event loop: make one for each loop")
            self._loop = loop
        if self._closed:
            raise RuntimeError("the connector is closed")
        return loop

    def close(self) -> None:
        """Refuse new connections, and let go of the loop's interface watch."""
        self._closed = True
        self._lookup.close()
        self._planner.close()

    def forget(self, host: str | None = None) -> None:
        """Drop the addresses of names that are kept for this dialer's sources."""
        self._lookup.forget(host)

    def stats(self) -> tuple[SourceStats, ...]:
        """Return the figures of each source, and of those pinned from outside that still have connections."""
        guests = [guest for guest in list(self._guests.values()) if guest.connections]
        return tuple(
            SourceStats(origin.source, origin.connections, origin.in_use, 0, origin.connects)
            for origin in (*self.origins, *guests)
        )

    # ── route ──

    def route(self, host: str, source: str | Source | None = None) -> Iterator[Origin]:
        """Yield the sources to try for *host*: the pinned one alone, or all in the order of the policy.

        Args:
            host: the destination.
            source: the pin of this one call; it wins over ``use_source``.
        """
        pin = pinned(self.scope) if source is None else parse_source(source)
        if pin is None:
            # A policy yields from what it was given.
            return iter(cast("Iterable[Origin]", self._policy.order(self.origins, host)))
        origin = self._listed.get(pin) or self._guests.get(pin)
        if origin is None:
            origin = self._guests[pin] = Origin(pin, pooled=self._pooled)
        return iter((origin,))

    # ── targets ──

    async def find(
        self, origin: Origin, host: str, port: int, *, family: int = 0, flags: int = 0
    ) -> Sequence[Resolved]:
        """Return the addresses of a name, asked for as *origin* asks.

        Args:
            origin: whose connection it is for.
            host: a name.
            port: the port of the destination; for messages.
            family: ``AF_INET``, ``AF_INET6``, or 0 for both.
            flags: ``AI_*`` flags of getaddrinfo(3).

        Raises:
            ResolveError: the name has no address; with a ``source`` when it is the source that could not ask, or whose
                own name could not be resolved.
            BindError: the source can reach no name server.
        """
        lookup = self._system if self._direct is not None and self._direct.names(host) else self._lookup
        try:
            return await lookup.find(host, via=origin.source, family=family, flags=flags)
        except (BindError, ResolveError) as error:  # it is the source that failed
            raise _with_context(error, origin.source, destination_of(host, port)) from error.__cause__
        except socket.gaierror as error:
            text = f"the destination's name cannot be resolved: {error.strerror}"
            # Of what no name server has answered from here, another source may hear.
            source = origin.source if lookup.by_source and error.errno == socket.EAI_AGAIN else None
            raise _unresolved(host, port, text, error.errno, source) from error

    async def targets(
        self, origin: Origin, host: str, port: int, *, family: int = 0, flags: int = 0, first_family_count: int = 1
    ) -> list[Target]:
        """Return the addresses of the destination in the order to try them, their families interleaved.

        Args:
            origin: whose connection it is for.
            host: a name or a literal address.
            port: its port.
            family: ``AF_INET``, ``AF_INET6``, or 0 for both.
            flags: ``AI_*`` flags of getaddrinfo(3).
            first_family_count: RFC 8305's First Address Family Count.

        Raises:
            ResolveError: the name has no address, or none of *family*.
            BindError: the source can reach no name server.
        """
        try:
            address = literal(host)
        except OSError as error:
            raise _unresolved(host, port, error.strerror or "") from error
        found = (address,) if address else await self.find(origin, host, port, family=family, flags=flags)
        version = 6 if family == socket.AF_INET6 else 4
        targets = [Target.of(ip, port, zone) for ip, zone in found if not family or ip.version == version]
        if not targets:
            raise _unresolved(host, port, f"the destination has no IPv{version} address")
        return interleave(targets, first_family_count)

    # ── plan, race, verify, count ──

    async def dial(
        self,
        origin: Origin,
        host: str,
        targets: Sequence[Target],
        *,
        delay: float | None,
        begun: list[Target] | None = None,
    ) -> BoundSocket:
        """Return a socket connected to one of *targets* from the source of *origin*, and counted there.

        Args:
            origin: whence.
            host: what the caller calls the destination.
            targets: its addresses, in the order to try.
            delay: RFC 8305's Connection Attempt Delay in seconds; None: one attempt after the other.
            begun: is filled with the targets that were tried, for a caller whose deadline may come before the last one.

        Raises:
            BindError: the source itself failed, and nothing was sent.
            ResolveError: the name of the source could not be resolved.
            ConnectError: no target answered.
        """
        loop = self.enter()
        source, destination = origin.source, destination_of(host, targets[0].port)
        try:
            decisions = await self._plan(source, host, targets)
        except (BindError, ResolveError) as error:
            raise _with_context(error, source, destination) from error.__cause__
        bindings: dict[Target, Binding] = {}
        refusals: list[Refusal] = []
        for target, decision in zip(targets, decisions, strict=True):
            if isinstance(decision, Refusal):
                refusals.append(decision)
            else:
                bindings[target] = decision
        attempts = [partial(self._attempt, loop, source, *planned, begun) for planned in bindings.items()]
        sock, errors = await race(attempts, delay)
        if sock is None:
            raise _failure(source, destination, list(zip(bindings, errors, strict=True)), refusals)
        origin.opened()
        sock.register(origin.ended)
        return sock

    async def reach(self, source: Source | None, target: Target, kind: int) -> BoundSocket:
        """Return a socket of *kind* connected to *target* from *source*, which no figure counts.

        Args:
            source: whence; None leaves that to the routing table.
            target: whither. ``direct`` exempts it from nothing.
            kind: ``SOCK_STREAM`` or ``SOCK_DGRAM``.

        Raises:
            BindError: the source cannot serve *target*, and nothing was sent.
            ResolveError: the name of the source could not be resolved.
            OSError: the system's answer.
        """
        loop = self.enter()
        (decision,) = await self._planner.plan(source, (target,))
        if isinstance(decision, Refusal):
            raise BindError(*decision)
        return await self._open(loop, target, decision, kind)

    async def _plan(self, source: Source, host: str, targets: Sequence[Target]) -> Sequence[Binding | Refusal]:
        if self._direct is None:
            return await self._planner.plan(source, targets)
        pinned = [target for target in targets if not self._direct.covers(host, target)]
        decided = dict(zip(pinned, await self._planner.plan(source, pinned) if pinned else (), strict=True))
        return [decided.get(target, Binding()) for target in targets]

    async def _attempt(
        self,
        loop: asyncio.AbstractEventLoop,
        source: Source,
        target: Target,
        binding: Binding,
        begun: list[Target] | None,
    ) -> BoundSocket:
        if begun is not None:
            begun.append(target)
        sock = await self._open(loop, target, binding)
        sock.target = target
        sock.bound = BoundSource(source, sock.interface, *sock.name)
        return sock

    async def _open(
        self, loop: asyncio.AbstractEventLoop, target: Target, binding: Binding, kind: int = socket.SOCK_STREAM
    ) -> BoundSocket:
        """Return a connected socket; where the system finds no free port for one, try the next way to get one."""
        stream = kind == socket.SOCK_STREAM
        # A mark may choose the route, so that a query is to have it too.
        options = self._options if stream else [option for option in self._options if option[0] in ANY_KIND]
        ports = self._ports if stream else ANY_PORT
        failure: OSError | None = None
        for turn, port in enumerate(ports.ways()):
            if turn % _TRIES_PER_TURN == _TRIES_PER_TURN - 1:
                await asyncio.sleep(0)
            try:
                sock = open_bound(
                    binding, target, kind=kind, options=options, strict=self._strict, ports=ports, port=port
                )
            except BindError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                failure = failure or _bare(error)
                continue
            try:
                await self._connect(loop, sock, target, binding)
            except BaseException as error:
                sent = platform.sent(sock)
                sock.close()
                if isinstance(error, AiobindError) or not isinstance(error, OSError):
                    raise
                if error.errno != errno.EADDRNOTAVAIL:
                    raise _plain(error, sent=sent) from _bare(error)
                failure = failure or _bare(error)
            else:
                return sock
        assert failure is not None
        try:
            # One errno for that, the one of connect(2), whichever call it was that found none.
            reason = f"no source address or {ports} is left for this destination"
            raise BindError(errno.EADDRNOTAVAIL, reason) from failure
        finally:
            del failure  # which would hold this very frame

    async def _connect(
        self, loop: asyncio.AbstractEventLoop, sock: BoundSocket, target: Target, binding: Binding
    ) -> None:
        """Connect *sock*, and hold what became of it against the promise, before and after."""
        guard = self._planner.guard(sock, binding, target)
        if guard is None:
            await connect(loop, sock, target)
        else:
            with guard:
                await guard.confirm()
                try:
                    await connect(loop, sock, target)
                except OSError as error:
                    if not guard.aborted:
                        raise
                    await guard.confirm(_bare(error))  # it was the guard that ended it
                await guard.confirm()
        sock.name = address, port = sock.getsockname()[:2]
        if sock.name == (target.host, target.port) and sock.type == socket.SOCK_STREAM:
            # TCP connects a port to itself where nobody listens and connect(2) happens to choose that very port
            # (simultaneous open, RFC 9293 section 3.5).
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        promised = str(sock.local).partition("%")[0]
        # The text of ::/96 differs between Python and C.
        if sock.local is not None and promised != address and ip_address(promised) != ip_address(address):
            reason = f"the system connected from {address} instead of {promised}; no data was sent"
            raise BindError(errno.EADDRNOTAVAIL, reason)
        if port not in self._ports and sock.type == socket.SOCK_STREAM:
            self._ports.doubt()
            reason = f"the system connected from {port}, which is no {self._ports}; no data was sent"
            raise BindError(errno.EADDRNOTAVAIL, reason)


def destination_of(host: str, port: int) -> str:
    """Return the destination as people write it."""
    text = shown(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def _unresolved(
    host: str, port: int, reason: str, number: int | None = None, source: Source | None = None
) -> ResolveError:
    destination = destination_of(host, port)
    text = f"connect to {destination}: {reason}" if source is None else explained(source, destination, reason)
    return ResolveError(number or socket.EAI_NONAME, text, source=source, destination=destination)


def _with_context(error: AiobindError, source: Source, destination: str) -> AiobindError:
    text = explained(source, destination, error.strerror or "")
    return type(error)(error.errno or errno.EINVAL, text, source=source, destination=destination)


def _bare(error: OSError) -> OSError:
    """Return *error* without its traceback, whose frames hold the list of errors that it is going to be in."""
    return error.with_traceback(None)


def _plain(error: OSError, *, sent: bool) -> OSError:
    """Return what connect(2) answered, in plain words, as the source's failure or the target's."""
    number = error.errno or errno.EINVAL
    if isinstance(error, NoNeighbourError):
        return OSError(number, error.strerror)
    text = None if sent else advice("connect", number)
    if text is not None:  # nothing was sent: that is the source's fault, and another one may do better
        return BindError(number, text)
    return OSError(number, advice("answer", number) or os.strerror(number).lower())


def _failure(
    source: Source, destination: str, tried: list[tuple[Target, OSError]], refusals: list[Refusal]
) -> AiobindError:
    """Return the one error for all that was tried; a source that could serve no target is a BindError."""
    not_tried = "; ".join(dict.fromkeys(refusal.reason for refusal in refusals))
    if not tried:
        error = BindError(refusals[0].errno, not_tried)
        return _with_context(error, source, destination)
    if len(tried) == 1 and str(tried[0][0]) == destination:
        reason = tried[0][1].strerror or ""
    else:
        reason = "; ".join(f"{target}: {error.strerror}" for target, error in tried)
    if isinstance(source, Prefix) and tried[0][1].errno in (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ETIMEDOUT):
        reason += f" (is {source.network} routed here? ip route add local {source.network} dev lo)"
    if not_tried:
        reason = f"{reason} (not tried: {not_tried})"
    first = tried[0][1]
    number, text = first.errno or errno.EINVAL, explained(source, destination, reason)
    if all(isinstance(error, BindError) for _, error in tried):
        failure = BindError(number, text, source=source, destination=destination)
        failure.__cause__ = first if len(tried) == 1 else ExceptionGroup("attempts", [error for _, error in tried])
        return failure
    attempts = [Attempt(source, str(target), error) for target, error in tried]
    return ConnectError(number, text, source=source, destination=destination, attempts=attempts)
