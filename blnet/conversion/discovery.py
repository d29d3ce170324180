"""Finding the parts of a ResNet-like network: stem, stages of residual blocks, head.

Nothing is assumed of attribute names. The network is run once on the meta device; the shapes that
go into and out of each module tell what is a block, where a stage begins and what it strides by.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blnet.kernels import merge
from blnet.meta import check_size, meta_twin, run_on_meta
from blnet.tracing import trace_own_code

CONVERTIBLE = (
    "a convertible network is a stem, two or more stages of residual blocks (each stage in an "
    "nn.Sequential or nn.ModuleList, each block with at least two Conv2d and a residual add) and "
    "a head"
)
# Sizes to try where none is given: ImageNet's first, then those of networks with a fixed head.
_TRIED_SIZES = (224, 32, 64, 96, 128, 256, 299)
_ADDS = {operator.add, operator.iadd, torch.add, merge, "add", "add_"}
_RUN_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class Call:
    """One run of one module.

    Attributes:
        name: path of the module.
        module: the module of the network itself.
        input_shape: shape of its first input.
        output_shape: shape of its output.
        source: number of the call whose output it was given; None where a function made it.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    source: int | None


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
    _check_chain(stages, calls)
    inside = [block.module for stage in stages for block in stage.blocks]
    members = {part for block in inside for part in block.modules()}
    leaves = [call for call in calls if not _has_children(call.module)]
    positions = [index for index, call in enumerate(leaves) if call.module in members]
    stem = tuple(leaves[: positions[0]])
    after = (call.name for call in leaves[positions[-1] + 1 :])
    return Anatomy(size, stem, stages, tuple(after))


def _check_chain(stages: tuple[Stage, ...], calls: list[Call]) -> None:
    """Check that the stages follow one another and that no block between them was missed."""
    number = {id(call): index for index, call in enumerate(calls)}
    blocks = [block for stage in stages for block in stage.blocks]
    for before, after in itertools.pairwise(blocks):
        if after.source is not None and after.source < number[id(before)]:
            raise ValueError(
                f"{after.name} was not recognised as what follows {before.name}: its input was "
                f"made before that ran, so the stages are no single chain; {CONVERTIBLE}"
            )
    inside = {part for block in blocks for part in block.module.modules()}
    for call in calls[: number[id(blocks[-1])]]:
        missed = not any(part in inside for part in call.module.modules())
        if missed and trace_own_code(call.module) is not None and _is_block(call):
            raise ValueError(
                f"{call.name} looks like a residual block but stands in no sequence of blocks; "
                f"{CONVERTIBLE}"
            )


def has_residual_add(block: nn.Module) -> bool:
    """Return whether a block adds two tensors; also true where its code cannot be traced."""
    graph = trace_own_code(block)
    return graph is None or any(node.target in _ADDS for node in graph.nodes)


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _trace(
    model: nn.Module, input_size: Sequence[int] | None
) -> tuple[list[Call], tuple[int, ...]]:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no Conv2d; {CONVERTIBLE}")
    sizes = [(1, first.in_channels, side, side) for side in _TRIED_SIZES]
    tried = sizes if input_size is None else [check_size(input_size)]
    error: Exception | None = None
    for size in tried:
        try:
            return _record_calls(model, size), size
        except _RUN_ERRORS as caught:
            error = error or caught
    reason = str(error).split("\n")[0]
    raise ValueError(
        f"{type(model).__name__} does not run on one tensor of size {tried[0]}: {reason}; "
        "a network that takes one tensor can be converted, name its size as "
        "input_size=(1, channels, height, width)"
    ) from error


def _record_calls(model: nn.Module, size: tuple[int, ...]) -> list[Call]:
    twin = meta_twin(model)
    originals = {id(t): m for t, m in zip(twin.modules(), model.modules(), strict=True)}
    names = {id(module): name for name, module in twin.named_modules()}
    calls: list[Call] = []
    # Tensors that modules gave, kept alive so that an identity stands for one tensor only.
    given: dict[int, tuple[Tensor, int]] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            return
        source = given[id(inputs[0])][1] if id(inputs[0]) in given else None
        shapes = tuple(inputs[0].shape), tuple(output.shape)
        if id(output) not in given or inputs[0] is not output:
            given[id(output)] = (output, len(calls))
        calls.append(Call(names[id(module)], originals[id(module)], *shapes, source))

    for module in twin.modules():
        module.register_forward_hook(record)
    run_on_meta(twin, size)
    return calls


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
