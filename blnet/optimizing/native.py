"""The native engine: a whole network as one program of `blnet.kernels.native`.

A network in evaluation mode is exported to ATen operations for one shape of input. Maps
(N, C, H, W) become steps of the program, in which what follows a convolution (batch normalisation,
residual, upsampling of the residual, ReLU) is part of the convolution; the few operations on what
is no map any more, at the end, are left to PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from blnet.exporting.programs import quiet
from blnet.files import reason
from blnet.kernels.native import Program
from blnet.optimizing.native_heads import linear_layer
from blnet.optimizing.native_lowering import Lowering, UnsupportedError, calls_of, label_of
from blnet.optimizing.native_ops import HEAD, LOWERED

JOINS = {torch.ops.aten.view.default: linear_layer}

__all__ = ["NativeRun", "UnsupportedError", "build"]


class NativeRun:
    """A network made ready for one shape of input; call it with such an input.

    Attributes:
        steps: what was made of the network, in order.
    """

    def __init__(self, program: Program, head: fx.GraphModule) -> None:
        calls = calls_of(head.graph)
        self.steps = [*program.steps, *(f"torch: {label_of(call)}" for call in calls)]
        self._program = program
        (result,) = (node.args[0] for node in head.graph.nodes if node.op == "output")
        done = not calls and result.op == "placeholder"  # by the program, whose one output it is
        self._head = None if done else head

    def __call__(self, x: Tensor) -> Tensor:
        """Return the network's output; threads of Python take turns.

        Raises:
            ValueError: if x has another shape, dtype or device than the example had.
        """
        outputs = self._program(x)
        out: Tensor = outputs[0] if self._head is None else self._head(*outputs)
        return out


def build(model: nn.Module, example: Tensor) -> NativeRun:
    """Make a network ready for inputs of the example's shape; its weights are copied.

    Args:
        model: a network in evaluation mode, float32 on the CPU, from one tensor to one tensor.
        example: an input, shape (N, C, H, W), float32 on the CPU.

    Raises:
        UnsupportedError: naming the operation that the engine does not have.
        NativeError: if there is no compiler here.
        ValueError: if the network is in train mode or the example is no such tensor.
    """
    if example.dim() != 4 or example.dtype != torch.float32 or example.device.type != "cpu":
        raise ValueError(
            f"the native engine takes float32 maps (N, C, H, W) on the CPU, got {example.dtype} of "
            f"shape {tuple(example.shape)} on {example.device}; convert the input"
        )
    if any(module.training for module in model.modules()):
        raise ValueError("the native engine is for inference; call model.eval() first")
    shape = (example.shape[0], example.shape[1], example.shape[2], example.shape[3])
    with torch.no_grad():
        graph, constants = _capture(model, torch.zeros(shape, dtype=torch.float32))
        program, head = Lowering(graph, constants, shape, LOWERED, HEAD, JOINS).run()
        return NativeRun(program, head)


def _capture(model: nn.Module, example: Tensor) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Return the network as a graph without side effects, and what its placeholders hold."""
    try:
        with quiet():
            exported = torch.export.export(model, (example,)).run_decompositions()
    except Exception as error:  # a user's forward may raise anything when it is traced
        raise UnsupportedError(
            f"{type(model).__name__} cannot be exported ({reason(error)}); take another engine"
        ) from error
    signature = exported.graph_signature
    held = {**exported.state_dict, **exported.constants}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
        raise UnsupportedError(
            f"{type(model).__name__} must map one tensor to one tensor; take another engine"
        )
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise UnsupportedError(
            f"{type(model).__name__} changes its input or its buffers; take another engine"
        )
    return exported.graph, {name: held[key] for name, key in names.items()}
