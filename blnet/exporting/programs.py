"""Tracing networks with free sizes: for torch.export, and by example for TorchScript."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast
from unittest.mock import patch

import torch
from torch.export import Dim, ExportedProgram

from blnet.exporting.forms import LEAST, Form
from blnet.files import reason
from blnet.kernels import use_backend

_POOLING = "torch._meta_registrations.pooling_output_shape_pad_lr"
# What torch.export suggests where a network takes no smaller sizes (PyTorch 2.11).
_LARGER = re.compile(r"(\w+) = Dim\('\1', min=(\d+)\)")
_LOGGERS = ("torch.export", "torch.onnx", "torch.fx", "onnxscript", "onnx_ir")


def trace_program(form: Form, dynamic: bool = True) -> ExportedProgram:
    """Return a network as a program of torch.export.

    Args:
        form: the network.
        dynamic: whether batch and sizes are free, from 1 on (see `LEAST`) or from where the network
            takes them on (see `least_sizes`); else they are the example's.

    Raises:
        ValueError: if the network's code asks for values, or for sizes that are to be free.
    """
    try:
        with tracing():
            return _traced_program(form, dynamic)
    except Exception as error:
        raise ValueError(_untraceable(form, dynamic, error)) from error


def least_sizes(form: Form, program: ExportedProgram) -> dict[str, int]:
    """Return from which sizes on the free axes of a program are free, by their names.

    Axes that are free from 1 on are left out, as are those of the example's size.
    """
    names = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.nodes if node.name in names]
    found = {}
    for node, axes in zip(inputs, form.free, strict=True):
        for axis, name in axes.items():
            size = node.meta["val"].shape[axis]
            if isinstance(size, torch.SymInt):
                found[name] = int(program.range_constraints[size.node.expr].lower)
    return {name: least for name, least in found.items() if least > 1}


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


def _traced_program(form: Form, dynamic: bool) -> ExportedProgram:
    inputs = form.drawn(form.traced_shape(dynamic))
    if not dynamic:
        return torch.export.export(form.module, inputs)
    try:
        return torch.export.export(form.module, inputs, dynamic_shapes=_free_dimensions(form))
    except torch._dynamo.exc.UserError as error:
        least = _least_asked_for(error)
        if not least:
            raise
    return torch.export.export(form.module, inputs, dynamic_shapes=_free_dimensions(form, least))


def _free_dimensions(form: Form, least: Mapping[str, int] = LEAST) -> tuple[dict[int, Any], ...]:
    names = {name for axes in form.free for name in axes.values()}
    named = {name: Dim(name, min=max(least.get(name, 1), LEAST.get(name, 1))) for name in names}
    return tuple({axis: named[name] for axis, name in axes.items()} for axes in form.free)


def _least_asked_for(error: Exception) -> dict[str, int]:
    """Return from which sizes on torch.export takes a network; none where it asks for more."""
    fixes = [_LARGER.fullmatch(line) for line in _suggested(error)]
    if not all(fixes):  # a size that is one number, or follows from another
        return {}
    return {fix[1]: int(fix[2]) for fix in fixes if fix}


def _suggested(error: Exception) -> list[str]:
    """Return the lines of what torch.export would have free sizes be."""
    _, _, told = str(error).partition("Suggested fixes:\n")
    return [line.strip() for line in told.partition("\n\n")[0].splitlines()]


def _untraceable(form: Form, dynamic: bool, error: Exception) -> str:
    network: Any = form.module
    kind = type(getattr(network, "network", network)).__name__
    advice = "export it for one size (dynamic=False, --static)" if dynamic else (
        "its forward may not depend on the values of tensors")  # fmt: skip
    sizes = " with free sizes" if dynamic else ""
    asked = ", ".join(_suggested(error))
    why = f"torch.export asks for {asked}" if asked else reason(error)
    return f"{kind} cannot be traced{sizes} ({why}); {advice}"
