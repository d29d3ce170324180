"""The formats: how each is written, and how a written file is run again."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blnet.exporting.forms import Form
from blnet.exporting.metadata import ENTRY, LEAST_SIZES
from blnet.exporting.onnx import OPSET, check_opset, onnx_model
from blnet.exporting.programs import least_sizes, trace_program, trace_script, tracing

Runner = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Settings:
    """How a file is written.

    Attributes:
        dynamic: whether batch and sizes are free.
        opset: version of ONNX's operators.
        metadata: what the file says of its network.
    """

    dynamic: bool
    opset: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Written:
    """A file's content.

    Attributes:
        data: its bytes.
        least: the free axes that are not free from 1 on, with their least sizes.
    """

    data: bytes
    least: Mapping[str, int]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: how its files' names end.
        write: makes the content of a file.
        open: reads a file and returns what runs it.
        packages: what writing needs beside PyTorch.
        runtime: what running needs beside PyTorch.
    """

    suffix: str
    write: Callable[[Form, Settings], Written]
    open: Callable[[Path], Runner]
    packages: tuple[str, ...] = ()
    runtime: str | None = None

    def check_installed(self, check: bool) -> None:
        """Raise an ImportError that says what to do where a package is missing.

        Args:
            check: whether the file is to be run as well.
        """
        for package in self.packages:
            importlib.import_module(package)
        if not check or self.runtime is None:
            return
        try:
            importlib.import_module(self.runtime)
        except ImportError as error:
            raise ImportError(
                f"{self.runtime} is not installed, and without it the file cannot be checked; "
                "install it with: pip install 'blnet[export]', or leave the check out (--no-check, "
                "check=False)"
            ) from error


def _with_least(metadata: Mapping[str, str], least: Mapping[str, int]) -> dict[str, str]:
    return {**metadata, LEAST_SIZES: json.dumps(least)} if least else dict(metadata)


def _write_onnx(form: Form, settings: Settings) -> Written:
    check_opset(settings.opset)  # before the network is traced, which takes its time
    program = trace_program(form, settings.dynamic)
    least = least_sizes(form, program)
    model = onnx_model(form, program, settings.opset, _with_least(settings.metadata, least))
    return Written(model.SerializeToString(), least)


def _open_onnx(path: Path) -> Runner:
    onnxruntime: Any = importlib.import_module("onnxruntime")  # it has no types
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised as well
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(value) for value in session.run(None, fed))

    return run


def _write_script(form: Form, settings: Settings) -> Written:
    script, buffer = trace_script(form, settings.dynamic), io.BytesIO()
    with tracing():
        torch.jit.save(script, buffer, _extra_files={ENTRY: json.dumps(settings.metadata)})
    return Written(buffer.getvalue(), {})  # a trace by example asks for no sizes


def _open_script(path: Path) -> Runner:
    with tracing():
        return _torch_runner(torch.jit.load(str(path), map_location="cpu"))


def _write_program(form: Form, settings: Settings) -> Written:
    program, buffer = trace_program(form, settings.dynamic), io.BytesIO()
    least = least_sizes(form, program)
    said = json.dumps(_with_least(settings.metadata, least))
    with tracing():
        torch.export.save(program, buffer, extra_files={ENTRY: said})
    return Written(buffer.getvalue(), least)


def _open_program(path: Path) -> Runner:
    with tracing():
        return _torch_runner(torch.export.load(io.BytesIO(path.read_bytes())).module())


def _torch_runner(module: Any) -> Runner:
    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            given = module(*inputs)
        return (given,) if isinstance(given, Tensor) else tuple(given)

    return run


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _open_onnx, ("onnx", "onnxscript"), "onnxruntime"),
    "torch": Format(".pt", _write_script, _open_script),
    "exported-program": Format(".pt2", _write_program, _open_program),
}

__all__ = ["FORMATS", "OPSET", "Format", "Runner", "Settings", "Written"]
