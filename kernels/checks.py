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
