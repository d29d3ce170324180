"""Folding batch normalisation into the convolutions before it, for inference.

In evaluation BatchNorm is y = gamma (x - mean) / sqrt(var + eps) + beta, channel by channel: a
convolution that alone feeds it takes the factor into its weight and the rest into its bias. Layers
are exchanged, code is not: the normalisation becomes an identity, so that any network's own forward
goes on as it is.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from blnet.expand_merge import hooked
from blnet.optimizing.report import Change
from blnet.tracing import called_alone, trace_in_evaluation

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# What computes the equation above and nothing else; a class derived from those may do more.
_FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
_TIMMS = ("BatchNormAct2d", "FrozenBatchNormAct2d")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def fold_batch_norms(model: nn.Module, checked: bool = False) -> list[Change]:
    """Fold every BatchNorm that can be into the convolution before it, in place.

    Args:
        model: a network in evaluation mode.
        checked: whether the result is compared with the original's afterwards. Then the layers of
            a Sequential are also folded where the code that calls it cannot be traced.

    Returns:
        One change for each BatchNorm, in the order of the network's modules: what it was folded
        into, or why it was left as it is.
    """
    places = Counter(id(part) for _, part in model.named_modules(remove_duplicate=False))
    names = {id(part): name for name, part in model.named_modules()}
    partners, apart = _partners(model, checked)
    changes = []
    for name, norm in list(model.named_modules()):
        if not _is_norm(norm):
            continue
        conv = partners.get(id(norm))
        reason = _why_not(conv, norm, places) or apart.get(id(norm), "")
        if conv is not None and not reason:
            _fold(conv, norm)
            _exchange(model, name, _rest(norm))
            changes.append(Change(name, type(norm).__name__, f"folded into {names[id(conv)]}"))
        else:
            changes.append(Change(name, type(norm).__name__, reason=reason))
    return changes


def _partners(model: nn.Module, checked: bool) -> tuple[dict[int, nn.Module], dict[int, str]]:
    """Return each normalisation's convolution, and why code may call one of the two by itself."""
    partners: dict[int, nn.Module] = {}
    apart: dict[int, str] = {}
    users = _users(model)
    for name, module in model.named_modules():
        pairs = {id(norm): conv for conv, norm in _pairs(module) if _is_norm(norm)}
        whole = _why_not_whole(model, name, checked) if pairs and _runs_in_turn(module) else ""
        for norm, conv in pairs.items():
            others = [user for user in users[norm] + users[id(conv)] if user is not module]
            alone = f"the code of {type(others[0]).__name__} calls a layer of it" if others else ""
            apart[norm] = whole or alone
        partners |= pairs
    return partners, apart


def _is_norm(module: nn.Module) -> bool:
    # Of other libraries', which are left and named, nobody knows what they compute.
    frozen = type(module).__name__ == "FrozenBatchNorm2d"
    return isinstance(module, _NORMS) or frozen or _is_timms(module)


def _is_torchvisions(norm: nn.Module) -> bool:
    """Return whether a layer is torchvision's BatchNorm of fixed numbers."""
    kind = type(norm)
    return kind.__module__ == "torchvision.ops.misc" and kind.__name__ == "FrozenBatchNorm2d"


def _is_timms(norm: nn.Module) -> bool:
    """Return whether a layer is timm's BatchNorm that goes on with its own dropout and ReLU."""
    kind = type(norm)
    return kind.__module__ == "timm.layers.norm_act" and kind.__name__ in _TIMMS


def _rest(norm: nn.Module) -> nn.Module:
    """Return what is left to do of a normalisation that was folded."""
    if not _is_timms(norm):
        return nn.Identity().eval()
    parts = OrderedDict(drop=norm.get_submodule("drop"), act=norm.get_submodule("act"))
    rest = nn.Sequential(parts)
    rest.training = False  # its layers keep the mode they are in
    return rest


def _runs_in_turn(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):  # its class has no code that could be looked at
        return False
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def _users(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return for each layer the modules whose code calls it or reads its tensors.

    Those are missing whose code cannot be traced, and those that have no layers but their own.
    """
    users: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        deep = any(any(child.children()) for child in module.children())
        graph = trace_in_evaluation(module) if deep and not _runs_in_turn(module) else None
        for node in graph.nodes if graph else ():
            if node.op == "call_module":
                users[id(module.get_submodule(str(node.target)))].append(module)
            elif node.op == "get_attr":
                holder = str(node.target).rpartition(".")[0]
                users[id(module.get_submodule(holder))].append(module)
    return users


def _why_not_whole(model: nn.Module, name: str, checked: bool) -> str:
    """Say why a Sequential's layers may be called one by one; an empty text where they are not.

    What is between two of its layers is nobody's where the code of the module that holds it, within
    other Sequentials or in a list, calls the whole.
    """
    parts = name.split(".") if name else []
    for depth in range(len(parts) - 1, -1, -1):
        holder = model.get_submodule(".".join(parts[:depth]))
        if not _runs_in_turn(holder) and type(holder) not in _CONTAINERS:
            break
    else:
        return ""  # the network is called itself
    graph = trace_in_evaluation(holder)
    if graph is None:
        told = f"the code of {type(holder).__name__}, which calls it, could not be traced"
        return "" if checked else f"{told}; with example_input it is folded and checked"
    reads = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    place = parts[depth:]
    if any(target.startswith(".".join(place) + ".") for target in reads):
        return "the layers of its Sequential are called one by one"
    if not any(".".join(place[:end]) in reads for end in range(1, len(place) + 1)):
        return "nothing was seen to call its Sequential"
    return ""


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the layers of a module's own code of which one's result goes to the other alone."""
    if _runs_in_turn(module):
        layers = list(module.children())
        yield from pairwise(layers)
    elif any(_is_norm(child) for child in module.children()):
        graph = trace_in_evaluation(module)
        if graph is not None:
            yield from called_alone(module, graph)


def _why_not(conv: nn.Module | None, norm: nn.Module, places: Counter[int]) -> str:
    """Say why a normalisation cannot be folded; an empty text where it can."""
    plain = type(norm).forward in _FORWARDS or _is_torchvisions(norm)
    if not plain and not _is_timms(norm):
        return "its class has a forward of its own"
    if conv is None or type(conv) not in _CONVOLUTIONS:
        return "no convolution alone was seen to feed it"
    if not isinstance(conv._parameters.get("weight"), nn.Parameter):
        return "the convolution's weight is computed anew in every call"
    if places[id(conv)] > 1 or places[id(norm)] > 1:
        return "a layer stands in several places"
    # What comes before a convolution may be watched; what goes between the two may not.
    if conv._forward_hooks or "forward" in vars(conv) or hooked(norm):
        return "a layer has hooks or a forward of its own"
    if getattr(norm, "running_mean", None) is None or norm.training:
        return "it uses the statistics of the batch"
    return ""


@torch.no_grad()
def _fold(conv: nn.Module, norm: nn.Module) -> None:
    """Fold in float64 and round once."""
    weight = conv.get_parameter("weight")
    double = {
        name: None if value is None else value.double()
        for name, value in (
            ("bias", conv.bias),
            ("mean", norm.running_mean),
            ("var", norm.running_var),
            ("gamma", norm.weight),
            ("beta", norm.bias),
        )
        if value is None or isinstance(value, torch.Tensor)
    }
    folded, bias = fuse_conv_bn_weights(
        weight.double(),
        double["bias"],
        double["mean"],
        double["var"],
        float(norm.eps),  # type: ignore[arg-type]
        double["gamma"],
        double["beta"],
    )
    conv.weight = nn.Parameter(folded.to(weight.dtype), weight.requires_grad)
    conv.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)


def _exchange(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = layer
