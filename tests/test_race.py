"""RFC 8305 on a clock that jumps: who starts when, who wins, and that nothing of the others is left."""

from __future__ import annotations

import asyncio
import heapq
import math
import socket
import sys
from collections import deque
from functools import partial
from ipaddress import ip_address
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opened import connect, open_bound

from aiobind._binding import Binding, Target
from aiobind._race import interleave, race

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

V4, V6 = socket.AF_INET, socket.AF_INET6
EAGER = [False, True] if sys.version_info >= (3, 12) else [False]
either_tasks = pytest.mark.parametrize("eager", EAGER, ids=lambda eager: "eager" if eager else "lazy")


# --- the clock and the attempts -----------------------------------------------------------------------------


class OneByOne(deque[Any]):
    """The queue of a loop that runs one callback in each turn, so that a test may step in between any two."""

    def __len__(self) -> int:
        return min(1, super().__len__())


class JumpingLoop(asyncio.SelectorEventLoop):
    """A loop whose clock stands still while there is something to do, and else jumps to the next timer."""

    def __init__(self, *, eager: bool = False) -> None:
        super().__init__()
        if eager:
            self.set_task_factory(asyncio.eager_task_factory)
        self.now = 0.0
        self.turns = 0
        self.timers = 0
        self.faults: list[dict[str, Any]] = []
        self.on_turn: Callable[[int], object] = lambda _: None
        self.set_exception_handler(lambda _, context: self.faults.append(context))
        self._ready = OneByOne()
        self._selector.select, self._select = self._jump, self._selector.select

    def time(self) -> float:
        return self.now

    def call_at(self, *args: Any, **keywords: Any) -> asyncio.TimerHandle:
        self.timers += 1
        return super().call_at(*args, **keywords)

    def _jump(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits for ever"
        self.now += max(timeout, 0)
        self.turns += 1
        self.on_turn(self.turns)
        return self._select(0)


class Connected:
    """What an attempt opens."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.open = True

    def close(self) -> None:
        assert self.open
        self.open = False


class Stop(BaseException):
    """Neither an OSError nor an Exception."""


Result = Literal["wins", "fails", "raises", "interrupts", "deaf"]


class Try(NamedTuple):
    """An attempt: how long it takes (0: it does not wait at all), and how it ends.

    ``deaf`` wins at once when it is cancelled. ``closing`` is how many turns it takes to give up.
    """

    duration: float
    result: Result = "wins"
    closing: int = 0


class Course:
    """The course of one race."""

    def __init__(self, tries: Sequence[Try], delay: float | None, *, eager: bool = False) -> None:
        self.loop = JumpingLoop(eager=eager)
        self.starts: list[float] = []
        self.opened: list[Connected] = []
        self.tasks: set[asyncio.Task[Any] | None] = set()
        self.result: tuple[Connected | None, list[OSError]] | None = None
        self.error: BaseException | None = None
        self._attempts = [partial(self._attempt, number, attempt) for number, attempt in enumerate(tries)]
        self._delay = delay

    async def _attempt(self, number: int, attempt: Try) -> Connected:
        self.starts.append(self.loop.time())
        self.tasks.add(asyncio.current_task())
        connected = Connected(number)
        self.opened.append(connected)
        try:
            if attempt.duration:
                await asyncio.sleep(attempt.duration)
            if attempt.result == "fails":
                raise OSError(number, f"attempt {number}")
            if attempt.result == "raises":
                raise Stop
            if attempt.result == "interrupts":
                raise KeyboardInterrupt
        except asyncio.CancelledError:
            if attempt.result == "deaf":
                return connected
            for _ in range(attempt.closing):
                await asyncio.sleep(0)
            raise
        except BaseException:
            connected.close()
            raise
        finally:
            if isinstance(sys.exception(), asyncio.CancelledError):
                connected.close()
        return connected

    def run(self, *cancel_at: int) -> Course:
        """Run it, and cancel who waits for it in these turns of the loop."""

        async def main() -> None:
            self.result = await race(self._attempts, self._delay)
            self.open_at_return = [connected for connected in self.opened if connected.open]
            self.tasks_at_return = asyncio.all_tasks() - {self.task}

        async def settle() -> None:
            for _ in range(100):
                await asyncio.sleep(0)
            me = asyncio.current_task()
            self.left = asyncio.all_tasks() - {me}

        loop = self.loop
        self.task = task = asyncio.Task(main(), loop=loop)
        loop.on_turn = lambda turn: task.cancel() if turn in cancel_at else None
        try:
            loop.run_until_complete(task)
        except BaseException as error:
            self.error = error
        self.ended, self.turns = loop.time(), loop.turns
        if not task.done():  # KeyboardInterrupt leaves the loop, and asyncio.run then cancels the rest
            task.cancel()
            loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(settle())
        loop.close()
        return self

    @property
    def winner(self) -> int | None:
        assert self.result is not None
        connected, _ = self.result
        return None if connected is None else connected.number

    def check_clean(self) -> None:
        """Only what was returned is open, from then on; no task is left, and the loop has heard of no fault."""
        kept = [self.result[0]] if self.result and self.result[0] else []
        if self.result is not None:
            assert self.open_at_return == kept
            assert not self.tasks_at_return
        assert [connected for connected in self.opened if connected.open] == kept
        assert not self.left
        assert not self.loop.faults


# --- who starts when, and who wins --------------------------------------------------------------------------


class Scenario(NamedTuple):
    name: str
    tries: list[Try]
    starts: list[float]
    winner: int | None
    ended: float
    errors: list[int]
    delay: float | None = 0.25


SCENARIOS = [
    Scenario("nothing to try", [], [], None, 0, []),
    Scenario("one, which wins", [Try(5)], [0], 0, 5, []),
    Scenario("one, which fails", [Try(5, "fails")], [0], None, 5, [0]),
    Scenario("the first wins at once", [Try(0), Try(0)], [0], 0, 0, []),
    Scenario("the first wins in time", [Try(0.125), Try(0)], [0], 0, 0.125, []),
    Scenario("the first wins late", [Try(0.5), Try(1)], [0, 0.25], 0, 0.5, []),
    Scenario("the second overtakes", [Try(1), Try(0.125)], [0, 0.25], 1, 0.375, []),
    Scenario("the first never ends", [Try(math.inf), Try(1)], [0, 0.25], 1, 1.25, []),
    Scenario("only the last answers", [Try(math.inf)] * 3 + [Try(0.5)], [0, 0.25, 0.5, 0.75], 3, 1.25, []),
    Scenario("a failure is followed at once", [Try(0.125, "fails"), Try(1)], [0, 0.125], 1, 1.125, [0]),
    Scenario("failures without waiting", [Try(0, "fails")] * 3 + [Try(0)], [0, 0, 0, 0], 3, 0, [0, 1, 2]),
    Scenario(
        "a failure starts the delay anew",
        [Try(1), Try(0.125, "fails"), Try(1), Try(1)],
        [0, 0.25, 0.375, 0.625],
        0,
        1,
        [1],
    ),
    Scenario(
        "errors come in the order of the attempts",
        [Try(1, "fails"), Try(0.125, "fails"), Try(0.25, "fails")],
        [0, 0.25, 0.375],
        None,
        1,
        [0, 1, 2],
    ),
    Scenario("all fail late", [Try(2, "fails")] * 3, [0, 0.25, 0.5], None, 2.5, [0, 1, 2]),
    Scenario("two win in the same moment", [Try(0.5), Try(0.25)], [0, 0.25], 0, 0.5, []),
    Scenario("one wins as the other fails", [Try(0.5, "fails"), Try(0.25)], [0, 0.25], 1, 0.5, [0]),
    Scenario("no delay", [Try(1), Try(0.5), Try(0.25)], [0, 0, 0], 2, 0.25, [], delay=0),
    Scenario("one after the other", [Try(1, "fails"), Try(1, "fails"), Try(1)], [0, 1, 2], 2, 3, [0, 1], delay=None),
    Scenario("one after the other, patiently", [Try(100), Try(0)], [0], 0, 100, [], delay=None),
    Scenario("one after the other, in vain", [Try(1, "fails")] * 2, [0, 1], None, 2, [0, 1], delay=None),
    Scenario("one after the other, nothing to try", [], [], None, 0, [], delay=None),
]


@either_tasks
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_scenario(scenario: Scenario, eager: bool) -> None:
    course = Course(scenario.tries, scenario.delay, eager=eager).run()
    assert course.error is None
    assert course.result is not None
    assert course.starts == scenario.starts
    assert (course.winner, course.ended) == (scenario.winner, scenario.ended)
    assert [(error.errno, error.strerror) for error in course.result[1]] == [
        (number, f"attempt {number}") for number in scenario.errors
    ]
    course.check_clean()


def by_the_rfc(tries: Sequence[Try], delay: float) -> tuple[int | None, float, list[float], list[int]]:
    """Return what section 5 says: the winner, when it wins, when each starts, and who has failed by then."""
    running: list[tuple[float, int]] = []
    starts: list[float] = []
    errors: list[int] = []
    timer = ended = 0.0
    while True:
        number = len(starts)
        if number < len(tries) and (not running or timer <= running[0][0]):
            starts.append(timer)
            heapq.heappush(running, (timer + tries[number].duration, number))
            timer += delay
            continue
        if not running:
            return None, ended, starts, sorted(errors)
        ended, number = heapq.heappop(running)
        if tries[number].result == "wins":
            return number, ended, starts, sorted(errors)
        errors.append(number)
        timer = ended


@st.composite
def some_tries(draw: st.DrawFn) -> list[Try]:
    """Up to six, of durations whose sums are never the same: what happens in one moment is in the table above."""
    ends = draw(st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["wins", "fails"])), max_size=6))
    return [Try(eighths / 8 + 2.0 ** -(i + 5), result) for i, (eighths, result) in enumerate(ends)]  # type: ignore[arg-type]


@given(some_tries(), st.sampled_from([0.25, 0.5, 2.0]), st.sampled_from(EAGER))
def test_any_race_goes_by_the_rfc(tries: list[Try], delay: float, eager: bool) -> None:
    course = Course(tries, delay, eager=eager).run()
    assert course.result is not None
    errors = sorted(error.errno or 0 for error in course.result[1])
    assert (course.winner, course.ended, course.starts, errors) == by_the_rfc(tries, delay)
    course.check_clean()


@either_tasks
@pytest.mark.parametrize(
    ("tries", "delay"), [([Try(1)], 0.25), ([Try(1, "fails")], 0.25), ([Try(1, "fails"), Try(1)], None)]
)
def test_no_machinery_where_nothing_is_raced(tries: list[Try], delay: float | None, eager: bool) -> None:
    course = Course(tries, delay, eager=eager).run()
    assert course.tasks == {course.task}  # that of the caller
    assert course.loop.timers == len(tries)  # those of the attempts' own sleep


@either_tasks
def test_the_first_attempt_is_made_by_whoever_asks(eager: bool) -> None:
    """In time, it costs a timer and no task; when the delay is over, each further one has a task."""
    course = Course([Try(0.125), Try(1)], 0.25, eager=eager).run()
    assert (course.tasks, course.loop.timers) == ({course.task}, 2)  # one of them is its own sleep
    course = Course([Try(1), Try(1), Try(1)], 0.25, eager=eager).run()
    assert len(course.tasks) == 3
    assert course.task in course.tasks


# --- nothing is left ----------------------------------------------------------------------------------------

CANCELLED = [
    ("one", [Try(0.5)], 0.25),
    ("one after the other", [Try(0.5, "fails"), Try(0.5)], None),
    ("a winner and two losers", [Try(1), Try(1, closing=2), Try(0.125)], 0.25),
    ("losers that win as well", [Try(1, "deaf"), Try(1, "deaf"), Try(0.125)], 0.25),
    ("winners in the same moment", [Try(0.75), Try(0.5), Try(0.25), Try(9)], 0.25),
    ("winners at once", [Try(0), Try(0)], 0.25),
    ("failures", [Try(0.125, "fails"), Try(0, "fails"), Try(1, "fails", closing=3)], 0.25),
    ("an exception", [Try(1, closing=2), Try(0.25, "raises"), Try(1, "deaf")], 0.25),
]
cancelled = pytest.mark.parametrize(
    ("tries", "delay"), [row[1:] for row in CANCELLED], ids=[row[0] for row in CANCELLED]
)


@either_tasks
@cancelled
def test_cancelled_in_any_turn(tries: list[Try], delay: float | None, eager: bool) -> None:
    turns = Course(tries, delay, eager=eager).run().turns
    assert turns < 100
    for turn in range(1, turns + 1):
        course = Course(tries, delay, eager=eager).run(turn)
        assert (course.result is None) == (course.error is not None)
        course.check_clean()
    assert isinstance(Course(tries, delay, eager=eager).run(1).error, (asyncio.CancelledError, type(None)))


@either_tasks
@cancelled
def test_cancelled_once_more_in_any_turn(tries: list[Try], delay: float | None, eager: bool) -> None:
    turns = Course(tries, delay, eager=eager).run().turns
    for first in range(1, turns + 1):
        for second in count(first + 1):
            course = Course(tries, delay, eager=eager).run(first, second)
            course.check_clean()
            if course.turns < second:
                break


def test_a_cancelled_race_is_cancelled() -> None:
    course = Course([Try(math.inf), Try(math.inf)], 0.25).run(10)
    assert isinstance(course.error, asyncio.CancelledError)
    course.check_clean()


@either_tasks
@pytest.mark.parametrize("delay", [0.25, None])
@pytest.mark.parametrize("duration", [0, 0.5])
def test_what_is_no_oserror_ends_the_race(delay: float | None, duration: float, eager: bool) -> None:
    tries = [Try(duration, "raises"), Try(1), Try(1)]
    course = Course(tries, delay, eager=eager).run()
    assert isinstance(course.error, Stop)
    assert course.ended == duration
    course.check_clean()


@either_tasks
def test_an_interrupt_leaves_nothing_either(eager: bool) -> None:
    course = Course([Try(9, closing=2), Try(0.125, "interrupts"), Try(9, "deaf")], 0.0625, eager=eager).run()
    assert isinstance(course.error, KeyboardInterrupt)
    course.check_clean()


# --- real sockets -------------------------------------------------------------------------------------------


@pytest.fixture
def full() -> Iterator[socket.socket]:
    """A listener that never answers: the kernel drops what comes once its queue holds one connection."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        yield listener


async def slow() -> Connected:
    await asyncio.sleep(60)
    raise AssertionError


@pytest.mark.anyio
@pytest.mark.parametrize("order", ["cancelled first", "overtaken first"])
async def test_a_cancellation_is_its_callers_own_also_in_the_turn_of_an_overtaking(order: str) -> None:
    """Structured concurrency knows its own cancellation by the very exception."""
    won = Connected(1)

    async def quick() -> Connected:
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        if order == "cancelled first":  # before the callbacks of this task
            loop.call_soon(scope.cancel)
        else:
            loop.call_soon(loop.call_soon, scope.cancel)
        return won

    with anyio.CancelScope() as scope:
        await race([slow, quick], 0.01)
        await asyncio.sleep(1)
    assert scope.cancelled_caught
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    if order == "cancelled first":
        assert not won.open


@pytest.mark.anyio
async def test_the_message_of_a_cancellation_is_the_callers() -> None:
    won = Connected(1)

    async def quick() -> Connected:
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(task.cancel, "mine")
        return won

    task = asyncio.ensure_future(race([slow, quick], 0.01))
    with pytest.raises(asyncio.CancelledError, match="mine"):
        await task
    assert not won.open


@pytest.mark.anyio
@pytest.mark.parametrize("delay", [0.01, 0])
async def test_connecting_for_real(full: socket.socket, delay: float) -> None:
    loop = asyncio.get_running_loop()
    with (
        socket.create_server(("127.0.0.2", 0)) as good,
        socket.socket() as refusing,
    ):
        refusing.bind(("127.0.0.3", 0))

        async def attempt(listener: socket.socket) -> socket.socket:
            host, port = listener.getsockname()
            target = Target.of(ip_address(host), port)
            sock = open_bound(Binding(), target)
            try:
                await connect(loop, sock, target)
            except BaseException:
                sock.close()
                raise
            return sock

        attempts: list[Callable[[], Awaitable[socket.socket]]]
        attempts = [partial(attempt, listener) for listener in (refusing, full, good, good)]
        winner, errors = await race(attempts, delay)
        assert winner is not None
        with winner:
            assert winner.getpeername() == good.getsockname()
        assert [type(error) for error in errors] == [ConnectionRefusedError]


# --- the order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_family_count", "given_order", "expected"),
    [
        (1, "", ""),
        (1, "a", "a"),
        (1, "abc", "abc"),
        (1, "abcAB", "aAbBc"),
        (1, "ABCa", "AaBC"),
        (1, "aABC", "aABC"),
        (1, "AaBbCc", "AaBbCc"),
        (1, "ABab", "AaBb"),
        (2, "abcdABC", "abAcBdC"),
        (2, "aABC", "aABC"),
        (2, "ABCDab", "ABaCbD"),
        (3, "abcdeAB", "abcAdBe"),
        (9, "abAB", "abAB"),
    ],
)
def test_interleave(first_family_count: int, given_order: str, expected: str) -> None:
    """Small letters are IPv4, capitals IPv6."""

    def targets(order: str) -> list[Target]:
        ips = (f"192.0.2.{ord(c) - 96}" if c.islower() else f"2001:db8::{ord(c) - 64}" for c in order)
        return [Target.of(ip_address(ip), 80) for ip in ips]

    assert interleave(targets(given_order), first_family_count) == targets(expected)
    if first_family_count == 1:
        assert interleave(targets(given_order)) == targets(expected)
