"""Training suite: forward and backward pass of whole networks at the throughput batch.

Plain and Big-Little networks get the same rungs, `blnet.optimize` among them, so that a reader
sees what the architecture brings and what the kernels bring. Half precision is autocast over
float32 weights. The optimiser's step is left out: it is the same for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blnet.bench import kept
from blnet.bench.measure import Call, Group, Implementation
from blnet.bench.memory import tensor_bytes
from blnet.bench.networks import CALIBRATION_IMAGES, Built, Spec, built, specs
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import Measurement
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings
from blnet.optimizing.choosing import NARROW
from blnet.optimizing.engines import compiled
from blnet.optimizing.training import OPS, optimize_training
from blnet.wording import counted

NAME = "training"
# Of the logits and of the logarithms of all gradients' norms. The gradients themselves differ by
# more between any two orders of summing, because ReLUs flip; the ops' own suites hold those.
TOLERANCES = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 5e-2}
REFERENCE = "the same network in float64, eager"
# A step takes as long as several passes, but a comparison of runs needs some rounds to tell.
ROUNDS = 8
LEAST_VALUES = 4  # of each channel, for a batch norm


@dataclass(frozen=True)
class Rung:
    """One way to train a network.

    Attributes:
        name: what the tables call it.
        description: one sentence on it.
        fused: whether `blnet.optimize` puts fused ops in first.
        recompute: whether it recomputes normalisation.
        compiles: whether torch.compile comes last.
        devices: where it runs.
        quick: where it is part of a quick run.
    """

    name: str
    description: str
    fused: bool = False
    recompute: bool = False
    compiles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: tuple[str, ...] = ("cpu", "cuda")


RUNGS = (
    Rung("channels-last", "Eager, weights and input in channels-last (NHWC) layout."),
    Rung("compile", "torch.compile, default mode, channels-last.", compiles=True, quick=("cuda",)),
    Rung(
        "recompute",
        "Normalised maps computed again in backward, eager, channels-last.",
        recompute=True,
        quick=(),
    ),
    # On a CPU a fused network runs layer by layer: there it would be the first rung again.
    Rung("fused", "Fused training ops, eager, channels-last.", fused=True, devices=("cuda",)),
    Rung(
        "fused, compile",
        "Fused training ops, then torch.compile, channels-last.",
        fused=True,
        compiles=True,
        devices=("cuda",),
    ),
    Rung(
        "fused, recompute",
        "Fused training ops, normalised maps computed again in backward, eager, channels-last.",
        fused=True,
        recompute=True,
        devices=("cuda",),
    ),
)


def rungs(settings: Settings) -> list[Rung]:
    """Return the rungs of a run."""
    device = settings.device
    found = [rung for rung in RUNGS if device in rung.devices]
    return found if settings.full else [rung for rung in found if device in rung.quick]


def rounds(settings: Settings) -> int:
    """Return how often each rung is timed: as asked for, else half as often as inference."""
    return settings.repeat or max(settings.rounds(settings.throughput_batch) // 2, ROUNDS)


def group_name(settings: Settings) -> str:
    """Return the name of the group: there is one."""
    return f"batch {settings.throughput_batch}"


def cases(settings: Settings) -> list[Case]:
    """Return every network on every rung."""
    return [
        Case(group_name(settings), spec.label, rung.name)
        for spec in specs(settings)
        for rung in rungs(settings)
    ]


def build(group: str, session: Session) -> Group:
    """Return all networks on all rungs."""
    settings = session.settings
    images = session.images(session.batch(NAME, group, settings.throughput_batch))
    found = built(session, specs(settings), session.images(CALIBRATION_IMAGES))
    counts = {spec: _kept(model, settings) for spec, model in found.models.items()}
    own = images.to(settings.device).contiguous(memory_format=torch.channels_last)
    return Group(
        suite=NAME,
        name=group,
        implementations=[
            _implementation(spec, found, rung, own, settings, counts.get(spec, {}))
            for spec in found.specs
            for rung in rungs(settings)
        ],
        references={
            spec.label: partial(_reference, model, own) for spec, model in found.models.items()
        },
        tolerance=TOLERANCES[settings.dtype or "float32"],
        reference_text=REFERENCE,
        rounds=rounds(settings),
        budget=session.budget(NAME),
        plain={
            spec.label: partial(_plain, model, own, settings)
            for spec, model in found.models.items()
            if settings.torch_dtype in NARROW
        },
    )


def _kept(model: nn.Module, settings: Settings) -> dict[str, int]:
    """Return what a network keeps for backward; nothing where it cannot be counted."""
    try:
        return kept.counted(model, settings.image_shape, settings.torch_dtype)
    except ValueError:
        return {}


def _results(logits: Tensor, model: nn.Module) -> Iterator[Tensor]:
    """Yield the logits and the logarithms of the gradients' norms, of like weight.

    A generator, so that a timed call, whose result nobody looks at, does not compute it.
    """
    yield logits.detach()
    norms = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None])
    weight = (logits.numel() / norms.numel()) ** 0.5
    yield norms.clamp_min(1e-12).log() * weight


def _backward(logits: Tensor, model: nn.Module) -> Iterator[Tensor]:
    """Compute all gradients of the cross-entropy; return the results."""
    for parameter in model.parameters():
        parameter.grad = None
    labels = torch.arange(len(logits), device=logits.device) * 7 % logits.shape[1]
    F.cross_entropy(logits, labels).backward()
    return _results(logits, model)


def _reference(model: nn.Module, images: Tensor) -> list[Tensor]:
    exact = copy.deepcopy(model).double().train()
    return list(_backward(exact(images.double()), exact))


def _plain(model: nn.Module, images: Tensor, settings: Settings) -> list[Tensor]:
    own = copy.deepcopy(model).train()
    with torch.autocast(settings.device, settings.torch_dtype):
        logits = own(images)
    return list(_backward(logits.float(), own))


def _check_batch(model: nn.Module, images: Tensor) -> None:
    """Check that every batch norm of a network has values enough in a batch of images.

    Raises:
        ValueError: if one has not.
    """
    shapes = copy.deepcopy(model).to("meta").train()
    for module in shapes.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(_check_values)
    shapes(images.to("meta"))


def _check_values(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    """Check that a batch norm has values enough for its gradients to be more than rounding.

    Two values are normalised to -1 and 1, whatever they are, so that nothing behind them has a
    gradient: float32 was up to 14 % off then, and with four values 0.03 %.

    Raises:
        ValueError: if it has not.
    """
    values = inputs[0].numel() // inputs[0].shape[1]
    if values < LEAST_VALUES:
        raise ValueError(
            f"a batch norm has {counted(values, 'value')} of each channel, whose gradients are "
            "rounding and cannot be checked; train with a larger --batch or --size"
        )


def _network(model: nn.Module, rung: Rung) -> nn.Module:
    if not (rung.fused or rung.recompute):
        return copy.deepcopy(model)
    without = () if rung.fused else OPS
    return optimize_training(model, recompute=rung.recompute, without=without)


def _implementation(
    spec: Spec,
    found: Built,
    rung: Rung,
    images: Tensor,
    settings: Settings,
    counts: dict[str, int],
) -> Implementation:
    dtype, device = settings.torch_dtype, settings.device

    precision = partial(torch.autocast, device, dtype, enabled=dtype is not torch.float32)

    def make() -> Call:
        _check_batch(found.model(spec), images)
        own = _network(found.model(spec), rung)
        own.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        run: Callable[[Tensor], Tensor] = own
        if rung.compiles:
            with precision():
                run = compiled(own, (images,))

        def call() -> Any:
            with precision():
                logits = run(images)
            return _backward(logits.float(), own)

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
            "ours": rung.fused or rung.recompute,
            kept.FACT: counts,
        },
        held_bytes=tensor_bytes(found.models.get(spec), images),
        compiles=rung.compiles,
    )


@pytest.mark.benchmark(timer=virtual_clock)
def test_training(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
