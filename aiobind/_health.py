"""Law: what fails for reasons of its own is left alone for a while, each time for longer, until one probe works again.

    usable ── failed ──> suspended ── its time ends ──> due ── one probe ──> usable, or suspended for twice as long

The time is an argument: no clock here, so that every rule is a row of a table in the tests.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["Breaker", "Timeouts"]

#: The first suspension, in seconds, before its jitter; and the longest.
FIRST, LONGEST = 1.0, 60.0


class Breaker:
    """Stands before something that has failed. While nothing has, there is none.

    Args:
        first: the length of the first suspension, in seconds; each further one is twice as long.
        longest: what they grow to.
    """

    __slots__ = ("_first", "_longest", "error", "failures", "probing", "until")

    def __init__(self, first: float = FIRST, longest: float = LONGEST) -> None:
        self._first = first
        self._longest = longest
        #: suspensions in a row
        self.failures = 0
        #: when the suspension ends
        self.until = 0.0
        self.error: OSError | None = None
        #: whether a probe is under way
        self.probing = False

    def failed(self, now: float, error: OSError | None = None, *, seconds: float | None = None) -> bool:
        """Suspend it; return False if it is suspended already: those that were under way then say nothing new.

        Args:
            now: the time.
            error: why.
            seconds: for so long, where somebody knows better.
        """
        if seconds is not None:
            self.error, self.until = error, max(self.until, now + seconds)
            return True
        if now < self.until:
            return False
        if now - self.until > self._longest:
            self.failures = 0  # it has been all right for a long time
        self.error = error
        import random  # noqa: PLC0415 - 1 ms of each import, for what seldom happens

        # Up to half of it less, lest all that failed together come back together.
        length = min(self._first * 2.0 ** min(self.failures, 60), self._longest) * random.uniform(0.5, 1.0)
        self.failures += 1
        self.until = now + length
        return True

    def suspended(self, now: float) -> bool:
        """Return whether it is to be left alone."""
        return now < self.until

    def due(self, now: float) -> bool:
        """Return whether it is time to find out how it is now, and nobody else is about to."""
        return now >= self.until and not self.probing


_Source = TypeVar("_Source", bound="Hashable")

#: So many targets are remembered, for so many seconds.
_TARGETS, _MEMORY = 1024, 60.0


class Timeouts(Generic[_Source]):
    """Who waited in vain for which target, and whom that is to be blamed on.

    A silent target may be down, and then no source is at fault. It is the source's fault when another one has reached
    the target meanwhile, or reaches it soon after, and did not wait in vain itself.
    """

    def __init__(self) -> None:
        self._waited: OrderedDict[Hashable, dict[_Source, float]] = OrderedDict()
        self._reached: OrderedDict[Hashable, tuple[_Source, float]] = OrderedDict()

    def timed_out(self, source: _Source, target: Hashable, began: float, now: float) -> bool:
        """Note that *source* has waited for *target* in vain since *began*; return whether that is its own fault."""
        other, when = self._reached.get(target, (source, 0.0))
        if other != source and when >= began:
            return True
        waited = self._waited.setdefault(target, {})
        waited[source] = now
        self._waited.move_to_end(target)
        if len(self._waited) > _TARGETS:
            self._waited.popitem(last=False)
        return False

    def forget(self, source: _Source) -> None:
        """Remember *source* no more."""
        for waited in self._waited.values():
            waited.pop(source, None)
        for target in [target for target, (other, _) in self._reached.items() if other == source]:
            del self._reached[target]

    def reached(self, source: _Source, target: Hashable, now: float) -> list[_Source]:
        """Note that *source* has reached *target*; return those who waited for it in vain by their own fault."""
        self._reached[target] = source, now
        self._reached.move_to_end(target)
        if len(self._reached) > _TARGETS:
            self._reached.popitem(last=False)
        if not self._waited:
            return []
        waited = self._waited.pop(target, {})
        if source in waited:
            return []  # the target was silent for this one as well
        return [other for other, when in waited.items() if now - when <= _MEMORY]
