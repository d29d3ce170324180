"""The Big-Little module: branches at several resolutions, merged, then fused.

Branch i = 0 (highest resolution) ... K-1 (the big one) runs at scale 1 / 2**i, at width
C / alpha**(K-1-i), with max(1, floor(L / beta**(K-1-i)) - 1) blocks, the big one with L - 1.
The merge runs from the big branch upward, one upsampling and one add at a time. K = 2 is the
module of the paper (Chen et al., "Big-Little Net", ICLR 2019); K = 1 is a plain stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from blnet.blocks import BlockFactory, BlockSpec, Stride, conv_norm
from blnet.checks import check_count
from blnet.kernels import merge
from blnet.kernels.reference import upsample_nearest

torch.fx.wrap("merge")
torch.fx.wrap("upsample_nearest")


def branch_length(length: int, beta: int, divisions: int) -> int:
    """Return the number of blocks of a branch.

    Args:
        length: blocks L of the stage that the module replaces.
        beta: how many times shorter each smaller branch is.
        divisions: K-1-i for branch i, 0 for the big branch.
    """
    shortened: int = length // beta**divisions
    return max(1, shortened - 1)


class BigLittleModule(nn.Module):
    """Branches at several resolutions, merged from the big one upward, then fused.

    out = fusion(relu(upsample(big(x)) + expand(little(x)))), for two branches.

    Args:
        branches: the branches, highest resolution first, the big one last. Branch i is expected to
            shrink its input by 2**i.
        expands: what widens each branch but the big one to the big one's width, in the same order.
        fusion: the block after the merge; None for a plain stage.
        activation: the non-linearity of the merge. ReLU runs as one fused op.

    Raises:
        ValueError: if there is no branch, or the number of expands is not one less.
    """

    def __init__(
        self,
        branches: Iterable[nn.Module],
        expands: Iterable[nn.Module] = (),
        fusion: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.expands = nn.ModuleList(expands)
        self.fusion = fusion
        self.activation = None if isinstance(activation, nn.ReLU) else activation
        if len(self.branches) != len(self.expands) + 1:
            raise ValueError(
                f"expands must be one fewer than branches, got {len(self.expands)} expands for "
                f"{len(self.branches)} branches; the big branch needs none"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C, H / s, W / s), s the stride of the fusion block."""
        out = self.merged(x)
        return out if self.fusion is None else cast("Tensor", self.fusion(out))

    def merged(self, x: Tensor) -> Tensor:
        """Return the branches merged (N, C, H, W), which is what the fusion block takes."""
        out: Tensor = self.branches[-1](x)
        for branch, expand in zip(
            reversed(self.branches[:-1]), reversed(self.expands), strict=True
        ):
            out = self._merge(out, expand(branch(x)))
        return out

    def _merge(self, big: Tensor, little: Tensor) -> Tensor:
        if self.activation is None:
            return merge(big, little)
        upsampled = upsample_nearest(big, (little.shape[2], little.shape[3]))
        return cast("Tensor", self.activation(upsampled + little))


def plain_stage(
    block: BlockFactory, in_channels: int, out_channels: int, length: int, stride: Stride
) -> nn.Sequential:
    """Return a stage of residual blocks, the first of which strides."""
    first = block(BlockSpec(in_channels, out_channels, stride))
    rest = (block(BlockSpec(out_channels, out_channels, position=i)) for i in range(1, length))
    return nn.Sequential(first, *rest)


def make_branch(
    block: BlockFactory,
    in_channels: int,
    out_channels: int,
    length: int,
    halvings: int = 0,
    narrow: int = 1,
    closing_activation: bool = True,
) -> nn.Sequential:
    """Return one branch: blocks, of which the first ones halve the map.

    Args:
        block: makes the blocks.
        in_channels: channels of the module's input.
        out_channels: channels of this branch.
        length: number of blocks.
        halvings: how often the map is halved. A branch with fewer blocks than that begins with
            average pools (3x3, stride 2, padding 1) for the rest.
        narrow: see `BlockSpec`.
        closing_activation: whether the last block closes with its activation. A branch of one
            block always does: so do the published networks.
    """
    strided = min(halvings, length)
    layers: list[nn.Module] = [
        nn.AvgPool2d(3, stride=2, padding=1) for _ in range(halvings - strided)
    ]
    for index in range(length):
        layers.append(
            block(
                BlockSpec(
                    in_channels if index == 0 else out_channels,
                    out_channels,
                    stride=2 if index < strided else 1,
                    narrow=narrow,
                    closing_activation=closing_activation or length == 1 or index < length - 1,
                    position=index,
                )
            )
        )
    return nn.Sequential(*layers)


def make_expand(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 1x1 convolution and its batch normalisation."""
    return nn.Sequential(*conv_norm(in_channels, out_channels, 1))


def make_module(
    block: BlockFactory,
    in_channels: int,
    out_channels: int,
    length: int,
    *,
    alpha: int,
    beta: int,
    branches: int = 2,
    stride: Stride = 1,
    activation: nn.Module | None = None,
    expand: Callable[[int, int], nn.Module] = make_expand,
) -> BigLittleModule:
    """Return the Big-Little module that replaces a stage of residual blocks.

    Args:
        block: makes the blocks.
        in_channels: channels of the stage's input.
        out_channels: channels C of the stage.
        length: number L of blocks of the stage.
        alpha: how many times narrower each smaller branch is.
        beta: how many times shorter each smaller branch is.
        branches: number K of branches; 1 gives the plain stage.
        stride: stride of the fusion block (of the first block where there is one branch).
        activation: see `BigLittleModule`.
        expand: makes what widens a branch, from its width and the stage's.

    Raises:
        ValueError: if alpha, beta, branches or length is below 1, or the narrowest branch would
            not have a whole number of channels.
    """
    check_branching(alpha, beta, branches)
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}; a stage has a block or more")
    if branches == 1:
        stage = plain_stage(block, in_channels, out_channels, length, stride)
        return BigLittleModule([stage], activation=activation)
    made, expands = [], []
    for index in range(branches):
        divisions = branches - 1 - index
        width = divide_width(out_channels, alpha, divisions)
        made.append(
            make_branch(
                block,
                in_channels,
                width,
                branch_length(length, beta, divisions),
                halvings=index,
                narrow=alpha**divisions,
                closing_activation=divisions > 0,
            )
        )
        if divisions:
            expands.append(expand(width, out_channels))
    fusion = block(BlockSpec(out_channels, out_channels, stride, position=-1))
    return BigLittleModule(made, expands, nn.Sequential(fusion), activation)


def make_stages(
    block: BlockFactory,
    in_channels: int,
    depths: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[Stride],
    *,
    alpha: int,
    beta: int,
    branches: int = 2,
) -> list[nn.Module]:
    """Return the stages of a network: Big-Little modules, and a plain last stage.

    A plain network's stages stride in their first block. A module strides in its fusion block, on
    the way to the next stage, and the one before the last keeps its size: the last stage is plain
    and strides itself.

    Args:
        block: makes the blocks.
        in_channels: channels of the first stage's input.
        depths: blocks L of each stage.
        widths: channels C of each stage.
        strides: stride from the stage before to each stage; of the first, that of its own.
        alpha: how many times narrower each smaller branch is.
        beta: how many times shorter each smaller branch is.
        branches: number K of branches; 1 gives the plain network.
    """
    stages: list[nn.Module] = []
    last = len(depths) - 1
    for index, (length, width) in enumerate(zip(depths, widths, strict=True)):
        if branches == 1 or index == last:
            stages.append(plain_stage(block, in_channels, width, length, strides[index]))
        else:
            stride = strides[index + 1] if index < last - 1 else 1
            stages.append(
                make_module(
                    block,
                    in_channels,
                    width,
                    length,
                    alpha=alpha,
                    beta=beta,
                    branches=branches,
                    stride=stride,
                )
            )
        in_channels = width
    return stages


def check_branching(alpha: int, beta: int, branches: int) -> None:
    """Raise a ValueError unless alpha, beta and branches are whole numbers of at least 1."""
    for name, value in (("alpha", alpha), ("beta", beta), ("branches", branches)):
        check_count(name, value, 1)


def divide_width(width: int, alpha: int, divisions: int) -> int:
    """Return width / alpha**divisions, or raise a ValueError where that is not a whole number."""
    divisor: int = alpha**divisions
    if width % divisor:
        raise ValueError(
            f"alpha {alpha} with {divisions + 1} branches divides a width of {width} channels by "
            f"{divisor}, which leaves a remainder; choose an alpha that divides the width"
        )
    return width // divisor
