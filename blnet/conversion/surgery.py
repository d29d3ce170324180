"""Small operations on a user's residual block: its shortcut, its layers, its closing activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from blnet.blocks import BlockSpec, is_strided
from blnet.conversion.discovery import trace_block

SHORTCUT_NAMES = (
    "downsample", "shortcut", "skip", "skip_connection", "proj", "projection", "identity",
    "residual_conv", "res_conv", "conv_shortcut", "down",
)  # fmt: skip
GATE_NAMES = ("se", "se_layer", "se_module", "attn", "attention", "squeeze_excitation", "ca")
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Softplus, nn.Tanh,
)  # fmt: skip
_ACTIVATION_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, F.relu_: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU,
    F.relu6: nn.ReLU6, F.leaky_relu: nn.LeakyReLU, F.elu: nn.ELU, F.gelu: nn.GELU,
    F.silu: nn.SiLU, F.mish: nn.Mish, F.hardswish: nn.Hardswish, torch.tanh: nn.Tanh,
}  # fmt: skip
_ACTIVATION_METHODS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu_": nn.ReLU, "tanh": nn.Tanh,
}  # fmt: skip


def shortcut_name(block: nn.Module) -> str | None:
    """Return the attribute that holds a block's shortcut, or None where it has none."""
    for name in SHORTCUT_NAMES:
        if isinstance(getattr(block, name, None), nn.Module):
            return name
    return None


def shortcut_of(block: nn.Module) -> nn.Module | None:
    """Return the module that a block's shortcut runs through, or None."""
    name = shortcut_name(block)
    return getattr(block, name) if name else None


def gate_of(block: nn.Module) -> nn.Module | None:
    """Return the module that scales a block's channels , such as SE, or None."""
    found = (getattr(block, name, None) for name in GATE_NAMES)
    return next((gate for gate in found if isinstance(gate, nn.Module)), None)


def layers(block: nn.Module, kinds: Any, part: str = "all") -> list[Any]:
    """Return a block's layers of some kinds in order of registration.

    Args:
        block: the block.
        kinds: a class or a tuple of classes.
        part: "main" is the chain of convolutions, without shortcut and gate; "shortcut" and "gate"
            are those; "all" is all three.
    """
    owners = {"shortcut": shortcut_of(block), "gate": gate_of(block)}
    inside = {name: set(owner.modules()) if owner else set() for name, owner in owners.items()}
    found = [m for m in block.modules() if isinstance(m, kinds)]
    if part == "all":
        return found
    if part == "main":
        return [m for m in found if not any(m in members for members in inside.values())]
    return [m for m in found if m in inside[part]]


def norm_like(norm: nn.Module | None, channels: int) -> nn.Module:
    """Return a fresh normalisation of the same kind and settings for another width."""
    if isinstance(norm, nn.GroupNorm):
        per_group = max(1, norm.num_channels // norm.num_groups)
        groups = max(1, channels // per_group)
        while channels % groups:
            groups -= 1
        return nn.GroupNorm(groups, channels, norm.eps, norm.affine)
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm | nn.InstanceNorm2d):
        kind = type(norm)
        try:
            return kind(channels, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)  # type: ignore[arg-type]  # momentum None is a cumulative average
        except TypeError:
            return nn.BatchNorm2d(channels, norm.eps, norm.momentum, norm.affine)
    return nn.BatchNorm2d(channels)


def pooled_shortcut(spec: BlockSpec, norm: nn.Module | None) -> nn.Sequential | None:
    """Return the paper's shortcut: 3x3 average pool where it strides, 1x1 conv where it widens."""
    parts: list[nn.Module] = []
    if is_strided(spec.stride):
        parts.append(nn.AvgPool2d(3, stride=spec.stride, padding=1))
    if spec.in_channels != spec.out_channels:
        parts.append(nn.Conv2d(spec.in_channels, spec.out_channels, 1, bias=False))
        parts.append(norm_like(norm, spec.out_channels))
    return nn.Sequential(*parts) if parts else None


def closing_activation(block: nn.Module) -> nn.Module | None:
    """Return the activation that a block ends with, or None where it ends with the add."""
    found = _closing_node(block)
    return found[1] if found else None


def without_closing_activation(block: nn.Module) -> nn.Module | None:
    """Return the block with its closing activation left out; its layers keep their names.

    Returns:
        A module that shares the block's layers, or None where no closing activation was found.
    """
    found = _closing_node(block)
    if found is None:
        return None
    node = found[0]
    graph = node.graph
    node.replace_all_uses_with(_first_input(node))
    graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(block, graph, class_name=f"Open{type(block).__name__}")


def _first_input(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _closing_node(block: nn.Module) -> tuple[fx.Node, nn.Module] | None:
    graph = trace_block(block)
    if graph is None:
        return None
    output = next(node for node in graph.nodes if node.op == "output")
    inputs = output.all_input_nodes
    if len(inputs) != 1:
        return None
    node, skipped = inputs[0], (nn.Identity, nn.Dropout)
    # An identity after the activation (timm leaves some) does not change what closes the block.
    while node.op == "call_module" and isinstance(block.get_submodule(str(node.target)), skipped):
        node = _first_input(node)
    activation = _activation_of(block, node)
    if activation is None or len(node.all_input_nodes) != 1:
        return None
    return node, activation


def _activation_of(block: nn.Module, node: fx.Node) -> nn.Module | None:
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        return module if isinstance(module, ACTIVATIONS) else None
    if node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS:
        return _ACTIVATION_FUNCTIONS[node.target]()
    if node.op == "call_method" and node.target in _ACTIVATION_METHODS:
        return _ACTIVATION_METHODS[str(node.target)]()
    return None


__all__ = [
    "closing_activation", "gate_of", "layers", "norm_like", "pooled_shortcut", "shortcut_name",
    "shortcut_of", "without_closing_activation",
]  # fmt: skip
