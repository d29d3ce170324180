"""The batch statistics of expand_merge_train, and what the forward pass makes of them.

    statistics   shares of the moments -> m (K), S (K x K)
    variance     W, W S, m -> var(y) (C), and what the running statistics take
    affine       W, m, var(y), gamma, beta -> scale and shift of the forward pass (C)

What for, and why so: ``expand_merge_matrices.py``. The symbols: ``expand_merge_train.py``.
"""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch

from blnet.kernels.backend import KERNEL_DTYPES
from blnet.kernels.center import estimated_center, row_count
from blnet.kernels.expand_merge_matrices import (
    PROBLEMS,
    far_from_center,
    matrix_tile,
    new,
    root_and_scale,
    rows_launch,
)
from blnet.kernels.launch import (
    Launch,
    Specialization,
    ceil_divide,
    device_guard,
    known,
    specialize,
)
from blnet.kernels.moments import shares
from blnet.kernels.registration import define_op, no_flops, wrap_triton
from blnet.kernels.triton_shim import tl, triton

PAIR_BLOCK = 16  # rows and columns of a tile of S
SHARES = 16  # shares of the moments that are added at once


def statistics_launch(parts: int, rows: int, channels: int) -> Launch:
    """Plan the reduction of the moments' shares."""
    tiles = ceil_divide(channels, PAIR_BLOCK)
    return Launch(
        grid=(tiles, tiles),
        integers={"parts": parts, "rows": rows, "channels": channels},
        constants={"SHARES": SHARES, "BLOCK": PAIR_BLOCK},
        num_warps=8,
    )


def variance_launch(channels: int, channels_in: int, rows: int) -> Launch:
    """Plan the variance of y."""
    plan = rows_launch(channels, channels_in)
    more = {"rows": torch.sym_max(rows, 1), "others": torch.sym_max(rows - 1, 1)}
    return Launch(plan.grid, {**plan.integers, **more}, plan.constants)


# Kernels: p_ is a pointer, o_ a tile of offsets, b_ a tile of values, m_ a mask -----------------


@triton.jit
def _offsets(p_sums, o_channel, m_channel, parts, rows, channels, SHARES, BLOCK):
    """Return the mean of x - center for a block of channels: the sum of all shares over rows."""
    b_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    for part in tl.range(0, parts, SHARES):
        o_part = part + tl.arange(0, SHARES)
        m_tile = (o_part < parts)[:, None] & m_channel[None, :]
        o_tile = o_part[:, None] * channels + o_channel[None, :]
        b_sum += tl.sum(tl.load(p_sums + o_tile, mask=m_tile, other=0.0).to(tl.float64), 0)
    return b_sum / rows


@triton.jit
def _statistics_kernel(
    p_sums,  # (parts, channels), of x - center
    p_gram,  # (parts, channels, channels), written on and above the diagonal
    p_center,
    p_mean,  # (channels,)
    p_covariance,  # (channels, channels)
    parts,
    rows,
    channels,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_i, m_j = o_i < channels, o_j < channels
    b_off_i = _offsets(p_sums, o_i, m_i, parts, rows, channels, SHARES, BLOCK)
    b_off_j = _offsets(p_sums, o_j, m_j, parts, rows, channels, SHARES, BLOCK)
    # The same element on both sides of the diagonal.
    o_pair = tl.minimum(o_i[:, None], o_j[None, :]) * channels
    o_pair += tl.maximum(o_i[:, None], o_j[None, :])
    m_pair = m_i[:, None] & m_j[None, :]
    b_gram = tl.zeros((BLOCK, BLOCK), dtype=tl.float64)
    for part in tl.range(0, parts, SHARES):
        o_part = (part + tl.arange(0, SHARES)).to(tl.int64)
        o_tile = (o_part * channels * channels)[:, None, None] + o_pair[None, :, :]
        m_tile = (o_part < parts)[:, None, None] & m_pair[None, :, :]
        b_share = tl.load(p_gram + o_tile, mask=m_tile, other=0.0).to(tl.float64)
        b_gram += tl.sum(b_share, 0)
    b_covariance = b_gram / rows - b_off_i[:, None] * b_off_j[None, :]
    o_out = o_i[:, None] * channels + o_j[None, :]
    tl.store(p_covariance + o_out, b_covariance, mask=m_pair)
    b_mean = tl.load(p_center + o_i, mask=m_i, other=0.0).to(tl.float64) + b_off_i
    tl.store(p_mean + o_i, b_mean, mask=m_i & (tl.program_id(1) == 0))


@triton.jit
def _variance_kernel(
    p_weight,
    p_product,  # W S
    p_mean,
    p_variance,  # of y
    p_batch_mean,  # of y, float32
    p_batch_variance,  # of y, float32, unbiased
    channels,
    channels_in,
    rows,
    others,  # rows - 1, at least 1
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_c = o_c < channels
    b_variance = tl.zeros((ROWS,), dtype=tl.float64)
    b_mean = tl.zeros((ROWS,), dtype=tl.float64)
    for k in tl.range(0, channels_in, COLUMNS):
        o_k = k + tl.arange(0, COLUMNS)
        m_k = o_k < channels_in
        b_weight = matrix_tile(p_weight, o_c, o_k, m_c, m_k, channels_in)
        b_product = matrix_tile(p_product, o_c, o_k, m_c, m_k, channels_in)
        b_variance += tl.sum(b_weight * b_product, 1)
        b_mean += tl.sum(b_weight * tl.load(p_mean + o_k, mask=m_k, other=0.0)[None, :], 1)
    b_variance = tl.where(b_variance < 0.0, 0.0, b_variance)  # rounding; a NaN stays one
    tl.store(p_variance + o_c, b_variance, mask=m_c)
    tl.store(p_batch_mean + o_c, b_mean.to(tl.float32), mask=m_c)
    b_unbiased = b_variance * rows / others
    tl.store(p_batch_variance + o_c, b_unbiased.to(tl.float32), mask=m_c)


@triton.jit
def _affine_kernel(
    p_weight,
    p_mean,
    p_center,
    p_variance,
    p_gamma,
    p_beta,
    p_scale,
    p_shift,
    channels,
    channels_in,
    CENTER: tl.constexpr,  # x is centred before the product
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_c = o_c < channels
    b_mean = tl.zeros((ROWS,), dtype=tl.float64)
    for k in tl.range(0, channels_in, COLUMNS):
        o_k = k + tl.arange(0, COLUMNS)
        m_k = o_k < channels_in
        if CENTER:
            b_far = far_from_center(p_mean, p_center, o_k, m_k)
        else:
            b_far = tl.load(p_mean + o_k, mask=m_k, other=0.0)
        b_mean += tl.sum(matrix_tile(p_weight, o_c, o_k, m_c, m_k, channels_in) * b_far[None, :], 1)
    _, b_scale = root_and_scale(p_variance, p_gamma, o_c, m_c, HAS_GAMMA, EPS)
    b_shift = -b_scale * b_mean
    if HAS_BETA:
        b_shift += tl.load(p_beta + o_c, mask=m_c, other=0.0).to(tl.float64)
    tl.store(p_scale + o_c, b_scale.to(tl.float32), mask=m_c)
    tl.store(p_shift + o_c, b_shift.to(tl.float32), mask=m_c)


# Launchers -----------------------------------------------------------------------------------


def _centered_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Returns center (K) in float32, mean (K) and covariance (K, K) in float64; without pixels 0.
    rows, channels = row_count(x), x.shape[1]
    center = estimated_center(x)
    mean = new(center, torch.float64, channels)
    covariance = new(center, torch.float64, channels, channels)
    if known(rows * channels == 0):
        return center, mean.zero_(), covariance.zero_()
    sums, gram = shares(x, center)
    launch = statistics_launch(sums.shape[0], rows, channels)
    with device_guard(mean):
        wrap_triton(_statistics_kernel)[launch.grid](
            p_sums=sums,
            p_gram=gram,
            p_center=center,
            p_mean=mean,
            p_covariance=covariance,
            **launch.arguments,
        )
    return center, mean, covariance


def _output_statistics(
    weight: torch.Tensor, product: torch.Tensor, mean: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Returns var(y) in float64, and mean(y) and the unbiased variance in float32, each (C), from
    # W (C, K), W S (C, K) and the mean of x (K), both float64.
    channels, channels_in = weight.shape
    variance = new(weight, torch.float64, channels)
    batch = [new(weight, torch.float32, channels) for _ in range(2)]
    if known(channels == 0):
        return variance, batch[0], batch[1]
    launch = variance_launch(channels, channels_in, rows)
    with device_guard(variance):
        wrap_triton(_variance_kernel)[launch.grid](
            p_weight=weight.contiguous(),
            p_product=product,
            p_mean=mean,
            p_variance=variance,
            p_batch_mean=batch[0],
            p_batch_variance=batch[1],
            **launch.arguments,
        )
    return variance, batch[0], batch[1]


def affine(
    weight: torch.Tensor,
    mean: torch.Tensor,
    center: torch.Tensor | None,
    variance: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and shift of BN(W x), or of W (x - center), in float32: shape (C,) each.

    Args:
        weight: W, shape (C, K).
        mean: of x, shape (K,), float64.
        center: what is taken off x before the product, shape (K,), float32; None for nothing.
        variance: of y, shape (C,), float64.
        gamma: shape (C,), or None for 1.
        beta: shape (C,), or None for 0.
        eps: added to the variance.
    """
    channels, channels_in = weight.shape
    scale, shift = (new(weight, torch.float32, channels) for _ in range(2))
    if known(channels == 0):
        return scale, shift
    flags = {"CENTER": center is not None, "HAS_GAMMA": gamma is not None}
    launch = rows_launch(channels, channels_in, EPS=eps, HAS_BETA=beta is not None, **flags)
    with device_guard(scale):
        wrap_triton(_affine_kernel)[launch.grid](
            p_weight=weight.contiguous(),
            p_mean=mean,
            p_center=mean if center is None else center,  # what is absent is never read
            p_variance=variance,
            p_gamma=variance if gamma is None else gamma.contiguous(),
            p_beta=variance if beta is None else beta.contiguous(),
            p_scale=scale,
            p_shift=shift,
            **launch.arguments,
        )
    return scale, shift


# The registered ops --------------------------------------------------------------------------

centered_statistics_op = define_op(
    "blnet::centered_statistics", _centered_statistics, flops=no_flops
)
output_statistics_op = define_op("blnet::output_statistics", _output_statistics, flops=no_flops)

# For ahead-of-time compilation ---------------------------------------------------------------


def specializations() -> list[Specialization]:
    """List what ``blnet kernels compile`` builds: every kernel, in every dtype of the weight."""
    found = []
    full, wide = torch.float32, torch.float64
    for title, (k, c) in PROBLEMS.items():
        launch = statistics_launch(512, 2**20, k)
        pointers = {"p_sums": full, "p_gram": full, "p_center": full}
        pointers.update(p_mean=wide, p_covariance=wide)
        name = f"expand_merge statistics {title}"
        found.append(specialize(name, _statistics_kernel, launch, pointers))
        for dtype in KERNEL_DTYPES:
            short = f"{title} {str(dtype).removeprefix('torch.')}"
            given = {"p_weight": dtype, "p_mean": wide, "p_variance": wide}
            batch = {"p_product": wide, "p_batch_mean": full, "p_batch_variance": full}
            launch = variance_launch(c, k, 2**20)
            name = f"expand_merge variance {short}"
            found.append(specialize(name, _variance_kernel, launch, {**given, **batch}))
            flags = {"CENTER": dtype is full, "HAS_GAMMA": True, "HAS_BETA": True}
            launch = rows_launch(c, k, EPS=1e-5, **flags)
            names = ("p_scale", "p_shift", "p_gamma", "p_beta", "p_center")
            pointers = {**given, **dict.fromkeys(names, full)}
            found.append(
                specialize(f"expand_merge affine {short}", _affine_kernel, launch, pointers)
            )
    return found
