"""Looking into a network without running it: on the meta device, and as a graph.

On the meta device every shape is there and no arithmetic; nothing of the network is changed.
"""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable, Iterator, Sequence
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


class _Proxy(fx.Proxy):
    """A proxy to which ``x += y`` is not ``x = x + y``: others may hold the tensor that changes."""


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy(
        "call_function", function, (self, other), {}
    )


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _OwnCodeTracer(fx.Tracer):
    """Traces a module's own forward and takes every module it calls as one node."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace_own_code(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a module's own forward, in which every module it calls is one node.

    None where a graph would not do what the code does: where it cannot be traced, does something
    else in training than in evaluation, draws random numbers, or changes the module. Nothing is
    changed by tracing.
    """
    texts, graphs = [], []
    for training in (not module.training, module.training):
        graph = _trace_once(module, training)
        if graph is None:
            return None
        graphs.append(graph)
        texts.append(str(graph))
    return graphs[1] if texts[0] == texts[1] else None


def _trace_once(module: nn.Module, training: bool) -> fx.Graph | None:
    # What the code does to its module, it does to a twin that shares the layers.
    twin = object.__new__(type(module))
    own = {key: _own(value) for key, value in vars(module).items()}
    object.__setattr__(twin, "__dict__", {key: _own(value) for key, value in own.items()})
    modes = {part: part.training for part in module.modules()}
    drawn = _random_states()
    try:
        for part in (twin, *modes):
            part.training = own["training"] = training
        graph = _OwnCodeTracer().trace(twin)
    except Exception:  # a user's forward may raise anything when it is given a proxy
        return None
    finally:
        for part, mode in modes.items():
            part.training = mode
        changed = _random_states() != drawn
        _restore_random_states(drawn)
    if changed or vars(twin).keys() != own.keys():
        return None
    return graph if all(_same(vars(twin)[key], value) for key, value in own.items()) else None


def _own(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def _same(left: Any, right: Any) -> bool:
    """Return whether a value is what it was; of a container, whether it holds what it held."""
    if isinstance(left, dict) and isinstance(right, dict):
        return [*map(id, left)] == [*map(id, right)] and all(left[k] is right[k] for k in left)
    if isinstance(left, list | set) and isinstance(right, list | set):
        return [*map(id, left)] == [*map(id, right)]
    return left is right


def _random_states() -> tuple[Any, bytes]:
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


def _restore_random_states(states: tuple[Any, bytes]) -> None:
    random.setstate(states[0])
    torch.set_rng_state(torch.frombuffer(bytearray(states[1]), dtype=torch.uint8))
