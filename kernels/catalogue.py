"""The list of ops, for everything that goes through all of them: list, check, compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from blnet.kernels import reference, testing
from blnet.kernels.launch import Specialization
from blnet.kernels.merge import merge, specializations


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: its name, also of its module, its reference and its tests.
        computes: the equation.
        used_for: where a network uses it.
        function: the public function.
        reference: the same in plain PyTorch.
        inputs: builds its inputs: (shape, dtype, layout, device, generator).
        shapes: what the correctness matrix runs.
        specializations: lists what to compile ahead of time.
    """

    name: str
    computes: str
    used_for: str
    function: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    inputs: Callable[..., tuple[torch.Tensor, ...]]
    shapes: tuple[testing.Shape, ...]
    specializations: Callable[[], list[Specialization]]


OPS = (
    Op(
        name="merge",
        computes="relu(upsample_nearest(big) + little)",
        used_for="every merge of two branches, every residual add",
        function=merge,
        reference=reference.merge,
        inputs=testing.merge_inputs,
        shapes=testing.SHAPES,
        specializations=specializations,
    ),
)
