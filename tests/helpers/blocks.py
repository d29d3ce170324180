"""A residual block to fuse, and what tests compare of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blnet.fusing import fuse, fusions
from blnet.fusion_sites import Fusion


class Block(nn.Module):
    """A residual block whose end tests vary."""

    def __init__(self, channels: int = 8, width: int = 16, **conv: object) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 1)
        self.conv = nn.Conv2d(channels, width, **{"kernel_size": 1, "bias": False, **conv})  # type: ignore[arg-type]
        self.norm: nn.Module = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the ReLU of the sum of the input and what the layers make of it."""
        result: Tensor = self.relu(self.norm(self.conv(self.conv1(x))) + x)
        return result


def place_of(block: nn.Module) -> Fusion:
    """Return the only place that is found in a block."""
    (place,) = fusions(fuse(block))
    return place


def holds(block: nn.Module) -> nn.Module:
    """Assert that a block's fused copy computes what it computes, and return the copy."""
    x = torch.randn(2, 16, 5, 7)
    fused = fuse(block)
    for training in (True, False):
        assert torch.equal(fused.train(training)(x), block.train(training)(x))
    return fused
