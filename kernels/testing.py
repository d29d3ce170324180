"""Helpers to hold a kernel to its reference: tolerances, shapes, inputs, poisoned outputs.

Public: users can hold their own kernels to the same matrix. ::

    from blnet.kernels import merge, reference, testing

    for shape in testing.SHAPES:
        big, little = testing.merge_inputs(shape, torch.bfloat16, "channels_last")
        with testing.poisoned_outputs():
            out = merge(big, little)
        testing.assert_close(out, reference.merge(big.double(), little.double()))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from blnet.kernels import launch
from blnet.kernels.shapes import (
    BOTTLENECK_SHAPES,
    EXPAND_SHAPES,
    SHAPES,
    STEM_SHAPES,
    BottleneckShape,
    ExpandShape,
    Shape,
    StemShape,
)

__all__ = [
    "BOTTLENECK_SHAPES",
    "EXPAND_SHAPES",
    "LAYOUTS",
    "SHAPES",
    "STEM_SHAPES",
    "TOLERANCES",
    "AnyShape",
    "BottleneckShape",
    "ExpandShape",
    "Shape",
    "StemShape",
    "Tolerance",
    "assert_close",
    "assert_no_worse",
    "bottleneck_inputs",
    "draw",
    "expand_merge_inputs",
    "merge_inputs",
    "moments_inputs",
    "poisoned_outputs",
    "relative_error",
    "stem_inputs",
]

AnyShape = Shape | ExpandShape | BottleneckShape | StemShape


@dataclass(frozen=True)
class Tolerance:
    """How far a result may lie from the float64 truth.

    Attributes:
        elementwise: bound on abs(actual - expected) / (abs(expected) + scale) of every element,
            with scale the root mean square of the expected values.
        frobenius: bound on the relative Frobenius error of the whole tensor.
        reason: where the numbers come from.
    """

    elementwise: float
    frobenius: float
    reason: str


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-13, "52 bits of mantissa, sums of a few hundred terms"),
    torch.float32: Tolerance(1e-5, 1e-5, "23 bits of mantissa; the project's bound for float32"),
    torch.float16: Tolerance(2e-3, 1e-3, "10 bits of mantissa: two roundings of 2**-11 = 4.9e-4"),
    torch.bfloat16: Tolerance(1.6e-2, 8e-3, "7 bits of mantissa: two roundings of 2**-8 = 3.9e-3"),
}
FLOAT32_SUMS = 1e-6  # relative error that a float32 sum of a few thousand terms may always have
NO_WORSE = 1.25  # a kernel's error may be this many times that of PyTorch's own eager path
LAYOUTS = ("channels_last", "contiguous", "mixed", "strided")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the Frobenius norm of the difference over that of ``expected``, in float64.

    Args:
        actual: the result, any dtype and device.
        expected: the truth, same shape.

    Returns:
        0 for equal or empty tensors; NaN if ``actual`` holds a NaN where ``expected`` does not.
    """
    expected = expected.detach().double().cpu()
    difference = actual.detach().double().cpu() - expected
    error, norm = float(difference.norm()), float(expected.norm())
    return error if norm == 0 else error / norm


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    what: str = "result",
) -> None:
    """Assert that a result agrees with its float64 truth as well as its dtype allows.

    Args:
        actual: the result.
        expected: the truth, computed in float64 from the same (already rounded) inputs.
        dtype: whose tolerance to take; None for that of ``actual``.
        what: what is compared, for the message.

    Raises:
        AssertionError: if shapes differ, if an element is off or NaN, or if the whole is.
    """
    dtype = dtype or actual.dtype
    tolerance = TOLERANCES[dtype]
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
    if actual.numel() == 0:
        return
    truth, got = expected.detach().double().cpu(), actual.detach().double().cpu()
    scale = truth.square().mean().sqrt()
    error = (got - truth).abs() / (truth.abs() + scale).clamp_min(torch.finfo(dtype).tiny)
    wrong = ~(error <= tolerance.elementwise)  # this way round a NaN counts as wrong
    if wrong.any():
        index = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off by more than "
            f"{tolerance.elementwise:g} ({dtype}: {tolerance.reason}); the first is {index}: "
            f"got {got[index]:.7g}, expected {truth[index]:.7g}"
        )
    whole = relative_error(actual, expected)
    if not whole <= tolerance.frobenius:
        raise AssertionError(
            f"{what}: relative Frobenius error {whole:.3g} is above {tolerance.frobenius:g} "
            f"({dtype}: {tolerance.reason})"
        )


def assert_no_worse(
    actual: torch.Tensor, eager: torch.Tensor, expected: torch.Tensor, *, what: str = "result"
) -> None:
    """Assert that a result's error is at most 1.25 times that of PyTorch's own eager path.

    Errors below 1e-6 pass: they are the rounding of float32 sums, in whatever order.

    Args:
        actual: the result.
        eager: what plain PyTorch computes from the same inputs in the same dtype.
        expected: the truth in float64.
        what: what is compared, for the message.

    Raises:
        AssertionError: if the error is larger.
    """
    ours, theirs = relative_error(actual, expected), relative_error(eager, expected)
    if not ours <= max(NO_WORSE * theirs, FLOAT32_SUMS):
        raise AssertionError(
            f"{what}: relative error {ours:.4g} is above {NO_WORSE} x eager PyTorch's {theirs:.4g}"
        )


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill every output that a launcher allocates with NaN first.

    An element that no program writes then fails :func:`assert_close`, where otherwise it would
    hold whatever the memory held, which is often the right answer of the previous test.
    """
    previous, launch._poison = launch._poison, True
    try:
        yield
    finally:
        launch._poison = previous


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw a map from a normal distribution.

    Args:
        shape: (N, C, H, W).
        dtype: its dtype; the values are drawn in float32 and rounded.
        layout: "channels_last", "contiguous" or "strided" (a view with gaps between elements).
        device: where to put it.
        generator: where the values come from; it decides where they are drawn.

    Raises:
        ValueError: for an unknown layout.
    """
    if layout not in ("channels_last", "contiguous", "strided"):
        known = ", ".join(repr(name) for name in LAYOUTS)
        raise ValueError(f"draw: no layout {layout!r}; choose one of {known}")
    where = generator.device if generator is not None else device
    n, c, h, w = shape
    space = (n, c, h, 2 * w) if layout == "strided" else shape
    values = torch.randn(space, generator=generator, device=where).to(device=device, dtype=dtype)
    if layout == "strided":
        return values[..., ::2]
    return values.contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )


def merge_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Build big and little for ``merge``, as the correctness matrix draws them.

    Args:
        shape: the sizes.
        dtype: of both.
        layout: one of :data:`LAYOUTS`; "mixed" is channels-last little and contiguous big.
        device: where to put them.
        generator: for values that repeat; None draws from the device's default generator.

    Returns:
        (big, little), neither of which requires a gradient.
    """
    of_big, of_little = ("contiguous", "channels_last") if layout == "mixed" else (layout, layout)
    big = draw(shape.big, dtype, of_big, device, generator)
    return big, draw(shape.little, dtype, of_little, device, generator)


def _as_dtype(x: torch.Tensor, dtype: torch.dtype, strided: bool) -> torch.Tensor:
    return x.repeat_interleave(2, -1).to(dtype)[..., ::2] if strided else x.to(dtype)


def expand_merge_inputs(
    shape: ExpandShape,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    offset: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Build the tensors of ``expand_merge``, as the correctness matrix draws them.

    Args:
        shape: the sizes.
        dtype: of x, weight and big.
        layout: one of :data:`LAYOUTS`; "mixed" is channels-last x and contiguous big.
        device: where to put them.
        generator: for values that repeat; None draws from the device's default generator.
        offset: how many standard deviations the channels' means lie from zero, either way.

    Returns:
        (x, weight, scale, shift, big), scale above 0 and, with shift, in float32, big None where
        the shape has none; none of them requires a gradient.
    """
    of_big, of_x = ("contiguous", "channels_last") if layout == "mixed" else (layout, layout)
    where = generator.device if generator is not None else device

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=where).to(device)

    x = draw(shape.x, torch.float32, of_x, device, generator)
    # In place: a view stays that view.
    x = x.add_((offset * normal(shape.k).sign()).view(-1, 1, 1))
    x = _as_dtype(x, dtype, layout == "strided")
    weight = (normal(shape.c, shape.k, 1, 1) / max(shape.k, 1) ** 0.5).to(dtype)
    scale, shift = normal(shape.c).sigmoid() + 0.5, normal(shape.c)
    big = None if shape.big is None else draw(shape.big, dtype, of_big, device, generator)
    return x, weight, scale, shift, big


def moments_inputs(
    shape: ExpandShape,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Build x and shift for ``moments``, with means 30 standard deviations from zero.

    Args:
        shape: the sizes; those of x count.
        dtype: of x; shift is float32.
        layout: one of :data:`LAYOUTS`, of x.
        device: where to put them.
        generator: for values that repeat; None draws from the device's default generator.
    """
    x = expand_merge_inputs(shape, dtype, layout, device, generator, offset=30.0)[0]
    signs = x.float().sum((0, 2, 3)).sign()
    return x, 30.0 * signs


def bottleneck_inputs(
    shape: BottleneckShape,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Build the tensors of ``bottleneck``, as the correctness matrix draws them.

    Args:
        shape: the sizes.
        dtype: of the maps and weights; shifts are float32.
        layout: one of :data:`LAYOUTS`; "mixed" is channels-last maps but contiguous big and
            shortcut, and weights packed for the kernels.
        device: where to put them.
        generator: for values that repeat; None draws from the device's default generator.

    Returns:
        (x, weight1, shift1, weight2, shift2, weight3, shift3, shortcut, weight_expand,
        shift_expand, big), None for what the shape has none of; no tensor requires a gradient.
    """
    of_big, of_x = ("contiguous", "channels_last") if layout == "mixed" else (layout, layout)

    def layer(c: int, k: int, kernel: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        return _layer(c, k, kernel, dtype, layout, device, generator)

    def optional(size: tuple[int, int, int, int] | None) -> torch.Tensor | None:
        return None if size is None else draw(size, dtype, of_big, device, generator)

    x = draw(shape.x, dtype, of_x, device, generator)
    first, second = layer(shape.i, shape.k), layer(shape.i, shape.i, 3)
    third, shortcut = layer(shape.c, shape.i), optional(shape.shortcut)
    expansion = layer(shape.c_out, shape.c) if shape.c_out else (None, None)
    return (x, *first, *second, *third, shortcut, *expansion, optional(shape.big))


def _layer(
    c: int,
    k: int,
    kernel: int,
    dtype: torch.dtype,
    layout: str,
    device: torch.device | str,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the weight and the shift of a convolution that keeps the size of what it is given."""
    where = generator.device if generator is not None else device
    weight = torch.randn((c, k, kernel, kernel), generator=generator, device=where)
    # A 3x3 kernel's nine taps see the map behind a ReLU, which halves the mean square.
    weight = (weight * (2 / (k * kernel**2)) ** 0.5).to(device=device, dtype=dtype)
    if layout == "mixed":
        weight = weight.contiguous(memory_format=torch.channels_last)
    return weight, torch.randn(c, generator=generator, device=where).to(device) / 2


def stem_inputs(
    shape: StemShape,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Build the tensors of ``stem``, as the correctness matrix draws them.

    Args:
        shape: the sizes.
        dtype: of the maps and weights; shifts are float32.
        layout: one of :data:`LAYOUTS`; "mixed" is channels-last x, contiguous little and weights
            packed for the kernels.
        device: where to put them.
        generator: for values that repeat; None draws from the device's default generator.

    Returns:
        (x, little, weight_expand, shift_expand, weight_fusion, shift_fusion, weight_big,
        shift_big, weight_little, shift_little), None for what the shape has none of; no tensor
        requires a gradient.
    """
    of_little, of_x = ("contiguous", "channels_last") if layout == "mixed" else (layout, layout)

    def layer(c: int, k: int, kernel: int = 1) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return _layer(c, k, kernel, dtype, layout, device, generator) if k else (None, None)

    x = draw(shape.x, dtype, of_x, device, generator)
    little = draw(shape.little, dtype, of_little, device, generator)
    expand, fusion = layer(shape.c, shape.narrow), layer(shape.c_out, shape.c)
    big, narrow = layer(shape.c, shape.c_x, 3), layer(shape.narrow, shape.c_little, 3)
    return (x, little, *expand, *fusion, *big, *narrow)
