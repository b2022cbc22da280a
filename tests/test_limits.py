"""No place is lost, none is given twice, nobody overtakes, and no second has too many connects."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import queue as queues
import random
import sys
import threading
import tracemalloc
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiolimiter  # noqa: F401 - it reads its version from a file when it is imported, which no test may do on the loop
import pytest
import uvloop

from aiobind._limits import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

HOST, OTHER = "a.example", "b.example"


class Origin:
    """A source, as good as any: it is itself and nothing else."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


A, B, C = ABC = tuple(Origin(name) for name in "ABC")


async def turns(count: int = 5) -> None:
    """Let everybody go on who can."""
    for _ in range(count):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def queue(limits: Limits[Origin], *waiters: tuple[str, Sequence[Origin], str]) -> AsyncIterator[Queue]:
    """Have them wait in this order: a name, the sources, the host."""
    made = Queue(limits)
    try:
        for waiter in waiters:
            await made.add(*waiter)
        yield made
    finally:
        for task in made.tasks.values():
            task.cancel()
        await asyncio.wait(made.tasks.values())


class Queue:
    def __init__(self, limits: Limits[Origin]) -> None:
        self.limits = limits
        self.served: list[tuple[str, Origin]] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def add(self, name: str, sources: Sequence[Origin], host: str) -> None:
        async def wait() -> None:
            self.served.append((name, await self.limits.wait(sources, host)))

        self.tasks[name] = asyncio.create_task(wait())
        await turns(1)

    async def after(self, *released: tuple[Origin, str]) -> list[tuple[str, Origin]]:
        """Who is served when these places are given back."""
        self.served.clear()
        for source, host in released:
            self.limits.release(source, host)
        await turns()
        return self.served


def take_all(limits: Limits[Origin], *places: tuple[Origin, str]) -> None:
    for source, host in places:
        assert limits.take(source, host)


def nothing_is_kept(limits: Limits[Origin]) -> bool:
    limits._settle()
    return not (limits._held or limits._held_at or limits._lines or limits._ended)


# ── options ──


@pytest.mark.parametrize(
    ("option", "public"),
    [("connections", "limit_per_source"), ("connections_per_host", "limit_per_source_host")],
)
@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (1.0, TypeError), ("5", TypeError), (None, TypeError), (True, TypeError)],
)
def test_a_number_of_connections(option: str, public: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{public} is a number of connections, .*not {value!r}$"):
        Limits(**{option: value})


@pytest.mark.parametrize(("option", "public"), [("rate", "rate_per_source"), ("rate_per_host", "rate_per_source_host")])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((value, ValueError) for value in (0, 0.0, -1, -0.5, math.inf, math.nan, 5e-324, 10**400)),
        *((value, TypeError) for value in ("5", True, 1j, (1, 2))),
    ],
)
def test_a_rate(option: str, public: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{public} is a number of connects per second, "):
        Limits(**{option: value})


@pytest.mark.parametrize(
    ("options", "limited", "paced"),
    [
        ({}, False, False),
        ({"connections": 1}, True, False),
        ({"connections_per_host": 1}, True, False),
        ({"rate": 1}, False, True),
        ({"rate_per_host": 0.5}, False, True),
        ({"connections": 0, "rate": None}, False, False),
    ],
)
def test_what_is_limited(options: dict[str, Any], limited: bool, paced: bool) -> None:
    limits: Limits[Origin] = Limits(**options)
    assert (limits.limited, limits.paced) == (limited, paced)


def test_no_limiter_is_needed_for_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiolimiter", None)
    Limits(connections=1, connections_per_host=1)
    for option in ("rate", "rate_per_host"):
        with pytest.raises(ImportError, match=r'rate_per_source and .*"aiobind\[limits\]"'):
            Limits(**{option: 1})  # type: ignore[arg-type]


def test_without_limits_there_is_always_a_place() -> None:
    limits: Limits[Origin] = Limits()
    take_all(limits, *[(A, HOST)] * 1000)
    limits.release(A, HOST)
    assert nothing_is_kept(limits)


# ── places ──


def test_places_of_a_source() -> None:
    limits: Limits[Origin] = Limits(connections=2)
    take_all(limits, (A, HOST), (A, OTHER), (B, HOST))
    assert not limits.take(A, HOST)
    limits.release(A, OTHER)
    assert limits.take(A, HOST)
    assert not limits.take(A, HOST)
    assert limits.take(B, HOST)


def test_places_of_a_host() -> None:
    limits: Limits[Origin] = Limits(connections_per_host=1)
    take_all(limits, (A, HOST), (A, OTHER), (B, HOST))
    assert not limits.take(A, HOST)
    limits.release(B, HOST)
    assert not limits.take(A, HOST)
    limits.release(A, HOST)
    assert limits.take(A, HOST)


def test_places_of_both() -> None:
    limits: Limits[Origin] = Limits(connections=2, connections_per_host=1)
    take_all(limits, (A, HOST))
    assert not limits.take(A, HOST)
    take_all(limits, (A, OTHER))
    assert not limits.take(A, "c.example")


def test_nothing_is_kept_of_what_is_not_held() -> None:
    limits: Limits[Origin] = Limits(connections=3, connections_per_host=2)
    for i in range(1000):
        take_all(limits, (A, f"host{i}"))
        limits.release(A, f"host{i}")
    assert nothing_is_kept(limits)


@pytest.mark.anyio
async def test_wait_takes_what_there_is_at_once() -> None:
    limits: Limits[Origin] = Limits(connections=1)
    assert [await limits.wait(ABC, HOST) for _ in ABC] == [A, B, C]


@pytest.mark.anyio
async def test_wait_needs_something_to_wait_for() -> None:
    with pytest.raises(ValueError, match="no source"):
        await Limits[Origin](connections=1).wait((), HOST)


@pytest.mark.anyio
async def test_first_come_first_served() -> None:
    limits: Limits[Origin] = Limits(connections=1)
    take_all(limits, (A, HOST), (B, HOST))
    async with queue(limits, ("1", ABC[:2], HOST), ("2", ABC[:2], OTHER), ("3", ABC[:2], HOST)) as waiting:
        assert await waiting.after((B, HOST)) == [("1", B)]
        assert await waiting.after((A, HOST), (B, HOST)) == [("2", A), ("3", B)]


@pytest.mark.anyio
async def test_who_cannot_use_a_place_does_not_block_those_behind() -> None:
    limits: Limits[Origin] = Limits(connections=2, connections_per_host=1)
    take_all(limits, (A, HOST), (A, OTHER), (B, HOST), (B, OTHER))
    waiters = [("full host", (A, B), HOST), ("other source", (B,), "c"), ("any", (A, B), "c"), ("last", (A,), OTHER)]
    async with queue(limits, *waiters) as waiting:
        assert await waiting.after((A, OTHER)) == [("any", A)]
        assert await waiting.after((A, HOST)) == [("full host", A)]
        assert await waiting.after((B, OTHER)) == [("other source", B)]
        assert await waiting.after((A, HOST)) == [("last", A)]


@pytest.mark.anyio
async def test_first_come_first_served_over_different_wishes() -> None:
    limits: Limits[Origin] = Limits(connections=1, connections_per_host=1)
    take_all(limits, (A, HOST), (B, HOST), (C, HOST))
    waiters = [("1", [A, B], "x"), ("2", (A,), "y"), ("3", (C, A), "x"), ("4", [B, A], "x"), ("5", (A,), "y")]
    async with queue(limits, *waiters) as waiting:
        order = []
        for host in (HOST, "x", "y", "x", "x"):
            order += await waiting.after((A, host))
        assert order == [(name, A) for name in "12345"]


@pytest.mark.anyio
async def test_the_sources_to_wait_for_may_change() -> None:
    limits: Limits[Origin] = Limits(connections=1)
    take_all(limits, (A, HOST), (B, HOST))
    sources = [A]
    async with queue(limits, ("1", sources, HOST)) as waiting:
        sources[:] = [B]
        await waiting.add("2", sources, HOST)
        assert await waiting.after((B, HOST), (A, HOST)) == [("2", B), ("1", A)]


@pytest.mark.anyio
async def test_nobody_overtakes() -> None:
    limits: Limits[Origin] = Limits(connections=1)
    take_all(limits, (A, HOST))
    async with queue(limits, ("1", (A,), HOST)) as waiting:
        limits.release(A, HOST)
        assert not limits.take(A, HOST)  # before the other has come to know of it
        assert await limits.wait((A, B), HOST) is B
        assert await waiting.after() == [("1", A)]


@pytest.mark.anyio
async def test_one_may_pass_who_takes_nothing_away() -> None:
    limits: Limits[Origin] = Limits(connections=2, connections_per_host=1)
    take_all(limits, (A, HOST))
    async with queue(limits, ("1", (A,), HOST)) as waiting:
        take_all(limits, (A, OTHER))
        assert await waiting.after((A, HOST)) == [("1", A)]


@pytest.mark.anyio
async def test_a_waiter_who_gives_up_leaves_the_line() -> None:
    limits: Limits[Origin] = Limits(connections=1)
    take_all(limits, (A, HOST))
    async with queue(limits, ("1", (A,), HOST), ("2", (A,), HOST), ("3", (A,), HOST)) as waiting:
        waiting.tasks["2"].cancel()
        await turns()
        waiting.tasks["1"].cancel()  # and is not yet awake
        assert await waiting.after((A, HOST)) == [("3", A)]
    limits.release(A, HOST)
    assert nothing_is_kept(limits)


@pytest.mark.anyio
async def test_a_place_given_in_the_moment_of_giving_up_goes_on_to_the_next() -> None:
    limits: Limits[Origin] = Limits(connections=1)
    take_all(limits, (A, HOST))
    async with queue(limits, ("1", (A,), HOST), ("2", (A,), OTHER)) as waiting:
        limits.release(A, HOST)
        limits._settle()  # it is given to the first now,
        waiting.tasks["1"].cancel()  # who does not want it any more
        assert await waiting.after() == [("2", A)]
        waiting.served.clear()
    limits.release(A, OTHER)
    assert nothing_is_kept(limits)


@pytest.mark.anyio
async def test_a_time_out_is_a_cancellation() -> None:
    limits: Limits[Origin] = Limits(connections=1, rate=0.001)
    take_all(limits, (A, HOST))
    await limits.pace(A, HOST)
    for waits in (limits.wait((A,), HOST), limits.pace(A, HOST)):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await waits
    limits.release(A, HOST)
    assert limits.waiting(A) == 0
    assert nothing_is_kept(limits)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_place_is_given_back_from_any_thread(run: Callable[..., None]) -> None:
    async def main() -> None:
        limits: Limits[Origin] = Limits(connections=1)
        take_all(limits, (A, HOST))
        async with queue(limits, ("1", (A,), HOST)) as waiting:
            thread = threading.Thread(target=limits.release, args=(A, HOST))
            thread.start()
            async with asyncio.timeout(10):
                await waiting.tasks["1"]
            thread.join()
            assert waiting.served == [("1", A)]

    run(main())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_threads_give_back_as_fast_as_they_can(run: Callable[..., None]) -> None:
    limits: Limits[Origin] = Limits(connections=3, connections_per_host=2)
    ended: queues.SimpleQueue[tuple[Origin, str] | None] = queues.SimpleQueue()

    def give_back() -> None:
        while (place := ended.get()) is not None:
            limits.release(*place)

    async def main() -> None:
        async with asyncio.timeout(30):
            for i in range(2000):
                host = f"{i % 2}"
                ended.put((await limits.wait(ABC[:2], host), host))

    threads = [threading.Thread(target=give_back) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        run(main())
    finally:
        for _ in threads:
            ended.put(None)
        for thread in threads:
            thread.join()
    assert nothing_is_kept(limits)


@pytest.mark.anyio
async def test_a_place_given_back_in_the_moment_of_getting_in_line() -> None:
    limits: Limits[Origin] = Limits(connections=1)
    take_all(limits, (A, HOST))

    def another_thread() -> Iterator[int]:
        limits.release(A, HOST)  # sees nobody in line
        yield 0

    limits._arrivals = another_thread()  # type: ignore[assignment]
    async with asyncio.timeout(10):
        assert await limits.wait((A,), HOST) is A


def test_the_collector_may_give_back_amid_any_statement() -> None:
    limits: Limits[Origin] = Limits(connections=10**9, connections_per_host=10**9)

    class Connection:
        def __init__(self) -> None:
            assert limits.take(A, HOST)
            self.itself = self  # so that only the collector ends it

        def __del__(self) -> None:
            limits.release(A, HOST)

    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(3000):
            Connection()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert nothing_is_kept(limits)


# ── close ──


@pytest.mark.anyio
async def test_close_ends_all_who_wait() -> None:
    limits: Limits[Origin] = Limits(connections=1, rate=0.001, rate_per_host=0.001)
    take_all(limits, (A, HOST))
    await limits.pace(A, HOST)
    waits = [limits.wait((A,), HOST), limits.wait((A,), OTHER), *(limits.pace(A, host) for host in (HOST, OTHER, HOST))]
    tasks = [asyncio.ensure_future(waiting) for waiting in waits]
    await turns()
    limits.close()
    limits.close()
    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [(RuntimeError, "the connector is closed")] * 5
    for late in (limits.wait((B,), HOST), limits.pace(B, HOST)):
        with pytest.raises(RuntimeError, match="the connector is closed"):
            await late
    limits.release(A, HOST)
    assert nothing_is_kept(limits)
    assert limits.waiting(A) == 0


@pytest.mark.anyio
async def test_a_place_given_in_the_moment_of_closing_is_given_back() -> None:
    limits: Limits[Origin] = Limits(connections=1)
    take_all(limits, (A, HOST))
    async with queue(limits, ("1", (A,), HOST)) as waiting:
        limits.release(A, HOST)
        limits._settle()
        limits.close()
        assert await waiting.after() == []
        with pytest.raises(RuntimeError, match="closed"):
            await waiting.tasks["1"]
    assert nothing_is_kept(limits)


def test_close_without_a_loop_or_after_it() -> None:
    limits: Limits[Origin] = Limits(connections=1)
    limits.close()
    limits = Limits(connections=1)
    take_all(limits, (A, HOST))

    async def give_up() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(limits.wait((A,), HOST), 0.001)

    asyncio.run(give_up())
    limits.release(A, HOST)
    limits.close()
    assert nothing_is_kept(limits)


# ── many at random ──


@pytest.mark.anyio
@pytest.mark.parametrize(("connections", "per_host"), [(3, 0), (0, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("seed", range(3))
async def test_no_place_is_lost_or_given_twice(connections: int, per_host: int, seed: int) -> None:
    rng = random.Random(f"{connections} {per_host} {seed}")
    limits: Limits[Origin] = Limits(connections=connections, connections_per_host=per_host)
    held: Counter[tuple[Origin, str]] = Counter()
    granted = 0

    async def connection() -> None:
        nonlocal granted
        sources, host = rng.choice([ABC, ABC, ABC[:2], (A,), (C,)]), rng.choice("xyz")
        if not rng.randrange(3) and limits.take(sources[0], host):
            source = sources[0]
        else:
            source = await limits.wait(sources, host)
            assert source in sources
        granted += 1
        held[source, host] += 1
        assert not per_host or held[source, host] <= per_host
        assert not connections or sum(held[source, name] for name in "xyz") <= connections
        try:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        finally:
            held[source, host] -= 1
            limits.release(source, host)

    tasks: list[asyncio.Task[None]] = []
    for _ in range(400):
        tasks += [asyncio.create_task(connection()) for _ in range(rng.randrange(4))]
        for task in rng.sample(tasks[-40:], min(len(tasks), rng.randrange(4))):
            task.cancel()
        if rng.randrange(2):
            await asyncio.sleep(0)
    # Whoever is left is served, though each place comes by others who may be cancelled in that very moment.
    async with asyncio.timeout(20):
        await asyncio.wait(tasks)
    assert not [task for task in tasks if not task.cancelled() and task.exception()]
    assert granted > 200
    assert not held.total()
    assert nothing_is_kept(limits)
    take_all(limits, *[(A, "x")] * (per_host or connections))


@pytest.mark.anyio
async def test_the_order_is_that_of_a_plain_queue() -> None:
    # Against the rule itself: of those who can use the place, the one who came first.
    rng = random.Random(11)
    limits: Limits[Origin] = Limits(connections=2, connections_per_host=1)
    places = [(source, host) for source in ABC for host in "xy"]
    take_all(limits, *places)
    expected: list[tuple[str, Sequence[Origin], str]] = []
    wishes = [ABC, ABC[:2], (A,), (B,), (C,), (C, A)]
    async with queue(limits) as waiting:
        for i in range(300):
            one = (str(i), rng.choice(wishes), rng.choice("xyz"))
            expected.append(one)
            await waiting.add(*one)
            if rng.randrange(4) == 0:
                gone = expected.pop(rng.randrange(len(expected)))
                waiting.tasks[gone[0]].cancel()
            if rng.randrange(3):
                source, host = places.pop(rng.randrange(len(places)))
                taken = {name for at, name in places if at is source}
                can = [one for one in expected if source in one[1] and one[2] not in taken]
                served = await waiting.after((source, host))
                assert served == ([(can[0][0], source)] if can else [])
                if can:
                    expected.remove(can[0])
                    places.append((source, can[0][2]))
                else:
                    take_all(limits, (source, host))
                    places.append((source, host))


def test_taking_costs_the_same_for_any_number_of_sources() -> None:
    limits: Limits[Origin] = Limits(connections=2, connections_per_host=2)
    for i in range(1000):
        take_all(limits, (Origin(str(i)), HOST))

    def calls() -> int:
        found = 0

        def count(*_: object) -> None:
            nonlocal found
            found += 1

        sys.setprofile(count)
        limits.take(A, HOST)
        limits.release(A, HOST)
        sys.setprofile(None)
        return found

    assert calls() <= 20
    assert calls() <= 40  # with the place that was given back before


# ── turns ──


async def times(limits: Limits[Origin], where: Iterable[tuple[Origin, str]]) -> list[tuple[Origin, str, float]]:
    """When each has its turn, all of them having come at the same time."""
    loop = asyncio.get_running_loop()
    found: list[tuple[Origin, str, float]] = []

    async def connect(source: Origin, host: str) -> None:
        await limits.pace(source, host)
        found.append((source, host, loop.time()))

    async with asyncio.TaskGroup() as group:
        for source, host in where:
            group.create_task(connect(source, host))
    return found


def assert_rate(moments: list[float], rate: float) -> None:
    """Not more than so many, in any one second and over all."""
    whole = math.ceil(rate)
    for first, later in zip(moments, moments[whole:], strict=False):
        assert later - first >= whole / rate - 0.002  # the clocks count in milliseconds
    # the first second has no more of them than the others
    assert moments[-1] - moments[0] >= (len(moments) - 1) / rate - 0.06


@pytest.mark.anyio
@pytest.mark.parametrize(("rate", "count"), [(20, 7), (20, 26), (100, 130), (1.5, 2), (2000, 2500)])
async def test_no_second_has_more_connects_than_the_rate(rate: float, count: int) -> None:
    limits: Limits[Origin] = Limits(rate=rate)
    found = await times(limits, [(A, f"{i}") for i in range(count)])
    assert [host for _, host, _ in found] == [f"{i}" for i in range(count)]
    assert_rate([moment for *_, moment in found], rate)


@pytest.mark.anyio
async def test_the_rate_is_each_sources_own() -> None:
    limits: Limits[Origin] = Limits(rate=0.01)
    async with asyncio.timeout(30):
        assert [source for source, *_ in await times(limits, [(A, HOST), (B, HOST), (C, HOST)])] == [A, B, C]


@pytest.mark.anyio
async def test_the_rate_of_a_host() -> None:
    limits: Limits[Origin] = Limits(rate_per_host=20)
    found = await times(limits, [(A, HOST), (A, OTHER), (B, HOST), *[(A, HOST), (A, OTHER)] * 5])
    for place in ((A, HOST), (A, OTHER), (B, HOST)):
        assert_rate([moment for *at, moment in found if tuple(at) == place], 20)
    assert [tuple(at) for *at, _ in found[:3]] == [(A, HOST), (A, OTHER), (B, HOST)]


@pytest.mark.anyio
async def test_both_rates_hold_at_the_moment_of_the_connect() -> None:
    # The hosts' turns come while the source's line is long; when it gets shorter they must not come closer.
    limits: Limits[Origin] = Limits(rate=40, rate_per_host=10)
    found = await times(limits, [(A, host) for host in ("x", "x", *map(str, range(12)), "x", "y", "y", "x")])
    assert_rate([moment for *_, moment in found], 40)
    for host in ("x", "y"):
        moments = [moment for _, at, moment in found if at == host]
        assert all(later - first >= 0.1 - 0.002 for first, later in itertools.pairwise(moments))


@pytest.mark.anyio
async def test_a_host_that_has_to_wait_blocks_no_other() -> None:
    limits: Limits[Origin] = Limits(rate=1000, rate_per_host=0.001)
    await limits.pace(A, HOST)
    stuck = asyncio.create_task(limits.pace(A, HOST))
    await turns()
    async with asyncio.timeout(10):
        await limits.pace(A, OTHER)
    assert not stuck.done()
    assert limits.waiting(A) == 1
    stuck.cancel()
    await asyncio.wait([stuck])


@pytest.mark.anyio
async def test_who_waits_for_the_source_does_not_use_up_the_hosts_turn() -> None:
    limits: Limits[Origin] = Limits(rate=10, rate_per_host=0.001)
    await limits.pace(A, OTHER)
    waiting = asyncio.create_task(limits.pace(A, HOST))
    await turns()
    assert waiting.cancel()
    await asyncio.wait([waiting])
    async with asyncio.timeout(10):
        await limits.pace(A, HOST)


@pytest.mark.anyio
async def test_waiting_for_the_hosts_turn_does_not_use_it_up() -> None:
    limits: Limits[Origin] = Limits(rate_per_host=20)
    await limits.pace(A, HOST)
    turn = limits._by_host._turns[A, HOST]
    assert not turn.limiter.has_capacity()
    await turn.come()
    assert turn.limiter.has_capacity()


@pytest.mark.anyio
async def test_a_twentieth_of_a_seconds_connects_may_pass_together() -> None:
    limits: Limits[Origin] = Limits(rate=100)
    for _ in range(6):
        assert limits.ready(A, HOST)
        await limits.pace(A, HOST)


@pytest.mark.anyio
async def test_ready_and_waiting() -> None:
    limits: Limits[Origin] = Limits(rate=5, rate_per_host=0.001)
    assert limits.ready(A, HOST)
    await limits.pace(A, HOST)
    assert limits.waiting(A) == 0
    assert [limits.ready(*at) for at in ((A, HOST), (A, OTHER), (B, HOST))] == [False, False, True]
    tasks = [asyncio.create_task(limits.pace(A, host)) for host in (HOST, OTHER, HOST)]
    await turns()
    assert [limits.waiting(source) for source in ABC] == [3, 0, 0]
    await tasks[1]
    assert limits.waiting(A) == 2
    while not limits._by_source._turns[A].limiter.has_capacity():
        await asyncio.sleep(0.05)
    assert [limits.ready(*at) for at in ((A, HOST), (A, OTHER), (A, "c"))] == [False, False, True]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert limits.waiting(A) == 0


@pytest.mark.anyio
async def test_nobody_overtakes_who_waits_for_his_turn() -> None:
    limits: Limits[Origin] = Limits(rate=10)
    await limits.pace(A, HOST)
    order: list[str] = []

    async def connect(name: str) -> None:
        await limits.pace(A, HOST)
        order.append(name)

    waiting = asyncio.create_task(connect("first"))
    await turns()
    # There is room now, and the one who waits has not been told of it.
    limits._by_source._turns[A].limiter._level = 0.0
    assert not limits.ready(A, HOST)
    async with asyncio.timeout(10):
        await connect("second")
    await waiting
    assert order == ["first", "second"]


@pytest.mark.anyio
async def test_without_rates_it_is_always_ones_turn() -> None:
    limits: Limits[Origin] = Limits(connections=1)
    assert limits.ready(A, HOST)
    for _ in range(100):
        await limits.pace(A, HOST)


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(2))
async def test_no_turn_is_lost_by_giving_up(seed: int) -> None:
    rng = random.Random(seed)
    limits: Limits[Origin] = Limits(rate=200, rate_per_host=150)
    loop = asyncio.get_running_loop()
    passed: dict[Origin, list[float]] = {A: [], B: []}
    order: dict[tuple[Origin, str], list[int]] = {}

    async def connect(number: int, source: Origin, host: str) -> None:
        await limits.pace(source, host)
        passed[source].append(loop.time())
        order.setdefault((source, host), []).append(number)

    tasks: list[asyncio.Task[None]] = []
    for i in range(150):
        tasks.append(asyncio.create_task(connect(i, rng.choice((A, B)), rng.choice("xyz"))))
        if rng.randrange(3) == 0:
            rng.choice(tasks[-30:]).cancel()
        await asyncio.sleep(rng.choice((0, 0, 0.001, 0.005)))
    async with asyncio.timeout(20):
        await asyncio.wait(tasks)
    assert not [task for task in tasks if not task.cancelled() and task.exception()]
    assert sum(map(len, passed.values())) == sum(not task.cancelled() for task in tasks) > 50
    for moments in passed.values():
        assert_rate(moments, 200)
    assert all(numbers == sorted(numbers) for numbers in order.values())
    assert limits.waiting(A) == limits.waiting(B) == 0
    assert not any(turn.users or turn.lock.locked() for turn in limits._by_source._turns.values())


@pytest.mark.anyio
async def test_hosts_are_forgotten() -> None:
    limits: Limits[Origin] = Limits(rate_per_host=10_000, connections_per_host=1)
    most = 0
    for i in range(5000):
        host = f"host{i}.example"
        take_all(limits, (A, host))
        await limits.pace(A, host)
        limits.release(A, host)
        most = max(most, len(limits._by_host._turns))
        if i % 20 == 0:
            await asyncio.sleep(0.001)
    assert most < 500
    assert nothing_is_kept(limits)


@pytest.mark.anyio
async def test_a_host_with_a_long_line_keeps_no_other() -> None:
    limits: Limits[Origin] = Limits(rate_per_host=200)
    line = [asyncio.create_task(limits.pace(A, "slow")) for _ in range(1000)]
    await turns()
    for i in range(100):
        await limits.pace(A, f"host{i}.example")
        await asyncio.sleep(0.002)
    assert not line[-1].done()
    assert len(limits._by_host._turns) < 50
    for task in line:
        task.cancel()
    await asyncio.wait(line)


@pytest.mark.anyio
async def test_a_source_that_is_removed_is_forgotten() -> None:
    limits: Limits[Origin] = Limits(connections=1, rate=0.001, rate_per_host=0.001)
    take_all(limits, (A, HOST))
    for source in (A, B):
        await limits.pace(source, HOST)
    waiting = asyncio.create_task(limits.pace(A, HOST))
    await turns()
    limits.forget(A)
    limits.forget(B)
    assert not limits.take(A, HOST)  # what is held stays held,
    assert limits.waiting(A) == 1  # and who waits goes on
    assert list(limits._by_host._turns) == [(A, HOST)]
    waiting.cancel()
    await asyncio.wait([waiting])
    limits.release(A, HOST)
    limits.forget(A)
    assert not limits._by_host._turns
    assert not limits._by_source._turns
    assert nothing_is_kept(limits)
    assert limits.take(A, HOST)


def test_no_timer_is_left_behind() -> None:
    async def main() -> None:
        limits: Limits[Origin] = Limits(rate=50, rate_per_host=50)
        await times(limits, [(A, HOST)] * 3)
        waiting = asyncio.create_task(limits.pace(A, HOST))
        await turns()
        waiting.cancel()
        await asyncio.wait([waiting])
        await turns()
        loop: Any = asyncio.get_running_loop()
        assert not [timer for timer in loop._scheduled if not timer.cancelled()]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


@pytest.mark.anyio
async def test_waiting_for_turns_does_not_pile_up() -> None:
    limits: Limits[Origin] = Limits(rate=0.001, connections=1)
    take_all(limits, (A, HOST))
    await limits.pace(A, HOST)

    async def give_up(count: int) -> None:
        for _ in range(count):
            tasks = [asyncio.create_task(wait) for wait in (limits.pace(A, HOST), limits.wait((A,), HOST))]
            await turns(2)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    await give_up(50)
    tracemalloc.start()
    try:
        await give_up(20)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        await give_up(300)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 10_000
    finally:
        tracemalloc.stop()
