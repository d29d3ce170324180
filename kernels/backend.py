"""Which code runs an op: Triton's compiler, Triton's interpreter or plain PyTorch.

========== ================================================= ====================================
backend    chosen for                                        needs
========== ================================================= ====================================
triton     tensors on a CUDA or ROCm device                  triton
interpret  tensors on a CPU while TRITON_INTERPRET=1         triton; a tool for tests, very slow
torch      everything else (CPU, meta, mps, float64)         nothing
========== ================================================= ====================================

The kernels take float32, float16 and bfloat16 and accumulate in float32, so float64 always runs
on "torch" unless another backend is forced, which is then an error.

:func:`use_backend` forces one. The choice is a plain module-level name, not a context variable,
so that ``torch.compile(fullgraph=True)`` can read it and guards on it; like PyTorch's own global
switches it is shared by all threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import torch

from blnet.kernels.triton_shim import INTERPRETED, TRITON_ERROR, TRITON_INSTALLED

BACKENDS = ("triton", "interpret", "torch")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_forced: str | None = None


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works in this process.

    Attributes:
        works: True where :func:`use_backend` accepts it.
        reason: one sentence: what it runs on, or why it does not work.
        advice: what to do to get it; empty where it works.
    """

    works: bool
    reason: str
    advice: str = ""


def _triton_status() -> BackendStatus:
    if not TRITON_INSTALLED:
        reason = f"Triton cannot be imported ({TRITON_ERROR})"
        return BackendStatus(False, reason, "install it with: pip install triton")
    if INTERPRETED:
        reason = "TRITON_INTERPRET was set when the kernels were imported"
        return BackendStatus(False, reason, "unset TRITON_INTERPRET and start Python again")
    if not torch.cuda.is_available():
        advice = "run on a machine with a CUDA or ROCm GPU and a PyTorch built for it"
        return BackendStatus(False, "PyTorch sees no CUDA or ROCm device", advice)
    return BackendStatus(True, f"compiles the kernels for {torch.cuda.get_device_name()}")


def _interpret_status() -> BackendStatus:
    if not TRITON_INSTALLED:
        reason = f"Triton cannot be imported ({TRITON_ERROR})"
        return BackendStatus(False, reason, "install it with: pip install triton")
    if not INTERPRETED:
        reason = "TRITON_INTERPRET was not set when the kernels were imported"
        return BackendStatus(False, reason, "set TRITON_INTERPRET=1 and start Python again")
    return BackendStatus(True, "interprets the kernels on the CPU, slowly: for tests only")


def available_backends() -> dict[str, BackendStatus]:
    """Say for each backend whether it works here and, if not, why and what to do.

    Returns:
        A dict from backend name to :class:`BackendStatus`, in the order of :data:`BACKENDS`.
    """
    return {
        "triton": _triton_status(),
        "interpret": _interpret_status(),
        "torch": BackendStatus(True, "plain PyTorch operations, on every device"),
    }


def _validated(name: str) -> str | None:
    if name == "auto":
        return None
    if name not in BACKENDS:
        known = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise ValueError(f"use_backend: no backend {name!r}; choose one of {known}")
    status = available_backends()[name]
    if not status.works:
        raise ValueError(
            f"use_backend: backend {name!r} does not work here because {status.reason}; "
            f"{status.advice}"
        )
    return name


class use_backend:  # noqa: N801 - used like a function
    """Force one backend for every op, from now on or within a ``with`` block.

    Example::

        use_backend("torch")            # from here on
        use_backend("auto")             # back to the automatic choice
        with use_backend("torch"):      # here only
            ...

    An op that cannot run its input on the forced backend raises a ValueError; it never falls
    back to another one.

    Args:
        name: "triton", "interpret", "torch", or "auto" for the automatic choice.

    Raises:
        ValueError: for an unknown name or a backend that does not work here.
    """

    def __init__(self, name: str) -> None:
        global _forced
        validated = _validated(name)
        self._previous = _forced
        _forced = validated

    def __enter__(self) -> None:
        """Keep the choice made at construction."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Go back to the choice before this one."""
        global _forced
        _forced = self._previous


def forced_backend() -> str | None:
    """Return the forced backend's name, or None where the choice is automatic."""
    return _forced


def choose_backend(op: str, tensor: torch.Tensor) -> str:
    """Choose the backend that runs ``op`` on inputs like ``tensor``.

    Args:
        op: the op's name, for the error message.
        tensor: an input of the op; its device and dtype decide.

    Returns:
        "triton", "interpret" or "torch".

    Raises:
        ValueError: if a backend is forced that cannot run such a tensor.
    """
    device, supported = tensor.device.type, tensor.dtype in KERNEL_DTYPES
    if _forced is None:
        if device == "cuda" and TRITON_INSTALLED and not INTERPRETED and supported:
            return "triton"
        return "interpret" if device == "cpu" and INTERPRETED and supported else "torch"
    if _forced == "torch":
        return "torch"
    if not supported:
        raise ValueError(
            f"{op}: backend {_forced!r} cannot run {tensor.dtype}, its kernels accumulate in "
            "float32; convert the tensors to float32, or call use_backend('auto')"
        )
    wanted = "cuda" if _forced == "triton" else "cpu"
    if device != wanted:
        raise ValueError(
            f"{op}: backend {_forced!r} cannot run tensors on device {str(tensor.device)!r}; "
            f"move them to {wanted!r}, or call use_backend('auto')"
        )
    return _forced
