"""Percentiles, ratios of medians with a bootstrap interval, and means of a few runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
CONFIDENCE = 0.95
# A bootstrap of fewer rounds is far too sure: where it says 95 %, the interval of 2 rounds holds
# the truth in about half of the cases, of 3 in three quarters.
LEAST_ROUNDS = 5
_AT_ONCE = 1_000_000  # samples that are resampled together


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians.

    Attributes:
        value: the ratio.
        low: lower end of its 95 % interval; None of fewer than `LEAST_ROUNDS` rounds.
        high: upper end of its 95 % interval; None where `low` is.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of its interval; None where it has none."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def above(self, limit: float) -> bool:
        """Return whether the whole interval is above a limit; never without an interval."""
        return self.low is not None and self.low > limit

    def below(self, limit: float) -> bool:
        """Return whether the whole interval is below a limit; never without an interval."""
        return self.high is not None and self.high < limit

    def scaled(self, factor: float) -> Ratio:
        """Return the ratio and its interval times an exact factor."""
        return Ratio(self.value * factor, *(end * factor for end in self.interval or ()))


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return a percentile of samples, linear between neighbours.

    Raises:
        ValueError: if there are no samples.
    """
    if not len(samples):
        raise ValueError("a percentile needs one sample at least")
    return float(np.percentile(np.asarray(samples, dtype=np.float64), percent))


@dataclass(frozen=True)
class Mean:
    """A mean of a few runs.

    Attributes:
        value: the mean.
        half_width: half of its 95 % interval (Student's t); None of a single run.
        runs: how many there were.
    """

    value: float
    half_width: float | None
    runs: int


def mean(samples: Sequence[float]) -> Mean:
    """Return a mean with the 95 % interval of Student's t distribution, n - 1 degrees of freedom.

    Raises:
        ValueError: if there are no samples.
    """
    if not len(samples):
        raise ValueError("a mean needs one sample at least")
    values = np.asarray(samples, dtype=np.float64)
    runs = len(values)
    if runs == 1:
        return Mean(float(values[0]), None, 1)
    from scipy.stats import t

    spread = float(values.std(ddof=1)) / math.sqrt(runs)
    width = float(t.ppf(0.5 + CONFIDENCE / 2, runs - 1)) * spread
    return Mean(float(values.mean()), width, runs)


def median_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Return median(above) / median(below) with a 95 % percentile bootstrap interval.

    Of fewer than `LEAST_ROUNDS` rounds there is no interval.

    The samples come from interleaved rounds, so a slow second hits both: rounds are resampled, not
    the two samples each for itself (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993,
    chapters 8 and 13). Written out because scipy.stats.bootstrap names its seed differently in the
    releases that we support.

    Args:
        above: times of the baseline, seconds, one a round.
        below: times of the implementation, seconds, of the same rounds.

    Raises:
        ValueError: if the two have no round in common.
    """
    rounds = min(len(above), len(below))
    if rounds == 0:
        raise ValueError("a ratio needs one round at least that both implementations ran in")
    return _median_ratio(tuple(above[:rounds]), tuple(below[:rounds]))


# A report has the same ratio in its summary, its tables and its plots: a page of 26 committed runs
# asks for 4,717, of which 1,508 differ, and took three times as long without this.
@functools.lru_cache(maxsize=4096)
def _median_ratio(above: tuple[float, ...], below: tuple[float, ...]) -> Ratio:
    top, bottom = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    rounds = len(above)
    value = float(np.median(top) / np.median(bottom))
    # A seed, so that the same samples give the same interval.
    draw, ratios = np.random.default_rng(0), []
    part = max(1, _AT_ONCE // rounds)  # of the resamples: all of a long run's would fill the memory
    for done in range(0, RESAMPLES, part):
        picks = draw.integers(rounds, size=(min(part, RESAMPLES - done), rounds))
        ratios.append(np.median(top[picks], axis=1) / np.median(bottom[picks], axis=1))
    return with_intervals([value], np.concatenate(ratios)[None], rounds)[0]


def resampled_medians(
    samples: NDArray[np.float64], seed: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Return medians of resampled rounds of one run, for ratios between two runs.

    Where `median_ratio` holds two implementations of one run against each other, here the two runs
    share no round: each is resampled for itself, with a seed of its own. The implementations of a
    run did share its rounds, so the same rounds are drawn for all of them.

    Args:
        samples: times, seconds, (implementations, rounds).
        seed: of the resampling, so that the same samples give the same medians.
        resamples: how many.

    Returns:
        Medians, seconds, (implementations, resamples).
    """
    rounds = samples.shape[1]
    picks = np.random.default_rng(seed).integers(rounds, size=(resamples, rounds))
    # An implementation at a time: all at once would take gigabytes of a long run.
    return np.stack([np.median(times[picks], axis=1) for times in samples])


def with_intervals(
    values: Sequence[float] | NDArray[np.float64], resampled: NDArray[np.float64], rounds: int
) -> list[Ratio]:
    """Return ratios with the 95 % percentile intervals of their resampled values.

    Args:
        values: the ratios.
        resampled: of each of them, (ratios, resamples).
        rounds: that they were resampled from; fewer than `LEAST_ROUNDS` give no interval.
    """
    if rounds < LEAST_ROUNDS:
        return [Ratio(float(value)) for value in values]
    tail = 50 * (1 - CONFIDENCE)
    lows, highs = np.percentile(resampled, [tail, 100 - tail], axis=1)
    return [Ratio(*map(float, ends)) for ends in zip(values, lows, highs, strict=True)]
