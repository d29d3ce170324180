"""`blnet.optimize` for inference: the same call, the same results, and words where it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import blnet
from blnet.limits import UnavailableError
from blnet.optimizing import choosing, engines
from blnet.optimizing.choosing import Candidate, candidates, choose, difference
from blnet.optimizing.engines import Engine
from blnet.optimizing.graphs import side_by_side
from blnet.speech.models import bl_resnet22
from blnet.vision.models import bl_resnet18


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = bl_resnet18(alpha=2, beta=4, num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pytorch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave one engine, so that a test of other things builds one."""
    monkeypatch.setattr(choosing, "ENGINES", [engines.engine("pytorch")])


def test_without_an_example_the_prepared_network_runs_any_shape(model, images) -> None:
    fast = blnet.optimize(model)
    for x in (images, images[:1, :, :32, :32]):
        with torch.no_grad():
            assert difference(fast(x), model(x)) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert "no engine was measured" in str(fast.report)


@pytest.mark.parametrize("name", ["pytorch", "onnxruntime", "native", "compile"])
def test_every_engine_agrees(name, model, images) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = blnet.optimize(model, example_input=images, engine=name)
    assert fast.report.engine == name
    with torch.no_grad():
        other = images.flip(0) * 2 + 1
        assert difference(fast(other), model(other)) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_auto_takes_the_fastest_and_tells_of_all(model, images, monkeypatch) -> None:
    slow = Engine("slow", "", lambda net, _: lambda x: sum(net(x) for _ in range(9)) / 9)
    wrong = Engine("wrong", "", lambda net, _: lambda x: net(x) + 1)
    broken = Engine("broken", "", lambda net, _: 1 / 0)
    absent = Engine("absent", "", _absent)
    other = Engine("other", "", lambda net, _: net, dtypes=(torch.float64,))
    found = [*(engines.engine("pytorch"), slow, wrong, broken, absent, other)]
    monkeypatch.setattr(choosing, "ENGINES", found)
    fast = blnet.optimize(model, example_input=images)
    told = {trial.engine: trial for trial in fast.report.trials}
    assert list(told) == ["pytorch", "slow", "wrong", "broken", "absent", "other"]
    assert fast.report.engine == "pytorch"
    assert told["slow"].seconds > told["pytorch"].seconds
    assert "slower than pytorch" in told["slow"].note
    assert "its result is wrong" in told["wrong"].note
    assert "ZeroDivisionError" in told["broken"].note
    assert told["absent"].note == "install it"
    assert "float64 only" in told["other"].note


def _absent(network: nn.Module, inputs: Any) -> Any:
    raise UnavailableError("install it")


def test_what_the_time_does_not_allow_is_not_built(model, images) -> None:
    tried = candidates("cpu", "auto", False)
    with torch.no_grad():
        choice = choose(tried, model, (images,), model(images), torch.float32, seconds=0.0)
    assert choice.run is None
    assert all("were over" in t.note or "does not" in t.note for t in choice.trials)


def test_a_build_is_stopped_when_its_time_is_up(model, images, monkeypatch) -> None:
    def endless(network: nn.Module, inputs: Any) -> Any:
        while True:
            pass

    tried = [Candidate(Engine("endless", "", endless))]
    with torch.no_grad():
        choice = choose(tried, model, (images,), model(images), torch.float32, seconds=0.4)
    assert "took more than" in choice.trials[0].note


def test_other_inputs_run_eagerly_or_are_refused(model, images, pytorch_only) -> None:
    other = images[:1, :, :32, :40]
    calls = []
    fast = blnet.optimize(model, example_input=images)
    run = fast._run
    fast._run = lambda *x: calls.append(x) or run(*x)
    with torch.no_grad():
        for x in (images, other, images.contiguous(memory_format=torch.channels_last)):
            assert difference(fast(x), model(x)) < 1e-5
    assert len(calls) == 2  # another layout is no other input
    strict = blnet.optimize(model, example_input=images, other_inputs="error")
    with pytest.raises(ValueError, match=r"takes \(2, 3, 33, 47\) float32 on cpu, got \(1, 3, 32"):
        strict(other)
    with pytest.raises(ValueError, match="float64"):
        strict(images.double())


def test_an_input_that_wants_a_gradient_gets_one(model, images, pytorch_only) -> None:
    fast = blnet.optimize(model, example_input=images)
    x = images.clone().requires_grad_()
    fast(x).sum().backward()
    y = images.clone().requires_grad_()
    model(y).sum().backward()
    assert difference(x.grad, y.grad) < 1e-4


@pytest.mark.parametrize("precision", ["bfloat16", torch.float16])
def test_a_precision_is_for_the_inside(precision, model, images) -> None:
    exact = copy.deepcopy(model).double()(images.double()).detach()
    fast = blnet.optimize(model, example_input=images, precision=precision, engine="pytorch")
    dtype = getattr(torch, precision) if isinstance(precision, str) else precision
    out = fast(images)
    assert out.dtype == torch.float32
    assert next(fast.network.parameters()).dtype == dtype
    eager = copy.deepcopy(model).to(dtype)(images.to(dtype)).detach()
    assert difference(out, exact) <= 1.25 * difference(eager, exact)


def test_a_speech_network_with_lengths(pytorch_only) -> None:
    network = bl_resnet22(alpha=4, beta=2, head="ctc", num_classes=7, width=0.125).eval()
    nn.init.normal_(network.fc.weight)
    maps, lengths = torch.randn(3, 1, 64, 41), torch.tensor([41, 20, 7])
    whole = blnet.optimize(network, example_input=maps)
    padded = blnet.optimize(network, example_input=(maps, lengths))
    with torch.no_grad():
        assert difference(whole(maps), network(maps)) < 1e-5
        assert difference(padded(maps, lengths), network(maps, lengths)) < 1e-5
        assert difference(whole(maps, lengths), network(maps, lengths)) < 1e-5
        assert difference(whole(maps, lengths=lengths), network(maps, lengths)) < 1e-5


def test_a_speech_network_of_whole_clips_runs_on_other_engines() -> None:
    network = bl_resnet22(alpha=4, beta=2, head="ctc", num_classes=7, width=0.125).eval()
    nn.init.normal_(network.fc.weight)
    maps = torch.randn(2, 1, 64, 41)
    for name in ("onnxruntime", "native"):
        fast = blnet.optimize(network, example_input=maps, engine=name)
        assert difference(fast(maps), network(maps).detach()) < 1e-5, name


class Apart(nn.Module):
    """Calls the layers of a Sequential one by one, by code that asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.layers[1].running_mean.fill_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        return self.layers[1](y) + y if x.sum() > -1e9 else y


class Reaching(nn.Module):
    """Calls a block, and a layer of it once more."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torchvision.models.resnet.BasicBlock(3, 3)
        self.block.bn1.running_mean.fill_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block.conv1(x)


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Apart(), "could not be traced"), (Reaching(), "folding changed the result")],
)
def test_folding_that_is_wrong_is_taken_back(network, reason, pytorch_only) -> None:
    x = torch.randn(2, 3, 4, 4)
    fast = blnet.optimize(network.eval(), example_input=x)
    assert difference(fast(x), network(x).detach()) < 1e-6
    assert reason in fast.report.changes[0].reason


def test_the_original_is_untouched_and_its_later_changes_do_not_matter(model, images) -> None:
    own = copy.deepcopy(model).train()
    fast = blnet.optimize(own, example_input=images, engine="pytorch")
    assert own.training
    assert any(isinstance(m, nn.BatchNorm2d) for m in own.modules())
    before = fast(images)
    nn.init.zeros_(own.fc.weight)
    assert torch.equal(fast(images), before)


REFUSED = {
    "trained": lambda fast: fast.train(),
    "moved": lambda fast: fast.double(),
    "copied": copy.deepcopy,
    "pickled": pickle.dumps,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_an_engine_cannot_follow_is_refused(what, model) -> None:
    fast = blnet.optimize(model)
    assert fast.eval() is fast
    with pytest.raises(ValueError, match=what):
        REFUSED[what](fast)


IMAGE = torch.randn(1, 3, 32, 32)
BAD = [
    ({"mode": "fast"}, "mode must be one of inference, train"),
    ({"engine": "tvm", "example_input": IMAGE}, "engine must be one of auto, pytorch"),
    ({"precision": "int8"}, "precision must be one of float32, float16, bfloat16"),
    ({"graph": "yes"}, "graph must be one of"),
    ({"other_inputs": "guess"}, "other_inputs must be one of"),
    ({"example_input": "x"}, "example_input must be a tensor"),
    ({"example_input": torch.randn(1, 4, 32, 32)}, "does not take the example_input of shape"),
    ({"example_input": IMAGE.to("meta")}, "put both on the device"),
    ({"engine": "pytorch"}, "give example_input"),
    ({"graph": True, "example_input": IMAGE}, "needs a CUDA device"),
    ({"recompute": True}, "are for mode='train'"),
    ({"mode": "train", "precision": "bfloat16"}, "are for mode='inference'"),
    ({"engine": "tensorrt", "example_input": IMAGE}, "does not run on cpu"),
    (
        {"engine": "native", "example_input": IMAGE, "precision": "bfloat16"},
        "computes in float32 only",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_are_one_sentence(arguments, message, model) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        blnet.optimize(model, **arguments)
    assert "\n" not in str(caught.value)


def test_a_network_that_returns_no_tensor_is_refused(images) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ValueError, match="returns a tuple"):
        blnet.optimize(Pair(), example_input=images)


def test_explain_prints_layers_and_engines(model, images, capsys) -> None:
    blnet.optimize(model, example_input=images, engine="native").explain()
    text = capsys.readouterr().out
    assert "native for (2, 3, 33, 47) float32 on cpu" in text
    assert "stem.bn1 (BatchNorm2d): folded into stem.conv1" in text
    assert "runs (" in text


def test_two_streams_leave_results_and_networks_alone(model, images, monkeypatch) -> None:
    log = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            log.append((self, other))

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    here = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    split = side_by_side(model)
    with torch.no_grad():
        assert torch.equal(split(images), model(images))
    forks = [pair for pair in log if pair[1] is here]
    joins = [pair for pair in log if pair[0] is here]
    # One module a stage but the last; each waits before its big branch and before its merge.
    assert len(forks) == len(joins) == 3
    assert log[::2] == forks
    assert side_by_side(torchvision.models.resnet18()) is None


def test_captured_engines_are_tried_on_a_gpu_only() -> None:
    assert not any(c.graph or c.streams for c in candidates("cpu", "auto", "auto"))
    names = [c.name for c in candidates("cuda", "auto", "auto")]
    assert {"kernels", "kernels, CUDA graph", "kernels, two streams, CUDA graph"} <= set(names)
    assert "kernels, two streams" not in names
    assert all(c.graph for c in candidates("cuda", "auto", True))
    assert not any(c.graph for c in candidates("cuda", "auto", False))
