"""What holds for the time being: evaluation mode, autocast, the precision of products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
AUTOCAST_DEVICES = ("cpu", "cuda")


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode for the time being, each part back as it was after."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def autocast_is_on() -> bool:
    """Return whether autocast is on for any device."""
    return any(torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES)


@contextmanager
def autocast_switched(on: bool) -> Iterator[None]:
    """Switch autocast on or off on every device for the time being."""
    others = [device for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device) != on]
    try:
        for device in others:
            torch.set_autocast_enabled(device, on)
        yield
    finally:
        for device in others:
            torch.set_autocast_enabled(device, not on)


@contextmanager
def exact_products() -> Iterator[None]:
    """Keep products of float32 in float32 meanwhile, whatever PyTorch may multiply them in."""
    backends: Any = torch.backends  # PyTorch's annotations lack what it makes at run time
    units = [
        *(backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul),
        *(backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul),
    ]
    before = [unit.fp32_precision for unit in units]
    # The older settings as well: where they are at odds with these, PyTorch refuses to multiply.
    products = _told(torch.get_float32_matmul_precision)
    convolutions = _told(lambda: torch.backends.cudnn.allow_tf32)
    if products is not None:
        torch.set_float32_matmul_precision("highest")
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = False
    for unit in units:
        unit.fp32_precision = "ieee"
    try:
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for unit, precision in zip(units, before, strict=True):
            unit.fp32_precision = precision


def _told(ask: Callable[[], T]) -> T | None:
    """Return an older setting; None where PyTorch does not tell, as a newer one says otherwise."""
    try:
        return ask()
    except RuntimeError:
        return None
