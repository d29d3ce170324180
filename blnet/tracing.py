"""Looking into a network without running it: on the meta device, and as a graph.

On the meta device every shape is there and no arithmetic; nothing of the network is changed.
"""

from __future__ import annotations

import copy
import inspect
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from blnet.limits import out_of_memory


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
    return copied(model, memo)


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


@contextmanager
def exact_products() -> Iterator[None]:
    """Keep products of float32 in float32 meanwhile, whatever PyTorch may multiply them in."""
    backends: Any = torch.backends  # PyTorch's annotations lack what it makes at run time
    units = [
        *(backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul),
        *(backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul),
    ]
    before = [unit.fp32_precision for unit in units]
    older = _older_setting()
    # Both: where its older setting is at odds with the newer one, PyTorch refuses to multiply.
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    for unit in units:
        unit.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for unit, precision in zip(units, before, strict=True):
            unit.fp32_precision = precision


def _older_setting() -> str | None:
    """Return what PyTorch may multiply matrices in by its older setting; None if that is unused.

    It refuses to tell where a newer one says otherwise.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def run_on_meta(twin: nn.Module, input_size: Sequence[int]) -> Any:
    """Run a network that `meta_twin` made, in evaluation mode, and return its output.

    Tensors that its code makes itself are brought to the meta device where they meet others.

    Args:
        twin: any network on the meta device that takes one tensor.
        input_size: the input's shape, batch included.

    Raises:
        Exception: whatever the network raises for an input of that shape.
    """
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    with evaluating(twin), torch.no_grad(), _OnMeta():
        return twin(torch.empty(tuple(input_size), dtype=dtype, device="meta"))


class _OnMeta(TorchFunctionMode):
    """Lets code that was not written for the meta device run there.

    A tensor that is made on the CPU (torch.arange, a mask) goes to the meta device where another
    argument is there and PyTorch does not take the two together: not before, as code and PyTorch
    itself may read its values (lengths, indices).

    A batch normalisation's shape is given at once: on the meta device PyTorch decomposes it, which
    took most of the time of a network's run there.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.batch_norm and args and args[0].is_meta and args[0].ndim > 1:
            x, vectors = args[0], [*args[1:], *(kwargs.values() if kwargs else ())]
            sizes = {tuple(v.shape) for v in vectors if isinstance(v, torch.Tensor)}
            if sizes <= {(x.shape[1],)}:  # what does not fit is PyTorch's to tell
                return torch.empty_like(x)
        given = args, kwargs or {}
        try:
            return func(*given[0], **given[1])
        except Exception:
            if not _are_mixed(given):
                raise
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), given)
        return func(*args, **kwargs)


def _are_mixed(given: Any) -> bool:
    """Return whether some tensors of the arguments are on the meta device and some are not."""
    return len({leaf.is_meta for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)}) > 1


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


_AUTOCAST_DEVICES = ("cpu", "cuda")


def _modes() -> tuple[object, ...]:
    """Return what a with-block around operations may change."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        hooks(False) if hooks else None,  # activation checkpointing
        *(
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _AUTOCAST_DEVICES
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


def autocast_is_on() -> bool:
    """Return whether autocast is on for any device."""
    return any(torch.is_autocast_enabled(device) for device in _AUTOCAST_DEVICES)


@contextmanager
def autocast_switched(on: bool) -> Iterator[None]:
    """Switch autocast on or off on every device for the time being."""
    others = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device) != on]
    try:
        for device in others:
            torch.set_autocast_enabled(device, on)
        yield
    finally:
        for device in others:
            torch.set_autocast_enabled(device, not on)


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
