"""State dicts of others: finding the tensors in what a file holds, and saying what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

KEYS_SHOWN = 12
_PREFIX = "module."


def state_dict_of(loaded: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by key, without the "module." of `DataParallel`.

    Args:
        loaded: a state dict, or a dict that holds one under 'state_dict'.
        known: keys that stay as they are, of a network with a part named "module".

    Raises:
        ValueError: if it holds anything but tensors, nothing at all, or a key both with and
            without "module.".
    """
    inner = loaded.get("state_dict", loaded)
    if not isinstance(inner, Mapping):
        raise ValueError(f"'state_dict' must be a dict of tensors, got {type(inner).__name__}")
    weights: dict[str, Any] = {}
    for name, value in inner.items():
        key = str(name) if name in known else str(name).removeprefix(_PREFIX)
        if key in weights:
            raise ValueError(
                f"the checkpoint holds {listed([key])} twice, with {_PREFIX!r} before it and "
                "without; leave one of them out"
            )
        weights[key] = value
    wrong = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if wrong or not weights:
        raise ValueError(
            "the checkpoint must be a dict of tensors, or hold one under 'state_dict'; "
            + (f"no tensors: {listed(wrong)}" if wrong else "it is empty")
        )
    return weights


def check_dense(weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if a weight is sparse, quantised or without values."""
    odd = [
        key
        for key, value in weights.items()
        if value.layout != torch.strided or value.is_quantized or value.is_meta
    ]
    if odd:
        raise ValueError(
            "a checkpoint's weights must be dense tensors with values, not sparse, quantised or "
            f"on the meta device, as are {listed(odd)}"
        )


def misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Return what keeps weights out of a network: keys, shapes, dtypes; "" if they fit it."""
    common = [key for key in own if key in weights]
    faults = {
        "missing keys": [key for key in own if key not in weights],
        "extra keys": [key for key in weights if key not in own],
        "wrong shapes": [
            f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
            for key in common
            if weights[key].shape != own[key].shape
        ],
        "wrong dtypes": [
            f"{key} {weights[key].dtype} for {own[key].dtype}"
            for key in common
            if kind(weights[key]) != kind(own[key])
        ],
    }
    return "; ".join(f"{name}: {listed(keys)}" for name, keys in faults.items() if keys)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter and buffer by its key."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def kind(tensor: Tensor) -> str:
    """Return "float", "complex" or "integer"; values pass within a kind, never between them."""
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() else "integer"


def listed(keys: Sequence[str], shown: int = KEYS_SHOWN) -> str:
    """Return keys on one line: the first ones, and how many more there are."""
    told = [key if key.isprintable() else ascii(key) for key in keys[:shown]]
    rest = len(keys) - shown
    return ", ".join(told) + (f" and {rest} more" if rest > 0 else "")
