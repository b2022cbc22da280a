"""Within 5 % of the exact quantiles, in a fixed number of bytes, and about now."""

from __future__ import annotations

import math
import random
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiobind._sketch import LatencySketch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0)

DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "uniform": lambda r: r.uniform(0.001, 0.1),
    "exponential": lambda r: 1e-5 + r.expovariate(20),
    "lognormal": lambda r: max(1e-5, r.lognormvariate(-4, 1.5)),
    "heavy tail": lambda r: min(1000.0, 0.01 * r.paretovariate(0.8)),
    "two ways": lambda r: r.gauss(0.01, 0.001) if r.random() < 0.97 else r.gauss(3, 0.1),
    "constant": lambda _: 0.0321,
    "the whole range": lambda r: 10 ** r.uniform(-5, 3),
}


def sketch_of(values: Iterable[float]) -> LatencySketch:
    sketch = LatencySketch()
    for value in values:
        sketch.add(value)
    return sketch


def exact(values: list[float], q: float) -> float:
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


@pytest.mark.parametrize("count", [1, 2, 10, 999])
@pytest.mark.parametrize("draw", DISTRIBUTIONS.values(), ids=list(DISTRIBUTIONS))
def test_quantiles_are_within_5_percent(draw: Callable[[random.Random], float], count: int) -> None:
    rng = random.Random(count)
    values = [draw(rng) for _ in range(count)]
    sketch = sketch_of(values)
    for q in QUANTILES:
        assert sketch.quantile(q) == pytest.approx(exact(values, q), rel=0.05)


@pytest.mark.parametrize("draw", DISTRIBUTIONS.values(), ids=list(DISTRIBUTIONS))
def test_the_quantiles_of_a_long_run_are_those_of_its_distribution(draw: Callable[[random.Random], float]) -> None:
    # Of the last 500 to 1,000 values in effect, so it is the rank that varies: by four deviations of a share at most.
    rng = random.Random(7)
    values = [draw(rng) for _ in range(20_000)]
    sketch = sketch_of(values)
    for q in (0.5, 0.99):
        off = 4 * math.sqrt(q * (1 - q) / 500)
        found = sketch.quantile(q)
        assert found is not None
        assert exact(values, max(0.0, q - off)) * 0.95 <= found <= exact(values, min(1.0, q + off)) * 1.05


@given(st.floats(1e-5, 1000))
def test_every_single_value_is_within_5_percent(value: float) -> None:
    assert sketch_of([value]).quantile(0.5) == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize(
    ("value", "counted_as"),
    [(1e-5, 1e-5), (math.nextafter(1e-5, 1), 1e-5), (999.999, 1000), (1000, 1000), (1, 1), (2, 2)],
)
def test_the_ends_of_the_range(value: float, counted_as: float) -> None:
    assert sketch_of([value]).quantile(0.5) == pytest.approx(counted_as, rel=0.05)


@pytest.mark.parametrize(
    ("value", "counted_as"),
    [
        (0, 1e-5), (0.0, 1e-5), (-0.0, 1e-5), (-1, 1e-5), (-math.inf, 1e-5), (1e-9, 1e-5), (5e-324, 1e-5),
        (1000.1, 1000), (1e300, 1000), (math.inf, 1000), (10**30, 1000),
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_counts_at_the_bounds(value: float, counted_as: float) -> None:
    assert sketch_of([value]).quantile(0.5) == pytest.approx(counted_as, rel=0.05)
    among = sketch_of([0.1] * 10 + [value])
    assert among.quantile(0.5) == pytest.approx(0.1, rel=0.05)
    assert among.quantile(0 if value < 1 else 1) == pytest.approx(counted_as, rel=0.05)


def test_what_is_not_a_number_does_not_count() -> None:
    sketch = sketch_of([math.nan])
    assert sketch.quantile(0.5) is None
    sketch.add(0.2)
    for _ in range(2000):
        sketch.add(math.nan)
    sketch.add(0.4)
    assert [sketch.quantile(q) for q in (0.5, 1)] == pytest.approx([0.2, 0.4], rel=0.05)


@given(st.lists(st.floats() | st.integers(-(10**400), 10**400).filter(lambda n: abs(n) < 1 << 1000), max_size=50))
def test_any_number_is_taken(values: list[float]) -> None:
    sketch = sketch_of(values)
    found = [sketch.quantile(q) for q in QUANTILES]
    if all(value != value for value in values):
        assert found == [None] * len(QUANTILES)
    else:
        assert all(one is not None and 1e-5 <= one <= 1050 for one in found)
        assert found == sorted(found, key=lambda one: one or 0)


def test_nothing_is_known_of_nothing() -> None:
    assert [LatencySketch().quantile(q) for q in QUANTILES] == [None] * len(QUANTILES)


@pytest.mark.parametrize("q", [-0.1, 1.1, 99, math.nan])
def test_a_quantile_is_a_share(q: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        LatencySketch().quantile(q)


def test_old_values_fade() -> None:
    sketch = sketch_of([0.01] * 100_000)
    for _ in range(1000):
        sketch.add(1.0)
    assert sketch.quantile(0.5) == pytest.approx(1.0, rel=0.05)
    assert sketch.quantile(0.1) == pytest.approx(0.01, rel=0.05)  # not all at once
    for _ in range(4000):
        sketch.add(1.0)
    assert sketch.quantile(0.01) == pytest.approx(1.0, rel=0.05)
    for _ in range(4000):
        sketch.add(1.0)
    assert sketch.quantile(0) == pytest.approx(1.0, rel=0.05)  # nothing is left of them


def test_halving_loses_no_rare_value() -> None:
    # One slow connect in fifty, each in a bucket of its own: halved as whole numbers, they would be gone.
    slow = [10 * 1.2**i for i in range(20)]
    sketch = sketch_of(value for one in slow for value in [0.01] * 49 + [one])
    assert sketch.quantile(0.97) == pytest.approx(0.01, rel=0.05)
    assert sketch.quantile(0.99) == pytest.approx(slow[9], rel=0.05)


def test_the_same_values_give_the_same_figures() -> None:
    values = [random.Random(3).expovariate(9) for _ in range(5000)]
    one, two = sketch_of(values), sketch_of(values)
    assert [one.quantile(q) for q in QUANTILES] == [two.quantile(q) for q in QUANTILES]


def test_asking_changes_nothing() -> None:
    sketch = sketch_of([0.1, 0.2, 0.3])
    assert {sketch.quantile(0.5) for _ in range(5000)} == {sketch_of([0.1, 0.2, 0.3]).quantile(0.5)}


def test_the_memory_is_fixed() -> None:
    def size(sketch: LatencySketch) -> int:
        return sum(sys.getsizeof(getattr(sketch, name)) for name in LatencySketch.__slots__)

    empty = size(LatencySketch())
    rng = random.Random(5)
    full = size(sketch_of(10 ** rng.uniform(-6, 4) for _ in range(50_000)))
    assert empty - 100 <= full <= empty + 100  # an array may have room for a few more
    assert full < 2000
    assert not hasattr(LatencySketch(), "__dict__")
