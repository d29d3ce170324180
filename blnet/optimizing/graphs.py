"""CUDA graphs, and the branches of a Big-Little module side by side on two streams.

Both cut what a GPU waits for when a batch is small: the launches of its many kernels, and the small
maps of the big branch, which leave most of the device idle.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn

from blnet.module import BigLittleModule
from blnet.optimizing.engines import Inputs, Run

WARM_UP_CALLS = 3


class Captured:
    """A run captured as a CUDA graph for inputs of one shape.

    A call copies the inputs in, replays the graph and gives the output, a copy of its own unless
    asked otherwise: the graph's output is overwritten by the next replay.

    Args:
        run: what is captured; it must do the same work in every call.
        inputs: examples, on a CUDA device.
        copies: whether a call gives a copy of the output.
    """

    def __init__(self, run: Run, inputs: Inputs, copies: bool = True) -> None:
        self.copies = copies
        self._lock = threading.Lock()
        self._inputs = tuple(x.clone(memory_format=torch.preserve_format) for x in inputs)
        with torch.no_grad():
            _warm_up(run, self._inputs)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = run(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the output for inputs of the example's shapes."""
        with self._lock:
            for static, given in zip(self._inputs, inputs, strict=True):
                static.copy_(given)
            self._graph.replay()
            return self._output.clone() if self.copies else self._output


def _warm_up(run: Run, inputs: Inputs) -> None:
    """Let libraries choose and allocate on another stream, as capturing asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(side)


class _Ahead(nn.Module):
    """A branch that runs on a stream of its own; whoever reads its result waits for it."""

    def __init__(self, branch: nn.Module, stream: torch.cuda.Stream) -> None:
        super().__init__()
        self.branch = branch
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        here = torch.cuda.current_stream(x.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            y: Tensor = self.branch(x)
        # The allocator may give memory back to its own stream only once the other is done with it.
        x.record_stream(self.stream)
        y.record_stream(here)
        return y


class _Joined(nn.Module):
    """A branch after which its stream waits for the one that ran ahead."""

    def __init__(self, branch: nn.Module, stream: torch.cuda.Stream) -> None:
        super().__init__()
        self.branch = branch
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        torch.cuda.current_stream(x.device).wait_stream(self.stream)
        return y


def side_by_side(network: nn.Module) -> nn.Module | None:
    """Return a copy in which the big branch of every module runs beside the next smaller one.

    The big branch is called first, on a stream of its own; the smaller branch runs on the caller's
    meanwhile, and the merge waits for both. It goes for any network with Big-Little modules.

    Returns:
        The copy; None where no module has two branches.
    """
    network = copy.deepcopy(network)
    stream = None
    for module in network.modules():
        if isinstance(module, BigLittleModule) and len(module.branches) > 1:
            stream = stream or torch.cuda.Stream()
            module.branches[-1] = _Ahead(module.branches[-1], stream)
            module.branches[-2] = _Joined(module.branches[-2], stream)
    return network if stream is not None else None
