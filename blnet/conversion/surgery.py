"""Small operations on a user's residual block: its layers, its shortcut, its closing activation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from blnet.blocks import BlockSpec, is_strided
from blnet.meta import meta_twin, run_on_meta
from blnet.tracing import ADDS, trace_own_code

SHORTCUT_NAMES = (
    "downsample", "shortcut", "skip", "skip_connection", "proj", "projection", "identity",
    "residual_conv", "res_conv", "conv_shortcut", "down", "bypass",
)  # fmt: skip
GATE_NAMES = ("se", "se_layer", "se_module", "attn", "attention", "squeeze_excitation", "ca")
_ACTIVATION_HOMES = ("torch.nn.modules.activation", "timm.layers.activations")
_ACTIVATION_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, F.relu_: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU,
    F.relu6: nn.ReLU6, F.leaky_relu: nn.LeakyReLU, F.elu: nn.ELU, F.gelu: nn.GELU,
    F.silu: nn.SiLU, F.mish: nn.Mish, F.hardswish: nn.Hardswish, torch.tanh: nn.Tanh,
    "relu": nn.ReLU, "relu_": nn.ReLU, "tanh": nn.Tanh,
}  # fmt: skip

Layer = Callable[[int], nn.Module]  # makes a layer for so many channels
Projection = Callable[[int, int], list[nn.Module]]  # makes the layers from one width to another


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises, by its class's name: BatchNorm2d, FrozenBatchNorm2d."""
    mixed = any(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules())
    return "norm" in type(module).__name__.lower() and not mixed


def is_activation(module: nn.Module) -> bool:
    """Return whether a module is an activation of torch's or timm's."""
    return type(module).__module__ in _ACTIVATION_HOMES


def shortcut_name(block: nn.Module) -> str | None:
    """Return the attribute for a block's shortcut (None where it has none to put one in).

    An attribute that is None counts: the block's code then asks for it. One of another name than
    `SHORTCUT_NAMES` is known by what the block's code does with it.
    """
    named = (name for name in SHORTCUT_NAMES if hasattr(block, name))
    found = next((n for n in named if isinstance(getattr(block, n), nn.Module | None)), None)
    return found or _unnamed_shortcut(block)


def _unnamed_shortcut(block: nn.Module) -> str | None:
    """Return the attribute of another name that a block's code uses as its shortcut, or None.

    It is the only layer of its kind that runs on the block's input and whose result is added, or,
    where the input itself is added, the only attribute that is None.
    """
    graph = trace_own_code(block)
    if graph is None:
        return None
    taken = next((node for node in graph.nodes if node.op == "placeholder"), None)
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    terms = [term for add in calls if add.target in ADDS for term in add.all_input_nodes]
    if taken in terms:
        own = {**vars(block), **block._modules}
        names = {n for n, part in own.items() if part is None and n[0] != "_"} - {*GATE_NAMES}
    else:
        called = [term for term in terms if term.op == "call_module" and term.args == (taken,)]
        names = {str(n.target) for n in called if _may_be_shortcut(block, str(n.target))}
    return names.pop() if len(names) == 1 else None


def _may_be_shortcut(block: nn.Module, name: str) -> bool:
    """Return whether a layer of a block is no more than a convolution with what goes with one."""
    parts = [*block.get_submodule(name).modules()]
    convs = [part for part in parts if isinstance(part, nn.Conv2d)]
    return "." not in name and len(convs) <= 1 and not any(map(is_activation, parts))


def shortcut_of(block: nn.Module) -> nn.Module | None:
    """Return the module that a block's shortcut runs through, or None."""
    name = shortcut_name(block)
    return getattr(block, name) if name else None


def gate_of(block: nn.Module) -> nn.Module | None:
    """Return the module that scales a block's channels, such as squeeze-excitation, or None."""
    found = (getattr(block, name, None) for name in GATE_NAMES)
    return next((gate for gate in found if isinstance(gate, nn.Module)), None)


def chain(block: nn.Module) -> dict[str, nn.Module]:
    """Return a block's leaf layers by name, without those of its shortcut and its gate."""
    aside = {
        part
        for owner in (shortcut_of(block), gate_of(block))
        if owner is not None
        for part in owner.modules()
    }
    return {
        name: part
        for name, part in block.named_modules()
        if part not in aside and (is_norm(part) or not any(True for _ in part.children()))
    }


def convolutions(block: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions of a block's chain, in order of registration."""
    return [layer for layer in chain(block).values() if isinstance(layer, nn.Conv2d)]


def last_norm(block: nn.Module) -> nn.Module | None:
    """Return the last normalisation of a block's chain in order of registration, or None."""
    norms = [layer for layer in chain(block).values() if is_norm(layer)]
    return norms[-1] if norms else None


def resize_norm(norm: nn.Module, channels: int) -> None:
    """Give a normalisation another number of channels, in place."""
    for name in ("num_features", "num_channels"):
        if hasattr(norm, name):
            setattr(norm, name, channels)
    if hasattr(norm, "normalized_shape"):
        norm.normalized_shape = (channels,)  # type: ignore[assignment]
    if isinstance(norm, nn.GroupNorm):
        norm.num_groups = math.gcd(norm.num_groups, channels)
    for store in (norm._parameters, norm._buffers):
        for name, value in store.items():
            if value is not None and value.ndim == 1 and len(value) != channels:
                fill = 1.0 if name in ("weight", "running_var") else 0.0
                made: Tensor = value.new_full((channels,), fill)
                if isinstance(value, nn.Parameter):
                    made = nn.Parameter(made, value.requires_grad)
                store[name] = made  # type: ignore[assignment]


def norm_like(norm: nn.Module | None) -> Layer | None:
    """Return what makes fresh normalisations of the same kind, or None where there is none.

    An activation inside the normalisation (timm has such) is left out: what is made stands in
    front of an add.
    """
    if norm is None:
        return None

    def make(channels: int) -> nn.Module:
        made = copy.deepcopy(norm)
        resize_norm(made, channels)
        if isinstance(getattr(made, "act", None), nn.Module):
            made.act = nn.Identity()
        if callable(getattr(made, "reset_parameters", None)):
            made.reset_parameters()  # type: ignore[operator]
        return made

    return make


def projection(norm: Layer | None, bias: bool) -> Projection:
    """Return what makes a 1x1 convolution, with a bias or not, and its normalisation if any."""

    def make(in_channels: int, out_channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        return [conv] if norm is None else [conv, norm(out_channels)]

    return make


def shortcut_projection(block: nn.Module, norm: Layer | None) -> Projection:
    """Return what makes projections like that of a block's shortcut.

    Where the block's shortcut has no convolution to follow, it is one with `norm`, or with a bias
    where that is None.
    """
    parts = [] if shortcut_of(block) is None else list(shortcut_of(block).modules())  # type: ignore[union-attr]
    convs = [part for part in parts if isinstance(part, nn.Conv2d)]
    if not convs:
        return projection(norm, bias=norm is None)
    norms = [part for part in parts if is_norm(part)]
    return projection(norm_like(norms[-1]) if norms else None, convs[-1].bias is not None)


def pooled_shortcut(spec: BlockSpec, project: Projection) -> nn.Sequential | None:
    """Return the paper's shortcut: 3x3 average pool where it strides, 1x1 conv where it widens."""
    parts: list[nn.Module] = []
    if is_strided(spec.stride):
        parts.append(nn.AvgPool2d(3, stride=spec.stride, padding=1))
    if spec.in_channels != spec.out_channels:
        parts.extend(project(spec.in_channels, spec.out_channels))
    return nn.Sequential(*parts) if parts else None


def execution_order(block: nn.Module, in_channels: int) -> list[str] | None:
    """Return the names of a block's modules in the order they ran; None where it does not run."""
    twin = meta_twin(block)
    order: list[str] = []
    for name, part in twin.named_modules():
        part.register_forward_hook(lambda *_, name=name: order.append(name))
    try:
        run_on_meta(twin, (2, in_channels, 24, 24))
    except Exception:  # a user's block may raise anything
        return None
    return order


def closing_activation(block: nn.Module, in_channels: int) -> tuple[nn.Module | None, bool]:
    """Return the activation that a block ends with, and whether that is known for sure.

    (None, True) is a block that ends with its add, (None, False) one that cannot be read.
    """
    ending = _ending_module(block, in_channels)
    if ending is not None:
        return block.get_submodule(ending[0]), True
    graph = trace_own_code(block)
    if graph is None:
        return None, False
    found = _closing_node(block, graph)
    return (found[1] if found else None), True


def without_closing_activation(block: nn.Module, in_channels: int) -> nn.Module | None:
    """Return the block with its closing activation left out; its layers keep their names.

    Returns:
        The block itself with an activation of its own exchanged for an identity, or a module that
        shares its layers; None where no closing activation was found or it cannot be left out.
    """
    ending = _ending_module(block, in_channels)
    if ending is not None and ending[1] == 1:
        block.set_submodule(ending[0], nn.Identity())
        return block
    graph = trace_own_code(block)
    found = _closing_node(block, graph) if graph is not None else None
    if graph is None or found is None:
        return None
    node = found[0]
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(block, graph, class_name=f"Open{type(block).__name__}")


def _ending_module(block: nn.Module, in_channels: int) -> tuple[str, int] | None:
    """Return the activation module whose result is the block's, and how often it runs."""
    twin = meta_twin(block)
    runs: dict[str, int] = {}
    last: dict[str, Any] = {}

    def record(name: str, result: Any) -> None:
        runs[name] = runs.get(name, 0) + 1
        last[name] = result

    for name, part in twin.named_modules():
        # An identity or a dropout after the activation, in evaluation, gives what it is given.
        if is_activation(part) or is_norm(part):
            part.register_forward_hook(lambda m, i, o, name=name: record(name, o))
    try:
        result = run_on_meta(twin, (2, in_channels, 24, 24))
    except Exception:  # a user's block may raise anything
        return None
    found = [n for n in last if last[n] is result and is_activation(twin.get_submodule(n))]
    # An in-place activation returns what it is given: the one that ran last wrote it last.
    return (found[-1], runs[found[-1]]) if found else None


def _closing_node(block: nn.Module, graph: fx.Graph) -> tuple[fx.Node, nn.Module] | None:
    output = next(node for node in graph.nodes if node.op == "output")
    if len(output.all_input_nodes) != 1:
        return None
    node = output.all_input_nodes[0]
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        return (node, module) if is_activation(module) else None
    if node.op in ("call_function", "call_method") and node.target in _ACTIVATION_FUNCTIONS:
        return node, _ACTIVATION_FUNCTIONS[node.target]()
    return None
