"""Ceilings of the device, measured in the run instead of read from a list of device names."""

from __future__ import annotations

import statistics

import torch

from blnet.bench.measure import Clock

COPY_BYTES = 1 << 30  # far larger than any cache
COPIES = 20
MATRIX_SIZE = 8192  # large enough for every unit to be busy
PRODUCTS = 12


def copy_bandwidth(clock: Clock, copied: int = COPY_BYTES, device: str = "cuda") -> float:
    """Return the rate of a device-to-device copy, bytes/s, counting what is read and written.

    Args:
        clock: times one copy.
        copied: bytes of the buffer.
        device: where it lies.
    """
    source = torch.empty(copied, dtype=torch.int8, device=device).random_(0, 127)
    target = torch.empty_like(source)
    times = [clock(lambda: target.copy_(source)) for _ in range(COPIES)]
    # The first copies may still map pages.
    return 2 * copied / statistics.median(times[COPIES // 4 :])


def matmul_rate(
    clock: Clock, dtype: torch.dtype, size: int = MATRIX_SIZE, device: str = "cuda"
) -> float:
    """Return the rate of a large square matrix product, FLOP/s.

    Args:
        clock: times one product.
        dtype: of the matrices. float32 is measured as PyTorch is set: without tf32 in a run.
        size: rows and columns.
        device: where they lie.
    """
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [clock(lambda: torch.mm(left, right)) for _ in range(PRODUCTS)]
    return 2 * size**3 / statistics.median(times[PRODUCTS // 4 :])
