"""Each policy by tables: who is first, who follows, the shares, and how far it looks (counted, never timed)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiobind
from aiobind import (
    Failover,
    InvalidSource,
    LeastConnections,
    Policy,
    Random,
    RoundRobin,
    SourceView,
    Sticky,
    Weighted,
    _policy,
    parse_source,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aiobind import Source


class View(NamedTuple):
    source: Source
    connections: int = 0
    in_use: int = 0
    connecting: int = 0
    failures: int = 0


class Live:
    """A view whose figures change, and that knows how often it was looked at."""

    looks = 0

    def __init__(self, source: Source) -> None:
        self.source = source
        self.connections = 0
        self.connecting = 0
        self.failures = 0
        self.used = 0

    @property
    def in_use(self) -> int:
        Live.looks += 1
        return self.used

    def __repr__(self) -> str:
        return f"{self.source} in use {self.used} failures {self.failures}"


def some(count: int, kind: Callable[[Source], Any] = View) -> tuple[Any, ...]:
    return tuple(kind(parse_source(f"10.0.{i // 250}.{i % 250 + 1}")) for i in range(count))


A, B, C = VIEWS = tuple(View(parse_source(f"192.0.2.{i}")) for i in (1, 2, 3))
D = View(parse_source("192.0.2.4"))


class Watched(tuple[Any, ...]):
    """A sequence that knows how often it was looked into."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        for index in range(len(self)):
            yield self[index]


def firsts(policy: Policy, count: int, views: Sequence[SourceView] = VIEWS) -> list[SourceView]:
    return [next(iter(policy.order(views, "example.com"))) for _ in range(count)]


def named(texts: str) -> tuple[View, ...]:
    return tuple({"A": A, "B": B, "C": C, "D": D}[letter] for letter in texts)


def letters(views: Iterable[SourceView]) -> str:
    return "".join("ABCD"[(A, B, C, D).index(view)] for view in views)  # type: ignore[arg-type]


POLICIES: list[Callable[[], Policy]] = [
    RoundRobin,
    Random,
    Failover,
    lambda: Weighted({"192.0.2.1": 3, "192.0.2.2": 0}),
    LeastConnections,
    Sticky,
]
POLICY_NAMES = ["RoundRobin", "Random", "Failover", "Weighted", "LeastConnections", "Sticky"]


# --- what all of them promise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", POLICIES, ids=POLICY_NAMES)
def test_each_source_comes_once(make: Callable[[], Policy]) -> None:
    policy = make()
    for count in (3, 1, 2, 0, 4):
        for sources in (named("ABCD"[:count]), list(named("ABCD"[:count]))):
            for host in ("a", "b", ""):
                assert sorted(letters(policy.order(sources, host))) == sorted(letters(sources))


@pytest.mark.parametrize("make", POLICIES, ids=POLICY_NAMES)
def test_a_list_that_changes_under_its_name_is_seen_to_change(make: Callable[[], Policy]) -> None:
    policy, sources = make(), [A, B]
    assert {next(iter(policy.order(sources, "h"))) for _ in range(100)} <= {A, B}
    sources[:] = [C, D]
    for _ in range(10):
        assert set(policy.order(sources, "h")) == {C, D}


@pytest.mark.parametrize("make", POLICIES, ids=POLICY_NAMES)
@given(st.data())
def test_calls_at_the_same_time_with_sets_that_change(make: Callable[[], Policy], data: st.DataObject) -> None:
    """Each call yields what it was given, once, whatever comes between."""
    policy = make()
    sets = [named(texts) for texts in ("ABCD", "ABC", "BD", "D")]
    calls: list[tuple[tuple[View, ...], Any, list[SourceView]]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if not calls or data.draw(st.booleans()):
            sources = data.draw(st.sampled_from(sets))
            calls.append((sources, iter(policy.order(sources, data.draw(st.sampled_from("xyz")))), []))
        if isinstance(policy, LeastConnections) and data.draw(st.booleans()):
            policy.changed(View(data.draw(st.sampled_from((A, B, C, D))).source, in_use=data.draw(st.integers(0, 3))))
        if isinstance(policy, Weighted) and data.draw(st.booleans()):
            policy.weights[data.draw(st.sampled_from((A, B, C, D))).source] = data.draw(st.integers(0, 3))
        _, call, got = data.draw(st.sampled_from(calls))
        got.extend(islice(call, 1))
    for sources, call, got in calls:
        assert sorted(letters([*got, *call])) == sorted(letters(sources))


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
@pytest.mark.parametrize("make", POLICIES, ids=POLICY_NAMES)
def test_to_choose_is_to_look_at_one(make: Callable[[], Policy], count: int) -> None:
    policy = make()
    views = Watched(some(count))
    tell = getattr(policy, "changed", None)
    if tell is not None:
        tell(views[0])
    next(iter(policy.order(views, "h")))  # O(n), for the set is new
    views.looks = 0
    for i in range(1, 50):
        next(iter(policy.order(views, "h")))
        assert views.looks == i


# --- RoundRobin -----------------------------------------------------------------------------------------------


def test_round_robin_takes_turns() -> None:
    assert firsts(RoundRobin(), 7) == [A, B, C, A, B, C, A]


def test_round_robin_goes_on_to_the_others() -> None:
    policy = RoundRobin()
    orders = [list(policy.order(VIEWS, "example.com")) for _ in range(4)]
    assert orders == [[A, B, C], [B, C, A], [C, A, B], [A, B, C]]


def test_round_robin_does_not_look_at_the_host() -> None:
    policy = RoundRobin()
    assert [next(policy.order(VIEWS, host)) for host in ("a", "b", "a", "")] == [A, B, C, A]


def test_how_far_one_call_went_does_not_matter_to_the_next() -> None:
    policy = RoundRobin()
    assert list(islice(policy.order(VIEWS, ""), 2)) == [A, B]
    assert list(policy.order(VIEWS, "")) == [B, C, A]
    assert next(policy.order(VIEWS, "")) == C


def test_a_call_that_nobody_asks_takes_no_turn() -> None:
    policy = RoundRobin()
    policy.order(VIEWS, "")
    assert firsts(policy, 2) == [A, B]


def test_calls_at_the_same_time() -> None:
    policy = RoundRobin()
    one, two = policy.order(VIEWS, ""), policy.order(VIEWS, "")
    assert [next(one), next(two), next(one), next(two)] == [A, B, B, C]
    assert firsts(policy, 1) == [C]


def test_one_source() -> None:
    policy = RoundRobin()
    assert [list(policy.order((A,), "")) for _ in range(3)] == [[A]] * 3


def test_instances_are_independent() -> None:
    one, two = RoundRobin(), RoundRobin()
    assert firsts(one, 2) == firsts(two, 2) == [A, B]


def test_a_source_more_or_less() -> None:
    policy = RoundRobin()
    assert firsts(policy, 2) == [A, B]
    assert firsts(policy, 2, (A, B)) == [A, B]
    assert firsts(policy, 3, VIEWS) == [C, A, B]


@given(st.integers(1, 20), st.integers(0, 200))
def test_the_shares_are_equal(count: int, calls: int) -> None:
    views = tuple(View(parse_source(f"192.0.2.{i + 1}")) for i in range(count))
    shares = Counter(firsts(RoundRobin(), calls, views))
    assert max(shares.values(), default=0) - min((shares[view] for view in views), default=0) <= 1


def test_a_policy_is_anything_with_one_method() -> None:
    class Last:
        def order(self, sources: Sequence[SourceView], host: str) -> Iterable[SourceView]:
            return [sources[-1]]

    policy: Policy = Last()
    assert firsts(policy, 2) == [C, C]


def test_round_robin_is_exact_over_many() -> None:
    views = some(7)
    assert set(Counter(firsts(RoundRobin(), 7 * 1428, views)).values()) == {1428}
    assert set(Counter(firsts(RoundRobin(), 10_000, views)).values()) == {1428, 1429}


# --- Random ---------------------------------------------------------------------------------------------------


def chi_square(counts: Iterable[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize("seed", [1, "a", b"b"])
def test_random_is_even(seed: int | str | bytes) -> None:
    views = some(20)
    counts = Counter(firsts(Random(seed), 10_000, views))
    assert chi_square((counts[view] for view in views), 500) < 43.8  # 19 degrees of freedom, p = 0.001


def test_all_orders_of_random_are_equally_likely() -> None:
    policy = Random(1)
    counts = Counter(tuple(policy.order(named("ABCD"), "")) for _ in range(12_000))
    assert len(counts) == 24
    assert chi_square(counts.values(), 500) < 49.7  # 23 degrees of freedom, p = 0.001


def test_random_of_one_seed_is_the_same_each_time() -> None:
    assert firsts(Random(7), 50) == firsts(Random(7), 50) != firsts(Random(8), 50)
    assert firsts(Random(), 50) != firsts(Random(), 50)


# --- Failover -------------------------------------------------------------------------------------------------


def test_failover_takes_the_first_that_is_healthy_and_goes_back_to_it() -> None:
    policy = Failover()
    for healthy, order in (("ABC", "ABC"), ("BC", "BC"), ("C", "C"), ("AC", "AC"), ("ABC", "ABC")):
        assert letters(policy.order(named(healthy), "")) == order


# --- Weighted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ((1, 1, 1), "ABCABC"),
        ((5, 1, 1), "AAABAACAAABAAC"),
        ((2, 1, 1), "ABACABAC"),
        ((0.5, 0.25, 0.25), "ABACABAC"),
        ((Fraction(2, 3), Fraction(1, 3), Fraction(1, 3)), "ABACABAC"),
        ((3, 2, 0), "ABAABABAAB"),
        ((0, 0, 1), "CCCC"),
        ((0, 0, 0), "AAAA"),
        ((1e-300, 1e300, 10**300), "BCBCBC"),
        ((10**400, 10**400, 0), "ABAB"),
        ((Decimal("0.2"), 0.1, 1e-1), "ABACABAC"),
    ],
)
def test_weighted_mixes_evenly(weights: tuple[float, float, float], turns: str) -> None:
    policy = Weighted({view.source: weight for view, weight in zip(VIEWS, weights, strict=True)})
    assert letters(firsts(policy, len(turns))) == turns


def share(weights: Sequence[float]) -> list[Fraction]:
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


@pytest.mark.parametrize(
    "weights",
    [
        [1] * 7,
        [1, 2, 3, 4],
        [0.1, 0.2, 0.3],
        [100] + [1] * 100,  # stride scheduling is 25 away here
        [1000, 1, 1, 1],
        [math.pi, math.e, math.sqrt(2)],
        [1e-3, 1, 1e3],
        list(range(1, 60)),
        [7] * 30 + [13] * 30,
    ],
    ids=lambda weights: f"{weights[0]:.3g}..{weights[-1]:.3g}x{len(weights)}",
)
def test_weighted_is_never_one_away_over_10_000(weights: list[float]) -> None:
    views = some(len(weights))
    policy = Weighted({view.source: weight for view, weight in zip(views, weights, strict=True)})
    shares = dict(zip(views, map(float, share(weights)), strict=True))
    counts = dict.fromkeys(views, 0)
    for turn in range(1, 10_001):
        counts[next(iter(policy.order(views, "")))] += 1
        if turn % 101 == 0 or turn > 9_990:
            assert max(abs(counts[view] - turn * shares[view]) for view in views) < 1


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
def test_weighted_is_exact_at_the_end_of_a_cycle_and_never_one_away_within(weights: list[int]) -> None:
    views, total = some(len(weights)), sum(weights)
    policy = Weighted({view.source: weight for view, weight in zip(views, weights, strict=True)})
    counts = Counter[SourceView]()
    for turn in range(1, 2 * total + 1):
        counts[next(iter(policy.order(views, "")))] += 1
        for view, weight in zip(views, weights, strict=True):
            assert abs(counts[view] * total - turn * weight) < total
    assert [counts[view] for view in views] == [2 * weight for weight in weights]


def test_a_weight_is_the_number_that_is_written() -> None:
    """In binary, 0.1 + 0.2 is not 0.3, and a cycle would not end with the tenth choice."""
    policy, same = (
        Weighted({A.source: 0.1, B.source: 0.2, C.source: 0.7}),
        Weighted({A.source: 1, B.source: 2, C.source: 7}),
    )
    assert firsts(policy, 1000) == firsts(same, 1000)
    policy.weights[A.source], policy.weights[B.source], policy.weights[C.source] = 0.3, 0.1, 0.1
    same.weights[A.source], same.weights[B.source], same.weights[C.source] = 3, 1, 1
    assert firsts(policy, 1000) == firsts(same, 1000)
    assert policy._turns is not None
    assert policy._turns._weights == [3, 1, 1]


def test_weighted_does_not_drift() -> None:
    """As after 10**9 choices: all of its numbers are integers."""
    policy, views = Weighted({A.source: 0.1, B.source: 0.2, C.source: 0.7}), VIEWS
    firsts(policy, 1)
    turns = policy._turns
    assert turns is not None
    cycles = 10**8
    begun = letters(firsts(policy, 10, views))
    turns._slot += 10 * cycles
    for at, weight in enumerate((1, 2, 7)):
        turns._counts[at] += weight * cycles
    turns._waiting.clear(), turns._ready.clear(), turns._queues.clear()
    for at in range(3):
        turns._wait(at)
    assert letters(firsts(policy, 10, views)) == begun


def test_the_others_follow_as_their_turns_will_come_and_lose_none() -> None:
    policy = Weighted({A.source: 2, B.source: 1, C.source: 1, D.source: 0})
    orders = [letters(policy.order(named("ABCD"), "")) for _ in range(8)]
    assert orders == ["ABCD", "BCAD", "ACBD", "CABD"] * 2


def test_a_weight_changes_at_run_time() -> None:
    policy = Weighted({"192.0.2.1": 1})
    assert Counter(letters(firsts(policy, 30))) == {"A": 10, "B": 10, "C": 10}
    policy.weights["192.0.2.1"] = 4
    assert Counter(letters(firsts(policy, 60))) == {"A": 40, "B": 10, "C": 10}
    policy.weights[B.source] = 0
    assert Counter(letters(firsts(policy, 50))) == {"A": 40, "C": 10}
    del policy.weights["192.0.2.2"], policy.weights[A.source]
    assert Counter(letters(firsts(policy, 30))) == {"A": 10, "B": 10, "C": 10}


def test_the_weights_are_a_mapping_by_source() -> None:
    weights = Weighted({"host!192.0.2.1": 2, "192.0.2.1": 3, "if!eth0": 0.5}).weights
    assert dict(weights) == {A.source: 3, parse_source("if!eth0"): 0.5}
    assert (weights["192.0.2.1"], weights[A.source], weights.get("192.0.2.9", 1), len(weights)) == (3, 3, 1, 2)
    assert "192.0.2.1" in weights
    assert "192.0.2.9" not in weights
    assert repr(weights) == "{'192.0.2.1': 3, 'if!eth0': 0.5}"
    with pytest.raises(KeyError):
        del weights["192.0.2.9"]


@pytest.mark.parametrize(
    ("source", "weight", "error", "said"),
    [
        ("if!eth0", -1, ValueError, "the weight of if!eth0 is a finite number of 0 or more, not -1"),
        ("if!eth0", math.nan, ValueError, "not nan"),
        ("if!eth0", math.inf, ValueError, "not inf"),
        ("if!eth0", "3", TypeError, "the weight of if!eth0 is a number, not str"),
        ("if!eth0", None, TypeError, "not NoneType"),
        ("if!eth0", True, TypeError, "not bool"),
        ("if!eth0", 1j, TypeError, "not complex"),
        ("if!eth0", Decimal("nan"), ValueError, "not NaN"),
        ("if!eth0", Decimal("inf"), ValueError, "not Infinity"),
        ("if!eth0", Fraction(-1, 3), ValueError, "not -1/3"),
        ("eth0", 1, InvalidSource, "if!eth0"),
        (3, 1, TypeError, "a source is"),
    ],
)
def test_a_wrong_weight_is_refused_and_changes_nothing(
    source: Any, weight: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said.replace("!", ".")):
        Weighted({source: weight})
    policy = Weighted({"if!eth0": 2})
    with pytest.raises(error):
        policy.weights[source] = weight
    assert dict(policy.weights) == {parse_source("if!eth0"): 2}


def test_who_returns_is_not_flooded() -> None:
    policy = Weighted({A.source: 2})
    firsts(policy, 13)
    assert Counter(letters(firsts(policy, 10_000, named("AB")))) == {"A": 6667, "B": 3333}
    turns = letters(firsts(policy, 40, named("ABC")))
    assert "CC" not in turns
    for end in range(4, 41, 4):
        assert abs(turns[:end].count("C") - end / 4) < 2


@given(st.data())
def test_the_shares_are_right_at_once_after_each_loss_return_and_change(data: st.DataObject) -> None:
    pool = some(data.draw(st.integers(1, 8)))
    policy = Weighted({})
    weights = dict.fromkeys(pool, 1)
    for _ in range(data.draw(st.integers(1, 12))):
        for view in data.draw(st.lists(st.sampled_from(pool), max_size=3)):
            weights[view] = data.draw(st.sampled_from((0, 1, 2, 5, 100)))
            policy.weights[view.source] = weights[view]
        views = tuple(view for view in pool if data.draw(st.booleans())) or pool[:1]
        total = sum(weights[view] for view in views)
        counts = Counter[SourceView]()
        for turn in range(1, data.draw(st.sampled_from((2, 5, 30)))):
            counts[next(iter(policy.order(views, "")))] += 1
            for view in views:
                if total:
                    # Less than 1 away before, less than 1 away after: 2; and what a change itself moves.
                    assert abs(counts[view] - turn * weights[view] / total) < 3


def test_nobody_starves_while_sources_come_and_go_at_each_choice() -> None:
    views, policy = some(9), Weighted({})
    sets = [tuple(view for i, view in enumerate(views) if (i * 7 + turn * 5) % 9 > 2) for turn in range(9)]
    for view in views[:3]:
        policy.weights[view.source] = 10
    counts = Counter(next(iter(policy.order(sets[turn * turn % 9], ""))) for turn in range(9_000))
    due = Counter[SourceView]()
    for turn in range(9_000):
        present = {view: 10 if view in views[:3] else 1 for view in sets[turn * turn % 9]}
        for view, weight in present.items():
            due[view] += weight / sum(present.values())  # type: ignore[assignment]
    assert all(0.5 < counts[view] / due[view] < 1.5 for view in views), (counts, due)


def test_the_lag_of_sources_that_are_gone_is_forgotten_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_policy, "_AWAY", 5)
    policy, views = Weighted({}), some(40)
    for i in range(40):
        firsts(policy, 3, views[i : i + 2])
    assert policy._turns is not None
    assert len(policy._turns.away) == 5


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
@pytest.mark.parametrize("equal", [True, False])
def test_weighted_takes_a_logarithmic_number_of_steps(count: int, equal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each push and pop on a heap is O(log n): count them."""
    views, steps = some(count), 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            return function(*arguments)

        return call

    policy = Weighted({} if equal else {view.source: i + 1 for i, view in enumerate(views)})
    firsts(policy, 1, views)
    for name in ("heappush", "heappop"):
        monkeypatch.setattr(_policy, name, counted(getattr(_policy, name)))
    firsts(policy, 3 * count, views)
    assert steps <= 4 * 3 * count
    steps = 0
    orders = [policy.order(views, "") for _ in range(10)]
    assert all(len(list(islice(order, 4))) == min(4, count) for order in orders)
    assert steps <= 10 * 4 * 8


# --- LeastConnections -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    ("figures", "order"),
    [
        ({}, "ABC"),
        ({"A": (0, 1, 0)}, "BCA"),
        ({"A": (0, 2, 0), "B": (0, 1, 0), "C": (0, 3, 0)}, "BAC"),
        ({"A": (9, 0, 0)}, "ABC"),  # idle ones are no load
        ({"A": (0, 1, 0), "B": (0, 1, 0), "C": (0, 1, 0)}, "ABC"),
        ({"A": (0, 0, 1)}, "BCA"),
        ({"A": (0, 1, 0), "B": (0, 1, 9), "C": (0, 1, 3)}, "ACB"),
        ({"A": (0, 0, 9), "B": (0, 1, 0), "C": (0, 1, 0)}, "ABC"),
    ],
)
def test_the_least_connections(figures: dict[str, tuple[int, int, int]], order: str, told: bool) -> None:
    policy, views = LeastConnections(), tuple(Live(view.source) for view in VIEWS)
    if told:
        policy.changed(views[0])
        firsts(policy, 1, views)
    for letter, (connections, used, failures) in figures.items():
        view = views["ABC".index(letter)]
        view.connections, view.used, view.failures = connections, used, failures
        if told:
            policy.changed(view)
    assert "".join("ABC"[views.index(view)] for view in policy.order(views, "")) == order  # type: ignore[arg-type]


def ranked(views: Iterable[Live]) -> list[Live]:
    return sorted(views, key=lambda view: (view.used, view.failures))


@pytest.mark.parametrize("told", [False, True])
@given(st.data())
def test_the_least_connections_whatever_changes(told: bool, data: st.DataObject) -> None:
    pool, policy = some(data.draw(st.integers(1, 8)), Live), LeastConnections()
    views = pool
    for _ in range(data.draw(st.integers(1, 30))):
        for view in data.draw(st.lists(st.sampled_from(pool), max_size=3)):
            view.used, view.failures = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 1))
            if told:
                policy.changed(view)
        if data.draw(st.integers(0, 3)) == 0:
            views = tuple(view for view in pool if data.draw(st.booleans())) or pool
        asked = data.draw(st.integers(1, len(views)))
        sources: Sequence[SourceView] = list(views) if data.draw(st.booleans()) else views
        assert list(islice(policy.order(sources, ""), asked)) == ranked(views)[:asked]


def test_what_changes_during_a_call_counts_for_the_rest_of_it() -> None:
    policy, (a, b, c, d) = LeastConnections(), some(4, Live)
    policy.changed(a)
    call = policy.order((views := (a, b, c, d)), "")
    assert next(call) is a
    b.used = 1
    policy.changed(b)
    assert next(policy.order(views, "")) is a
    assert next(call) is c
    a.used = b.used = 0
    policy.changed(a)
    policy.changed(b)
    assert next(policy.order(views[1:], "")) is b  # another set
    d.used = -1
    assert list(call) == [d, b]


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_who_is_told_looks_at_what_has_changed_only(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, views = LeastConnections(), some(count, Live)
    policy.changed(views[0])
    firsts(policy, 1, views)
    live: list[Live] = []
    rebuilt = 0

    def sorting(loads: list[Any]) -> list[Any]:
        nonlocal rebuilt
        rebuilt += 1
        return sorted(loads)

    steps = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(_policy, "sorted", sorting, raising=False)
    for name in ("heappush", "heappop"):
        monkeypatch.setattr(_policy, name, counted(getattr(_policy, name)))
    for turn in range(4 * count + 100):
        Live.looks = 0
        view = next(iter(policy.order(views, "")))
        assert Live.looks == 0
        assert isinstance(view, Live)
        view.used += 1
        policy.changed(view)
        live.append(view)
        if turn % 3:
            view = live.pop(turn * 7 % len(live))
            view.used -= 1
            policy.changed(view)
        assert Live.looks <= 2
        assert len(policy._heap) <= 2 * count + 16
    assert steps <= 6 * (4 * count + 100)  # each O(log n)
    # It is rebuilt, which is O(n log n), after n changes or more.
    assert rebuilt <= (8 * count + 200) / (count + 16)


# --- Sticky ---------------------------------------------------------------------------------------------------

HOSTS = [f"www{i}.example.com" for i in range(2000)]


def homes(policy: Policy, views: Sequence[SourceView]) -> list[Source]:
    return [next(iter(policy.order(views, host))).source for host in HOSTS]


@pytest.mark.parametrize("count", [2, 3, 10, 50])
def test_sticky_moves_the_hosts_of_the_lost_source_only_and_gets_them_back(count: int) -> None:
    views, policy = some(count), Sticky()
    before = homes(policy, views)
    assert homes(policy, views) == before == homes(Sticky(), views[::-1])
    for lost in (views[0], views[-1]):
        left = tuple(view for view in views if view is not lost)
        after = homes(policy, left)
        assert after == homes(Sticky(), left)
        moved = [old for old, new in zip(before, after, strict=True) if old != new]
        assert set(moved) == {lost.source}
        assert len(moved) <= (1 / count + 0.02) * len(HOSTS)
        assert homes(policy, views) == before


def test_sticky_is_even() -> None:
    counts = Counter(homes(Sticky(), some(10)))
    assert chi_square(counts.values(), len(HOSTS) / 10) < 27.9  # 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize(("one", "other"), [("Example.COM", "example.com"), ("example.com.", "EXAMPLE.com")])
def test_sticky_compares_hosts_as_dns_does(one: str, other: str) -> None:
    views = some(100)
    assert list(Sticky().order(views, one)) == list(Sticky().order(views, other))


def test_sticky_is_the_same_in_every_process() -> None:
    """The order of these for this host, as it has been since the first release; a hash of Python's own has a seed."""
    program = (
        "import aiobind, types; V = lambda t: types.SimpleNamespace(source=aiobind.parse_source(t));"
        "order = aiobind.Sticky().order([V(f'192.0.2.{i}') for i in range(1, 7)], 'example.com');"
        "print(*(str(view.source)[-1] for view in order))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(aiobind.__file__).parent.parent), "PYTHONHASHSEED": "5"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "3 6 1 4 5 2\n"


def test_sticky_takes_any_text_for_a_host() -> None:
    views = (*VIEWS, View(parse_source("if!n\udcff")))
    for host in ("", ".", "münchen.example", "\udcff", "\ud800", "2001:db8::1", "x" * 100_000):
        assert len(list(Sticky().order(views, host))) == 4


@given(st.data())
def test_sticky_remembers_right(data: st.DataObject) -> None:
    """Whatever comes and goes between, the order is that of a policy that remembers nothing."""
    pool, policy = some(9), Sticky()
    views: tuple[View, ...] = pool[:3]
    for _ in range(data.draw(st.integers(1, 15))):
        for view in data.draw(st.lists(st.sampled_from(pool), max_size=4)):
            views = tuple(other for other in views if other != view) if view in views else (*views, view)
        for host in data.draw(st.lists(st.sampled_from("abcdefgh"), max_size=4)):
            asked = data.draw(st.integers(1, 9))
            assert list(islice(policy.order(views, host), asked)) == list(islice(Sticky().order(views, host), asked))


def test_the_memory_of_sticky_is_bounded_and_keeps_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_policy, "_HOSTS", 10)
    policy, views = Sticky(), some(5)
    next(policy.order(views, "often.example"))
    kept = policy._ranks[b"often.example"]
    for host in HOSTS[:100]:
        next(policy.order(views, host))
        next(policy.order(views, "often.example"))
        assert len(policy._ranks) <= 10
    assert policy._ranks[b"often.example"] is kept
    assert homes(policy, views) == homes(Sticky(), views)


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_sticky_hashes_no_more_than_it_must(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = 0
    number = Sticky._number

    def counted(*arguments: Any) -> bytes:
        nonlocal hashes
        hashes += 1
        return number(*arguments)

    monkeypatch.setattr(Sticky, "_number", counted)
    policy, views = Sticky(), some(count)

    def cost(views: Sequence[SourceView], asked: int = 1) -> int:
        nonlocal hashes
        hashes = 0
        assert len(list(islice(policy.order(views, "h"), asked))) == min(asked, len(views))
        return hashes

    assert cost(views) == count
    assert cost(views) == 0
    assert cost(views, 3) == 0  # the next best ones are known as well
    assert cost(views, 4) == max(0, count - 3)
    if count > 1:
        home = next(policy.order(views, "h"))
        left = tuple(view for view in views if view is not home)
        assert cost(left) == 0  # its own source is lost
        assert cost(left[::-1]) == 0  # the order does not matter
        assert cost(views) == 1  # who has come may be better
        assert next(policy.order(views, "h")) is home
