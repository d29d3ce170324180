"""Sizes of a merge: launch plans from plain numbers, buckets, the sites of a network."""

from __future__ import annotations

import functools

import torch

from blnet.kernels import testing
from blnet.kernels.launch import (
    Launch,
    ceil_divide,
    fits_int32,
    inner_block,
    known,
    next_power_of_2,
    whole_ratio,
)
from blnet.kernels.tuning import Choice, bucket, choices, concrete, ratio_text

Shape = tuple[int, int, int, int]  # (outer, H, W, inner), see the top of merge.py
Size = tuple[int, int]  # (H_big, W_big)
Problem = tuple[Shape, Size, int]  # the last is the bytes of an element


def equal_sizes(problem: Problem) -> bool:
    """Return whether big is certainly read where the output is written."""
    shape, size_big, _ = problem
    return known(shape[1] == size_big[0]) and known(shape[2] == size_big[1])


def _is_wide(shape: Shape, size_big: Size) -> bool:
    """Return whether offsets may pass 32 bits."""
    outer, height, width, inner = shape
    height_big, width_big = size_big
    elements = (outer * height * width * inner, outer * height_big * width_big * inner)
    products = ((height + 1) * (height_big + 1), (width + 1) * (width_big + 1))
    return not fits_int32(*elements, *products)


def _blocks(inner: int, tile: int, choice: Choice | None) -> Choice:
    """Return the block sizes of a choice, or of the rule: tiles of ``tile`` elements."""
    if choice is not None:
        return {**choice, "BLOCK_INNER": min(choice["BLOCK_INNER"], next_power_of_2(inner))}
    block = inner_block(inner)
    (choice,) = choices("BLOCK_ROWS BLOCK_INNER", (max(tile // block, 1), block, 4, 1))
    return choice


def plan(
    shape: Shape,
    size_big: Size,
    over_big: bool,
    tile: int,
    choice: Choice | None,
    **constants: bool,
) -> Launch:
    """Plan a launch over the pixels of big, or of little.

    Args:
        shape: of little.
        size_big: of big.
        over_big: whether rows are big's pixels.
        tile: elements of a tile where choice is None.
        choice: block sizes and warps.
        **constants: SAME (the sizes are equal, or no windows are wanted) and what else the kernel
            takes.
    """
    outer, height, width, inner = shape
    height_big, width_big = size_big
    wide = _is_wide(shape, size_big)
    if constants["SAME"]:  # no pixels, no channels: one long row of elements
        outer, height, width, inner = outer * height * width * inner, 1, 1, 1
        height_big, width_big = 1, 1
    rows = outer * height_big * width_big if over_big else outer * height * width
    ratios = whole_ratio(height, height_big), whole_ratio(width, width_big)
    choice = _blocks(inner, tile, choice)
    block_rows, block_inner = choice["BLOCK_ROWS"], choice["BLOCK_INNER"]
    return Launch(
        grid=(ceil_divide(rows, block_rows) * ceil_divide(inner, block_inner),),
        integers={
            "rows": rows,
            "inner": inner,
            "height": height,
            "width": width,
            "height_big": height_big,
            "width_big": width_big,
        },
        constants={
            **constants,
            "RATIO_H": ratios[0] if all(ratios) else 0,
            "RATIO_W": ratios[1] if all(ratios) else 0,
            "WIDE": wide,
            "BLOCK_ROWS": block_rows,
            "BLOCK_INNER": block_inner,
        },
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
    )


# Tuning --------------------------------------------------------------------------------------


def key(shape: Shape, size_big: Size, itemsize: int, same: bool) -> str | None:
    """Return the bucket that tuning tables know the sizes by; None for symbolic ones.

    Args:
        shape: of little.
        size_big: of big.
        itemsize: bytes of an element.
        same: whether the kernel sees one long row of elements.
    """
    if not concrete(*shape, *size_big):
        return None
    return _key(shape, size_big, itemsize, same)


@functools.lru_cache(maxsize=1024)  # a launch in eager mode has no time for text
def _key(shape: Shape, size_big: Size, itemsize: int, same: bool) -> str:
    outer, height, width, inner = shape
    wide, pixels = _is_wide(shape, size_big), outer * height * width
    if same:
        return bucket(itemsize, "same", rows=pixels * inner, wide=wide, unit="elements")
    ratios = whole_ratio(height, size_big[0]), whole_ratio(width, size_big[1])
    return bucket(itemsize, f"C={inner}", ratio_text(False, ratios), rows=pixels, wide=wide)


# What else to measure: bytes of a tile, channels of it at most, warps. For sm_90 none of these
# spills, and all loads are of 16 bytes a thread: left out is what has more threads than that needs.
FORWARD_CANDIDATES = (
    (2048, 256, 2), (2048, 64, 4), (4096, 256, 2), (4096, 256, 4), (4096, 64, 4), (8192, 256, 8),
    (8192, 128, 4), (8192, 64, 4), (16384, 256, 4), (16384, 256, 8), (16384, 64, 8),
    (32768, 256, 8),
)  # fmt: skip
BACKWARD_CANDIDATES = (
    (1024, 256, 2), (2048, 256, 2), (2048, 64, 4), (4096, 256, 4), (4096, 256, 8), (4096, 64, 4),
    (8192, 256, 4), (8192, 256, 8), (16384, 256, 8),
)  # fmt: skip


def candidates(problem: Problem, rows: tuple[tuple[int, int, int], ...]) -> list[Choice]:
    """Turn (bytes of a tile, channels of it at most, warps) into choices for a problem."""
    (_, _, _, inner), _, itemsize = problem
    found = []
    for tile_bytes, most, warps in rows:
        block = 1 if equal_sizes(problem) else inner_block(inner, most)
        block_rows = max(tile_bytes // itemsize // block, 1)
        found += choices("BLOCK_ROWS BLOCK_INNER", (block_rows, block, warps, 1))
    return found


def site_key(problem: Problem) -> str | None:
    """Return the bucket of a problem whose gradients are both wanted."""
    return key(*problem, equal_sizes(problem))


# C, side, side of big: where bL-ResNet-50 merges at 224 x 224 pixels, and its residual adds.
SITES = {
    "stem C=64": (64, 56, 56),
    "stage 1 C=256": (256, 56, 28),
    "stage 2 C=512": (512, 28, 14),
    "stage 3 C=1024": (1024, 14, 7),
    "residual C=256": (256, 28, 28),
    "residual C=2048": (2048, 7, 7),
}


def sites(batch: int, itemsize: int) -> dict[str, Problem]:
    """List the problems that ``blnet kernels tune`` measures, by name of the site."""
    return {
        name: ((batch, side, side, channels), (big, big), itemsize)
        for name, (channels, side, big) in SITES.items()
    }


def drawn(
    problem: Problem, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw big, little and a gradient for a problem, channels-last."""
    (n, h, w, c), size_big, _ = problem
    generator = torch.Generator(device).manual_seed(0)
    shape = testing.Shape(n, c, h, w, *size_big, "for timing")
    big, little = testing.merge_inputs(shape, dtype, "channels_last", device, generator)
    return big, little, testing.draw(shape.little, dtype, "channels_last", device, generator)


# For ahead-of-time compilation: name -> (outer, H, W, inner), (H_big, W_big). Each compiles to
# different code.
PROBLEMS = {
    "channels_last x2": ((32, 56, 56, 256), (28, 28)),
    "channels_last x2 narrow": ((32, 56, 56, 64), (28, 28)),
    "channels_last odd": ((32, 55, 55, 256), (28, 28)),
    "channels_last unaligned": ((3, 55, 55, 37), (28, 28)),
    "channels_last x2 wide": ((2048, 112, 112, 128), (56, 56)),
    "channels_last odd wide": ((2048, 111, 111, 128), (56, 56)),
    "contiguous x2": ((32 * 256, 56, 56, 1), (28, 28)),
    "contiguous odd": ((32 * 256, 55, 55, 1), (28, 28)),
    "same": ((32, 56, 56, 256), (56, 56)),
    "same wide": ((2048, 112, 112, 128), (112, 112)),
}
