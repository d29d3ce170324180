"""What a conversion found and what it chose, to be read by people and kept with the weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BranchPlan:
    """One branch of a module: its number of blocks, width and scale (1 / 2**halvings)."""

    blocks: int
    width: int
    halvings: int


@dataclass(frozen=True)
class StagePlan:
    """What was found of a stage and what it became.

    Attributes:
        name: the stage's path in the network.
        block: class of its blocks.
        length: blocks found.
        in_channels: channels of its input.
        out_channels: channels of its output.
        stride: step found, in height and width.
        branches: the branches it became, highest resolution first; empty for a plain stage.
        fusion_stride: stride of the fusion block, in height and width; of the stage where plain.
        made_of: what the new blocks are made of.
        notes: what else a reader should know.
    """

    name: str
    block: str
    length: int
    in_channels: int
    out_channels: int
    stride: tuple[int, int]
    branches: tuple[BranchPlan, ...]
    fusion_stride: tuple[int, int]
    made_of: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the stage's lines of the plan."""
        step = _step(self.stride)
        lines = [
            f"{self.name}: {self.length} x {self.block}, {self.in_channels} -> "
            f"{self.out_channels} channels, stride {step}"
        ]
        if self.branches:
            for index, branch in enumerate(self.branches):
                role = "big" if index == len(self.branches) - 1 else "little"
                scale = f"1/{2**branch.halvings}" if branch.halvings else "full"
                lines.append(
                    f"  {role:<6} {branch.blocks} x {branch.width} channels at {scale} resolution"
                )
            lines.append(f"  fusion 1 block, stride {_step(self.fusion_stride)}")
        else:
            lines.append(f"  stays plain, stride {_step(self.fusion_stride)}")
        lines.append(f"  blocks {self.made_of}")
        return "\n".join([*lines, *(f"  note   {note}" for note in self.notes)])


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion found and chose.

    Attributes:
        network: class of the network.
        alpha: how many times narrower each smaller branch is.
        beta: how many times shorter each smaller branch is.
        branches: number of branches.
        inherit_weights: whether trained weights were moved.
        input_size: shape of the sample input that told the shapes.
        stem: what was found of the stem and what it became.
        stages: the stages.
        head: what was found of the head.
        notes: what concerns no single stage.
        source: the name the network was built by (see `blnet.registry`), None for a user's object.
        source_options: keyword arguments that `source` was built with.
    """

    network: str
    alpha: int
    beta: int
    branches: int
    inherit_weights: bool
    input_size: tuple[int, ...] = ()
    stem: str = ""
    stages: tuple[StagePlan, ...] = ()
    head: str = ""
    notes: tuple[str, ...] = ()
    source: str | None = None
    source_options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain lists, dicts, numbers and texts."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return the plan as text of several lines."""
        title = (
            f"{self.network} -> Big-Little, alpha {self.alpha}, beta {self.beta}, "
            f"{self.branches} branch{'es' if self.branches > 1 else ''}"
        )
        if self.branches == 1:
            return f"{title}: the plain network, unchanged"
        weights = "inherited" if self.inherit_weights else "fresh"
        size = "x".join(map(str, self.input_size))
        return "\n".join(
            [
                f"{title}, weights {weights} (shapes from an input of {size})",
                f"stem: {self.stem}",
                *map(str, self.stages),
                f"head: {self.head}",
                *(f"note: {note}" for note in self.notes),
            ]
        )


def _step(stride: tuple[int, int]) -> str:
    return str(stride[0]) if stride[0] == stride[1] else f"{stride[0]}x{stride[1]}"
