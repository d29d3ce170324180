"""Percentiles and the bootstrap interval of a ratio."""

from __future__ import annotations

import numpy as np
import pytest

from blnet.bench import intervals
from blnet.bench.intervals import LEAST_ROUNDS, Ratio, median_ratio, percentile, with_intervals


def test_percentile() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 20) == 2.0
    with pytest.raises(ValueError, match="one sample"):
        percentile([], 50)


def test_the_ratio_is_that_of_the_medians_and_repeats() -> None:
    above, below = [2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    ratio = median_ratio(above, below)
    assert ratio.value == 2.0
    assert (ratio.low, ratio.high) == (2.0, 2.0)  # paired: every round has the same ratio
    assert median_ratio(above, below) == ratio
    assert ratio.scaled(0.5).value == 1.0


def test_rounds_that_only_one_ran_do_not_count() -> None:
    assert median_ratio([1.0, 1.0, 50.0, 50.0, 50.0], [1.0, 1.0]).value == 1.0
    with pytest.raises(ValueError, match="one round"):
        median_ratio([], [1.0])


@pytest.mark.parametrize("rounds", [LEAST_ROUNDS, 30])
def test_the_interval_covers_the_truth(rounds: int) -> None:
    # 95 % nominal; a percentile bootstrap of medians lies a little above or below.
    draw = np.random.default_rng(7)
    inside = 0
    for _ in range(120):
        machine = draw.lognormal(0, 0.1, rounds)  # hits both of a round
        above = 1.5 * machine * draw.lognormal(0, 0.05, rounds)
        below = machine * draw.lognormal(0, 0.05, rounds)
        ratio = median_ratio(above, below)
        inside += ratio.low <= 1.5 <= ratio.high
    assert inside / 120 >= 0.88


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_too_few_rounds_give_no_interval_and_no_verdict(rounds: int) -> None:
    """Theirs would hold the truth far less often than it says."""
    ratio = median_ratio([4.0] * rounds, [2.0] * rounds)
    assert (ratio.value, ratio.interval) == (2.0, None)
    assert not ratio.above(1)
    assert not median_ratio([2.0] * rounds, [4.0] * rounds).below(1)
    assert ratio.scaled(0.5) == Ratio(1.0)
    assert with_intervals([2.0], np.full((1, 100), 2.0), rounds) == [Ratio(2.0)]
    enough = median_ratio([4.0] * 5, [2.0] * 5).scaled(0.5)
    assert enough == Ratio(1.0, 1.0, 1.0)
    assert enough.above(0.9)
    assert enough.below(1.1)


def test_noise_widens_the_interval() -> None:
    draw = np.random.default_rng(1)
    quiet = median_ratio(draw.normal(2, 0.01, 20), draw.normal(1, 0.01, 20))
    noisy = median_ratio(draw.normal(2, 0.2, 20), draw.normal(1, 0.2, 20))
    assert noisy.high - noisy.low > 3 * (quiet.high - quiet.low)


def test_parts_of_the_resamples_are_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    above, below = np.random.default_rng(0).random((2, 31)).tolist()
    whole = median_ratio(above, below)
    monkeypatch.setattr(intervals, "_AT_ONCE", 1000)
    intervals._median_ratio.cache_clear()
    assert median_ratio(above, below) == whole
