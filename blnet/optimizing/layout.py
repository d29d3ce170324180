"""The layout of maps: channels-last, which is faster, unless a network's code asks for another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

Layout = Callable[[Tensor], Tensor]


def is_transformed(value: Tensor) -> bool:
    """Return whether a tensor stands for another one: in vmap, jvp and the like."""
    if torch.compiler.is_compiling():  # there transforms are part of what is compiled
        return False
    return is_functorch_wrapped_tensor(value) or unpack_dual(value).tangent is not None


def channels_last(value: Tensor) -> Tensor:
    """Return a map in channels-last layout, anything else as it is."""
    return _map_in(value, torch.channels_last)


def channels_first(value: Tensor) -> Tensor:
    """Return a map in the usual layout, anything else as it is."""
    return _map_in(value, torch.contiguous_format)


def lay_out(network: nn.Module, last: bool) -> None:
    """Bring a network's weights into channels-last layout, or back into the usual one, in place."""
    wanted = torch.channels_last if last else torch.contiguous_format
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=wanted)


def layout_of(network: nn.Module) -> Layout:
    """Return what brings a network's inputs into the layout of its weights."""
    weights = (parameter for parameter in network.parameters() if parameter.ndim == 4)
    # Of those without height and width nobody can tell.
    last = any(
        weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        for weight in weights
    )
    return channels_last if last else channels_first


def takes_channels_last(network: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Return whether a network runs on maps in channels-last layout; code with `view` may not."""
    try:
        network(*map(channels_last, inputs))
    except Exception:  # whatever its code raises; in the usual layout it has run before
        return False
    return True


def _map_in(value: Tensor, layout: torch.memory_format) -> Tensor:
    if value.ndim != 4 or is_transformed(value):  # vmap knows no layouts
        return value
    return value.contiguous(memory_format=layout)
