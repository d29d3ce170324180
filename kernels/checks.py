"""Checks of an op's arguments: each failure is one sentence that says what to do."""

from __future__ import annotations

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_map(op: str, name: str, value: object) -> None:
    """Check that an argument is a (N, C, H, W) floating-point tensor.

    Args:
        op: the op's name.
        name: the argument's name.
        value: the argument.

    Raises:
        ValueError: if it is not a tensor, not of rank 4, or not of a supported dtype.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}; "
            "pass a tensor of shape (N, C, H, W)"
        )
    if value.dim() != 4:
        raise ValueError(
            f"{op}: {name} must have 4 dimensions (N, C, H, W), got shape {tuple(value.shape)}; "
            "add the missing ones with unsqueeze"
        )
    if value.dtype not in FLOATS:
        raise ValueError(
            f"{op}: {name} must be float32, float16, bfloat16 or float64, got {value.dtype}; "
            f"convert it, for example with {name}.float()"
        )


def check_same_kind(op: str, **tensors: torch.Tensor) -> None:
    """Check that tensors share one device and one dtype.

    Args:
        op: the op's name.
        tensors: the arguments by name.

    Raises:
        ValueError: naming the first argument that differs from the first one given.
    """
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {first_name} is on {str(first.device)!r} and {name} on "
                f"{str(tensor.device)!r}; move one with .to(device)"
            )
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{op}: {first_name} is {first.dtype} and {name} is {tensor.dtype}; convert one "
                "with .to(dtype), or run under torch.autocast, which promotes to the wider"
            )


def check_merge_sizes(op: str, big: torch.Tensor, little: torch.Tensor) -> None:
    """Check that big can be upsampled to little and added to it.

    Args:
        op: the op's name.
        big: shape (N, C, H_big, W_big).
        little: shape (N, C, H, W).

    Raises:
        ValueError: if N or C differ, or big has no pixel to copy from.
    """
    if big.shape[0] != little.shape[0] or big.shape[1] != little.shape[1]:
        raise ValueError(
            f"{op}: big and little must have the same N and C, got shapes {tuple(big.shape)} and "
            f"{tuple(little.shape)}; project the channels with a 1x1 convolution first"
        )
    for axis, size in ((2, "height"), (3, "width")):
        if big.shape[axis] == 0 and little.shape[axis] != 0:
            raise ValueError(
                f"{op}: big has {size} 0 and little {size} {little.shape[axis]}, so there is no "
                f"pixel to copy; give big at least one, got shape {tuple(big.shape)}"
            )


def check_vector(
    op: str, name: str, value: object, channels: int, like: torch.Tensor, device: bool = True
) -> None:
    """Check that an optional argument holds one floating-point number for every channel.

    Args:
        op: the op's name.
        name: the argument's name.
        value: the argument; None passes.
        channels: how many it must hold.
        like: the tensor whose device it must be on.
        device: False leaves the device unchecked.

    Raises:
        ValueError: if it is not a tensor of shape (channels,), of a float dtype, on that device.
    """
    if value is None:
        return
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{op}: {name} must be a torch.Tensor or None, got {type(value).__name__}; "
            f"pass a tensor of shape ({channels},)"
        )
    if tuple(value.shape) != (channels,) or value.dtype not in FLOATS:
        raise ValueError(
            f"{op}: {name} must hold one floating-point number for each of {channels} channels, "
            f"got shape {tuple(value.shape)} of {value.dtype}; pass shape ({channels},)"
        )
    if device and value.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {str(value.device)!r} and the map on {str(like.device)!r}; "
            "move one with .to(device)"
        )


def check_weight(op: str, weight: object, x: torch.Tensor) -> None:
    """Check that an argument is the weight of a 1x1 convolution of x.

    Args:
        op: the op's name.
        weight: the argument.
        x: the map, shape (N, K, H, W).

    Raises:
        ValueError: if its shape is neither (C, K) nor (C, K, 1, 1).
    """
    if not isinstance(weight, torch.Tensor):
        raise ValueError(
            f"{op}: weight must be a torch.Tensor, got {type(weight).__name__}; "
            "pass a tensor of shape (C, K, 1, 1)"
        )
    shape = tuple(weight.shape)
    if len(shape) not in (2, 4) or shape[1] != x.shape[1] or shape[2:] not in ((), (1, 1)):
        raise ValueError(
            f"{op}: weight must have shape (C, K) or (C, K, 1, 1) with K = {x.shape[1]}, the "
            f"channels of x, got {shape}; only ungrouped 1x1 convolutions can be fused"
        )


def check_expand_merge(
    op: str,
    x: object,
    weight: object,
    big: object,
    **vectors: object,
) -> None:
    """Check the arguments that every form of expand_merge shares.

    Args:
        op: the op's name.
        x: shape (N, K, H, W).
        weight: shape (C, K) or (C, K, 1, 1).
        big: shape (N, C, H_big, W_big), or None.
        vectors: arguments of shape (C,), or None, by name.

    Raises:
        ValueError: naming the first argument that does not fit.
    """
    check_map(op, "x", x)
    assert isinstance(x, torch.Tensor)
    check_weight(op, weight, x)
    assert isinstance(weight, torch.Tensor)
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, vector in vectors.items():
        check_vector(op, name, vector, weight.shape[0], x)
    if not autocast:
        check_same_kind(op, x=x, weight=weight)
    if big is None:
        return
    check_map(op, "big", big)
    assert isinstance(big, torch.Tensor)
    check_upsampling(op, big, x, weight.shape[0])
    if not autocast:
        check_same_kind(op, x=x, big=big)


def check_upsampling(op: str, big: torch.Tensor, x: torch.Tensor, channels: int) -> None:
    """Check that big can be upsampled to x's size and has the convolution's channels.

    Raises:
        ValueError: if N or C differ, or big has no pixel to copy from.
    """
    if big.shape[0] != x.shape[0] or big.shape[1] != channels:
        raise ValueError(
            f"{op}: big must have N = {x.shape[0]} like x and C = {channels} like weight, got "
            f"shape {tuple(big.shape)}"
        )
    for axis, size in ((2, "height"), (3, "width")):
        if big.shape[axis] == 0 and x.shape[axis] != 0:
            raise ValueError(
                f"{op}: big has {size} 0 and x {size} {x.shape[axis]}, so there is no pixel to "
                f"copy; give big at least one, got shape {tuple(big.shape)}"
            )
