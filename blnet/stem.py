"""Stems: what turns an image into the first stage's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blnet.blocks import conv_norm
from blnet.kernels import merge

torch.fx.wrap("merge")


class PlainStem(nn.Sequential):
    """7x7 convolution with stride 2, BN, ReLU, 3x3 max pool with stride 2: 1/4 of the size.

    Args:
        in_channels: channels of the image.
        width: channels of the output.
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        conv, norm = conv_norm(in_channels, width, 7, stride=2)
        super().__init__(conv, norm, nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1))


class SmallStem(nn.Sequential):
    """3x3 convolution, BN, ReLU at full size, for images of about 8 to 64 pixels a side.

    Args:
        in_channels: channels of the image.
        width: channels of the output.
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__(*conv_norm(in_channels, width, 3), nn.ReLU(inplace=True))


class BigLittleStem(nn.Module):
    """7x7 convolution with stride 2, then a small two-branch module in place of the max pool.

    big = bn(conv3x3/2); little = bn(conv1x1(relu(bn(conv3x3/2(relu(bn(conv3x3))))))) at width
    / alpha; out = relu(bn(conv1x1(relu(big + little)))). Both branches end at 1/4 of the size.

    Args:
        in_channels: channels of the image.
        width: channels of the output.
        alpha: how many times narrower the little branch is.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, alpha: int = 2) -> None:
        super().__init__()
        narrow = width // alpha
        self.conv1, self.bn1 = conv_norm(in_channels, width, 7, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.big = nn.Sequential(*conv_norm(width, width, 3, stride=2))
        self.little = nn.Sequential(
            *conv_norm(width, narrow, 3),
            nn.ReLU(inplace=True),
            *conv_norm(narrow, narrow, 3, stride=2),
            nn.ReLU(inplace=True),
        )
        self.expand = nn.Sequential(*conv_norm(narrow, width, 1))
        self.fusion = nn.Sequential(*conv_norm(width, width, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (N, C, H, W) to (N, width, H / 4, W / 4), sizes rounded up."""
        x = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.fusion(merge(self.big(x), self.expand(self.little(x))))
        return out
