"""The second kernel of a bottleneck: 3x3 convolution, 1x1 convolution, add, and the expansion.

    u = relu(conv3x3(h, weight2) + shift2)                      I channels, stays in registers
    z = [relu](weight3 u + shift3 + shortcut)                   C channels
    out = relu(weight_expand z + shift_expand + upsample_nearest(big))      where it is chained on

Products of 16-bit numbers only; ``bottleneck.py`` says what float32 does and which problems chain.
"""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from blnet.kernels.conv3x3 import conv3x3, project, relu_of, tiles
from blnet.kernels.expand_merge_sizes import Problem, channel_block, source_row
from blnet.kernels.launch import (
    Launch,
    allocate,
    ceil_divide,
    device_guard,
    fits_int32,
    known,
    next_power_of_2,
)
from blnet.kernels.registration import wrap_triton
from blnet.kernels.triton_shim import tl, triton
from blnet.kernels.tuning import Choice, bucket, choices, choose, concrete, ratio_text

LARGEST_INNER = 128  # I: the sum of the 3x3 convolution is one tile


@dataclass(frozen=True)
class CloseProblem:
    """Sizes of the second kernel.

    Attributes:
        inner: I, channels of h.
        tail: what follows the 3x3 convolution: from z's channels C to the output's, with big's
            size. Not chained, the two are the same and big is as large as h.
        chained: whether the expansion follows.
    """

    inner: int
    tail: Problem
    chained: bool

    @property
    def aligned(self) -> bool:
        """Whether rows of every map start at multiples of 16 bytes, in Triton's eyes."""
        widths = (self.inner, self.tail.channels_in, self.tail.channels)
        return all(known(width % 16 == 0) for width in widths)

    @property
    def wide(self) -> bool:
        """Whether offsets may pass 32 bits."""
        # A tap may point a line and a pixel past the map before it is masked.
        rows = self.tail.rows + self.tail.width + 1
        return self.tail.wide or not fits_int32(rows * self.inner)

    @property
    def kernel(self) -> str:
        """Name of the tunable kernel; chained it is other code, with other block sizes."""
        return "bottleneck chained" if self.chained else "bottleneck alone"

    def key(self) -> str | None:
        """Return the bucket that tuning tables know the sizes by; None for symbolic ones."""
        return _key(self) if concrete(self.tail.rows, self.tail.rows_big) else None


@functools.lru_cache(maxsize=1024)  # a launch in eager mode has no time for text
def _key(problem: CloseProblem) -> str:
    tail, parts = problem.tail, [f"I={problem.inner}", f"C={problem.tail.channels_in}"]
    if problem.chained:
        parts = [parts[0], f"{parts[1]} to {tail.channels}", ratio_text(tail.same, tail.ratios)]
    return bucket(tail.itemsize, *parts, rows=tail.rows, wide=problem.wide)


# No device was at hand to tune on. Compiled for sm_80, sm_90, sm_100 and gfx942 none of these
# spills; sm_80's code, which also serves GPUs with 99 KB of shared memory, takes at most 80 KB.
# Registers a thread and shared memory on sm_90, at (I, C, C_out) of a network in bfloat16:
#
#     z alone    (16, 64) 91, 22 KB    (32, 128) 95, 30 KB    (64, 256) 105, 72 KB
#                (128, 512) 123, 96 KB
#     chained    (16, 64, 256) 107, 24 KB    (32, 128, 256 or 512) 127, 40 KB
#                (64, 256, 512) 238, 72 KB
#
# Chained, z is one tile of all its C channels. (128, 512, 1024) does not fit: with 64 rows and 8
# warps it takes 200 KB and spills 1600 bytes a thread, with 16 warps 2936, and with 32 rows it
# takes 207 registers and 138 KB but no wgmma, which needs 64 rows. So above 256 channels z goes to
# memory and expand_merge's kernel follows. So it does where rows start at odd addresses: narrow
# loads take registers, and 100 channels already spill 440 bytes.
LARGEST_CHAINED = 256  # C


# What else to measure: none of these spills for sm_90 at any site, nor takes more than 144 KB. Of
# what was tried these did spill: for z alone at (128, 512) on 4 warps 128 x 128 and 64 x 256, on 8
# 128 x 256; chained at (32, 128, 512) the same; at (64, 256, 1024) all on 16 warps, 560 bytes a
# thread and more. 32 rows use no wgmma, but small maps may want them.
ALONE_BLOCKS = "BLOCK_ROWS BLOCK_K BLOCK_C"  # then warps and stages
ALONE_CANDIDATES = (
    (128, 64, 64, 8, 2), (128, 64, 64, 8, 4), (128, 32, 64, 8, 4), (128, 64, 128, 8, 3),
    (128, 64, 32, 8, 3), (64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4),
    (64, 64, 128, 4, 3), (64, 64, 32, 4, 3), (64, 32, 64, 4, 4), (64, 64, 64, 8, 3),
    (64, 64, 128, 8, 3), (64, 128, 64, 8, 2), (128, 64, 64, 4, 3), (32, 64, 64, 4, 3),
)  # fmt: skip
CHAINED_BLOCKS = "BLOCK_ROWS BLOCK_K BLOCK_OUT"  # z is one tile, BLOCK_C is no choice
# For C of at most 128, and above.
NARROW_CANDIDATES = (
    (64, 64, 64, 4, 1), (64, 64, 64, 4, 3), (64, 64, 32, 4, 2), (64, 64, 128, 4, 2),
    (64, 64, 64, 8, 2), (64, 64, 64, 8, 3), (64, 64, 128, 8, 2), (64, 64, 256, 8, 2),
    (128, 64, 64, 8, 2), (128, 64, 64, 8, 3), (128, 64, 32, 8, 2), (128, 64, 32, 8, 3),
    (128, 64, 64, 4, 2), (32, 64, 64, 4, 2), (32, 64, 64, 4, 3), (32, 64, 128, 4, 2),
)  # fmt: skip
BROAD_CANDIDATES = (
    (64, 64, 64, 8, 1), (64, 64, 64, 8, 3), (64, 64, 64, 8, 4), (64, 32, 64, 8, 3),
    (64, 64, 32, 8, 2), (64, 64, 32, 8, 3), (64, 64, 16, 8, 2), (64, 64, 128, 8, 2),
    (64, 64, 32, 4, 2), (128, 64, 32, 8, 2), (32, 64, 64, 4, 2), (32, 64, 32, 4, 2),
    (32, 64, 64, 8, 2), (32, 64, 32, 8, 3), (64, 64, 64, 4, 2), (128, 64, 64, 8, 2),
)  # fmt: skip


def close_candidates(problem: CloseProblem) -> list[Choice]:
    """Return what to measure beside the rule."""
    if not problem.chained:
        return choices(ALONE_BLOCKS, *ALONE_CANDIDATES)
    narrow = problem.tail.channels_in <= 128
    return choices(CHAINED_BLOCKS, *(NARROW_CANDIDATES if narrow else BROAD_CANDIDATES))


def chains(widths: tuple[int, int, int]) -> bool:
    """Return whether the expansion runs in the same kernel, for I, C and C_out."""
    return widths[1] <= LARGEST_CHAINED and all(width % 16 == 0 for width in widths)


def close_rule(problem: CloseProblem) -> Choice:
    """Return the choice for a device that nobody measured."""
    if problem.chained:
        # Two programs of 4 warps share a multiprocessor where one of 8 would fill its registers.
        narrow = problem.tail.channels_in <= 128
        rows, block_k, num_warps, num_stages = 64, 64, 4 if narrow else 8, 2
        block_c = channel_block(problem.tail.channels_in, LARGEST_CHAINED)
    else:
        rows, block_k, num_warps, num_stages = (
            (128, 64, 8, 3) if problem.aligned else (64, 32, 8, 2)
        )
        block_c = channel_block(problem.tail.channels_in, 64)
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_K": channel_block(problem.inner, block_k),
        "BLOCK_C": block_c,
        "BLOCK_OUT": channel_block(problem.tail.channels, 64),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def close_launch(problem: CloseProblem, choice: Choice | None = None, **flags: bool) -> Launch:
    """Plan the second kernel; choice overrides the rule's block sizes, warps and stages."""
    tail = problem.tail
    chosen = {**close_rule(problem), **(choice or {})}
    # Chained, z is one tile of all its channels, whatever a choice says.
    largest = next_power_of_2(tail.channels_in) if problem.chained else chosen["BLOCK_C"]
    block_k = channel_block(problem.inner, chosen["BLOCK_K"])
    return Launch(
        grid=(ceil_divide(tail.rows, chosen["BLOCK_ROWS"]),),
        integers={
            "rows": tail.rows,
            "inner": problem.inner,
            "channels": tail.channels_in,
            "channels_out": tail.channels,
            "height": tail.height,
            "width": tail.width,
            "height_big": tail.height_big,
            "width_big": tail.width_big,
        },
        constants={
            **flags,
            "CHAIN": problem.chained,
            "SAME": tail.same,
            "RATIO_H": tail.ratios[0],
            "RATIO_W": tail.ratios[1],
            "WIDE": problem.wide,
            "BLOCK_I": channel_block(problem.inner, LARGEST_INNER),
            "TILES_K": tiles(problem.inner, block_k),
            "BLOCK_ROWS": chosen["BLOCK_ROWS"],
            "BLOCK_K": block_k,
            "BLOCK_C": channel_block(tail.channels_in, max(largest, 16)),
            "BLOCK_OUT": channel_block(tail.channels, chosen["BLOCK_OUT"]),
        },
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )


def tuned_launch(problem: CloseProblem, choice: Choice | None = None) -> Launch:
    """Plan with the flags that take most registers."""
    shifts = dict.fromkeys(("HAS_SHIFT2", "HAS_SHIFT3", "HAS_SHIFT_EXPAND"), True)
    return close_launch(problem, choice, HAS_BIG=problem.chained, RELU=True, **shifts)


# The kernel: p_ is a pointer, o_ a tile of offsets, b_ a tile of values, m_ a mask ---------------


@triton.jit
def _close_kernel(
    p_h,
    p_weight2,
    p_shift2,
    p_weight3,
    p_shift3,
    p_shortcut,
    p_expand,
    p_shift_expand,
    p_big,
    p_out,
    rows,
    inner,
    channels,
    channels_out,
    height,
    width,
    height_big,
    width_big,
    HAS_SHIFT2: tl.constexpr,
    HAS_SHIFT3: tl.constexpr,
    HAS_SHIFT_EXPAND: tl.constexpr,
    HAS_BIG: tl.constexpr,
    RELU: tl.constexpr,  # of z
    CHAIN: tl.constexpr,  # z is expanded here; BLOCK_C then spans all of its channels
    SAME: tl.constexpr,  # big is read where the output is written
    RATIO_H: tl.constexpr,  # height / height_big, width / width_big where both are whole numbers
    RATIO_W: tl.constexpr,  # and small; else both are 0
    WIDE: tl.constexpr,  # offsets may pass 32 bits
    BLOCK_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o_row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_i = tl.arange(0, BLOCK_I)
    m_row, m_i = o_row < rows, o_i < inner
    b_u = conv3x3(
        p_h, p_weight2, o_row, m_row, o_i, m_i, inner, height, width, height, width,
        1, BLOCK_ROWS, BLOCK_I, BLOCK_K, TILES_K,
    )  # fmt: skip
    if HAS_SHIFT2:
        b_u += tl.load(p_shift2 + o_i, mask=m_i, other=0.0).to(tl.float32)[None, :]
    b_u = relu_of(b_u, m_i).to(p_h.dtype.element_ty)
    if CHAIN:
        o_c = tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        b_z = _close_tile(
            b_u, p_weight3, p_shift3, p_shortcut, o_row, m_row, o_i, m_i, o_c, m_c, inner, channels,
            HAS_SHIFT3, RELU, BLOCK_ROWS, BLOCK_C,
        ).to(p_h.dtype.element_ty)  # fmt: skip
        if SAME:
            o_big = o_row
        else:
            o_big = source_row(o_row, height, width, height_big, width_big, RATIO_H, RATIO_W)
        for c in tl.range(0, channels_out, BLOCK_OUT):
            o_out = c + tl.arange(0, BLOCK_OUT)
            m_out = o_out < channels_out
            m_tile = m_row[:, None] & m_out[None, :]
            b_sum = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
            b_sum = project(
                b_z, p_expand, p_shift_expand, b_sum, o_c, m_c, o_out, m_out, channels,
                HAS_SHIFT_EXPAND,
            )  # fmt: skip
            if HAS_BIG:
                o_tile = o_big[:, None] * channels_out + o_out[None, :]
                b_sum += tl.load(p_big + o_tile, mask=m_tile, other=0.0).to(tl.float32)
            b_sum = relu_of(b_sum, m_out)
            o_tile = o_row[:, None] * channels_out + o_out[None, :]
            tl.store(p_out + o_tile, b_sum.to(p_out.dtype.element_ty), mask=m_tile)
    else:
        for c in tl.range(0, channels, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            m_c = o_c < channels
            b_sum = _close_tile(
                b_u, p_weight3, p_shift3, p_shortcut, o_row, m_row, o_i, m_i, o_c, m_c, inner,
                channels, HAS_SHIFT3, RELU, BLOCK_ROWS, BLOCK_C,
            )  # fmt: skip
            o_tile = o_row[:, None] * channels + o_c[None, :]
            m_tile = m_row[:, None] & m_c[None, :]
            tl.store(p_out + o_tile, b_sum.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def _close_tile(
    b_u,
    p_weight3,
    p_shift3,
    p_shortcut,
    o_row,
    m_row,
    o_i,
    m_i,
    o_c,
    m_c,
    inner,
    channels,
    HAS_SHIFT3: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return [relu](weight3 u + shift3 + shortcut) for one tile, float32, 0 past the channels."""
    b_sum = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)
    b_sum = project(b_u, p_weight3, p_shift3, b_sum, o_i, m_i, o_c, m_c, inner, HAS_SHIFT3)
    o_tile = o_row[:, None] * channels + o_c[None, :]
    m_tile = m_row[:, None] & m_c[None, :]
    b_sum += tl.load(p_shortcut + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    if RELU:
        return relu_of(b_sum, m_c)
    return tl.where(m_c[None, :], b_sum, 0.0)


def close(
    h: torch.Tensor,
    weight2: torch.Tensor,
    shift2: torch.Tensor | None,
    weight3: torch.Tensor,
    shift3: torch.Tensor | None,
    shortcut: torch.Tensor,
    relu: bool,
    expansion: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None,
) -> torch.Tensor:
    """Launch the second kernel, for a problem that it fits.

    Args:
        h: shape (N, I, H, W), with a pixel at least.
        weight2: shape (I, I, 3, 3).
        shift2: shape (I,), or None.
        weight3: shape (C, I).
        shift3: shape (C,), or None.
        shortcut: shape (N, C, H, W).
        relu: whether z ends with a ReLU.
        expansion: (weight_expand, shift_expand, big) to chain the expansion on, or None.

    Returns:
        Shape (N, C or C_out, H, W), channels-last.
    """
    last = torch.channels_last
    n, inner, height, width = h.shape
    channels = weight3.shape[0]
    expand, shift_expand, big = (None, None, None) if expansion is None else expansion
    channels_out = channels if expand is None else expand.shape[0]
    size_big = (height, width) if big is None else (big.shape[2], big.shape[3])
    tail = Problem(n, channels, channels_out, height, width, *size_big, h.element_size())
    added = big if expansion is not None else shortcut
    dtype = h.dtype if added is None else torch.promote_types(h.dtype, added.dtype)
    out = allocate(h.new_empty(0, dtype=dtype), (n, channels_out, height, width), last)
    if known(out.numel() == 0):
        return out
    problem = CloseProblem(inner, tail, expansion is not None)
    launch = close_launch(
        problem,
        choose(problem.kernel, problem.key(), h.device),
        HAS_SHIFT2=shift2 is not None,
        HAS_SHIFT3=shift3 is not None,
        HAS_SHIFT_EXPAND=shift_expand is not None,
        HAS_BIG=big is not None,
        RELU=relu,
    )
    vectors = [weight3 if v is None else v.contiguous() for v in (shift2, shift3, shift_expand)]
    with device_guard(out):
        wrap_triton(_close_kernel)[launch.grid](
            p_h=h.contiguous(memory_format=last),
            p_weight2=weight2.contiguous(memory_format=last),
            p_shift2=vectors[0],  # what is absent is never read
            p_weight3=weight3.contiguous(),
            p_shift3=vectors[1],
            p_shortcut=shortcut.contiguous(memory_format=last),
            p_expand=weight3 if expand is None else expand.contiguous(),
            p_shift_expand=vectors[2],
            p_big=h if big is None else big.contiguous(memory_format=last),
            p_out=out,
            **launch.arguments,
        )
    return out
