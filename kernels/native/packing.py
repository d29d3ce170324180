"""Convolutions made ready: how the work is cut, weights in the order the kernels read them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from blnet.kernels.native.library import Library, Step

BLOCK = 16  # channels of a block, as in step.h
DIRECT, WINOGRAD = 2, 3  # kinds of step, as there
CACHE_BYTES = 256 * 1024  # of a core's second cache, for the input of a piece of work
PATCH_BYTES = 512 * 1024  # the same where the input is gathered: each cut reads all weights anew
WINOGRAD_BYTES = 768 * 1024  # the same for transformed tiles, input and products together
ALONE_BYTES = 1024 * 1024  # of an image's map, from where the third cache would not hold the batch
WEIGHTS_TO_MAPS = (
    12  # from where threads share Winograd's weights, not its tiles; see _least_chunks
)
LEAST_TILES = 4  # in a piece of them
PIECES = 4  # of work for each thread, so that the last one to finish is not far behind
GATHERED_PIECES = 2  # the same where each of them first gathers its input

# What decides between the ways to compute a 3x3 convolution, in cycles of one core: products, bytes
# of weights, and transforms for a tile and a block of channels. Transforms of 2x2 and 4x4 with a
# stride of 1 were measured on a Zen 5, others are counted by the vectors that they move. These two
# numbers were chosen on a Zen 4, two threads, among 77 convolutions of ResNets and speech networks
# timed with each tile, weights coming from memory: what they choose takes 0.6 % longer than the
# fastest on average, at most 10 %.
PRODUCTS_PER_CYCLE = 24.0
WEIGHT_BYTES_PER_CYCLE = 16.0


@dataclass(frozen=True)
class Tile:
    """One of Winograd's ways, see winograd.cpp.

    Attributes:
        outputs: of a tile, down and across.
        stride: in height and width, that it is for.
        cycles: of the transforms of a block's inputs and of its outputs.
    """

    outputs: tuple[int, int]
    stride: tuple[int, int]
    cycles: tuple[float, float]

    @property
    def name(self) -> str:
        """What `method` calls it."""
        return f"winograd {self.outputs[0]}x{self.outputs[1]}"

    @property
    def transforms(self) -> tuple[Tensor, Tensor]:
        """What makes U = G_h g G_w^T of weights g: (points, 3) of each side, float64."""
        down, across = (torch.tensor(rows, dtype=torch.float64) for rows in self._sides)
        return down, across

    @property
    def points(self) -> int:
        """Products of matrices for a tile."""
        return math.prod(len(rows) for rows in self._sides)

    @property
    def _sides(self) -> list[tuple[tuple[float, ...], ...]]:
        return [_TRANSFORMS[side] for side in zip(self.outputs, self.stride, strict=True)]


_ODD = (0.0, 1.0, 0.0)  # an odd input with a stride of 2, as it is

# G of Lavin and Gray for so many outputs along a side and a stride, at the points of winograd.cpp.
_TRANSFORMS = {
    (2, 1): ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0)),
    (4, 1): (
        (1 / 4, 0.0, 0.0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0.0, 0.0, 1.0),
    ),
    (5, 1): (
        (-1 / 2, 0.0, 0.0),
        (-1 / 3, -1 / 3, -1 / 3),
        (1 / 9, -1 / 9, 1 / 9),
        (1 / 36, 1 / 18, 1 / 9),
        (-1 / 60, 1 / 30, -1 / 15),
        (32 / 45, 16 / 45, 8 / 45),
        (0.0, 0.0, 1.0),
    ),
    (6, 1): (
        (1.0, 0.0, 0.0),
        (-2 / 9, -2 / 9, -2 / 9),
        (-2 / 9, 2 / 9, -2 / 9),
        (1 / 90, 1 / 45, 2 / 45),
        (1 / 90, -1 / 45, 2 / 45),
        (32 / 45, 16 / 45, 8 / 45),
        (32 / 45, -16 / 45, 8 / 45),
        (0.0, 0.0, 1.0),
    ),
    (2, 2): ((1.0, 0.0, 0.0), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0), *[_ODD] * 2),
    (4, 2): (
        (1 / 2, 0.0, 0.0),
        (-1 / 2, 0.0, -1 / 2),
        (-1 / 6, 0.0, 1 / 6),
        (1 / 6, 0.0, 1 / 3),
        (0.0, 0.0, 1.0),
        *[_ODD] * 4,
    ),
}
TILES = (
    Tile((2, 2), (1, 1), (45.0, 40.0)),
    Tile((4, 4), (1, 1), (150.0, 120.0)),
    Tile((5, 5), (1, 1), (205.0, 165.0)),
    Tile((4, 6), (1, 1), (200.0, 160.0)),
    Tile((2, 2), (2, 1), (60.0, 50.0)),
    Tile((4, 4), (2, 1), (225.0, 160.0)),
    Tile((4, 6), (2, 1), (300.0, 215.0)),
    Tile((2, 2), (2, 2), (70.0, 60.0)),
    Tile((4, 4), (2, 2), (340.0, 220.0)),
)


def tile_of(method: str, stride: tuple[int, int]) -> Tile | None:
    """Return the tile of this name for a stride; None if there is none."""
    return next((tile for tile in TILES if (tile.name, tile.stride) == (method, stride)), None)


def blocks_of(channels: int) -> int:
    """Return how many blocks of 16 hold so many channels."""
    return math.ceil(channels / BLOCK)


@dataclass(frozen=True)
class Convolution:
    """The sizes of a convolution.

    Attributes:
        shape: of the input, (N, C, H, W).
        weight: shape of the weight, (C_out, C / groups, K_h, K_w).
        stride: in height and width.
        padding: in height and width.
        groups: as of torch.nn.Conv2d.
        planar: whether the input is the caller's tensor, read as it is.
    """

    shape: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    planar: bool

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output, (N, C_out, H_out, W_out)."""
        height, width = (
            (size + 2 * pad - kernel) // step + 1
            for size, pad, kernel, step in zip(
                self.shape[2:], self.padding, self.weight[2:], self.stride, strict=True
            )
        )
        return self.shape[0], self.weight[0], height, width

    @property
    def weights(self) -> int:
        """How many it has."""
        return math.prod(self.weight)

    @property
    def in_place(self) -> bool:
        """Whether each output pixel reads the input from its own place down and nothing else."""
        simple = self.weight[3] == 1 and self.stride == (1, 1) and self.padding == (0, 0)
        return simple and not self.planar


@dataclass
class Packed:
    """A convolution made ready.

    Attributes:
        step: kind, sizes and cuts; pointers are not set.
        weight: float32, as the kernels read it.
        bias: float32, padded to whole groups of channels.
        segments: see step.h.
        starts: see step.h.
        scratch: floats of scratch memory that a thread needs.
        method: "direct" or the name of one of `TILES`.
    """

    step: Step
    weight: Tensor
    bias: Tensor
    segments: Tensor
    starts: Tensor | None
    scratch: int
    method: str


def pack(
    library: Library,
    conv: Convolution,
    weight: Tensor,
    bias: Tensor | None,
    threads: int,
    method: str | None = None,
) -> Packed:
    """Make a convolution ready.

    Args:
        library: whose kernels are to read it.
        conv: its sizes.
        weight: shape (C_out, C / groups, K_h, K_w).
        bias: shape (C_out,); None for 0.
        threads: how many the cut should keep busy.
        method: one of `Packed`'s; None chooses by `choose_method`.
    """
    out_channels = conv.weight[0]
    padded = torch.zeros(math.ceil(out_channels / library.group) * library.group)
    if bias is not None:
        padded[:out_channels] = bias
    tile = tile_of(method or choose_method(conv), conv.stride)
    if tile is None:
        return _pack_direct(library, conv, weight, padded, threads)
    return _pack_winograd(library, conv, weight, padded, threads, tile)


def choose_method(conv: Convolution) -> str:
    """Return the way that should be the fastest, by counting cycles."""
    ways = {"direct": _direct_cycles(conv)}
    if conv.weight[2:] == (3, 3) and conv.groups == 1 and not conv.planar:
        for tile in TILES:
            if tile.stride == conv.stride:
                ways[tile.name] = _winograd_cycles(conv, tile)
    return min(ways, key=lambda way: ways[way])


def _direct_cycles(conv: Convolution) -> float:
    images, channels, height, width = conv.out_shape
    weights = conv.weight[1] * conv.weight[2] * conv.weight[3] * channels
    return (
        images * height * width * weights / PRODUCTS_PER_CYCLE
        + 4 * weights / WEIGHT_BYTES_PER_CYCLE
    )


def _winograd_cycles(conv: Convolution, tile: Tile) -> float:
    into, out = blocks_of(conv.shape[1]), blocks_of(conv.weight[0])
    weights = tile.points * into * out * BLOCK**2
    cost_in, cost_out = tile.cycles
    each = weights / PRODUCTS_PER_CYCLE + into * cost_in + out * cost_out
    return _tiles(conv, tile) * each + 4 * weights / WEIGHT_BYTES_PER_CYCLE


def _tiles(conv: Convolution, tile: Tile) -> int:
    images, _, *size = conv.out_shape
    return images * math.prod(
        math.ceil(n / side) for n, side in zip(size, tile.outputs, strict=True)
    )


def _sizes(conv: Convolution) -> Step:
    images, channels, height, width = conv.shape
    _, out_channels, out_height, out_width = conv.out_shape
    step = Step(batch=images, channels=channels, blocks=blocks_of(channels))
    step.height, step.width = height, width
    step.out_channels, step.out_blocks = out_channels, blocks_of(out_channels)
    step.out_height, step.out_width = out_height, out_width
    step.kernel_h, step.kernel_w = conv.weight[2:]
    step.stride_h, step.stride_w = conv.stride
    step.pad_h, step.pad_w = conv.padding
    step.planar = conv.planar
    return step


def _pack_direct(
    library: Library, conv: Convolution, weight: Tensor, bias: Tensor, threads: int
) -> Packed:
    step = _sizes(conv)
    step.kind = DIRECT
    starts, span = _input_spans(library, conv)
    scratch, segments = _cut_direct(library, conv, step, span, threads)
    step.segment_count = len(segments)
    packed = _order_weights(library, conv, weight, starts, span)
    first = torch.tensor(starts, dtype=torch.int32) if conv.groups > 1 else None
    offsets = torch.tensor(segments, dtype=torch.int32)
    return Packed(step, packed, bias, offsets, first, scratch, "direct")


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
        chunks = _even(math.ceil(size / most), step, threads)
        step.chunks = min(_shared(chunks, step, conv.weights, threads), size)
        step.chunk = math.ceil(size / step.chunks)
        _cut_slices(library, step, _pieces(step, threads, PIECES), 1 if alone(step) else step.batch)
        rows = range(step.kernel_h)
        return 0, [(block * plane + row * width) * BLOCK for block in range(span) for row in rows]
    phases = 1 if step.kernel_w == 1 else step.stride_w
    phase = math.ceil(((step.out_width - 1) * phases + step.kernel_w) / phases)
    down = 1 if step.kernel_h == 1 else step.stride_h
    row = phases * phase
    fitting = (PATCH_BYTES // (4 * channels * row) - step.kernel_h) // down + 1
    most = min(step.out_height, max(1, fitting))
    chunks = _even(math.ceil(step.out_height / most), step, threads)
    step.chunks = min(_shared(chunks, step, conv.weights, threads), step.out_height)
    step.chunk = math.ceil(step.out_height / step.chunks)
    pieces = _pieces(step, threads, GATHERED_PIECES)
    _cut_slices(library, step, pieces, 1 if alone(step) else step.batch)
    plane = ((step.chunk - 1) * down + step.kernel_h) * row
    floats, planes = (1, conv.shape[1]) if conv.planar else (BLOCK, span)
    offsets = [
        (index * plane + i * row + j % phases * phase + j // phases) * floats
        for index in range(planes)
        for i, j in itertools.product(range(step.kernel_h), range(step.kernel_w))
    ]
    return channels * plane, offsets


def _even(chunks: int, step: Step, threads: int) -> int:
    """Return so many chunks, or some more so that each thread gets as many as the others."""
    sharing = _pieces(step, threads, 1)
    return chunks if chunks == 1 else math.ceil(chunks / sharing) * sharing


def _shared(chunks: int, step: Step, weights: int, threads: int) -> int:
    """Return so many chunks, or one for each thread where there is more of maps than of weights.

    Threads then have the pixels that they have of the steps around it. Where there is more to read
    of weights, they rather share those: each has its output channels.
    """
    sharing = chunks == 1 and step.batch < threads and weights < _floats(step)
    return threads if sharing else chunks


def _floats(step: Step) -> int:
    """Return how many an image's two maps hold, read and written."""
    read, written = step.height * step.width, step.out_height * step.out_width
    return BLOCK * (step.blocks * read + step.out_blocks * written)


def cut_rows(step: Step, threads: int) -> None:
    """Cut a step without weights: by images, or by rows where there are more threads."""
    step.chunks = min(threads, step.out_height) if step.batch < threads else 1
    step.chunk = math.ceil(step.out_height / step.chunks)
    step.items = step.batch * step.chunks * step.blocks


def alone(step: Step) -> bool:
    """Return whether a step's map is so large that images go through it one at a time."""
    size = 4 * BLOCK * step.out_blocks * step.out_height * step.out_width
    return bool(step.batch > 1 and size >= ALONE_BYTES)


def _pieces(step: Step, threads: int, each: int) -> int:
    """Return how many pieces a step's work is cut into at least, `each` for a thread."""
    # Threads that take images of their own share no step: a cut would only repeat its preparation.
    return 1 if alone(step) and step.batch % threads == 0 else threads * each


def _cut_slices(library: Library, step: Step, pieces: int, images: int) -> None:
    """Cut the output channels so that there are about so many pieces of work."""
    groups = math.ceil(step.out_channels / library.group)
    wanted = min(groups, math.ceil(pieces / (images * step.chunks)))
    step.slice = math.ceil(groups / wanted)
    step.slices = math.ceil(groups / step.slice)
    step.items = step.batch * step.chunks * step.slices


def _order_weights(
    library: Library, conv: Convolution, weight: Tensor, starts: list[int], span: int
) -> Tensor:
    """Return the weights as [group][block][row][column][channel in][channel of the group]."""
    out_channels, width_in, *kernel = conv.weight
    width_out, floats = out_channels // conv.groups, 1 if conv.planar else BLOCK
    planes = conv.shape[1] if conv.planar else span * BLOCK
    parts = []
    for start, first in zip(starts, range(0, out_channels, library.group), strict=True):
        last = min(first + library.group, out_channels)
        # What is left at the end is computed by the smaller kernel where that suffices.
        size = BLOCK if last - first <= BLOCK else library.group
        dense = torch.zeros(size, planes, *kernel)
        for group in range(first // width_out, (last - 1) // width_out + 1):
            begin, end = max(first, group * width_out), min(last, (group + 1) * width_out)
            place = group * width_in - start * BLOCK
            dense[begin - first : end - first, place : place + width_in] = weight[begin:end]
        split = dense.view(size, planes // floats, floats, *kernel)
        parts.append(split.permute(1, 3, 4, 2, 0).reshape(-1))
    return torch.cat(parts)


def _least_chunks(step: Step, weights: int, tiles: int, pieces: int) -> int:
    """Return how many chunks of tiles to make at least: a piece's each, or one for all.

    With one for all, pieces differ in their output channels. Each then transforms all of the input,
    half of which another core has just written, but reads its own weights only. Timed on a Zen 4 in
    chains of 14 convolutions: chunks are 7 to 40 % faster up to 8 times as many weights as maps'
    numbers, as fast at 16 times, 20 % slower from there.
    """
    images = 1 if alone(step) else step.batch
    share = weights < WEIGHTS_TO_MAPS * images * _floats(step) and tiles >= LEAST_TILES * pieces
    return pieces if share else 1


def _pack_winograd(
    library: Library, conv: Convolution, weight: Tensor, bias: Tensor, threads: int, tile: Tile
) -> Packed:
    step = _sizes(conv)
    step.kind = WINOGRAD
    step.tile_h, step.tile_w = tile.outputs
    points, tiles = tile.points, _tiles(conv, tile)
    floats = points * (step.blocks + step.out_blocks) * BLOCK
    most = max(2 * library.pixels, WINOGRAD_BYTES // (4 * floats))
    most = max(most // library.pixels, 1) * library.pixels
    together = tiles // step.batch if alone(step) else tiles
    groups = math.ceil(step.out_channels / library.group)
    pieces = _pieces(step, threads, 1)
    least = _least_chunks(step, points * weight[:, :, 0, 0].numel(), together, pieces)
    cuts = _even(max(math.ceil(together / most), math.ceil(pieces / groups), least), step, threads)
    step.chunks = min(cuts, together)
    step.chunk = math.ceil(together / step.chunks)
    # Slices transform the same input once more: there are as many as threads need, not more.
    _cut_slices(library, step, pieces, 1)
    step.chunks = math.ceil(tiles / step.chunk)  # they go on from image to image
    step.items = step.chunks * step.slices
    rows, columns = tile.transforms
    transformed = (rows @ weight.double() @ columns.T).float()
    product = Convolution(conv.shape, (*conv.weight[:2], 1, 1), (1, 1), (0, 0), 1, False)
    starts = [0] * math.ceil(conv.weight[0] / library.group)
    by_point = [
        _order_weights(library, product, plane[:, :, None, None], starts, step.blocks)
        for plane in transformed.flatten(2).unbind(2)
    ]
    segments = torch.arange(step.blocks, dtype=torch.int32) * step.chunk * BLOCK
    slice_blocks = step.slice * library.group // BLOCK
    # As point_floats in winograd.cpp: a line of memory between points.
    lines = step.chunk * (step.blocks + slice_blocks) + 2
    scratch = points * lines * BLOCK
    return Packed(step, torch.cat(by_point), bias, segments, None, scratch, tile.name)
