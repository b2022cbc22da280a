"""Law: a policy is pure. It sees the sources and the destination's host, and yields sources in the order to try.

It does no I/O and reads no clock. It yields lazily: the first source is nearly always enough. What that one costs:

    RoundRobin  Random  Failover    the same with one source and with a thousand
    Weighted  LeastConnections      O(log n)
    Sticky                          the same for a host that it has seen lately, O(n) for another

The connector passes the same tuple until the set of healthy sources changes; O(n) is paid when it does. Any other
sequence is right as well, and pays O(n) each time.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import MutableMapping
from heapq import heapify, heappop, heappush, nsmallest
from itertools import chain
from math import gcd, isfinite, lcm
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

from ._sources import parse_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from hashlib import blake2b

    from ._sources import Source

__all__ = ["Failover", "LeastConnections", "Policy", "Random", "RoundRobin", "SourceView", "Sticky", "Weighted"]


class SourceView(Protocol):
    """What a policy sees of one source; the figures are live."""

    @property
    def source(self) -> Source:
        """The source."""
        ...

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        ...

    @property
    def in_use(self) -> int:
        """Those of them that are in use; the others lie idle in a pool."""
        ...

    @property
    def connecting(self) -> int:
        """Attempts to get one that are under way."""
        ...

    @property
    def failures(self) -> int:
        """Attempts that have failed so far."""
        ...


class Policy(Protocol):
    """Chooses the source of each connection.

    An instance belongs to one connector. Its methods are called on the event loop and must not block.

    A policy may have a second method, ``changed(source: SourceView) -> None``. A connector calls it after each change
    of a figure of a source, whether ``order`` is being given that source or not. A policy without it is not told.
    """

    def order(self, sources: Sequence[SourceView], host: str) -> Iterable[SourceView]:
        """Return *sources* in the order to try them for a connection to *host*.

        *sources* are the healthy ones, in the order in which the connector was given them: the same tuple until that
        set changes. The next one is asked for only when the one before has failed for a reason of its own, or is
        passed over (banned by the host, at its limit, short of ports). What is left out is not tried.
        """
        ...


class RoundRobin:
    """Each source in its turn (the default)."""

    def __init__(self) -> None:
        self._turn = 0

    def order(self, sources: Sequence[SourceView], host: str) -> Iterator[SourceView]:
        """Return the sources, beginning one further than the last time."""
        if not (count := len(sources)):
            return
        first = self._turn % count
        self._turn = first + 1
        for offset in range(count):
            yield sources[(first + offset) % count]


class Random:
    """Any source, each as likely as the others, and independent of the choices before.

    Args:
        seed: makes the choices the same in each run; by default they are not.
    """

    def __init__(self, seed: int | str | bytes | None = None) -> None:
        import random  # noqa: PLC0415 - 1 ms that few need

        self._random = random.Random(seed)

    def order(self, sources: Sequence[SourceView], host: str) -> Iterator[SourceView]:
        """Return the sources shuffled."""
        # Fisher and Yates, of whose array only the places that differ from a fresh one are there.
        moved: dict[int, int] = {}
        for last in range(len(sources) - 1, -1, -1):
            at = self._random.randrange(last + 1)
            yield sources[moved.get(at, at)]
            moved[at] = moved.pop(last, last)


class Failover:
    """The first healthy source in the order in which the connector was given them.

    The first one is back in use as soon as it has recovered, for then it is among the healthy ones again.
    """

    def order(self, sources: Sequence[SourceView], host: str) -> Iterator[SourceView]:
        """Return the sources as they are."""
        return iter(sources)


class Weighted:
    """Each source in proportion to its weight, evenly mixed.

    At any time since the beginning, each count is less than 1 away from what is due to its source, and exact when
    a cycle is complete. A change of weights, or of the healthy sources, holds from the next choice on, and costs it
    O(n). Nobody has more than one choice to make up for then, so that a source that returns is not flooded.

    Args:
        weights: of each source, as text or parsed; a source without one has the weight 1. Only their proportion
            matters. Sources of weight 0 are for when all others have failed, in their order.

    Raises:
        InvalidSource: a text names no source.
        ValueError: a weight is negative, infinite or no number.
        TypeError: a weight is not a real number.
    """

    def __init__(self, weights: Mapping[str | Source, float] | Mapping[str, float] | Mapping[Source, float]) -> None:
        self._weights = _Weights()
        for source, weight in weights.items():
            self._weights[source] = weight
        self._views: Sequence[SourceView] | None = None
        self._turns: _Turns | None = None
        self._version = 0

    @property
    def weights(self) -> MutableMapping[str | Source, float]:
        """The weights as given: ``weights[source] = 3`` changes one, and ``del weights[source]`` makes it 1 again."""
        return self._weights

    def order(self, sources: Sequence[SourceView], host: str) -> Iterator[SourceView]:
        """Return the sources, beginning with the one whose turn it is; the others follow as their turns will come."""
        views = sources if isinstance(sources, tuple) else tuple(sources)
        turns = self._turns
        if turns is None or views is not self._views or self._version != self._weights.version:
            keys = tuple([view.source for view in views])
            if turns is None or keys != turns.keys or self._version != self._weights.version:
                self._version = self._weights.version
                turns = self._turns = _Turns(keys, [self._weights.ratio(key) for key in keys], turns)
            self._views = views
        for at in turns.order():
            yield views[at]


class _Weights(MutableMapping["str | Source", float]):
    """Weights by source. A text stands for the source that it names."""

    def __init__(self) -> None:
        self._given: dict[Source, tuple[float, tuple[int, int]]] = {}
        self.version = 0

    def ratio(self, source: Source) -> tuple[int, int]:
        """Return the weight of *source*, exactly."""
        given = self._given.get(source)
        return (1, 1) if given is None else given[1]

    def __getitem__(self, source: str | Source) -> float:
        return self._given[parse_source(source)][0]

    def __setitem__(self, source: str | Source, weight: float) -> None:
        key = parse_source(source)
        if isinstance(weight, bool) or not hasattr(weight, "as_integer_ratio"):
            raise TypeError(f"the weight of {key} is a number, not {type(weight).__name__}")
        try:
            ratio = _ratio(weight)
        except (ValueError, OverflowError):
            ratio = -1, 1
        if ratio[0] < 0:
            raise ValueError(f"the weight of {key} is a finite number of 0 or more, not {weight}")
        self._given[key] = weight, ratio
        self.version += 1

    def __delitem__(self, source: str | Source) -> None:
        del self._given[parse_source(source)]
        self.version += 1

    def __iter__(self) -> Iterator[Source]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def __repr__(self) -> str:
        return repr({str(source): weight for source, (weight, _) in self._given.items()})


def _ratio(number: float) -> tuple[int, int]:
    """Return *number* as it is written: 0.1 is meant as a tenth, not as the binary fraction next to it."""
    if not isinstance(number, float) or not isfinite(number):
        return number.as_integer_ratio()  # raises if it is none
    digits, _, exponent = float.__repr__(number).partition("e")
    whole, _, part = digits.partition(".")
    power = int(exponent or 0) - len(part)
    return int(whole + part) * 10 ** max(power, 0), 10 ** max(-power, 0)


#: The lag that a source takes along over a change is rounded to this part of a choice.
_LAG: Final = 2**32
#: Of so many sources that are not there the lag is kept.
_AWAY: Final = 1000


class _Turns:
    """Whose turn it is, for a fixed set of sources and weights: earliest deadline first, of those whose time has come.

    Of choice number t (from 0) on, source i of weight w in W is due w / W. Its choice number k has the window
    floor(k * W / w) <= t < ceil((k + 1) * W / w). Each window can be kept, and the earliest deadline first keeps
    them (Baruah and others 1996, "Proportionate progress"), so that no count is ever 1 away from what is due.
    Without the beginning of the windows (stride scheduling, Sainte-Lague) a heavy source comes in bursts when
    there are many light ones: of 100, 1, 1, ... (100 times), it has the first 50 choices instead of each second.

    All numbers are integers, so that nothing drifts. Sources with the same window stand in one queue: with
    equal weights the heaps hold one entry.
    """

    def __init__(self, keys: tuple[Source, ...], weights: Sequence[tuple[int, int]], before: _Turns | None) -> None:
        self.keys = keys
        scale = lcm(*(below for _, below in weights))
        whole = [above * (scale // below) for above, below in weights]
        common = gcd(*whole) or 1
        self._weights = [weight // common for weight in whole]
        self._total = sum(self._weights)
        self._slot = 0
        self._counts = [0] * len(keys)
        self._reserves = [at for at, weight in enumerate(self._weights) if not weight]
        self.away: dict[Source, int] = {}
        self._lags = self._inherited(before)
        #: (first slot, deadline, a member, members); the same by its first two; (deadline, a member, members)
        self._waiting: list[tuple[int, int, int, deque[int]]] = []
        self._queues: dict[tuple[int, int], deque[int]] = {}
        self._ready: list[tuple[int, int, deque[int]]] = []
        for at, weight in enumerate(self._weights):
            if weight:
                self._wait(at)

    def _inherited(self, before: _Turns | None) -> list[int]:
        """Return what is due to each source from before, less what it had, as parts of a choice.

        Who is away keeps it, for with sources that come and go all the time a light one would never get its turn. The
        others share what the absent ones leave on either side by their weights, but nobody takes along more than 1.
        """
        if before is None:
            return [0] * len(self.keys)
        self.away = before.away | {key: before.lag(at) for at, key in enumerate(before.keys)}
        lags = [self.away.pop(key, 0) if weight else 0 for key, weight in zip(self.keys, self._weights, strict=True)]
        for key in list(self.away)[:-_AWAY]:
            del self.away[key]
        left, total = sum(lags), self._total or 1
        shares = (left * weight // total for weight in self._weights)
        return [max(-_LAG, min(_LAG, lag - share)) for lag, share in zip(lags, shares, strict=True)]

    def lag(self, at: int) -> int:
        """Return what is due to a source by now, less what it had."""
        if not self._total:
            return 0
        return self._lags[at] + self._slot * self._weights[at] * _LAG // self._total - self._counts[at] * _LAG

    def _wait(self, at: int) -> None:
        begin, stride = (self._counts[at] * _LAG - self._lags[at]) * self._total, self._weights[at] * _LAG
        window = begin // stride, -(-(begin + self._total * _LAG) // stride)
        queue = self._queues.get(window)
        if queue is None:
            queue = self._queues[window] = deque()
            heappush(self._waiting, (*window, at, queue))
        queue.append(at)

    def _take(self) -> int:
        waiting, ready = self._waiting, self._ready
        # None may be ready after a change, for a lag is rounded.
        while waiting and (waiting[0][0] <= self._slot or not ready):
            slot, deadline, member, queue = heappop(waiting)
            del self._queues[slot, deadline]
            heappush(ready, (deadline, member, queue))
        queue = ready[0][2]
        at = queue.popleft()
        if not queue:
            heappop(ready)
        self._slot += 1
        self._counts[at] += 1
        self._wait(at)
        return at

    def order(self) -> Iterator[int]:
        """Take a turn; then yield the others as their turns will come, which takes none."""
        seen = set[int]()
        if self._total:
            seen.add(first := self._take())
            yield first
        slot = None
        while slot != self._slot:  # somebody else took a turn meanwhile
            slot = self._slot
            for at in self._upcoming():
                if at not in seen:
                    seen.add(at)
                    yield at
                    if slot != self._slot:
                        break
        yield from self._reserves

    def _upcoming(self) -> Iterator[int]:
        for *_, queue in chain(_ascending(self._ready), _ascending(self._waiting)):
            yield from queue


def _ascending(heap: Sequence[Any]) -> Iterator[Any]:
    """Yield the entries of a heap by size, the first k of them in O(k log k); it must not change meanwhile."""
    frontier = [(heap[0], 0)] if heap else []
    while frontier:
        entry, at = heappop(frontier)
        yield entry
        for child in range(2 * at + 1, min(2 * at + 3, len(heap))):
            heappush(frontier, (heap[child], child))


#: connections in use or under way, failures, place in the order
_Load: TypeAlias = tuple[int, int, int]


class LeastConnections:
    """The source with the fewest connections in use; of several, the one with the fewest failures, then the first.

    Idle keep-alive connections are not counted: they are no load. A crawler leaves one behind at each host that it has
    been to, and they last for a time that the host chooses; to count them would send it away from the source that
    has got the most done. Those under way are: of a hundred requests at once not all shall take the same source.

    With a connector, which tells of each change, a choice costs O(log n). Whoever calls ``order`` without ever calling
    ``changed`` pays O(n), and is right too. Who calls it calls it for each change.
    """

    def __init__(self) -> None:
        self._views: Sequence[SourceView] | None = None
        self._told = False
        self._places: dict[Source, int] = {}
        # A heap with the load of each source and, as long as they do not come to the top, its former ones.
        self._loads: list[_Load] = []
        self._heap: list[_Load] = []
        self._version = 0

    def changed(self, source: SourceView) -> None:
        """Take note of the figures of *source*."""
        self._told = True
        at = self._places.get(source.source)
        if at is None:
            return
        load = source.in_use + source.connecting, source.failures, at
        if load != self._loads[at]:
            self._loads[at] = load
            self._version += 1
            heappush(self._heap, load)
            if len(self._heap) > 2 * len(self._loads) + 16:
                self._heap = sorted(self._loads)  # which is a heap

    def order(self, sources: Sequence[SourceView], host: str) -> Iterator[SourceView]:
        """Return the sources, the one with the least to do first."""
        views = sources if isinstance(sources, tuple) else tuple(sources)
        if not self._told or views is not self._views:
            self._look(views)
        seen = set[int]()
        version = None
        while version != self._version and len(seen) < len(views):
            if self._views is not views:  # for another call, while this one waited
                others = [view for at, view in enumerate(views) if at not in seen]
                yield from sorted(others, key=lambda view: (view.in_use + view.connecting, view.failures))
                return
            while self._heap[0] is not self._loads[self._heap[0][2]]:
                heappop(self._heap)
                self._version += 1
            version = self._version
            for load in _ascending(self._heap):
                at = load[2]
                if load is self._loads[at] and at not in seen:
                    seen.add(at)
                    yield views[at]
                    if version != self._version:
                        break

    def _look(self, views: Sequence[SourceView]) -> None:
        self._views = views
        self._version += 1
        self._places = {view.source: at for at, view in enumerate(views)}
        self._loads = [(view.in_use + view.connecting, view.failures, at) for at, view in enumerate(views)]
        self._heap = self._loads.copy()
        heapify(self._heap)


#: How many hosts `Sticky` remembers, and of each host how many sources: the others are for when those have failed.
_HOSTS: Final = 10_000
_BEST: Final = 3


class _Ranks(NamedTuple):
    """The best sources for a host, best first, and the generation of the set in which they are that."""

    best: tuple[tuple[bytes, Source], ...]
    generation: int


class Sticky:
    """The same source for the same host as long as it is healthy; the hosts are spread evenly over the sources.

    Rendezvous hashing (Thaler and Ravishankar 1996, "highest random weight"): each source has a number for each host,
    and the best number wins. So the loss of one of n sources moves its own hosts only, 1 / n of all, and they come
    back with it. The numbers are the same in every process, and do not depend on the other sources or on their
    order. The case of a host and a final dot do not matter.
    """

    def __init__(self) -> None:
        self._views: Sequence[SourceView] | None = None
        self._places: dict[Source, int] = {}
        self._hashes: dict[Source, blake2b] = {}
        #: since which generation of the set a source is in it; the latest are last
        self._since: dict[Source, int] = {}
        self._generation = 0
        #: the least recently used are first
        self._ranks: OrderedDict[bytes, _Ranks] = OrderedDict()

    def order(self, sources: Sequence[SourceView], host: str) -> Iterator[SourceView]:
        """Return the sources, the host's own first; each is followed by the one that would be it without those."""
        views = sources if isinstance(sources, tuple) else tuple(sources)
        if not views:
            return
        if views is not self._views:
            self._change(views)
        places = self._places  # stays as it is: another set has another one
        name = host.lower().removesuffix(".").encode("utf-8", "surrogatepass")
        best = [places[source] for _, source in self._best(name)]
        for at in best:
            yield views[at]
        others = [(self._number(view.source, name), at) for at, view in enumerate(views) if at not in best]
        heapify(others)
        while others:
            yield views[heappop(others)[1]]

    def _change(self, views: Sequence[SourceView]) -> None:
        places = {view.source: at for at, view in enumerate(views)}
        if places.keys() != self._places.keys():
            self._generation += 1
            kept = {source: since for source, since in self._since.items() if source in places}
            self._since = kept | {source: self._generation for source in places if source not in kept}
            self._hashes = {source: self._hashes.get(source) or _hash_of(source) for source in places}
        self._views, self._places = views, places

    def _best(self, name: bytes) -> tuple[tuple[bytes, Source], ...]:
        """Return the best sources for a host, one at least."""
        ranks = self._ranks.get(name)
        if ranks is None or ranks.generation != self._generation:
            best = [] if ranks is None else self._still_best(name, ranks)
            if not best:
                best = nsmallest(_BEST, [(self._number(source, name), source) for source in self._places])
            ranks = self._ranks[name] = _Ranks(tuple(best), self._generation)
            if len(self._ranks) > _HOSTS:
                self._ranks.popitem(last=False)
        self._ranks.move_to_end(name)
        return ranks.best

    def _still_best(self, name: bytes, ranks: _Ranks) -> list[tuple[bytes, Source]]:
        """Return those that are left of *ranks*, with those who have come since and are better than the last of them.

        Of all others nothing has to be known: they are worse than the last one.
        """
        best = [entry for entry in ranks.best if entry[1] in self._places]
        if best:
            known, (last, _) = {source for _, source in best}, best[-1]
            for source, since in reversed(self._since.items()):
                if since <= ranks.generation:
                    break
                if source not in known and (number := self._number(source, name)) < last:
                    best.append((number, source))
        return sorted(best)[:_BEST]

    def _number(self, source: Source, name: bytes) -> bytes:
        """Return the number that *source* has for a host; the smallest is the best."""
        hashed = (self._hashes.get(source) or _hash_of(source)).copy()
        hashed.update(name)
        return hashed.digest()


def _hash_of(source: Source) -> blake2b:
    from hashlib import blake2b  # noqa: PLC0415 - brings OpenSSL along: 2 ms that few need

    return blake2b(str(source).encode("utf-8", "surrogatepass") + b"\0", digest_size=8)
