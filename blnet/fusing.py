"""Putting fused ops into networks: conv + BatchNorm + add + ReLU becomes one op, in any network.

    model = blnet.fuse(model)              # ours, converted, torchvision's, timm's or your own
    for fusion in blnet.fusions(model):
        print(fusion)

What is looked for, in the code of every module: a 1x1 convolution without bias, its BatchNorm and
the add (or the merge) that takes its result, with the ReLU after it if there is one. That is
conv3 + bn3 + shortcut of every bottleneck and the little branch's end in a Big-Little module. In
training such a layer then saves its input and its result for backward, and neither the
convolution's output nor BatchNorm's.

A module is fused in place of its code, not of its layers: it stays the same object with the same
parameters, buffers and keys in state_dict, and gets a class derived from its own with another
`forward`. Copies and pickles of it are fused again, and `unfuse` brings the original code back. A
pair whose layers are exchanged later, or get hooks, runs layer by layer from then on.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from blnet.expand_merge import conv_norm_merge, why_not_fusable
from blnet.kernels import merge
from blnet.tracing import trace_own_code

_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_IN_PLACE = (operator.iadd, operator.imul, operator.isub, operator.itruediv, F.relu_, torch.relu_)
# Outputs per input channel from which the batch statistics are cheaper to take from the input:
# its moments read K channels, where BatchNorm reads C. Every bottleneck has 2 or 4.
LEAST_WIDENING = 2


@dataclass(frozen=True)
class Fusion:
    """A place where a 1x1 convolution, its BatchNorm and an add were found.

    Attributes:
        module: name of the module whose code it is, "" for the network itself.
        conv: the convolution's name within the network.
        norm: the normalisation's.
        relu: whether a ReLU follows the add.
        merge: whether the other summand is upsampled.
        reason: why the place is left as it was; empty where it runs as one op.
    """

    module: str
    conv: str
    norm: str
    relu: bool
    merge: bool
    reason: str = ""

    def __str__(self) -> str:
        """Say it in one line."""
        parts = [self.conv, self.norm, "merge" if self.merge else "add", *["relu"] * self.relu]
        return " + ".join(parts) + (f": left as it is, {self.reason}" if self.reason else "")


class Fused:
    """What the class of every fused module is derived from, beside the module's own class."""

    fused_from: ClassVar[type[nn.Module]]
    fused_sites: ClassVar[tuple[Fusion, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the module as one of its own class, to be fused again: this class has no home."""
        return _fuse_module, (_plain(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the module as one of its own class, and fuse the copy."""
        return _fuse_module(copy.deepcopy(_plain(self), memo))


def fuse(model: nn.Module) -> nn.Module:
    """Return a copy of a network in which fused ops run wherever they can.

    On a GPU they are Triton kernels; where no kernel runs (a CPU, float64) the copy computes what
    the network computes. Parameter and buffer names do not change, so that checkpoints move both
    ways, and training, evaluation, autocast, torch.compile and DDP go on as before. Call it after
    a conversion.

    Args:
        model: any network; it is left as it is.

    Returns:
        The copy; of a network without such a place a plain copy. See :func:`fusions`.
    """
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        _fuse_module(module)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Return a copy of a network that :func:`fuse` made, with its original code."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Fused):
            object.__setattr__(module, "__class__", module.fused_from)
    return model


def fusions(model: nn.Module) -> list[Fusion]:
    """List the places in a network that run as one op and those that were found but cannot.

    Args:
        model: any network, fused or not; for one that is not, no place runs as one op yet.

    Returns:
        One :class:`Fusion` for each, in the order of the network's modules.
    """
    found = []
    for name, module in model.named_modules():
        sites = module.fused_sites if isinstance(module, Fused) else _look(module)[1]
        prefix = f"{name}." if name else ""
        for site in sites:
            reason = site.reason
            if not reason and not isinstance(module, Fused):
                reason = "the network is not fused; call blnet.fuse"
            names = (prefix + site.conv, prefix + site.norm)
            found.append(Fusion(name, *names, site.relu, site.merge, reason))
    return found


def _fuse_module(module: nn.Module) -> nn.Module:
    """Give a module a class with fused code, in place, if there is anything to fuse."""
    if isinstance(module, Fused):
        return module
    graph, sites = _look(module)
    if graph is None or all(site.reason for site in sites):
        return module
    own = type(module)
    members = {
        "forward": type(fx.GraphModule(module, graph)).forward,
        "fused_from": own,
        "fused_sites": tuple(sites),
        "__module__": own.__module__,
        "__doc__": own.__doc__,
    }
    module.__class__ = type(f"Fused{own.__name__}", (Fused, own), members)
    return module


def _plain(module: Any) -> nn.Module:
    """Return a module of the class before fusing that shares everything with this one."""
    own: type[nn.Module] = module.fused_from
    plain = own.__new__(own)
    plain.__dict__ = module.__dict__
    return plain


# Looking for places --------------------------------------------------------------------------


def _look(module: nn.Module) -> tuple[fx.Graph | None, list[Fusion]]:
    """Return a module's graph with every place that can be fused replaced, and the places."""
    if not _has_layers_to_fuse(module):
        return None, []
    graph = trace_own_code(module)
    if graph is None:
        return None, []
    sites = []
    for node in list(graph.nodes):
        site = _Site.at(module, node)
        if site is not None:
            sites.append(site.describe())
            if not site.reason:
                site.replace(graph)
    return graph, sites


def _has_layers_to_fuse(module: nn.Module) -> bool:
    """Return whether a 1x1 convolution is among what the module's own code may call."""
    if isinstance(module, nn.Sequential) or type(module).__module__.startswith("torch.nn."):
        return False
    return any(
        isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) for part in _own_layers(module)
    )


def _own_layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield child
        if isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            yield from _own_layers(child)


def _is_merge(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is merge


def _is_add(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or node.target not in _ADDS:
        return False
    nodes = [argument for argument in node.args if isinstance(argument, fx.Node)]
    return len(nodes) == 2 and not node.kwargs  # no constant, no alpha


def _is_relu(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in _RELUS


def _works_in_place(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))


@dataclass
class _Pair:
    """A convolution and its normalisation as a module's code calls them."""

    names: tuple[str, str]
    layers: tuple[nn.Conv2d, nn.Module]
    x: fx.Node
    nodes: tuple[fx.Node, ...]  # the last call first

    @staticmethod
    def ending_at(module: nn.Module, node: object) -> _Pair | None:
        """Return the pair whose result a node is: two calls, or one of a Sequential of the two."""
        called = _called(module, node)
        if called is None or not isinstance(node, fx.Node) or len(node.users) != 1:
            return None
        if isinstance(called, nn.Sequential):
            layers = list(called.named_children())
            if len(layers) != 2:
                return None
            (conv_name, conv), (norm_name, norm) = layers
            names = (f"{node.target}.{conv_name}", f"{node.target}.{norm_name}")
            nodes: tuple[fx.Node, ...] = (node,)
        else:
            before = node.args[0] if node.args else None
            maybe = _called(module, before)
            if maybe is None or not isinstance(before, fx.Node) or len(before.users) != 1:
                return None
            conv, norm = maybe, called
            names, nodes = (str(before.target), str(node.target)), (node, before)
        source = nodes[-1].args[0] if nodes[-1].args else None
        if not isinstance(conv, nn.Conv2d) or "norm" not in type(norm).__name__.lower():
            return None
        if not isinstance(source, fx.Node):
            return None
        return _Pair(names, (conv, norm), source, nodes)

    @property
    def widening(self) -> float:
        return self.layers[0].out_channels / self.layers[0].in_channels


def _called(module: nn.Module, node: object) -> nn.Module | None:
    """Return the module that a node calls with one argument, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    if len(node.args) != 1 or node.kwargs:
        return None
    return module.get_submodule(str(node.target))


@dataclass
class _Site:
    """A pair, the add that takes its result, and the ReLU after it if there is one."""

    module: nn.Module
    pair: _Pair
    big: fx.Node
    add: fx.Node
    relu: fx.Node | None

    @staticmethod
    def at(module: nn.Module, node: fx.Node) -> _Site | None:
        """Return the place whose add is this node, or None."""
        if not (_is_merge(node) or _is_add(node)):
            return None
        left, right = node.args[:2]
        # The little branch is merge's second argument; an add takes its summands in either order.
        candidates = [(right, left)] if _is_merge(node) else [(left, right), (right, left)]
        pairs = [(_Pair.ending_at(module, end), other) for end, other in candidates]
        found = [(pair, other) for pair, other in pairs if pair and isinstance(other, fx.Node)]
        # Where a block's shortcut is a convolution as well, both summands are pairs.
        found.sort(key=lambda item: (bool(_reason(module, item[0], node)), -item[0].widening))
        if not found or not _is_1x1(found[0][0]):
            return None
        pair, big = found[0]
        users = list(node.users)
        closes = not _is_merge(node) and len(users) == 1 and _is_relu(module, users[0])
        return _Site(module, pair, big, node, users[0] if closes else None)

    @property
    def reason(self) -> str:
        """Why it cannot run as one op; empty where it can."""
        return _reason(self.module, self.pair, self.add)

    def describe(self) -> Fusion:
        merges = _is_merge(self.add)
        return Fusion("", *self.pair.names, merges or self.relu is not None, merges, self.reason)

    def replace(self, graph: fx.Graph) -> None:
        """Put one call in the place of the ReLU, or of the add where none follows."""
        last, merges = self.relu or self.add, _is_merge(self.add)
        with graph.inserting_before(last):
            layers = [graph.get_attr(name) for name in self.pair.names]
            fused = graph.call_function(
                conv_norm_merge,
                (*layers, self.pair.x, self.big),
                {"relu": merges or self.relu is not None, "upsample": merges},
            )
        last.replace_all_uses_with(fused)
        for node in (self.relu, self.add, *self.pair.nodes):
            if node is not None:
                graph.erase_node(node)


def _is_1x1(pair: _Pair) -> bool:
    return pair.layers[0].kernel_size == (1, 1)


def _reason(module: nn.Module, pair: _Pair, add: fx.Node) -> str:
    reason = why_not_fusable(*pair.layers)
    if reason:
        return reason
    if pair.widening < LEAST_WIDENING:
        return f"it widens by {pair.widening:g}, which saves nothing below {LEAST_WIDENING}"
    if any(_works_in_place(module, user) for user in pair.x.users if user not in pair.nodes):
        return "another layer changes the convolution's input in place"
    return ""


__all__: list[str] = ["Fusion", "fuse", "fusions", "unfuse"]
