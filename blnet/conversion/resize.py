"""A user's own residual block at another width and stride.

A block is copied and the channels of its layers are changed in the copy, so it stays of its own
class: its code, settings, normalisation, activation, dropout and gate are what they were. That is
more faithful than calling its constructor, whose parameters could only be guessed by name, or than
putting a block of ours in its place. What the copy cannot be bent to is refused by its shapes.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from blnet.blocks import BlockSpec
from blnet.conversion.discovery import Call, call_stride
from blnet.conversion.surgery import (
    SHORTCUT_NAMES,
    Projection,
    chain,
    convolutions,
    execution_order,
    gate_of,
    is_norm,
    pooled_shortcut,
    resize_norm,
    shortcut_name,
)
from blnet.meta import meta_twin, run_on_meta


def resized(source: Call, spec: BlockSpec, striding: int, project: Projection) -> nn.Module:
    """Return a copy of a block for other widths and another stride.

    Layers whose shape stays keep their weights, the others get values that must be initialised.

    Args:
        source: the template's run, of the stage's full width.
        spec: what is wanted; all inner widths are divided by `spec.narrow`.
        striding: which convolution of the chain strides, if the template strides otherwise.
        project: makes the shortcut's projection.

    Raises:
        ValueError: if the block has no place for the shortcut it needs, does not run, or its code
            does not take other widths.
    """
    name, in_channels = type(source.module).__name__, source.input_shape[1]
    made = copy.deepcopy(source.module)
    order = execution_order(made, in_channels)
    if order is None:
        raise ValueError(
            f"the block {name} does not run by itself on a map of {in_channels} channels; give "
            "blocks that take one tensor (N, C, H, W) and return one"
        )
    shortcut = pooled_shortcut(spec, project)
    attribute = shortcut_name(made)
    if attribute is not None:
        identity = getattr(made, attribute) is not None
        setattr(made, attribute, shortcut or (nn.Identity() if identity else None))
    _resize_layers(made, order, spec)
    _set_stride(made, call_stride(source), spec, striding)
    if not fits(made, spec):
        lacking = shortcut is not None and attribute is None
        why = (
            f"it has no attribute named {', '.join(SHORTCUT_NAMES)} or such to put a shortcut in"
            if lacking
            else f"its code does not run with widths divided by {spec.narrow} and a stride of "
            f"{spec.stride}"
        )
        raise ValueError(
            f"the block {name} was not recognised: {why}; blocks must take their widths from "
            "their layers"
        )
    return made


def striding_conv(block: nn.Module) -> int:
    """Return which convolution of a chain strides: its own, else the first one wider than 1x1."""
    convs = convolutions(block)
    for index, conv in enumerate(convs):
        if max(conv.stride) > 1:
            return index
    return next((index for index, conv in enumerate(convs) if max(conv.kernel_size) > 1), 0)


def fits(block: nn.Module, spec: BlockSpec) -> bool:
    """Return whether a block maps the widths and steps that were asked for."""
    step = spec.stride if isinstance(spec.stride, tuple) else (spec.stride, spec.stride)
    wanted = (2, spec.out_channels, -(-24 // step[0]), -(-24 // step[1]))
    # Which of a convolution's sizes go together the meta device does not look at.
    if any(conv.out_channels % conv.groups or conv.in_channels % conv.groups
           for conv in convolutions(block)):  # fmt: skip
        return False
    try:
        output = run_on_meta(meta_twin(block), (2, spec.in_channels, 24, 24))
    except Exception:  # a user's block may raise anything
        return False
    return isinstance(output, Tensor) and tuple(output.shape) == wanted


def _resize_layers(block: nn.Module, order: list[str], spec: BlockSpec) -> None:
    parts = chain(block)
    # What runs before the first convolution that mixes channels, and that one's input, has the
    # width of the input, or a multiple of it.
    entry: dict[str, int] = {}
    width = spec.in_channels
    for name in order:
        if name in parts:
            part = parts[name]
            entry[name] = width
            if isinstance(part, nn.Conv2d):
                if not _is_depthwise(part):
                    break
                width *= part.out_channels // part.in_channels
    for name, part in parts.items():
        _resize_layer(part, entry.get(name, 0), spec.narrow)
    for part in _leaves(gate_of(block)):
        _resize_layer(part, 0, spec.narrow)


def _resize_layer(part: nn.Module, in_channels: int, narrow: int) -> None:
    """Divide a layer's widths, in place; the width of its input is given where it is not inner."""

    def divided(width: int) -> int:
        return max(1, width // narrow)  # a gate may have a single channel inside

    if isinstance(part, nn.Conv2d):
        width, out = in_channels or divided(part.in_channels), divided(part.out_channels)
        if _is_depthwise(part):
            out = width * (part.out_channels // part.in_channels)
        _resize_conv(part, width, out, narrow)
    elif isinstance(part, nn.Linear):
        _resize_linear(part, narrow)
    elif is_norm(part):
        width = _norm_width(part)
        if width:
            resize_norm(part, in_channels or divided(width))
    elif not isinstance(part, nn.Conv1d):  # over the channels themselves, as in ECA
        _resize_rest(part, in_channels, narrow)


def _leaves(gate: nn.Module | None) -> list[nn.Module]:
    parts = gate.modules() if gate is not None else ()
    return [part for part in parts if is_norm(part) or not list(part.children())]


def _norm_width(norm: nn.Module) -> int:
    for name in ("num_features", "num_channels"):
        width = getattr(norm, name, None)
        if isinstance(width, int):
            return width
    tensors = [*norm.parameters(recurse=False), *norm.buffers(recurse=False)]
    return next((len(value) for value in tensors if value.ndim == 1), 0)


def _resize_conv(conv: nn.Conv2d, in_channels: int, out_channels: int, narrow: int) -> None:
    groups = conv.groups
    if _is_depthwise(conv):
        groups = in_channels
    elif groups > 1:
        groups = max(1, groups // narrow)
    shape = (out_channels, in_channels // groups, *conv.kernel_size)
    old = conv.out_channels
    conv.in_channels, conv.out_channels, conv.groups = in_channels, out_channels, groups
    _replace(conv, "weight", shape)
    for name, value in list(conv._parameters.items()):
        if name != "weight" and value is not None and value.shape[0] == old:
            _replace(conv, name, (out_channels, *value.shape[1:]))


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels > 1


def _resize_linear(linear: nn.Linear, narrow: int) -> None:
    linear.in_features = max(1, linear.in_features // narrow)
    linear.out_features = max(1, linear.out_features // narrow)
    _replace(linear, "weight", (linear.out_features, linear.in_features))
    if linear.bias is not None:
        _replace(linear, "bias", (linear.out_features,))


def _resize_rest(part: nn.Module, in_channels: int, narrow: int) -> None:
    """Cut or repeat what else has one value a channel: PReLU, layer scales."""
    for name, value in list(part._parameters.items()):
        if value is None or value.numel() == 1:
            continue
        kept = value.detach().clone()
        channels = next(axis for axis, n in enumerate(value.shape) if n > 1)
        for axis, n in enumerate(value.shape):
            width = n // narrow if n % narrow == 0 else n
            if in_channels:  # of what stands before a block's first mixing
                width = in_channels if axis == channels else n
            if n > 1 and width != n:
                kept = kept.index_select(axis, torch.arange(width, device=kept.device) % n)
        part._parameters[name] = nn.Parameter(kept, value.requires_grad)


def _replace(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    value = module._parameters[name]
    assert value is not None
    if tuple(value.shape) != shape:
        fresh = torch.zeros(shape, dtype=value.dtype, device=value.device)
        module._parameters[name] = nn.Parameter(fresh, value.requires_grad)


def _set_stride(block: nn.Module, own: tuple[int, int], spec: BlockSpec, striding: int) -> None:
    step = spec.stride if isinstance(spec.stride, tuple) else (spec.stride, spec.stride)
    if step == own:
        return  # by whatever means: some blocks stride in a pool
    for index, conv in enumerate(convolutions(block)):
        conv.stride = step if index == striding else (1, 1)
