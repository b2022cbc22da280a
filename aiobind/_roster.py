"""Law: which source is next. The policy orders those that are ready; what is known of their failures does the rest.

A source is ready unless its interface is away (`links_changed`) or it is suspended for failing (`failed`). When a
suspension has ended the source is ready again, for one connection, the probe: that one reopens it, or suspends it for
longer. The policy is given the ready ones; of what it yields, those that are banned at the host or short of ports for
the destination go last; and when all that have failed, the suspended ones are tried nevertheless, those first that
have failed longest ago: nobody is refused because of what was.

Choosing costs the same with one source and with a thousand: the tuple of those that are ready is made anew only when
one of them fails or comes back, and the policy yields lazily.
"""

from __future__ import annotations

import asyncio
import errno
import math
import socket
import time
import weakref
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING

from ._errors import BindError
from ._faults import destination_of
from ._health import LONGEST, Breaker, Timeouts
from ._origin import Origin
from ._policy import Failover, LeastConnections, Random, RoundRobin, Sticky, Weighted
from ._sources import parse_source

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence

    from ._events import Journal
    from ._interfaces import InterfaceTable
    from ._limits import Limits
    from ._policy import Policy
    from ._sources import Source

__all__ = ["Roster", "Route", "Turn"]

#: A probe may take three times what one of a hundred connects takes, and at least so many seconds, before the next
#: source is tried.
_PATIENCE = 0.4
#: A ban, when it is not said for how long, and what it grows to; in seconds.
_BAN, _LONGEST_BAN = 30.0, 3600.0
_FAMILIES = (socket.AF_INET, socket.AF_INET6)

#: So many sources are tried in one turn of the loop.
_PER_TURN = 20

#: So many hosts to avoid are remembered for each source, before those whose time is over are forgotten.
_AVOIDED = 1000

#: Those that yield whatever they are given.
_POLICIES = {RoundRobin, Random, Weighted, LeastConnections, Sticky, Failover}
_policies: weakref.WeakValueDictionary[int, Roster] = weakref.WeakValueDictionary()


class Turn:
    """A source whose turn it is.

    Attributes:
        origin: the source.
        forced: try it whatever it has failed at before.
        held_back: it was not tried, for what it has failed at before; set by who tries.
        until: it is the worse choice until then, by ``time.monotonic()``; 0.0: it is not.
    """

    __slots__ = ("forced", "held_back", "origin", "until")

    def __init__(self, origin: Origin, *, forced: bool = False, until: float = 0.0) -> None:
        self.origin = origin
        self.forced = forced
        self.held_back = False
        self.until = until


class Roster:
    """The sources of one connector.

    Args:
        sources: in the order in which they were named.
        policy: default ``RoundRobin()``.
        journal: is told of what happens to them.
        pooled: a pool keeps idle connections.

    Raises:
        InvalidSource: a text names no source.
        TypeError: there is none.
        ValueError: one is named twice; or the policy serves another connector.
    """

    def __init__(
        self, sources: Sequence[str | Source], policy: Policy | None, journal: Journal, *, pooled: bool
    ) -> None:
        if not sources:
            raise TypeError("name at least one source, for example 'if!eth0' or '192.0.2.7'")
        self._pooled = pooled
        self._journal = journal
        if isinstance(policy, type) or (policy is not None and not callable(getattr(policy, "order", None))):
            raise TypeError(
                f"policy is an object with a method order, as in policy=aiobind.RoundRobin(), not {policy!r}"
            )
        self._policy: Policy = RoundRobin() if policy is None else policy
        self._told: Callable[[Origin], object] | None = getattr(self._policy, "changed", None)
        listed = {source: self._new(source) for source in map(parse_source, sources)}
        if len(listed) < len(sources):
            raise ValueError("a source is named twice: " + ", ".join(map(str, sources)))
        if _policies.setdefault(id(self._policy), self) is not self:
            raise ValueError("this policy serves another connector: give each one its own")
        self._listed: dict[Source, Origin] = listed
        self._sole = self._alone()
        # Sources from outside the list, pinned or removed, live as long as somebody is connected from them.
        self._guests: weakref.WeakValueDictionary[Source, Origin] = weakref.WeakValueDictionary()
        self._timeouts: Timeouts[Origin] = Timeouts()
        #: what the policy is given, and those whose time has not come; until when both are right
        self._ready: tuple[Origin, ...] = tuple(listed.values())
        self._suspended: tuple[Origin, ...] = ()
        self._right_until = math.inf

    def _new(self, source: Source) -> Origin:
        origin = Origin(source, pooled=self._pooled)
        origin.on_change = self._told
        return origin

    def close(self) -> None:
        """Let go of the policy, which may serve another connector from now on."""
        self._told = None
        for origin in (*self._listed.values(), *self._guests.values()):
            origin.on_change = None
        if _policies.get(id(self._policy)) is self:
            del _policies[id(self._policy)]

    # ── the list ──

    def __len__(self) -> int:
        return len(self._listed)

    def _alone(self) -> Turn | None:
        # A policy of the caller's own is asked all the same: it may leave even the only one out.
        if len(self._listed) > 1 or type(self._policy) not in _POLICIES:
            return None
        # It is kept while it is used: should the source fail meanwhile, there is still no other one.
        return Turn(*self._listed.values(), forced=True)

    @property
    def sole(self) -> Turn | None:
        """The turn of the only source, where there is nothing to choose, and nothing is known against it."""
        turn = self._sole
        if turn is not None:
            origin = turn.origin
            if origin.breakers or origin.down or origin.avoid or origin.scarce:
                return None
        return turn

    @property
    def several(self) -> bool:
        """Whether there is another one to choose."""
        return len(self._listed) > 1

    @property
    def listed(self) -> tuple[Origin, ...]:
        """The sources that the policy chooses from, in their order."""
        return tuple(self._listed.values())

    def _lists(self, origin: Origin) -> bool:
        return self._listed.get(origin.source) is origin

    @property
    def all(self) -> tuple[Origin, ...]:
        """Those, and those from outside the list that still have connections; any thread may ask."""
        guests = [guest for reference in self._guests.valuerefs() if (guest := reference()) and guest.connections]
        return (*self._listed.copy().values(), *guests)

    def find(self, source: str | Source, *, guests: bool = False) -> Origin:
        """Return the listed *source*; with *guests* also one from outside the list that has connections.

        Raises:
            ValueError: it is not in the list.
        """
        key = parse_source(source)
        origin = self._listed.get(key) or (self._guests.get(key) if guests else None)
        if origin is None:
            raise ValueError(f"{source} is no source of this connector (it has {', '.join(map(str, self._listed))})")
        return origin

    def guest(self, source: Source) -> Origin:
        """Return *source*, which need not be in the list."""
        origin = self._listed.get(source) or self._guests.get(source)
        if origin is None:
            origin = self._guests[source] = self._new(source)
        return origin

    def add(self, source: str | Source) -> Origin:
        """Add a source behind the others.

        Raises:
            ValueError: it is in the list already.
        """
        source = parse_source(source)
        if source in self._listed:
            raise ValueError(f"{source} is a source of this connector already")
        origin = self.guest(source)
        origin.removed = origin.cut = False
        self._listed[source] = origin
        self._guests.pop(source, None)
        self._sole = self._alone()
        self._change()
        return origin

    def remove(self, source: str | Source) -> Origin:
        """Choose *source* no more; its connections live on.

        Raises:
            ValueError: it is not in the list, or the only one there.
        """
        origin = self.find(source)
        if len(self._listed) == 1:
            raise ValueError(f"{source} is the only source of this connector: add another one first")
        del self._listed[origin.source]
        self._guests[origin.source] = origin
        origin.removed = True
        self._timeouts.forget(origin)
        self._sole = self._alone()
        self._change()
        return origin

    # ── the order ──

    def only(self, source: Source) -> Generator[Turn]:
        """Yield *source*, whatever it has failed at."""
        yield Turn(self.guest(source), forced=True)

    def begin(self, host: str) -> tuple[tuple[Origin, ...], Iterator[Origin]]:
        """Return those that are ready, and the same in the order of the policy: what `order` goes by."""
        if time.monotonic() >= self._right_until:
            self._renew()
        return self._ready, iter(self._ordered(self._ready, host))

    def order(
        self,
        host: str,
        towards: tuple[str, int],
        begun: tuple[tuple[Origin, ...], Iterator[Origin]] | None = None,
        turns: Sequence[Turn] = (),
    ) -> Generator[Turn]:
        """Yield the sources to try for a connection.

        Args:
            host: what the policy decides by.
            towards: host and port that will be connected to.
            begun: what `begin` has returned.
            turns: those that have been tried already.
        """
        ready, ordered = self.begin(host) if begun is None else begun
        now, turns = time.monotonic(), [*turns]
        scarce: list[Origin] = []
        avoiding: list[tuple[float, Origin]] = []
        for origin in ordered:
            if origin.removed:  # meanwhile
                continue
            if origin.avoid and (until := origin.avoids(host, destination_of(*towards), now)):
                avoiding.append((until, origin))
                continue
            if origin.scarce and origin.is_short_of_ports(destination_of(*towards)):
                scarce.append(origin)
                continue
            turn = Turn(origin)
            turns.append(turn)
            if origin.breakers and origin.is_being_probed:
                turn.held_back = True
            else:
                yield turn
        avoiding.sort(key=_by_time)
        for until, origin in [*((0.0, origin) for origin in scarce), *avoiding]:
            if origin.removed:
                continue
            turn = Turn(origin, until=until)
            turns.append(turn)
            yield turn
        yield from self._last(host, ready, turns)

    def _last(self, host: str, ready: tuple[Origin, ...], turns: Sequence[Turn]) -> Generator[Turn]:
        """Yield those that were not *ready*, and those held back at their turn, whatever they have failed at."""
        tried = {turn.origin for turn in turns if not turn.held_back}
        last = [turn.origin for turn in turns if turn.held_back]
        if time.monotonic() >= self._right_until:
            self._renew()
        others = self._suspended
        if self._ready is not ready:  # some of those that were not may be ready by now: they are to be tried as well
            known = frozenset(ready)
            others = tuple(origin for origin in self._listed.values() if origin not in known)
        last += [origin for origin in self._ordered(others, host) if origin not in tried]
        for origin in sorted(dict.fromkeys(last), key=_by_failure):
            if not origin.removed:
                now = time.monotonic()
                yield Turn(origin, forced=True, until=origin.suspended_until(now) or now + _PATIENCE)

    def _ordered(self, origins: tuple[Origin, ...], host: str) -> Iterable[Origin]:
        # A policy yields from what it was given.
        return self._policy.order(origins, host) if origins else ()  # type: ignore[return-value]

    def _change(self) -> None:
        """Have the next one who asks tell them apart anew."""
        self._right_until = 0.0

    def _renew(self) -> None:
        """Tell those that are ready from those that are not, and until when that is right."""
        now = time.monotonic()
        ready: list[Origin] = []
        suspended: list[Origin] = []
        self._right_until = math.inf
        for origin in self._listed.values():
            until = origin.suspended_until(now)
            if until is None:
                ready.append(origin)
            else:
                suspended.append(origin)
                self._right_until = min(self._right_until, until)
        self._ready, self._suspended = tuple(ready), tuple(suspended)

    # ── probes ──

    def allowed(self, turn: Turn, families: Iterable[int]) -> tuple[set[int], list[Breaker]]:
        """Return those of *families* that the source may try now, and the breakers that this try is to find out about.

        Each of these lets nobody else pass until its ``probing`` is over. Where no family is left, the turn is marked
        as held back, for another source to go first.
        """
        now, breakers = time.monotonic(), turn.origin.breakers
        allowed = {family for family in families if family not in breakers or breakers[family].due(now)}
        turn.held_back = not allowed
        probes = [breakers[family] for family in allowed if family in breakers]
        for breaker in probes:
            breaker.probing = True
        return allowed, probes

    def patience(self, origin: Origin) -> float | None:
        """Return how long a probe of *origin* may take, in seconds; None: nobody else could take its place."""
        if len(self._ready) < 2:
            return None
        return max(_PATIENCE, 3 * (origin.latency.quantile(0.99) or 0.0))

    # ── what becomes of them ──

    def works(self, origin: Origin, family: int, target: Hashable) -> None:
        """Note that *origin* has reached *target*."""
        new = family not in origin.works
        if new:
            origin.works.add(family)
        if origin.breakers:
            breaker = origin.breakers.pop(family, None)
            # What the other family has not failed at stood for the link alone, which works.
            for other in [other for other in origin.breakers if not origin.breakers[other].failures]:
                del origin.breakers[other]
            if breaker is not None:
                if breaker.failures:
                    self._journal.recovered(origin.source)
                self._change()
            elif new:  # the other one holds it up no more
                self._change()
        if len(self._listed) > 1:
            self.reaches(origin, family, target)

    def can_send(self, origin: Origin, family: int) -> None:
        """Note that *origin* would send to a target of *family*, which says nothing of what is on the way there."""
        breaker = origin.breakers.get(family)
        error = None if breaker is None else breaker.error
        if isinstance(error, BindError) and error.errno != errno.ETIMEDOUT:  # and that it could not
            del origin.breakers[family]
            self._journal.recovered(origin.source)
            self._change()

    def reaches(self, origin: Origin, family: int, target: Hashable) -> None:
        """Blame those who have waited in vain for *target*, which *origin* has just reached.

        Args:
            origin: the source.
            family: of the target; 0 for both.
            target: who has answered.
        """
        if len(self._listed) < 2 or not self._lists(origin):
            return
        for other in self._timeouts.reached(origin, target, time.monotonic()):
            error = BindError(errno.ETIMEDOUT, f"it reaches no {target}, and {origin.source} does")
            for each in (family,) if family else _FAMILIES:
                self.fails(other, each, error)

    def fails(self, origin: Origin, family: int, error: OSError) -> None:
        """Note that *origin* has failed for a reason of its own."""
        now = origin.failed_at = time.monotonic()
        if origin.down is not None or not self._lists(origin):
            return  # it is suspended until that is over; or it is pinned by somebody, and tried in any case
        origin.works.discard(family)
        breaker = origin.breakers.get(family)
        if breaker is None:
            breaker = origin.breakers[family] = Breaker()
        if breaker.failed(now, error):
            self._journal.suspended(origin.source, error, breaker.until - now)
        self._change()

    def waits_in_vain(self, origin: Origin, family: int, target: Hashable, began: float, error: OSError) -> None:
        """Note that *origin* got no answer from *target*, which may be the fault of either.

        Args:
            origin: the source.
            family: of the target.
            target: where to.
            began: when the attempt began, by ``time.monotonic()``.
            error: how it ended.
        """
        if len(self._listed) < 2 or not self._lists(origin):
            return
        if self._timeouts.timed_out(origin, target, began, time.monotonic()):
            self.fails(origin, family, error)

    def shun(
        self, origin: Origin, place: str, error: OSError, *, banned: bool = False, seconds: float | None = None
    ) -> None:
        """Have others go to *place* for a while.

        Args:
            origin: the source.
            place: a host, or a destination.
            error: why.
            banned: somebody there has said so.
            seconds: for how long; default: for longer each time.
        """
        now = time.monotonic()
        breaker = origin.avoid.get(place)
        if breaker is None:
            if len(origin.avoid) >= _AVOIDED:
                # Those whose time is over first; a quarter at once, so that it is not done for each new one.
                kept = sorted(origin.avoid.items(), key=lambda entry: entry[1].until)[_AVOIDED // 4 :]
                origin.avoid = {key: old for key, old in kept if old.suspended(now)}
            breaker = origin.avoid[place] = Breaker(_BAN, _LONGEST_BAN) if banned else Breaker()
        if breaker.failed(now, error, seconds=seconds):
            self._journal.suspended(origin.source, error, breaker.until - now, place)

    def accept(self, origin: Origin, place: str) -> None:
        """Let *origin* go to *place* again."""
        if origin.avoid.pop(place, None) is not None:
            self._journal.recovered(origin.source, place)

    def links_changed(self, table: InterfaceTable, *, borrow: bool) -> bool:
        """Suspend the sources whose interface or address is away, until it is back; return whether any is affected."""
        changed, now = False, time.monotonic()
        for origin in self.listed:  # as it is now: who is told may add and remove
            trouble = table.trouble(origin.source, borrow=borrow)
            if (trouble is None) == (origin.down is None):
                continue
            changed = True
            if trouble is not None:
                origin.down, origin.failed_at = BindError(*trouble), now
                self._journal.suspended(origin.source, origin.down, math.inf)
            else:
                origin.down = None
                # The first packets of a link that has just come up are often lost, as where the other end is not ready
                # to answer ARP yet, which is asked again after a second. So one connection tries it.
                origin.works.clear()
                origin.breakers = {family: Breaker() for family in _FAMILIES}
                self._journal.recovered(origin.source)
        if changed:
            self._change()
        return changed


class Route:
    """The sources for one connection, one after the other, each with its place under the limits."""

    __slots__ = ("_count", "_full", "_host", "_late", "_limits", "_pin", "_roster", "_towards", "_turns", "_worse")

    def __init__(
        self, roster: Roster, limits: Limits[Origin], host: str, towards: tuple[str, int], pin: Source | None
    ) -> None:
        self._roster = roster
        self._limits = limits
        self._host = host
        self._towards = towards
        self._pin = pin
        self._turns: Generator[Turn] | None = None
        #: those that may not begin a connection now, by their rate; and those that have no room
        self._late: list[Turn] = []
        self._full: list[Turn] = []
        #: one that is suspended or banned, while those wait
        self._worse: Turn | None = None
        self._count = 0

    def _order(self) -> Generator[Turn]:
        if self._pin is not None:
            return self._roster.only(self._pin)
        return self._roster.order(self._host, self._towards)

    def first(self) -> Turn | None:
        """Return the first source, where nobody can have to wait for it and nothing is known against it.

        None: ask for the `next` one.
        """
        limits = self._limits
        if self._turns is not None or self._pin is not None or limits.limited or limits.paced:
            return None
        roster = self._roster
        begun = ready, ordered = roster.begin(self._host)
        for origin in ordered:
            if origin.removed or origin.breakers or origin.avoid or origin.scarce:
                begun = ready, chain((origin,), ordered)
                break
            turn = Turn(origin)
            # An order begins to run when it is asked for the next one: seldom.
            self._turns = roster.order(self._host, self._towards, begun, (turn,))
            origin.begins()
            return turn
        self._turns = roster.order(self._host, self._towards, begun)
        return None

    async def next(self) -> Turn | None:
        """Return the next source, or None. One with room goes before one without; where none has, wait for the first.

        To wait for one that is healthy is better than to try one that is not, until the time of that one has come.

        It is to be told how it went: `leave` or `keep`.

        Raises:
            RuntimeError: the connector was closed meanwhile.
        """
        limits, host = self._limits, self._host
        if self._turns is None:
            self._turns = self._order()
        self._count += 1
        if not self._count % _PER_TURN:
            await asyncio.sleep(0)  # a thousand that fail at once shall not hold the loop
        while (turn := self._worse or next(self._turns, None)) is not None:
            self._worse = None
            if turn.until and (self._late or self._full):
                self._worse = turn
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(turn.until - time.monotonic(), LONGEST)):
                        return await self._wait()
                turn.until = 0.0
                continue
            if limits.paced and not limits.ready(turn.origin, host):
                self._late.append(turn)
            elif not limits.limited or limits.take(turn.origin, host):
                turn.origin.begins()
                return turn
            else:
                self._full.append(turn)
        return await self._wait()

    async def _wait(self) -> Turn | None:
        limits, host = self._limits, self._host
        # Nobody can say which one is going to be first, but where the fewest wait it is soonest.
        self._late.sort(key=lambda turn: limits.waiting(turn.origin), reverse=True)
        while self._late:
            turn = self._late.pop()
            if not limits.limited or limits.take(turn.origin, host):
                return self._last(turn)
            self._full.append(turn)
        if not self._full:
            return None
        origin = await limits.wait([turn.origin for turn in self._full], host)
        if origin is None:  # the sources are not what they were: order anew
            self._full.clear()
            self._worse = None
            self._turns = self._order()
            return await self.next()
        turn = next(turn for turn in self._full if turn.origin is origin)
        self._full.remove(turn)
        return self._last(turn)

    def _last(self, turn: Turn) -> Turn:
        turn.forced = True  # the order has ended, and cannot come back to it
        turn.origin.begins()
        return turn

    def leave(self, turn: Turn) -> None:
        """Give the place of *turn* back: it has failed."""
        self.keep(turn)
        self.release(turn)

    def keep(self, turn: Turn) -> None:
        """Keep the place of *turn* until `release`: it has a connection."""
        turn.origin.has_ended()

    def release(self, turn: Turn) -> None:
        """Give the place of *turn* back."""
        if self._limits.limited:
            self._limits.release(turn.origin, self._host)

    def close(self) -> None:
        """Ask for no more: a probe that is not under way leaves its chance to another connection."""
        if self._turns is not None:
            self._turns.close()


def _by_failure(origin: Origin) -> float:
    return origin.failed_at


def _by_time(entry: tuple[float, Origin]) -> float:
    return entry[0]
