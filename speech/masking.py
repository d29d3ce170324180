"""Hiding what lies behind a recording's end, so that padding changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def halved(lengths: Tensor, times: int = 1) -> Tensor:
    """Return numbers of frames after so many strides of 2, each rounded up."""
    for _ in range(times):
        lengths = (lengths + 1) // 2
    return lengths


def reduced(lengths: Tensor, factor: int) -> Tensor:
    """Return numbers of frames after strides of 2 that make a factor of 1, 2, 4 and so on."""
    return halved(lengths, factor.bit_length() - 1)


class FrameMask:
    """Sets the frames behind each recording's end to zero before any layer that looks around.

    In a batch, recordings are padded to the longest. A convolution wider than one frame, or a pool,
    sees zeros where a recording alone ends; in a batch it would see what biases and batch norms
    have made of the padding. Layers of one frame's width need no mask: what they make of padding is
    hidden from the next one that looks around.

    The mask is found by a map's width, which says how often the time was halved: a recording of n
    frames has ceil(n / 2) after a halving, and so does the batch.
    """

    def __init__(self) -> None:
        self._masks: dict[int, Tensor] = {}

    def watch(self, network: nn.Module) -> None:
        """Mask the input of every layer of a network that looks at neighbouring frames."""
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.AvgPool2d) and _looks_around(module):
                module.register_forward_pre_hook(self._hide)

    def set(self, lengths: Tensor, width: int, halvings: int) -> None:
        """Take on a batch.

        Args:
            lengths: frames of each recording (N,).
            width: frames that the batch is padded to.
            halvings: how often at most a network halves the time.
        """
        for _ in range(halvings + 1):
            frames = torch.arange(width, device=lengths.device)
            self._masks[width] = (frames < lengths[:, None])[:, None, None, :]
            lengths, width = halved(lengths), (width + 1) // 2

    def clear(self) -> None:
        """Hide nothing any more."""
        self._masks = {}

    def _hide(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._masks:
            return None
        (x,) = inputs
        return (x * self._masks[x.shape[-1]],)


def _looks_around(module: nn.Conv2d | nn.AvgPool2d) -> bool:
    size = module.kernel_size
    return (size if isinstance(size, int) else size[-1]) > 1
