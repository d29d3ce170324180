"""Convolutions summed as they are written, see conv.cpp."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from blnet.kernels.native.convolution import (
    PRODUCTS_PER_CYCLE,
    WEIGHT_BYTES_PER_CYCLE,
    Convolution,
    Packed,
    order_weights,
    sized_step,
)
from blnet.kernels.native.cutting import (
    BLOCK,
    alone,
    blocks_of,
    cut_slices,
    even,
    pieces_for,
    shared,
)
from blnet.kernels.native.library import Library, Step

METHOD = "direct"
KIND = 2  # of step, as in step.h
CACHE_BYTES = 256 * 1024  # of a core's second cache, for the input of a piece of work
PATCH_BYTES = 512 * 1024  # the same where the input is gathered: each cut reads all weights anew
PIECES = 4  # of work for each thread, so that the last one to finish is not far behind
GATHERED_PIECES = 2  # the same where each of them first gathers its input


def cycles(conv: Convolution) -> float:
    """Return how many cycles of one core it should take."""
    images, channels, height, width = conv.out_shape
    weights = conv.weight[1] * conv.weight[2] * conv.weight[3] * channels
    return (
        images * height * width * weights / PRODUCTS_PER_CYCLE
        + 4 * weights / WEIGHT_BYTES_PER_CYCLE
    )


def pack(library: Library, conv: Convolution, weight: Tensor, bias: Tensor, threads: int) -> Packed:
    """Make a convolution ready; see `packing.pack`, bias being padded to whole groups."""
    step = sized_step(conv)
    step.kind = KIND
    starts, span = _input_spans(library, conv)
    scratch, segments = _cut_direct(library, conv, step, span, threads)
    step.segment_count = len(segments)
    packed = order_weights(library, conv, weight, starts, span)
    first = torch.tensor(starts, dtype=torch.int32, device="cpu") if conv.groups > 1 else None
    offsets = torch.tensor(segments, dtype=torch.int32, device="cpu")
    return Packed(step, packed, bias, offsets, first, scratch, METHOD)


def _input_spans(library: Library, conv: Convolution) -> tuple[list[int], int]:
    """Return the first block of input that each group of output channels reads, and how many."""
    out_channels, blocks = conv.weight[0], blocks_of(conv.shape[1])
    width_in, width_out = conv.weight[1], out_channels // conv.groups
    if conv.groups == 1:
        return [0] * math.ceil(out_channels / library.group), blocks
    spans = []
    for first in range(0, out_channels, library.group):
        last = min(first + library.group, out_channels) - 1
        begin = first // width_out * width_in // BLOCK
        spans.append((begin, math.ceil((last // width_out + 1) * width_in / BLOCK)))
    span = max(end - begin for begin, end in spans)
    return [min(begin, blocks - span) for begin, _ in spans], span


def _cut_direct(
    library: Library, conv: Convolution, step: Step, span: int, threads: int
) -> tuple[int, list[int]]:
    """Cut the work into chunks and slices; return scratch floats and the segments' offsets."""
    channels = conv.shape[1] if conv.planar else step.blocks * BLOCK
    if conv.in_place:
        _, _, height, width = conv.out_shape
        size, plane = height * width, conv.shape[2] * conv.shape[3]
        most = max(4 * library.pixels, CACHE_BYTES // (4 * channels * step.kernel_h))
        chunks = even(math.ceil(size / most), step, threads)
        step.chunks = min(shared(chunks, step, conv.weights, threads), size)
        step.chunk = math.ceil(size / step.chunks)
        cut_slices(
            library, step, pieces_for(step, threads, PIECES), 1 if alone(step) else step.batch
        )
        rows = range(step.kernel_h)
        return 0, [(block * plane + row * width) * BLOCK for block in range(span) for row in rows]
    phases = 1 if step.kernel_w == 1 else step.stride_w
    phase = math.ceil(((step.out_width - 1) * phases + step.kernel_w) / phases)
    down = 1 if step.kernel_h == 1 else step.stride_h
    row = phases * phase
    fitting = (PATCH_BYTES // (4 * channels * row) - step.kernel_h) // down + 1
    most = min(step.out_height, max(1, fitting))
    chunks = even(math.ceil(step.out_height / most), step, threads)
    step.chunks = min(shared(chunks, step, conv.weights, threads), step.out_height)
    step.chunk = math.ceil(step.out_height / step.chunks)
    pieces = pieces_for(step, threads, GATHERED_PIECES)
    cut_slices(library, step, pieces, 1 if alone(step) else step.batch)
    plane = ((step.chunk - 1) * down + step.kernel_h) * row
    floats, planes = (1, conv.shape[1]) if conv.planar else (BLOCK, span)
    offsets = [
        (index * plane + i * row + j % phases * phase + j // phases) * floats
        for index in range(planes)
        for i, j in itertools.product(range(step.kernel_h), range(step.kernel_w))
    ]
    return channels * plane, offsets
