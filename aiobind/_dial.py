"""Law: the story of one connect, from a destination and a source to a connected socket or one clear error.

    route      the policy orders the sources; a pinned one stands alone
    targets    the destination's addresses (a literal asks nobody)
    plan       for each target, what its socket is bound to; what the source cannot serve is dropped
    race       attempts by RFC 8305: open, pin, bind, connect
    verify     the local address keeps the promise, before a first byte is sent
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
from typing import TYPE_CHECKING, NamedTuple, cast

from ._binding import Refusal, Target
from ._errors import AiobindError, Attempt, BindError, ConnectError, ResolveError, explained, shown
from ._plan import Planner
from ._policy import RoundRobin
from ._race import interleave, race
from ._resolve import literal, resolve
from ._scope import pinned
from ._sockets import BoundSocket, BoundSource, connect, open_bound
from ._sources import Prefix, parse_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ._binding import Binding
    from ._interfaces import Guard
    from ._policy import Policy
    from ._sockets import SocketOption
    from ._sources import Source

__all__ = ["Dialer", "Origin", "SourceStats"]

#: What connect(2) answers when the source is to blame, and what it means then.
_SOURCE_ERRNOS = {
    errno.EADDRNOTAVAIL: "no source address or ephemeral port is left for this destination",
    errno.EADDRINUSE: "no ephemeral port is left for this destination",
    errno.ENODEV: "the interface is gone",
    errno.EINVAL: "the system lets no packet go there from this source address",
}
_ADVICE = {
    errno.ENETUNREACH: "network is unreachable: the source has no route there; is its interface up?",
    errno.EHOSTUNREACH: "no route to host: nobody answers there on the link; has the interface a carrier?",
}


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
        self._options = tuple(socket_options)
        self._pooled = pooled
        self._ttl = ttl
        self._planner = Planner(ttl=ttl)
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
        self._planner.close()

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

    async def targets(
        self, host: str, port: int, *, family: int = 0, flags: int = 0, first_family_count: int = 1
    ) -> list[Target]:
        """Return the addresses of the destination in the order to try them, their families interleaved.

        Args:
            host: a name or a literal address.
            port: its port.
            family: ``AF_INET``, ``AF_INET6``, or 0 for both.
            flags: ``AI_*`` flags of getaddrinfo(3).
            first_family_count: RFC 8305's First Address Family Count.

        Raises:
            ResolveError: the name has no address, or none of *family*.
        """
        try:
            address = literal(host)
            found = (address,) if address else await resolve(host, family=family, flags=flags, ttl=self._ttl)
        except socket.gaierror as error:
            text = f"the destination's name cannot be resolved: {error.strerror}"
            raise _unresolved(host, port, text, error.errno) from error
        except OSError as error:
            raise _unresolved(host, port, error.strerror or "") from error
        version = 6 if family == socket.AF_INET6 else 4
        targets = [Target.of(ip, port, zone) for ip, zone in found if not family or ip.version == version]
        if not targets:
            raise _unresolved(host, port, f"the destination has no IPv{version} address")
        return interleave(targets, first_family_count)

    # ── plan, race, verify, count ──

    async def dial(
        self,
        origin: Origin,
        targets: Sequence[Target],
        destination: str,
        *,
        delay: float | None,
        begun: list[Target] | None = None,
    ) -> BoundSocket:
        """Return a socket connected to one of *targets* from the source of *origin*, and counted there.

        Args:
            origin: whence.
            targets: whither, in the order to try.
            destination: what the caller calls it; for messages.
            delay: RFC 8305's Connection Attempt Delay in seconds; None: one attempt after the other.
            begun: is filled with the targets that were tried, for a caller whose deadline may come before the last one.

        Raises:
            BindError: the source itself failed, and nothing was sent.
            ResolveError: the name of the source could not be resolved.
            ConnectError: no target answered.
        """
        loop = self.enter()
        source = origin.source
        try:
            decisions = await self._planner.plan(source, targets)
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
        sock = open_bound(binding, target.family, options=self._options)
        guard: Guard | None = None
        try:
            with self._planner.guard(sock, binding, target) as guard:
                await connect(loop, sock, target)
            if guard is not None and guard.refusal is not None:  # the link went in the moment in which it connected
                raise ConnectionResetError(errno.ECONNRESET, "aborted")
            address, port = sock.getsockname()[:2]
            if (address, port) == (target.host, target.port):
                # TCP connects a port to itself where nobody listens and connect(2) happens to choose that very port
                # (simultaneous open, RFC 9293 section 3.5).
                raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
            await self._planner.verify(binding, address)
        except BaseException as error:
            sock.close()
            if guard is not None and guard.refusal is not None and isinstance(error, OSError):
                raise BindError(guard.refusal.errno, f"{guard.refusal.reason} (since the attempt began)") from _bare(
                    error
                )
            if isinstance(error, OSError) and not isinstance(error, AiobindError):
                raise _plain(error) from _bare(error)
            raise
        sock.target = target
        sock.bound = BoundSource(source, binding.device or _pinned_zone(binding), address, port)
        return sock


def destination_of(host: str, port: int) -> str:
    """Return the destination as people write it."""
    text = shown(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def _pinned_zone(binding: Binding) -> str | None:
    # Binding a link-local address sets the socket's device as well (ipv6(7), sin6_scope_id).
    ip = binding.local[0] if binding.local else None
    return ip.scope_id if ip is not None and ip.version == 6 else None


def _unresolved(host: str, port: int, reason: str, number: int | None = None) -> ResolveError:
    destination = destination_of(host, port)
    return ResolveError(number or socket.EAI_NONAME, f"connect to {destination}: {reason}", destination=destination)


def _with_context(error: AiobindError, source: Source, destination: str) -> AiobindError:
    text = explained(source, destination, error.strerror or "")
    return type(error)(error.errno or errno.EINVAL, text, source=source, destination=destination)


def _bare(error: OSError) -> OSError:
    """Return *error* without its traceback, whose frames hold the list of errors that it is going to be in."""
    return error.with_traceback(None)


def _plain(error: OSError) -> OSError:
    """Return what connect(2) answered, in plain words, as the source's failure or the target's."""
    number = error.errno or errno.EINVAL
    if number in _SOURCE_ERRNOS:
        return BindError(number, _SOURCE_ERRNOS[number])
    return OSError(number, _ADVICE.get(number) or os.strerror(number).lower())


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
