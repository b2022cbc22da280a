"""Law: the story of one connect, from a destination and a source to a connected socket or one clear error.

    route      the policy orders the sources; a pinned one stands alone
    targets    the destination's addresses (a literal asks nobody)
    plan       for each target, what its socket is bound to; what the source cannot serve is dropped
    race       attempts by RFC 8305: open, pin, bind, connect
    verify     the source keeps its promise, before the SYN and again before a first byte
    count      the connection belongs to its source until it ends

What the plan has come to is kept with the source, and the next connect begins with the race, as long as the interfaces
stay what they are. This short way decides nothing: whatever refuses, or has changed, goes the long way.

The edges call ``route``, ``targets`` and ``dial``; whatever they wrap around, the story is told here only.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
import time
import weakref
from contextlib import suppress
from functools import lru_cache, partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeAlias

from ._binding import Binding, Exempt, Refusal, Target
from ._errors import AiobindError, BindError, ResolveError
from ._events import Journal
from ._faults import (
    ANSWERS,
    NO_ANSWER,
    NoPortError,
    bare,
    combined,
    destination_of,
    place_of,
    plain,
    suspended,
    unresolved,
    with_context,
)
from ._interfaces import LinkGoneError
from ._limits import Limits
from ._plan import Planner
from ._platform import platform
from ._ports import ANY_PORT, LocalPorts
from ._race import interleave, race
from ._resolve import SystemLookup, literal
from ._roster import Roster, Route
from ._scope import pinned
from ._sockets import ANY_KIND, IPPROTO_MPTCP, TCP, BoundSocket, BoundSource, Kind, Opening
from ._sources import is_fixed, parse_source
from ._wait import associate, way_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

    from ._events import Event
    from ._interfaces import InterfaceTable
    from ._origin import Origin, SourceStats
    from ._policy import Policy
    from ._resolve import Lookup, Resolved
    from ._roster import Turn
    from ._sockets import SocketOption
    from ._sources import Source
    from ._wait import Connect

__all__ = ["Dialer", "Reach", "lies_at"]

#: How a look-up gets a socket to ask with: `Dialer.reach`.
Reach: TypeAlias = "Callable[[Source | None, Target, int], Awaitable[BoundSocket]]"

#: Local ports that one turn of the loop tries at most: 1 ms.
_TRIES_PER_TURN = 50

#: An attempt that is given up after so many seconds without an answer has waited in vain.
_SILENCE = 1.0
#: For so many targets, over all sources together, it is kept how their sockets are made: a kilobyte each.
_KNOWN = 10_000
#: What ``direct`` decides: all is left to the routing table.
_EXEMPT = Binding()


def _weakly(reach: Reach) -> Reach:
    # A look-up that held its dialer would keep it until the collector runs, with its policy and its netlink socket.
    method = weakref.WeakMethod(reach)

    async def ask(source: Source | None, target: Target, kind: int) -> BoundSocket:
        alive = method()
        if alive is None:
            raise RuntimeError("the connector is gone")
        return await alive(source, target, kind)

    return ask


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
        sticky_prefix: bool = False,
        direct: Iterable[str] = (),
        limits: Limits[Origin] | None = None,
        abort_on_link_down: bool = False,
        on_event: Callable[[Event], object] | None = None,
        fast_connect: bool = False,
    ) -> None:
        self._journal = Journal(on_event)
        #: stands for this dialer in `_scope`, without holding it
        self.scope = object()
        self.limits: Limits[Origin] = Limits() if limits is None else limits
        self._at_once = not (self.limits.limited or self.limits.paced)
        self._options = tuple((level, name, value) for level, name, value in socket_options)
        self._ports = LocalPorts(local_ports) if local_ports is not None else ANY_PORT
        self.strict = strict
        self._borrow = borrow
        self._direct = Exempt(direct) if direct else None
        self._system = SystemLookup(ttl)
        self._lookup: Lookup = self._system if lookup is None else lookup(_weakly(self.reach))
        self._planner = Planner(lookup=self._lookup, borrow=borrow, sticky_prefix=sticky_prefix)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fast = fast_connect
        self._way: Connect | None = None
        self._closed = False
        self._half_of_ports: int | None = None
        self._aborts = abort_on_link_down
        #: whether anybody is going to be there to hear of the interfaces, which costs 0.3 ms once
        self.listens = True
        #: is told which sockets' interface or address has gone, and whether they are going to be cut; weakly, for a
        #: forgotten connector is to be gone at once
        self.on_lost: weakref.WeakMethod[Callable[[list[BoundSocket], bool], object]] | None = None
        #: whether any such socket is left, which may stand again
        self._fallen = False
        #: each serves one loop and one set of sources; the last to be made, for it takes the policy
        self.roster = Roster(sources, policy, self._journal, pooled=pooled)

    def enter(self) -> asyncio.AbstractEventLoop:
        """Return the running loop, which must be the one of the first use.

        Raises:
            RuntimeError: this is another loop, or the connector is closed.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as error:
            raise RuntimeError(f"{error}; on trio use aiobind.anyio or aiobind.httpx") from None
        if self._loop is not loop:
            if self._loop is not None:
                raise RuntimeError("this connector belongs to another event loop: make one for each loop")
            self._loop = loop
            self._listen()
        if self._closed:
            raise RuntimeError("the connector is closed")
        return loop

    def _listen(self) -> None:
        if self.listens:
            self._planner.listen(self)

    def close(self) -> None:
        """Refuse new connections, and let go of the loop's interface watch."""
        self._closed = True
        self._way = None  # who is waiting holds on to it
        self.limits.close()
        self.roster.close()
        self._lookup.close()
        self._planner.close()

    def forget(self, host: str | None = None) -> None:
        """Drop the addresses of names that are kept for this dialer's sources."""
        self._lookup.forget(host)

    def stats(self, idle: Mapping[Source, int]) -> tuple[SourceStats, ...]:
        """Return the figures of each source, and of those from outside the list that still have connections.

        Args:
            idle: how many of its connections lie idle in a pool, for each source.
        """
        return tuple(origin.stats(idle.get(origin.source, 0)) for origin in self.roster.all)

    def links_changed(self, table: InterfaceTable, *, lost: bool) -> None:
        """Have the roster take notice, and see to the connections whose interface or address has gone."""
        if self._closed:
            return
        if self.roster.links_changed(table, borrow=self._borrow):
            self.limits.reconsider()
        if not lost and not self._fallen:
            return
        gone: list[BoundSocket] = []
        self._fallen = False
        for origin in self.roster.all:
            for sock in origin.sockets:
                stood, sock.stood = sock.stood, self._planner.stands(sock)
                if not sock.stood:
                    self._fallen = True
                    if stood:
                        sock.lost = True
                        gone.append(sock)
                elif not sock.cut:
                    sock.lost = False
        if not gone:
            return
        # The kernel tells an established connection nothing. Those that are idle are of no use any more.
        self._let_go(gone, cut=self._aborts)

    def _let_go(self, gone: list[BoundSocket], *, cut: bool) -> None:
        if self.on_lost is not None and (tell := self.on_lost()) is not None:
            tell(gone, cut)
        for sock in gone:
            if cut or sock.unfinished:
                sock.abort()

    # ── the list of sources ──

    def add(self, source: str | Source) -> None:
        """Choose from *source* as well."""
        self.roster.add(source)
        self.limits.reconsider()
        if self._loop is not None and not self._closed:
            self._listen()

    def remove(self, source: str | Source, *, drain: bool) -> Origin:
        """Choose *source* no more; unless *drain*, cut its connections."""
        origin = self.roster.remove(source)
        self.limits.forget(origin)
        self.limits.reconsider()
        if not drain:
            origin.cut = True
            self._let_go(origin.sockets, cut=True)
        return origin

    def report(self, source: str | Source, host: str, *, ok: bool, seconds: float | None) -> None:
        """Let other sources go to *host* for a while, or this one again."""
        if not isinstance(host, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the host must be a text, not {type(host).__name__}")
        if not host or "/" in host:
            raise ValueError(f"the host must be a name or an address, not {host!r}")
        origin = self.roster.find(source, guests=True)
        if ok:
            self.roster.accept(origin, place_of(host))
        else:
            if seconds is not None and not isinstance(seconds, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"seconds is a number, as in seconds=60, not {seconds!r}")
            if seconds is not None and not 0 <= seconds < math.inf:
                raise ValueError(f"seconds is how long the ban lasts, 0 or more, not {seconds}")
            error = OSError(errno.EACCES, "reported as banned there")
            self.roster.shun(origin, place_of(host), error, banned=True, seconds=seconds)

    # ── route ──

    def obvious(self, source: str | Source | None = None) -> Turn | None:
        """Return the turn of the only source, where nobody can have to wait and no other is pinned; None: `route`."""
        if source is not None or not self._at_once or pinned(self.scope) is not None:
            return None
        return self.roster.sole

    def route(
        self, host: str, port: int, source: str | Source | None = None, *, towards: tuple[str, int] | None = None
    ) -> Route:
        """Return the sources to try for *host*: the pinned one alone, or all in the order of the policy.

        Args:
            host: the destination.
            port: its port.
            source: the pin of this one call; it wins over ``use_source``.
            towards: the host and port that are connected to, where they are others (a proxy's).
        """
        pin = pinned(self.scope) if source is None else parse_source(source)
        return Route(self.roster, self.limits, place_of(host), towards or (host, port), pin)

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
        began = time.monotonic()
        # Each name is a target of its own: of one whose servers are dead nobody hears, and that is no source's fault.
        asked = f"name server for {place_of(host)}"
        try:
            found = await lookup.find(host, via=origin.source, family=family, flags=flags)
        except (BindError, ResolveError) as error:  # it is the source that failed
            origin.failed(error)
            for each in (socket.AF_INET, socket.AF_INET6):
                self.roster.fails(origin, each, error)
            raise with_context(error, origin.source, destination_of(host, port)) from error.__cause__
        except socket.gaierror as error:
            if lookup.by_source and error.errno == socket.EAI_AGAIN:
                origin.failed(error)
                for each in (socket.AF_INET, socket.AF_INET6):
                    self.roster.waits_in_vain(origin, each, asked, began, error)
            text = f"the destination's name cannot be resolved: {error.strerror}"
            # Of what no name server has answered from here, another source may hear.
            source = origin.source if lookup.by_source and error.errno == socket.EAI_AGAIN else None
            raise unresolved(host, port, text, error.errno, source) from error
        if lookup.by_source:
            self.roster.reaches(origin, 0, asked)
        return found

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
            target = lies_at(host, port)
        except OSError as error:
            raise unresolved(host, port, error.strerror or "") from error
        if target is not None and family in (0, target.family):
            return [target]
        found = await self.find(origin, host, port, family=family, flags=flags) if target is None else ()
        version = 6 if family == socket.AF_INET6 else 4
        targets = [Target.of(ip, port, zone) for ip, zone in found if not family or ip.version == version]
        if not targets:
            raise unresolved(host, port, f"the destination has no IPv{version} address")
        return interleave(targets, first_family_count)

    async def anywhere(self, origin: Origin, family: int) -> Target:
        """Return the target of a socket that is not going to connect.

        Args:
            origin: whose it is.
            family: ``AF_INET``, ``AF_INET6``, or 0 for the one that the source has, IPv4 where it has both: whatever
                either has failed at before, for who is going to send must know.
        """
        targets = [Target.anywhere(each) for each in (socket.AF_INET, socket.AF_INET6) if family in (0, each)]
        if len(targets) > 1:
            with suppress(BindError, ResolveError):  # `dial` will say so
                for target, decision in zip(targets, await self._planner.plan(origin.source, targets), strict=True):
                    if not isinstance(decision, Refusal):
                        return target
        return targets[0]

    # ── plan, race, verify, count ──

    def dial(
        self,
        turn: Turn,
        host: str,
        targets: Sequence[Target],
        *,
        delay: float | None,
        begun: list[Target] | None = None,
        kind: Kind = TCP,
    ) -> Coroutine[Any, Any, BoundSocket]:
        """Return a socket connected to one of *targets* from the source whose *turn* it is, and counted there.

        Args:
            turn: whence.
            host: what the caller calls the destination.
            targets: its addresses, in the order to try.
            delay: RFC 8305's Connection Attempt Delay in seconds; None: one attempt after the other.
            begun: is filled with the targets that were tried, for a caller whose deadline may come before the last one.
            kind: what kind of socket. With a datagram socket nobody answers: it is the first target that the source can
                serve; and that says nothing of how the source is.

        Raises:
            BindError: the source itself failed, and nothing was sent.
            ResolveError: the name of the source could not be resolved.
            ConnectError: no target answered.
        """
        if not turn.origin.breakers or turn.forced or self._exempt(host, targets):
            return self._dial(turn.origin, host, targets, delay, begun, kind=kind)
        return self._probe(turn, host, targets, delay, begun, kind=kind)

    async def _probe(
        self,
        turn: Turn,
        host: str,
        targets: Sequence[Target],
        delay: float | None,
        begun: list[Target] | None,
        *,
        kind: Kind,
    ) -> BoundSocket:
        """Connect from a source that has failed before, as far as it may try again."""
        origin = turn.origin
        families, probes = self.roster.allowed(turn, {target.family for target in targets})
        if not families:
            breaker = origin.breakers[targets[0].family]
            error = suspended(breaker.error, breaker.until - time.monotonic())
            raise with_context(error, origin.source, destination_of(host, targets[0].port))
        allowed = [target for target in targets if target.family in families]
        # A family that works waits for nobody.
        patience = self.roster.patience(origin) if len(probes) == len(families) else None
        deadline, began = asyncio.timeout(patience), time.monotonic()
        try:
            async with deadline:
                return await self._dial(origin, host, allowed, delay, begun, kind=kind)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            reason = f"it has failed before, and gets no answer within {patience:.1f} s"
            destination = destination_of(host, targets[0].port)
            failure = with_context(BindError(errno.ETIMEDOUT, reason), origin.source, destination)
            if time.monotonic() - began < _SILENCE:  # else the attempts have told so themselves
                origin.failed(failure)
            for target in allowed:
                failed = origin.breakers.get(target.family)  # None: it has been answered meanwhile
                if failed is not None and failed.failures:
                    self.roster.fails(origin, target.family, failure)
                elif failed is not None:  # its link is back, and nothing is known against it yet
                    self.roster.waits_in_vain(origin, target.family, target, began, failure)
            raise failure from error
        finally:
            for breaker in probes:
                breaker.probing = False

    async def _dial(
        self,
        origin: Origin,
        host: str,
        targets: Sequence[Target],
        delay: float | None,
        begun: list[Target] | None,
        *,
        kind: Kind,
    ) -> BoundSocket:
        stamp = self._planner.stamp(time.monotonic()) if kind is TCP else 0
        openings, refusals = self._known(origin, targets) if stamp and stamp == origin.stamp else ((), [])
        sock: BoundSocket | None = None
        errors: list[OSError] = []
        if len(openings) == 1:  # a race of one needs no race
            try:
                sock = await self._attempt(origin, host, openings[0], stamp, begun)
            except OSError as error:
                errors.append(error.with_traceback(None))  # which would hold this very frame
        elif openings:
            sock, errors = await self._race(origin, host, openings, delay, begun, stamp=stamp)
        if sock is None and (not openings or len(errors) < len(openings)):  # unknown, or not to be repeated
            openings, refusals = await self._work_out(origin, host, targets, kind)
            sock, errors = await self._race(origin, host, openings, delay, begun)
        if sock is None:
            tried = [(opening.target, error) for opening, error in zip(openings, errors, strict=True)]
            raise self._failure(origin, host, targets, tried, refusals)
        if origin.cut:
            sock.close()
            destination = destination_of(host, targets[0].port)
            raise with_context(BindError(errno.ENETDOWN, "it was removed meanwhile"), origin.source, destination)
        if sock.stood and len(openings) > 1:  # while the others were ended, it may have lost what it stands on
            sock.stood = self._planner.stands(sock)
        origin.opened(sock)
        if self.roster.several:
            self._mind_ports(origin, host, sock)
        return sock

    def _known(self, origin: Origin, targets: Sequence[Target]) -> tuple[Sequence[Opening], list[Refusal]]:
        """Return how the sockets for *targets* are made, if that has been worked out for all of them."""
        openings: list[Opening] = []
        refusals: list[Refusal] = []
        for target in targets:
            known = origin.openings.get(target)
            if known is None:
                return (), []
            if isinstance(known, Opening):
                openings.append(known)
            else:
                refusals.append(known)
        return openings, refusals

    def _race(
        self,
        origin: Origin,
        host: str,
        openings: Sequence[Opening],
        delay: float | None,
        begun: list[Target] | None,
        *,
        stamp: int = 0,
    ) -> Coroutine[Any, Any, tuple[BoundSocket | None, list[OSError]]]:
        return race([partial(self._attempt, origin, host, opening, stamp, begun) for opening in openings], delay)

    async def _work_out(
        self, origin: Origin, host: str, targets: Sequence[Target], kind: Kind
    ) -> tuple[list[Opening], list[Refusal]]:
        """Decide how the sockets for *targets* are made, as the interfaces are now."""
        source = origin.source
        try:
            decisions = await self._plan(source, host, targets)
        except (BindError, ResolveError) as error:
            origin.failed(error)
            for family in {target.family for target in targets}:
                self.roster.fails(origin, family, error)
            raise with_context(error, source, destination_of(host, targets[0].port)) from error.__cause__
        stamp = self._planner.stamp(time.monotonic())
        if stamp != origin.stamp or len(origin.openings) >= _KNOWN // len(self.roster):
            origin.openings, origin.stamp = {}, stamp
        # What is exempt is so by the name of the destination as well; and a port that connect(2) does not choose is
        # another one each time. It is kept for one kind of socket, the one that connects again and again.
        keep = stamp and kind is TCP and is_fixed(source) and self._direct is None and self._ports.kept_by_system
        openings: list[Opening] = []
        refusals: list[Refusal] = []
        for target, decision in zip(targets, decisions, strict=True):
            if isinstance(decision, Refusal):
                refusals.append(decision)
                # A source without an address of a family has none until the interfaces change; all else is asked anew.
                if keep and decision.errno == errno.EADDRNOTAVAIL:
                    origin.openings[target] = decision
            else:
                opening = self._opening(decision, target, kind)
                openings.append(opening)
                if keep:
                    origin.openings[target] = opening
        return openings, refusals

    def _opening(self, binding: Binding, target: Target, kind: Kind) -> Opening:
        options = self._options
        if kind is not TCP:
            # A mark may choose the route, so that a datagram is to have it too.
            theirs = options if kind.type == socket.SOCK_STREAM else [each for each in options if each[0] in ANY_KIND]
            options = (*theirs, *kind.options)
        return Opening(
            binding, target, kind=kind, options=options, strict=self.strict, ports=self._ports, borrow=self._borrow
        )

    def _failure(
        self,
        origin: Origin,
        host: str,
        targets: Sequence[Target],
        tried: list[tuple[Target, OSError]],
        refusals: list[Refusal],
    ) -> AiobindError:
        # To lack an address of the target's family is no failure, unless the source has lost it.
        if not tried and (origin.down is not None or any(no.errno != errno.EADDRNOTAVAIL for no in refusals)):
            origin.failed(BindError(*refusals[0]))
            origin.failed_at = time.monotonic()
        return combined(origin.source, destination_of(host, targets[0].port), tried, refusals)

    def _mind_ports(self, origin: Origin, host: str, sock: BoundSocket) -> None:
        """Past half of the ports for a target another source shall go first, for as long as it takes to free some."""
        if self._half_of_ports is None:
            self._half_of_ports = len(self._ports) // 2
        target = sock.target
        if target is not None and origin.ports.get(target, 0) > self._half_of_ports:
            origin.scarce[destination_of(host, target.port)] = target, self._half_of_ports

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
        self.enter()
        (decision,) = await self._planner.plan(source, (target,))
        if isinstance(decision, Refusal):
            raise BindError(*decision)
        opening = self._opening(decision, target, TCP if kind == socket.SOCK_STREAM else Kind(kind))
        if kind == socket.SOCK_DGRAM:
            opening.ports = ANY_PORT
        return await self._open(opening)

    def _exempt(self, host: str, targets: Sequence[Target]) -> bool:
        """Return whether all of *targets* are exempt from the source, and nothing that they do says anything of it."""
        return self._direct is not None and all(self._direct.covers(host, target) for target in targets)

    async def _plan(self, source: Source, host: str, targets: Sequence[Target]) -> Sequence[Binding | Refusal]:
        if self._direct is None:
            return await self._planner.plan(source, targets, host=host)
        pinned = [target for target in targets if not self._direct.covers(host, target)]
        decided = dict(zip(pinned, await self._planner.plan(source, pinned, host=host) if pinned else (), strict=True))
        return [decided.get(target, _EXEMPT) for target in targets]

    async def _attempt(  # noqa: PLR0912 - each branch is an end of its own
        self, origin: Origin, host: str, opening: Opening, stamp: int, begun: list[Target] | None
    ) -> BoundSocket | None:
        """Try one target, and draw the conclusions about the source.

        Args:
            origin: whence.
            host: what the caller calls the destination.
            opening: how its socket is made.
            stamp: as of when that is known, so that it is only to be repeated; 0: it has just been worked out.
            begun: is told of the target.

        Returns:
            None, only with a *stamp*: it cannot be repeated, and has to be worked out anew. No byte has been sent.

        Raises:
            OSError: it has failed.
        """
        if stamp and not self._planner.holds(stamp):  # a later leg of a race
            return None
        target, began = opening.target, time.monotonic()
        if begun is not None:
            begun.append(target)
        try:
            if stamp:
                sock = opening.repeat()
                await self._connect(sock, opening, stamp, began)
            else:
                sock = await self._open(opening)
        except asyncio.CancelledError:
            # Given up by a caller whose patience had an end, or because another target has answered. The first SYN is
            # repeated after a second (RFC 6298): from then on the silence means something.
            if time.monotonic() - began >= _SILENCE:
                self._failed(origin, host, opening, TimeoutError(errno.ETIMEDOUT, "no answer"), began)
            raise
        except OSError as error:
            if stamp and _may_be_outdated(error):
                origin.openings.pop(target, None)
                return None
            self._failed(origin, host, opening, error, began)
            raise
        if stamp and not self._planner.holds(stamp) and not await self._stands(origin.source, host, opening, sock):
            sock.close()
            return None
        seconds = time.monotonic() - began
        if opening.kind.proto == IPPROTO_MPTCP:
            # Measured (Linux 6.18): the pin is that of the first subflow. The kernel opens others at any time, from the
            # addresses and by the interfaces of `ip mptcp endpoint`, also to what the peer announces.
            sock.interface = None
        sock.bound = BoundSource(origin.source, sock.interface, *sock.name)
        if not stamp or opening.stood is None:
            opening.stood = self._planner.stands(sock)
        sock.stood = opening.stood
        if sock.type == socket.SOCK_STREAM:
            sock.target = target  # towards which its port is taken
        if not opening.defers or platform.sent(sock):
            origin.latency.add(seconds)
            if opening.binding is not _EXEMPT:  # what becomes of it says nothing about the source
                self.roster.works(origin, target.family, target)
        elif origin.breakers and target.reach != "any" and opening.binding is not _EXEMPT:
            self.roster.can_send(origin, target.family)
        if self._journal.reads_attempts:
            self._journal.connected(origin.source, str(target), seconds)
        if sock.interface is None and opening.binding.device is not None:
            self._tell_unpinned(origin, target)
        return sock

    def _tell_unpinned(self, origin: Origin, target: Target) -> None:
        if not origin.unpinned:
            origin.unpinned = True
            self._journal.unpinned(origin.source, str(target))

    async def _stands(self, source: Source, host: str, opening: Opening, sock: BoundSocket) -> bool:
        """Return whether it would be decided now as it was for *sock*: the name may be another interface's by now."""
        try:
            (decision,) = await self._plan(source, host, (opening.target,))
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            return False
        if isinstance(decision, Refusal):
            return False
        # For an address alone its guard has spoken already.
        index = 0 if decision.owner is None else decision.owner.index
        return index == sock.ifindex and (not decision.local or sock.local in decision.local)

    def _failed(self, origin: Origin, host: str, opening: Opening, error: OSError, began: float) -> None:
        """Count an attempt that has failed."""
        origin.failed(error)
        target = opening.target
        if self._journal.reads_attempts:
            self._journal.failed(origin.source, str(target), error, time.monotonic() - began)
        if opening.binding is not _EXEMPT:
            self._judge(origin, target, destination_of(host, target.port), error, began)

    def _judge(self, origin: Origin, target: Target, destination: str, error: OSError, began: float) -> None:
        """Draw the conclusions from an attempt that has failed."""
        if isinstance(error, LinkGoneError):
            return  # the roster hears of that by itself
        if isinstance(error, NoPortError):
            self.roster.shun(origin, destination, error)
        elif isinstance(error, BindError):
            self.roster.fails(origin, target.family, error)
        elif error.errno in NO_ANSWER:
            self.roster.waits_in_vain(origin, target.family, target, began, error)
        elif error.errno in ANSWERS:
            self.roster.works(origin, target.family, target)

    async def _open(self, opening: Opening) -> BoundSocket:
        """Return a connected socket; where the system finds no free port for one, try the next way to get one."""
        failure: OSError | None = None
        for turn, port in enumerate(opening.ports.ways()):
            if turn % _TRIES_PER_TURN == _TRIES_PER_TURN - 1:
                await asyncio.sleep(0)
            try:
                sock = opening.open(port)
            except BindError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                failure = failure or bare(error)
                continue
            try:
                await self._connect(sock, opening)
            except AiobindError:
                raise
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                failure = failure or bare(error)
            else:
                return sock
        assert failure is not None
        try:
            # One errno for that, the one of connect(2), whichever call it was that found none.
            reason = f"no source address or {opening.ports} is left for this destination"
            raise NoPortError(errno.EADDRNOTAVAIL, reason) from failure
        finally:
            del failure  # which would hold this very frame

    async def _connect(self, sock: BoundSocket, opening: Opening, stamp: int = 0, began: float = 0.0) -> None:
        """Connect *sock*, and hold what became of it against the promise, before and after; close it if that fails."""
        failure: OSError | None = None
        try:
            way = self._way if opening.kind is TCP else _other_way(opening)
            if way is None:
                way = way_of(asyncio.get_running_loop(), fast=self._fast)
                if not self._closed:
                    self._way = way
            if not stamp or opening.stood is None:
                await self._guarded(way, sock, opening)
            elif not opening.stood:
                await way(sock, opening.sockaddr)
            else:
                # There is a guard when there is something to guard against: seldom.
                watch = self._planner.watching()
                watch.begin(sock, opening.watched, began)
                try:
                    await way(sock, opening.sockaddr)
                except OSError as error:
                    failure = error
                finally:
                    guard = watch.end(sock)
                if guard is not None and guard.aborted:  # though the connect may have ended well a moment before
                    await guard.confirm(None if failure is None else bare(failure))
                if failure is not None:
                    raise failure
            self._verify(sock, opening)
        except BaseException as error:
            failure = None  # which would hold this very frame
            sent = platform.sent(sock)
            sock.close()
            if isinstance(error, AiobindError) or not isinstance(error, OSError) or error.errno == errno.EADDRNOTAVAIL:
                raise
            raise plain(error, sent=sent) from bare(error)

    def _verify(self, sock: BoundSocket, opening: Opening) -> None:
        """Hold what *sock* has connected from against the promise, before a first byte."""
        sock.name = address, port = sock.getsockname()[:2]
        target, stream = opening.target, sock.type == socket.SOCK_STREAM
        if stream and port == target.port and address == target.host:
            # TCP connects a port to itself where nobody listens and connect(2) happens to choose that very port
            # (simultaneous open, RFC 9293 section 3.5).
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        promised = sock.promised
        # The text of ::/96 differs between Python and C.
        if promised is not None and promised != address and ip_address(promised) != ip_address(address):
            reason = f"the system connected from {address} instead of {promised}; no data was sent"
            raise BindError(errno.EADDRNOTAVAIL, reason)
        ports = opening.ports
        if ports is not ANY_PORT and port not in ports:
            ports.doubt()
            reason = f"the system connected from {port}, which is no {ports}; no data was sent"
            raise BindError(errno.EADDRNOTAVAIL, reason)

    async def _guarded(self, way: Connect, sock: BoundSocket, opening: Opening) -> None:
        """Connect under guard; the interface is looked at right before, and after."""
        guard = self._planner.guard(sock, opening.binding, opening.target)
        if guard is None:
            await way(sock, opening.sockaddr)
            return
        with guard:
            await guard.confirm()
            try:
                await way(sock, opening.sockaddr)
            except OSError as error:
                if not guard.aborted:
                    raise
                await guard.confirm(bare(error))  # it was the guard that ended it
            await guard.confirm()


def _other_way(opening: Opening) -> Connect | None:
    """Return how to connect what is not plain TCP; None: as that."""
    if opening.target.reach == "any":
        return _stay
    if opening.kind.type == socket.SOCK_DGRAM:
        return associate
    # The loops of asyncio ask getaddrinfo about even a literal address for any other protocol (EAI_SOCKTYPE).
    return way_of(asyncio.get_running_loop(), fast=True) if opening.kind.proto == IPPROTO_MPTCP else None


async def _stay(_sock: socket.socket, _address: object) -> None:
    """Leave it unconnected."""


def _may_be_outdated(error: OSError) -> bool:
    """Return whether it may be for want of a look at how things are now, or of another way to get a port."""
    return isinstance(error, BindError) or (error.errno == errno.EADDRNOTAVAIL and not isinstance(error, AiobindError))


def lies_at(host: str, port: int) -> Target | None:
    """Return the target that *host* is if it is a literal address; None: it is a name.

    Raises:
        OSError: its zone is no interface.
    """
    # The zone of an address is another number when its interface has come anew.
    return _found(host, port) if "%" in host else _kept(host, port)


def _found(host: str, port: int) -> Target | None:
    address = literal(host)
    return None if address is None else Target.of(address.ip, port, address.scope_id)


_kept = lru_cache(maxsize=1024)(_found)
