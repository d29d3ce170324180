"""ONNX: networks as models of opset 18 or newer, in one file, weights inside."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from blnet.exporting.forms import Form, prepared
from blnet.exporting.programs import trace_program, tracing
from blnet.exporting.translations import translations
from blnet.files import reason

OPSET = 18


def onnx_bytes(model: nn.Module, example: Tensor) -> bytes:
    """Return a network as an ONNX model for inputs of one shape, input "image", output "logits".

    Every resize by a whole number has constant scales, with which ONNX Runtime keeps its fast
    layout, and no weight is left over. The network stays as it is.

    Args:
        model: a network from one tensor to one tensor on any device, fused or not; computed in
            float32, whatever its dtype. Of a speech network recordings are as long as the map.
        example: an input, of which only the shape counts.

    Raises:
        ValueError: if the network does not run on such an input or cannot be traced.
        ImportError: if onnx or onnxscript is missing.
    """
    need_onnx()
    form = prepared(model, example, lengths=False)
    program = trace_program(form, dynamic=False)
    return onnx_model(form, program).SerializeToString()  # type: ignore[no-any-return]


def onnx_model(
    form: Form,
    program: ExportedProgram,
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
) -> Any:
    """Return a network as an onnx.ModelProto, whose free axes have their names.

    Args:
        form: the network.
        program: what it was traced to.
        opset: version of ONNX's operators, 18 or newer.
        metadata: for the model's metadata_props.

    Raises:
        ValueError: if ONNX has no such operators, results or opset.
        ImportError: if onnx or onnxscript is missing.
    """
    check_opset(opset)
    _check_translatable(program)
    try:
        with tracing():
            model = _translated(form, program, opset)
    except Exception as error:
        raise ValueError(
            f"the network cannot be written as ONNX opset {opset} ({reason(_first_of(error))}); "
            "use another --format, or the default opset"
        ) from error
    _give_constant_scales(model.graph)
    _remove_unused(model.graph)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    return model


def _check_translatable(program: ExportedProgram) -> None:
    given = (node.meta.get("val") for node in program.graph.output_node().args[0])
    if any(isinstance(one, Tensor) and one.is_complex() for one in given):
        raise ValueError(
            "the network gives complex numbers, which ONNX files do not; have it return "
            "torch.view_as_real of them, or use another --format"
        )
    aten = torch.ops.aten
    for node in program.graph.nodes:
        parts = [
            user.args[1] for user in node.users if user.target is operator.getitem and user.users
        ]
        pools = (aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default)
        if node.target in pools and 1 in parts:
            raise ValueError(
                "the network asks an adaptive maximum where its largest values lie "
                "(return_indices), which is not translated to ONNX; use another --format"
            )


def check_opset(opset: int) -> None:
    """Raise a ValueError if the installed onnx has no such opset.

    Raises:
        ValueError: if so.
        ImportError: if onnx or onnxscript is missing.
    """
    need_onnx()
    if type(opset) is not int or not OPSET <= opset <= _newest_opset():
        raise ValueError(f"opset must be from {OPSET} to {_newest_opset()}, got {opset!r}")


def need_onnx() -> None:
    """Raise an ImportError that says what to do where onnx or onnxscript is missing."""
    import onnx  # noqa: F401
    import onnxscript  # noqa: F401


def _first_of(error: BaseException) -> BaseException:
    """Return the error that others came of; PyTorch's own tell of steps and reports first."""
    return error if error.__cause__ is None else _first_of(error.__cause__)


def _newest_opset() -> int:
    import onnx.defs

    return onnx.defs.onnx_opset_version()


def _translated(form: Form, program: ExportedProgram, opset: int) -> Any:
    made = torch.onnx.export(
        program,
        (),
        None,
        dynamo=True,
        opset_version=opset,
        verbose=False,
        dynamic_shapes=form.free,  # of a program these are the names only
        input_names=list(form.inputs),
        output_names=list(form.outputs),
        custom_translation_table=translations(free=bool(program.range_constraints)),
    )
    assert made is not None
    return made.model_proto


# Tidying -------------------------------------------------------------------------------------


def _give_constant_scales(graph: Any) -> None:
    """Give each Resize to known sizes, whole multiples of its input's, constant scales instead."""
    import numpy
    from onnx import numpy_helper

    shapes = _known_shapes(graph)
    for node in graph.node:
        if node.op_type != "Resize" or len(node.input) < 4:
            continue
        before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
        if not before or not after or any(n % m for n, m in zip(after, before, strict=True)):
            continue
        name = f"{node.output[0]}_scales"
        scales = [n / m for n, m in zip(after, before, strict=True)]
        graph.initializer.append(numpy_helper.from_array(numpy.array(scales, numpy.float32), name))
        kept = node.input[0]
        del node.input[:]
        node.input.extend([kept, "", name])


def _known_shapes(graph: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of values that have no free size."""
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        if sizes and all(sizes):
            found[value.name] = sizes
    return found


def _remove_unused(graph: Any) -> None:
    """Remove nodes and weights whose results nobody takes; ONNX Runtime warns of those."""
    while True:
        used = {name for node in graph.node for name in node.input}
        used |= {value.name for value in graph.output}
        unused = [node for node in graph.node if not used.intersection(node.output)]
        if not unused:
            break
        for node in unused:
            graph.node.remove(node)
    for weight in [weight for weight in graph.initializer if weight.name not in used]:
        graph.initializer.remove(weight)
