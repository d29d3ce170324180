"""Expand-merge suite: relu(upsample(big) + BN(conv1x1(x))), inference and training.

Sites are the merges of bL-ResNet-50 at alpha 2 and conv3 + bn3 + shortcut of every stage's
bottleneck. At inference bytes and FLOPs are those that any implementation must move and multiply.
In training they are those of the fused algorithm, which needs neither the convolution's output nor
its gradient: x is read twice (its moments come first), and in the backward pass dout, the result
(ReLU's mask) and x are. So the bound there is that algorithm's, as COUNTED tells the reader: what
holds a whole map on the chip would read it once.
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

NAME = "expand_merge"


@dataclass(frozen=True)
class Site:
    """A 1x1 convolution from K to C channels at side x side pixels, big `ratio` times smaller."""

    channels_in: int
    channels: int
    side: int
    ratio: int

    @property
    def label(self) -> str:
        """What tables call it."""
        where = f"{self.side}x{self.side}, {self.channels_in} to {self.channels}"
        return where + (" merge" if self.ratio == 2 else "")


# At 224 x 224 pixels: the stem's merge and the three stages', then conv3 of the four stages.
MERGES = (Site(32, 64, 56, 1), Site(128, 256, 56, 2), Site(256, 512, 28, 2), Site(512, 1024, 14, 2))
CLOSINGS = (
    Site(64, 256, 56, 1), Site(128, 512, 28, 1), Site(256, 1024, 14, 1), Site(512, 2048, 7, 1),
)  # fmt: skip
COUNTED = (
    "what any implementation must move and multiply at inference, and in training what the fused "
    "algorithm must, so that a share there is one of its own bound: forward it reads x twice, and "
    "multiplies for the moments of x; backward it reads x, the result and its gradient twice"
)
EPS = 1e-5
NEAR_ZERO = 0.05  # standard deviations of about 1.5


def _close(y: Tensor, big: Tensor) -> Tensor:
    if big.shape != y.shape:
        big = F.interpolate(big, size=y.shape[2:], mode="nearest")
    return torch.relu(y + big)


def infer(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, big: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    """Return the result as PyTorch's users write it, with BN in evaluation folded: a bias."""
    return _close(F.conv2d(x, weight, beta.to(x.dtype)), big)


def train(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, big: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    """Return the result as PyTorch's users write it, with BN on the batch's statistics."""
    y = F.batch_norm(F.conv2d(x, weight), mean, var, gamma, beta, True, 0.1, EPS)
    return _close(y, big)


def _infer(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, big: Tensor, *_: Any) -> Tensor:
    from blnet.kernels import expand_merge

    return expand_merge(x, weight, None, beta.to(x.dtype), big)


def _train(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, big: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    from blnet.kernels import expand_merge_train

    return expand_merge_train(x, weight, gamma, beta, mean, var, 0.1, EPS, big)


def tensors(site: Site, settings: Settings) -> tuple[list[Tensor | None], int]:
    """Return x, weight, gamma, beta, big, running mean and variance, and the result's gradient."""
    make, batch, k, c = draw(settings), settings.throughput_batch, site.channels_in, site.channels
    small = site.side // site.ratio
    x = make(batch, k, site.side, site.side).relu_()  # what a bottleneck's second ReLU gives
    weight, big = make(c, k, 1, 1) / k**0.5, make(batch, c, small, small)
    gamma, beta = make(c).float().abs() + 0.5, make(c).float()
    running = torch.zeros_like(gamma), torch.ones_like(gamma)
    gradient = make(batch, c, site.side, site.side)
    # Where the sum is so near zero that rounding decides ReLU's mask, no gradient comes in: such
    # flips would hide an error of a channel.
    y = F.conv2d(x.float(), weight.float())
    y = F.batch_norm(y, None, None, gamma, beta, True, 0.1, EPS)
    y += F.interpolate(big.float(), size=y.shape[2:], mode="nearest")
    gradient[y.abs() < NEAR_ZERO] = 0
    return [x, weight, gamma, beta, big, *running, gradient], 5


def _flops(site: Site, given: Sequence[Tensor | None]) -> int:
    x = given[0]
    assert x is not None
    return 2 * x.numel() * site.channels


def _inference(site: Site, given: Sequence[Tensor | None]) -> tuple[int, int]:
    x, weight, _, _, big, _, _, out = given
    return tensor_bytes(x, weight, big, out), _flops(site, given)


def _forward(site: Site, given: Sequence[Tensor | None]) -> tuple[int, int]:
    bytes_moved, flops = _inference(site, given)
    # Half of the Gram matrix's products.
    return bytes_moved + tensor_bytes(given[0]), flops + flops * site.channels_in // (
        2 * site.channels
    )


def _backward(site: Site, given: Sequence[Tensor | None]) -> tuple[int, int]:
    x, weight, _, _, big, _, _, out = given
    twice = 2 * tensor_bytes(out, out, x, weight)
    # A = g^T x, g W, and x times a K x K matrix; a residual's gradient is g itself.
    flops = 2 * _flops(site, given)
    return twice + tensor_bytes(x, big), flops + flops * site.channels_in // (2 * site.channels)


SUITE = OpSuite(
    name=NAME,
    computes="relu(upsample(big) + BN(conv1x1(x)))",
    sites=(*MERGES, *CLOSINGS),
    quick_sites=(MERGES[1], CLOSINGS[2]),
    passes=(
        Pass("inference", "inference", infer, _infer, _inference),
        Pass("training forward", "forward", train, _train, _forward),
        Pass("training backward", "backward", train, _train, _backward),
    ),
    tensors=tensors,
    # PyTorch rounds the convolution's output and the gradient of it as well.
    tolerances={"float32": 1e-4, "float16": 3e-3, "bfloat16": 1.6e-2},
    rounds=1,
    counted=COUNTED,
)
cases, build = SUITE.cases, SUITE.build


@pytest.mark.benchmark(timer=virtual_clock)
def test_expand_merge(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
