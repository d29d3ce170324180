"""Accuracy suite: plain networks and Big-Little ones under one recipe, equal epochs, several seeds.

By default ResNet-50 against the four settings of the paper's recognition table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from blnet.bench import studies
from blnet.bench.networks import Spec, specs
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import Measurement
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings

NAME = "accuracy"
KIND = studies.VISION
# (alpha, beta) of the paper's recognition table.
PAPER_BRANCHINGS = ((2, 2), (2, 4), (4, 2), (4, 4))


def cases(settings: Settings) -> list[Case]:
    """Return every network with every seed; a seed's networks one after the other."""
    return [
        Case(studies.scale_name(settings, KIND), spec.label, f"seed {seed}")
        for seed in studies.run_seeds(settings, KIND)
        for spec in specs(settings, PAPER_BRANCHINGS)
    ]


def study(session: Session, add: studies.Add) -> None:
    """Train all of them."""
    settings = session.settings
    studies.check(settings, KIND)
    for seed in studies.run_seeds(settings, KIND):
        for spec in specs(settings, PAPER_BRANCHINGS):
            facts = {
                "network": spec.name,
                "alpha": spec.alpha,
                "beta": spec.beta,
                "baseline": spec.baseline,
            }
            add(studies.train(session, NAME, spec.label, seed, model_flags(spec), facts))


def model_flags(spec: Spec) -> list[str]:
    """Return the flags of `blnet train vision` for a network."""
    flags = [f"--model.name={spec.name}"]
    if spec.alpha is not None:
        flags += [f"--model.alpha={spec.alpha}", f"--model.beta={spec.beta}"]
    return flags


@pytest.mark.benchmark(timer=virtual_clock)
def test_accuracy(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
