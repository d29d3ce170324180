"""`blnet.optimize(model, mode="train")`: fused training ops and recomputed normalisation.

The network stays the network: the same modules, parameters, buffers and keys. `blnet.fuse` gives
its blocks fused code; the network itself gets a class derived from its own, whose forward pass
runs under what was chosen for it, and which has `explain()`. Copies and pickles keep all of that,
so that an average of the weights, DistributedDataParallel and checkpoints need not know of it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from blnet.fusing import Fused, _fuse_module, _give_back_code, fuse, fusions
from blnet.kernels import merge, reference
from blnet.kernels.merge import merge_op
from blnet.optimizing.report import Change, Report
from blnet.recomputing import hooks_allowed, recomputing
from blnet.tracing import copied, trace_own_code

OPS = ("expand_merge", "merge")


@dataclass(frozen=True)
class TrainingChoices:
    """What was chosen for a network.

    Attributes:
        recompute: whether backward recomputes normalisation and ReLU.
        without: ops that do not run.
    """

    recompute: bool = False
    without: tuple[str, ...] = ()


class Optimized:
    """What the class of a network optimised for training is derived from, beside its own class."""

    optimized_from: ClassVar[type[nn.Module]]
    choices: ClassVar[TrainingChoices]

    def explain(self) -> None:
        """Print what runs as what, and what was left as it is and why, a line each."""
        print(training_report(self))  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the network as one of its own class, to be optimised again."""
        own = _original_class(self)
        if issubclass(own, fx.GraphModule):
            return _optimized, (_plain(self), self.choices, isinstance(self, Fused))
        state = (self.__dict__, self.choices, isinstance(self, Fused))
        # The object first and what is in it later, so that it may hold itself.
        return object.__new__, (own,), state, None, None, _restore

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the network as one of its own class, and optimise the copy."""
        own, fused = _original_class(self), isinstance(self, Fused)
        if issubclass(own, fx.GraphModule):
            return _optimized(copy.deepcopy(_plain(self), memo), self.choices, fused)
        twin = memo[id(self)] = object.__new__(own)
        return _restore(twin, (copy.deepcopy(self.__dict__, memo), self.choices, fused))

    def __copy__(self) -> Any:
        """Copy the network, but not its layers, and optimise the copy."""
        return _optimized(_plain(self, copied=True), self.choices, isinstance(self, Fused))


def optimize_training(
    model: nn.Module, *, recompute: bool = False, without: Collection[str] = ()
) -> nn.Module:
    """Return a copy of a network that trains with fused ops.

    On a GPU they are Triton kernels, which keep neither the output of an expanding convolution nor
    its normalisation's for backward; where no kernel runs (a CPU, float64) the copy computes what
    the network computes. Parameters, buffers and keys do not change. Autocast, torch.compile, DDP,
    averages of the weights and activation checkpointing go on as before. Call it after a
    conversion.

    Recomputing works on every device, alone and with fused ops: see `blnet.recomputing`. It does
    nothing under torch.compile, whose partitioner decides what is recomputed, in torch.func's
    transforms, and for the batch statistics that SyncBatchNorm shares between processes.

    Args:
        model: any network; it is left as it is. One that was optimised before is optimised anew.
        recompute: whether backward computes relu(norm(y)) again rather than keep it beside y.
        without: ops to leave out, for debugging: "expand_merge" runs layer by layer then, "merge"
            as plain PyTorch, in this network alone.

    Returns:
        The copy. Its class is derived from the model's and has `explain()`.

    Raises:
        ValueError: if `without` names an op that there is not.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(without, Collection):
        raise ValueError(f"without must be names of training ops, got {without!r}")
    names = (without,) if isinstance(without, str) else tuple(without)
    for name in names:
        if name not in OPS:
            raise ValueError(
                f"without: no training op {name!r}; choose from {', '.join(map(repr, OPS))}"
            )
    choices = TrainingChoices(bool(recompute), tuple(op for op in OPS if op in names))
    network = _undone(model)
    if "expand_merge" not in choices.without:
        network = fuse(network)
    return _optimized(network, choices)


def training_report(model: nn.Module) -> Report:
    """Say what runs as what in training, and what was left as it is and why.

    Args:
        model: any network; of one that was not optimised every place is left as it is.
    """
    choices = getattr(model, "choices", None) if isinstance(model, Optimized) else None
    tensor = next((t for t in model.parameters() if t.is_floating_point()), torch.empty(0))
    name = (getattr(model, "optimized_from", None) or type(model)).__name__
    done = "pytorch" if choices is None else "kernels where they run, otherwise pytorch"
    changes = [*_fused_changes(model, choices), *_merge_changes(model, choices)]
    changes += _norm_changes(model, choices)
    report = Report(name, "train", str(tensor.device), str(tensor.dtype)[6:], done)
    report.changes = changes
    return report


def _fused_changes(model: nn.Module, choices: TrainingChoices | None) -> Iterator[Change]:
    off = "the network is not optimised; call blnet.optimize(model, mode='train')"
    if choices is not None and "expand_merge" in choices.without:
        off = "expand_merge is switched off by without"
    for place in fusions(model):
        was = str(place).split(":")[0]
        reason = off if "is not fused" in place.reason else place.reason
        now = "" if reason else "expand_merge, which keeps the convolution's input and its result"
        yield Change(place.module, was, now, reason)


def _merge_changes(model: nn.Module, choices: TrainingChoices | None) -> Iterator[Change]:
    """Yield the merges that are not part of an expand_merge: of blocks without a 1x1 at the end."""
    reason = ""
    if choices is not None and "merge" in choices.without:
        reason = "merge is switched off by without"
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.") or not any(module.children()):
            continue
        graph = trace_own_code(_plain(module) if isinstance(module, Optimized) else module)
        calls = [node for node in graph.nodes if node.target is merge] if graph else []
        for _ in calls:
            yield Change(name, "add + relu", "" if reason else "merge, which keeps its result",
                         reason)  # fmt: skip


def _norm_changes(model: nn.Module, choices: TrainingChoices | None) -> Iterator[Change]:
    """Yield the normalisations of which more or less is kept than of plain batch normalisation."""
    if choices is None or not choices.recompute:
        return
    fused = {place.norm for place in fusions(model) if not place.reason}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if name in fused or "norm" not in kind.lower() or any(module.children()):
            continue
        if isinstance(module, nn.SyncBatchNorm):
            yield Change(
                name, kind, reason="statistics shared between processes are not recomputed"
            )
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield Change(name, kind, "recomputed in backward, with the ReLU after it if any")
        else:
            yield Change(name, kind, reason="only batch normalisation is recomputed")


# The derived class -----------------------------------------------------------------------------


class _PlainMerge(TorchFunctionMode):
    """Runs merge as PyTorch's own operations."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is merge_op or getattr(func, "_overloadpacket", None) is merge_op:
            return reference.merge(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _running(choices: TrainingChoices) -> Iterator[None]:
    """Run a forward pass under what was chosen."""
    ways: list[AbstractContextManager[Any]] = []
    if "merge" in choices.without:
        ways.append(_PlainMerge())
    if choices.recompute and torch.is_grad_enabled() and hooks_allowed():
        ways.append(recomputing())
    with ExitStack() as stack:
        for way in ways:
            stack.enter_context(way)
        yield


def _optimized(module: nn.Module, choices: TrainingChoices, fused: bool = False) -> nn.Module:
    """Give a network a class whose forward pass runs under what was chosen, in place."""
    if fused:
        _fuse_module(module)
    own = type(module)
    own_forward = own.forward
    plain_merge = "merge" in choices.without

    @functools.wraps(own_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            with _running(choices):
                return own_forward(self, *args, **kwargs)
        if plain_merge:
            with _PlainMerge():
                return own_forward(self, *args, **kwargs)
        return own_forward(self, *args, **kwargs)

    members: dict[str, Any] = {
        "forward": forward,
        "optimized_from": own,
        "choices": choices,
        "__module__": own.__module__,
        "__doc__": own.__doc__,
    }
    bases: tuple[type, ...] = (Optimized, own)
    if issubclass(own, Fused):
        # Where an attribute is set that its code may depend on, it gets its own class back.
        members |= {"fused_from": own.fused_from, "fused_sites": own.fused_sites}
    module.__class__ = type(f"Optimized{own.__name__}", bases, members)
    return module


def _original_class(module: Any) -> type[nn.Module]:
    own: type[nn.Module] = module.fused_from if isinstance(module, Fused) else module.optimized_from
    return own


def _plain(module: Any, copied: bool = False) -> nn.Module:
    """Return a module of the original class with the same state, or a shallow copy of it."""
    plain: nn.Module = object.__new__(_original_class(module))
    object.__setattr__(plain, "__dict__", dict(module.__dict__) if copied else module.__dict__)
    return plain


def _restore(module: nn.Module, state: tuple[dict[str, Any], TrainingChoices, bool]) -> nn.Module:
    module.__dict__.update(state[0])
    return _optimized(module, *state[1:])


def _undone(model: nn.Module) -> nn.Module:
    """Return a copy of a network in which nothing is optimised or fused."""
    network = copied(model)
    for module in network.modules():
        if isinstance(module, Optimized):
            object.__setattr__(module, "__class__", _original_class(module))
        else:
            _give_back_code(module)
    return network


__all__ = ["OPS", "Optimized", "TrainingChoices", "optimize_training", "training_report"]
