"""`blnet.optimize` for inference: the same call, the same results, and words where it refuses."""

from __future__ import annotations

import concurrent.futures
import copy
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd import forward_ad

import blnet
from blnet.limits import UnavailableError
from blnet.optimizing import choosing, engines
from blnet.optimizing.choosing import Candidate, candidates, choose, difference
from blnet.optimizing.engines import Engine
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


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A network that every engine builds at once."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


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
    # With time enough for a compiler on a busy machine.
    fast = blnet.optimize(model, example_input=images, engine=name, seconds=240)
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


def test_functional_transforms_go_layer_by_layer(small, images) -> None:
    fast = blnet.optimize(small, example_input=images, engine="native")
    direction = torch.randn_like(images)
    wanted = [x.detach() for x in torch.func.jvp(small, (images,), (direction,))]
    for found, right in zip(torch.func.jvp(fast, (images,), (direction,)), wanted, strict=True):
        assert difference(found, right) < 1e-4
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(images, direction)
        assert difference(forward_ad.unpack_dual(fast(dual)).tangent, wanted[1]) < 1e-4
    assert difference(torch.vmap(fast)(images[None])[0], wanted[0]) < 1e-4
    torch.compiler.reset()
    whole = torch.compile(blnet.optimize(small), fullgraph=True, backend="eager")
    assert difference(whole(images).detach(), wanted[0]) < 1e-4


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


class Named(nn.Module):
    """Takes a tensor by name, gives several in a tuple and a dict, and keeps count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, more: list[Tensor] | None = None, wide: bool = False) -> Any:
        self.calls += 1
        y = self.conv(x if more is None else x + more[0])
        return (y, {"mean": y.mean(1), "best": y.argmax(1)}) if wide else y.double()


def test_a_precision_reaches_named_inputs_and_gathered_outputs(images) -> None:
    fast = blnet.optimize(Named().eval(), precision="bfloat16")
    x = images.double()
    y, parts = fast(x=x, more=[x], wide=True)
    assert (y.dtype, parts["mean"].dtype) == (torch.float64, torch.float64)
    assert parts["best"].dtype == torch.int64


def test_the_dtype_of_the_result_is_the_originals(images, pytorch_only) -> None:
    network = Named().eval()
    assert blnet.optimize(network)(images).dtype == torch.float64
    for precision in (None, "bfloat16"):
        fast = blnet.optimize(network, example_input=images, precision=precision)
        assert fast(images).dtype == fast(images[:1]).dtype == torch.float64
    assert network.calls == 0  # a copy of the original gave what engines are compared with
    strict = blnet.optimize(network, example_input=images, other_inputs="error")
    with pytest.raises(ValueError, match="got more by name, x by name; give"):
        strict(more=[images], x=images)


def test_autocast_around_an_engine_changes_nothing(small, images) -> None:
    for name in ("pytorch", "native"):
        with torch.autocast("cpu", torch.bfloat16):
            fast = blnet.optimize(small, example_input=images, engine=name)
            inside = fast(images)
        assert torch.equal(inside, fast(images))
        assert difference(inside, small(images).detach()) < 1e-5


def test_an_engine_reads_a_negated_view_as_what_it_is(small, images) -> None:
    turned = torch.complex(images, -images).conj().imag
    assert turned.is_neg()
    for name in ("native", "onnxruntime"):
        fast = blnet.optimize(small, example_input=images, engine=name)
        assert torch.equal(fast(turned), fast(images)), name


@pytest.mark.parametrize("name", ["pytorch", "native", "onnxruntime", "openvino"])
def test_two_threads_may_call_at_once(name, small, images) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    fast = blnet.optimize(small, example_input=images, engine=name)
    inputs = [images * scale for scale in (0.5, 1.0, 2.0, 4.0)]
    alone = [fast(x) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            for out, right in zip(pool.map(fast, inputs), alone, strict=True):
                assert difference(out, right) < 1e-6


def test_openvinos_calls_take_turns(monkeypatch) -> None:
    busy, together = threading.Lock(), []

    def made(x: Any) -> list[Any]:
        together.append(not busy.acquire(blocking=False))
        time.sleep(0.01)
        busy.release()
        return [x]

    core = SimpleNamespace(read_model=lambda data: data, compile_model=lambda *_: made)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    monkeypatch.setattr(engines, "_onnx", lambda *_: b"")
    run = engines._openvino(nn.Identity(), (torch.zeros(1),))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [torch.zeros(1)] * 4))
    assert together == [False] * 4


def test_hooks_keep_engines_that_would_not_call_them_away(small, images) -> None:
    own, heard = copy.deepcopy(small), []
    own[3].register_forward_hook(lambda *_: heard.append(1))
    with pytest.raises(ValueError, match=r"the hooks of 3 would not be called"):
        blnet.optimize(own, example_input=images, engine="native")
    fast = blnet.optimize(own, example_input=images, engine="pytorch")
    heard.clear()
    fast(images)
    assert heard == [1]
    assert Candidate(engines.engine("pytorch"), graph=True).why_not_hooked("fc")
    own = copy.deepcopy(small)
    nn.utils.spectral_norm(own[0])  # its hook computes a weight, which a graph keeps
    assert choosing._hooked_layer(own) is None


class Masked(nn.Module):
    """Gives -inf and NaN where it means them."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("mask", torch.tensor([0.0, *values])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.mask


def test_results_that_are_not_finite_are_compared_as_they_are(images) -> None:
    network = Masked(-torch.inf, torch.nan, 0.0).eval()
    fast = blnet.optimize(network, example_input=images, engine="onnxruntime")
    assert difference(fast(images), network(images).detach()) < 1e-5
    right = network(images).detach()
    for channel, value in ((0, torch.nan), (1, torch.inf), (1, 0.0), (2, 0.0)):
        wrong = right.clone()
        wrong[0, channel, 0, 0] = value
        assert not difference(wrong, right) < 1e-5


def test_what_is_slower_than_the_budget_runs_eagerly(small, images, monkeypatch) -> None:
    slow = Engine("pytorch", "", lambda net, _: lambda x: time.sleep(0.2) or net(x))
    for module in (choosing, engines):
        monkeypatch.setattr(module, "ENGINES", [slow])
    fast = blnet.optimize(small, example_input=images, seconds=0.1, other_inputs="error")
    assert difference(fast(images), small(images).detach()) < 1e-5
    assert fast.report.engine == "pytorch"
    assert "it runs all the same" in str(fast.report)
    with pytest.raises(ValueError, match="takes "):
        fast(images[:1])
    with pytest.raises(ValueError, match="building it took more than"):
        blnet.optimize(small, example_input=images, seconds=0.1, engine="pytorch")


def test_engines_that_fail_print_nothing(images, capfd) -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > -1e9 else x

    for name in ("native", "onnxruntime"):
        with pytest.raises(ValueError, match="no engine"):
            blnet.optimize(Asking(), example_input=images, engine=name)
    assert capfd.readouterr() == ("", "")


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
    """Calls a block, and a layer of it once more, where no graph can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torchvision.models.resnet.BasicBlock(3, 3)
        self.block.bn1.running_mean.fill_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block.conv1(x) if x.sum() > -1e9 else x


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


def test_explain_prints_layers_and_engines(model, images, capsys) -> None:
    blnet.optimize(model, example_input=images, engine="native").explain()
    text = capsys.readouterr().out
    assert "native for (2, 3, 33, 47) float32 on cpu" in text
    assert "stem.bn1 (BatchNorm2d): folded into stem.conv1" in text
    assert "runs (" in text
