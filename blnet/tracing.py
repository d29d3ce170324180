"""Looking into a network without running it: on the meta device, and as a graph.

On the meta device every shape is there and no arithmetic; nothing of the network is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn


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


class _OwnCodeTracer(fx.Tracer):
    """Traces a module's own forward and takes every module it calls as one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace_own_code(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a module's own forward, in which every module it calls is one node.

    None where its code cannot be traced, or does something else in training than in evaluation:
    a graph would keep one of the two for good.
    """
    mode, graphs = module.training, []
    try:
        for training in (not mode, mode):
            module.training = training  # its own flag alone: what it calls is one node each
            graphs.append(_OwnCodeTracer().trace(module))
    except Exception:  # a user's forward may raise anything when it is given a proxy
        return None
    finally:
        module.training = mode
    texts = [str(graph) for graph in graphs]
    return graphs[1] if texts[0] == texts[1] else None
