"""Each source in its turn: exactly, and no further than it is asked."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiobind import Policy, RoundRobin, SourceView, parse_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aiobind import Source


class View(NamedTuple):
    source: Source
    connections: int = 0
    in_use: int = 0


A, B, C = VIEWS = tuple(View(parse_source(f"192.0.2.{i}")) for i in (1, 2, 3))


class Watched(tuple[Any, ...]):
    """A sequence that knows how often it was looked into."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        raise AssertionError("it went through all of them")


def firsts(policy: Policy, count: int, views: Sequence[SourceView] = VIEWS) -> list[SourceView]:
    return [next(iter(policy.order(views, "example.com"))) for _ in range(count)]


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


@pytest.mark.parametrize("count", [1, 1000])
def test_choosing_costs_the_same_for_any_number(count: int) -> None:
    views = Watched(View(parse_source(f"10.0.{i // 250}.{i % 250 + 1}")) for i in range(count))
    policy = RoundRobin()
    for i in range(1, 50):
        next(policy.order(views, ""))
        assert views.looks == i


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
