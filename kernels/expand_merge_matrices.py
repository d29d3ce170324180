"""What expand_merge_train computes between its passes over the maps: small matrices.

Written with PyTorch's operations this was about a hundred launches a layer and step, for matrices
of at most C x K numbers. Now it is five kernels, in ``expand_merge_statistics.py`` (forward) and
``expand_merge_between.py`` (backward), beside three matrix products of PyTorch's. What that is
worth on a GPU has not been measured. This file has what they share. All is in float64, as
``expand_merge_train.py`` explains, where the symbols are.

Everything is deterministic: a program owns its rows of the result and sums in a fixed order.
Statistics shared between processes come between the kernels, in PyTorch's operations
(``expand_merge_sync.py``).
"""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch

from blnet.kernels.launch import Launch, allocate, ceil_divide
from blnet.kernels.registration import define_op, no_flops
from blnet.kernels.triton_shim import tl, triton

# Enough programs for narrow layers, tiles of a few registers a thread.
ROWS = 8  # rows of W that a program owns
COLUMNS = 64  # columns of W at once

# For ahead-of-time compilation: name -> K, C. Narrow and wide layers, and rows at odd addresses.
PROBLEMS = {"K=32 C=64": (32, 64), "K=512 C=2048": (512, 2048), "unaligned K=37 C=75": (37, 75)}


def rows_launch(channels: int, channels_in: int, **flags: float) -> Launch:
    """Plan a kernel whose programs own rows of W."""
    return Launch(
        grid=(ceil_divide(channels, ROWS),),
        integers={"channels": channels, "channels_in": channels_in},
        constants={**flags, "ROWS": ROWS, "COLUMNS": COLUMNS},
    )


@triton.jit
def matrix_tile(p_matrix, o_row, o_column, m_row, m_column, columns):
    """Load a tile of a matrix in float64, 0 outside of it."""
    o_tile = o_row[:, None] * columns + o_column[None, :]
    m_tile = m_row[:, None] & m_column[None, :]
    return tl.load(p_matrix + o_tile, mask=m_tile, other=0.0).to(tl.float64)


@triton.jit
def far_from_center(p_mean, p_center, o_k, m_k):
    """Load a block of m - center."""
    b_center = tl.load(p_center + o_k, mask=m_k, other=0.0).to(tl.float64)
    return tl.load(p_mean + o_k, mask=m_k, other=0.0) - b_center


@triton.jit
def root_and_scale(p_variance, p_gamma, o_c, m_c, HAS_GAMMA, EPS):
    """Return r = 1 / sqrt(variance + eps) and gamma r."""
    b_root = 1.0 / tl.sqrt(tl.load(p_variance + o_c, mask=m_c, other=1.0) + EPS)
    b_scale = b_root
    if HAS_GAMMA:
        b_scale = b_root * tl.load(p_gamma + o_c, mask=m_c, other=0.0).to(tl.float64)
    return b_root, b_scale


def new(like: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Allocate a contiguous tensor of a dtype on the device of another."""
    return allocate(like.new_empty(0, dtype=dtype), shape, torch.contiguous_format)


def _small_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # In float64, which no global switch turns into tf32. Its FLOPs do not count: expand_merge_train
    # counts as the convolution alone on every backend.
    return left.double() @ right.double()


small_product = define_op("blnet::small_product", _small_product, flops=no_flops)
