"""Stems: what turns an image into the first stage's input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from blnet.blocks import conv_norm
from blnet.kernels import merge
from blnet.module import divide_width

torch.fx.wrap("merge")


class PlainStem(nn.Sequential):
    """7x7 convolution with stride 2, BN, ReLU, 3x3 max pool with stride 2: 1/4 of the size.

    Args:
        in_channels: channels of the image.
        width: channels of the output.
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        layers = _opening(in_channels, width, 7, stride=2)
        super().__init__(OrderedDict(**layers, pool=nn.MaxPool2d(3, stride=2, padding=1)))


class SmallStem(nn.Sequential):
    """3x3 convolution, BN, ReLU at full size, for images of about 8 to 64 pixels a side.

    Args:
        in_channels: channels of the image.
        width: channels of the output.
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__(OrderedDict(_opening(in_channels, width, 3, stride=1)))


class BigLittleStem(nn.Sequential):
    """7x7 convolution with stride 2, BN, ReLU, then a `BigLittlePool`: 1/4 of the size.

    Args:
        in_channels: channels of the image.
        width: channels of the output.
        alpha: how many times narrower the pool's little branch is.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, alpha: int = 2) -> None:
        layers = _opening(in_channels, width, 7, stride=2)
        super().__init__(OrderedDict(**layers, pool=BigLittlePool(width, alpha)))


class BigLittlePool(nn.Module):
    """The two small branches that stand in place of the stem's max pool and halve the map.

    big = bn(conv3x3/2(x)); little = bn(conv1x1(relu(bn(conv3x3/2(relu(bn(conv3x3(x)))))))) at
    width / alpha; out = relu(bn(conv1x1(relu(big + little)))).

    Args:
        width: channels of input and output.
        alpha: how many times narrower the little branch is.
        norm: makes the normalisations, from their width.

    Raises:
        ValueError: if alpha does not divide the width.
    """

    def __init__(
        self,
        width: int = 64,
        alpha: int = 2,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        narrow = divide_width(width, alpha, 1)

        layer = partial(conv_norm, norm=norm)
        self.big = nn.Sequential(*layer(width, width, 3, stride=2))
        self.little = nn.Sequential(
            *layer(width, narrow, 3),
            nn.ReLU(inplace=True),
            *layer(narrow, narrow, 3, stride=2),
            nn.ReLU(inplace=True),
        )
        self.expand = nn.Sequential(*layer(narrow, width, 1))
        self.fusion = nn.Sequential(*layer(width, width, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, H, W) to (N, width, H / 2, W / 2), sizes rounded up."""
        out: Tensor = self.fusion(merge(self.big(x), self.expand(self.little(x))))
        return out


def _opening(in_channels: int, width: int, kernel: int, stride: int) -> dict[str, nn.Module]:
    conv, norm = conv_norm(in_channels, width, kernel, stride)
    return {"conv1": conv, "bn1": norm, "relu": nn.ReLU(inplace=True)}
