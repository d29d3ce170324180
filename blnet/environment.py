"""Facts about the machine and the software that a measurement or a log must carry."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

# Packages whose version changes what is measured.
PACKAGES = (
    "blnet",
    "torch",
    "torchvision",
    "torchaudio",
    "triton",
    "timm",
    "numpy",
    "librosa",
    "onnxruntime",
    "openvino",
    "pytest-benchmark",
)


@dataclass(frozen=True)
class Environment:
    """Where and when something ran.

    Attributes:
        date: start, ISO 8601 with the offset from UTC.
        device: name of the GPU, or of the CPU where there is no GPU.
        gpus: name of every GPU.
        driver: version of the NVIDIA driver; None without one.
        cuda: version of CUDA (or ROCm) that PyTorch was built for; None on a CPU build.
        gpu_memory: bytes on the first GPU; None without one.
        compute_capability: of the first GPU, such as "9.0"; None without one.
        cpu: name of the CPU.
        cpu_features: vector instructions that PyTorch uses, such as "AVX512".
        cores: CPU cores that this process may use.
        threads: threads that PyTorch uses inside an op.
        memory: bytes of main memory; None if unknown.
        load: load average over the last minute; None if unknown. Far above 0 before a measurement
            means that something else was running.
        system: operating system and kernel.
        python: version of Python.
        packages: installed version of each package that matters.
        commit: git commit of the code, with "+" if files differ from it; None outside a checkout.
    """

    date: str
    device: str
    gpus: tuple[str, ...]
    driver: str | None
    cuda: str | None
    gpu_memory: int | None
    compute_capability: str | None
    cpu: str
    cpu_features: str
    cores: int
    threads: int
    memory: int | None
    load: float | None
    system: str
    python: str
    packages: dict[str, str]
    commit: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as plain values, fit for JSON."""
        return {**asdict(self), "gpus": list(self.gpus)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Environment:
        """Return the environment that `as_dict` gave.

        Raises:
            ValueError: if a fact is missing.
        """
        missing = [field.name for field in fields(cls) if field.name not in values]
        if missing:
            raise ValueError(f"the environment lacks {', '.join(missing)}")
        known = {field.name: values[field.name] for field in fields(cls)}
        return cls(**{**known, "gpus": tuple(known["gpus"])})


def collect(device: str | None = None) -> Environment:
    """Return the facts about this machine.

    Args:
        device: "cpu" or "cuda", the one that does the work; None for a GPU if there is one.
    """
    gpus = _gpus()
    cpu = cpu_name()
    properties = torch.cuda.get_device_properties(0) if gpus else None
    return Environment(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        device=gpus[0] if gpus and device != "cpu" else cpu,
        gpus=gpus,
        driver=_driver(),
        cuda=torch.version.cuda or getattr(torch.version, "hip", None),
        gpu_memory=properties.total_memory if properties else None,
        compute_capability=f"{properties.major}.{properties.minor}" if properties else None,
        cpu=cpu,
        cpu_features=torch.backends.cpu.get_cpu_capability(),
        cores=core_count(),
        threads=torch.get_num_threads(),
        memory=_memory(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages=versions(PACKAGES),
        commit=git_commit(Path(__file__).resolve().parent.parent),
    )


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the installed version of each package that is installed, without importing it."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def core_count() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return the CPU's name as its vendor writes it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware", "cpu model"):
            return value.strip()
    return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor() or "CPU"


def git_commit(folder: Path) -> str | None:
    """Return the commit checked out in a folder, with "+" if tracked files differ from it."""
    if not (folder / ".git").exists():
        # An installed copy: the folder above it may well be a checkout of something else.
        return None
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if not commit:
        return None
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+" if changed else "")


def _gpus() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = (_output(query) or "").splitlines()
    return lines[0].strip() if lines else None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _output(command: list[str]) -> str | None:
    """Return what a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def command_line() -> str:
    """Return the command that started this process, as a reader would type it."""
    import shlex

    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is None:
        words = [Path(sys.argv[0]).name]
    else:  # started as a module, as torchrun does it; blnet.cli has a name of its own
        name = module.name.removesuffix(".__main__")
        words = ["blnet"] if name == "blnet.cli" else ["python", "-m", name]
    return shlex.join([*words, *sys.argv[1:]])
