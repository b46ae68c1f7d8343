"""Statistics of a comparison, against values worked out by hand or by enumeration."""

from __future__ import annotations

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.evaluation.compare import (
    bootstrap_interval,
    curves,
    difference,
    mean_and_spread,
    paired_differences,
    strength_key,
)
from holdfast.records import Difference, Spread


def test_mean_and_spread_by_hand():
    assert mean_and_spread([50.0, 60.0, 70.0]) == Spread(mean=60.0, sd=10.0, n=3)
    assert mean_and_spread([50.0, None]) == Spread(mean=50.0, sd=None, n=1)
    assert mean_and_spread([None]) == Spread(mean=None, sd=None, n=0)


def test_differences_are_taken_within_a_seed_and_an_order_only():
    ours = {(0, "a"): 50.0, (1, "a"): 60.0, (2, "a"): None, (3, "a"): 99.0}
    theirs = {(1, "a"): 20.0, (0, "a"): 40.0, (2, "a"): 1.0, (3, "b"): 0.0}
    assert paired_differences(ours, theirs) == [10.0, 40.0]
    assert difference(ours, theirs) == Difference(mean=25.0, low=10.0, high=40.0, pairs=2)
    assert difference({(0, "a"): 5.0}, theirs) == Difference(mean=-35.0, low=None, high=None, pairs=1)
    assert difference({}, theirs) == Difference(mean=None, low=None, high=None, pairs=0)


@pytest.mark.parametrize("values", [[], [3.0]])
def test_fewer_than_two_pairs_have_no_interval(values):
    assert bootstrap_interval(values) is None


def exact(values: list[float], level: float) -> tuple[float, float]:
    """The interval from all n^n resamples, each once."""
    means = sorted(statistics.fmean(drawn) for drawn in itertools.product(values, repeat=len(values)))
    tail = (1 - level) / 2
    return means[int(tail * len(means))], means[-1 - int(tail * len(means))]


@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.parametrize("values", [[0.0, 10.0], [1.0, 2.0, 4.0], [0.0, 1.0, 3.0, 8.0]])
def test_interval_is_that_of_all_resamples(values, level):
    # by hand for two values: the means 0, 5, 10 have the chances 1/4, 1/2, 1/4
    assert bootstrap_interval(values, level=level) == pytest.approx(exact(values, level))
    assert exact([0.0, 10.0], 0.95) == (0.0, 10.0)
    assert bootstrap_interval([0.0, 10.0], level=0.4) == (5.0, 5.0)


@settings(deadline=None, max_examples=25)
@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=8), shift=st.floats(-50, 50))
def test_interval_repeats_holds_the_range_and_moves_with_the_values(values, shift):
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    moved = bootstrap_interval([v + shift for v in values])
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-9)
    mirrored = bootstrap_interval([-v for v in values])
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def test_the_strength_of_a_grid_is_a_key_of_numbers():
    assert strength_key({"training.lr": [1, 2], "strategy.mechanism.strength": [1.0, 2.0]}) == (
        "strategy.mechanism.strength"
    )
    assert strength_key({"strategy.rank": [4, 8], "strategy.on": [True, False]}) == "strategy.rank"
    assert strength_key({"strategy.importance": ["lrp", "fisher"], "strategy.strength": [3]}) is None


def test_curves_rise_with_the_strength_one_for_each_choice_of_the_other_keys():
    grid = {"s.strength": [10, 1], "s.importance": ["lrp", "fisher"]}
    points = [
        ({"s.strength": s, "s.importance": i}, {"ap": s + bonus, "learning_accuracy": 90.0 - s})
        for s in grid["s.strength"]
        for i, bonus in (("lrp", 5.0), ("fisher", 0.0))
    ]
    points[-1][1]["ap"] = None  # this cell failed
    lrp, fisher = curves(grid, points)
    assert lrp.key == "s.strength"
    assert lrp.fixed == {"s.importance": "lrp"}
    assert [(p.value, p.ap, p.learning_accuracy) for p in lrp.points] == [(1, 6, 89), (10, 15, 80)]
    assert [p.value for p in fisher.points] == [10]
    assert curves({"s.importance": ["lrp"]}, [({"s.importance": "lrp"}, {"ap": 1.0})]) == []
