"""Turning any ResNet-like network into its Big-Little variant.

The variant is a copy of the network in which each stage but the last is replaced by a Big-Little
module, the stem's max pool by two small branches, and the last stage's strided shortcut by a pooled
one. The network's own forward stays as it is, so whatever else it does, it still does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from blnet.blocks import is_strided
from blnet.conversion.discovery import Anatomy, find_anatomy
from blnet.conversion.initialise import mute, reset
from blnet.conversion.plan import BranchPlan, ConversionPlan, StagePlan
from blnet.conversion.stages import StageMaker
from blnet.conversion.surgery import Layer, is_norm, norm_like
from blnet.fusing import unfuse
from blnet.meta import meta_twin, run_on_meta
from blnet.module import BigLittleModule, branch_length, check_branching
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
    meta_twin(model)  # says in one sentence if the network cannot be copied
    converted = unfuse(model)  # a copy; fused code would keep to what it was made from
    if branches > 1:
        plan = _Conversion(converted, find_anatomy(converted, input_size), plan).run()
    converted.plan = plan  # type: ignore[assignment]  # nn.Module is typed to hold modules only
    return converted


class _Conversion:
    """One conversion under way: replaces the parts of a copy and keeps note of it."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, plan: ConversionPlan) -> None:
        self.model = model
        self.anatomy = anatomy
        self.plan = plan
        self.weight = next(p for p in model.parameters() if p.ndim == 4)
        self.trainable = all(p.requires_grad for p in model.parameters())

    @torch.no_grad()
    def run(self) -> ConversionPlan:
        """Replace every part and return the plan."""
        before = _output_shapes(self.model, self.anatomy.input_size)
        stages = self.anatomy.stages
        with torch.device(self.weight.device):
            makers = [StageMaker(stage, self.plan) for stage in stages]
            if not self.plan.inherit_weights:
                reset(self.model)
            stem = self._replace_pool(makers[0].norm)
            made = [self._make(index, makers[index]) for index in range(len(stages) - 1)]
            made.append(self._keep_last(makers[-1]))
        for container in dict.fromkeys(stage.container for stage in stages):
            parts = [
                module
                for stage, (modules, _) in zip(stages, made, strict=True)
                for module in modules
                if stage.container == container
            ]
            kind = type(self.model.get_submodule(container))
            listed = issubclass(kind, nn.ModuleList)
            self._put(container, nn.ModuleList(parts) if listed else nn.Sequential(*parts))
        return dataclasses.replace(
            self.plan,
            input_size=self.anatomy.input_size,
            stem=stem,
            stages=tuple(stage for _, stage in made),
            head=f"{', '.join(self.anatomy.head) or 'none'}, kept",
            notes=(*self._check(before), *self._frozen()),
        )

    def _alike(self, module: nn.Module) -> nn.Module:
        """Bring a new part to the network's device, dtype, layout and mode."""
        module.to(device=self.weight.device, dtype=self.weight.dtype)
        contiguous = self.weight.is_contiguous()
        if not contiguous and self.weight.is_contiguous(memory_format=torch.channels_last):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.train(self.model.training)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, own = name.rpartition(".")
        setattr(self.model.get_submodule(parent), own, self._alike(module))

    def _replace_pool(self, norm: Layer | None) -> str:
        names = ", ".join(call.name for call in self.anatomy.stem) or "none"
        pools = [call for call in self.anatomy.stem if isinstance(call.module, nn.MaxPool2d)]
        norms = [call.module for call in self.anatomy.stem if is_norm(call.module)]
        norm = norm_like(norms[-1]) if norms else norm
        if not pools or not _halves_rounding_up(pools[-1].module) or norm is None:
            return f"{names}, kept (no 3x3 max pool of stride 2 to put two branches in place of)"
        width = pools[-1].input_shape[1]
        pool = BigLittlePool(width, self.plan.alpha, norm)
        reset(pool)
        self._put(pools[-1].name, pool)
        return (
            f"{names}; {pools[-1].name} becomes two branches of {width} channels and its "
            f"1/{self.plan.alpha}, with ReLU"
        )

    def _make(self, index: int, maker: StageMaker) -> tuple[list[nn.Module], StagePlan]:
        stages = self.anatomy.stages
        stage, follower = stages[index], stages[index + 1]
        # Each module strides for the stage that follows; the last stage strides for itself.
        stride = follower.stride if index + 2 < len(stages) else (1, 1)
        module, notes = maker.module(stride)
        if self.plan.inherit_weights:
            for expand in module.expands:
                mute(list(expand.children())[-1])
        if index == 0 and is_strided(stage.stride):
            # The first stage's own step comes before its branches, as a pool.
            module.branches = nn.ModuleList(
                nn.Sequential(nn.AvgPool2d(3, stage.stride, padding=1), *branch.children())
                for branch in module.branches
            )
            notes.append(f"its own stride {stage.stride} becomes an average pool in each branch")
        return [module], self._stage_plan(maker, stride, notes, plain=False)

    def _keep_last(self, maker: StageMaker) -> tuple[list[nn.Module], StagePlan]:
        blocks, notes = maker.plain()
        return blocks, self._stage_plan(maker, maker.stage.stride, notes, plain=True)

    def _stage_plan(
        self, maker: StageMaker, stride: tuple[int, int], notes: list[str], plain: bool
    ) -> StagePlan:
        stage, count, plan = maker.stage, self.plan.branches, self.plan
        branches = tuple(
            BranchPlan(
                branch_length(len(stage.blocks), plan.beta, count - 1 - i),
                stage.out_channels // plan.alpha ** (count - 1 - i),
                i,
            )
            for i in range(0 if plain else count)
        )
        kinds = " and ".join(dict.fromkeys(type(b.module).__name__ for b in stage.blocks))
        return StagePlan(
            name=stage.name,
            block=kinds,
            length=len(stage.blocks),
            in_channels=stage.in_channels,
            out_channels=stage.out_channels,
            stride=stage.stride,
            branches=branches,
            fusion_stride=stride,
            made_of="kept" if plain else f"of its own class {kinds}, resized",
            notes=tuple(dict.fromkeys(notes)),
        )

    def _frozen(self) -> tuple[str, ...]:
        if self.trainable:
            return ()
        return ("weights of the network that were frozen stay so; those of new layers are not",)

    def _check(self, before: list[tuple[int, ...]]) -> tuple[str, ...]:
        """Run the converted network once, on the meta device; note what its outputs changed."""
        try:
            after = _output_shapes(self.model, self.anatomy.input_size)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.plan.network} does not run with its stages replaced ({reason}); its code "
                "must take each stage as one module, or loop over it"
            ) from error
        if before == after:
            return ()
        return (
            f"outputs change from {_sizes(before)} to {_sizes(after)}: a Big-Little stage shrinks "
            "the map for the one that follows, so maps taken between stages are smaller",
        )


def _output_shapes(model: nn.Module, size: tuple[int, ...]) -> list[tuple[int, ...]]:
    leaves = torch.utils._pytree.tree_leaves(run_on_meta(meta_twin(model), size))
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _sizes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _halves_rounding_up(pool: nn.Module) -> bool:
    """Return whether a pool halves the map as two branches with stride 2 do, odd sizes too."""
    pooled = pool(torch.empty(1, 1, 15, 17, device="meta"))
    strides = pool(torch.empty(1, 1, 16, 18, device="meta"))
    return tuple(pooled.shape[2:]) == (8, 9) and tuple(strides.shape[2:]) == (8, 9)
