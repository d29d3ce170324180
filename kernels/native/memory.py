"""Memory for maps and weights, in huge pages where the system has them.

A network's weights and maps are tens of megabytes, read and written in streams of which many go
on at once: with pages of 4 KiB the address translations alone are more than a CPU keeps.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_BYTES = 2 << 20
# Private: a forked child gets maps of its own, and systems give huge pages to private memory only.
# Windows knows neither the flags nor fork.
_PRIVATE = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
)


def reserve(floats: int) -> Tensor:
    """Return a float32 tensor of so many numbers, which begins at a page.

    What is never touched takes no memory.
    """
    size = -(-4 * max(floats, 1) // HUGE_BYTES) * HUGE_BYTES
    region = mmap.mmap(-1, size, **_PRIVATE)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # a kernel without them; ordinary pages are as right
            region.madvise(advice)
    return torch.frombuffer(region, dtype=torch.float32)[:floats]


def gathered(tensors: list[Tensor], alignment: int) -> list[Tensor]:
    """Return copies of tensors that lie one behind the other.

    Args:
        tensors: float32, contiguous.
        alignment: each begins at a multiple of so many floats.
    """
    places, end = [], 0
    for tensor in tensors:
        places.append(end)
        end += -(-tensor.numel() // alignment) * alignment
    whole = reserve(end)
    copies = []
    for place, tensor in zip(places, tensors, strict=True):
        copies.append(whole[place : place + tensor.numel()].copy_(tensor.flatten()))
    return copies
