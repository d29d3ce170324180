"""Merge suite: relu(upsample(big) + little) at the merge sites of bL-ResNet-50, one group a site.

Baselines are PyTorch's own operations, eager and compiled; ours is `blnet.kernels.merge`. Bytes are
what any implementation must move: each input read once, each output written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blnet.bench.ladder import compiled
from blnet.bench.measure import Call, Group, Implementation
from blnet.bench.memory import tensor_bytes
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import Measurement
from blnet.bench.roofline import copy_bandwidth
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings

NAME = "merge"
# One addition and one rounding: a little more than the rounding of the dtype. The backward pass
# adds ratio^2 = 4 gradients, in float32 or better before it rounds.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
REFERENCE = "the same in float64"
PASSES = ("forward", "forward + backward")
BASELINES = ("eager", "compile")
IMPLEMENTATIONS = (
    ("eager", "F.interpolate(mode='nearest') + add + ReLU, one PyTorch operation after the other."),
    ("compile", "torch.compile of the same, which fuses it into one kernel where it can."),
    ("blnet", "blnet.kernels.merge."),
)


@dataclass(frozen=True)
class Site:
    """Where bL-ResNet-50 merges: C channels at side x side pixels, big `ratio` times smaller."""

    channels: int
    side: int
    ratio: int

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.side}x{self.side}x{self.channels}" + (" stem" if self.ratio == 1 else "")


# At 224 x 224 pixels; the three stages and the stem, whose maps are of one size.
SITES = (Site(64, 56, 1), Site(256, 56, 2), Site(512, 28, 2), Site(1024, 14, 2))
# The largest merge and the smallest: compiling each takes seconds on a CPU.
QUICK_CPU_SITES = (SITES[1], SITES[3])


def _sites(settings: Settings) -> tuple[Site, ...]:
    return SITES if settings.full or settings.on_gpu else QUICK_CPU_SITES


def group_name(site: Site, what: str) -> str:
    """Return the name of the group of a site and a pass."""
    return f"{site.label}, {what}"


def cases(settings: Settings) -> list[Case]:
    """Return every implementation of every pass at every site."""
    return [
        Case(group_name(site, what), site.label, name)
        for site in _sites(settings)
        for what in PASSES
        for name, _ in IMPLEMENTATIONS
    ]


def build(group: str, session: Session) -> Group:
    """Return the implementations of one pass at one site."""
    settings = session.settings
    site, what = next((s, w) for s in _sites(settings) for w in PASSES if group_name(s, w) == group)
    if settings.on_gpu and "copy_bandwidth" not in session.results.ceilings:
        session.results.ceilings["copy_bandwidth"] = copy_bandwidth(session.clock)
    backward = what != "forward"
    tensors = _inputs(site, settings)
    return Group(
        suite=NAME,
        name=group,
        implementations=[
            _implementation(name, text, site, what, tensors) for name, text in IMPLEMENTATIONS
        ],
        references={site.label: lambda: _run(eager, [t.double() for t in tensors], backward)()},
        tolerance=TOLERANCES[settings.dtype or "float32"],
        reference_text=REFERENCE,
        rounds=4 * settings.rounds(settings.throughput_batch),
        budget=session.budget(NAME),
    )


def eager(big: Tensor, little: Tensor) -> Tensor:
    """Return the merge as PyTorch's users write it."""
    if big.shape != little.shape:
        big = F.interpolate(big, size=little.shape[2:], mode="nearest")
    return torch.relu(big + little)


def _blnet(big: Tensor, little: Tensor) -> Tensor:
    from blnet.kernels import merge

    return merge(big, little)


def _inputs(site: Site, settings: Settings) -> list[Tensor]:
    """Return big, little and a random gradient of the result, all channels-last."""
    draw = torch.Generator().manual_seed(settings.seed)
    batch, side = settings.throughput_batch, site.side
    small = side // site.ratio
    shapes = [(batch, site.channels, n, n) for n in (small, side, side)]
    return [
        torch.randn(shape, generator=draw)
        .to(settings.device, settings.torch_dtype)
        .contiguous(memory_format=torch.channels_last)
        for shape in shapes
    ]


def moved_bytes(big: Tensor, little: Tensor, backward: bool) -> int:
    """Return the bytes that must be moved: every input read once, every output written once.

    The forward pass reads big and little and writes the result. The backward pass reads the
    result's gradient and the result (for the ReLU's mask) and writes both gradients.
    """
    forward = tensor_bytes(big, little, little)
    return forward + tensor_bytes(little, little, little, big) if backward else forward


def _implementation(
    name: str, text: str, site: Site, what: str, tensors: list[Tensor]
) -> Implementation:
    backward = what != "forward"
    big, little, _ = tensors

    def make() -> Call:
        function: Callable[..., Tensor] = _blnet if name == "blnet" else eager
        if name == "compile":
            example = tuple(t.detach().requires_grad_(backward) for t in tensors[:2])
            with torch.set_grad_enabled(backward):
                function = compiled(_closure(eager), example)
        return _run(function, tensors, backward)

    note = ""
    if name == "blnet" and big.device.type == "cpu":
        note = "on a CPU this is the plain PyTorch backend: the kernels are written for GPUs"
    return Implementation(
        name=name,
        family=site.label,
        build=make,
        description=text,
        facts={
            "site": site.label,
            "pass": what,
            "batch": len(big),
            "bytes": moved_bytes(big, little, backward),
            "baseline": name in BASELINES,
        },
        held_bytes=tensor_bytes(*(tensors if backward else tensors[:2])),
        compiles=name == "compile",
        note=note,
    )


def _closure(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda big, little: function(big, little)


def _run(function: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> Call:
    """Return a call that gives the result, or the result and both gradients."""
    big, little, gradient = tensors
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(big, little)

        return forward
    leaves = [big.detach().requires_grad_(), little.detach().requires_grad_()]

    def both() -> list[Tensor]:
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    return both


@pytest.mark.benchmark(timer=virtual_clock)
def test_merge(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
