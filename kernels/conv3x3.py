"""The 3x3 convolution inside the fused inference kernels, and alone. Not an op.

    y[n, c, i, j] = sum over k, di, dj of weight[c, k, di, dj] x[n, k, S i + di - 1, S j + dj - 1]

with 0 outside the map and S the stride, 1 or 2. x is (N, K, H_in, W_in) channels-last and weight
(C, K, 3, 3) in channels-last memory, that is (C, 3, 3, K): what one tap multiplies is contiguous
along K. A weight of a model that is ``.to(memory_format=torch.channels_last)`` is packed already.

``conv3x3`` is the loop over taps that ``bottleneck.py`` and ``stem.py`` have in their kernels; it
leaves the sum in float32 in registers. A pixel of x is loaded up to nine times (9 / 4 times at
stride 2), from L1 and L2: neighbouring programs own neighbouring pixels.

``convolve`` launches it alone, for float32 and for stems of odd widths. The fused kernels need
products in 16 bits: in float32 without tf32 a product runs on ordinary units, and its operands are
held in registers, which the wide products of the fused kernels exceed (they spill). There the ops
are made of smaller launches instead.
"""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from blnet.kernels.backend import KERNEL_DTYPES
from blnet.kernels.expand_merge_sizes import channel_block
from blnet.kernels.launch import (
    Launch,
    Specialization,
    allocate,
    ceil_divide,
    device_guard,
    fits_int32,
    known,
    specialize,
)
from blnet.kernels.registration import wrap_triton
from blnet.kernels.triton_shim import tl, triton


@triton.jit
def relu_of(b_sum, m_c):
    """Return relu(b_sum), 0 in the columns past the last channel."""
    # Not maximum(): a NaN is not <= 0 and so passes through, as in torch.relu. Columns past the
    # end hold 0 * x, which is NaN where x is infinite, and a product that follows would spread it.
    return tl.where((b_sum <= 0.0) | (m_c[None, :] == 0), 0.0, b_sum)


@triton.jit
def conv3x3(
    p_x,
    p_weight,
    o_row,  # pixels of the output
    m_row,
    o_c,
    m_c,
    channels_in,
    height,
    width,
    height_in,
    width_in,
    STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_K: tl.constexpr,  # ceil(channels_in / BLOCK_K)
):
    """Return one tile of the convolution, (BLOCK_ROWS, BLOCK_C) in float32."""
    line = o_row // width  # N * height lines of width pixels
    column = (o_row - line * width) * STRIDE
    image = line // height
    line = (line - image * height) * STRIDE
    o_center = (image * height_in + line) * width_in + column
    b_sum = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)
    # One loop over taps and channels, so that the loads of the next tap overlap this one's product.
    for step in tl.range(0, 9 * TILES_K):
        tap = step // TILES_K
        down = tap // 3 - 1
        right = tap % 3 - 1
        o_k = (step % TILES_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < channels_in
        m_line = (line + down >= 0) & (line + down < height_in)
        m_column = (column + right >= 0) & (column + right < width_in)
        m_in = m_row & m_line & m_column
        o_x = (o_center + down * width_in + right)[:, None] * channels_in + o_k[None, :]
        b_x = tl.load(p_x + o_x, mask=m_in[:, None] & m_k[None, :], other=0.0)
        o_weight = (o_c * 9 + tap)[None, :] * channels_in + o_k[:, None]
        b_weight = tl.load(p_weight + o_weight, mask=m_k[:, None] & m_c[None, :], other=0.0)
        b_sum = tl.dot(b_x, b_weight, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def project(
    b_x, p_weight, p_shift, b_sum, o_k, m_k, o_c, m_c, channels_in, HAS_SHIFT: tl.constexpr
):
    """Return b_sum + b_x weight^T + shift for one tile of a 1x1 convolution of what is here."""
    o_weight = o_c[None, :] * channels_in + o_k[:, None]
    b_weight = tl.load(p_weight + o_weight, mask=m_k[:, None] & m_c[None, :], other=0.0)
    b_sum = tl.dot(b_x, b_weight, b_sum, input_precision="ieee")
    if HAS_SHIFT:
        b_sum += tl.load(p_shift + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_sum


# Alone -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvolutionProblem:
    """Sizes of a 3x3 convolution with padding 1.

    Attributes:
        n: batch.
        channels_in: K.
        channels: C.
        height_in: of x.
        width_in: of x.
        stride: 1 or 2.
    """

    n: int
    channels_in: int
    channels: int
    height_in: int
    width_in: int
    stride: int

    @property
    def height(self) -> int:
        """Of the output."""
        return strided_size(self.height_in, self.stride)

    @property
    def width(self) -> int:
        """Of the output."""
        return strided_size(self.width_in, self.stride)

    @property
    def rows(self) -> int:
        """Pixels of the output."""
        return self.n * self.height * self.width

    @property
    def aligned(self) -> bool:
        """Whether rows of x and of the output start at multiples of 16 bytes, for Triton."""
        return all(known(width % 16 == 0) for width in (self.channels_in, self.channels))

    @property
    def wide(self) -> bool:
        """Whether offsets may pass 32 bits."""
        rows_in = self.n * (self.height_in + 1) * (self.width_in + 1)
        widest = torch.sym_max(self.channels, self.channels_in)
        return not fits_int32(rows_in * widest, self.rows * widest)


def strided_size(size: int, stride: int) -> int:
    """Return the size of a 3x3 convolution's output along one axis: ceil(size / stride)."""
    return ceil_divide(size, stride)


# aligned -> rows, C, K, warps, stages; those of expand_merge in float32, whose loop this nearly is.
CONVOLUTION_CONFIGURATION = {True: (64, 64, 16, 8, 2), False: (64, 32, 16, 8, 2)}


def convolution_launch(
    problem: ConvolutionProblem, choice: Mapping[str, int] | None = None, **flags: bool
) -> Launch:
    """Plan a convolution; choice overrides the rule's block sizes, warps and stages."""
    configuration = CONVOLUTION_CONFIGURATION[problem.aligned]
    tile_rows, tile_c, tile_k, num_warps, num_stages = configuration
    chosen = {
        "BLOCK_ROWS": tile_rows,
        "BLOCK_C": channel_block(problem.channels, tile_c),
        "BLOCK_K": channel_block(problem.channels_in, tile_k),
        "num_warps": num_warps,
        "num_stages": num_stages,
        **(choice or {}),
    }
    num_warps, num_stages = chosen.pop("num_warps"), chosen.pop("num_stages")
    blocks_c = ceil_divide(problem.channels, chosen["BLOCK_C"])
    return Launch(
        grid=(ceil_divide(problem.rows, chosen["BLOCK_ROWS"]) * blocks_c,),
        integers={
            "rows": problem.rows,
            "channels_in": problem.channels_in,
            "channels": problem.channels,
            "height": problem.height,
            "width": problem.width,
            "height_in": problem.height_in,
            "width_in": problem.width_in,
        },
        constants={
            **flags,
            "STRIDE": problem.stride,
            "WIDE": problem.wide,
            **chosen,
            "TILES_K": tiles(problem.channels_in, chosen["BLOCK_K"]),
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )


def tiles(channels: int, block: int) -> int:
    """Return how many tiles a loop over channels takes, a plain number while tracing too."""
    return ceil_divide(int(channels), block)


@triton.jit
def _convolution_kernel(
    p_x,
    p_weight,
    p_shift,
    p_out,
    rows,
    channels_in,
    channels,
    height,
    width,
    height_in,
    width_in,
    HAS_SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDE: tl.constexpr,  # offsets may pass 32 bits
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_K: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    # Neighbouring programs share rows of x.
    blocks_c = tl.cdiv(channels, BLOCK_C)
    o_row = (program // blocks_c) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_c = (program % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_row, m_c = o_row < rows, o_c < channels
    b_sum = conv3x3(
        p_x, p_weight, o_row, m_row, o_c, m_c, channels_in, height, width, height_in, width_in,
        STRIDE, BLOCK_ROWS, BLOCK_C, BLOCK_K, TILES_K,
    )  # fmt: skip
    if HAS_SHIFT:
        b_sum += tl.load(p_shift + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if RELU:
        b_sum = relu_of(b_sum, m_c)
    o_out = o_row[:, None] * channels + o_c[None, :]
    tl.store(p_out + o_out, b_sum.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_c[None, :])


def convolve(
    x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None, stride: int, relu: bool
) -> torch.Tensor:
    """Launch [relu](conv3x3(x, weight) + shift), padding 1; the result is channels-last."""
    last = torch.channels_last
    n, channels_in, height_in, width_in = x.shape
    channels = weight.shape[0]
    problem = ConvolutionProblem(n, channels_in, channels, height_in, width_in, stride)
    out = allocate(x, (n, channels, problem.height, problem.width), last)
    if known(out.numel() == 0):
        return out
    launch = convolution_launch(problem, HAS_SHIFT=shift is not None, RELU=relu)
    with device_guard(out):
        wrap_triton(_convolution_kernel)[launch.grid](
            p_x=x.contiguous(memory_format=last),
            p_weight=weight.contiguous(memory_format=last),
            p_shift=weight if shift is None else shift.contiguous(),  # what is absent is not read
            p_out=out,
            **launch.arguments,
        )
    return out


# Name -> N, K, C, H_in, W_in, stride: the convolutions of a network's narrow blocks and stem.
_PROBLEMS = {
    "conv3x3 K=32": (32, 32, 32, 56, 56, 1),
    "conv3x3 K=128": (32, 128, 128, 14, 14, 1),
    "conv3x3 K=64 stride 2": (32, 64, 64, 112, 112, 2),
    "conv3x3 unaligned K=9": (3, 9, 9, 55, 55, 1),
    "conv3x3 wide unaligned K=101 stride 2": (2048, 101, 101, 223, 223, 2),
    "conv3x3 wide K=64": (2048, 64, 64, 224, 224, 1),
    "conv3x3 wide K=64 stride 2": (2048, 64, 64, 224, 224, 2),
}


def specializations() -> list[Specialization]:
    """List what ``blnet kernels compile`` builds: float32, and what 16 bits run alone of a stem."""
    found = []
    for dtype in KERNEL_DTYPES:
        pointers = dict.fromkeys(("p_x", "p_weight", "p_out"), dtype) | {"p_shift": torch.float32}
        short = str(dtype).removeprefix("torch.")
        for title, sizes in _PROBLEMS.items():
            problem = ConvolutionProblem(*sizes)
            if dtype is torch.float32 or not problem.aligned:
                launch = convolution_launch(problem, HAS_SHIFT=True, RELU=True)
                found.append(specialize(f"{title} {short}", _convolution_kernel, launch, pointers))
    return found
