"""The kernel of ``stem.py``: two strided 3x3 convolutions, an expansion, a merge and a fusion."""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from blnet.kernels.conv3x3 import conv3x3, project, relu_of, tiles
from blnet.kernels.expand_merge_sizes import channel_block
from blnet.kernels.launch import (
    Launch,
    allocate,
    ceil_divide,
    device_guard,
    fits_int32,
    known,
)
from blnet.kernels.registration import wrap_triton
from blnet.kernels.triton_shim import tl, triton
from blnet.kernels.tuning import Choice, bucket, choices, choose, concrete

LARGEST_WIDTH = 128  # L and C: l and z are one tile each
Pair = tuple[torch.Tensor | None, torch.Tensor | None]  # a weight and its shift


# Launch configuration -----------------------------------------------------------------------


@dataclass(frozen=True)
class StemProblem:
    """Sizes of a stem's end.

    Attributes:
        n: batch.
        channels_x: C_x; C where x is big itself.
        channels_little: of little; L where it is l itself.
        narrow: L.
        channels: C.
        channels_out: C_out.
        height: of the output.
        width: of the output.
        size_x: height and width of x.
        size_little: height and width of little.
        convolved: whether x and little are convolved here; else they are big and l, given.
    """

    n: int
    channels_x: int
    channels_little: int
    narrow: int
    channels: int
    channels_out: int
    height: int
    width: int
    size_x: tuple[int, int]
    size_little: tuple[int, int]
    convolved: tuple[bool, bool] = (True, True)

    @property
    def rows(self) -> int:
        """Pixels of the output."""
        return self.n * self.height * self.width

    @property
    def aligned(self) -> bool:
        """Whether rows of every map start at multiples of 16 bytes, in Triton's eyes."""
        widths = (self.channels_x, self.channels_little, self.narrow, self.channels)
        return all(known(width % 16 == 0) for width in (*widths, self.channels_out))

    @property
    def wide(self) -> bool:
        """Whether offsets may pass 32 bits."""
        sizes = (
            # A tap may point a line and a pixel past the map before it is masked.
            self.n * (self.size_x[0] + 1) * (self.size_x[1] + 1) * self.channels_x,
            self.n * (self.size_little[0] + 1) * (self.size_little[1] + 1) * self.channels_little,
            self.rows * torch.sym_max(self.channels, self.channels_out),
        )
        return not fits_int32(*sizes)

    def key(self) -> str | None:
        """Return the bucket that tuning tables know the sizes by; None for symbolic ones."""
        sizes = (self.rows, *self.size_x, *self.size_little)
        return _key(self) if concrete(*sizes) else None


@functools.lru_cache(maxsize=1024)  # a launch in eager mode has no time for text
def _key(problem: StemProblem) -> str:
    parts = [f"L={problem.narrow}", f"C={problem.channels} to {problem.channels_out}"]
    inputs = (f"C_x={problem.channels_x}", f"C_l={problem.channels_little}")
    parts += [text for text, here in zip(inputs, problem.convolved, strict=True) if here]
    return bucket(2, *parts, rows=problem.rows, wide=problem.wide)


def stem_launch(problem: StemProblem, choice: Choice | None = None, **flags: bool) -> Launch:
    """Plan the kernel; choice overrides the rule's block sizes, warps and stages."""
    chosen = {**stem_rule(problem), **(choice or {})}
    # A loop that is not there has the least of tiles, so that choices do not differ in it.
    largest_x, largest_little = (
        chosen[name] if here else 16
        for name, here in zip(("BLOCK_X", "BLOCK_LITTLE"), problem.convolved, strict=True)
    )
    block_x = channel_block(problem.channels_x, largest_x)
    block_little = channel_block(problem.channels_little, largest_little)
    return Launch(
        grid=(ceil_divide(problem.rows, chosen["BLOCK_ROWS"]),),
        integers={
            "rows": problem.rows,
            "channels_x": problem.channels_x,
            "channels_little": problem.channels_little,
            "narrow": problem.narrow,
            "channels": problem.channels,
            "channels_out": problem.channels_out,
            "height": problem.height,
            "width": problem.width,
            "height_x": problem.size_x[0],
            "width_x": problem.size_x[1],
            "height_little": problem.size_little[0],
            "width_little": problem.size_little[1],
        },
        constants={
            "CONV_BIG": problem.convolved[0],
            "CONV_LITTLE": problem.convolved[1],
            **flags,
            "WIDE": problem.wide,
            "BLOCK_ROWS": chosen["BLOCK_ROWS"],
            "BLOCK_L": channel_block(problem.narrow, LARGEST_WIDTH),
            "BLOCK_C": channel_block(problem.channels, LARGEST_WIDTH),
            "BLOCK_X": block_x,
            "BLOCK_LITTLE": block_little,
            "TILES_X": tiles(problem.channels_x, block_x),
            "TILES_LITTLE": tiles(problem.channels_little, block_little),
            "BLOCK_OUT": channel_block(problem.channels_out, chosen["BLOCK_OUT"]),
        },
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )


def tuned_launch(problem: StemProblem, choice: Choice | None = None) -> Launch:
    """Plan with the flags that take most registers."""
    names = ("BIG", "LITTLE", "EXPAND", "FUSION")
    return stem_launch(problem, choice, **{f"HAS_{name}_SHIFT": True for name in names})


# No device was at hand to tune on. Compiled for sm_80, sm_90, sm_100 and gfx942 no size of a
# network spills. Registers a thread and shared memory on sm_90 in bfloat16, with both
# convolutions, that of little only, and none: at L = 32, C = 64 113 and 72 KB, 87 and 40, 81 and
# 40; at L = 64, C = 128 126 and 80 KB, 125 and 56, 120 and 56.


# What else to measure. None of these spills for sm_90 at any site; of what was tried 256 rows on 4
# warps did.
STEM_BLOCKS = "BLOCK_ROWS BLOCK_X BLOCK_LITTLE BLOCK_OUT"  # then warps and stages
STEM_CANDIDATES = (
    (128, 64, 64, 64, 8, 2), (128, 64, 64, 64, 8, 4), (128, 32, 32, 64, 8, 3),
    (128, 32, 32, 64, 8, 4), (128, 64, 64, 32, 8, 3), (64, 64, 64, 64, 4, 2),
    (64, 64, 64, 64, 4, 3), (64, 64, 64, 64, 4, 4), (64, 32, 32, 64, 4, 4),
    (64, 64, 64, 64, 8, 3), (64, 64, 64, 32, 4, 3), (128, 64, 64, 64, 4, 3),
    (32, 64, 64, 64, 4, 3), (128, 64, 64, 64, 16, 3), (256, 64, 64, 64, 8, 2),
    (128, 64, 64, 64, 4, 2),
)  # fmt: skip


def stem_candidates(problem: StemProblem) -> list[Choice]:
    """Return what to measure beside the rule."""
    return choices(STEM_BLOCKS, *STEM_CANDIDATES)


def fits_at_once(problem: StemProblem) -> bool:
    """Return whether one kernel of 16 bits runs this without spilling."""
    # Where rows start at odd addresses narrow loads take registers: gfx942 spills from 31 channels.
    return problem.aligned


def stem_rule(problem: StemProblem) -> Choice:
    """Return the choice for a device that nobody measured."""
    return {
        # More rows read the weights less often; wider tiles of l and z leave no room for them.
        "BLOCK_ROWS": 128 if max(problem.narrow, problem.channels) <= 64 else 64,
        "BLOCK_X": channel_block(problem.channels_x, 64),
        "BLOCK_LITTLE": channel_block(problem.channels_little, 64),
        "BLOCK_OUT": channel_block(problem.channels_out, 64),
        "num_warps": 8,
        "num_stages": 3,
    }


# Kernel: p_ is a pointer, o_ a tile of offsets, b_ a tile of values, m_ a mask ------------------


@triton.jit
def _stem_kernel(
    p_x,
    p_little,
    p_big_weight,
    p_big_shift,
    p_little_weight,
    p_little_shift,
    p_expand,
    p_expand_shift,
    p_fusion,
    p_fusion_shift,
    p_out,
    rows,
    channels_x,
    channels_little,
    narrow,
    channels,
    channels_out,
    height,
    width,
    height_x,
    width_x,
    height_little,
    width_little,
    CONV_BIG: tl.constexpr,
    CONV_LITTLE: tl.constexpr,
    HAS_BIG_SHIFT: tl.constexpr,
    HAS_LITTLE_SHIFT: tl.constexpr,
    HAS_EXPAND_SHIFT: tl.constexpr,
    HAS_FUSION_SHIFT: tl.constexpr,
    WIDE: tl.constexpr,  # offsets may pass 32 bits
    BLOCK_ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    TILES_X: tl.constexpr,
    BLOCK_LITTLE: tl.constexpr,
    TILES_LITTLE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o_row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_l, o_c = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_C)
    m_row, m_l, m_c = o_row < rows, o_l < narrow, o_c < channels
    element = p_expand.dtype.element_ty
    if CONV_LITTLE:
        b_l = conv3x3(
            p_little, p_little_weight, o_row, m_row, o_l, m_l, channels_little, height, width,
            height_little, width_little, 2, BLOCK_ROWS, BLOCK_L, BLOCK_LITTLE, TILES_LITTLE,
        )  # fmt: skip
        if HAS_LITTLE_SHIFT:
            b_l += tl.load(p_little_shift + o_l, mask=m_l, other=0.0).to(tl.float32)[None, :]
        b_l = relu_of(b_l, m_l).to(element)
    else:
        o_given = o_row[:, None] * narrow + o_l[None, :]
        b_l = tl.load(p_little + o_given, mask=m_row[:, None] & m_l[None, :], other=0.0)
    if CONV_BIG:
        b_sum = conv3x3(
            p_x, p_big_weight, o_row, m_row, o_c, m_c, channels_x, height, width,
            height_x, width_x, 2, BLOCK_ROWS, BLOCK_C, BLOCK_X, TILES_X,
        )  # fmt: skip
        if HAS_BIG_SHIFT:
            b_sum += tl.load(p_big_shift + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    else:
        o_given = o_row[:, None] * channels + o_c[None, :]
        b_sum = tl.load(p_x + o_given, mask=m_row[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    b_z = project(
        b_l, p_expand, p_expand_shift, b_sum, o_l, m_l, o_c, m_c, narrow, HAS_EXPAND_SHIFT
    )
    b_z = relu_of(b_z, m_c).to(element)
    for c in tl.range(0, channels_out, BLOCK_OUT):
        o_out = c + tl.arange(0, BLOCK_OUT)
        m_out = o_out < channels_out
        b_out = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
        b_out = project(
            b_z, p_fusion, p_fusion_shift, b_out, o_c, m_c, o_out, m_out, channels, HAS_FUSION_SHIFT
        )
        b_out = relu_of(b_out, m_out)
        o_tile = o_row[:, None] * channels_out + o_out[None, :]
        m_tile = m_row[:, None] & m_out[None, :]
        tl.store(p_out + o_tile, b_out.to(p_out.dtype.element_ty), mask=m_tile)


# Launcher ------------------------------------------------------------------------------------


def close_stem(
    x: torch.Tensor, little: torch.Tensor, pairs: Mapping[str, Pair], problem: StemProblem
) -> torch.Tensor:
    """Launch the kernel; the maps are channels-last, pairs in the order of its arguments."""
    last = torch.channels_last
    shape = (problem.n, problem.channels_out, problem.height, problem.width)
    out = allocate(little, shape, last)
    if known(out.numel() == 0):
        return out
    flags = {f"HAS_{name}_SHIFT": shift is not None for name, (_, shift) in pairs.items()}
    launch = stem_launch(problem, choose("stem", problem.key(), x.device), **flags)
    # What is absent is never read.
    weights = [x if weight is None else _packed(weight) for weight, _ in pairs.values()]
    shifts = [x if shift is None else shift.contiguous() for _, shift in pairs.values()]
    with device_guard(out):
        wrap_triton(_stem_kernel)[launch.grid](
            p_x=x,
            p_little=little,
            p_big_weight=weights[0],
            p_big_shift=shifts[0],
            p_little_weight=weights[1],
            p_little_shift=shifts[1],
            p_expand=weights[2],
            p_expand_shift=shifts[2],
            p_fusion=weights[3],
            p_fusion_shift=shifts[3],
            p_out=out,
            **launch.arguments,
        )
    return out


def _packed(weight: torch.Tensor) -> torch.Tensor:
    form = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    return weight.contiguous(memory_format=form)
