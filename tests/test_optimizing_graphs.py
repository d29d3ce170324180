"""CUDA graphs and two streams, with stand-ins for a GPU: what waits for what, and where."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from blnet.optimizing.choosing import Candidate, candidates, choose
from blnet.optimizing.engines import Engine
from blnet.optimizing.graphs import WARM_UP_CALLS, Captured, captured_where_made, side_by_side
from blnet.vision.models import bl_resnet18


class Gpu:
    """A stand-in for `torch.cuda`: streams and devices that are current, and what waits for what.

    What is captured is run again by a replay.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[tuple[Any, Any]] = []
        self.devices: list[Any] = []
        gpu = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                gpu.waits.append((self, other))

        class CUDAGraph:
            def replay(self) -> None:
                gpu.replayed += 1

        self.current = self.default = Stream()
        self.replayed = 0
        self.captured_on = None
        self.new_stream = Stream
        for name, stand_in in {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "current_stream": lambda *_: self.current,
            "current_device": lambda: 0,
            "stream": self.stream,
            "device": self.device,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        self.devices.append(device)
        yield
        self.devices.pop()

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.captured_on = stream
        with self.stream(stream):
            yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_two_streams_leave_results_and_networks_alone(gpu: Gpu) -> None:
    torch.manual_seed(0)
    model: nn.Module = bl_resnet18(alpha=2, beta=4, num_classes=10).eval()
    images = torch.randn(2, 3, 33, 47)
    split = side_by_side(model)
    assert split is not None
    with torch.no_grad():
        assert torch.equal(split(images), model(images))
    forks = [pair for pair in gpu.waits if pair[1] is gpu.default]
    joins = [pair for pair in gpu.waits if pair[0] is gpu.default]
    # One module a stage but the last; each waits before its big branch and before its merge.
    assert len(forks) == len(joins) == 3
    assert gpu.waits[::2] == forks
    assert side_by_side(torchvision.models.resnet18()) is None


def test_captured_engines_are_tried_on_a_gpu_only() -> None:
    assert not any(c.graph or c.streams for c in candidates("cpu", "auto", "auto"))
    names = [c.name for c in candidates("cuda", "auto", "auto")]
    assert {"kernels", "kernels, CUDA graph", "kernels, two streams, CUDA graph"} <= set(names)
    assert "kernels, two streams" not in names
    assert all(c.graph for c in candidates("cuda", "auto", True))
    assert not any(c.graph for c in candidates("cuda", "auto", False))


def test_a_run_is_warmed_up_and_captured_aside(gpu: Gpu) -> None:
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append((gpu.current, gpu.devices[-1]))
        return x + 1

    x = torch.zeros(3)
    captured = Captured(run, (x,))
    streams, devices = zip(*seen, strict=True)
    assert len(streams) == WARM_UP_CALLS + 1
    assert gpu.default not in streams
    assert streams[-1] is gpu.captured_on
    assert set(devices) == {x.device}, "whatever the current device is"
    side = streams[0]
    assert gpu.waits == [(side, gpu.default), (gpu.default, side)]
    first, second = captured(torch.ones(3)), captured(torch.ones(3))
    assert gpu.replayed == 2
    assert len(seen) == WARM_UP_CALLS + 1
    assert first.data_ptr() != second.data_ptr()
    assert not x.any(), "the example is copied"


def test_calls_on_other_streams_wait_for_the_last_one(gpu: Gpu) -> None:
    captured = Captured(lambda x: x + 1, (torch.zeros(3),))
    gpu.waits.clear()
    for _ in range(2):
        captured(torch.ones(3))
    assert gpu.waits == []
    other = gpu.new_stream()
    with gpu.stream(other):
        for _ in range(2):
            captured(torch.ones(3))
    assert gpu.waits == [(other, gpu.default)]
    captured(torch.ones(3))
    assert gpu.waits[1:] == [(gpu.default, other)]


@pytest.mark.parametrize("built", [True, False])
def test_inference_mode_may_differ_between_capture_and_calls(gpu: Gpu, built: bool) -> None:
    with torch.inference_mode(built):
        captured = Captured(lambda x: x + 1, (torch.zeros(3),))
    with torch.inference_mode(not built):
        assert captured(torch.ones(3)).shape == (3,)


def test_a_backward_pass_is_captured_on_the_stream_of_its_forward_pass(gpu: Gpu) -> None:
    streams = []

    def make() -> Any:
        streams.append(gpu.current)
        return lambda: streams.append(gpu.current)

    captured = captured_where_made(make)
    assert len(set(streams)) == 1
    assert streams[0] is gpu.captured_on is not gpu.default
    assert gpu.waits[0] == (streams[0], gpu.default), "what it reads is ready"
    assert captured() is None


def test_an_engine_is_built_once_for_itself_and_its_graph(gpu: Gpu) -> None:
    builds = []

    def build(network: nn.Module, inputs: Any) -> Any:
        builds.append(network)
        return network

    engine = Engine("counted", "", build, devices=("cpu",))
    network, x = nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)
    tried = [Candidate(engine), Candidate(engine, graph=True)]
    with torch.no_grad():
        choice = choose(tried, network, (x,), network(x), torch.float32, seconds=60)
    assert builds == [network]
    assert [trial.engine for trial in choice.trials] == ["counted", "counted, CUDA graph"]
    assert not any(trial.note.startswith("dropped") for trial in choice.trials)


@pytest.mark.parametrize("graphs", [(False, True), (True,)])
def test_what_an_engine_and_its_graph_took_is_told_apart(gpu: Gpu, graphs: Any) -> None:
    def build(network: nn.Module, inputs: Any) -> Any:
        time.sleep(0.3)
        return network

    engine = Engine("slow", "", build, devices=("cpu",))
    network, x = nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)
    tried = [Candidate(engine, graph=graph) for graph in graphs]
    with torch.no_grad():
        choice = choose(tried, network, (x,), network(x), torch.float32, seconds=60)
    last = choice.trials[-1]
    assert last.build_seconds is not None
    assert last.build_seconds >= 0.3
    if graphs == (True,):  # there both were one
        assert last.capture_seconds is None
        assert "captured" not in str(last)
        return
    assert last.build_seconds == choice.trials[0].build_seconds
    assert last.capture_seconds is not None
    assert last.capture_seconds < 0.3
    assert f"built in {last.build_seconds:.1f} s, captured in 0." in str(last)
    assert choice.trials[0].capture_seconds is None
