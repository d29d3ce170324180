"""Residual blocks: basic, bottleneck, grouped bottleneck, each with or without squeeze-excitation.

A branch of a Big-Little module asks for its blocks through a `BlockSpec` and gets them from a
`BlockFactory`, so that the modules do not care whose blocks they are made of: ours, torchvision's
or a user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blnet.kernels import merge

# The op is one node for every graph tracer, as torch.nn's own functions are.
torch.fx.wrap("merge")

Stride = int | tuple[int, int]


@dataclass(frozen=True)
class BlockSpec:
    """What a branch asks of one residual block.

    Attributes:
        in_channels: channels of the block's input.
        out_channels: channels of its output.
        stride: step of the block in height and width.
        narrow: how many times narrower than the stage's full width the block is (alpha to some
            power); grouped convolutions keep the width of a group and have this many times fewer.
        closing_activation: whether the block ends with its activation.
        position: which of the stage's blocks it stands for, -1 for the fusion block.
    """

    in_channels: int
    out_channels: int
    stride: Stride = 1
    narrow: int = 1
    closing_activation: bool = True
    position: int = 0


BlockFactory = Callable[[BlockSpec], nn.Module]


def is_strided(stride: Stride) -> bool:
    """Return whether a stride shrinks the map in either direction."""
    return stride not in (1, (1, 1))


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: Stride = 1,
    groups: int = 1,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> tuple[nn.Conv2d, nn.Module]:
    """Return a convolution without bias, padded to keep the size, and its normalisation."""
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return conv, norm(out_channels)


def make_shortcut(spec: BlockSpec, pooled: bool) -> nn.Sequential | None:
    """Return what turns a block's input into its residual, or None where that is the input itself.

    Args:
        spec: the block the shortcut belongs to.
        pooled: shrink by a 3x3 average pool before the 1x1 convolution, as Big-Little nets do;
            otherwise the 1x1 convolution strides, as in the plain ResNet.
    """
    widens = spec.in_channels != spec.out_channels
    layers: list[nn.Module] = []
    if is_strided(spec.stride) and pooled:
        layers.append(nn.AvgPool2d(3, stride=spec.stride, padding=1))
    if widens or (is_strided(spec.stride) and not pooled):
        stride = 1 if pooled else spec.stride
        layers.extend(conv_norm(spec.in_channels, spec.out_channels, 1, stride))
    return nn.Sequential(*layers) if layers else None


class SqueezeExcitation(nn.Module):
    """Channel gates from the global average: x * sigmoid(fc2(relu(fc1(mean(x))))).

    Source: Hu et al., "Squeeze-and-Excitation Networks", 2018; reduction 16.

    Args:
        channels: channels of the map.
        reduction: how many times narrower the hidden layer is.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, C, H, W) with each channel scaled by its gate."""
        gates: Tensor = self.gate(self.fc2(self.relu(self.fc1(self.pool(x)))))
        return x * gates


class ResidualBlock(nn.Module):
    """What the two kinds of block share: the shortcut, the gates and the closing add.

    Args:
        spec: widths, stride and whether the block closes with its ReLU.
        se_reduction: reduction of the squeeze-excitation before the residual add; 0 for none.
        pooled_shortcut: see `make_shortcut`.
    """

    def __init__(
        self, spec: BlockSpec, se_reduction: int = 0, pooled_shortcut: bool = True
    ) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.se = SqueezeExcitation(spec.out_channels, se_reduction) if se_reduction else None
        self.downsample = make_shortcut(spec, pooled_shortcut)
        self.closing_activation = spec.closing_activation

    def _close(self, residual: Tensor, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        if self.se is not None:
            residual = self.se(residual)
        return merge(shortcut, residual) if self.closing_activation else residual + shortcut

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation just before the residual add."""
        raise NotImplementedError


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions: relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)).

    Args:
        spec: widths, stride and whether the block closes with its ReLU.
        se_reduction: reduction of the squeeze-excitation; 0 for none.
        pooled_shortcut: see `make_shortcut`.
    """

    def __init__(
        self, spec: BlockSpec, se_reduction: int = 0, pooled_shortcut: bool = True
    ) -> None:
        super().__init__(spec, se_reduction, pooled_shortcut)
        self.conv1, self.bn1 = conv_norm(spec.in_channels, spec.out_channels, 3, spec.stride)
        self.conv2, self.bn2 = conv_norm(spec.out_channels, spec.out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / stride, W / stride), sizes rounded up."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self._close(residual, x)

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation just before the residual add."""
        return self.bn2


class Bottleneck(ResidualBlock):
    """1x1, 3x3 (grouped in ResNeXt), 1x1 convolutions and the residual add.

    The inner width is cardinality * floor(C_out / 4 * base_width / 64); a block that is `narrow`
    times narrower has cardinality / narrow groups of base width * narrow, so that each group is as
    wide as in the full block (ResNeXt; for cardinality 1 the inner width is C_out / 4).

    Args:
        spec: widths, stride and whether the block closes with its ReLU.
        cardinality: groups of the 3x3 convolution at the stage's full width.
        base_width: width of a group in the first stage, 64 where there is one group.
        se_reduction: reduction of the squeeze-excitation; 0 for none.
        pooled_shortcut: see `make_shortcut`.
    """

    def __init__(
        self,
        spec: BlockSpec,
        cardinality: int = 1,
        base_width: int = 64,
        se_reduction: int = 0,
        pooled_shortcut: bool = True,
    ) -> None:
        super().__init__(spec, se_reduction, pooled_shortcut)
        groups = max(1, cardinality // spec.narrow)
        narrow = spec.narrow if cardinality > 1 else 1
        inner = spec.out_channels // 4 * narrow * base_width // 64 * groups
        self.conv1, self.bn1 = conv_norm(spec.in_channels, inner, 1)
        self.conv2, self.bn2 = conv_norm(inner, inner, 3, spec.stride, groups)
        self.conv3, self.bn3 = conv_norm(inner, spec.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / stride, W / stride), sizes rounded up."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        return self._close(self.bn3(self.conv3(residual)), x)

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation just before the residual add."""
        return self.bn3
