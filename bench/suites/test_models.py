"""Models suite: whole networks, inference, every rung of the ladder, batch 1 and throughput batch.

All networks and rungs of a batch are one group, so that each is interleaved with the baseline.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blnet.bench import layers
from blnet.bench.continuing import group_key
from blnet.bench.ladder import Rung, Runs, rungs
from blnet.bench.measure import Call, Group, Implementation
from blnet.bench.memory import tensor_bytes
from blnet.bench.networks import CALIBRATION_IMAGES, Built, Spec, built, specs
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import REPLAYS, Measurement
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings
from blnet.optimizing.choosing import NARROW

NAME = "models"
# Largest relative error of the logits against float64 arithmetic on the same (rounded) weights and
# images. float32 lands near 1e-6 and Winograd or packed weights cost a digit or two; bfloat16 has
# 8 bits and the errors of 50 layers add up, so that PyTorch's own error counts as well.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
REFERENCE = "the same network in float64, eager"
NOT_COMPILED = (
    "networks were not compiled at batch 1, where a quick run on a CPU takes ONNX Runtime for the "
    "faster; --full compiles there too"
)
REFERENCE_CHUNK = 8  # images at a time: float64 activations of a whole batch may not fit


def cases(settings: Settings) -> list[Case]:
    """Return every network on every rung at every batch."""
    return [
        Case(group_name(batch), spec.label, rung.name)
        for batch in settings.batches
        for spec in specs(settings)
        for rung in ladder(settings, batch)
    ]


def ladder(settings: Settings, batch: int | None) -> list[Rung]:
    """Return the rungs that a batch is measured on; None for a throughput batch."""
    return rungs(settings.device, settings.full, settings.dtype or "float32", batch)


def group_name(batch: int) -> str:
    """Return the name of the group with this batch."""
    return f"batch {batch}"


def build(group: str, session: Session) -> Group:
    """Return all networks on all rungs at one batch."""
    rungs = ladder(session.settings, batch_of(session.settings, group))
    return group_of(NAME, group, session, rungs, *_inputs(group, session))


def batch_of(settings: Settings, group: str, name: Callable[[int], str] = group_name) -> int:
    """Return the batch that a group is for, of a suite that names its groups so."""
    return next(batch for batch in settings.batches if name(batch) == group)


def after(group: str, session: Session) -> None:
    """Time the layers of all networks, at the throughput batch."""
    if group == group_name(session.settings.throughput_batch):
        layers.record(session, group_key(NAME, group), *_inputs(group, session))


def _inputs(group: str, session: Session) -> tuple[Built, Tensor]:
    """Return the networks of a group and their input."""
    settings = session.settings
    images = session.images(session.batch(NAME, group, batch_of(settings, group)))
    # All groups share the networks, whatever their batch: one image is enough to know the input.
    sample = session.images(CALIBRATION_IMAGES)
    return built(session, specs(settings), sample, settings.torch_dtype), images


def group_of(
    suite: str, name: str, session: Session, rungs: list[Rung], found: Built, inputs: Tensor
) -> Group:
    """Return networks on all rungs for one batch.

    Args:
        suite: name of the suite.
        name: name of the group.
        session: of the run.
        rungs: to measure each network on.
        found: the networks, on the device and in the precision of the run.
        inputs: the batch, float32.
    """
    settings = session.settings
    left_out = [rung.name for rung in ladder(settings, None) if rung not in rungs]
    if left_out:
        session.leave_out(suite, name, left_out, NOT_COMPILED)
    ready = inputs.to(settings.device, settings.torch_dtype)
    shared = dict.fromkeys(rung.replays for rung in rungs if rung.replays)
    runs: dict[str, Runs] = {spec.label: dict(shared) for spec in found.specs}
    return Group(
        suite=suite,
        name=name,
        implementations=[
            _implementation(spec, found, rung, ready, runs[spec.label])
            for spec in found.specs
            for rung in rungs
        ],
        references={
            spec.label: partial(_reference, model, ready) for spec, model in found.models.items()
        },
        tolerance=TOLERANCES[settings.dtype or "float32"],
        reference_text=REFERENCE,
        rounds=settings.rounds(len(inputs)),
        max_warm_up=settings.warm_up_seconds,
        budget=session.budget(suite),
        plain={
            spec.label: partial(_plain, model, ready)
            for spec, model in found.models.items()
            if settings.torch_dtype in NARROW
        },
    )


def _plain(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(images)
    return logits


def _reference(model: nn.Module, images: Tensor) -> Tensor:
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        return torch.cat([exact(chunk.double()) for chunk in images.split(REFERENCE_CHUNK)])


def _implementation(
    spec: Spec, found: Built, rung: Rung, images: Tensor, runs: Runs
) -> Implementation:
    layout = torch.channels_last if rung.channels_last else torch.contiguous_format

    def make() -> Call:
        own = images.contiguous(memory_format=layout)
        run = rung.build(found.model(spec), own, runs)

        def call() -> Any:
            with torch.inference_mode():
                return run(own)

        return call

    return Implementation(
        name=rung.name,
        family=spec.label,
        build=make,
        description=rung.description,
        facts={
            "network": spec.name,
            "alpha": spec.alpha,
            "beta": spec.beta,
            "baseline": spec.baseline,
            "batch": len(images),
            "ours": rung.ours,
            **({REPLAYS: rung.replays} if rung.replays else {}),
        },
        held_bytes=tensor_bytes(found.models.get(spec), images),
        memory=not rung.own_pool,
        compiles=rung.compiles,
    )


@pytest.mark.benchmark(timer=virtual_clock)
def test_models(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
