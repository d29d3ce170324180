"""Helpers to hold a kernel to its reference: tolerances, shapes, inputs, poisoned outputs.

Public: users can hold their own kernels to the same matrix, and the benchmarks build their inputs
here, so that what is timed is what is tested. ::

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
NO_WORSE = 1.25  # a kernel's error may be this many times that of PyTorch's own eager path
LAYOUTS = ("channels_last", "contiguous", "mixed", "strided")


@dataclass(frozen=True)
class Shape:
    """Sizes of a merge, and why they are tested.

    Attributes:
        n: batch.
        c: channels.
        h: height of little and of the output.
        w: width of little and of the output.
        h_big: height of big.
        w_big: width of big.
        reason: why this case exists.
    """

    n: int
    c: int
    h: int
    w: int
    h_big: int
    w_big: int
    reason: str

    @property
    def big(self) -> tuple[int, int, int, int]:
        """Shape of big."""
        return (self.n, self.c, self.h_big, self.w_big)

    @property
    def little(self) -> tuple[int, int, int, int]:
        """Shape of little."""
        return (self.n, self.c, self.h, self.w)

    def __str__(self) -> str:
        little = "x".join(str(size) for size in self.little)
        return f"{little} from {self.h_big}x{self.w_big}"


SHAPES = (
    Shape(2, 64, 8, 8, 4, 4, "doubling, as at every merge of a network at even sizes"),
    Shape(1, 48, 7, 9, 4, 5, "odd sizes next to doubling: ceil(H / 2), and C no power of two"),
    Shape(2, 32, 6, 5, 6, 5, "equal sizes: the plain residual add"),
    Shape(1, 1, 1, 1, 1, 1, "a single element"),
    Shape(3, 5, 1, 1, 1, 1, "one pixel: both layouts are the same memory"),
    Shape(1, 3, 40, 1, 20, 1, "speech: one time step, and unaligned channels"),
    Shape(2, 300, 4, 6, 2, 3, "more channels than the widest tile"),
    Shape(1, 16, 40, 40, 20, 20, "more pixels than a tile holds"),
    Shape(1, 8, 12, 12, 3, 4, "whole ratios 4 and 3 that differ between the axes"),
    Shape(1, 4, 20, 10, 2, 2, "ratios 10 and 5: above the largest that is compiled in"),
    Shape(2, 7, 10, 9, 4, 7, "ratios 5/2 and 9/7: windows of different sizes in one map"),
    Shape(2, 6, 13, 11, 1, 1, "one pixel copied everywhere: the window is the whole map"),
    Shape(1, 5, 3, 4, 7, 9, "big is larger: some of its pixels are never read, gradient 0"),
    Shape(1, 5, 6, 4, 3, 9, "up in one axis, down in the other"),
    Shape(2, 6, 8, 5, 4, 5, "up in one axis, equal in the other"),
    Shape(0, 8, 4, 4, 2, 2, "empty batch"),
    Shape(2, 0, 4, 4, 2, 2, "no channels"),
    Shape(2, 8, 0, 4, 2, 2, "no rows: big's gradient is zero, not uninitialised"),
)


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

    Args:
        actual: the result.
        eager: what plain PyTorch computes from the same inputs in the same dtype.
        expected: the truth in float64.
        what: what is compared, for the message.

    Raises:
        AssertionError: if the error is larger.
    """
    ours, theirs = relative_error(actual, expected), relative_error(eager, expected)
    if not ours <= NO_WORSE * theirs:
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
    """Build big and little for ``merge``; the tests and the benchmarks both use this.

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
