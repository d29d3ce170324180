"""Running a network on the meta device: every shape, no arithmetic, nothing changed."""

from __future__ import annotations

import copy
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


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of a network whose parameters and buffers are on the meta device.

    Shared modules and tied tensors are shared in the copy as well, and nothing is allocated.

    Raises:
        ValueError: if the network cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            twin = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            memo.setdefault(id(parameter), twin)
        for buffer in module.buffers(recurse=False):
            memo.setdefault(id(buffer), buffer.detach().to("meta"))
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({' '.join(str(error).split())}); give a "
            "network that copy.deepcopy takes"
        ) from error


def run_on_meta(twin: nn.Module, input_size: Sequence[int]) -> Any:
    """Run a network that `meta_twin` made, in evaluation mode, and return its output.

    Args:
        twin: any network on the meta device that takes one tensor.
        input_size: the input's shape, batch included.

    Raises:
        Exception: whatever the network raises for an input of that shape.
    """
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    with evaluating(twin), torch.no_grad():
        return twin(torch.empty(tuple(input_size), dtype=dtype, device="meta"))


def check_size(input_size: object) -> tuple[int, ...]:
    """Return an input's shape as a tuple.

    Raises:
        ValueError: if it is not a sequence of whole numbers of at least 1.
    """
    size = tuple(input_size) if isinstance(input_size, Sequence) else ()
    if not size or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(
            f"input_size must be positive whole numbers, got {input_size!r}; write it as "
            "(1, 3, 224, 224)"
        )
    return size
