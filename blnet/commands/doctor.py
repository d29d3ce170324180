"""`blnet doctor`: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shlex
import shutil
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from blnet.environment import Environment, collect, versions
from blnet.files import reason
from blnet.wording import counted

# Extra -> what it brings: (distribution on PyPI, import name).
EXTRAS = {
    "train": (
        ("accelerate", "accelerate"),
        ("jsonargparse", "jsonargparse"),
        ("matplotlib", "matplotlib"),
        ("rich", "rich"),
        ("tensorboard", "tensorboard"),
        ("timm", "timm"),
        ("torchmetrics", "torchmetrics"),
    ),
    "vision": (("torchvision", "torchvision"), ("timm", "timm"), ("pillow", "PIL")),
    "speech": (
        ("torchaudio", "torchaudio"),
        ("librosa", "librosa"),
        ("soundfile", "soundfile"),
        ("espeakng-loader", "espeakng_loader"),
    ),
    "export": (
        ("onnx", "onnx"),
        ("onnxscript", "onnxscript"),
        ("onnxruntime", "onnxruntime"),
    ),
    "bench": (
        ("pytest", "pytest"),
        ("pytest-benchmark", "pytest_benchmark"),
        ("rich", "rich"),
        ("scikit-learn", "sklearn"),
        ("scipy", "scipy"),
    ),
}


@dataclass(frozen=True)
class Finding:
    """Whether one thing works.

    Attributes:
        kind: "backend", "engine", "extra" or "tool".
        name: what it is.
        works: whether it does.
        detail: one phrase: what it runs on, its versions, or why it does not work.
        advice: what to do to get it; empty where it works.
    """

    kind: str
    name: str
    works: bool
    detail: str
    advice: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `blnet doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Print what works. Returns 0: a missing optional part is no failure."""
    environment = collect()
    findings = examine()
    if arguments.json:
        found = {
            "environment": environment.as_dict(),
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(found, indent=2))
    else:
        print(as_text(environment, findings))
    return 0


def examine() -> list[Finding]:
    """Return what works here and what does not."""
    return [*_backends(), _native(), *(_extra(name) for name in EXTRAS), _compiler()]


def _backends() -> list[Finding]:
    try:
        from blnet.kernels import available_backends
    except ImportError as error:
        advice = "reinstall: pip install --force-reinstall blnet"
        return [Finding("backend", "kernels", False, f"cannot be imported: {error}", advice)]
    return [
        Finding("backend", name, status.works, status.reason, status.advice)
        for name, status in available_backends().items()
    ]


def _native() -> Finding:
    """Look whether the engine for CPUs is there; what is not compiled yet is compiled."""
    try:
        from blnet.kernels.native import status
    except ImportError as error:
        advice = "reinstall: pip install --force-reinstall blnet"
        return Finding("engine", "native", False, f"cannot be imported: {reason(error)}", advice)
    found = status()
    return Finding("engine", "native", found.works, found.reason, found.advice)


def _extra(extra: str) -> Finding:
    installed = versions(tuple(distribution for distribution, _ in EXTRAS[extra]))
    missing = [
        distribution
        for distribution, module in EXTRAS[extra]
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        advice = f"pip install 'blnet[{extra}]'"
        return Finding("extra", extra, False, f"missing: {', '.join(missing)}", advice)
    broken = {
        distribution: why
        for distribution, module in EXTRAS[extra]
        if (why := _why_not_imported(module))
    }
    if broken:
        detail = ", ".join(f"{name} cannot be imported ({why})" for name, why in broken.items())
        advice = f"pip install --force-reinstall {' '.join(broken)}"
        return Finding("extra", extra, False, detail, advice)
    return Finding("extra", extra, True, ", ".join(f"{k} {v}" for k, v in installed.items()))


def _why_not_imported(module: str) -> str:
    """Import a module quietly and return what it raises; empty where it can be imported."""
    sink = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken package raises: an OSError for a library
            return f"{type(error).__name__}: {reason(error)}"
    return ""


def _compiler() -> Finding:
    """Look for the C++ compiler that torch.compile needs for code on a CPU."""
    named = shlex.split(os.environ.get("CXX", ""))  # with flags, as the native engine takes it
    wanted = named[:1] or ["g++", "clang++"]
    found = next((path for name in wanted if (path := shutil.which(name))), None)
    if found:
        return Finding("tool", "C++ compiler", True, found)
    advice = "install g++ (Debian, Ubuntu: apt-get install g++); torch.compile on a CPU needs it"
    return Finding("tool", "C++ compiler", False, f"no {' or '.join(wanted)} on PATH", advice)


def as_text(environment: Environment, findings: list[Finding]) -> str:
    """Return what was found as text, one line for each thing."""
    lines = [f"{name + ':':<14}{value}" for name, value in _facts(environment)]
    lines.append("")
    for finding in findings:
        state = "works" if finding.works else "does not work"
        lines.append(f"{finding.kind} {finding.name}: {state}: {finding.detail}")
        if finding.advice:
            lines.append(f"    to get it: {finding.advice}")
    return "\n".join(lines)


def _facts(environment: Environment) -> list[tuple[str, Any]]:
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    facts: list[tuple[str, Any]] = [("device", environment.device)]
    if environment.gpus:
        gigabytes = (environment.gpu_memory or 0) / 1e9
        facts.append(("GPUs", f"{len(environment.gpus)}, the first with {gigabytes:.0f} GB"))
        capability = f"compute capability {environment.compute_capability}"
        facts.append(("driver", f"{environment.driver or 'unknown'}, {capability}"))
    facts.append(("CUDA or ROCm", environment.cuda or "this PyTorch is built for CPUs only"))
    facts.append(("CPU", f"{environment.cpu}, {environment.cpu_features}"))
    threads = counted(environment.threads, "thread")
    facts.append(("cores", f"{environment.cores}, PyTorch uses {threads}"))
    if environment.memory:
        facts.append(("memory", f"{environment.memory / 1e9:.0f} GB"))
    if environment.load is not None:
        facts.append(("load", f"{environment.load:.2f} over the last minute"))
    facts += [("system", environment.system), ("Python", environment.python)]
    facts.append(("packages", packages))
    if environment.commit:
        facts.append(("commit", environment.commit))
    return facts
