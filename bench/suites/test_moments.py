"""Moments suite: column sums and Gram matrix of the maps that expand_merge takes in training.

Baselines are PyTorch's sum and matrix product, eager and compiled; ours is
`blnet.kernels.moments`. Bytes: the map is read once. FLOPs: half of the Gram matrix, which is
symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from blnet.bench.memory import tensor_bytes
from blnet.bench.ops import OpSuite, Pass, draw
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import Measurement
from blnet.bench.session import Case
from blnet.bench.settings import Settings

NAME = "moments"


@dataclass(frozen=True)
class Site:
    """A map of K channels at side x side pixels."""

    channels: int
    side: int

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.side}x{self.side}x{self.channels}"


# At 224 x 224 pixels: what the little branches and the bottlenecks hand to a 1x1 convolution.
SITES = (
    Site(32, 56), Site(64, 56), Site(128, 56), Site(128, 28), Site(256, 28), Site(256, 14),
    Site(512, 14), Site(512, 7),
)  # fmt: skip


SCALE = 0.1  # PyTorch's float16 product of 800,000 pixels would be infinite without


def plain(x: Tensor) -> Tensor:
    """Return the Gram matrix plus the sums, so that one result checks both."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return (rows.mT @ rows).float() + rows.sum(0, dtype=torch.float32)


def _ours(x: Tensor) -> Tensor:
    from blnet.kernels import moments

    sums, gram = moments(x)
    return gram + sums


def tensors(site: Site, settings: Settings) -> tuple[list[Tensor | None], int]:
    """Return a map as a ReLU leaves it, and no gradient."""
    x = draw(settings)(settings.throughput_batch, site.channels, site.side, site.side)
    return [x.relu_().mul_(SCALE), None], 0


def _cost(site: Site, given: Sequence[Tensor | None]) -> tuple[int, int]:
    x = given[0]
    assert x is not None
    return tensor_bytes(x) + 4 * site.channels**2, x.numel() * (site.channels + 1)


SUITE = OpSuite(
    name=NAME,
    computes="sums and Gram matrix of all pixels' channels",
    sites=SITES,
    quick_sites=(SITES[2], SITES[5]),
    passes=(Pass("sums and Gram matrix", "inference", plain, _ours, _cost),),
    tensors=tensors,
)
cases, build = SUITE.cases, SUITE.build


@pytest.mark.benchmark(timer=virtual_clock)
def test_moments(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
