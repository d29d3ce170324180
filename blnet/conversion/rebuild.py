"""Making blocks of the user's own class at other widths and strides.

A constructor is understood by its parameters' names and trusted only when it reproduces the
blocks it was read from, layer for layer. Where it does not, `ChainBlock` takes its place.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blnet.blocks import BlockSpec
from blnet.conversion.discovery import Call, Stage, call_stride, run_for_real
from blnet.conversion.fallback import ChainBlock, check_chain, gate_reduction
from blnet.conversion.surgery import (
    ACTIVATIONS,
    NORMS,
    gate_of,
    layers,
    norm_like,
    pooled_shortcut,
    shortcut_of,
    without_closing_activation,
)
from blnet.tracing import run_on_meta

# What constructors call their parameters.
_INPUT = {
    "in_channels", "inplanes", "in_planes", "in_ch", "in_chs", "in_c", "cin", "c_in", "ch_in",
    "in_dim", "dim_in", "in_features", "in_filters", "inp", "input_channels", "in_width", "n_in",
}  # fmt: skip
_OUTPUT = {
    "out_channels", "outplanes", "out_planes", "out_ch", "out_chs", "out_c", "cout", "c_out",
    "ch_out", "out_dim", "dim_out", "out_features", "out_filters", "oup", "output_channels",
    "out_width", "n_out",
}  # fmt: skip
_PLANES = {"planes", "channels", "width", "filters", "n_filters", "dim", "num_channels"}
_INNER = {
    "mid_channels", "mid_planes", "mid_chs", "mid_ch", "bottleneck_channels", "hidden_channels",
    "hidden_dim", "inner_channels", "bottleneck_width",
}  # fmt: skip
_STRIDE = {"stride", "strides", "s"}
_SHORTCUT = {"downsample", "shortcut", "skip", "projection", "skip_connection", "proj"}
_GROUPS = {"groups", "cardinality", "num_groups"}
_BASE_WIDTH = {"base_width", "width_per_group"}
_DILATION = {"dilation", "dilation_rate"}
_REDUCTION = {"reduction", "se_reduction", "reduction_ratio", "squeeze_factor"}
_NORM = {"norm_layer", "norm", "norm_cls"}
_ACTIVATION = {"act_layer", "activation", "act", "activation_layer", "nonlinearity"}
_ATTENTION = {"attn_layer", "attention_layer", "se_layer"}
_SHAPE_ROLES = (
    _INPUT, _OUTPUT, _PLANES, _INNER, _STRIDE, _GROUPS, _BASE_WIDTH, _DILATION, _REDUCTION,
)  # fmt: skip
_PLAIN_VALUES = (int, float, str, bool)
_COMPARED = (nn.Conv2d, nn.Linear, *NORMS, *ACTIVATIONS, nn.AvgPool2d, nn.MaxPool2d)


@dataclass(frozen=True)
class Recipe:
    """How the blocks of one stage are made.

    Attributes:
        template: a block of the stage at full width.
        planes: the constructor's width argument is the output's width over this; None where the
            constructor is not used.
        reason: why the constructor is not used; "" where it is.
    """

    template: nn.Module
    planes: int | None
    reason: str = ""

    @property
    def own_class(self) -> bool:
        """Whether blocks are of the user's class."""
        return self.planes is not None

    def __call__(self, spec: BlockSpec) -> nn.Module:
        """Return a block; of the user's class where that gives the right shape."""
        block = self._own(spec) if self.planes is not None else None
        if block is None:
            check_chain(self.template)
            return ChainBlock(self.template, spec)
        if spec.closing_activation:
            return block
        opened = without_closing_activation(block)
        return block if opened is None else opened

    def _own(self, spec: BlockSpec) -> nn.Module | None:
        assert self.planes is not None
        norms = layers(self.template, NORMS, "main")
        shortcut = pooled_shortcut(spec, norms[0] if norms else None)
        block = construct(self.template, spec, self.planes, shortcut)
        return block if block is not None and fits(block, spec) else None


def read_recipe(stage: Stage) -> Recipe:
    """Return how to make blocks like a stage's.

    Args:
        stage: the stage; its first and last block are reproduced to see whether the constructor is
            understood.
    """
    template = stage.blocks[-1].module
    kind = type(template)
    if any(type(call.module) is not kind for call in stage.blocks):
        return Recipe(template, None, "the stage mixes block classes")
    proofs = {id(call): call for call in (stage.blocks[0], stage.blocks[-1])}
    for planes in _plane_ratios(template, stage.out_channels):
        if all(_reproduces(call, planes) for call in proofs.values()):
            return Recipe(template, planes)
    return Recipe(template, None, f"{kind.__name__}'s constructor was not understood")


def _plane_ratios(template: nn.Module, width: int) -> Iterator[int]:
    tried = []
    expansion = getattr(template, "expansion", None)
    if isinstance(expansion, int) and expansion > 0:
        tried.append(expansion)
    for ratio in (*tried, 1, 4, 2):
        if width % ratio == 0 and (ratio not in tried or ratio is tried[0]):
            yield ratio


def _reproduces(call: Call, planes: int) -> bool:
    original = call.module
    spec = BlockSpec(call.input_shape[1], call.output_shape[1], call_stride(call))
    shortcut = copy.deepcopy(shortcut_of(original))
    rebuilt = construct(original, spec, planes, shortcut)
    return rebuilt is not None and _anatomy(rebuilt) == _anatomy(original)


def _anatomy(block: nn.Module) -> tuple[Any, ...]:
    """Return what must agree for two blocks to be of one make: tensors and layers, by name."""
    tensors = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    parts = {
        name: (type(part), part.extra_repr())
        for name, part in block.named_modules()
        if isinstance(part, _COMPARED)
    }
    return tensors, parts


def construct(
    template: nn.Module, spec: BlockSpec, planes: int, shortcut: nn.Module | None
) -> nn.Module | None:
    """Call the template's class for a block of another shape; None where that fails."""
    try:
        parameters = inspect.signature(type(template)).parameters
    except (TypeError, ValueError):
        return None
    arguments: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        known, value = _argument(name, template, spec, planes, shortcut)
        if known:
            arguments[name] = value
        elif parameter.default is parameter.empty:
            return None
    positional_only = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    leading = [arguments.pop(name) for name in positional_only if name in arguments]
    try:
        block = type(template)(*leading, **arguments)
    except Exception:  # a user's constructor may raise anything
        return None
    return block if isinstance(block, nn.Module) else None


def _argument(
    name: str, template: nn.Module, spec: BlockSpec, planes: int, shortcut: nn.Module | None
) -> tuple[bool, Any]:
    """Return whether a constructor's parameter is understood, and its value."""
    values = _shape_arguments(template, spec, planes)
    role = next((role for role in _SHAPE_ROLES if name in role), None)
    if role is not None:
        return min(role) in values, values.get(min(role))
    if name in _SHORTCUT:
        return True, shortcut
    return _layer_argument(name, template)


def _shape_arguments(template: nn.Module, spec: BlockSpec, planes: int) -> Mapping[str, Any]:
    stride = spec.stride
    if isinstance(stride, tuple) and stride[0] == stride[1]:
        stride = stride[0]
    convs = layers(template, nn.Conv2d, "main")
    values: dict[str, Any] = {
        min(_INPUT): spec.in_channels,
        min(_OUTPUT): spec.out_channels,
        min(_PLANES): spec.out_channels // planes,
        min(_STRIDE): stride,
        min(_DILATION): max(max(conv.dilation) for conv in convs),
    }
    inner = convs[0].out_channels
    values[min(_INNER)] = inner // spec.narrow
    groups = max(conv.groups for conv in convs)
    values[min(_GROUPS)] = max(1, groups // spec.narrow)
    base_width = inner * 64 // (convs[-1].out_channels // planes * groups)
    values[min(_BASE_WIDTH)] = base_width * (spec.narrow if groups > 1 else 1)
    reduction = gate_reduction(template)
    if reduction:
        values[min(_REDUCTION)] = reduction
    return values


def _layer_argument(name: str, template: nn.Module) -> tuple[bool, Any]:
    if name in _NORM:
        norms = layers(template, NORMS, "main")
        return bool(norms), (lambda channels, *_, **__: norm_like(norms[0], channels))
    if name in _ACTIVATION:
        activations = layers(template, ACTIVATIONS)
        return bool(activations), (lambda *_, **__: copy.deepcopy(activations[0]))
    if name in _ATTENTION:
        gate = gate_of(template)
        return gate is not None, type(gate)
    # A setting that the block keeps under the parameter's name.
    value = getattr(template, name, None)
    if isinstance(value, _PLAIN_VALUES) or type(value) is tuple:
        return True, value
    return False, None


def fits(block: nn.Module, spec: BlockSpec) -> bool:
    """Return whether a block maps the widths and steps that were asked for."""
    size = (2, spec.in_channels, 24, 24)
    step = spec.stride if isinstance(spec.stride, tuple) else (spec.stride, spec.stride)
    wanted = (2, spec.out_channels, -(-24 // step[0]), -(-24 // step[1]))
    try:
        try:
            output = run_on_meta(block, size)
        except NotImplementedError:
            output = run_for_real(block, size)
    except Exception:  # a user's block may raise anything
        return False
    return isinstance(output, torch.Tensor) and tuple(output.shape) == wanted
