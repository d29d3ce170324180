"""Bottleneck suite: the little branches of bL-ResNet-50 at inference, alone and with their merge.

BN is folded on both sides. Baselines are PyTorch's convolutions with biases, eager and compiled;
ours is `blnet.kernels.bottleneck`. Bytes are those that any implementation must move: the block's
input, its shortcut, big and the weights read once, the result written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from blnet.bench.memory import tensor_bytes
from blnet.bench.ops import OpSuite, Pass, draw
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import Measurement
from blnet.bench.session import Case
from blnet.bench.settings import Settings

NAME = "bottleneck"


@dataclass(frozen=True)
class Site:
    """A little branch of one block: widths of its input, inside, of its output and of the merge."""

    channels_in: int
    inner: int
    channels: int
    merged: int
    side: int

    @property
    def label(self) -> str:
        """What tables call it."""
        widths = (self.channels_in, self.inner, self.channels, self.merged)
        return f"{self.side}x{self.side}, {' to '.join(map(str, widths))}"


# At 224 x 224 pixels: the three stages at alpha 2 and at alpha 4, beta 4.
SITES = (
    Site(64, 32, 128, 256, 56), Site(256, 64, 256, 512, 28), Site(512, 128, 512, 1024, 14),
    Site(64, 16, 64, 256, 56), Site(256, 32, 128, 512, 28), Site(512, 64, 256, 1024, 14),
)  # fmt: skip


def _block(x: Tensor, shortcut: Tensor, *layers: Tensor) -> Tensor:
    weight1, shift1, weight2, shift2, weight3, shift3 = layers
    h = F.conv2d(x, weight1, shift1).relu_()
    u = F.conv2d(h, weight2, shift2, padding=1).relu_()
    return F.conv2d(u, weight3, shift3).add_(shortcut).relu_()


def block(x: Tensor, shortcut: Tensor, *rest: Tensor) -> Tensor:
    """Return the block's result as PyTorch's users write it."""
    return _block(x, shortcut, *rest[:6])


def branch(x: Tensor, shortcut: Tensor, *rest: Tensor) -> Tensor:
    """Return the block's result expanded and merged, as PyTorch's users write it."""
    *layers, weight, shift, big = rest
    y = F.conv2d(_block(x, shortcut, *layers), weight, shift)
    return y.add_(F.interpolate(big, size=y.shape[2:], mode="nearest")).relu_()


def _ours_block(x: Tensor, shortcut: Tensor, *rest: Tensor) -> Tensor:
    from blnet.kernels import bottleneck

    return bottleneck(x, rest[0], rest[1], rest[2], rest[3], rest[4], rest[5], shortcut)


def _ours_branch(x: Tensor, shortcut: Tensor, *rest: Tensor) -> Tensor:
    from blnet.kernels import bottleneck

    weight1, shift1, weight2, shift2, weight3, shift3, weight, shift, big = rest
    return bottleneck(
        x, weight1, shift1, weight2, shift2, weight3, shift3, shortcut, True, weight, shift, big
    )


def tensors(site: Site, settings: Settings) -> tuple[list[Tensor | None], int]:
    """Return x, the shortcut, the layers' weights and shifts, big, and no gradient."""
    make, batch, side = draw(settings), settings.throughput_batch, site.side

    def layer(inside: int, outside: int, kernel: int = 1) -> list[Tensor]:
        weight = make(outside, inside, kernel, kernel) / (inside * kernel**2 / 2) ** 0.5
        return [weight, make(outside) / 4]

    return [
        make(batch, site.channels_in, side, side).relu_(),
        make(batch, site.channels, side, side),
        *layer(site.channels_in, site.inner),
        *layer(site.inner, site.inner, 3),
        *layer(site.inner, site.channels),
        *layer(site.channels, site.merged),
        make(batch, site.merged, side // 2, side // 2),
        None,
    ], 0


def _block_cost(site: Site, given: Sequence[Tensor | None]) -> tuple[int, int]:
    x, shortcut = given[:2]
    assert x is not None
    pixels = x.numel() // site.channels_in
    products = site.inner * (site.channels_in + 9 * site.inner + site.channels)
    return tensor_bytes(x, shortcut, shortcut, *given[2:8]), 2 * pixels * products


def _branch_cost(site: Site, given: Sequence[Tensor | None]) -> tuple[int, int]:
    x, shortcut = given[:2]
    assert x is not None
    assert shortcut is not None
    pixels = x.numel() // site.channels_in
    out = pixels * site.merged * x.element_size()
    flops = _block_cost(site, given)[1] + 2 * pixels * site.channels * site.merged
    return tensor_bytes(x, shortcut, *given[2:]) + out, flops


SUITE = OpSuite(
    name=NAME,
    computes="a little branch's block; with relu(upsample(big) + conv1x1) after it",
    sites=SITES,
    quick_sites=SITES[:1],
    passes=(
        Pass("block", "inference", block, _ours_block, _block_cost),
        Pass("block and merge", "inference", branch, _ours_branch, _branch_cost),
    ),
    tensors=tensors,
)
cases, build = SUITE.cases, SUITE.build


@pytest.mark.benchmark(timer=virtual_clock)
def test_bottleneck(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
