"""3x3 convolutions by Winograd's algorithm, see winograd.cpp."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    map_floats,
    pieces_for,
)
from blnet.kernels.native.library import Library, Step

KIND = 3  # of step, as in step.h
CACHE_BYTES = 768 * 1024  # of a core's second cache, for a piece's tiles and a group's products
WEIGHTS_TO_MAPS = 12  # from where threads share the weights, not the tiles; see _least_chunks
LEAST_TILES = 4  # in a piece of them


@dataclass(frozen=True)
class Tile:
    """One of Winograd's ways, see winograd.cpp.

    Attributes:
        outputs: of a tile, down and across.
        stride: in height and width, that it is for.
        cycles: of one core for the transforms of a block's inputs and of its outputs. Those of 2x2
            and 4x4 with a stride of 1 were measured on a Zen 5, others are counted by the vectors
            that they move.
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
        down, across = (
            torch.tensor(rows, dtype=torch.float64, device="cpu") for rows in self._sides
        )
        return down, across

    @property
    def points(self) -> int:
        """Products of matrices for a tile."""
        return math.prod(len(rows) for rows in self._sides)

    @property
    def _sides(self) -> list[tuple[tuple[float, ...], ...]]:
        return [TRANSFORMS[side] for side in zip(self.outputs, self.stride, strict=True)]


_ODD = (0.0, 1.0, 0.0)  # an odd input with a stride of 2, as it is

# G of Lavin and Gray for so many outputs along a side and a stride, at the points of winograd.cpp.
TRANSFORMS = {
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


def cycles(conv: Convolution, tile: Tile) -> float:
    """Return how many cycles of one core a convolution should take with such tiles."""
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


def _least_chunks(step: Step, weights: int, tiles: int, pieces: int) -> int:
    """Return how many chunks of tiles to make at least: a piece's each, or one for all.

    With one for all, pieces differ in their output channels. Each then transforms all of the input,
    half of which another core has just written, but reads its own weights only. Timed on a Zen 4 in
    chains of 14 convolutions: chunks are 7 to 40 % faster up to 8 times as many weights as maps'
    numbers, as fast or 20 % slower at 16 times, half as fast at 32 times.
    """
    images = 1 if alone(step) else step.batch
    share = weights < WEIGHTS_TO_MAPS * images * map_floats(step) and tiles >= LEAST_TILES * pieces
    return pieces if share else 1


def pack(
    library: Library, conv: Convolution, weight: Tensor, bias: Tensor, threads: int, tile: Tile
) -> Packed:
    """Make a convolution ready; see `packing.pack`, bias being padded to whole groups."""
    step = sized_step(conv)
    step.kind = KIND
    step.tile_h, step.tile_w = tile.outputs
    points, tiles = tile.points, _tiles(conv, tile)
    blocks = step.blocks + library.group // BLOCK  # of inputs, and of a group's products
    floats = points * blocks * BLOCK
    most = max(2 * library.pixels, CACHE_BYTES // (4 * floats))
    most = max(most // library.pixels, 1) * library.pixels
    together = tiles // step.batch if alone(step) else tiles
    groups = math.ceil(step.out_channels / library.group)
    pieces = pieces_for(step, threads, 1)
    least = _least_chunks(step, points * weight[:, :, 0, 0].numel(), together, pieces)
    cuts = even(max(math.ceil(together / most), math.ceil(pieces / groups), least), step, threads)
    step.chunks = min(cuts, together)
    step.chunk = math.ceil(together / step.chunks)
    # Slices transform the same input once more: there are as many as threads need, not more.
    cut_slices(library, step, pieces, 1)
    step.chunks = math.ceil(tiles / step.chunk)  # they go on from image to image
    step.items = step.chunks * step.slices
    segments = torch.arange(step.blocks, dtype=torch.int32, device="cpu") * step.chunk * BLOCK
    # As point_floats in winograd.cpp: a line of memory between points.
    lines = step.chunk * blocks + 2
    scratch = points * lines * BLOCK
    weights = _transformed(library, conv, weight, tile)
    return Packed(step, weights, bias, segments, None, scratch, tile.name)


def _transformed(library: Library, conv: Convolution, weight: Tensor, tile: Tile) -> Tensor:
    """Return the weights as [group][point], then in the order of `order_weights`."""
    rows, columns = tile.transforms
    transformed = (rows @ weight.double() @ columns.T).float().flatten(2)
    ordered = []
    for group in transformed.split(library.group):
        product = Convolution(conv.shape, (*group.shape[:2], 1, 1), (1, 1), (0, 0), 1, False)
        for plane in group.unbind(2):
            plane = plane[:, :, None, None]
            ordered.append(order_weights(library, product, plane, [0], blocks_of(conv.shape[1])))
    return torch.cat(ordered)
