"""Running a network on the meta device, where every shape is there and no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from blnet.modes import evaluating
from blnet.tracing import copied


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
