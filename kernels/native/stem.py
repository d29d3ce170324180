"""The network's first convolution, 7x7 with a stride of 2, by Winograd along rows, see stem.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blnet.kernels.native.convolution import (
    PRODUCTS_PER_CYCLE,
    Convolution,
    Packed,
    order_weights,
    sized_step,
)
from blnet.kernels.native.cutting import BLOCK, blocks_of, even, pieces_for
from blnet.kernels.native.library import Library
from blnet.kernels.native.winograd import TRANSFORMS

KIND = 9  # of step, as in step.h
CACHE_BYTES = 128 * 1024  # of a core's second cache, for a piece's transformed rows
METHOD = "winograd 1x4"
KERNEL, STRIDE, OUTPUTS = (7, 7), (2, 2), 4
CYCLES = 60.0  # of the transform of a block's outputs, counted as those of winograd.py
# G of the kernel's even columns and of its odd ones.
_EVEN = (
    (-1 / 2, 0.0, 0.0, 0.0),
    (-1 / 3, -1 / 3, -1 / 3, -1 / 3),
    (1 / 9, -1 / 9, 1 / 9, -1 / 9),
    (1 / 36, 1 / 18, 1 / 9, 2 / 9),
    (-1 / 60, 1 / 30, -1 / 15, 2 / 15),
    (32 / 45, 16 / 45, 8 / 45, 4 / 45),
    (0.0, 0.0, 0.0, 1.0),
)
_ODD = TRANSFORMS[4, 1]


def fits(conv: Convolution) -> bool:
    """Return whether `METHOD` is for such a convolution."""
    return conv.planar and (conv.weight[2:], conv.stride) == (KERNEL, STRIDE)


def cycles(conv: Convolution) -> float:
    """Return how many cycles of one core it should take."""
    images, channels, height, width = conv.out_shape
    out = blocks_of(channels)
    products = len(_EVEN + _ODD) * conv.shape[1] * KERNEL[0] * out * BLOCK
    tiles = images * height * math.ceil(width / OUTPUTS)
    return tiles * (products / PRODUCTS_PER_CYCLE + out * CYCLES)


def pack(library: Library, conv: Convolution, weight: Tensor, bias: Tensor, threads: int) -> Packed:
    """Make a convolution ready; see `packing.pack`, bias being padded to whole groups."""
    step = sized_step(conv)
    step.kind = KIND
    (kernel, _), (down, _), channels = KERNEL, STRIDE, conv.shape[1]
    points, tiles = len(_EVEN + _ODD), math.ceil(step.out_width / OUTPUTS)
    row = 4 * points * channels * tiles  # bytes
    most = max(1, (CACHE_BYTES // row - kernel) // down + 1)
    chunks = even(math.ceil(step.out_height / most), step, threads)
    step.chunks = min(max(chunks, pieces_for(step, threads, 1)), step.out_height)
    step.chunk = math.ceil(step.out_height / step.chunks)
    step.items = step.batch * step.chunks
    rows = (step.chunk - 1) * down + kernel
    offsets = [(c * rows + i) * tiles for c in range(channels) for i in range(kernel)]
    step.segment_count = len(offsets)
    # As StemPatch in stem.cpp, and the products of a few tiles.
    line = tiles * OUTPUTS * down + kernel - down
    inputs = math.ceil((points * channels * rows * tiles + line) / BLOCK) * BLOCK
    scratch = inputs + points * library.pixels * library.group
    segments = torch.tensor(offsets, dtype=torch.int32, device="cpu")
    return Packed(step, _transformed(library, conv, weight), bias, segments, None, scratch, METHOD)


def _transformed(library: Library, conv: Convolution, weight: Tensor) -> Tensor:
    """Return the weights of each point, in the order of `order_weights`."""
    halves = ((_EVEN, weight[..., 0::2]), (_ODD, weight[..., 1::2]))
    transformed = [
        (part.double() @ torch.tensor(rows, dtype=torch.float64, device="cpu").T).float()
        for rows, part in halves
    ]
    product = Convolution(conv.shape, (*conv.weight[:2], KERNEL[0], 1), (1, 1), (0, 0), 1, True)
    starts = [0] * math.ceil(conv.weight[0] / library.group)
    by_point = [
        order_weights(library, product, plane[..., None], starts, 1)
        for plane in torch.cat(transformed, -1).unbind(-1)
    ]
    return torch.cat(by_point)
