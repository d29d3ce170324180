"""Conversion suite: a trained plain network, converted and fine-tuned, against training anew.

    plain            the plain network, trained with the recipe
    converted        that network converted with inherited weights, and fine-tuned with the plain
                     one as its teacher for a few epochs
    anew, same fine-tuning cost   the Big-Little network from nothing, for the cost of fine-tuning
    anew, same total cost         likewise, for the cost of plain training and fine-tuning

Cost is multiply-adds: three times those of the forward pass for an image trained on, and the
teacher's forward pass. Epochs are whole, rounded up, so that training anew never gets less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from blnet.bench import studies
from blnet.bench.accuracy import CONVERTED, PLAIN
from blnet.bench.networks import Spec, specs
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import Measurement
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings
from blnet.bench.suites.test_accuracy import model_flags

NAME = "conversion"
KIND = studies.VISION
BRANCHING = ((2, 4),)
EPOCHS_SHARE = 1 / 3  # of the plain network's epochs, for fine-tuning; the recipe is the same
DISTILLATION = ("--distillation.weight=0.5", "--distillation.temperature=2")
BACKWARD = 3  # forward and backward pass cost three times the forward pass
SAME_TUNING, SAME_TOTAL = "anew, same fine-tuning cost", "anew, same total cost"
FAMILIES = (PLAIN, CONVERTED, SAME_TUNING, SAME_TOTAL)


def cases(settings: Settings) -> list[Case]:
    """Return every way to a Big-Little network with every seed."""
    return [
        Case(studies.scale_name(settings, KIND), family, f"seed {seed}")
        for seed in studies.run_seeds(settings, KIND)
        for family in FAMILIES
    ]


def study(session: Session, add: studies.Add) -> None:
    """Train, convert, fine-tune, and train anew."""
    settings = session.settings
    studies.check(settings, KIND)
    plain, big_little = (
        next(s for s in specs(settings, BRANCHING) if (s.alpha is None) == is_plain)
        for is_plain in (True, False)
    )
    for seed in studies.run_seeds(settings, KIND):
        _one(session, add, seed, plain, big_little)


def _one(session: Session, add: studies.Add, seed: int, plain: Spec, big_little: Spec) -> None:
    facts = {"baseline": PLAIN, "alpha": big_little.alpha, "beta": big_little.beta}

    def train(family: str, flags: list[str], name: str, epochs: int | None = None) -> Measurement:
        made = studies.train(session, NAME, family, seed, flags, {**facts, "network": name}, epochs)
        add(made)
        return made

    first = train(PLAIN, model_flags(plain), plain.name)
    if not first.timed:
        return  # its failure is in the results
    teacher = session.folder / studies.RUNS / NAME / f"{PLAIN}-seed{seed}"
    config, _ = studies.configure(session.settings, KIND, model_flags(plain), teacher, seed)
    tuning = max(1, round(EPOCHS_SHARE * config.epochs))
    flags = [
        f"--model.inherit={teacher}",
        f"--model.alpha={big_little.alpha}",
        f"--model.beta={big_little.beta}",
        f"--distillation.teacher={teacher}",
        *DISTILLATION,
        f"--schedule.warmup-epochs={min(config.schedule.warmup_epochs, tuning / 2):g}",
    ]
    tuned = train(CONVERTED, flags, big_little.name, tuning)
    if not tuned.timed:
        return
    own, other = tuned.facts["macs"], first.facts["macs"]
    an_epoch = first.facts["images"] / config.epochs
    plain_cost = config.epochs * BACKWARD * other
    tuning_cost = tuning * (BACKWARD * own + other)
    first.facts["cost"] = an_epoch * plain_cost
    tuned.facts["cost"] = an_epoch * (plain_cost + tuning_cost)
    for family, cost in ((SAME_TUNING, tuning_cost), (SAME_TOTAL, plain_cost + tuning_cost)):
        epochs = math.ceil(cost / (BACKWARD * own))
        anew = train(family, model_flags(big_little), big_little.name, epochs)
        anew.facts["cost"] = an_epoch * epochs * BACKWARD * own


@pytest.mark.benchmark(timer=virtual_clock)
def test_conversion(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
