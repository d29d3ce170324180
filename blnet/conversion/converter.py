"""Turning any ResNet-like network into its Big-Little variant.

The variant is a copy of the network in which each stage but the last is replaced by a Big-Little
module, the stem's max pool by two small branches, and the last stage's strided shortcuts by pooled
ones. The network's own forward stays as it is, so whatever else it does, it still does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from blnet.blocks import BlockSpec, is_strided
from blnet.conversion.discovery import Anatomy, Call, Stage, copy_model, find_anatomy
from blnet.conversion.inheritance import copy_block, reset, silence
from blnet.conversion.plan import BranchPlan, ConversionPlan, StagePlan
from blnet.conversion.rebuild import Recipe, read_recipe
from blnet.conversion.surgery import (
    NORMS,
    closing_activation,
    layers,
    pooled_shortcut,
    shortcut_name,
)
from blnet.module import BigLittleModule, branch_length, check_branching, divide_width, make_module
from blnet.stem import BigLittlePool


def convert(
    model: nn.Module,
    alpha: int = 2,
    beta: int = 4,
    branches: int = 2,
    inherit_weights: bool = False,
    input_size: Sequence[int] | None = None,
) -> nn.Module:
    """Return the Big-Little variant of a ResNet-like network.

    Args:
        model: a stem, two or more stages of residual blocks and a head: torchvision's and timm's
            ResNets, or a class of one's own. It is not changed.
        alpha: how many times narrower each smaller branch is.
        beta: how many times shorter each smaller branch is.
        branches: number of branches; 1 gives the plain network back, with equal outputs.
        inherit_weights: move the trained stem, blocks, last stage and head into the stem, the big
            branches, the fusion blocks, the last stage and the head. The little branches then start
            silent (their expanding normalisation at 0). Otherwise all weights are fresh.
        input_size: shape of a sample input, batch included, for networks that take no usual image.

    Returns:
        A network of the same class, device, dtype and mode, with the plan as its attribute `plan`:
        what was found, what was chosen; `print(network.plan)` shows it.

    Raises:
        ValueError: if alpha, beta or branches is out of range or does not divide the widths, or a
            part of the network was not recognised; the error says which, and what a convertible
            network looks like.
    """
    check_branching(alpha, beta, branches)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    plan = ConversionPlan(type(model).__name__, alpha, beta, branches, inherit_weights)
    if any(isinstance(part, BigLittleModule) for part in model.modules()):
        raise ValueError(
            f"{plan.network} holds Big-Little modules already; convert the plain network instead"
        )
    converted = copy_model(model)
    if branches > 1:
        anatomy = find_anatomy(converted, input_size)
        plan = _Conversion(converted, anatomy, plan).run()
    converted.plan = plan  # type: ignore[assignment]
    return converted


class _Conversion:
    """One conversion under way: replaces the parts of a copy and keeps note of it."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, plan: ConversionPlan) -> None:
        self.model = model
        self.anatomy = anatomy
        self.plan = plan
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @torch.no_grad()
    def run(self) -> ConversionPlan:
        """Replace every part and return the plan."""
        stages = self.anatomy.stages
        for stage in stages[:-1]:
            self._check_widths(stage)
        if not self.plan.inherit_weights:
            reset(self.model)
        stem = self._replace_pool()
        made = [self._make_big_little(index) for index in range(len(stages) - 1)]
        last, last_plan = self._keep_plain(stages[-1])
        for container in dict.fromkeys(stage.container for stage in stages):
            parts = [
                self._alike(module)
                for stage, module in zip(stages, [*(m for m, _ in made), last], strict=True)
                if stage.container == container
            ]
            self._put(container, parts)
        head = ", ".join(self.anatomy.head) or "none"
        return ConversionPlan(
            self.plan.network,
            self.plan.alpha,
            self.plan.beta,
            self.plan.branches,
            self.plan.inherit_weights,
            self.anatomy.input_size,
            stem,
            (*(p for _, p in made), last_plan),
            f"{head}, kept",
        )

    def _alike(self, module: nn.Module) -> nn.Module:
        """Bring a new part to the network's device, dtype and mode."""
        return module.to(device=self.device, dtype=self.dtype).train(self.model.training)

    def _check_widths(self, stage: Stage) -> None:
        convs = layers(stage.blocks[-1].module, nn.Conv2d, "main")
        for width in (stage.out_channels, *(conv.out_channels for conv in convs[:-1])):
            divide_width(width, self.plan.alpha, self.plan.branches - 1)

    def _put(self, container: str, parts: list[nn.Module]) -> None:
        old = self.model.get_submodule(container)
        new: nn.Module
        if isinstance(old, nn.ModuleList):
            new = nn.ModuleList(parts)
        else:
            new = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
        parent, _, name = container.rpartition(".")
        setattr(self.model.get_submodule(parent), name, new)

    def _replace_pool(self) -> str:
        pools = [call for call in self.anatomy.stem if isinstance(call.module, nn.MaxPool2d)]
        names = ", ".join(call.name for call in self.anatomy.stem) or "none"
        # An odd size tells a pool that rounds up, as our branches do, from one that rounds down.
        if not pools or not _halves(pools[-1]):
            return f"{names}, kept (no 3x3 max pool of stride 2 to put two branches in place of)"
        pool = pools[-1]
        width = pool.input_shape[1]
        branches = BigLittlePool(width, self.plan.alpha)
        reset(branches)
        parent, _, name = pool.name.rpartition(".")
        setattr(self.model.get_submodule(parent), name, self._alike(branches))
        return f"{names}; {pool.name} becomes two branches of {width} and its 1/{self.plan.alpha}"

    def _make_big_little(self, index: int) -> tuple[nn.Module, StagePlan]:
        stages = self.anatomy.stages
        stage, follower = stages[index], stages[index + 1]
        recipe = read_recipe(stage)
        # Each module strides for the stage that follows; the last stage strides for itself.
        stride = follower.stride if index + 2 < len(stages) else (1, 1)
        module = make_module(
            recipe,
            stage.in_channels,
            stage.out_channels,
            len(stage.blocks),
            alpha=self.plan.alpha,
            beta=self.plan.beta,
            branches=self.plan.branches,
            stride=stride[0] if stride[0] == stride[1] else stride,
            activation=closing_activation(recipe.template),
        )
        notes = self._fill(module, stage, recipe)
        if index == 0 and is_strided(stage.stride):
            # The first stage's own step comes before its branches, as a pool.
            module.branches = nn.ModuleList(
                nn.Sequential(nn.AvgPool2d(3, stage.stride, padding=1), *branch.children())
                for branch in module.branches
            )
            notes.append(f"its own stride {stage.stride} becomes an average pool in each branch")
        return module, self._stage_plan(stage, recipe, stride, notes)

    def _fill(self, module: BigLittleModule, stage: Stage, recipe: Recipe) -> list[str]:
        """Initialise a module, or move the stage's weights in; return notes."""
        notes = []
        big = _blocks(module.branches[-1])
        assert isinstance(module.fusion, nn.Sequential)
        fusion = module.fusion[0]
        if len(big) > 1 and closing_activation(big[-1]) is not None:
            notes.append("the big branch keeps its closing activation (its code cannot be traced)")
        reset(module)
        for branch in module.branches:
            for block in _blocks(branch):
                silence(block)
        silence(fusion)
        if not self.plan.inherit_weights:
            return notes
        old = [call.module for call in stage.blocks]
        for source, target in zip([*old[: len(big)], old[-1]], [*big, fusion], strict=True):
            missed = copy_block(source, target)
            note = f"{_kind(source)} blocks keep fresh weights in part ({', '.join(missed)})"
            if missed and note not in notes:
                notes.append(note)
        for expand in module.expands:
            nn.init.zeros_(expand.get_parameter("1.weight"))
        return notes

    def _keep_plain(self, stage: Stage) -> tuple[nn.Module, StagePlan]:
        """Keep the last stage's blocks and give its strided shortcut the pool of the paper."""
        blocks = [call.module for call in stage.blocks]
        notes: list[str] = []
        self._pool_shortcut(stage, notes)
        if not self.plan.inherit_weights:
            for block in blocks:
                silence(block)
        kept = self.model.get_submodule(stage.container)
        plain = kept if isinstance(kept, nn.Sequential) else nn.Sequential(*blocks)
        if isinstance(kept, nn.Sequential) and len(kept) != len(blocks):
            plain = nn.Sequential(*blocks)
        return plain, StagePlan(
            stage.name,
            _kind(blocks[0]),
            len(blocks),
            stage.in_channels,
            stage.out_channels,
            stage.stride,
            (),
            stage.stride,
            "kept",
            tuple(notes),
        )

    def _pool_shortcut(self, stage: Stage, notes: list[str]) -> None:
        block, name = stage.blocks[0].module, shortcut_name(stage.blocks[0].module)
        old = getattr(block, name) if name else None
        if old is None:
            return
        convs = layers(old, nn.Conv2d)
        if not is_strided(stage.stride) or len(convs) != 1 or convs[0].kernel_size != (1, 1):
            return
        spec = BlockSpec(stage.in_channels, stage.out_channels, stage.stride)
        norms = layers(old, NORMS)
        pooled = pooled_shortcut(spec, norms[0] if norms else None)
        if pooled is None or not norms or len(pooled) != 3:
            return
        pooled[1].load_state_dict({"weight": convs[0].weight})
        pooled[2].load_state_dict(norms[0].state_dict())
        assert name is not None
        setattr(block, name, self._alike(pooled))
        notes.append("its shortcut pools (3x3, average) before its 1x1 convolution")

    def _stage_plan(
        self, stage: Stage, recipe: Recipe, stride: tuple[int, int], notes: list[str]
    ) -> StagePlan:
        count, alpha, beta = self.plan.branches, self.plan.alpha, self.plan.beta
        length = len(stage.blocks)
        branch_plans = tuple(
            BranchPlan(
                branch_length(length, beta, count - 1 - i),
                stage.out_channels // alpha ** (count - 1 - i),
                i,
            )
            for i in range(count)
        )
        made_of = f"of its own class {_kind(recipe.template)}"
        if not recipe.own_class:
            made_of = f"ours in its shape: {recipe.reason}"
        return StagePlan(
            stage.name,
            _kind(stage.blocks[0].module),
            length,
            stage.in_channels,
            stage.out_channels,
            stage.stride,
            branch_plans,
            stride,
            made_of,
            tuple(notes),
        )


def _blocks(branch: nn.Module) -> list[nn.Module]:
    return [part for part in branch.children() if not isinstance(part, nn.AvgPool2d)]


def _kind(block: nn.Module) -> str:
    return type(block).__name__


def _halves(call: Call) -> bool:
    pool = call.module
    assert isinstance(pool, nn.MaxPool2d)

    def both(value: object) -> object:
        return (value, value) if isinstance(value, int) else value

    return (both(pool.kernel_size), both(pool.stride), both(pool.padding)) == (
        (3, 3),
        (2, 2),
        (1, 1),
    ) and not pool.ceil_mode
