"""Runs of made-up times, to try comparisons of runs on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blnet.bench.results import Measurement, Results

ENVIRONMENT = {
    "date": "2026-11-24", "device": "a CPU", "gpus": [], "cpu": "a CPU", "cpu_features": "AVX2",
    "threads": 2, "packages": {"torch": "2.11.0"}, "commit": "aaaa",
}  # fmt: skip
SETTINGS = {"device": "cpu", "dtype": "float32", "batch": 8, "size": 224}
Array = NDArray[np.float64]


def run_of(groups: Sequence[Array], controls: int = 2) -> Results:
    """Return a run of a suite that is not there.

    Args:
        groups: the samples of each, seconds, (implementations, rounds).
        controls: how many of a group's first implementations are baselines.
    """
    measurements = [
        Measurement(
            *("suite", f"group {number}", "family", f"way {row}"),
            facts={"baseline": row < controls, "batch": 8},
            status="ok",
            samples=times.tolist(),
        )
        for number, samples in enumerate(groups)
        for row, times in enumerate(samples)
    ]
    return Results(dict(ENVIRONMENT), dict(SETTINGS), "blnet bench", measurements=measurements)


def drawn(
    draw: np.random.Generator,
    implementations: int,
    rounds: int,
    noise: float,
    machine: float = 0.0,
    own: float = 0.0,
) -> Array:
    """Return times of about 1 s, with the noise that the committed results have.

    Args:
        draw: gives the random numbers.
        implementations: how many.
        rounds: how many.
        noise: within the run: a part that all share, which lasts over some rounds, a
            heavy-tailed part of each one's own, and now and then a stall many times as long.
        machine: spread of a factor on the whole run.
        own: spread of a factor on each implementation of the run.
    """
    shared = draw.normal(size=rounds)
    for number in range(1, rounds):
        shared[number] = 0.8 * shared[number - 1] + 0.6 * shared[number]
    each = draw.standard_t(2, (implementations, rounds))
    stalls = draw.exponential(11, each.shape) * (draw.random(each.shape) < 0.04)
    factors = draw.normal(0, machine) + draw.normal(0, own, (implementations, 1))
    return np.exp(factors + noise * (1.3 * shared + 0.7 * each + stalls))


def steady(implementations: int, rounds: int, seed: int = 0) -> Array:
    """Return times of about 1 s that hardly vary."""
    return drawn(np.random.default_rng(seed), implementations, rounds, 0.002)
