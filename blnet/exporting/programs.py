"""Tracing networks with free sizes: for torch.export, and by example for TorchScript."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any, cast
from unittest.mock import patch

import torch
from torch.export import Dim, ExportedProgram

from blnet.exporting.forms import LEAST, Form
from blnet.files import reason
from blnet.kernels import use_backend

_POOLING = "torch._meta_registrations.pooling_output_shape_pad_lr"
_LOGGERS = ("torch.export", "torch.onnx", "torch.fx", "onnxscript", "onnx_ir")


def trace_program(form: Form, dynamic: bool = True) -> ExportedProgram:
    """Return a network as a program of torch.export.

    Args:
        form: the network.
        dynamic: whether batch and sizes are free, from 1 on (see `LEAST`); else they are the
            example's.

    Raises:
        ValueError: if the network's code asks for values, or for sizes that are to be free.
    """
    inputs = form.drawn(form.traced_shape(dynamic))
    shapes = tuple(_free_dimensions(form)) if dynamic else None
    try:
        with tracing():
            return torch.export.export(form.module, inputs, dynamic_shapes=shapes)
    except Exception as error:
        raise ValueError(_untraceable(form, dynamic, error)) from error


def trace_script(form: Form, dynamic: bool = True) -> torch.jit.ScriptModule:
    """Return a network as TorchScript, traced by example.

    Args:
        form: the network.
        dynamic: whether sizes other than the example's are meant to work as well.

    Raises:
        ValueError: if the network cannot be traced.
    """
    inputs = form.drawn(form.traced_shape_by_example(dynamic))
    try:
        with tracing():
            script = torch.jit.trace(form.module, inputs, check_trace=False)
    except Exception as error:
        raise ValueError(_untraceable(form, dynamic, error)) from error
    return cast("torch.jit.ScriptModule", script)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Trace quietly, on PyTorch's own operations, without questions about sizes."""
    settings: Any = torch.fx.experimental._config
    with (
        quiet(),
        torch.no_grad(),
        use_backend("torch"),
        # PyTorch asks whether each pooled map has a size of 0 or 1, and whether a remainder is
        # negative; the answers would bind the file to the sizes for which they hold.
        patch(_POOLING, _PoolingSize()),
        settings.patch(backed_size_oblivious=True),
    ):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings off the terminal, and the graph that torch.export prints where it fails."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


class _PoolingSize:
    """PyTorch's formula for the size of a pooled map, without its question about remainders.

    The question is whether to round a negative quotient down, which Python's // does anyway
    (torch._meta_registrations.div_rtn, PyTorch 2.11). Where a last window may have to be left out,
    PyTorch's own code decides.
    """

    def __init__(self) -> None:
        from torch import _meta_registrations

        self._original = _meta_registrations.pooling_output_shape_pad_lr

    def __call__(
        self,
        size: Any,
        kernel: int,
        pad_left: int,
        pad_right: int,
        stride: int,
        dilation: int,
        ceil_mode: bool,
    ) -> Any:
        reach = dilation * (kernel - 1) + 1
        if ceil_mode and reach < pad_left + stride:
            return self._original(size, kernel, pad_left, pad_right, stride, dilation, ceil_mode)
        spare = stride - 1 if ceil_mode else 0
        return (size + pad_left + pad_right - reach + spare) // stride + 1


def _free_dimensions(form: Form) -> Iterator[dict[int, Any]]:
    named: dict[str, Any] = {}
    for axes in form.free:
        for name in axes.values():
            named.setdefault(name, Dim(name, min=LEAST.get(name, 1)))
        yield {axis: named[name] for axis, name in axes.items()}


def _untraceable(form: Form, dynamic: bool, error: Exception) -> str:
    network: Any = form.module
    kind = type(getattr(network, "network", network)).__name__
    advice = "export it for one size (dynamic=False, --static)" if dynamic else (
        "its forward may not depend on the values of tensors")  # fmt: skip
    sizes = " with free sizes" if dynamic else ""
    return f"{kind} cannot be traced{sizes} ({reason(error)}); {advice}"
