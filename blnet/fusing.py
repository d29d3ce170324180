"""Putting fused ops into networks: conv + BatchNorm + add + ReLU becomes one op, in any network.

    model = blnet.fuse(model)              # ours, converted, torchvision's, timm's or your own
    for fusion in blnet.fusions(model):
        print(fusion)

What is looked for, in the code of every module: a 1x1 convolution without bias, its BatchNorm and
the add (or the merge) that takes its result, with the ReLU after it if there is one. That is
conv3 + bn3 + shortcut of every bottleneck and the little branch's end in a Big-Little module. In
training such a layer then saves its input and its result for backward, and neither the
convolution's output nor BatchNorm's.

A module is fused in place of its code, not of its layers: it stays the same object with the same
parameters, buffers and keys in state_dict, and gets a class derived from its own with another
`forward`. Copies and pickles of it are fused again, and `unfuse` brings the original code back.
Layers that are exchanged later, or get hooks, run one by one from then on, and setting any other
attribute of a fused module brings its original code back, which may depend on it. Code that a
graph cannot stand for is left alone: with optional arguments, with random numbers, with changes to
its module, with something else in training than in evaluation. torch.jit.script and torch.func's
transforms do not take fused networks; fuse after them, or not at all.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import fx, nn

from blnet.fusion_sites import Fusion, look
from blnet.tracing import copied


class Fused:
    """What the class of every fused module is derived from, beside the module's own class."""

    fused_from: ClassVar[type[nn.Module]]
    fused_sites: ClassVar[tuple[Fusion, ...]]

    def __setattr__(self, name: str, value: Any) -> None:
        """Bring the original code back where it may depend on what changes.

        The mode is no such thing, nor are torch's own notes, nor a layer in a layer's place.
        """
        own = self.fused_from
        old = self.__dict__.get("_modules", {}).get(name)
        exchange = isinstance(old, nn.Module) and isinstance(value, nn.Module)
        if not (exchange or name == "training" or name.startswith("_")):
            _give_back_code(self)
        own.__setattr__(self, name, value)  # type: ignore[arg-type]

    def __delattr__(self, name: str) -> None:
        """Bring the original code back, which may ask for what is gone."""
        own = self.fused_from
        _give_back_code(self)
        own.__delattr__(self, name)  # type: ignore[arg-type]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Bring the original code back and register a parameter."""
        _give_back_code(self)
        nn.Module.register_parameter(self, name, param)  # type: ignore[arg-type]

    def register_buffer(
        self, name: str, tensor: torch.Tensor | None, persistent: bool = True
    ) -> None:
        """Bring the original code back and register a buffer."""
        _give_back_code(self)
        nn.Module.register_buffer(self, name, tensor, persistent)  # type: ignore[arg-type]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Put a layer in a layer's place, or bring the original code back and add one."""
        if not isinstance(self.__dict__["_modules"].get(name), nn.Module) or module is None:
            _give_back_code(self)
        nn.Module.add_module(self, name, module)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the module as one of its own class, to be fused again: this class has no home."""
        if issubclass(self.fused_from, fx.GraphModule):
            return _fuse_module, (_plain(self, self.__dict__),)
        # The object first and what is in it later, so that it may hold itself.
        return object.__new__, (self.fused_from,), self.__dict__, None, None, _restore

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the module as one of its own class, and fuse the copy."""
        if issubclass(self.fused_from, fx.GraphModule):
            return _fuse_module(copy.deepcopy(_plain(self, self.__dict__), memo))
        twin = memo[id(self)] = _plain(self, {})
        return _restore(twin, copy.deepcopy(self.__dict__, memo))

    def __copy__(self) -> Any:
        """Copy the module, but not its layers, and fuse the copy."""
        return _fuse_module(_plain(self, dict(self.__dict__)))


def _give_back_code(module: Any) -> None:
    """Give a fused module its own class again, unless somebody derived another from the fused."""
    if "fused_from" in vars(type(module)):
        object.__setattr__(module, "__class__", module.fused_from)


def fuse(model: nn.Module) -> nn.Module:
    """Return a copy of a network in which fused ops run wherever they can.

    On a GPU they are Triton kernels; where no kernel runs (a CPU, float64) the copy computes what
    the network computes. Parameter and buffer names do not change, so that checkpoints move both
    ways, and training, evaluation, autocast, torch.compile and DDP go on as before. Call it after
    a conversion.

    Args:
        model: any network; it is left as it is.

    Returns:
        The copy; of a network without such a place a plain copy. See :func:`fusions`.

    Raises:
        ValueError: if the network cannot be copied.
    """
    model = copied(model)
    for module in list(model.modules()):
        _fuse_module(module)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Return a copy of a network that :func:`fuse` made, with its original code.

    Raises:
        ValueError: if the network cannot be copied.
    """
    model = copied(model)
    for module in model.modules():
        _give_back_code(module)
    return model


def fusions(model: nn.Module) -> list[Fusion]:
    """List the places in a network that run as one op and those that were found but cannot.

    Args:
        model: any network, fused or not; for one that is not, no place runs as one op yet.

    Returns:
        One :class:`Fusion` for each, in the order of the network's modules.
    """
    found = []
    for name, module in model.named_modules():
        sites = module.fused_sites if isinstance(module, Fused) else look(module)[1]
        prefix = f"{name}." if name else ""
        for site in sites:
            reason = site.reason
            if not reason and not isinstance(module, Fused):
                reason = "the network is not fused; call blnet.fuse"
            names = (prefix + site.conv, prefix + site.norm)
            found.append(Fusion(name, *names, site.relu, site.merge, reason))
    return found


def _fuse_module(module: nn.Module) -> nn.Module:
    """Give a module a class with fused code, in place, if there is anything to fuse."""
    if isinstance(module, Fused):
        return module
    graph, sites = look(module)
    if graph is None or all(site.reason for site in sites):
        return module
    own = type(module)
    members = {
        "forward": type(fx.GraphModule(module, graph)).forward,
        "fused_from": own,
        "fused_sites": tuple(sites),
        "__module__": own.__module__,
        "__doc__": own.__doc__,
    }
    module.__class__ = type(f"Fused{own.__name__}", (Fused, own), members)
    return module


def _plain(module: Any, state: dict[str, Any]) -> nn.Module:
    """Return a module of the class before fusing with this state."""
    plain: nn.Module = object.__new__(module.fused_from)
    object.__setattr__(plain, "__dict__", state)
    return plain


def _restore(module: nn.Module, state: dict[str, Any]) -> nn.Module:
    module.__dict__.update(state)
    return _fuse_module(module)


__all__ = ["Fused", "Fusion", "fuse", "fusions", "unfuse"]
