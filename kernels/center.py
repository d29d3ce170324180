"""The estimate of a map's channel means that ``moments`` takes as its shift: a sample of pixels.

What it is for, and when it answers 0, is at the top of ``moments.py``. Bytes: 128 pixels.
"""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch

from blnet.kernels import reference
from blnet.kernels.arguments import check_map
from blnet.kernels.backend import KERNEL_DTYPES, choose_backend
from blnet.kernels.launch import (
    Launch,
    Specialization,
    allocate,
    ceil_divide,
    channels_last,
    device_guard,
    known,
    next_power_of_2,
    specialize,
)
from blnet.kernels.registration import define_op, no_flops, wrap_triton
from blnet.kernels.triton_shim import tl, triton

SAMPLE_ROWS = 128  # for the estimate of the mean: its error is then 0.09 std


def row_count(x: torch.Tensor) -> int:
    """Return the number of pixels of a map, N H W."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def center_launch(rows: int, channels: int, itemsize: int) -> Launch:
    """Plan the estimate of the mean."""
    block = min(next_power_of_2(channels), 32)
    return Launch(
        grid=(ceil_divide(channels, block),),
        integers={"rows": rows, "channels": channels},
        constants={"ROUND": itemsize == 2, "SAMPLE": SAMPLE_ROWS, "BLOCK": block},
    )


@triton.jit
def _center_kernel(
    p_x,
    p_center,
    rows,
    channels,
    ROUND: tl.constexpr,  # 16-bit map: 0 or a number of that dtype, see moments.py
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_channel = o_channel < channels
    # Evenly spread over all images; repeated where there are fewer than SAMPLE.
    o_row = tl.arange(0, SAMPLE).to(tl.int64) * rows // SAMPLE
    o_tile = o_row[:, None] * channels + o_channel[None, :]
    b_x = tl.load(p_x + o_tile, mask=m_channel[None, :], other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x, 0) / SAMPLE
    if ROUND:
        b_deviation = b_x - b_mean[None, :]
        b_variance = tl.sum(b_deviation * b_deviation, 0) / SAMPLE
        b_mean = tl.where(b_mean * b_mean > 16.0 * b_variance, b_mean, 0.0)
        b_mean = b_mean.to(p_x.dtype.element_ty).to(tl.float32)
    tl.store(p_center + o_channel, b_mean, mask=m_channel)


def estimated_center(x: torch.Tensor) -> torch.Tensor:
    """Launch the estimate of the mean: shape (K,), float32; see :func:`estimate_center`."""
    rows, channels = row_count(x), x.shape[1]
    like = x.new_empty(0, dtype=torch.float32)
    if known(rows * channels == 0):
        return like.new_zeros(channels)
    x = channels_last(x)
    center = allocate(like, (channels,), torch.contiguous_format)
    launch = center_launch(rows, channels, x.element_size())
    with device_guard(x):
        wrap_triton(_center_kernel)[launch.grid](p_x=x, p_center=center, **launch.arguments)
    return center


center_op = define_op("blnet::center", estimated_center, flops=no_flops)


def estimate_center(x: torch.Tensor) -> torch.Tensor:
    """Estimate the mean of every channel from at most 128 pixels: a good ``shift``.

    Args:
        x: shape (N, K, H, W).

    Returns:
        Shape (K,), float32 (float64 for a float64 map). For 16-bit maps on the kernels 0 where
        the mean is within 4 standard deviations of 0, and else a number of x's dtype.

    Raises:
        ValueError: if x is not a 4-dimensional floating-point tensor.
    """
    check_map("estimate_center", "x", x)
    if choose_backend("estimate_center", x) == "torch":
        rows = reference.rows_of(x.detach())
        sample = rows[:: max(rows.shape[0] // SAMPLE_ROWS, 1)][:SAMPLE_ROWS]
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        return sample.to(wide).sum(0) / max(sample.shape[0], 1)
    return center_op(x.detach())  # type: ignore[no-any-return]


def specializations() -> list[Specialization]:
    """List what ``blnet kernels compile`` builds: the kernel in every dtype."""
    found = []
    for dtype in KERNEL_DTYPES:
        launch = center_launch(32 * 28 * 28, 128, dtype.itemsize)
        pointers = {"p_x": dtype, "p_center": torch.float32}
        name = f"moments center {str(dtype).removeprefix('torch.')}"
        found.append(specialize(name, _center_kernel, launch, pointers))
    return found
