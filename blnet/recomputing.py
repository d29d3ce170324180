"""Recomputed normalisation: of convolution, BatchNorm and ReLU one map is kept, not two.

    with blnet.recomputing.recomputing():
        loss = model(x)
    loss.backward()

BatchNorm keeps its input y for backward, and the ReLU after it and whatever reads that keep
a = relu(norm(y)), which is as large. Here what would keep a gets a recipe, (y, weight, bias), and
a is computed again when backward asks for it: once for all that ask, by the very operations of the
forward pass, batch statistics included, so that it has the same bits where those have. Running
statistics have no part in it. The price is one more forward pass of each such BatchNorm.

It works on torch's own calls, not on modules: F.batch_norm in training and the ReLUs, by a torch
function mode, and whatever keeps tensors for backward, by saved-tensor hooks. So it needs no
knowledge of the network, any operation may read a, and any number of them. An autograd.Function
for norm, ReLU and convolution together would have to be written once for each reader.

What is known of a tensor goes by its storage and its version. A tensor that was changed in place
since is kept as it is; a kept one that is changed before backward raises a RuntimeError, which
torch leaves out where there are hooks. Hooks further out (offloading, torch.utils.checkpoint, a
count of bytes) get what is kept here, a recipe's y included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class _Packed(Protocol):
    def unpack(self) -> Tensor: ...


def hooks_allowed() -> bool:
    """Return whether saved-tensor hooks may be set: not in torch.func's transforms, say."""
    enabled: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return enabled


def outer_hooks() -> Hooks | None:
    """Return the saved-tensor hooks that are at work now, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


class recomputing(TorchFunctionMode):  # noqa: N801 - used like a function
    """Run a forward pass of which backward recomputes relu(norm(y)) rather than keep it.

    Used as ``with recomputing(): out = model(x)``; backward may come after it. Not under
    torch.compile, whose partitioner decides by itself what to recompute.

    Raises:
        RuntimeError: on entering, where torch forbids saved-tensor hooks (torch.func).
    """

    def __enter__(self) -> recomputing:
        """Begin; nothing is known of any tensor."""
        self._recipes: dict[int, _Tag] = {}
        self._result: _Recipe | None = None  # of the ReLU that runs now
        self._outer = outer_hooks()
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End; recipes that something keeps live on, the rest is forgotten."""
        super().__exit__(*error)
        self._hooks.__exit__(*error)
        self._recipes.clear()
        self._outer = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a call and note the recipe of what it returns, if it is one of those."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            out = func(*args, **kwargs)
            self._note(out, _norm_recipe(*args, **kwargs))
            return out
        if func in _RELUS:
            given = args[0] if args else kwargs["input"]
            recipe = self._recipe_of(given)  # before it is changed in place
            if recipe is None or recipe.relu:
                return func(*args, **kwargs)
            return self._relu(func, args, kwargs, _Recipe(recipe.norm, relu=True))
        return func(*args, **kwargs)

    def _relu(self, func: Any, args: Any, kwargs: Any, recipe: _Recipe) -> Tensor:
        """Run a ReLU, which keeps its own result before anybody has seen that."""
        self._result = recipe
        try:
            out: Tensor = func(*args, **kwargs)
        finally:
            self._result = None
        self._note(out, recipe)
        return out

    def _note(self, out: Tensor, recipe: _Recipe | None) -> None:
        self._recipes = {key: tag for key, tag in self._recipes.items() if not tag.expired()}
        if recipe is not None and out.requires_grad:
            tag = _Tag(StorageWeakRef(out.untyped_storage()), _look_of(out), recipe)
            self._recipes[tag.storage.cdata] = tag

    def _recipe_of(self, tensor: Tensor) -> _Recipe | None:
        """Return how to compute a tensor that is as it was when it was noted, or None."""
        if is_traceable_wrapper_subclass(tensor):
            return None
        tag = self._recipes.get(tensor.untyped_storage()._cdata)
        if tag is None or tag.expired() or tag.look != _look_of(tensor):
            return None
        return tag.recipe

    def _pack(self, tensor: Tensor) -> _Packed:
        recipe = self._result or self._recipe_of(tensor)
        if recipe is not None and recipe.norm.y_is_as_it_was():
            return recipe.packed(self._keep)
        return self._keep(tensor)

    def _keep(self, tensor: Tensor) -> _Packed:
        return _Kept(tensor, tensor._version) if self._outer is None else _Handed(
            self._outer[1], self._outer[0](tensor)
        )  # fmt: skip


def _unpack(packed: _Packed) -> Tensor:
    return packed.unpack()


def _look_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor from others that share its storage, and from its past."""
    return tensor._version, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


@dataclass(frozen=True)
class _Tag:
    """A tensor's recipe; the weak reference keeps its storage's address from being used again."""

    storage: StorageWeakRef
    look: tuple[Any, ...]
    recipe: _Recipe

    def expired(self) -> bool:
        return bool(self.storage.expired())


@dataclass(frozen=True)
class _Kept:
    """A tensor that is kept as it is."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(self.tensor.shape)} is at version "
                f"{self.tensor._version}, expected {self.version}"
            )
        return self.tensor


@dataclass(frozen=True)
class _Handed:
    """A tensor that hooks further out keep."""

    outer: Callable[[Any], Tensor]
    packed: Any

    def unpack(self) -> Tensor:
        return self.outer(self.packed)


class _Norm:
    """A call of batch_norm in training; y is detached, so that no graph hangs on it."""

    def __init__(self, y: Tensor, affine: tuple[Tensor | None, Tensor | None], eps: float) -> None:
        self.y: Tensor | None = y.detach()
        self.version = y._version
        self.affine = [t if t is None else _Kept(t.detach(), t._version) for t in affine]
        self.eps = eps
        self.packed: _Packed | None = None

    def y_is_as_it_was(self) -> bool:
        return self.y is None or self.y._version == self.version

    def pack(self, keep: Callable[[Tensor], _Packed]) -> None:
        """Keep y as everything else is kept, once."""
        if self.y is not None:
            self.packed, self.y = keep(self.y), None

    @torch.no_grad()
    def compute(self) -> Tensor:
        assert self.packed is not None
        weight, bias = (None if kept is None else kept.unpack() for kept in self.affine)
        return F.batch_norm(self.packed.unpack(), None, None, weight, bias, True, 0.0, self.eps)


class _Recipe:
    """How to compute norm(y) or relu(norm(y)) again: once for all that keep it."""

    def __init__(self, norm: _Norm, relu: bool = False) -> None:
        self.norm = norm
        self.relu = relu
        self._kept = self._asked = 0
        self._value: Tensor | None = None

    def packed(self, keep: Callable[[Tensor], _Packed]) -> _Recipe:
        self.norm.pack(keep)
        self._kept += 1
        return self

    def unpack(self) -> Tensor:
        value = self._value
        if value is None:
            value = self.norm.compute()
            value = torch.relu_(value) if self.relu else value
        # The last that asks takes it along; in a second backward pass it begins anew.
        self._asked += 1
        self._value = None if self._asked % self._kept == 0 else value
        return value


def _norm_recipe(
    y: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Recipe | None:
    """Return the recipe of a call of F.batch_norm; None where the result is not y's alone."""
    if not training or is_traceable_wrapper_subclass(y):
        return None
    return _Recipe(_Norm(y, (weight, bias), eps))


__all__ = ["hooks_allowed", "outer_hooks", "recomputing"]
