"""expand_merge with all of its gradients, as the tests of its kernels run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blnet.kernels import expand_merge, expand_merge_train, reference, testing

NAMES = ("x", "weight", "scale", "shift", "big")

SMALL = testing.ExpandShape(2, 5, 7, 6, 7, 3, 4, "small, odd, several windows")
DOUBLING = testing.EXPAND_SHAPES[0]
RESIDUAL = testing.EXPAND_SHAPES[2]
ALONE = testing.EXPAND_SHAPES[3]

Tensors = Sequence[Tensor | None]


def inputs(
    shape: testing.ExpandShape,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    number: int = 0,
    offset: float = 1.0,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """Return x, weight, scale, shift and big of a shape, and a gradient of the output.

    Args:
        shape: the sizes.
        dtype: of all but scale and shift.
        layout: one of :data:`blnet.kernels.testing.LAYOUTS`.
        number: seed of the values.
        offset: how many standard deviations the channels' means lie from zero, either way.
    """
    generator = torch.Generator().manual_seed(number)
    tensors = testing.expand_merge_inputs(shape, dtype, layout, "cpu", generator, offset)
    return tensors, testing.draw(shape.out, dtype, "contiguous", "cpu", generator)


def run(
    function: Callable[..., Tensor], tensors: Tensors, grad: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Return the output and the gradients of the tensors.

    Args:
        function: expand_merge, expand_merge_train or a reference of either.
        tensors: x, weight, scale, shift and big.
        grad: of the output.
        options: further arguments of the function.

    Returns:
        "out", and the gradient of each tensor that is not None: "dx", "dweight" and so on.
    """
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    x, weight, scale, shift, big = leaves
    out = function(x, weight, scale, shift, big=big, **options)
    wanted = [leaf for leaf in leaves if leaf is not None]
    results = {"out": out.detach()}
    grads = torch.autograd.grad(out, wanted, grad.to(out.dtype))
    names = [name for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None]
    return results | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def doubled(tensors: Tensors) -> list[Tensor | None]:
    """Return the tensors in float64."""
    return [t if t is None else t.double() for t in tensors]


def of_reference(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the plain PyTorch of expand_merge or of expand_merge_train."""
    plain: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
        expand_merge: reference.expand_merge,
        expand_merge_train: reference.expand_merge_train,
    }
    return plain[function]
