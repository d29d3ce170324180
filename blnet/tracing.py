"""Running a network on the meta device: every shape, no arithmetic, nothing changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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


def run_on_meta(model: nn.Module, input_size: Sequence[int]) -> Any:
    """Run a network in evaluation mode on a meta tensor and return its output.

    Args:
        model: any network that takes one tensor; its own tensors stay where they are.
        input_size: the input's shape, batch included.

    Raises:
        Exception: whatever the network raises for an input of that shape.
    """
    state = {
        name: value.detach().to("meta")
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    example = torch.empty(tuple(input_size), dtype=dtype, device="meta")
    with evaluating(model), torch.no_grad():
        return torch.func.functional_call(model, state, (example,))
