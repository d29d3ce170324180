"""From a graph of ATen operations to the steps of a native program: what all operations share.

`native_ops` has the operations. A step is pending until something needs its result, so that it can
take in what follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from blnet.kernels.native import Builder, Map, Output, Program


class UnsupportedError(ValueError):
    """The native engine cannot run this network; another engine may."""


@dataclass(eq=False)
class Pending:
    """A step that may still take in what follows it.

    Attributes:
        emit: adds the step, given residual, table and whether ReLU follows.
        conv: the convolution's weight and bias, which take a batch normalisation in; None for
            other steps, which take ReLU only.
    """

    emit: Callable[[Pending], Map]
    conv: tuple[Tensor, Tensor | None] | None = None
    residual: Map | None = None
    table: Tensor | None = None
    relu: bool = False
    made: Map | None = None


@dataclass(eq=False)
class Resized:
    """A map of which another one copies pixels: its indices (1, 1, H, W)."""

    source: Map
    indices: Tensor
    made: Map | None = None


Value = Map | Pending | Resized


@dataclass(eq=False)
class Lowering:
    """Goes through the graph once and adds the steps.

    Attributes:
        graph: of ATen operations without side effects.
        constants: what its placeholders hold, by name; the one that is not here is the input.
        shape: of the input.
        lowered: what makes a step of an operation on maps.
        heads: operations that PyTorch may do at the end.
        joins: of these, what may begin a step all the same: told an operation, says whether it did.
        values: nodes that are maps.
        known: nodes that do not depend on the input.
        head: nodes that PyTorch computes at the end, in `tail`.
        joined: nodes that are part of a step which began before them.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    shape: tuple[int, int, int, int]
    lowered: Mapping[Any, Callable[[Lowering, fx.Node], Value]]
    heads: Container[Any]
    joins: Mapping[Any, Callable[[Lowering, fx.Node], bool]]
    values: dict[fx.Node, Value] = field(default_factory=dict)
    known: dict[fx.Node, Any] = field(default_factory=dict)
    head: dict[fx.Node, fx.Node] = field(default_factory=dict)
    joined: set[fx.Node] = field(default_factory=set)

    def run(self) -> tuple[Program, fx.GraphModule]:
        """Return the program, and what takes its outputs to the network's."""
        self.builder = Builder(self.shape)
        self.tail = fx.Graph()
        self.outputs: list[Map | Output] = []
        self.root = nn.Module()
        for node in self.graph.nodes:
            self._know(node)
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in self.known and node not in self.joined:
                self._call(node)
            elif node.op == "output":
                self.tail.output(self._in_head(node.args[0][0]))
        self._order_inputs()
        program = self.builder.build(self.outputs)
        return program, fx.GraphModule(self.root, self.tail)

    def _know(self, node: fx.Node) -> None:
        """Compute a node that does not depend on the input."""
        if node.op == "placeholder":
            if node.name in self.constants:
                self.known[node] = self.constants[node.name].detach()
            else:
                self.values[node] = self.builder.input
        elif node.op == "call_function" and all(n in self.known for n in node.all_input_nodes):
            self.known[node] = node.target(*_mapped(node.args, self.known), **node.kwargs)  # type: ignore[operator]

    def _call(self, node: fx.Node) -> None:
        dynamic = [part for part in node.all_input_nodes if part not in self.known]
        if all(part in self.values for part in dynamic) and is_map(node):
            lower = self.lowered.get(node.target)
            if lower is None:
                raise unsupported(node)
            self.values[node] = lower(self, node)
        elif node.target in self.joins and self.joins[node.target](self, node):
            return
        elif node.target in self.heads:
            self.head[node] = self.tail.node_copy(node, self._in_head)
        else:
            raise unsupported(node)

    def _in_head(self, node: fx.Node) -> fx.Node:
        """Return what stands for a node among the operations that PyTorch does at the end."""
        if node not in self.head:
            if node in self.known:
                name = f"constant{len(self.head)}"
                self.root.register_buffer(name, self.known[node].clone())
                self.head[node] = self.tail.get_attr(name)
            else:
                self.head[node] = self.output(self.made(node))
        return self.head[node]

    def output(self, result: Map | Output) -> fx.Node:
        """Make a map an output of the program; return it as the last operations see it."""
        node = self.tail.placeholder(f"map{len(self.outputs)}")
        self.outputs.append(result)
        return node

    def _order_inputs(self) -> None:
        """Put the inputs of the last operations at their beginning, as a graph wants them."""
        first = next(iter(self.tail.nodes))
        for node in [n for n in self.tail.nodes if n.op == "placeholder" and n is not first]:
            first.prepend(node)
        order = sorted(
            (n for n in self.tail.nodes if n.op == "placeholder"), key=lambda n: int(n.name[3:])
        )
        for node in reversed(order):
            next(iter(self.tail.nodes)).prepend(node)

    # What a node's value is -----------------------------------------------------------------

    def made(self, node: fx.Node) -> Map:
        """Return a node's map; a pending step is added now."""
        value = self.values[node]
        if isinstance(value, Map):
            return value
        if value.made is None:
            if isinstance(value, Pending):
                value.made = value.emit(value)
            else:
                value.made = self.builder.resize(value.source, *table_of(value))
        return value.made

    def open(self, node: Any) -> Pending | None:
        """Return a node's step if it may still take in what follows: nothing else reads it."""
        value = self.values.get(node)
        if isinstance(value, Pending) and value.made is None and len(node.users) == 1:
            return None if value.relu else value
        return None

    def constant(self, node: Any) -> Any:
        """Return an argument that must not depend on the input."""
        if isinstance(node, fx.Node):
            if node not in self.known:
                raise UnsupportedError(
                    f"the native engine takes weights that are fixed, and {node.name} depends on "
                    "the input; take another engine"
                )
            return self.known[node]
        return node


def _mapped(args: Any, known: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(args, lambda node: known[node])


def calls_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the operations of a graph."""
    return [node for node in graph.nodes if node.op == "call_function"]


def label_of(node: fx.Node) -> str:
    """Return an operation's name as PyTorch's users know it."""
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def unsupported(node: fx.Node) -> UnsupportedError:
    """Return the error that names an operation."""
    shape = getattr(node.meta.get("val"), "shape", ())
    return UnsupportedError(
        f"the native engine has no {label_of(node)} (node {node.name}, shape {tuple(shape)}); "
        "take another engine"
    )


def is_map(node: fx.Node) -> bool:
    """Return whether a node's result is a map in float32."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        value = value[0]
    return isinstance(value, Tensor) and value.dim() == 4 and value.dtype == torch.float32


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's result, the first one where it has several."""
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, tuple | list) else value).shape)


def argument_of(node: fx.Node, index: int, default: Any) -> Any:
    """Return an operation's argument, given by place, by name or not at all."""
    name = node.target._schema.arguments[index].name  # type: ignore[union-attr]
    value = node.args[index] if index < len(node.args) else node.kwargs.get(name)
    return default if value is None else value


def pair_of(values: Any) -> tuple[int, int]:
    """Return a value for height and one for width from one or two."""
    values = list(values) if isinstance(values, list | tuple) else [values]
    return (values[0], values[-1])


def table_of(value: Resized) -> tuple[Tensor, tuple[int, int]]:
    """Return a resized map's table of pixels, as the builder takes it, and its size."""
    height, width = value.indices.shape[2:]
    return value.indices.flatten().to(torch.int32), (height, width)
