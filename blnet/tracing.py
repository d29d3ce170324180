"""Looking into a network as a graph: what its own code calls, and a copy of it."""

from __future__ import annotations

import copy
import inspect
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from blnet.limits import out_of_memory
from blnet.modes import AUTOCAST_DEVICES, autocast_switched

# What an addition calls in a graph: functions, and methods by name.
ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy of a network.

    Args:
        model: any network.
        memo: what takes the place of its tensors; None copies them.

    Raises:
        ValueError: if it cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except ValueError:  # ours, of an optimised network
        raise
    except Exception as error:  # whatever a module's own code raises
        if out_of_memory(error):
            raise
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({' '.join(str(error).split())[:300]}); give "
            "a network that copy.deepcopy takes"
        ) from error


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


class _RefusedError(Exception):
    """A module's code does what a graph does not keep."""


class _OwnCodeTracer(fx.Tracer):
    """Traces a module's own forward and takes every module it calls as one node.

    What a graph would not keep is refused: questions about values, and nodes in another mode of
    autograd or autocast than the code was called in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused = False  # for code that swallows the exception
        self.mode = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.mode:
            self.refuse()
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse()

    def iter(self, obj: fx.Proxy) -> Any:
        self.refuse()

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse()

    def refuse(self) -> NoReturn:
        self.refused = True
        raise _RefusedError


def _modes() -> tuple[object, ...]:
    """Return what a with-block around operations may change."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        hooks(False) if hooks else None,  # activation checkpointing
        *(
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in AUTOCAST_DEVICES
        ),
    )


class _NoArithmetic(TorchFunctionMode):
    """Refuses operations on tensors that are there: on a buffer, on a weight, random draws."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        traced = any(isinstance(part, fx.Proxy) for value in given for part in _flat(value))
        reads = getattr(func, "__name__", "") == "__get__"  # a shape, a dtype
        if not (traced or reads or func in _MODE_SETTERS):
            raise _RefusedError
        return func(*args, **kwargs)


_MODE_SETTERS = (torch._C._set_grad_enabled,)


def _flat(value: Any) -> Any:
    return value if isinstance(value, tuple | list) else (value,)


# Questions of type, which a proxy answers wrongly and without an error.
_TYPE_QUESTIONS = {"isinstance", "is_tensor", "issubclass"}


def _asks_for_types(module: nn.Module) -> bool:
    """Return whether a module's forward, or a method that it names, asks what something is."""
    seen: set[Any] = set()
    codes: list[Any] = [getattr(type(module).forward, "__code__", None)]
    while codes:
        code = codes.pop()
        if code is None or code in seen:
            continue
        seen.add(code)
        if _TYPE_QUESTIONS & set(code.co_names):
            return True
        codes += [constant for constant in code.co_consts if hasattr(constant, "co_names")]
        methods = (getattr(type(module), name, None) for name in code.co_names)
        # torch.nn.Module's own methods ask, and nothing in a graph depends on it.
        codes += [
            getattr(method, "__code__", None)
            for name, method in zip(code.co_names, methods, strict=True)
            if not hasattr(nn.Module, name)
        ]
    return False


def trace_own_code(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a module's own forward, in which every module it calls is one node.

    None where a graph would not do what the code does: where it cannot be traced, does something
    else in training than in evaluation or without autograd, draws random numbers, works under a
    mode of its own, asks for types, or changes the module or its layers. Nothing is changed by
    tracing.
    """
    if _asks_for_types(module):
        return None
    texts, graphs = [], []
    # Everything that code may ask for or switch is one thing the first time, another the second.
    for training, on in ((not module.training, False), (module.training, True)):
        with torch.set_grad_enabled(on), autocast_switched(not on):
            graph = _trace_once(module, training)
        if graph is None:
            return None
        graphs.append(graph)
        texts.append(str(graph))
    return graphs[1] if texts[0] == texts[1] else None


def trace_in_evaluation(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a module's own forward as it runs in evaluation, without autograd.

    As `trace_own_code`, but what the code does in training does not matter. Code with optional
    arguments is not taken: a graph is traced for one way of calling it.
    """
    # The code of TorchScript's modules is not Python's.
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if _asks_for_types(module) or not takes_one_argument_each(module):
        return None
    with torch.no_grad(), autocast_switched(False):
        return _trace_once(module, training=False)


def takes_one_argument_each(module: nn.Module) -> bool:
    """Return whether a module's forward is called in one way only: no defaults, no stars.

    A graph is traced for one way of calling; "if mask is not None" would be decided in it.
    """
    if "forward" in vars(module):
        return False
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    single = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return all(p.kind is single and p.default is p.empty for p in parameters)


def called_alone(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the pairs of layers that a graph calls once, the first's result going to the second.

    Of a Sequential it is the last layer that gives the result.
    """
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or node.kwargs:
            continue
        names = str(source.target), str(node.target)
        if len(source.users) == 1 and calls[names[0]] == calls[names[1]] == 1:
            yield _last(module.get_submodule(names[0])), module.get_submodule(names[1])


def _last(module: nn.Module) -> nn.Module:
    """Return the last layer of a Sequential, of anything else itself."""
    while type(module) is nn.Sequential and len(module) and not module._forward_hooks:
        module = module[-1]
    return module


def _trace_once(module: nn.Module, training: bool) -> fx.Graph | None:
    # What the code does to its module, it does to a twin that shares the layers.
    twin = object.__new__(type(module))
    object.__setattr__(twin, "__dict__", _copied(vars(module)))
    parts = [twin, *module.modules()]
    modes = [part.training for part in parts]
    for part in parts:
        part.__dict__["training"] = training
    before = [_copied(vars(part)) for part in parts]
    drawn, tracer = random.getstate(), _OwnCodeTracer()
    try:
        with _NoArithmetic():
            graph = tracer.trace(twin)
    except Exception:  # a user's forward may raise anything when it is given a proxy
        return None
    finally:
        changed = [not _same(vars(part), own) for part, own in zip(parts, before, strict=True)]
        for part, own, mode in zip(parts, before, modes, strict=True):
            if not _same(vars(part), own):
                object.__setattr__(part, "__dict__", own)
            part.__dict__["training"] = mode
        changed.append(random.getstate() != drawn)
        random.setstate(drawn)
    return None if tracer.refused or any(changed) else graph


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Copy a module's state and the containers in it, but not what they hold."""
    return {
        key: copy.copy(value) if isinstance(value, dict | list | set) else value
        for key, value in state.items()
    }


def _same(left: Any, right: Any) -> bool:
    """Return whether a value is what it was; of a container, whether it holds what it held."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, list | set) and isinstance(right, list | set):
        return [*map(id, left)] == [*map(id, right)]
    return left is right or (type(left) in (bool, int, float, str) and left == right)
