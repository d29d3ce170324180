"""What a training step keeps for backward, of every network and way to train it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from blnet.activations import bytes_an_image
from blnet.bench.results import Results
from blnet.optimizing.training import optimize_training

# Name -> (what makes it, the device whose code is counted)
WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "plain": (lambda model: model, "cpu"),
    "recompute": (partial(optimize_training, recompute=True, without=("expand_merge",)), "cpu"),
    "fused": (optimize_training, "cuda"),
    "fused, recompute": (partial(optimize_training, recompute=True), "cuda"),
}
FACT = "kept_bytes_an_image"
TITLE = "Kept for backward, MB an image"
NOTE = (
    "Counted through autograd's hooks, without running anything, on tensors that have no data: "
    "what one more image in the batch keeps. Parameters and the images are not in it, nor what a "
    "batch keeps once, whatever its size. In brackets: over what the first network keeps when "
    "trained plain. The fused ways are counted as on a GPU, on every machine."
)


def counted(model: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes that a network keeps for backward for an image, for every way to train.

    Args:
        model: the plain network.
        shape: channels, height and width of the images.
        dtype: see :func:`blnet.activations.activation_bytes`.
    """
    return {
        name: bytes_an_image(make(model), (1, *shape), dtype=dtype, device=device)
        for name, (make, device) in WAYS.items()
    }


def header() -> list[str]:
    """Return the columns of the table."""
    return ["network", *WAYS]


def rows(results: Results) -> list[list[str]]:
    """Return a line for each network that was counted, with the share of the first network's."""
    found: dict[str, dict[str, Any]] = {}
    for m in results.of("training"):
        if m.facts.get(FACT):
            found.setdefault(m.family, m.facts[FACT])
    whole = next(iter(found.values()), {}).get("plain")
    return [
        [family, *(_cell(kept.get(name), whole) for name in WAYS)] for family, kept in found.items()
    ]


def _cell(kept: int | None, whole: int | None) -> str:
    if kept is None:
        return "-"
    return f"{kept / 1e6:.1f}" + (f" ({kept / whole:.2f}x)" if whole else "")
