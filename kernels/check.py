"""The correctness matrix: op x dtype x layout x shape, on the user's device.

``blnet kernels check`` prints it. Every row holds an op's output and gradients against float64,
and against PyTorch's own eager path on the same inputs.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from blnet.kernels import testing
from blnet.kernels.backend import KERNEL_DTYPES, choose_backend
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
    shape: testing.AnyShape
    max_error: float
    error: float
    eager_error: float
    failure: str


Results = list[torch.Tensor]
LARGE = 256  # elements: the errors of fewer can beat or lose to eager PyTorch's by chance


def _run(
    op: Op, function: Callable[..., Any], inputs: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> Results:
    """Return all outputs of an op, then its gradients for a drawn upstream one.

    Outputs after the first are statistics, without gradients.
    """
    leaves = [x if x is None else x.detach().requires_grad_(op.differentiable) for x in inputs]
    result = function(*leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    results = [output.detach() for output in outputs]
    if not op.differentiable:
        return results
    # Rounded as the inputs are, so that every precision sees the same numbers.
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return results + list(torch.autograd.grad(outputs[0], wanted, grad.to(outputs[0])))


def judge(
    got: torch.Tensor,
    plain: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype,
    what: str,
    by_kernel: bool = True,
) -> None:
    """Hold a result to float64 and to eager PyTorch's own error.

    Where eager PyTorch itself is further off in 16 bits than rounding the result explains (it
    rounds the convolution's output, and BN divides by what is left), its error is the bound; where
    PyTorch's code runs instead of a kernel, in 32 bits too.

    Raises:
        AssertionError: if the result is wrong.
    """
    try:
        testing.assert_close(got, expected, dtype=dtype, what=what)
    except AssertionError:
        if dtype is torch.float32 and by_kernel:
            raise
        testing.assert_no_worse(got, plain, expected, what=what)
    else:
        if dtype is not torch.float32 and expected.numel() >= LARGE:
            testing.assert_no_worse(got, plain, expected, what=what)


def check_row(
    op: Op,
    dtype: torch.dtype,
    layout: str,
    shape: testing.AnyShape,
    device: str,
) -> Row:
    """Run one case and compare it with float64 and with eager PyTorch.

    Args:
        op: the op.
        dtype: of its inputs.
        layout: of its inputs.
        shape: the sizes.
        device: where to run the op; the float64 truth is computed on the CPU.
    """
    try:
        return _checked(op, dtype, layout, shape, device)
    except Exception as error:  # a kernel that cannot be launched, say, hides no other's result
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        nothing = float("nan")
        return Row(op.name, dtype, layout, shape, nothing, nothing, nothing, failure)


def _checked(op: Op, dtype: torch.dtype, layout: str, shape: testing.AnyShape, device: str) -> Row:
    # Drawn on the CPU, so that every device is tried on the same numbers.
    generator = torch.Generator().manual_seed(0)
    inputs = op.inputs(shape, dtype, layout, device, generator)
    wide = [x if x is None else x.double().cpu() for x in inputs]
    truth = _run(op, op.reference, wide, dtype)
    # By default PyTorch convolves float32 in TF32, with which no kernel of ours is to be compared.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        eager = _run(op, op.reference, inputs, dtype)
    with testing.poisoned_outputs():
        ours = _run(op, op.function, inputs, dtype)
    outputs = len(ours) - op.differentiable * sum(x is not None for x in inputs)
    names = ["output" if i == 0 else f"output {i}" for i in range(outputs)]
    names += [f"gradient {i}" for i in range(len(ours) - outputs)]
    failure = ""
    by_kernel = choose_backend(op.name, torch.empty(0, dtype=dtype, device=device)) != "torch"
    try:
        for name, got, plain, expected in zip(names, ours, eager, truth, strict=True):
            judge(got, plain, expected, dtype, name, by_kernel)
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
    ops: Sequence[Op] | None = None,
    jobs: int = 1,
) -> Iterator[Row]:
    """Run the whole matrix, yielding each row as it is done.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        dtypes: which dtypes.
        ops: which ops; None for all.
        jobs: processes that share the work, where all of ``ops`` are of the catalogue. On a GPU
            nearly all of it is compiling.
    """
    ops = OPS if ops is None else ops
    if jobs == 1:
        for op in ops:
            for dtype in dtypes:
                for shape in op.shapes:
                    for layout in testing.LAYOUTS:
                        yield check_row(op, dtype, layout, shape, device)
        return
    # All layouts of a case share what is compiled, so they stay together.
    cases = [
        (op.name, dtype, number)
        for op in ops
        for dtype in dtypes
        for number in range(len(op.shapes))
    ]
    run = partial(_check_case, device=device)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(
        jobs, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for rows in pool.map(run, cases):
            yield from rows


def _check_case(case: tuple[str, torch.dtype, int], device: str) -> list[Row]:
    name, dtype, number = case
    op = next(op for op in OPS if op.name == name)
    shape = op.shapes[number]
    return [check_row(op, dtype, layout, shape, device) for layout in testing.LAYOUTS]
