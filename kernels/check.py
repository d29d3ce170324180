"""The correctness matrix: op x dtype x layout x shape, on the user's device.

``blnet kernels check`` prints it. Every row holds an op's output and gradients against float64,
and against PyTorch's own eager path on the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from blnet.kernels import testing
from blnet.kernels.backend import KERNEL_DTYPES
from blnet.kernels.catalogue import OPS, Op


@dataclass(frozen=True)
class Row:
    """One line of the matrix.

    Attributes:
        op: name of the op.
        dtype: of inputs and result.
        layout: of the inputs, one of blnet.kernels.testing.LAYOUTS.
        shape: the sizes.
        max_error: largest absolute error of output and gradients against float64.
        error: largest relative Frobenius error of output and gradients.
        eager_error: PyTorch's own eager path's, on the same inputs.
        failure: why the row fails; empty if it passes.
    """

    op: str
    dtype: torch.dtype
    layout: str
    shape: testing.Shape
    max_error: float
    error: float
    eager_error: float
    failure: str


Results = list[torch.Tensor]


def _output_and_gradients(
    function: object, inputs: Sequence[torch.Tensor], grad: torch.Tensor
) -> Results:
    assert callable(function)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def check_row(op: Op, dtype: torch.dtype, layout: str, shape: testing.Shape, device: str) -> Row:
    """Run one case and compare it with float64 and with eager PyTorch.

    Args:
        op: the op.
        dtype: of its inputs.
        layout: of its inputs.
        shape: the sizes.
        device: where to run the op; the float64 truth is computed on the CPU.
    """
    # Drawn on the CPU, so that every device is tried on the same numbers.
    generator = torch.Generator().manual_seed(0)
    inputs = op.inputs(shape, dtype, layout, device, generator)
    grad = testing.draw(shape.little, dtype, "contiguous", device, generator)
    truth = _output_and_gradients(op.reference, [x.double().cpu() for x in inputs], grad.cpu())
    eager = _output_and_gradients(op.reference, inputs, grad)
    with testing.poisoned_outputs():
        ours = _output_and_gradients(op.function, inputs, grad)
    names = ("output", *(f"gradient {i}" for i in range(len(inputs))))
    failure = ""
    try:
        for name, got, plain, expected in zip(names, ours, eager, truth, strict=True):
            testing.assert_close(got, expected, what=name)
            if dtype is not torch.float32:
                testing.assert_no_worse(got, plain, expected, what=name)
    except AssertionError as error:
        failure = str(error)
    return Row(
        op=op.name,
        dtype=dtype,
        layout=layout,
        shape=shape,
        max_error=max(_largest(a, b) for a, b in zip(ours, truth, strict=True)),
        error=_worst(ours, truth),
        eager_error=_worst(eager, truth),
        failure=failure,
    )


def _largest(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double().cpu() - expected).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _worst(actual: Results, expected: Results) -> float:
    return max(testing.relative_error(a, b) for a, b in zip(actual, expected, strict=True))


def check_all(
    device: str,
    dtypes: Sequence[torch.dtype] = KERNEL_DTYPES,
    layouts: Sequence[str] = testing.LAYOUTS,
    ops: Sequence[Op] | None = None,
) -> Iterator[Row]:
    """Run the whole matrix, yielding each row as it is done.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        dtypes: which dtypes.
        layouts: which layouts.
        ops: which ops; None for all.
    """
    for op in OPS if ops is None else ops:
        for dtype in dtypes:
            for layout in layouts:
                for shape in op.shapes:
                    yield check_row(op, dtype, layout, shape, device)
