"""Every rung computes what the network computes, and the networks of a run are the right ones."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blnet.bench import ladder, networks
from blnet.bench.images import make_batch, sample_pictures
from blnet.bench.measure import relative_error
from blnet.bench.results import Results
from blnet.bench.session import Session
from blnet.bench.settings import Settings, resolve
from blnet.bench.suites import test_models as models
from blnet.limits import UnavailableError

EAGER = ("eager", "channels-last", "folded")
RUNGS = {rung.name: rung for rung in ladder.LADDER}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return make_batch(sample_pictures(), 2, 64)


@pytest.fixture(scope="module", params=["resnet18", "bl_resnet18"])
def model(request, images) -> nn.Module:
    settings = resolve(Settings(device="cpu"))
    name = request.param
    branching = (2, 4) if name.startswith("bl_") else (None, None)
    return networks.instance(networks.Spec(name, *branching, "resnet18"), images, settings)


@pytest.mark.parametrize("name", EAGER)
def test_a_rung_agrees_with_float64(name, model, images) -> None:
    import copy

    before = {key: value.clone() for key, value in model.state_dict().items()}
    rung = RUNGS[name]
    layout = torch.channels_last if rung.channels_last else torch.contiguous_format
    own = images.contiguous(memory_format=layout)
    run = rung.build(model, own)
    with torch.inference_mode():
        result = run(own)
        right = copy.deepcopy(model).double()(images.double())
    assert relative_error(result, right) < 1e-4
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{name} changed {key} of the network it was given"


def test_folding_leaves_no_batch_norm(model, images) -> None:
    folded = ladder.fold_batch_norm(model, images)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


@pytest.mark.parametrize("name", ["compile", "compile, frozen"])
def test_a_compiled_rung_agrees(name) -> None:
    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).eval()
    example = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    try:
        run = RUNGS[name].build(tiny, example)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    with torch.inference_mode():
        assert relative_error(run(example), tiny(example)) < 1e-5


def test_a_frozen_rung_is_not_compiled_again_in_another_mode() -> None:
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).eval()
    example = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    try:
        run = RUNGS["compile, frozen"].build(tiny, example)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode(), torch._dynamo.config.patch(error_on_recompile=True):
            run(example)


def test_a_missing_compiler_makes_a_rung_unavailable(monkeypatch) -> None:
    class InvalidCxxCompiler(RuntimeError):  # noqa: N818 - Inductor's name
        pass

    def failing(*_, **__):
        def call(*_):
            try:
                raise InvalidCxxCompiler
            except InvalidCxxCompiler as error:
                raise RuntimeError("backend failed") from error

        return call

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(UnavailableError, match=r"install g\+\+"):
        ladder.compiled(lambda x: x, (torch.ones(1),))


def test_quick_is_a_part_of_full_and_graphs_need_a_gpu() -> None:
    for device in ("cpu", "cuda"):
        quick = [r.name for r in ladder.rungs(device)]
        full = [r.name for r in ladder.rungs(device, full=True)]
        assert set(quick) < set(full)
        assert quick[0] == "eager"
    assert not any("graph" in r.name for r in ladder.rungs("cpu", full=True))
    assert any("graph" in r.name for r in ladder.rungs("cuda"))
    assert len(RUNGS) == len(ladder.LADDER)
    assert all(r.compiles == ("compile" in r.name or r.name == "tensorrt") for r in ladder.LADDER)


def compiled(
    device: str, batch: int | None, full: bool = False, dtype: str = "float32"
) -> list[str]:
    return [r.name for r in ladder.rungs(device, full, dtype, batch) if r.compiles]


def installed(monkeypatch: pytest.MonkeyPatch, package: str, there: bool) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (there or None) if name == package else found(name, *rest),
    )


def test_a_quick_run_on_a_cpu_compiles_for_the_throughput_batch_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, "onnxruntime", True)

    assert compiled("cpu", 8) == compiled("cpu", None) == ["compile, frozen"]
    assert compiled("cpu", 1) == []
    assert compiled("cpu", 1, full=True) == compiled("cpu", 8, full=True)
    assert compiled("cuda", 1) == compiled("cuda", 256) != []


def test_batch_1_is_compiled_where_nothing_faster_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "onnxruntime", True)
    assert compiled("cpu", 1, dtype="bfloat16") == ["compile, frozen"]
    installed(monkeypatch, "onnxruntime", False)
    assert compiled("cpu", 1) == ["compile, frozen"]


def test_a_quick_run_says_that_batch_1_was_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "onnxruntime", True)
    found = networks.Built({}, {})
    for full in (False, True):
        session = Session(Settings(device="cpu", full=full))
        for batch in session.settings.batches * 2:
            taken = models.ladder(session.settings, batch)
            name = models.group_name(batch)
            models.group_of("models", name, session, taken, found, torch.ones(batch, 3, 32, 32))
        assert session.results.notes.count(models.NOT_COMPILED) == (not full)
        said = {} if full else {"models, batch 1": {"compile, frozen": models.NOT_COMPILED}}
        assert Results.from_dict(session.results.as_dict()).left_out == said


@pytest.mark.parametrize("there", [True, False])
def test_a_quick_run_takes_openvino_where_it_is_installed(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "openvino", there)
    assert ("openvino" in [r.name for r in ladder.rungs("cpu")]) is there
    assert "openvino" in [r.name for r in ladder.rungs("cpu", full=True)]


def test_the_networks_of_a_run() -> None:
    found = networks.specs(Settings(models=("bl_resnet50", "resnet18")))
    assert [s.label for s in found] == [
        "resnet50",
        "resnet18",
        "bl_resnet50 a2 b4",
        "bl_resnet50 a4 b4",
    ]
    assert found[-1].baseline == "resnet50"
    forced = networks.specs(Settings(models=("bl_resnet18",), baseline="resnet34"))
    assert {s.baseline for s in forced} == {"resnet34"}
    assert networks.baseline_of("bl_seresnext50_32x4d") == "resnet50"
    with pytest.raises(ValueError, match="resnet9000"):
        networks.check(Settings(models=("resnet9000",)))


class Picky(nn.Module):
    """A network that raises what it is made with."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("error", [KeyError("key"), ValueError("bad"), AssertionError("odd")])
def test_a_network_that_does_not_take_the_input_is_told(
    error: Exception, images, monkeypatch
) -> None:
    session = Session(Settings(device="cpu"))
    spec = networks.Spec("mine:net", None, None, "mine:net")
    monkeypatch.setattr(networks.Spec, "build", lambda self: Picky(error))
    found = networks.built(session, [spec], images)
    said = f"mine:net does not take an input of 3x64x64: {type(error).__name__}: "
    assert found.failures[spec].startswith(said)


def test_a_network_that_cannot_be_built_is_told_and_memory_is_not(images, monkeypatch) -> None:
    session = Session(Settings(device="cpu"))
    spec = networks.Spec("mine:net", 2, 4, "mine:net")

    def raising(self: networks.Spec) -> nn.Module:
        raise errors.pop(0)

    monkeypatch.setattr(networks.Spec, "build", raising)
    errors = [KeyError("key"), ValueError("alpha 3 does not divide 64"), MemoryError()]
    said = ["mine:net a2 b4 cannot be built: KeyError: 'key'", "alpha 3 does not divide 64"]
    for text in said:
        assert networks.built(session, [spec], images).failures == {spec: text}
    with pytest.raises(MemoryError):  # by which the batch is halved
        networks.built(session, [spec], images)


def test_facts_of_a_network() -> None:
    spec = networks.Spec("resnet18", None, None, "resnet18")
    facts = networks.facts(spec, spec.build(), (1, 3, 224, 224))
    # He et al., CVPR 2016, give 1.8e9 multiply-adds; torchvision documents 11,689,512 parameters.
    assert facts.parameters == 11_689_512
    assert facts.macs == pytest.approx(1.814e9, rel=1e-3)


def test_instances_are_calibrated_and_repeat(images) -> None:
    settings = resolve(Settings(device="cpu", seed=1))
    spec = networks.Spec("bl_resnet18", 2, 4, "resnet18")
    one, two = (networks.instance(spec, images, settings) for _ in range(2))
    with torch.inference_mode():
        logits = one(images)
        assert torch.equal(logits, two(images))
    assert not one.training
    assert logits.isfinite().all()
    norms = [m for m in one.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 for norm in norms)
    assert not torch.equal(norms[0].running_mean, torch.zeros_like(norms[0].running_mean))


def test_a_graph_replays_what_another_rung_has_built(monkeypatch) -> None:
    makes, captured = [], []

    def make(model: nn.Module, example: Tensor) -> Any:
        makes.append(model)
        return model

    def capture(run: Any, inputs: Any, copies: bool) -> Any:
        captured.append((run, inputs, copies))
        return run

    monkeypatch.setattr(ladder, "Captured", capture)
    frozen, graph = (
        dataclasses.replace(RUNGS[name], make=make)
        for name in ("compile, frozen", "compile, frozen, graph")
    )
    first, second, example = nn.Identity(), nn.Identity(), torch.zeros(1)
    built: dict[str, Any] = {"compile, frozen": None}
    frozen.build(first, example, built)
    graph.build(first, example, built)
    graph.build(second, example)
    assert makes == [first, second]
    assert captured == [(first, (example,), False), (second, (example,), False)]


def test_graphs_replay_what_the_rung_beside_them_runs() -> None:
    graphs = [rung for rung in RUNGS.values() if rung.name.endswith(", graph")]
    assert len(graphs) == sum(bool(rung.replays) for rung in RUNGS.values()) > 3
    for rung in graphs:
        assert rung.replays == rung.name.removesuffix(", graph")
        assert rung.devices == ("cuda",)
