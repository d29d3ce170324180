"""A GPU that is none: what asks for one gets the CPU, so that commands go their way on a GPU.

`python -m helpers.pretended_gpu bench --device cuda` runs `blnet bench --device cuda`. Times mean
nothing, graphs replay nothing, torch.compile leaves networks as they are, and no kernel of Triton's
runs, as every tensor says that it lies on a CPU.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

NAME = "NVIDIA H200"
_PROPERTIES = SimpleNamespace(
    name=NAME,
    total_memory=141 * 10**9,
    multi_processor_count=132,
    major=9,
    minor=0,
    uuid="GPU-0",
    L2_cache_size=60 << 20,
)


class Event:
    """A moment of the processor's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Take the time."""
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Wait for nothing."""

    def elapsed_time(self, end: Event) -> float:
        """Return the milliseconds until another."""
        return (end._seconds - self._seconds) * 1e3


class Stream:
    """A stream that everything has done."""

    def __init__(self, device: Any = None) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: Stream) -> None:
        """Wait for nothing."""


class Graph:
    """A graph whose results stay those of its capture."""

    def replay(self) -> None:
        """Do nothing."""


class OnTheCpu(TorchFunctionMode):
    """Put on the CPU what is asked for on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function of PyTorch's with another device."""
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.cuda:
            return args[0]
        given = {name: _placed(value) for name, value in (kwargs or {}).items()}
        return func(*map(_placed, args), **given)


def _placed(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class Generator(torch.Generator):
    """A generator of the CPU."""

    def __new__(cls, device: Any = None) -> Generator:
        """Leave the device out."""
        return super().__new__(cls)


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _compiled(model: Any = None, **_: Any) -> Any:
    return model if model is not None else lambda function: function


_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: NAME,
    "get_device_properties": lambda device=None: _PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 10**8,
    "reset_peak_memory_stats": lambda device=None: None,
    "Event": Event,
    "Stream": Stream,
    "current_stream": Stream,
    "stream": _nothing,
    "device": _nothing,
    "CUDAGraph": Graph,
    "graph": _nothing,
}


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Pretend within the block. Rates of the device are given, as it has none to be measured."""
    from blnet.bench import measure, roofline

    to = torch._C._nn._parse_to  # Module.to asks it, past every mode

    def parse_to(*args: Any, **kwargs: Any) -> Any:
        return to(*map(_placed, args), **{key: _placed(one) for key, one in kwargs.items()})

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **_CUDA))
        for owner, name, value in (
            (torch, "Generator", Generator),
            (torch, "compile", _compiled),
            (torch.accelerator, "current_device_index", lambda: 0),
            (torch.accelerator, "set_device_index", lambda device: None),
            (torch.Tensor, "pin_memory", lambda tensor, device=None: tensor),
            (torch._C._nn, "_parse_to", parse_to),
            (roofline, "copy_bandwidth", lambda clock: 4e12),
            (roofline, "matmul_rate", lambda clock, dtype: 7e14),
            (measure, "FLUSH_BYTES", 1 << 10),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(OnTheCpu())
        yield


if __name__ == "__main__":
    from blnet.cli import main

    with pretended():
        sys.exit(main(sys.argv[1:]))
