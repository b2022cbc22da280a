"""Law: what is kept of the latencies is a fixed number of counts, whatever comes and however much of it.

A histogram with buckets of equal ratio: each is 1.1 times as wide as the one before, so its middle is within 5 % of
everything in it. What is out of bounds counts in the first or the last bucket.

It says how it is now. All counts are halved whenever their sum has come to 1,000, so the latest 500 values weigh at
least as much as all the others together; no clock is read, and the same values always give the same figures.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from itertools import accumulate
from math import ceil, log, ulp
from typing import Final

__all__ = ["LatencySketch"]

#: In seconds; below is faster than any connect, and above any time-out of one.
_SHORTEST: Final = 10e-6
_LONGEST: Final = 1000.0
_RATIO: Final = 1.1
_PER_E: Final = 1 / log(_RATIO)
_BUCKETS: Final = ceil(log(_LONGEST / _SHORTEST) * _PER_E) + 1
#: The value whose relative distance to both ends of the first bucket is the same: (1.1 - 1) / (1.1 + 1), 4.8 %.
_MIDDLE: Final = _SHORTEST * 2 * _RATIO / (_RATIO + 1)
#: The counts are halved at this sum,
_FULL: Final = 1000
#: and a bucket that has come down to this is empty: 7 halvings of a single value.
_FADED: Final = 0.01


class LatencySketch:
    """Latencies of which the quantiles can be told, within 5 %, from 10 µs to 1,000 s."""

    __slots__ = ("_counts", "_room")

    def __init__(self) -> None:
        self._counts = array("d", bytes(8 * _BUCKETS))
        self._room: float = _FULL

    def add(self, seconds: float) -> None:
        """Count a latency."""
        if _SHORTEST < seconds < _LONGEST:
            self._counts[int(log(seconds / _SHORTEST) * _PER_E)] += 1
        elif seconds >= _LONGEST:
            self._counts[int(log(_LONGEST / _SHORTEST) * _PER_E)] += 1
        elif seconds <= _SHORTEST:
            self._counts[0] += 1
        else:  # not a number, so not a latency
            return
        self._room -= 1
        if self._room <= 0:
            self._counts = array("d", (count / 2 if count > _FADED else 0.0 for count in self._counts))
            self._room = _FULL - sum(self._counts)

    def quantile(self, q: float) -> float | None:
        """Return the latency in seconds that the share *q* of them, 0 to 1, does not exceed; None for want of any."""
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is from 0 to 1, not {q}")
        sums = list(accumulate(self._counts))
        if not sums[-1]:
            return None
        return _MIDDLE * _RATIO ** bisect_left(sums, max(q * sums[-1], ulp(0.0)))  # for 0, the first that is not empty
