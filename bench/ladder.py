"""The ladder: the ways PyTorch has to run one network, from plain eager to compiled.

A network is compared with the fastest rung of the plain network's ladder, and stands on the
fastest rung of its own. Plain and Big-Little networks get the same rungs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blnet.bench.measure import UnavailableError

Run = Callable[[Tensor], Tensor]
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Rung:
    """One way to run a network.

    Attributes:
        name: what the tables call it.
        description: one sentence on it.
        build: takes a network in eval mode and an example input; returns what maps an input like
            the example to the logits. It leaves the network as it was.
        channels_last: whether it wants its input in channels-last layout.
        devices: where it can run.
        quick: devices on which it is part of a quick run.
        compiles: whether building it compiles, for seconds or minutes.
        own_pool: whether it holds memory of its own between calls, so that peak memory says little.
    """

    name: str
    description: str
    build: Callable[[nn.Module, Tensor], Run]
    channels_last: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: tuple[str, ...] = ("cpu", "cuda")
    compiles: bool = False
    own_pool: bool = False


def rungs(device: str, full: bool = False) -> list[Rung]:
    """Return the rungs of a device's ladder: all of them, or those that fit a quick run."""
    return [r for r in LADDER if device in r.devices and (full or device in r.quick)]


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


def _caused_by(error: BaseException | None, name: str) -> bool:
    while error is not None:
        if type(error).__name__ == name or name in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a network in eval mode with every BN folded into its convolution."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def _eager(model: nn.Module, example: Tensor) -> Run:
    return model


def _channels_last(model: nn.Module, example: Tensor) -> Run:
    return _copy(model)


def _copy(model: nn.Module) -> nn.Module:
    # PyTorch's own annotations know no call with a memory format alone.
    own: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return own


def _folded(model: nn.Module, example: Tensor) -> Run:
    return fold_batch_norm(_copy(model))


def _compile(model: nn.Module, example: Tensor, **options: Any) -> Run:
    own = _copy(model)
    with torch.inference_mode():
        return compiled(own, (example,), **options)  # type: ignore[no-any-return]


def _compile_frozen(model: nn.Module, example: Tensor) -> Run:
    import torch._inductor.config

    # The option must be set while Dynamo traces as well, which options={"freezing": True} of
    # torch.compile does not do: the weights then stay inputs and nothing is frozen.
    with torch._inductor.config.patch(freezing=True):
        return _compile(model, example)


def _compile_tuned(model: nn.Module, example: Tensor) -> Run:
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True):
        return _compile(model, example, mode="max-autotune-no-cudagraphs")


@torch.inference_mode()
def _graph_of(run: Run, example: Tensor) -> Run:
    """Capture a run as a CUDA graph; each call copies the input in and replays it."""
    static = example.clone(memory_format=torch.preserve_format)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(static)

    def replay(images: Tensor) -> Tensor:
        static.copy_(images)
        graph.replay()
        return output

    return replay


def _folded_graph(model: nn.Module, example: Tensor) -> Run:
    return _graph_of(_folded(model, example), example)


def _compile_frozen_graph(model: nn.Module, example: Tensor) -> Run:
    return _graph_of(_compile_frozen(model, example), example)


def _compile_tuned_graph(model: nn.Module, example: Tensor) -> Run:
    return _graph_of(_compile_tuned(model, example), example)


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
        _folded_graph,
        devices=("cuda",),
        own_pool=True,
    ),
    Rung(
        "compile, frozen, graph",
        "torch.compile with frozen weights, channels-last, replayed as a CUDA graph.",
        _compile_frozen_graph,
        compiles=True,
        devices=("cuda",),
        own_pool=True,
    ),
    Rung(
        "compile, tuned, graph",
        "torch.compile, max-autotune and frozen weights, replayed as a CUDA graph.",
        _compile_tuned_graph,
        compiles=True,
        devices=("cuda",),
        quick=(),
        own_pool=True,
    ),
)
