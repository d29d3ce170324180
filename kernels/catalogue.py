"""The list of ops, for everything that goes through all of them: list, check, compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from blnet.kernels import reference, testing
from blnet.kernels.bottleneck import bottleneck
from blnet.kernels.bottleneck import specializations as of_bottleneck
from blnet.kernels.center import specializations as of_center
from blnet.kernels.conv3x3 import specializations as of_convolution
from blnet.kernels.expand_merge import expand_merge
from blnet.kernels.expand_merge import specializations as of_expand_merge
from blnet.kernels.expand_merge_between import specializations as of_between
from blnet.kernels.expand_merge_input import specializations as of_input
from blnet.kernels.expand_merge_reduce import specializations as of_reduce
from blnet.kernels.expand_merge_statistics import specializations as of_statistics
from blnet.kernels.expand_merge_train import expand_merge_train
from blnet.kernels.launch import Specialization
from blnet.kernels.merge import merge
from blnet.kernels.merge import specializations as of_merge
from blnet.kernels.moments import moments
from blnet.kernels.moments import specializations as of_moments
from blnet.kernels.stem import specializations as of_stem
from blnet.kernels.stem import stem

Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: its name, also of its module, its reference and its tests.
        computes: the equation.
        used_for: where a network uses it.
        function: the public function, or a wrapper that takes tensors alone.
        reference: the same in plain PyTorch.
        inputs: builds its inputs: (shape, dtype, layout, device, generator).
        shapes: what the correctness matrix runs.
        specializations: lists what to compile ahead of time.
        differentiable: whether its kernels have a backward pass.
    """

    name: str
    computes: str
    used_for: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[..., Tensors]
    shapes: tuple[Any, ...]
    specializations: Callable[[], list[Specialization]]
    differentiable: bool = True


def _with_running_statistics(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Return the output and, after a batch of full weight, the running mean and variance."""

    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        big: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        mean, variance = torch.zeros_like(gamma), torch.ones_like(gamma)
        mean, variance = mean.detach(), variance.detach()
        return function(x, weight, gamma, beta, mean, variance, 1.0, big=big), mean, variance

    return run


def _closing_with_relu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Take a bottleneck's tensors alone; blocks of the little branch close with their ReLU."""

    def run(*tensors: torch.Tensor | None) -> torch.Tensor:
        return function(*tensors[:8], True, *tensors[8:])

    return run


OPS = (
    Op(
        name="merge",
        computes="relu(upsample_nearest(big) + little)",
        used_for="every merge of two branches, every residual add",
        function=merge,
        reference=reference.merge,
        inputs=testing.merge_inputs,
        shapes=testing.SHAPES,
        specializations=of_merge,
    ),
    Op(
        name="moments",
        computes="column sums and Gram matrix of x - shift",
        used_for="the batch statistics of expand_merge_train",
        function=moments,
        reference=reference.moments,
        inputs=testing.moments_inputs,
        shapes=testing.EXPAND_SHAPES,
        specializations=lambda: of_moments() + of_center(),
        differentiable=False,
    ),
    Op(
        name="expand_merge",
        computes="relu(upsample_nearest(big) + scale conv1x1(x) + shift)",
        used_for="the little branch's end, the end of every bottleneck, in inference",
        function=expand_merge,
        reference=reference.expand_merge,
        inputs=testing.expand_merge_inputs,
        shapes=testing.EXPAND_SHAPES,
        specializations=lambda: of_expand_merge() + of_reduce() + of_input(),
    ),
    Op(
        name="expand_merge_train",
        computes="relu(upsample_nearest(big) + BN(conv1x1(x))) with batch statistics",
        used_for="the same in training",
        function=_with_running_statistics(expand_merge_train),
        reference=_with_running_statistics(reference.expand_merge_train),
        inputs=testing.expand_merge_inputs,
        shapes=testing.EXPAND_SHAPES,
        specializations=lambda: (
            of_statistics() + of_between()
        ),  # beside the kernels of expand_merge and of moments
    ),
    Op(
        name="bottleneck",
        computes="a residual bottleneck and, chained on, expand_merge of it",
        used_for="the blocks of the little branch, in inference",
        function=_closing_with_relu(bottleneck),
        reference=_closing_with_relu(reference.bottleneck),
        inputs=testing.bottleneck_inputs,
        shapes=testing.BOTTLENECK_SHAPES,
        specializations=lambda: of_bottleneck() + of_convolution(),
        differentiable=False,
    ),
    Op(
        name="stem",
        computes="relu(fusion(relu(big + expand(little)))) and the strided convolutions before it",
        used_for="the end of the Big-Little stem, in inference",
        function=stem,
        reference=reference.stem,
        inputs=testing.stem_inputs,
        shapes=testing.STEM_SHAPES,
        specializations=of_stem,
        differentiable=False,
    ),
)
