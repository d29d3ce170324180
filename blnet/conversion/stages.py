"""One stage of the network, made into a Big-Little module of its own blocks."""

from __future__ import annotations

from torch import nn

from blnet.blocks import BlockSpec, is_strided
from blnet.conversion.discovery import Stage
from blnet.conversion.initialise import move_shortcut, reset, silence
from blnet.conversion.plan import ConversionPlan
from blnet.conversion.resize import resized, striding_conv
from blnet.conversion.surgery import (
    closing_activation,
    convolutions,
    last_norm,
    norm_like,
    pooled_shortcut,
    projection,
    shortcut_name,
    shortcut_of,
    shortcut_projection,
    without_closing_activation,
)
from blnet.module import BigLittleModule, divide_width, make_module


class StageMaker:
    """Makes modules of a stage's blocks.

    Args:
        stage: the stage found.
        plan: what is asked for.

    Attributes:
        stage: the stage.
        norm: makes normalisations like that of its blocks; None where they have none.

    Raises:
        ValueError: if alpha does not divide the widths.
    """

    def __init__(self, stage: Stage, plan: ConversionPlan) -> None:
        self.stage = stage
        self.plan = plan
        self._template = stage.blocks[-1].module
        self.norm = norm_like(last_norm(self._template))
        self._striding = striding_conv(stage.blocks[0].module)
        self._project = shortcut_projection(stage.blocks[0].module, self.norm)
        self._notes: list[str] = []
        for call in stage.blocks:
            for conv in convolutions(call.module):
                divide_width(conv.out_channels, plan.alpha, plan.branches - 1)

    def module(self, stride: tuple[int, int]) -> tuple[BigLittleModule, list[str]]:
        """Return the Big-Little module with this stride, initialised, and notes on it."""
        self._notes = []
        template = self.stage.blocks[-1]
        activation, sure = closing_activation(template.module, template.input_shape[1])
        if not sure:
            self._notes.append("its closing activation cannot be read; the merge uses ReLU")
        elif activation is None:
            self._notes.append("its blocks end with their add; the merge uses ReLU all the same")
        module = make_module(
            self._block,
            self.stage.in_channels,
            self.stage.out_channels,
            len(self.stage.blocks),
            alpha=self.plan.alpha,
            beta=self.plan.beta,
            branches=self.plan.branches,
            stride=stride[0] if stride[0] == stride[1] else stride,
            activation=activation,
            expand=self._expand,
        )
        return module, self._notes

    def plain(self) -> tuple[list[nn.Module], list[str]]:
        """Return the stage's own blocks, the strided shortcut pooled as in the paper."""
        blocks = [call.module for call in self.stage.blocks]
        notes = self._pool_last_shortcut(blocks[0])
        if not self.plan.inherit_weights:
            for call in self.stage.blocks:
                silence(call.module, call.input_shape[1])
        return blocks, notes

    def _expand(self, in_channels: int, out_channels: int) -> nn.Module:
        project = projection(self.norm, bias=self.norm is None)
        expand = nn.Sequential(*project(in_channels, out_channels))
        reset(expand)
        return expand

    def _block(self, spec: BlockSpec) -> nn.Module:
        # Big and fusion blocks stand for one of the stage's each; the little ones take after the
        # last, which does not stride.
        source = self.stage.blocks[spec.position if spec.narrow == 1 else -1]
        block = resized(source, spec, self._striding, self._project)
        trained = self.plan.inherit_weights and spec.narrow == 1
        if trained and _same_chain(source.module, block):
            moved = move_shortcut(shortcut_of(source.module), shortcut_of(block))
            if not moved:
                self._notes.append(f"the shortcut of {source.name} gets fresh weights")
                reset(shortcut_of(block) or nn.Identity())
        else:
            if trained:
                self._notes.append(f"{source.name} gets fresh weights: its shape changed")
            reset(block)
            silence(block, spec.in_channels)
        if spec.closing_activation:
            return block
        opened = without_closing_activation(block, spec.in_channels)
        if opened is None and closing_activation(block, spec.in_channels) != (None, True):
            self._notes.append("the big branch keeps its closing activation: it cannot be left out")
        return opened or block

    def _pool_last_shortcut(self, block: nn.Module) -> list[str]:
        old, name = shortcut_of(block), shortcut_name(block)
        if old is None or name is None or not is_strided(self.stage.stride):
            return []
        spec = BlockSpec(self.stage.in_channels, self.stage.out_channels, self.stage.stride)
        new = pooled_shortcut(spec, self._project)
        if not move_shortcut(old, new):
            return ["its shortcut is kept as it is: more than a 1x1 convolution and its norm"]
        setattr(block, name, new)
        return ["its shortcut pools (3x3, average) before its 1x1 convolution"]


def _same_chain(old: nn.Module, new: nn.Module) -> bool:
    """Return whether a block's layers, all but those of its shortcut, kept their shapes."""
    shapes = []
    for block in (old, new):
        name = shortcut_name(block)
        prefix = f"{name}." if name else "\0"
        state = block.state_dict().items()
        shapes.append({k: v.shape for k, v in state if not k.startswith(prefix)})
    return shapes[0] == shapes[1]
