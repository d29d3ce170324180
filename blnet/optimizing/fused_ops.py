"""Fused ops for inference in the places of layers: stems, bottlenecks, ends of branches.

What is found is replaced in a network whose batch norms are folded. The ops run on a GPU (and in
Triton's interpreter); `blnet.kernels` has their equations.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from blnet.blocks import Bottleneck
from blnet.expand_merge import hooked
from blnet.fusing import fuse, fusions
from blnet.kernels import bottleneck, stem
from blnet.kernels.bottleneck_close import LARGEST_INNER
from blnet.kernels.stem_close import LARGEST_WIDTH
from blnet.optimizing.report import Change
from blnet.stem import BigLittlePool


class FusedPool(nn.Module):
    """A `BigLittlePool` whose strided convolutions, merge and fusion are one op.

    Args:
        pool: with its batch norms folded.
    """

    def __init__(self, pool: BigLittlePool) -> None:
        super().__init__()
        self.opening = pool.little[:3]
        self.little = pool.little[3]
        self.big = pool.big[0]
        self.expand = pool.expand[0]
        self.fusion = pool.fusion[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, H, W) to (N, width, H / 2, W / 2), sizes rounded up."""
        layers: Any = (self.expand, self.fusion, self.big, self.little)
        pairs = [part for layer in layers for part in (layer.weight, layer.bias)]
        return stem(x, self.opening(x), *pairs)


class FusedBottleneck(nn.Module):
    """A residual bottleneck as one op.

    Args:
        block: ours or torchvision's, with its batch norms folded.
        relu: whether it closes with a ReLU.
    """

    def __init__(self, block: nn.Module, relu: bool) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = block.conv1, block.conv2, block.conv3
        self.downsample = block.downsample
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C, H, W)."""
        shortcut = None if self.downsample is None else cast("nn.Module", self.downsample)(x)
        layers: Any = (self.conv1, self.conv2, self.conv3)
        pairs = [part for layer in layers for part in (layer.weight, layer.bias)]
        arguments: Any = (*pairs, shortcut, self.relu)
        return bottleneck(x, *arguments)


def with_fused_ops(network: nn.Module) -> tuple[nn.Module, list[Change]]:
    """Return a copy of a folded network with fused ops wherever they fit, and what was replaced.

    Args:
        network: in evaluation mode, its batch norms folded.
    """
    network = copy.deepcopy(network)
    changes = []
    for name, module in list(network.named_modules()):
        fused = _fused(module)
        if fused is not None and name:
            parent, _, leaf = name.rpartition(".")
            network.get_submodule(parent)._modules[leaf] = fused
            op = "stem" if isinstance(fused, FusedPool) else "bottleneck"
            changes.append(Change(name, type(module).__name__, f"the op {op}"))
    network = fuse(network)
    for place in fusions(network):
        now = "" if place.reason else "the op expand_merge"
        changes.append(Change(place.conv, "1x1 convolution and add", now, place.reason))
    return network.eval(), changes


def _fused(module: nn.Module) -> nn.Module | None:
    if type(module) is BigLittlePool:
        return FusedPool(module) if _is_plain_pool(module) else None
    relu = _closing_relu(module)
    if relu is None or not _is_narrow(module):
        return None
    return FusedBottleneck(module, relu)


def _closing_relu(block: nn.Module) -> bool | None:
    """Return whether a bottleneck closes with a ReLU; None for what is no bottleneck of a kind."""
    kind = type(block)
    if kind is Bottleneck and block.se is None:
        closing = bool(block.closing_activation)
    elif kind.__module__ == "torchvision.models.resnet" and kind.__name__ == "Bottleneck":
        closing = True
    else:
        return None
    return closing if _are_relus(block.relu) else None


def _is_plain_pool(pool: BigLittlePool) -> bool:
    expand = cast("nn.Conv2d", pool.expand[0])
    convolutions = (pool.little[0], pool.little[3], pool.big[0], pool.expand[0], pool.fusion[0])
    norms = (pool.little[1], pool.little[4], pool.big[1], pool.expand[1], pool.fusion[1])
    parts = (pool, pool.little, pool.big, pool.expand, pool.fusion, *norms)
    return (
        _all_plain(*convolutions)
        and _are_relus(pool.little[2], pool.little[5], pool.fusion[2])
        and not any(map(hooked, parts))
        and all(type(norm) is nn.Identity for norm in norms)
        and max(expand.in_channels, expand.out_channels) <= LARGEST_WIDTH
    )


def _is_narrow(block: nn.Module) -> bool:
    """Return whether a block is one that the op takes: narrow inside, not strided, not grouped."""
    convs = (block.conv1, block.conv2, block.conv3)
    norms = (block.bn1, block.bn2, block.bn3)
    if not _all_plain(*convs) or any(hooked(cast("nn.Module", part)) for part in (block, *norms)):
        return False
    if not all(type(norm) is nn.Identity for norm in norms):
        return False
    first, middle, last = (cast("nn.Conv2d", conv) for conv in convs)
    return (
        all(conv.groups == 1 and conv.stride == (1, 1) for conv in (first, middle, last))
        and (first.kernel_size, middle.kernel_size, last.kernel_size) == ((1, 1), (3, 3), (1, 1))
        and (middle.padding, middle.dilation) == ((1, 1), (1, 1))
        and middle.in_channels == middle.out_channels <= LARGEST_INNER
    )


def _are_relus(*layers: object) -> bool:
    return all(type(layer) is nn.ReLU and not hooked(layer) for layer in layers)


def _all_plain(*layers: object) -> bool:
    return all(
        type(layer) is nn.Conv2d
        and not hooked(layer)
        and isinstance(layer.weight, torch.Tensor)
        and layer.padding_mode == "zeros"
        for layer in layers
    )
