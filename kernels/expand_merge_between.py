"""Small matrices between the two backward passes of expand_merge_train over the maps.

    between   A and sum g, W, W S, ... -> dgamma, dbeta, dW, and U = -diag(gamma r q) W
    second    W^T U -> its rounded form for the input pass, that one's units, that pass's constant

What for, and why so: ``expand_merge_matrices.py``. The symbols: ``expand_merge_train.py``.
"""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch

from blnet.kernels.backend import KERNEL_DTYPES
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
from blnet.kernels.registration import define_op, no_flops, wrap_triton
from blnet.kernels.triton_shim import tl, triton

SECOND_ROWS, SECOND_COLUMNS = 64, 16  # of the tiles of W^T U


def between_launch(channels: int, channels_in: int, rows: int, **flags: float) -> Launch:
    """Plan the gradients of weight and BN; ``rows`` are the map's pixels."""
    plan = rows_launch(channels, channels_in, **flags)
    return Launch(plan.grid, {**plan.integers, "rows": torch.sym_max(rows, 1)}, plan.constants)


def second_launch(channels_in: int) -> Launch:
    """Plan the rounding of W^T U, whose programs own columns."""
    return Launch(
        grid=(ceil_divide(channels_in, SECOND_COLUMNS),),
        integers={"channels_in": channels_in},
        constants={"ROWS": SECOND_ROWS, "COLUMNS": SECOND_COLUMNS},
    )


# Kernels: p_ is a pointer, o_ a tile of offsets, b_ a tile of values, m_ a mask. Results go through
# float32 on their way to 16 bits: no device converts float64 directly, nor does the interpreter.


@triton.jit
def _between_kernel(
    p_products,  # g^T (x - center), (channels, channels_in)
    p_sums,  # of g
    p_weight,
    p_product,  # W S
    p_gamma,
    p_variance,
    p_mean,
    p_center,
    p_dweight,
    p_dgamma,
    p_dbeta,
    p_scale,  # gamma r, float32
    p_offset,  # the mean of g, float32
    p_u,  # -diag(gamma r q) W, float64
    channels,
    channels_in,
    rows,
    HAS_GAMMA: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_c = o_c < channels
    b_sums = tl.load(p_sums + o_c, mask=m_c, other=0.0).to(tl.float64)
    b_root, b_scale = root_and_scale(p_variance, p_gamma, o_c, m_c, HAS_GAMMA, EPS)

    b_dot = tl.zeros((ROWS,), dtype=tl.float64)
    for k in tl.range(0, channels_in, COLUMNS):
        o_k = k + tl.arange(0, COLUMNS)
        m_k = o_k < channels_in
        b_products = matrix_tile(p_products, o_c, o_k, m_c, m_k, channels_in)
        b_a = b_products - b_sums[:, None] * far_from_center(p_mean, p_center, o_k, m_k)[None, :]
        b_dot += tl.sum(matrix_tile(p_weight, o_c, o_k, m_c, m_k, channels_in) * b_a, 1)
    b_dgamma = b_root * b_dot
    b_q = b_root * b_dgamma / rows
    tl.store(p_dgamma + o_c, b_dgamma.to(tl.float32), mask=m_c)
    tl.store(p_dbeta + o_c, b_sums.to(tl.float32), mask=m_c)
    tl.store(p_scale + o_c, b_scale.to(tl.float32), mask=m_c)
    tl.store(p_offset + o_c, (b_sums / rows).to(tl.float32), mask=m_c)

    for k in tl.range(0, channels_in, COLUMNS):
        o_k = k + tl.arange(0, COLUMNS)
        m_k = o_k < channels_in
        b_products = matrix_tile(p_products, o_c, o_k, m_c, m_k, channels_in)
        b_a = b_products - b_sums[:, None] * far_from_center(p_mean, p_center, o_k, m_k)[None, :]
        b_weight = matrix_tile(p_weight, o_c, o_k, m_c, m_k, channels_in)
        b_product = matrix_tile(p_product, o_c, o_k, m_c, m_k, channels_in)
        b_dweight = b_scale[:, None] * (b_a - (b_q * rows)[:, None] * b_product)
        o_tile = o_c[:, None] * channels_in + o_k[None, :]
        m_tile = m_c[:, None] & m_k[None, :]
        tl.store(
            p_dweight + o_tile, b_dweight.to(tl.float32).to(p_dweight.dtype.element_ty), mask=m_tile
        )
        tl.store(p_u + o_tile, -(b_scale * b_q)[:, None] * b_weight, mask=m_tile)


@triton.jit
def _second_kernel(
    p_wide,  # W^T U, (channels_in, channels_in), float64
    p_mean,
    p_center,
    p_second,  # the same in x's dtype, each column divided by its unit
    p_unit,  # the power of two above the column's largest, float32
    p_constant,  # -(m - center) second, float32
    channels_in,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_j = o_j < channels_in
    b_largest = tl.zeros((COLUMNS,), dtype=tl.float32)
    for i in tl.range(0, channels_in, ROWS):
        o_i = i + tl.arange(0, ROWS)
        b_wide = matrix_tile(p_wide, o_i, o_j, o_i < channels_in, m_j, channels_in)
        b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_wide.to(tl.float32)), 0))
    # Columns of zeros and of what float32 rounds to nothing are in units of one.
    b_usual = b_largest > 1e-30
    b_unit = tl.where(b_usual, tl.exp2(tl.ceil(tl.log2(tl.where(b_usual, b_largest, 1.0)))), 1.0)
    tl.store(p_unit + o_j, b_unit, mask=m_j)

    b_constant = tl.zeros((COLUMNS,), dtype=tl.float64)
    b_unit = b_unit.to(tl.float64)
    for i in tl.range(0, channels_in, ROWS):
        o_i = i + tl.arange(0, ROWS)
        m_i = o_i < channels_in
        b_wide = matrix_tile(p_wide, o_i, o_j, m_i, m_j, channels_in) / b_unit[None, :]
        b_second = b_wide.to(tl.float32).to(p_second.dtype.element_ty)
        o_tile = o_i[:, None] * channels_in + o_j[None, :]
        tl.store(p_second + o_tile, b_second, mask=m_i[:, None] & m_j[None, :])
        b_far = far_from_center(p_mean, p_center, o_i, m_i)
        # Of the rounded matrix, which is what x is multiplied by.
        b_constant -= tl.sum(b_far[:, None] * b_second.to(tl.float32).to(tl.float64), 0)
    tl.store(p_constant + o_j, (b_constant * b_unit).to(tl.float32), mask=m_j)


# Launchers -----------------------------------------------------------------------------------


def _between(
    products: torch.Tensor,
    sums: torch.Tensor,
    weight: torch.Tensor,
    product: torch.Tensor,
    gamma: torch.Tensor | None,
    variance: torch.Tensor,
    mean: torch.Tensor,
    center: torch.Tensor,
    eps: float,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # Returns (dweight, dgamma, dbeta, scale, mean of g, U). products (C, K) and sums (C) are of
    # x - center and float32, W S (C, K), variance (C) and mean (K) float64.
    channels, channels_in = weight.shape
    dweight, u = (
        new(weight, kind, channels, channels_in) for kind in (weight.dtype, torch.float64)
    )
    dgamma, dbeta, scale, offset = (new(weight, torch.float32, channels) for _ in range(4))
    if known(channels == 0):
        return dweight, dgamma, dbeta, scale, offset, u
    launch = between_launch(channels, channels_in, rows, EPS=eps, HAS_GAMMA=gamma is not None)
    with device_guard(u):
        wrap_triton(_between_kernel)[launch.grid](
            p_products=products,
            p_sums=sums,
            p_weight=weight.contiguous(),
            p_product=product,
            p_gamma=variance if gamma is None else gamma.contiguous(),
            p_variance=variance,
            p_mean=mean,
            p_center=center,
            p_dweight=dweight,
            p_dgamma=dgamma,
            p_dbeta=dbeta,
            p_scale=scale,
            p_offset=offset,
            p_u=u,
            **launch.arguments,
        )
    return dweight, dgamma, dbeta, scale, offset, u


def _second(
    wide: torch.Tensor, mean: torch.Tensor, center: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Returns W^T U in the dtype of ``like`` (K, K), its columns' units and the input pass's
    # constant (K), both float32, from W^T U (K, K) and the mean of x (K), float64.
    channels_in = wide.shape[0]
    rounded = new(wide, like.dtype, channels_in, channels_in)
    unit, constant = (new(center, torch.float32, channels_in) for _ in range(2))
    if known(channels_in == 0):
        return rounded, unit, constant
    launch = second_launch(channels_in)
    with device_guard(rounded):
        wrap_triton(_second_kernel)[launch.grid](
            p_wide=wide,
            p_mean=mean,
            p_center=center,
            p_second=rounded,
            p_unit=unit,
            p_constant=constant,
            **launch.arguments,
        )
    return rounded, unit, constant


# The registered ops --------------------------------------------------------------------------

between_op = define_op("blnet::expand_merge_between", _between, flops=no_flops)
second_op = define_op("blnet::expand_merge_second", _second, flops=no_flops)

# For ahead-of-time compilation ---------------------------------------------------------------


def specializations() -> list[Specialization]:
    """List what ``blnet kernels compile`` builds: every kernel, in every dtype of the weight."""
    found = []
    full, wide = torch.float32, torch.float64
    names = ("p_products", "p_sums", "p_gamma", "p_center", "p_dgamma", "p_dbeta", "p_scale")
    for title, (k, c) in PROBLEMS.items():
        for dtype in KERNEL_DTYPES:
            short = f"{title} {str(dtype).removeprefix('torch.')}"
            pointers = {**dict.fromkeys((*names, "p_offset"), full), "p_weight": dtype}
            pointers |= {**dict.fromkeys(("p_product", "p_variance", "p_mean", "p_u"), wide)}
            pointers["p_dweight"] = dtype
            launch = between_launch(c, k, 2**20, EPS=1e-5, HAS_GAMMA=True)
            name = f"expand_merge between {short}"
            found.append(specialize(name, _between_kernel, launch, pointers))
            pointers = {"p_wide": wide, "p_mean": wide, "p_center": full, "p_second": dtype}
            pointers |= {"p_unit": full, "p_constant": full}
            name = f"expand_merge second {short}"
            found.append(specialize(name, _second_kernel, second_launch(k), pointers))
    return found
