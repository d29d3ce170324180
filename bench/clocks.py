"""What the device's clocks were: a speed says little where they were throttled."""

from __future__ import annotations

import os
import statistics
import subprocess
from pathlib import Path

# What nvidia-smi calls it -> what we call it.
GPU_FACTS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
}
SCALING = Path("/sys/devices/system/cpu")
CPUINFO = Path("/proc/cpuinfo")


def read_clocks(device: str) -> dict[str, float]:
    """Return the device's clocks now, and the load average; what cannot be read is left out.

    Args:
        device: "cpu" or "cuda": of a GPU also its temperature and power.
    """
    found = gpu_clocks(_query()) if device == "cuda" else cpu_clock()
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    return found


def gpu_clocks(answer: str) -> dict[str, float]:
    """Return the facts in an answer of nvidia-smi: numbers with commas between them.

    Args:
        answer: its first line counts; what is no number, such as "[N/A]", is left out.
    """
    texts = (answer.splitlines() or [""])[0].split(",")
    found = {}
    for name, text in zip(GPU_FACTS.values(), texts, strict=False):
        try:
            found[name] = float(text)
        except ValueError:
            continue
    return found


def cpu_clock(scaling: Path = SCALING, cpuinfo: Path = CPUINFO) -> dict[str, float]:
    """Return the median frequency of the cores, MHz, where Linux tells it.

    Args:
        scaling: where it describes the cores.
        cpuinfo: what it says of them where they do not scale, as in a virtual machine.
    """
    try:
        files = sorted(scaling.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        mhz = [float(file.read_text()) / 1e3 for file in files]
        if not mhz:
            lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
            mhz = [float(value) for key, _, value in lines if key.strip() == "cpu MHz"]
    except (OSError, ValueError):
        return {}
    return {"cpu_mhz": round(statistics.median(mhz))} if mhz else {}


def _query() -> str:
    """Return what nvidia-smi says of the GPU that PyTorch uses; "" where it does not run."""
    import torch

    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(GPU_FACTS)}"]
    command.append("--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
