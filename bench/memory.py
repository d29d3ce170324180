"""Peak memory of one call."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]


def peak_bytes(call: Call, device: str) -> int:
    """Return the most bytes that were allocated at once during a call, beyond those before it.

    On a GPU this is what PyTorch's caching allocator handed out; memory of libraries (cuDNN's
    plans, a CUDA graph's own pool) is not in it. On a CPU it is what the profiler saw PyTorch's
    allocator hand out and take back, summed in the order of time; scratch space inside oneDNN is
    not in it. Weights and input exist before the call: the caller adds them.
    """
    return _gpu_peak(call) if device == "cuda" else _cpu_peak(call)


def tensor_bytes(*values: Any) -> int:
    """Return the bytes of modules' parameters and buffers, and of tensors."""
    total = 0
    for value in values:
        if isinstance(value, torch.nn.Module):
            total += tensor_bytes(*value.parameters(), *value.buffers())
        elif isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
    return total


def _gpu_peak(call: Call) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(call: Call) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run:
        call()
    # The exported trace is the profiler's public record of single allocations; its events()
    # gives them by op, without their order.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        run.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    )
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak
