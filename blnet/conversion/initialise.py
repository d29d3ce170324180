"""Weights of a converted network: fresh ones, and the trained ones that a shortcut takes over."""

from __future__ import annotations

from torch import nn

from blnet.conversion.surgery import chain, execution_order, is_norm
from blnet.keys import shapes_of


def reset(module: nn.Module) -> None:
    """Give a module fresh weights: Kaiming normal convolutions, all else as torch does."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        else:
            getattr(part, "reset_parameters", _nothing)()


def _nothing() -> None:
    """What a module without parameters of its own resets."""


def silence(block: nn.Module, in_channels: int) -> None:
    """Zero the normalisation that closes a block's chain, so that it starts as its shortcut.

    A block whose chain ends with a convolution (pre-activation) is left alone: zeroing a
    normalisation in front of an activation would stop its gradients for good.
    """
    parts = chain(block)
    run = [parts[name] for name in execution_order(block, in_channels) or () if name in parts]
    deciding = [part for part in run if isinstance(part, nn.Conv2d) or is_norm(part)]
    if not deciding or not is_norm(deciding[-1]):
        return
    # A normalisation with an activation inside stands in front of the latter, not of the add.
    if isinstance(getattr(deciding[-1], "act", None), nn.Identity | None):
        mute(deciding[-1])


def mute(norm: nn.Module) -> None:
    """Zero the weight of a normalisation or a convolution, where it has one."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, nn.Parameter):
        nn.init.zeros_(weight)


def move_shortcut(old: nn.Module | None, new: nn.Module | None) -> bool:
    """Copy the trained projection of a shortcut into the pooled one; return whether all fitted.

    A new shortcut that only pools takes nothing.
    """
    taken = _with_weights(new)
    given = _with_weights(old)
    if not taken:
        return True
    fits = len(given) == len(taken) and all(
        shapes_of(a) == shapes_of(b) for a, b in zip(given, taken, strict=True)
    )
    for before, after in zip(given, taken, strict=True) if fits else ():
        after.load_state_dict(before.state_dict())
    return fits


def _with_weights(shortcut: nn.Module | None) -> list[nn.Module]:
    parts = shortcut.modules() if shortcut is not None else ()
    return [part for part in parts if any(True for _ in part.parameters(recurse=False))]
