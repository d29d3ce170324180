"""Merge suite: relu(upsample(big) + little) at the merge sites of bL-ResNet-50, one group a site.

Baselines are PyTorch's own operations, eager and compiled; ours is `blnet.kernels.merge`. Bytes are
what any implementation must move: each input read once, each output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blnet.bench.memory import tensor_bytes
from blnet.bench.ops import OpSuite, Pass, draw
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import Measurement
from blnet.bench.session import Case
from blnet.bench.settings import Settings

NAME = "merge"


@dataclass(frozen=True)
class Site:
    """Where bL-ResNet-50 merges: C channels at side x side pixels, big `ratio` times smaller."""

    channels: int
    side: int
    ratio: int

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.side}x{self.side}x{self.channels}" + (" stem" if self.ratio == 1 else "")


# At 224 x 224 pixels; the three stages and the stem, whose maps are of one size.
SITES = (Site(64, 56, 1), Site(256, 56, 2), Site(512, 28, 2), Site(1024, 14, 2))


def eager(big: Tensor, little: Tensor) -> Tensor:
    """Return the merge as PyTorch's users write it."""
    if big.shape != little.shape:
        big = F.interpolate(big, size=little.shape[2:], mode="nearest")
    return torch.relu(big + little)


def _blnet(big: Tensor, little: Tensor) -> Tensor:
    from blnet.kernels import merge

    return merge(big, little)


def tensors(site: Site, settings: Settings) -> tuple[list[Tensor | None], int]:
    """Return big, little and a random gradient of the result, all channels-last."""
    make, batch, small = draw(settings), settings.throughput_batch, site.side // site.ratio
    return [make(batch, site.channels, side, side) for side in (small, site.side, site.side)], 2


def _forward(site: Site, given: Sequence[Tensor | None]) -> tuple[int, int]:
    """Read big and little and write the result."""
    big, little, _ = given
    return tensor_bytes(big, little, little), 0


def _both(site: Site, given: Sequence[Tensor | None]) -> tuple[int, int]:
    """Besides, read the result's gradient and the result (ReLU's mask), write both gradients."""
    big, little, _ = given
    return _forward(site, given)[0] + tensor_bytes(little, little, little, big), 0


SUITE = OpSuite(
    name=NAME,
    computes="relu(upsample(big) + little)",
    sites=SITES,
    # The largest merge and the smallest.
    quick_sites=(SITES[1], SITES[3]),
    passes=(
        Pass("forward", "inference", eager, _blnet, _forward),
        Pass("forward + backward", "both", eager, _blnet, _both),
    ),
    tensors=tensors,
)
cases, build = SUITE.cases, SUITE.build


@pytest.mark.benchmark(timer=virtual_clock)
def test_merge(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
