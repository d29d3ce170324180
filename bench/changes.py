"""What the samples of a group in two runs say: ratios, intervals and rank tests.

Which of it makes an implementation slower, and why, is in `blnet.bench.compare`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blnet.bench.intervals import LEAST_ROUNDS, Ratio, resampled_medians, with_intervals

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """How the implementations of a group moved.

    Attributes:
        ratios: new over old, of median times, one an implementation.
        relatives: the same over the median of the controls; the ratios themselves without any.
        over_most: the same over the control that became slowest of all.
        over_least: the same over the control that became fastest of all.
        p: of the rank tests: slower, slower than `over_most`'s control, faster, faster than
            `over_least`'s; (4, implementations).
        least_p: the smallest p that so many rounds can give; 1 of too few for an interval.
        shift: median of the controls' ratios; None without controls.
        controls: how many there are.
    """

    ratios: list[Ratio]
    relatives: list[Ratio]
    over_most: list[Ratio]
    over_least: list[Ratio]
    p: Array
    least_p: float
    shift: Ratio | None
    controls: int


def change(
    old: Array, new: Array, control: NDArray[np.bool_], threshold: float, resamples: int
) -> Change:
    """Return how the implementations of a group moved between two runs.

    Args:
        old: times, seconds, (implementations, rounds).
        new: the same of the new run, which may have another number of rounds.
        control: which implementations are controls.
        threshold: share from which on a change counts.
        resamples: of the bootstrap.
    """
    values = np.median(new, axis=1) / np.median(old, axis=1)
    draws = resampled_medians(new, 1, resamples) / resampled_medians(old, 0, resamples)
    most, least = _moved(values, control, np.max), _moved(values, control, np.min)
    rounds = old.shape[1], new.shape[1]
    fewest = min(rounds)

    def over(pick: Callable[..., Any]) -> list[Ratio]:
        moved = _moved(values, control, pick), _moved(draws, control, pick)
        return with_intervals(values / moved[0], draws / moved[1], fewest)

    shift = None
    if control.any():
        middle = np.median(draws[control], axis=0)
        shift = with_intervals([np.median(values[control])], middle[None], fewest)[0]
    larger = 1 + threshold
    slower = rank_tests(new, np.stack([old, old * most[:, None]]) * larger)
    faster = rank_tests(np.stack([old, old * least[:, None]]), new * larger)
    return Change(
        ratios=with_intervals(values, draws, fewest),
        relatives=over(np.median),
        over_most=over(np.max),
        over_least=over(np.min),
        p=np.concatenate([slower, faster]),
        least_p=1 / math.comb(sum(rounds), rounds[0]) if fewest >= LEAST_ROUNDS else 1.0,
        shift=shift,
        controls=int(control.sum()),
    )


def _moved(ratios: Array, control: NDArray[np.bool_], pick: Callable[..., Any]) -> Array:
    """Return for each implementation the ratio that `pick` takes of its controls; 1 without any.

    A control is held against the others; with fewer than two others against itself.
    """
    if not control.any():
        return np.ones_like(ratios)
    moved = np.repeat(pick(ratios[control], axis=0)[None], len(ratios), axis=0)
    for number in np.flatnonzero(control):
        others = control.copy()
        others[number] = False
        moved[number] = pick(ratios[others], axis=0) if others.sum() > 1 else ratios[number]
    return moved


def rank_tests(high: Array, low: Array) -> Array:
    """Return p of the Mann-Whitney tests that some times are above others.

    Args:
        high: times, seconds; the last axis is that of the samples.
        low: the same, of a shape that fits.
    """
    from scipy.stats import mannwhitneyu

    shape = np.broadcast_shapes(high.shape[:-1], low.shape[:-1])
    high, low = (np.broadcast_to(times, (*shape, times.shape[-1])) for times in (high, low))
    # Ties, which the coarse clock of a GPU gives, have no exact distribution. They are broken by
    # lot, which leaves the test its size; an approximation would be blind at few rounds.
    together = np.concatenate([high, low], axis=-1)
    lots = np.random.default_rng(0).random(together.shape)
    ranks = np.empty(together.shape)
    order = np.lexsort((lots, together), axis=-1)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), -1)
    high, low = np.split(ranks, [high.shape[-1]], axis=-1)
    test = mannwhitneyu(high, low, alternative="greater", axis=-1, method="exact")
    return np.asarray(test.pvalue, dtype=np.float64)


def corrected(p: Array) -> Array:
    """Return p corrected for testing all of them (Holm 1979), along the last axis."""
    order = np.argsort(p, axis=-1)
    weights = p.shape[-1] - np.arange(p.shape[-1])
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, -1) * weights, axis=-1)
    found = np.empty_like(p)
    np.put_along_axis(found, order, np.minimum(stepped, 1.0), -1)
    return found
