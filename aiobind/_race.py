"""Law: RFC 8305. Attempts start one after the other, the first to succeed wins, and every other result is closed.

``interleave`` orders the targets (section 4), ``race`` runs the attempts (section 5).
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

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


async def race(attempts: Sequence[Callable[[], Awaitable[_T]]], delay: float | None) -> tuple[_T | None, list[OSError]]:
    """Run *attempts* until one succeeds.

    Args:
        attempts: what to try, in this order; each raises OSError when it fails.
        delay: RFC 8305's Connection Attempt Delay in seconds: how long an attempt may take before the next one starts
            beside it. A failed one is followed at once. None: the next starts only when the one before has failed.

    Returns:
        The winner, or None when all failed; and the errors of those that failed, in the order of *attempts*.
    """
    if delay is None or len(attempts) == 1:
        return await _one_after_another(attempts)
    return await _staggered(attempts, delay)


async def _one_after_another(
    attempts: Sequence[Callable[[], Awaitable[_T]]],
) -> tuple[_T | None, list[OSError]]:
    errors: list[OSError] = []
    for attempt in attempts:
        try:
            return await attempt(), errors
        except OSError as error:
            errors.append(error.with_traceback(None))  # which would hold this very frame
    return None, errors


async def _staggered(attempts: Sequence[Callable[[], Awaitable[_T]]], delay: float) -> tuple[_T | None, list[OSError]]:
    async def run(attempt: Callable[[], Awaitable[_T]]) -> _T | OSError:
        try:
            return await attempt()
        except OSError as error:
            return error.with_traceback(None)  # which would hold this very frame

    waiting = deque(enumerate(attempts))
    running: dict[asyncio.Task[_T | OSError], int] = {}
    errors: dict[int, OSError] = {}
    winner: _T | None = None
    try:
        while waiting or running:
            if waiting:
                number, attempt = waiting.popleft()
                running[asyncio.create_task(run(attempt))] = number
            timeout = delay if waiting else None
            done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=running.__getitem__):
                result = task.result()
                number = running.pop(task)
                if not isinstance(result, OSError):
                    winner = result
                    return winner, _in_order(errors)
                errors[number] = result
        return None, _in_order(errors)
    finally:
        # Those that lost; on cancellation, all. One may have won in the very moment: its result is closed as well,
        # by a callback, so that a second cancellation in the wait below leaves nothing open either.
        for task in running:
            task.add_done_callback(_close_result)
            task.cancel()
        if running:
            try:
                await asyncio.wait(running)
            except BaseException:  # cancelled only now: nobody takes the winner any more
                if winner is not None:
                    winner.close()
                raise


def _close_result(task: asyncio.Task[_T | OSError]) -> None:
    if not task.cancelled() and task.exception() is None:
        result = task.result()
        if not isinstance(result, OSError):
            result.close()


def _in_order(errors: dict[int, OSError]) -> list[OSError]:
    return [errors[number] for number in sorted(errors)]
