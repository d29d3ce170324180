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
    check_same_device(op, **tensors)
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{op}: {first_name} is {first.dtype} and {name} is {tensor.dtype}; convert one "
                "with .to(dtype), or run under torch.autocast, which promotes to the wider"
            )


def check_same_device(op: str, **tensors: torch.Tensor) -> None:
    """Check that tensors share one device, as they must under autocast too.

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


def check_vector(op: str, name: str, value: object, channels: int, like: torch.Tensor) -> None:
    """Check that an optional argument holds one floating-point number for every channel.

    Args:
        op: the op's name.
        name: the argument's name.
        value: the argument; None passes.
        channels: how many it must hold.
        like: the tensor whose device it must be on.

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
    if value.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {str(value.device)!r} and the map on {str(like.device)!r}; "
            "move one with .to(device)"
        )


def check_weight(
    op: str,
    weight: object,
    channels: int,
    name: str = "weight",
    of: str = "the channels of x",
    kernel: int = 1,
) -> None:
    """Check that an argument is the weight of an ungrouped 1x1 or 3x3 convolution.

    Args:
        op: the op's name.
        weight: the argument.
        channels: K, of the map that it is applied to.
        name: the argument's name.
        of: what those channels are, in words.
        kernel: 1 or 3.

    Raises:
        ValueError: if its shape is not (C, K, kernel, kernel), nor (C, K) for kernel 1.
    """
    size = f"(C, K, {kernel}, {kernel})"
    if not isinstance(weight, torch.Tensor):
        raise ValueError(
            f"{op}: {name} must be a torch.Tensor, got {type(weight).__name__}; "
            f"pass a tensor of shape {size}"
        )
    shape = tuple(weight.shape)
    tails = ((), (1, 1)) if kernel == 1 else ((kernel, kernel),)
    if len(shape) < 2 or shape[1] != channels or shape[2:] not in tails:
        sizes = f"(C, K) or {size}" if kernel == 1 else size
        raise ValueError(
            f"{op}: {name} must have shape {sizes} with K = {channels}, {of}, got {shape}; only "
            f"ungrouped {kernel}x{kernel} convolutions can be fused"
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
    check_weight(op, weight, x.shape[1])
    assert isinstance(weight, torch.Tensor)
    for name, vector in vectors.items():
        check_vector(op, name, vector, weight.shape[0], x)
    _check_kind(op, x=x, weight=weight)
    if big is None:
        return
    check_map(op, "big", big)
    assert isinstance(big, torch.Tensor)
    check_upsampling(op, big, x, weight.shape[0])
    _check_kind(op, x=x, big=big)


def check_upsampling(
    op: str, big: torch.Tensor, x: torch.Tensor, channels: int, weight: str = "weight"
) -> None:
    """Check that big can be upsampled to x's size and has the convolution's channels.

    Args:
        op: the op's name.
        big: shape (N, C, H_big, W_big).
        x: shape (N, K, H, W).
        channels: C.
        weight: name of the convolution's weight.

    Raises:
        ValueError: if N or C differ, or big has no pixel to copy from.
    """
    if big.shape[0] != x.shape[0] or big.shape[1] != channels:
        raise ValueError(
            f"{op}: big must have N = {x.shape[0]} like x and C = {channels} like {weight}, got "
            f"shape {tuple(big.shape)}"
        )
    for axis, size in ((2, "height"), (3, "width")):
        if big.shape[axis] == 0 and x.shape[axis] != 0:
            raise ValueError(
                f"{op}: big has {size} 0 and x {size} {x.shape[axis]}, so there is no pixel to "
                f"copy; give big at least one, got shape {tuple(big.shape)}"
            )


def check_width(op: str, what: str, width: int, largest: int) -> None:
    """Check that the kernels can hold a map's channels in one tile.

    Raises:
        ValueError: if there are more than ``largest`` channels, or none.
    """
    if not 1 <= width <= largest:
        raise ValueError(
            f"{op}: {what} must be from 1 to {largest} channels on the kernels, got {width}; run "
            "its convolutions one by one (expand_merge takes any width), or "
            "use_backend('torch')"
        )


def _check_kind(op: str, **tensors: object) -> None:
    """Check that the tensors among the arguments share a device, and a dtype but under autocast."""
    given = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    first = next(iter(given.values()))
    autocast = torch.is_autocast_enabled(first.device.type)
    (check_same_device if autocast else check_same_kind)(op, **given)


def check_bottleneck(
    op: str,
    x: object,
    weights: tuple[object, object, object],
    shifts: tuple[object, object, object],
    shortcut: object,
    weight_expand: object,
    shift_expand: object,
    big: object,
) -> None:
    """Check the arguments of a bottleneck.

    Args:
        op: the op's name.
        x: shape (N, C_in, H, W).
        weights: shapes (I, C_in[, 1, 1]), (I, I, 3, 3) and (C, I[, 1, 1]).
        shifts: shapes (I,), (I,) and (C,), or None each.
        shortcut: shape (N, C, H, W), or None, which needs C = C_in.
        weight_expand: shape (C_out, C[, 1, 1]), or None.
        shift_expand: shape (C_out,), or None; only with weight_expand.
        big: shape (N, C_out, H_big, W_big), or None; only with weight_expand.

    Raises:
        ValueError: naming the first argument that does not fit.
    """
    check_map(op, "x", x)
    assert isinstance(x, torch.Tensor)
    channels = x.shape[1]
    before = ("the channels of x", "the rows of weight1", "the rows of weight2")
    for i, (weight, shift) in enumerate(zip(weights, shifts, strict=True), 1):
        check_weight(op, weight, channels, f"weight{i}", before[i - 1], 3 if i == 2 else 1)
        assert isinstance(weight, torch.Tensor)
        if i == 2 and weight.shape[0] != channels:
            raise ValueError(
                f"{op}: weight2 must map I = {channels} channels to as many, got shape "
                f"{tuple(weight.shape)}; run other bottlenecks as single convolutions"
            )
        channels = weight.shape[0]
        check_vector(op, f"shift{i}", shift, channels, x)
    _check_shortcut(op, shortcut, x, channels)
    if weight_expand is None:
        for name, value in (("shift_expand", shift_expand), ("big", big)):
            if value is not None:
                raise ValueError(
                    f"{op}: {name} is given without weight_expand, which it belongs to; pass "
                    f"weight_expand too, or leave {name} out"
                )
    else:
        check_weight(op, weight_expand, channels, "weight_expand", "the rows of weight3")
        assert isinstance(weight_expand, torch.Tensor)
        check_vector(op, "shift_expand", shift_expand, weight_expand.shape[0], x)
        if big is not None:
            check_map(op, "big", big)
            assert isinstance(big, torch.Tensor)
            check_upsampling(op, big, x, weight_expand.shape[0], "weight_expand")
    named = {f"weight{i}": weight for i, weight in enumerate(weights, 1)}
    _check_kind(op, x=x, **named, shortcut=shortcut, weight_expand=weight_expand, big=big)


def _check_shortcut(op: str, shortcut: object, x: torch.Tensor, channels: int) -> None:
    if shortcut is None:
        if x.shape[1] != channels:
            raise ValueError(
                f"{op}: without a shortcut x is added, which has {x.shape[1]} channels where "
                f"weight3 makes {channels}; pass the projected x as shortcut"
            )
        return
    check_map(op, "shortcut", shortcut)
    assert isinstance(shortcut, torch.Tensor)
    expected = (x.shape[0], channels, x.shape[2], x.shape[3])
    if tuple(shortcut.shape) != expected:
        raise ValueError(
            f"{op}: shortcut must have shape {expected}, that of x with the channels of weight3, "
            f"got {tuple(shortcut.shape)}"
        )


def check_stem(
    op: str,
    x: object,
    little: object,
    expand: tuple[object, object],
    fusion: tuple[object, object],
    convolve_big: tuple[object, object],
    convolve_little: tuple[object, object],
) -> None:
    """Check the arguments of a stem's end; each pair is a weight and its shift.

    Args:
        op: the op's name.
        x: shape (N, C, H, W), or (N, C_x, H_in, W_in) where it is convolved.
        little: shape (N, L, H, W), or (N, C_l, H_in, W_in) where it is convolved.
        expand: shapes (C, L[, 1, 1]) and (C,) or None.
        fusion: shapes (C_out, C[, 1, 1]) and (C_out,) or None.
        convolve_big: shapes (C, C_x, 3, 3) and (C,), or None each.
        convolve_little: shapes (L, C_l, 3, 3) and (L,), or None each.

    Raises:
        ValueError: naming the first argument that does not fit.
    """
    check_map(op, "x", x)
    check_map(op, "little", little)
    assert isinstance(x, torch.Tensor)
    assert isinstance(little, torch.Tensor)
    big_shape = _check_branch(op, "x", x, "big", convolve_big)
    little_shape = _check_branch(op, "little", little, "little", convolve_little)
    check_weight(op, expand[0], little_shape[1], "weight_expand", "the little branch's channels")
    assert isinstance(expand[0], torch.Tensor)
    check_vector(op, "shift_expand", expand[1], expand[0].shape[0], x)
    expected = (little_shape[0], expand[0].shape[0], *little_shape[2:])
    if big_shape != expected:
        raise ValueError(
            f"{op}: the big branch gives shape {big_shape} and the little one, expanded, "
            f"{expected}; they must agree (a 3x3 convolution of stride 2 halves, rounding up)"
        )
    check_weight(op, fusion[0], expand[0].shape[0], "weight_fusion", "the rows of weight_expand")
    assert isinstance(fusion[0], torch.Tensor)
    check_vector(op, "shift_fusion", fusion[1], fusion[0].shape[0], x)
    _check_kind(
        op, x=x, little=little, weight_expand=expand[0], weight_fusion=fusion[0],
        weight_big=convolve_big[0], weight_little=convolve_little[0],
    )  # fmt: skip


def _check_branch(
    op: str, argument: str, value: torch.Tensor, name: str, convolve: tuple[object, object]
) -> tuple[int, ...]:
    """Check one branch's convolution and return the shape of what it gives."""
    weight, shift = convolve
    if weight is None:
        if shift is not None:
            raise ValueError(
                f"{op}: shift_{name} is given without weight_{name}, which it belongs to; pass "
                f"weight_{name} too, or leave shift_{name} out"
            )
        return tuple(value.shape)
    of = f"the channels of {argument}"
    check_weight(op, weight, value.shape[1], f"weight_{name}", of, 3)
    assert isinstance(weight, torch.Tensor)
    check_vector(op, f"shift_{name}", shift, weight.shape[0], value)
    height, width = ((size + 1) // 2 for size in value.shape[2:])
    return (value.shape[0], weight.shape[0], height, width)
