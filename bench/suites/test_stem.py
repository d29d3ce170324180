"""Stem suite: the end of bL-ResNet-50's stem at inference, from its branches' maps or their inputs.

BN is folded on both sides. Baselines are PyTorch's convolutions with biases, eager and compiled;
ours is `blnet.kernels.stem`. Bytes are those that any implementation must move: each input and the
weights read once, the result written once.
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

NAME = "stem"
WIDTH, SIDE = 64, 56  # at 224 x 224 pixels


@dataclass(frozen=True)
class Site:
    """A stem whose little branch is `alpha` times narrower."""

    alpha: int

    @property
    def narrow(self) -> int:
        """Channels of the little branch."""
        return WIDTH // self.alpha

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{SIDE}x{SIDE}x{WIDTH}, alpha {self.alpha}"


SITES = (Site(2), Site(4))
# The tensors: x and the little branch's map at the stem's size, weight and shift of the strided
# convolutions of big and little, of expand and of fusion, then what the strided ones give.


def _end(big: Tensor, little: Tensor, *layers: Tensor) -> Tensor:
    weight_expand, shift_expand, weight_fusion, shift_fusion = layers
    merged = F.conv2d(little, weight_expand, shift_expand).add_(big).relu_()
    return F.conv2d(merged, weight_fusion, shift_fusion).relu_()


def merge(*given: Tensor) -> Tensor:
    """Return the stem's end from its branches' maps, as PyTorch's users write it."""
    return _end(given[10], given[11], *given[6:10])


def strided(*given: Tensor) -> Tensor:
    """Return the same with the branches' strided convolutions."""
    x, little, weight_big, shift_big, weight_little, shift_little, *layers = given[:10]
    big = F.conv2d(x, weight_big, shift_big, stride=2, padding=1)
    little = F.conv2d(little, weight_little, shift_little, stride=2, padding=1).relu_()
    return _end(big, little, *layers)


def _ours_merge(*given: Tensor) -> Tensor:
    from blnet.kernels import stem

    return stem(given[10], given[11], given[6], given[7], given[8], given[9])


def _ours_strided(*given: Tensor) -> Tensor:
    from blnet.kernels import stem

    x, little, weight_big, shift_big, weight_little, shift_little, *layers = given[:10]
    strided = {
        "weight_big": weight_big,
        "shift_big": shift_big,
        "weight_little": weight_little,
        "shift_little": shift_little,
    }
    return stem(x, little, layers[0], layers[1], layers[2], layers[3], **strided)


def tensors(site: Site, settings: Settings) -> tuple[list[Tensor | None], int]:
    """Return the tensors listed above, and no gradient."""
    make, batch, narrow = draw(settings), settings.throughput_batch, site.narrow

    def layer(inside: int, outside: int, kernel: int) -> list[Tensor]:
        weight = make(outside, inside, kernel, kernel) / (inside * kernel**2 / 2) ** 0.5
        return [weight, make(outside) / 4]

    return [
        make(batch, WIDTH, 2 * SIDE, 2 * SIDE).relu_(),
        make(batch, narrow, 2 * SIDE, 2 * SIDE).relu_(),
        *layer(WIDTH, WIDTH, 3),
        *layer(narrow, narrow, 3),
        *layer(narrow, WIDTH, 1),
        *layer(WIDTH, WIDTH, 1),
        make(batch, WIDTH, SIDE, SIDE),
        make(batch, narrow, SIDE, SIDE).relu_(),
        None,
    ], 0


def _merge_cost(site: Site, given: Sequence[Tensor | None]) -> tuple[int, int]:
    big, little = given[10:12]
    assert big is not None
    products = WIDTH * (site.narrow + WIDTH)
    return tensor_bytes(*given[6:10], big, little, big), 2 * big.numel() // WIDTH * products


def _strided_cost(site: Site, given: Sequence[Tensor | None]) -> tuple[int, int]:
    big = given[10]
    assert big is not None
    products = 9 * (WIDTH**2 + site.narrow**2)
    flops = _merge_cost(site, given)[1] + 2 * big.numel() // WIDTH * products
    return tensor_bytes(*given[:10], big), flops


SUITE = OpSuite(
    name=NAME,
    computes="relu(conv1x1(relu(big + conv1x1(little))))",
    sites=SITES,
    quick_sites=SITES[:1],
    passes=(
        Pass("merge and fusion", "inference", merge, _ours_merge, _merge_cost),
        Pass("with strided convs", "inference", strided, _ours_strided, _strided_cost),
    ),
    tensors=tensors,
)
cases, build = SUITE.cases, SUITE.build


@pytest.mark.benchmark(timer=virtual_clock)
def test_stem(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
