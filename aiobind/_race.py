"""Law: RFC 8305. Attempts start one after the other, the first to succeed wins, and every other result is closed.

``interleave`` orders the targets (section 4), ``race`` runs the attempts (section 5).
"""

from __future__ import annotations

import asyncio
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from ._binding import Target

__all__ = ["interleave", "race"]


class _Closable(Protocol):
    def close(self) -> object: ...


_T = TypeVar("_T", bound=_Closable)


def interleave(targets: Sequence[Target], first_family_count: int = 1) -> list[Target]:
    """Alternate the address families, beginning with *first_family_count* of the family that came first."""
    if len(targets) < 2:
        return list(targets)
    first = [target for target in targets if target.family == targets[0].family]
    other = [target for target in targets if target.family != targets[0].family]
    head, tail = first[: first_family_count - 1], first[first_family_count - 1 :]
    mixed = chain.from_iterable(zip_longest(tail, other))
    return head + [target for target in mixed if target is not None]


def race(
    attempts: Sequence[Callable[[], Awaitable[_T | None]]], delay: float | None
) -> Coroutine[Any, Any, tuple[_T | None, list[OSError]]]:
    """Run *attempts* until one succeeds.

    Args:
        attempts: what to try, in this order; each raises OSError when it fails; None: nothing came of it.
        delay: RFC 8305's Connection Attempt Delay in seconds: how long an attempt may take before the next one starts
            beside it. A failed one is followed at once. None: the next starts only when the one before has failed.

    Returns:
        The winner, or None when all failed; and the errors of those that failed, in the order of *attempts*.
    """
    if delay is None or len(attempts) < 2:
        return _one_after_another(attempts)
    return _staggered(attempts, delay)


async def _one_after_another(
    attempts: Sequence[Callable[[], Awaitable[_T | None]]],
) -> tuple[_T | None, list[OSError]]:
    errors: list[OSError] = []
    for attempt in attempts:
        try:
            winner = await attempt()
            if winner is not None:
                return winner, errors
        except OSError as error:
            errors.append(error.with_traceback(None))  # which would hold this very frame
    return None, errors


async def _staggered(
    attempts: Sequence[Callable[[], Awaitable[_T | None]]], delay: float
) -> tuple[_T | None, list[OSError]]:
    errors: dict[int, OSError] = {}
    winner = await _Leg(attempts, 0, delay, errors).run()
    return winner, [errors[number] for number in sorted(errors)]


class _Leg(Generic[_T]):
    """One attempt, in the task of whoever waits for it; when the delay is over, the next leg beside it in a task.

    So a race that the first one wins in time, which most are, costs a timer and no task.
    """

    __slots__ = (
        "_attempts",
        "_before",
        "_delay",
        "_errors",
        "_next",
        "_number",
        "_overtaken",
        "_rest",
        "_task",
        "_timer",
    )

    def __init__(
        self,
        attempts: Sequence[Callable[[], Awaitable[_T | None]]],
        number: int,
        delay: float,
        errors: dict[int, OSError],
    ) -> None:
        self._attempts = attempts
        self._number = number
        self._delay = delay
        self._errors = errors
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._next: _Leg[_T] | None = None
        self._rest: asyncio.Task[_T | None] | None = None
        #: the next leg has a result, for which our own attempt is cancelled; and how often the task was before
        self._overtaken = False
        self._before = 0

    async def run(self) -> _T | None:
        """Return the winner of this leg and those behind it."""
        winner: _T | None = None
        try:
            winner = await self._attempt()
            if winner is None and self._next is not None:
                self._next.hurry()
            elif winner is None and self._number + 1 < len(self._attempts):
                self._next = _Leg(self._attempts, self._number + 1, self._delay, self._errors)
                winner = await self._next.run()
            if winner is None and self._rest is not None:
                await asyncio.wait([self._rest])
                winner = self._rest.result()
        finally:
            if self._rest is not None:
                await self._end(self._rest, winner)
        return winner

    async def _attempt(self) -> _T | None:
        self._task = asyncio.current_task()
        if self._number + 1 < len(self._attempts):
            self._timer = asyncio.get_running_loop().call_later(self._delay, self._start)
        winner: _T | None = None
        try:
            try:
                winner = await self._attempts[self._number]()
            except OSError as error:
                self._errors[self._number] = error.with_traceback(None)  # which would hold this very frame
            except asyncio.CancelledError:
                if not self._overtaken or self._is_cancelled():
                    raise
                return None
            if not self._overtaken:
                return winner
            if winner is not None:  # it did not heed that it was cancelled
                winner.close()
            if self._is_cancelled():
                raise asyncio.CancelledError
            return None
        finally:
            self._task = None  # which would hold this very frame, if it is cancelled
            self._end_timer()

    def _start(self) -> None:
        """Start the next leg beside this one."""
        if self._timer is not None and self._task is not None:
            self._end_timer()
            self._before = self._task.cancelling()
            self._next = _Leg(self._attempts, self._number + 1, self._delay, self._errors)
            self._rest = asyncio.get_running_loop().create_task(self._next.run())
            self._rest.add_done_callback(self._overtake)

    def _is_cancelled(self) -> bool:
        """Take our own cancellation back; return whether somebody else has cancelled the task as well."""
        return self._task is not None and self._task.uncancel() > self._before

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # which holds this leg

    def _overtake(self, rest: asyncio.Task[_T | None]) -> None:
        if self._task is not None and not rest.cancelled() and (rest.exception() or rest.result() is not None):
            self._overtaken = True
            self._task.cancel()

    def hurry(self) -> None:
        """An attempt has failed: the next one that has not started is to start now."""
        if self._next is not None:
            self._next.hurry()
        else:
            self._start()

    async def _end(self, rest: asyncio.Task[_T | None], winner: _T | None) -> None:
        """End what has lost; on cancellation, all."""
        if rest.done():
            _close_result(rest, winner)
            return
        # It may win in the very moment: its result is closed as well, by a callback, so that a second cancellation in
        # the wait below leaves nothing open either.
        rest.add_done_callback(_close_result)
        rest.cancel()
        try:
            await asyncio.wait([rest])
        except BaseException:  # cancelled only now: nobody takes the winner any more
            if winner is not None:
                winner.close()
            raise


def _close_result(task: asyncio.Task[_T | None], but: _T | None = None) -> None:
    if not task.cancelled() and task.exception() is None:
        result = task.result()
        if result is not None and result is not but:
            result.close()
