"""The engines that can run a network in evaluation, each built for one shape of inputs.

An engine takes a network whose batch norms are folded, in its precision and a layout that it takes
(`blnet.optimizing.optimize` prepares it), and example inputs. It gives a function of inputs of just
those shapes and dtypes. Engines are built alike for Big-Little and for plain networks.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blnet.kernels.backend import choose_backend
from blnet.limits import UnavailableError
from blnet.optimizing.layout import layout_of

Inputs = tuple[Tensor, ...]
Run = Callable[..., Any]


@dataclass(frozen=True)
class Engine:
    """One way to run a prepared network.

    Attributes:
        name: what users call it.
        description: one sentence on it.
        build: takes a prepared network and example inputs, returns what runs it. It leaves the
            network as it was, and raises an `UnavailableError` where the machine lacks what it
            needs.
        devices: where it can run.
        dtypes: what it computes in; empty for anything.
        one_tensor: whether it runs networks of one tensor only.
        compiles: whether building it compiles, for seconds or minutes.
        ours: whether its speed is this project's work and not another's.
        streams: whether the branches may run on streams of their own.
        exports: whether it runs a graph of the network, and calls no hooks of its layers.
        rewrite: makes another network of the prepared one before it is built; None for none.
    """

    name: str
    description: str
    build: Callable[[nn.Module, Inputs], Run]
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[torch.dtype, ...] = ()
    one_tensor: bool = False
    compiles: bool = False
    ours: bool = False
    streams: bool = False
    exports: bool = False
    rewrite: Callable[[nn.Module, Inputs], nn.Module] | None = None

    def why_not(self, inputs: Inputs, dtype: torch.dtype) -> str:
        """Say why it cannot run inputs in a precision; an empty text where it can."""
        if inputs[0].device.type not in self.devices:
            return f"it does not run on {inputs[0].device.type}"
        if self.dtypes and dtype not in self.dtypes:
            return f"it computes in {', '.join(map(name_of, self.dtypes))} only"
        if self.one_tensor and len(inputs) > 1:
            return "it takes one tensor only"
        return ""


def name_of(dtype: torch.dtype) -> str:
    """Return "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def engine_names() -> list[str]:
    """Return the names of the engines."""
    return [each.name for each in ENGINES]


def engine(name: str) -> Engine:
    """Return an engine by its name.

    Raises:
        ValueError: if there is none of that name.
    """
    for found in ENGINES:
        if found.name == name:
            return found
    told = ", ".join(map(repr, engine_names()))  # in quotes: a name may hold a comma
    raise ValueError(f"engine must be 'auto' or one of {told}, got {name!r}")


def copies(inputs: Inputs) -> Inputs:
    """Return inputs for a network whose code may change them in place."""
    return tuple(x.detach().clone() for x in inputs)


def compiled(function: Callable[..., Any], example: tuple[Any, ...], **options: Any) -> Any:
    """Return torch.compile of a function for one shape of input, compiled by a first call.

    Raises:
        UnavailableError: if this machine lacks what Inductor needs, a C++ compiler.
    """
    import torch._dynamo

    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(os.cpu_count() or 1))
    made = torch.compile(function, dynamic=False, **options)
    try:
        # Networks of one class share their code object; Dynamo's limit of eight versions of it
        # would let the ninth fall back to eager without a word.
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
            made(*example)
    except Exception as error:
        if _caused_by(error, "InvalidCxxCompiler"):
            raise UnavailableError(
                "torch.compile needs a C++ compiler; install g++ or clang"
            ) from error
        raise
    return made


def compiled_frozen(network: nn.Module, inputs: Inputs, **options: Any) -> Run:
    """Return torch.compile of a network with its weights frozen, for inputs of one shape.

    It always runs in the mode that it was compiled in: called in another one, it would be compiled
    once more without a word, and nothing would be frozen then.
    """
    import torch._inductor.config

    # The option must be set while Dynamo traces as well, which options={"freezing": True} of
    # torch.compile does not do: the weights then stay inputs and nothing is frozen.
    with (
        torch._inductor.config.patch(freezing=True),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        made: Run = compiled(network, inputs, **options)

    def run(*given: Tensor) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return made(*given)

    return run


def _caused_by(error: BaseException | None, name: str) -> bool:
    while error is not None:
        if type(error).__name__ == name or name in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _pytorch(network: nn.Module, inputs: Inputs) -> Run:
    lay = layout_of(network)
    return lambda *given: network(*map(lay, given))


def _fused(network: nn.Module, inputs: Inputs) -> nn.Module:
    from blnet.optimizing.fused_ops import with_fused_ops

    if choose_backend("merge", inputs[0]) == "torch":
        raise UnavailableError("no kernel runs on this device and in this precision")
    return with_fused_ops(network)[0]


def _compile(network: nn.Module, inputs: Inputs) -> Run:
    lay = layout_of(network)
    made = compiled_frozen(network, tuple(map(lay, inputs)))
    return lambda *given: made(*map(lay, given))


def _onnx_runtime(network: nn.Module, inputs: Inputs) -> Run:
    try:
        import onnxruntime
    except ImportError:
        raise UnavailableError(
            "onnxruntime is not installed; pip install 'blnet[export]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads would spin for long after a call, and take the cores from whatever comes next.
    # It costs ONNX Runtime a little in a loop of its own calls: docs/optimize.md has how much.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        _onnx(network, inputs), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        (y,) = session.run(None, {name: _array(x)})
        return torch.from_numpy(y)

    return run


def _openvino(network: nn.Module, inputs: Inputs) -> Run:
    try:
        import openvino
    except ImportError:
        raise UnavailableError("openvino is not installed; pip install openvino") from None
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    made = core.compile_model(core.read_model(_onnx(network, inputs)), "CPU", settings)
    lock = threading.Lock()

    def run(x: Tensor) -> Tensor:
        # All calls use one buffer: threads take turns, and the next call writes over it.
        with lock:
            return torch.from_numpy(made(_array(x))[0].copy())

    return run


def _array(x: Tensor) -> Any:
    return x.detach().resolve_neg().contiguous().numpy()


def _onnx(network: nn.Module, inputs: Inputs) -> bytes:
    from blnet.exporting.onnx import onnx_bytes

    try:
        return onnx_bytes(network, inputs[0])
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install 'blnet[export]'") from error


def _tensorrt(network: nn.Module, inputs: Inputs) -> Run:
    try:
        import torch_tensorrt
    except ImportError:
        raise UnavailableError(
            "torch_tensorrt is not installed; pip install torch-tensorrt"
        ) from None
    made: Run = torch_tensorrt.compile(
        network, ir="dynamo", arg_inputs=inputs, enabled_precisions={inputs[0].dtype}
    )
    return made


def _native(network: nn.Module, inputs: Inputs) -> Run:
    from blnet.kernels.native.library import NativeError
    from blnet.optimizing import native

    # It packs the weights in a layout of its own, and traces a contiguous network.
    own = copy.deepcopy(network)
    for parameter in own.parameters():
        parameter.data = parameter.data.contiguous()
    try:
        return native.build(own, inputs[0].contiguous())
    except (NativeError, native.UnsupportedError) as error:
        raise UnavailableError(str(error)) from error


_ANYWHERE = ("cpu", "cuda")
_FLOATS = (torch.float32,)
# In the order of trying: what is built at once comes first, what compiles for long comes last.
ENGINES: Sequence[Engine] = (
    Engine(
        "pytorch",
        "PyTorch's own operations (oneDNN, cuDNN), layer by layer.",
        _pytorch,
        devices=_ANYWHERE,
        streams=True,
    ),
    Engine(
        "kernels",
        "PyTorch with this project's fused kernels where they fit.",
        _pytorch,
        devices=_ANYWHERE,
        ours=True,
        streams=True,
        rewrite=_fused,
    ),
    Engine(
        "native",
        "This project's C++ engine: the whole network in one call, 3x3 convolutions by Winograd.",
        _native,
        dtypes=_FLOATS,
        one_tensor=True,
        ours=True,
        exports=True,
    ),
    Engine(
        "onnxruntime",
        "ONNX Runtime.",
        _onnx_runtime,
        dtypes=_FLOATS,
        one_tensor=True,
        exports=True,
    ),
    Engine("openvino", "OpenVINO.", _openvino, dtypes=_FLOATS, one_tensor=True, exports=True),
    Engine(
        "tensorrt",
        "TensorRT, through torch_tensorrt.",
        _tensorrt,
        devices=("cuda",),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        compiles=True,
        exports=True,
    ),
    Engine(
        "compile",
        "torch.compile with frozen weights.",
        _compile,
        devices=_ANYWHERE,
        compiles=True,
    ),
    Engine(
        "kernels, compile",
        "This project's fused kernels, the rest by torch.compile with frozen weights.",
        _compile,
        devices=_ANYWHERE,
        compiles=True,
        ours=True,
        rewrite=_fused,
    ),
)
