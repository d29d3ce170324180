"""Where a module's code can be fused: a 1x1 convolution, its BatchNorm, an add, perhaps a ReLU.

`blnet.fuse` asks `look`; the rules of what is found, and of what is left alone and why, are here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from blnet.expand_merge import fused_tail, hooked, why_not_fusable
from blnet.kernels import merge
from blnet.tracing import ADDS, takes_one_argument_each, trace_own_code

_ADDS_IN_PLACE = (operator.iadd, "add_")
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_IN_PLACE_OPERATORS = [name for name in dir(operator) if name.startswith("i")]
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


def look(module: nn.Module) -> tuple[fx.Graph | None, list[Fusion]]:
    """Return a module's graph with every place that can be fused replaced, and the places."""
    if not _has_layers_to_fuse(module) or not takes_one_argument_each(module):
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
    if node.op not in ("call_function", "call_method") or node.target not in ADDS:
        return False
    nodes = [argument for argument in node.args if isinstance(argument, fx.Node)]
    return len(nodes) == 2 and not node.kwargs  # no constant, no alpha


def _is_relu(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        return type(called) is nn.ReLU and not hooked(called)
    return node.op in ("call_function", "call_method") and node.target in _RELUS


def _works_in_place(module: nn.Module, node: fx.Node) -> bool:
    """Return whether a node may change a tensor that was there before it."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        if isinstance(called, nn.Sequential):  # what comes after its first layer is its own
            called = called[0] if len(called) else called
        return any(getattr(part, "inplace", False) for part in called.modules())
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    name = str(getattr(node.target, "__name__", node.target))
    if getattr(node.target, "__module__", "") == "_operator":
        return name == "setitem" or name in _IN_PLACE_OPERATORS
    return name.endswith("_") and not name.endswith("__")


def _is_torchs(module: nn.Module, node: fx.Node) -> bool:
    """Return whether a node calls a layer of torch.nn, whose code is known."""
    called = module.get_submodule(str(node.target))
    return type(called).__module__.startswith("torch.nn.")


@dataclass
class _Pair:
    """A convolution and its normalisation as a module's code calls them."""

    names: tuple[str, str]
    layers: tuple[nn.Conv2d, nn.Module]
    x: fx.Node
    nodes: tuple[fx.Node, ...]  # the last call first; one of a Sequential

    @staticmethod
    def ending_at(module: nn.Module, node: object) -> _Pair | None:
        """Return the pair whose result a node is: two calls, or one of a Sequential of the two."""
        called = _called(module, node)
        if called is None or not isinstance(node, fx.Node) or len(node.users) != 1:
            return None
        if type(called) is nn.Sequential:
            layers = list(called.named_children())
            if len(layers) != 2:
                return None
            (conv_name, conv), (norm_name, norm) = layers
            names = (f"{node.target}.{conv_name}", f"{node.target}.{norm_name}")
            nodes: tuple[fx.Node, ...] = (node,)
            if hooked(called):
                return None
        else:
            before = node.args[0] if node.args else None
            maybe = _called(module, before)
            if maybe is None or not isinstance(before, fx.Node) or len(before.users) != 1:
                return None
            conv, norm = maybe, called
            names, nodes = (str(before.target), str(node.target)), (node, before)
        source = nodes[-1].args[0] if nodes[-1].args else None
        folded = isinstance(norm, nn.Identity)  # into the convolution, by `blnet.optimize`
        if not isinstance(conv, nn.Conv2d) or not (folded or "norm" in type(norm).__name__.lower()):
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
        if left is right:
            return None
        # The little branch is merge's second argument; an add takes its summands in either order.
        candidates = [(right, left)] if _is_merge(node) else [(left, right), (right, left)]
        pairs = [(_Pair.ending_at(module, end), other) for end, other in candidates]
        if node.target in _ADDS_IN_PLACE and pairs[0][0]:
            pairs = pairs[:1]  # the other summand must be there as it was
        found = [(pair, other) for pair, other in pairs if pair and isinstance(other, fx.Node)]
        # Where a block's shortcut is a convolution as well, both summands are pairs.
        found.sort(key=lambda item: (bool(_reason(item[0])), -item[0].widening))
        if not found or not _is_1x1(found[0][0]):
            return None
        pair, big = found[0]
        users = list(node.users)
        closes = not _is_merge(node) and len(users) == 1 and _is_relu(module, users[0])
        return _Site(module, pair, big, node, users[0] if closes else None)

    @property
    def reason(self) -> str:
        """Why it cannot run as one op; empty where it can."""
        reason = _reason(self.pair)
        if reason:
            return reason
        if self.add.target in _ADDS_IN_PLACE and self.add.args[0] is self.big:
            return "the add changes its other summand in place"
        if any(self._may_change(node) for node in self._between()):
            return "something may be changed in place between the convolution and the add"
        return ""

    def _may_change(self, node: fx.Node) -> bool:
        """Return whether a node may change what the op will read after it."""
        if _works_in_place(self.module, node):
            return True
        read = {self.pair.x, self.big} & set(node.all_input_nodes)
        return bool(read) and node.op == "call_module" and not _is_torchs(self.module, node)

    def _between(self) -> Iterator[fx.Node]:
        """Yield the nodes after the convolution and up to the end that are not of the place."""
        own = (*self.pair.nodes, self.add, self.relu)
        node, last = self.pair.nodes[-1], self.relu or self.add
        while node is not last:
            node = node.next
            if node not in own:
                yield node

    def describe(self) -> Fusion:
        merges = _is_merge(self.add)
        return Fusion("", *self.pair.names, merges or self.relu is not None, merges, self.reason)

    def replace(self, graph: fx.Graph) -> None:
        """Put one call in the place of the ReLU, or of the add where none follows."""
        last, merges = self.relu or self.add, _is_merge(self.add)
        with graph.inserting_before(last):
            layers = tuple(graph.get_attr(str(n.target)) for n in reversed(self.pair.nodes))
            activation: fx.Node | bool = merges or self.relu is not None
            if self.relu is not None and self.relu.op == "call_module":
                activation = graph.get_attr(str(self.relu.target))
            arguments = (layers, self.pair.x, self.big, activation, merges)
            fused = graph.call_function(fused_tail, arguments)
        fused.meta["is_wrapped"] = True  # so that tracing a fused network keeps the call as it is
        last.replace_all_uses_with(fused)
        for node in (self.relu, self.add, *self.pair.nodes):
            if node is not None:
                graph.erase_node(node)


def _is_1x1(pair: _Pair) -> bool:
    return pair.layers[0].kernel_size == (1, 1)


def _reason(pair: _Pair) -> str:
    reason = why_not_fusable(*pair.layers)
    if reason:
        return reason
    if pair.widening < LEAST_WIDENING:
        return f"it widens by {pair.widening:g}, which saves nothing below {LEAST_WIDENING}"
    return ""
