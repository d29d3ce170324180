"""Finding the parts of a ResNet-like network: stem, stages of residual blocks, head.

Nothing is assumed of attribute names. The network is run once on the meta device; the shapes that
go into and out of each module tell what is a block, where a stage begins and what it strides by.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from blnet.kernels import merge
from blnet.tracing import evaluating, run_on_meta

CONVERTIBLE = (
    "a convertible network is a stem, two or more stages of residual blocks (each stage in an "
    "nn.Sequential or nn.ModuleList, each block with at least two Conv2d and a residual add) and "
    "a head"
)
# Sizes to try where none is given: ImageNet's first, then those of networks with a fixed head.
_TRIED_SIZES = (224, 32, 64, 96, 128, 256, 299)
_ADDS = {operator.add, operator.iadd, torch.add, merge}
_RUN_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class Call:
    """One run of one module: its path and the shapes of its input and output."""

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """Residual blocks of one width.

    Attributes:
        name: path of the container, with the range of blocks where it holds several stages.
        container: path of the nn.Sequential or nn.ModuleList.
        blocks: the blocks' calls, in order.
    """

    name: str
    container: str
    blocks: tuple[Call, ...]

    @property
    def in_channels(self) -> int:
        """Channels of the stage's input."""
        return self.blocks[0].input_shape[1]

    @property
    def out_channels(self) -> int:
        """Channels of the stage's output."""
        return self.blocks[0].output_shape[1]

    @property
    def stride(self) -> tuple[int, int]:
        """Step of the stage in height and width."""
        return call_stride(self.blocks[0])


@dataclass(frozen=True)
class Anatomy:
    """What a network is made of.

    Attributes:
        input_size: shape of the sample input that told the shapes.
        stem: calls of the leaf modules before the first stage, in order.
        stages: the stages, in order.
        head: paths of the leaf modules after the last stage.
    """

    input_size: tuple[int, ...]
    stem: tuple[Call, ...]
    stages: tuple[Stage, ...]
    head: tuple[str, ...]


def call_stride(call: Call) -> tuple[int, int]:
    """Return by how much a module shrinks its map, in height and width."""
    steps = (
        round(before / after)
        for before, after in zip(call.input_shape[2:], call.output_shape[2:], strict=True)
    )
    height, width = steps
    return height, width


def find_anatomy(model: nn.Module, input_size: Sequence[int] | None = None) -> Anatomy:
    """Return the network's stem, stages and head.

    Args:
        model: the network; it is not changed.
        input_size: shape of a sample input, batch included; None tries the usual image sizes with
            the channels of the first convolution.

    Raises:
        ValueError: if the network cannot be run, or has no stages of residual blocks.
    """
    calls, size = _trace(model, input_size)
    stages = _find_stages(model, calls)
    if len(stages) < 2:
        found = f"only one stage, {stages[0].name}, was" if stages else "no stage was"
        raise ValueError(f"{found} recognised in {type(model).__name__}; {CONVERTIBLE}")
    inside = [block.module for stage in stages for block in stage.blocks]
    members = {part for block in inside for part in block.modules()}
    leaves = [call for call in calls if not _has_children(call.module)]
    positions = [index for index, call in enumerate(leaves) if call.module in members]
    stem = tuple(leaves[: positions[0]])
    after = (call.name for call in leaves[positions[-1] + 1 :])
    return Anatomy(size, stem, stages, tuple(after))


def has_residual_add(block: nn.Module) -> bool:
    """Return whether a block adds two tensors; also true where its code cannot be traced."""
    graph = trace_block(block)
    if graph is None:
        return True
    return any(
        (node.op == "call_function" and node.target in _ADDS)
        or (node.op == "call_method" and node.target in ("add", "add_"))
        for node in graph.nodes
    )


class _OwnCodeTracer(fx.Tracer):
    """Traces a module's own forward and takes every module it calls as one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace_block(block: nn.Module) -> fx.Graph | None:
    """Return the graph of a block's own forward, or None where its code cannot be traced."""
    try:
        return _OwnCodeTracer().trace(block)
    except Exception:  # a user's forward may raise anything when it is given a proxy
        return None


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _trace(
    model: nn.Module, input_size: Sequence[int] | None
) -> tuple[list[Call], tuple[int, ...]]:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no Conv2d; {CONVERTIBLE}")
    sizes: list[tuple[int, ...]]
    sizes = [(1, first.in_channels, side, side) for side in _TRIED_SIZES]
    if input_size is not None:
        sizes = [tuple(input_size)]
    error: Exception | None = None
    for size in sizes:
        try:
            return _record_calls(model, size), size
        except _RUN_ERRORS as caught:
            error = error or caught
    reason = str(error).split("\n")[0]
    raise ValueError(
        f"{type(model).__name__} does not run on an input of size {sizes[0]}: {reason}; give a "
        "size it takes as input_size=(1, channels, height, width)"
    ) from error


def _record_calls(model: nn.Module, size: tuple[int, ...]) -> list[Call]:
    names = {module: name for name, module in model.named_modules()}
    calls: list[Call] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            shapes = tuple(inputs[0].shape), tuple(output.shape)
            calls.append(Call(names[module], module, *shapes))

    handles = [module.register_forward_hook(record) for module in names]
    try:
        run_on_meta(model, size)
    except NotImplementedError:
        # An operation without a meta kernel: run it for real, on a copy.
        run_for_real(model, size)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def run_for_real(model: nn.Module, size: tuple[int, ...]) -> Any:
    """Run a network in evaluation mode on zeros, where its own tensors are."""
    parameter = next(model.parameters())
    example = torch.zeros(size, dtype=parameter.dtype, device=parameter.device)
    with evaluating(model), torch.no_grad():
        return model(example)


def _is_block(call: Call) -> bool:
    convs = sum(isinstance(m, nn.Conv2d) for m in call.module.modules())
    maps = len(call.input_shape) == 4 and len(call.output_shape) == 4
    return maps and convs >= 2 and has_residual_add(call.module)


@dataclass
class _Container:
    name: str
    blocks: list[Call] = field(default_factory=list)


def _find_stages(model: nn.Module, calls: list[Call]) -> tuple[Stage, ...]:
    by_module: dict[nn.Module, list[Call]] = {}
    for call in calls:
        by_module.setdefault(call.module, []).append(call)
    containers = []
    for name, module in model.named_modules():
        children = list(module.children())
        if not isinstance(module, nn.Sequential | nn.ModuleList) or not children:
            continue
        runs = [by_module.get(child, []) for child in children]
        # A block that runs twice or never has no place of its own in the network.
        if all(len(run) == 1 and _is_block(run[0]) for run in runs) and not any(
            isinstance(child, nn.Sequential) for child in children
        ):
            containers.append(_Container(name, [run[0] for run in runs]))
    inside = {
        part
        for container in containers
        for call in container.blocks
        for part in call.module.modules()
    }
    # Blocks may hold sequences of smaller blocks: the outermost count.
    containers = [c for c in containers if model.get_submodule(c.name) not in inside]
    order = {id(call): index for index, call in enumerate(calls)}
    containers.sort(key=lambda container: order[id(container.blocks[0])])
    return tuple(stage for container in containers for stage in _split(container))


def _split(container: _Container) -> list[Stage]:
    """Cut a container's blocks where the map shrinks or the width changes."""
    groups: list[list[Call]] = []
    for call in container.blocks:
        changes = call_stride(call) != (1, 1) or call.input_shape[1] != call.output_shape[1]
        if not groups or changes:
            groups.append([])
        groups[-1].append(call)
    if len(groups) == 1:
        return [Stage(container.name, container.name, tuple(groups[0]))]
    stages, start = [], 0
    for group in groups:
        end = start + len(group)
        name = f"{container.name}[{start}:{end}]"
        stages.append(Stage(name, container.name, tuple(group)))
        start = end
    return stages


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy that shares nothing with the original."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error}); convert a network that "
            "copy.deepcopy takes"
        ) from error
