"""What has failed is left alone for as long as the table says, and a silence is blamed on whom others contradict."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING, Any

import pytest

from aiobind import _health
from aiobind._health import Breaker, Timeouts

if TYPE_CHECKING:
    from collections.abc import Sequence

WHY, AGAIN = OSError(errno.ENETUNREACH, "no route"), OSError(errno.ENODEV, "no device")


@pytest.fixture
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda _, most: most)


# ── Breaker ──


def test_a_new_one_stands_in_nobodys_way() -> None:
    breaker = Breaker()
    assert (breaker.failures, breaker.error, breaker.probing) == (0, None, False)
    assert not breaker.suspended(0.0)


@pytest.mark.parametrize(
    ("lengths", "failures", "expected"),
    [
        ((), [0.0], [1.0]),
        ((), [0.0, 1.0, 3.0, 7.0], [1.0, 3.0, 7.0, 15.0]),  # each as soon as the one before has ended
        ((), [0.0, 61.0], [1.0, 63.0]),  # an end alone is no success
        ((), [0.0, 61.1], [1.0, 62.1]),  # to be all right for as long as the longest one is
        ((), [0.0, 0.5, 0.999], [1.0, 1.0, 1.0]),  # what was under way says nothing new
        ((), [0.0, 0.5, 1.0], [1.0, 1.0, 3.0]),  # nor makes the next one longer
        ((), [60.0 * n for n in range(8)], [1.0, 62.0, 124.0, 188.0, 256.0, 332.0, 420.0, 480.0]),
        ((30.0, 3600.0), [0.0, 30.0, 1000.0, 4721.0], [30.0, 90.0, 1120.0, 4751.0]),
        ((5.0, 2.0), [0.0], [2.0]),
    ],
)
def test_each_suspension_is_twice_as_long(
    no_jitter: None, lengths: Sequence[float], failures: list[float], expected: list[float]
) -> None:
    breaker, ends = Breaker(*lengths), []
    for now in failures:
        breaker.failed(now, WHY)
        ends.append(breaker.until)
    assert ends == expected


def test_it_grows_no_further_however_often(no_jitter: None) -> None:
    breaker, now = Breaker(), 0.0
    for _ in range(2000):  # 2.0 ** 1024 is an OverflowError
        assert breaker.failed(now)
        now = breaker.until
    assert breaker.failures == 2000
    breaker.failed(now)
    assert breaker.until - now == 60.0


def test_the_end_is_the_first_moment_of_the_next_try(no_jitter: None) -> None:
    breaker = Breaker()
    breaker.failed(10.0)
    assert [breaker.suspended(now) for now in (10.0, 10.999, 11.0, 12.0)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("until", "probing", "due"), [(10.0, False, True), (10.1, False, False), (10.0, True, False), (9.0, False, True)]
)
def test_one_at_a_time_finds_out_how_it_is_now(until: float, *, probing: bool, due: bool) -> None:
    breaker = Breaker()
    breaker.until, breaker.probing = until, probing
    assert breaker.due(10.0) is due


def test_only_the_first_of_those_that_fail_together_counts(no_jitter: None) -> None:
    breaker = Breaker()
    assert breaker.failed(0.0, WHY) is True
    assert breaker.failed(0.9, AGAIN) is False
    assert (breaker.failures, breaker.error) == (1, WHY)
    assert breaker.failed(1.0, AGAIN) is True
    assert (breaker.failures, breaker.error) == (2, AGAIN)


@pytest.mark.parametrize(
    ("failures", "until"),
    [
        ([(0.0, 40.0)], 40.0),  # exactly: somebody has said so
        ([(0.0, 0.0)], 0.0),
        ([(0.0, 7200.0)], 7200.0),  # longer than the longest
        ([(0.0, None), (0.5, 20.0)], 20.5),  # that is news, also while it is suspended
        ([(0.0, 20.0), (1.0, 2.0)], 20.0),  # but makes nothing shorter
        ([(0.0, 20.0), (1.0, None)], 20.0),
        ([(0.0, 20.0), (20.0, None)], 21.0),  # and counts as none of those that grow
    ],
)
def test_somebody_who_knows_better(no_jitter: None, failures: list[tuple[float, float | None]], until: float) -> None:
    breaker = Breaker()
    for now, seconds in failures:
        breaker.failed(now, WHY, seconds=seconds)
    assert breaker.until == until


def test_those_that_fail_together_do_not_come_back_together() -> None:
    breakers = [Breaker(10.0) for _ in range(1000)]
    for breaker in breakers:
        breaker.failed(0.0)
    ends = sorted(breaker.until for breaker in breakers)
    assert 5.0 <= ends[0] < 5.5
    assert 9.5 < ends[-1] <= 10.0
    assert len(set(ends)) > 900


# ── Timeouts ──

T, U = "192.0.2.1:443", "192.0.2.2:443"


@pytest.mark.parametrize(
    ("rows", "blamed"),
    [
        # source, target, when it began, when it ended: in vain; without a beginning it was reached
        pytest.param([("a", T, 0, 5), ("b", T, 1, 6), ("a", T, 7, 12)], "", id="down for all"),
        pytest.param([("b", T, None, 3), ("a", T, 0, 5)], "a", id="another one reaches it meanwhile"),
        pytest.param([("b", T, None, 0), ("a", T, 0, 5)], "a", id="in the very moment when it begins"),
        pytest.param([("b", T, None, 2), ("a", T, 3, 8)], "", id="before"),
        pytest.param([("a", T, 0, 5), ("b", T, None, 6)], "a", id="later"),
        pytest.param([("a", T, 0, 5), ("b", T, None, 65)], "a", id="a minute later"),
        pytest.param([("a", T, 0, 5), ("b", T, None, 65.5)], "", id="more than a minute later"),
        pytest.param([("a", T, 0, 5), ("b", T, 0, 6), ("c", T, None, 65.5)], "b", id="the one that is not too old"),
        pytest.param([("a", T, 0, 5), ("b", T, 0, 5), ("c", T, None, 6)], "ab", id="two of three"),
        pytest.param([("a", T, 0, 5), ("b", T, None, 6), ("b", T, None, 7), ("c", T, None, 8)], "a", id="once only"),
        pytest.param([("a", T, 0, 5), ("a", T, None, 6)], "", id="it reaches it itself"),
        pytest.param([("a", T, None, 3), ("a", T, 0, 5)], "", id="it has reached it itself meanwhile"),
        pytest.param(
            [("a", T, 0, 5), ("b", T, 0, 5), ("b", T, None, 6)], "", id="silent for the one who reaches it too"
        ),
        pytest.param(
            [("a", T, 0, 5), ("b", T, 0, 5), ("b", T, None, 6), ("c", T, None, 7)], "", id="that settles it for all"
        ),
        pytest.param([("a", T, 0, 5), ("b", U, None, 3), ("b", U, None, 6)], "", id="another target"),
        pytest.param([("a", T, 0, 5), ("b", T, None, 6), ("a", T, 5.5, 9)], "aa", id="again"),
        pytest.param([("b", T, None, 4), ("a", T, 0, 5), ("c", T, None, 6)], "a", id="blamed at once, and not again"),
        pytest.param([("a", T, None, 1), ("b", T, None, 2)], "", id="nobody waits"),
    ],
)
def test_whose_fault_a_silence_is(rows: list[Any], blamed: str) -> None:
    timeouts: Timeouts[str] = Timeouts()
    found: list[str] = []
    for source, target, began, now in rows:
        if began is None:
            found += timeouts.reached(source, target, now)
        elif timeouts.timed_out(source, target, began, now):
            found.append(source)
    assert "".join(found) == blamed


def test_so_many_targets_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_health, "_TARGETS", 3)
    timeouts: Timeouts[str] = Timeouts()
    for target in (1, 2, 3, 1, 4):  # 2 is the one that was longest ago
        assert not timeouts.timed_out("a", target, 0.0, 5.0)
    assert [bool(timeouts.reached("b", target, 6.0)) for target in (1, 2, 3, 4)] == [True, False, True, True]
    # of those reached, 2 has gone when 1 was not the last
    for target in (1, 2, 3, 1, 4):
        timeouts.reached("b", target, 7.0)
    assert [timeouts.timed_out("a", target, 6.5, 8.0) for target in (1, 2, 3, 4)] == [True, False, True, True]
    assert (len(timeouts._waited), len(timeouts._reached)) == (1, 3)
