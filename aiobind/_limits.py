"""Law: a place that is given back goes to whoever has waited longest among those who can use it; nobody overtakes.

Two kinds of limits for each source, both of them also for each host that is connected to from there:

    places   how many connections are open: `Limits.take`, or `Limits.wait`, and at the end of each `Limits.release`
    turns    how many connects there are in any one second: `Limits.pace`

Places. Whoever finds none stands in a line with those who wait for the same sources and the same host, and a place goes
to the one who came first among the heads of the lines. While somebody waits who could use it no place is free, for it
is handed on when it is given back; so to see a free one is to be allowed to take it. A place may be given back by
anybody, in any thread and amid any statement (the collector ends connections as well): that only notes it, and all
counting is done on the loop.

Turns. An ``AsyncLimiter`` measures the time; the order is kept here, for it lets those pass who come just when it has
room, before the ones that wait (1.3). Both turns are taken in the same moment: who waits for the one does not use the
other up.

What is kept for a host ends with its last place and, soon after, its last turn: a crawler meets millions of hosts.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable, Sequence

    from aiolimiter import AsyncLimiter

__all__ = ["Limits"]

O = TypeVar("O", bound="Hashable")  # noqa: E741
_K = TypeVar("_K", bound="Hashable")


class Limits(Generic[O]):
    """The limits of each source of a connector. They belong to the loop on which somebody first waits.

    Args:
        connections: open connections of a source; 0 for any number.
        connections_per_host: those of them to the same host; 0 for any number.
        rate: connects per second of a source; None for any number.
        rate_per_host: those of them to the same host; None for any number.

    Raises:
        TypeError: one of them is no number.
        ValueError: one of them is less than 0, or a rate not within 1e-9 to 1e9.
        ImportError: a rate needs ``aiobind[limits]``.
    """

    def __init__(
        self,
        *,
        connections: int = 0,
        connections_per_host: int = 0,
        rate: float | None = None,
        rate_per_host: float | None = None,
    ) -> None:
        self._connections = _whole("limit_per_source", connections)
        self._per_host = _whole("limit_per_source_host", connections_per_host)
        #: whether there are any limits to the connections; if not, there is always a place
        self.limited = bool(connections or connections_per_host)
        self._by_source: _Turns[O] = _Turns(_rate("rate_per_source", rate), together=0.05)
        self._by_host: _Turns[tuple[O, str]] = _Turns(_rate("rate_per_source_host", rate_per_host))
        #: whether there are any limits to the connects per second; if not, it is always everybody's turn
        self.paced = not (rate is None and rate_per_host is None)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        # Places: those that are taken, those given back that still count as taken, and who waits for which.
        self._held: dict[O, int] = {}
        self._held_at: dict[tuple[O, str], int] = {}
        self._ended: deque[tuple[O, str]] = deque()
        self._due = False
        self._lines: dict[tuple[frozenset[O], str], OrderedDict[asyncio.Future[O | None], int]] = {}
        self._arrivals = count()
        # Turns: who waits for one.
        self._pacing: dict[O, int] = {}
        self._patience: set[asyncio.Timeout] = set()

    # ── places ──

    def take(self, source: O, host: str) -> bool:
        """Take a place at *source* for a connection to *host*, and return True, if there is one."""
        if self._ended:
            self._settle()
        if not self._room(source, host):
            return False
        self._enter(source, host)
        return True

    async def wait(self, sources: Sequence[O], host: str) -> O | None:
        """Take a place for a connection to *host* at one of *sources*, as soon as there is one; return that source.

        None: take none, and choose again (`reconsider`).

        Raises:
            ValueError: there are no *sources*.
            RuntimeError: the connector is closed.
        """
        self._check_open()
        if not sources:
            raise ValueError("no source to wait for")
        for free in sources:
            if self.take(free, host):
                return free
        self._loop = asyncio.get_running_loop()
        key = frozenset(sources), host if self._per_host else ""
        place: asyncio.Future[O | None] = self._loop.create_future()
        self._lines.setdefault(key, OrderedDict())[place] = next(self._arrivals)
        if self._ended:  # by another thread, which did not see this one waiting
            self._settle()
        try:
            source = await place
        except asyncio.CancelledError:
            # Cancelled when it had just been given.
            if not place.cancelled() and place.exception() is None and (given := place.result()) is not None:
                self.release(given, host)
            raise
        finally:
            line = self._lines.get(key)
            if line is not None:
                line.pop(place, None)
                if not line:
                    del self._lines[key]
        if self._closed:
            if source is not None:
                self.release(source, host)
            self._check_open()
        return source

    def reconsider(self) -> None:
        """Have all who wait for a place choose again, in their order: the sources are not what they were."""
        waiting = [entry for line in self._lines.values() for entry in line.items()]
        for place, _ in sorted(waiting, key=lambda entry: entry[1]):
            if not place.done():
                place.set_result(None)

    def release(self, source: O, host: str) -> None:
        """Give a place back. From any thread."""
        if not self.limited:
            return
        self._ended.append((source, host))
        if self._lines and not self._due:
            self._due = True
            self._soon(self._settle)

    def _room(self, source: O, host: str) -> bool:
        if self._connections and self._held.get(source, 0) >= self._connections:
            return False
        return not self._per_host or self._held_at.get((source, host), 0) < self._per_host

    def _enter(self, source: O, host: str) -> None:
        if self._connections:
            self._held[source] = self._held.get(source, 0) + 1
        if self._per_host:
            self._held_at[source, host] = self._held_at.get((source, host), 0) + 1

    def _settle(self) -> None:
        """Hand on the places that were given back."""
        self._due = False
        while self._ended:
            source, host = self._ended.popleft()
            if self._connections:
                _less(self._held, source)
            if self._per_host:
                _less(self._held_at, (source, host))
            self._serve(source)

    def _serve(self, source: O) -> None:
        first, earliest = None, math.inf
        for (wishes, host), line in self._lines.items():
            while line and next(iter(line)).done():  # cancelled, and not yet awake
                line.popitem(last=False)
            arrival = next(iter(line.values()), math.inf)
            if arrival < earliest and source in wishes and self._room(source, host):
                first, earliest = (line, host), arrival
        if first is not None:
            line, host = first
            place, _ = line.popitem(last=False)
            self._enter(source, host)
            place.set_result(source)

    # ── turns ──

    def ready(self, source: O, host: str) -> bool:
        """Whether a connect from *source* to *host* would not have to wait for its turn."""
        return self._by_source.ready(source) and self._by_host.ready((source, host))

    async def pace(self, source: O, host: str) -> None:
        """Wait for the turn of a connect from *source* to *host*.

        The order is that of arrival for each source and host; for the source, that in which their hosts let them.

        Raises:
            RuntimeError: the connector is closed.
        """
        self._check_open()
        self._loop = asyncio.get_running_loop()
        self._pacing[source] = self._pacing.get(source, 0) + 1
        try:
            async with asyncio.timeout(None) as patience:  # `close` ends it
                self._patience.add(patience)
                try:
                    await self._take_turns(source, host)
                finally:
                    self._patience.discard(patience)
        except TimeoutError:
            pass
        finally:
            _less(self._pacing, source)
        self._check_open()

    async def _take_turns(self, source: O, host: str) -> None:
        async with self._by_host.first((source, host)) as at_host:
            if at_host is not None:
                await at_host.come()
            async with self._by_source.first(source) as at_source:
                if at_source is not None:
                    await at_source.limiter.acquire()
                if at_host is not None:
                    await at_host.limiter.acquire()  # which has room: it is nobody else's turn

    def waiting(self, source: O) -> int:
        """How many wait in `pace` for *source*."""
        return self._pacing.get(source, 0)

    # ── the end ──

    def close(self) -> None:
        """End all who wait, with a RuntimeError."""
        self._closed = True
        self._soon(self._dismiss)

    def forget(self, source: O) -> None:
        """Keep nothing more for a *source* that was removed, but for what is held there and who waits."""
        self._by_source.forget(lambda key: key == source)
        self._by_host.forget(lambda key: key[0] == source)

    def _dismiss(self) -> None:
        for line in self._lines.values():
            for place in line:
                if not place.done():
                    place.set_exception(RuntimeError("the connector is closed"))
        for patience in self._patience:
            patience.reschedule(-math.inf)
        self._patience.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the connector is closed")

    def _soon(self, callback: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed, so nobody waits
                self._loop.call_soon_threadsafe(callback)


class _Turn:
    """Those who wait for the same limiter, one of them at it and the others behind."""

    __slots__ = ("_new", "limiter", "lock", "users")

    def __init__(self, new: Callable[[], AsyncLimiter]) -> None:
        self._new = new
        self.limiter = new()
        self.lock = asyncio.Lock()  # which keeps the order
        self.users = 0

    async def come(self) -> None:
        """Wait until the limiter has room for one, and leave it there. Only where one is all that it has room for."""
        if not self.limiter.has_capacity():
            await self.limiter.acquire()
            self.limiter = self._new()

    def ready(self) -> bool:
        return not self.users and self.limiter.has_capacity()

    def idle(self) -> bool:
        return not self.users and self.limiter.has_capacity(self.limiter.max_rate)


class _Turns(Generic[_K]):
    """A turn for each key.

    A limiter that had room for a whole second's connects would let all of them pass at once, and as many again during
    that second. So it has room for one, and the connects are evenly spaced. Timers come a millisecond late (the
    resolution of epoll and of libuv), which leaves 450 of 500 connects per second and hardly 1,000 of any higher rate;
    so a share of them may pass *together*, which is made up for by the others.
    """

    def __init__(self, rate: float | None, *, together: float = 0) -> None:
        self._rate = rate
        if rate is not None:
            extra = int(rate * together)
            self._room = 1 + extra
            self._seconds = self._room / (rate - extra)
            try:
                from aiolimiter import AsyncLimiter  # noqa: PLC0415 - an extra
            except ImportError as error:
                raise ImportError(
                    "rate_per_source and rate_per_source_host need aiolimiter 1.2 or later: "
                    'pip install "aiobind[limits]"'
                ) from error
            self._limiter = AsyncLimiter
        self._turns: OrderedDict[_K, _Turn] = OrderedDict()  # the one that was left last is the last

    def ready(self, key: _K) -> bool:
        turn = self._turns.get(key)
        return turn is None or turn.ready()

    @asynccontextmanager
    async def first(self, key: _K) -> AsyncIterator[_Turn | None]:
        """Wait to be the first in the line for *key*, until the end of the block."""
        if self._rate is None:
            yield None
            return
        turn = self._turns.get(key)
        if turn is None:
            turn = self._turns[key] = _Turn(self._new)
        turn.users += 1
        try:
            async with turn.lock:
                yield turn
        finally:
            turn.users -= 1
            self._turns.move_to_end(key)
            # All have the same rate, so those that were left first have their room again first.
            for _ in range(2):  # one more than comes
                oldest = next(iter(self._turns), None)
                if oldest is None or not self._turns[oldest].idle():
                    break
                del self._turns[oldest]

    def forget(self, which: Callable[[_K], bool]) -> None:
        for key in [key for key, turn in self._turns.items() if which(key) and not turn.users]:
            del self._turns[key]

    def _new(self) -> AsyncLimiter:
        return self._limiter(self._room, self._seconds)


def _less(counts: dict[_K, int], key: _K) -> None:
    """Count one less; what is 0 is not kept."""
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]


def _whole(option: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{option} is a number of connections, as in {option}=50, not {value!r}")
    if value < 0:
        raise ValueError(f"{option} is a number of connections, or 0 for no limit, not {value}")
    return value


def _rate(option: str, value: float | None) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{option} is a number of connects per second, as in {option}=2.5, not {value!r}")
    if not 1e-9 <= value <= 1e9:
        raise ValueError(f"{option} is a number of connects per second, 1e-9 to 1e9, or None for no limit, not {value}")
    return value
