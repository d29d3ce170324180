"""Convolutions made ready by the way that should be the fastest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blnet.kernels.native import direct, stem, winograd
from blnet.kernels.native.convolution import Convolution, Packed
from blnet.kernels.native.library import Library

# Ways to compute a convolution.
METHODS = (direct.METHOD, *dict.fromkeys(tile.name for tile in winograd.TILES), stem.METHOD)


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
        method: one of `METHODS`; None chooses by `choose_method`.
    """
    out_channels = conv.weight[0]
    size = math.ceil(out_channels / library.group) * library.group
    padded = torch.zeros(size, dtype=torch.float32, device="cpu")
    if bias is not None:
        padded[:out_channels] = bias
    method = method or choose_method(conv)
    if method == stem.METHOD:
        return stem.pack(library, conv, weight, padded, threads)
    tile = winograd.tile_of(method, conv.stride)
    if tile is None:
        return direct.pack(library, conv, weight, padded, threads)
    return winograd.pack(library, conv, weight, padded, threads, tile)


def choose_method(conv: Convolution) -> str:
    """Return the way that should be the fastest, by counting cycles."""
    ways = {direct.METHOD: direct.cycles(conv)}
    if conv.weight[2:] == (3, 3) and conv.groups == 1 and not conv.planar:
        for tile in winograd.TILES:
            if tile.stride == conv.stride:
                ways[tile.name] = winograd.cycles(conv, tile)
    if stem.fits(conv):
        ways[stem.METHOD] = stem.cycles(conv)
    return min(ways, key=lambda way: ways[way])
