"""The ladder: the ways to run one network, from plain eager to compiled, other engines, and ours.

A network is compared with the fastest rung of the plain network's ladder that is not ours, and
stands on the fastest rung of its own. Plain and Big-Little networks get the same rungs, ours
included, so that a reader sees what the architecture brings, what the engines and kernels bring,
and both.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blnet.optimizing.choosing import Candidate
from blnet.optimizing.engines import compiled, compiled_frozen, engine
from blnet.optimizing.graphs import Captured
from blnet.optimizing.optimize import prepared

Run = Callable[[Tensor], Tensor]
Runs = dict[str, Run | None]  # of rungs by their names, before any graph; None: not built yet


@dataclass(frozen=True)
class Rung:
    """One way to run a network.

    Attributes:
        name: what the tables call it.
        description: one sentence on it.
        make: takes a network in eval mode and an example input; returns what maps an input like
            the example to the logits, before any graph. It leaves the network as it was.
        channels_last: whether it wants its input in channels-last layout.
        devices: where it can run.
        quick: devices on which it is part of a quick run; see `rungs`.
        replays: the rung whose run it replays as a CUDA graph; that one's is taken where it was
            built for the same network and input, so that nothing is compiled twice.
        compiles: whether building it compiles, for seconds or minutes.
        own_pool: whether it holds memory of its own between calls, so that peak memory says little.
        ours: whether its speed is this project's work. Such a rung is no baseline.
        dtypes: what it computes in; empty for anything.
        package: what no extra of this project installs; without it a quick run leaves the rung out,
            and a full one says what is missing.
    """

    name: str
    description: str
    make: Callable[[nn.Module, Tensor], Run]
    channels_last: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: tuple[str, ...] = ("cpu", "cuda")
    replays: str = ""
    compiles: bool = False
    own_pool: bool = False
    ours: bool = False
    dtypes: tuple[str, ...] = ()
    package: str = ""

    def build(self, model: nn.Module, example: Tensor, built: Runs | None = None) -> Run:
        """Return what runs a network; of a graph its output is overwritten by the next call.

        Args:
            model: the network, in eval mode.
            example: an input.
            built: runs for both that several rungs need, by the rungs' names, None where it is not
                built yet. This one's is added where it is asked for.
        """
        built = {} if built is None else built
        name = self.replays or self.name
        run = built.get(name)
        if run is None:
            run = self.make(model, example)
        if name in built:
            built[name] = run
        return Captured(run, (example,), copies=False) if self.replays else run

    def is_quick(self, device: str, dtype: str, batch: int | None) -> bool:
        """Return whether it is part of a quick run on a device at a batch, see `rungs`."""
        if device not in self.quick:
            return False
        if self.compiles and batch == 1 and _runs_onnx(device, dtype):
            return False
        return self.is_installed()

    def is_installed(self) -> bool:
        """Return whether its package is installed, where it needs one that no extra installs."""
        return not self.package or importlib.util.find_spec(self.package) is not None


def rungs(
    device: str, full: bool = False, dtype: str = "float32", batch: int | None = None
) -> list[Rung]:
    """Return the rungs of a device's ladder: all of them, or those that fit a quick run.

    A quick run on a CPU compiles nothing at batch 1 where ONNX Runtime is there for float32: it was
    8 to 20 % faster than compiled networks on every CPU so far, and compiling takes a fifth of the
    run.

    Args:
        device: "cpu" or "cuda".
        full: whether to return all of them.
        dtype: what is computed in.
        batch: images at once; None for the throughput batch, whatever it is.
    """
    return [
        rung
        for rung in LADDER
        if device in rung.devices
        and (full or rung.is_quick(device, dtype, batch))
        and (not rung.dtypes or dtype in rung.dtypes)
    ]


def _runs_onnx(device: str, dtype: str) -> bool:
    """Return whether the rung of ONNX Runtime can be run."""
    installed = importlib.util.find_spec("onnxruntime") is not None
    return device == "cpu" and dtype in _FLOAT32 and installed


def fold_batch_norm(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of a network in eval mode with every BN folded into its convolution.

    The example bears out what the code alone does not tell.
    """
    with torch.no_grad():
        reference = model(example)
    return prepared(model, example.dtype, (example,), reference)[0]


def _eager(model: nn.Module, example: Tensor) -> Run:
    return model


def _channels_last(model: nn.Module, example: Tensor) -> Run:
    return _copy(model)


def _copy(model: nn.Module) -> nn.Module:
    # PyTorch's own annotations know no call with a memory format alone.
    own: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return own


def _folded(model: nn.Module, example: Tensor) -> Run:
    return fold_batch_norm(model, example)


def _compile(model: nn.Module, example: Tensor, **options: Any) -> Run:
    own = _copy(model)
    with torch.inference_mode():
        return compiled(own, (example,), **options)  # type: ignore[no-any-return]


def _compile_frozen(model: nn.Module, example: Tensor) -> Run:
    return compiled_frozen(_copy(model), (example,))


def _compile_tuned(model: nn.Module, example: Tensor) -> Run:
    return compiled_frozen(_copy(model), (example,), mode="max-autotune-no-cudagraphs")


def _engine(name: str) -> Callable[[nn.Module, Tensor], Run]:
    """Return what builds an engine of `blnet.optimize`, just as that does."""

    def build(model: nn.Module, example: Tensor) -> Run:
        return Candidate(engine(name)).build(fold_batch_norm(model, example), (example,))

    return build


_FLOAT32 = ("float32",)
LADDER = (
    Rung(
        "eager",
        "PyTorch as it comes, contiguous (NCHW) input.",
        _eager,
        channels_last=False,
    ),
    Rung(
        "channels-last",
        "Eager, weights and input in channels-last (NHWC) layout.",
        _channels_last,
        quick=("cuda",),
    ),
    Rung(
        "folded",
        "Eager, channels-last, every BN folded into its convolution.",
        _folded,
    ),
    Rung(
        "compile",
        "torch.compile, default mode, channels-last.",
        _compile,
        compiles=True,
        quick=(),
    ),
    Rung(
        "compile, frozen",
        "torch.compile with frozen weights (BN folded, weights packed), channels-last.",
        _compile_frozen,
        compiles=True,
    ),
    Rung(
        "compile, tuned",
        "torch.compile, max-autotune and frozen weights, channels-last.",
        _compile_tuned,
        compiles=True,
        quick=(),
    ),
    Rung(
        "folded, graph",
        "Eager, channels-last, BN folded, replayed as a CUDA graph.",
        _folded,
        replays="folded",
        devices=("cuda",),
        own_pool=True,
    ),
    Rung(
        "compile, frozen, graph",
        "torch.compile with frozen weights, channels-last, replayed as a CUDA graph.",
        _compile_frozen,
        replays="compile, frozen",
        compiles=True,
        devices=("cuda",),
        own_pool=True,
    ),
    Rung(
        "compile, tuned, graph",
        "torch.compile, max-autotune and frozen weights, replayed as a CUDA graph.",
        _compile_tuned,
        replays="compile, tuned",
        compiles=True,
        devices=("cuda",),
        quick=(),
        own_pool=True,
    ),
    Rung(
        "onnxruntime",
        "ONNX Runtime on the exported network.",
        _engine("onnxruntime"),
        channels_last=False,
        devices=("cpu",),
        own_pool=True,
        dtypes=_FLOAT32,
    ),
    Rung(
        "openvino",
        "OpenVINO on the exported network.",
        _engine("openvino"),
        channels_last=False,
        devices=("cpu",),
        own_pool=True,
        dtypes=_FLOAT32,
        package="openvino",
    ),
    Rung(
        "tensorrt",
        "TensorRT, through torch_tensorrt.",
        _engine("tensorrt"),
        devices=("cuda",),
        quick=(),
        compiles=True,
        own_pool=True,
        package="torch_tensorrt",
    ),
    Rung(
        "blnet native",
        "blnet.optimize, engine 'native': this project's C++ engine.",
        _engine("native"),
        channels_last=False,
        devices=("cpu",),
        own_pool=True,
        ours=True,
        dtypes=_FLOAT32,
    ),
    Rung(
        "blnet kernels",
        "blnet.optimize, engine 'kernels': fused Triton kernels, the rest PyTorch's.",
        _engine("kernels"),
        devices=("cuda",),
        ours=True,
    ),
    Rung(
        "blnet kernels, graph",
        "blnet.optimize, engine 'kernels', replayed as a CUDA graph.",
        _engine("kernels"),
        replays="blnet kernels",
        devices=("cuda",),
        own_pool=True,
        ours=True,
    ),
    Rung(
        "blnet kernels, compile, graph",
        "blnet.optimize, engine 'kernels, compile', replayed as a CUDA graph.",
        _engine("kernels, compile"),
        replays="blnet kernels, compile",
        compiles=True,
        devices=("cuda",),
        own_pool=True,
        ours=True,
    ),
)
