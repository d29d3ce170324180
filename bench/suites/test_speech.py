"""Speech study: the plain acoustic model against the Big-Little settings of the paper's table.

Trained with one recipe, for the same number of epochs, with several seeds, or with each speaker
held out in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blnet.bench import studies
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import Measurement
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings
from blnet.bench.suites.test_speech_models import PLAIN, SPECS, SpeechSpec

NAME = "speech"
KIND = studies.SPEECH
_BATCH = 32  # recordings at once when the real-time factor is measured


def specs(settings: Settings) -> list[SpeechSpec]:
    """Return the networks: the paper's, or of those the ones that --alpha and --beta name."""
    wanted = settings.branchings
    if wanted is None:
        return list(SPECS)
    plain = SpeechSpec(PLAIN, None, None, PLAIN)
    return [plain, *(SpeechSpec("bl_resnet22", alpha, beta, PLAIN) for alpha, beta in wanted)]


def cases(settings: Settings) -> list[Case]:
    """Return every network with every seed; a seed's networks one after the other."""
    return [
        Case(studies.scale_name(settings, KIND), spec.label, f"seed {seed}")
        for seed in studies.run_seeds(settings, KIND)
        for spec in specs(settings)
    ]


def study(session: Session, add: studies.Add) -> None:
    """Train all of them."""
    settings = session.settings
    studies.check(settings, KIND)
    for seed in studies.run_seeds(settings, KIND):
        for spec in specs(settings):
            facts = {
                "network": f"{spec.name}{', pyramid' if spec.pyramid else ''}",
                "alpha": spec.alpha,
                "beta": spec.beta,
                "baseline": spec.baseline,
            }
            flags = model_flags(spec)
            made = studies.train(session, NAME, spec.label, seed, flags, facts, kind=KIND)
            if made.timed:
                folder = studies.run_folder(session, NAME, spec.label, seed)
                made.facts["real_time_factor"] = real_time_factor(folder, settings.device)
            add(made)


def model_flags(spec: SpeechSpec) -> list[str]:
    """Return the flags of `blnet train speech` for a network."""
    flags = [f"--model.name={spec.name}"]
    if spec.alpha is not None:
        flags += [
            f"--model.alpha={spec.alpha}",
            f"--model.beta={spec.beta}",
            f"--model.pyramid={str(spec.pyramid).lower()}",
        ]
    return flags


def real_time_factor(folder: Any, device: str) -> float:
    """Return how many seconds a second of the evaluation recordings takes, reading included."""
    from blnet.speech.data import load_data
    from blnet.speech.inference import configuration, load_trained
    from blnet.speech.measurement import measure
    from blnet.speech.tasks import make_target, make_task

    trained = load_trained(folder).to(torch.device(device))
    config = configuration(trained, trained.data)
    target, classes = make_target(config), trained.classes or None
    data = load_data(config.data, config.task, target, parts="evaluation", classes=classes)
    return measure(trained, make_task(config, data), _BATCH).real_time_factor


@pytest.mark.benchmark(timer=virtual_clock)
def test_speech(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
