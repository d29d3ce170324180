"""Our own residual block in the shape of a user's, for classes whose constructor will not do."""

from __future__ import annotations

import copy
import itertools

from torch import Tensor, nn

from blnet.blocks import BlockSpec, SqueezeExcitation
from blnet.conversion.discovery import CONVERTIBLE
from blnet.conversion.surgery import (
    ACTIVATIONS,
    NORMS,
    closing_activation,
    layers,
    norm_like,
    pooled_shortcut,
)


class ChainBlock(nn.Module):
    """The template's chain of convolutions, each with normalisation and activation, and the add.

    Kernel sizes, dilations, groups, normalisation and activation are the template's; inner widths
    are the template's over `spec.narrow`, groups likewise where they divide. A squeeze-excitation
    becomes ours of the same reduction.

    Args:
        template: the block whose shape is taken, of the stage's full width.
        spec: widths, stride and whether the block closes with its activation.
    """

    def __init__(self, template: nn.Module, spec: BlockSpec) -> None:
        super().__init__()
        convs = layers(template, nn.Conv2d, "main")
        norms = layers(template, NORMS, "main")
        norm = norms[0] if norms else None
        activation = next(iter(layers(template, ACTIVATIONS)), nn.ReLU(inplace=True))
        striding = _striding(convs)
        chain: list[nn.Module] = []
        width = spec.in_channels
        for index, conv in enumerate(convs):
            last = index == len(convs) - 1
            out = spec.out_channels if last else max(1, conv.out_channels // spec.narrow)
            stride = spec.stride if index == striding else 1
            chain.append(_conv_like(conv, width, out, stride, spec.narrow))
            chain.append(norm_like(norm, out))
            if not last:
                chain.append(copy.deepcopy(activation))
            width = out
        self.residual = nn.Sequential(*chain)
        reduction = gate_reduction(template)
        self.se = SqueezeExcitation(spec.out_channels, reduction) if reduction else None
        self.downsample = pooled_shortcut(spec, norm)
        closing = closing_activation(template) if spec.closing_activation else None
        self.activation = copy.deepcopy(closing)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / stride, W / stride), sizes rounded up."""
        shortcut = x if self.downsample is None else self.downsample(x)
        residual: Tensor = self.residual(x)
        if self.se is not None:
            residual = self.se(residual)
        out = residual + shortcut
        return out if self.activation is None else self.activation(out)


def check_chain(template: nn.Module) -> None:
    """Raise a ValueError where a block's convolutions are not one chain that we could build."""
    convs = layers(template, nn.Conv2d, "main")
    broken = any(a.out_channels != b.in_channels for a, b in itertools.pairwise(convs))
    if broken or len(convs) < 2:
        raise ValueError(
            f"the block {type(template).__name__} was not recognised: its constructor was not "
            f"understood and its convolutions are not one chain; {CONVERTIBLE}"
        )


def gate_reduction(template: nn.Module) -> int:
    """Return the reduction of the template's squeeze-excitation, 0 where it has none."""
    linear = layers(template, nn.Conv2d | nn.Linear, "gate")
    if len(linear) != 2:
        return 0
    narrow, wide = linear[0].weight.shape[:2]
    return max(1, int(wide) // int(narrow))


def _striding(convs: list[nn.Conv2d]) -> int:
    """Return which convolution strides: the template's own, else the first one wider than 1x1."""
    for index, conv in enumerate(convs):
        if max(conv.stride) > 1:
            return index
    return next((index for index, conv in enumerate(convs) if max(conv.kernel_size) > 1), 0)


def _conv_like(
    conv: nn.Conv2d, in_channels: int, out_channels: int, stride: object, narrow: int
) -> nn.Conv2d:
    groups = conv.groups
    if groups == conv.in_channels:
        groups = in_channels  # depthwise stays depthwise
    elif groups > 1:
        groups = max(1, groups // narrow)
    while in_channels % groups or out_channels % groups:
        groups -= 1
    return nn.Conv2d(
        in_channels,
        out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride,  # type: ignore[arg-type]
        padding=tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)),  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=conv.bias is not None,
    )
