"""CUDA graphs, and the branches of a Big-Little module side by side on two streams.

Both cut what a GPU waits for when a batch is small: the launches of its many kernels, and the small
maps of the big branch, which leave most of the device idle.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blnet.module import BigLittleModule
from blnet.optimizing.engines import Inputs, Run

WARM_UP_CALLS = 3


class Captured:
    """A run captured as a CUDA graph for inputs of one shape.

    A call copies the inputs in, replays the graph and gives the output, a copy of its own unless
    asked otherwise: the graph's output is overwritten by the next replay. Calls may come from any
    thread, on any stream and with any device the current one.

    Args:
        run: what is captured; it must do the same work in every call.
        inputs: examples, on a CUDA device; without any it is the current device.
        copies: whether a call gives a copy of the output.
        stream: what to capture on; a new one if None.
    """

    def __init__(
        self,
        run: Run,
        inputs: Inputs,
        copies: bool = True,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.copies = copies
        self._lock = threading.Lock()
        here = torch.cuda.current_device
        self._device = inputs[0].device if inputs else torch.device("cuda", here())
        # Outside of inference mode, as a tensor made inside could be written to nowhere else.
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = tuple(x.clone(memory_format=torch.preserve_format) for x in inputs)
        with torch.no_grad(), torch.cuda.device(self._device):
            self._last = torch.cuda.current_stream()
            _warm_up(run, self._inputs, stream or torch.cuda.Stream())
            self._graph = torch.cuda.CUDAGraph()
            # Not on PyTorch's own stream for it: that is on the device of a process's first graph.
            with torch.cuda.graph(self._graph, stream=stream or torch.cuda.Stream()):
                self._output = run(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the output for inputs of the example's shapes."""
        with self._lock, torch.cuda.device(self._device):
            self._wait_for_last_call()
            for static, given in zip(self._inputs, inputs, strict=True):
                static.copy_(given)
            self._graph.replay()
            return self._output.clone() if self.copies else self._output

    def _wait_for_last_call(self) -> None:
        """Let what another stream still does with the graph's inputs and output end first."""
        here = torch.cuda.current_stream()
        if here != self._last:
            here.wait_stream(self._last)
            self._last = here


def captured_where_made(make: Callable[[], Run]) -> Captured:
    """Make a run without inputs on the stream that it is captured on; calls give no copies.

    For a backward pass: autograd runs it on the stream of its forward pass, and nothing may run on
    another stream while this one is captured.

    Args:
        make: returns the run.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = make()
    return Captured(run, (), copies=False, stream=stream)


def _warm_up(run: Run, inputs: Inputs, side: torch.cuda.Stream) -> None:
    """Let libraries choose and allocate on another stream, as capturing asks for."""
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
