"""Bytes that a training step keeps for backward, counted by what autograd saves.

`saved_bytes` counts a run, on any device. `activation_bytes` counts a network without running it,
on tensors that have shapes and no data, as on a GPU: what fused ops keep can be counted on a
machine that cannot run them.

A plain ResNet-50 keeps 85.5 MB for one image of 224x224 in float32, Big-Little 62.7 MB (alpha 2,
beta 4) and 55.4 MB (alpha 4); with the image itself, 0.6 MB, which the first convolution keeps as
well, 86.1, 63.3 and 56.0. Part of that is the batch's and not an image's: BatchNorm's statistics,
0.2 MB, and a covariance of each fused op, 13 MB.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from blnet.meta import check_size


def saved_bytes(run: Callable[..., Any], *args: Any, apart: Iterable[Any] = ()) -> int:
    """Count the bytes that autograd keeps for backward during one call.

    A storage counts once, whole, however many operations keep it or a view of it. Parameters and
    buffers of `run`, where it is a module, and the tensors among the arguments are not counted:
    they are there anyway. Copies of weights in autocast's dtype are counted, and so is everything
    that fused ops keep. Not seen is what goes past autograd's hooks: tensors that an
    autograd.Function puts on its ctx as attributes, which torch's own do not and blnet's ops
    neither, and storages that inner hooks, such as those of torch.utils.checkpoint, keep.

    Args:
        run: what is called once, in the mode it is in: call `model.train()` first.
        args: its arguments; tensors, and modules where `run` is a function.
        apart: further tensors and modules that do not count.
    """
    apart_from = set(_storages((run, *args, *apart)))
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in apart_from:
            held[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run(*args)
    del result
    return sum(storage.nbytes() for storage in held.values())


def activation_bytes(
    model: nn.Module,
    input_size: Sequence[int] = (1, 3, 224, 224),
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    channels_last: bool = False,
) -> int:
    """Count what a network in training keeps for backward for an input, without running it.

    Nothing is computed or allocated, and no such device is needed: "cuda" counts fused ops as
    their kernels run, in every process; "cpu" counts plain PyTorch, unless kernels are interpreted.

    Args:
        model: any network that takes one tensor; it is not changed.
        input_size: the input's shape, batch included.
        dtype: torch.float16 or torch.bfloat16 count a step under autocast; BatchNorm's statistics
            then count two bytes a number where a CPU keeps four, below 0.2 MB a batch.
        device: where the step would run.
        channels_last: whether weights and input lie in channels-last (NHWC) order.

    Raises:
        ValueError: if input_size is no shape, or the network cannot be run on it.
    """
    size = check_size(input_size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with _fake_twin(model, device, layout) as twin:
        twin.train()
        x = torch.empty(size, device=device).contiguous(memory_format=layout)
        try:
            with _autocast(device, dtype):
                return saved_bytes(twin, x)
        except Exception as error:  # whatever a network raises
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"the network does not take an input of size {size} in training: {reason}"
            ) from error


def bytes_an_image(
    model: nn.Module, input_size: Sequence[int] = (1, 3, 224, 224), **options: Any
) -> int:
    """Count what one more sample in a batch keeps for backward, without running the network.

    What a batch keeps once, whatever its size, is not in it.

    Args:
        model: any network that takes one tensor.
        input_size: the input's shape; its first number does not matter.
        options: see :func:`activation_bytes`.

    Raises:
        ValueError: if input_size is no shape, or the network cannot be run on it.
    """
    _, *sample = check_size(input_size)
    two, four = (activation_bytes(model, (batch, *sample), **options) for batch in (2, 4))
    return (four - two) // 2


@contextmanager
def _fake_twin(model: nn.Module, device: str, layout: torch.memory_format) -> Iterator[nn.Module]:
    """Give a copy of a network whose tensors have no data, and make new tensors like those."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    memo: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                twin = nn.Parameter(
                    _without_data(parameter, device, layout), parameter.requires_grad
                )
                memo.setdefault(id(parameter), twin)
            for buffer in module.buffers(recurse=False):
                memo.setdefault(id(buffer), _without_data(buffer, device, layout))
    network = copy.deepcopy(model, memo)
    with mode, torch.enable_grad():
        yield network


@contextmanager
def _autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Switch autocast on, which torch.autocast refuses for a device that is not here."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    try:
        if dtype is not torch.float32:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


def _without_data(tensor: Tensor, device: str, layout: torch.memory_format) -> Tensor:
    twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return twin.contiguous(memory_format=layout) if twin.dim() == 4 else twin


def _storages(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, nn.Module):
            yield from _storages((*value.parameters(), *value.buffers()))
        elif isinstance(value, Tensor):
            yield value.untyped_storage()._cdata
