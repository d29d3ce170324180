"""Results of made-up times, to try comparisons and reports of runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blnet.bench.results import Check, Measurement, Network, Results
from blnet.bench.settings import Settings, resolve
from blnet.environment import collect

ENVIRONMENT = {
    "date": "2026-11-24", "device": "a CPU", "gpus": [], "cpu": "a CPU", "cpu_features": "AVX2",
    "threads": 2, "packages": {"torch": "2.11.0"}, "commit": "aaaa",
}  # fmt: skip
SETTINGS = {"device": "cpu", "dtype": "float32", "batch": 8, "size": 224}
PLAIN, BIG_LITTLE = "resnet50", "bl_resnet50 a2 b4"
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


def spread(seconds: float, step: float = 0.01) -> list[float]:
    """Return five times from so many seconds upwards, each longer by this share of the first."""
    return [seconds * (1 + number * step) for number in range(5)]


def model(family: str, batch: int, rung: str, times: Sequence[float], **more: Any) -> Measurement:
    """Return a rung of a network that is right.

    Args:
        family: `PLAIN` or `BIG_LITTLE`.
        batch: images at once.
        rung: its name; that of one of ours begins with "blnet".
        times: seconds.
        more: other fields of the measurement; facts are added to its own.
    """
    name, *branching = family.split()
    facts = {"network": name, "batch": batch, "alpha": 2 if branching else None}
    facts |= {"ours": rung.startswith("blnet"), **more.pop("facts", {})}
    values = {"status": "ok", "check": Check(1.25e-6, 1e-3, "float64"), "peak_memory": 250_000_000}
    names = ("models", f"batch {batch}", family, rung)
    return Measurement(*names, facts=facts, samples=list(times), **{**values, **more})


def merge(name: str, times: Sequence[float], baseline: bool, **more: Any) -> Measurement:
    """Return an implementation of the merge at one site that is right.

    Args:
        name: of the implementation.
        times: seconds.
        baseline: whether others are held against it.
        more: other fields of the measurement.
    """
    facts = {"site": "s", "pass": "forward", "batch": 8, "bytes": 10**9, "baseline": baseline}
    values = {"status": "ok", "check": Check(1e-8, 1e-5, "float64"), "facts": facts}
    names = ("merge", "s, forward", "s", name)
    return Measurement(*names, samples=list(times), **{**values, **more})


def report_of(measurements: Sequence[Measurement], **more: Any) -> Results:
    """Return a run on a CPU of `PLAIN`, of `BIG_LITTLE` with half its MACs, and of the merge.

    Args:
        measurements: from `model` and `merge`.
        more: other fields of the results.
    """
    return Results(
        environment={**collect("cpu").as_dict(), "device": "Test CPU"},
        settings=resolve(Settings(device="cpu")).as_dict(),
        command="blnet bench",
        networks=[
            Network(PLAIN, PLAIN, None, None, PLAIN, 25_557_032, 4_089_000_000),
            Network(BIG_LITTLE, "bl_resnet50", 2, 4, PLAIN, 26_689_256, 2_044_500_000),
        ],
        measurements=list(measurements),
        seconds=12.0,
        **more,
    )
