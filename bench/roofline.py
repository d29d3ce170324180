"""The roofline: what the device can do, measured in the run, and the least time that follows.

Three ceilings, each the best of several measurements, at the beginning of a run and at its end.
`copy_bandwidth` is the rate of a copy far larger than any cache, in bytes/s, read and written.
`matmul_rate` is the rate of a large matrix product, in FLOP/s; on a CPU that of a convolution if it
is faster, since PyTorch leaves the two to different libraries, and on some CPUs one of them makes
use of narrower vectors only. On a CPU whose caches are known there is `cache_bandwidth` as well,
the rate of a copy that its last caches hold, for work on no more than `cache_bytes`: an op that is
timed right after a call of its own finds such maps there, and so does a layer the map that the one
before has just written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from blnet.modes import exact_products

if TYPE_CHECKING:
    from blnet.bench.measure import Clock
    from blnet.bench.results import Layer
    from blnet.bench.session import Session

COPY_BYTES = 1 << 30  # far larger than any cache
COPIES = 20
MATRIX_SIZE = 8192  # large enough for every unit of a GPU to be busy
PRODUCTS = 12
# A CPU is slower, its memory may be small and its caches large.
CPU_COPY_BYTES = 256 << 20
CPU_COPIES = 6
CPU_BUFFERS = 3
APART = 0.1  # share by which rates of a run differ beyond noise
CPU_CACHES = 4  # times what the caches hold
CPU_MEMORY_SHARE = 16  # of the memory, one part for each of two buffers
CPU_MATRIX_SIZES = (256, 512, 1024, 2048)
CPU_CONVOLUTION = (8, 256, 14, 14)  # input of a 3x3 convolution to as many channels
CPU_PRODUCTS = 5
CPU_PRODUCT_SECONDS = 0.1  # no product that will take longer is tried
CACHES = Path("/sys/devices/system/cpu")


def measure_ceilings(session: Session) -> None:
    """Measure what the run's device can do, once in a run, into the results' ceilings."""
    ceilings = session.results.ceilings
    if "copy_bandwidth" in ceilings:
        return
    session.watch("the ceilings of the device", 0.0)
    ceilings |= _rates(session)


def measure_ceilings_again(session: Session) -> None:
    """Copy and multiply once more at the end of a run that has ceilings, and keep the better rates.

    A machine that others use too, whose clock changes or whose memory is laid out anew has one rate
    now and another later, and every share of a bound moves with it: that is worth a note.
    """
    ceilings = session.results.ceilings
    if "copy_bandwidth" not in ceilings:
        return
    for name, after in _rates(session).items():
        before = ceilings.get(name, after)
        ceilings[name] = max(before, after)
        if abs(after - before) > APART * min(before, after):
            session.note(
                f"{name.replace('_', ' ')} was {_text(name, before)} at first and "
                f"{_text(name, after)} at the end; shares of bounds take the better one, and are "
                "no surer than that"
            )
    bounded = {group: _bounded(found, ceilings) for group, found in session.results.layers.items()}
    session.results.layers.update(bounded)


def _bounded(
    networks: dict[str, list[Layer]], ceilings: Mapping[str, float]
) -> dict[str, list[Layer]]:
    """Return the layers of networks with the bounds that follow from the ceilings."""
    return {
        label: [replace(one, bound=least_seconds(one.bytes, one.flops, ceilings)) for one in found]
        for label, found in networks.items()
    }


def _text(name: str, rate: float) -> str:
    """Return a ceiling with its unit."""
    return f"{rate / 1e12:.3g} TFLOP/s" if name == "matmul_rate" else f"{rate / 1e9:.0f} GB/s"


def _rates(session: Session) -> dict[str, float]:
    """Return all ceilings as they are now."""
    dtype = session.settings.torch_dtype
    with exact_products():
        found = _copies(session)
        if session.settings.on_gpu:
            found["matmul_rate"] = matmul_rate(session.clock, dtype)
        else:
            # What a CPU multiplies slowly in 16 bits it can widen.
            rates = [cpu_matmul_rate(session.clock, d) for d in {dtype, torch.float32}]
            found["matmul_rate"] = max(rates)
    return found


def _copies(session: Session) -> dict[str, float]:
    """Return the rate of a copy, on a CPU whose caches are known that of one inside them too."""
    clock = session.clock
    if session.settings.on_gpu:
        return {"copy_bandwidth": copy_bandwidth(clock)}
    held = cache_bytes()
    copied = cpu_copy_bytes(held, session.results.environment.get("memory"))
    # A buffer of its own each time: how fast one is copied also depends on where it lies.
    rates = [copy_bandwidth(clock, copied, "cpu", CPU_COPIES) for _ in range(CPU_BUFFERS)]
    found = {"copy_bandwidth": max(rates)}
    if held:
        # Source and target fill half of the caches; other things need room, too.
        rates = [copy_bandwidth(clock, held // 4, "cpu", CPU_COPIES) for _ in range(CPU_BUFFERS)]
        found |= {"cache_bandwidth": max(rates), "cache_bytes": float(held)}
    return found


def copy_bandwidth(
    clock: Clock, copied: int = COPY_BYTES, device: str = "cuda", copies: int = COPIES
) -> float:
    """Return the rate of a copy within the device's memory, bytes/s, counting read and written.

    Args:
        clock: times one copy.
        copied: bytes of the buffer.
        device: where it lies.
        copies: how many are timed.
    """
    # Not zeros: pages of zeros may be one page.
    source = torch.arange(copied // 8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(clock(lambda: target.copy_(source)) for _ in range(copies))


def matmul_rate(
    clock: Clock,
    dtype: torch.dtype,
    size: int = MATRIX_SIZE,
    device: str = "cuda",
    products: int = PRODUCTS,
) -> float:
    """Return the rate of a large square matrix product, FLOP/s.

    Args:
        clock: times one product.
        dtype: of the matrices. float32 is measured as PyTorch is set: without tf32 in a run.
        size: rows and columns.
        device: where they lie.
        products: how many are timed.
    """
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(clock(lambda: torch.mm(left, right)) for _ in range(products))


def cpu_matmul_rate(clock: Clock, dtype: torch.dtype) -> float:
    """Return the best rate of square matrix products and of a convolution on the CPU, FLOP/s.

    Args:
        clock: times one product.
        dtype: of the matrices.
    """
    best = 0.0
    for size in CPU_MATRIX_SIZES:
        if best and 2 * size**3 / best > CPU_PRODUCT_SECONDS:
            break
        best = max(best, matmul_rate(clock, dtype, size, "cpu", CPU_PRODUCTS))
    if _convolution_flops(CPU_CONVOLUTION) / best > CPU_PRODUCT_SECONDS:
        return best
    return max(best, convolution_rate(clock, dtype, CPU_CONVOLUTION, CPU_PRODUCTS))


def convolution_rate(
    clock: Clock, dtype: torch.dtype, shape: tuple[int, int, int, int], products: int
) -> float:
    """Return the rate of a 3x3 convolution on the CPU, FLOP/s.

    Args:
        clock: times one convolution.
        dtype: of its input and weights.
        shape: of its input and output.
        products: how many are timed.
    """
    channels = shape[1]
    x, weight = (
        torch.randn(size).to(dtype, memory_format=torch.channels_last)
        for size in (shape, (channels, channels, 3, 3))
    )
    with torch.inference_mode():
        best = min(clock(lambda: F.conv2d(x, weight, padding=1)) for _ in range(products))
    return _convolution_flops(shape) / best


def _convolution_flops(shape: tuple[int, int, int, int]) -> int:
    return 2 * math.prod(shape) * shape[1] * 9


def cpu_copy_bytes(held: int | None, memory: int | None) -> int:
    """Return how large a buffer to copy on a CPU is, bytes.

    Args:
        held: what the caches hold, bytes; None if unknown.
        memory: bytes of main memory; None if unknown.
    """
    wanted = min(max(CPU_COPY_BYTES, CPU_CACHES * (held or 0)), COPY_BYTES)
    return min(wanted, memory // CPU_MEMORY_SHARE) if memory else wanted


def cache_bytes(folder: Path = CACHES) -> int | None:
    """Return what the last caches of the cores that this process may use hold; None if unknown.

    Args:
        folder: where Linux describes the cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    found: dict[str, int] = {}
    try:
        for core in os.sched_getaffinity(0):
            last = max((folder / f"cpu{core}" / "cache").glob("index*"), key=_level)
            # Cores that share a cache name the same cores.
            shared = (last / "shared_cpu_list").read_text().strip()
            found[shared] = int((last / "size").read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return None
    return sum(found.values()) or None


def _level(cache: Path) -> int:
    return int((cache / "level").read_text())


def least_seconds(moved: int, flops: int, ceilings: Mapping[str, float]) -> float:
    """Return the least time that measured rates allow: to move, or to multiply if that is longer.

    Args:
        moved: bytes read and written.
        flops: of matrix products and convolutions.
        ceilings: of the device; a rate of products that was not measured is no bound.

    Raises:
        KeyError: if there is no "copy_bandwidth".
    """
    held = "cache_bytes" in ceilings and moved <= ceilings["cache_bytes"]
    seconds = moved / ceilings["cache_bandwidth" if held else "copy_bandwidth"]
    rate = ceilings.get("matmul_rate")
    return max(seconds, flops / rate) if rate else seconds
