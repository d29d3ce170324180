"""Exporting: files of every format compute what the network computes, at sizes they did not see."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import blnet
from blnet import BigLittleConfig, BigLittleNet
from blnet.exporting import parity
from blnet.exporting.formats import FORMATS
from blnet.exporting.forms import prepared
from blnet.exporting.metadata import describe
from blnet.exporting.onnx import onnx_bytes
from blnet.exporting.parity import ParityError
from blnet.exporting.programs import tracing
from blnet.kernels.reference import nearest_index, upsample_nearest
from blnet.speech.models import bl_resnet22

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EVERY = tuple(FORMATS)


def lively(model: Any) -> Any:
    """Weights of which every one counts: new blocks are their shortcuts only."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def network(**options: Any) -> BigLittleNet:
    config = {"block": "basic", "depths": (2, 2, 1), "widths": (8, 16, 16), "stem_width": 8,
              "num_classes": 5, "se_reduction": 2, **options}  # fmt: skip
    return lively(BigLittleNet(BigLittleConfig(**config)))


def opened(path: Path, format: str) -> Any:
    """Run a file with nothing but its runtime's own loader."""
    if format == "onnx":
        session = onnxruntime.InferenceSession(path)
        names = [value.name for value in session.get_inputs()]

        def run(*inputs: Tensor) -> list[Tensor]:
            fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
            return [torch.from_numpy(value) for value in session.run(None, fed)]

        return run
    if format == "torch":
        return torch.jit.load(path)
    return torch.export.load(path).module()


def axes_of(path: Path) -> list[list[str | int]]:
    """Return the names or sizes of the axes of an ONNX file's inputs."""
    shapes = (value.type.tensor_type.shape for value in onnx.load(path).graph.input)
    return [[dim.dim_param or dim.dim_value for dim in shape.dim] for shape in shapes]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Any]]:
    """One network in every format."""
    folder, model = tmp_path_factory.mktemp("files"), network()
    runs = {}
    for format, kind in FORMATS.items():
        path = folder / f"net{kind.suffix}"
        blnet.export(model, path, format, torch.empty(1, 3, 64, 64), metadata={"classes": ["a"]})
        runs[format] = opened(path, format)
    return {format: (model, run) for format, run in runs.items()}


@pytest.mark.parametrize("format", EVERY)
@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 4), height=st.integers(1, 90), width=st.integers(1, 90))
def test_any_batch_and_size(
    files: dict[str, tuple[nn.Module, Any]], format: str, batch: int, height: int, width: int
) -> None:
    model, run = files[format]
    x = torch.randn(batch, 3, height, width)
    with torch.no_grad():
        wanted = model(x)
        given = run(x)
    given = given[0] if format == "onnx" else given
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "head"), [*((format, "ctc") for format in EVERY), ("torch", "keyword")]
)
def test_recordings_and_their_lengths(tmp_path: Path, format: str, head: Any) -> None:
    # A pyramid and three branches: every merge and mask of the kind.
    model = lively(bl_resnet22(2, 4, 3, head == "ctc", head=head, time_reduction=2, width=0.125,
                               bins=16, num_classes=4))  # fmt: skip
    path = tmp_path / f"net{FORMATS[format].suffix}"
    done = blnet.export(model, path, format, torch.empty(1, 1, 16, 60))
    assert done.inputs == ("maps", "lengths")
    if format == "onnx":
        assert axes_of(path) == [["batch", 1, 16, "frames"], ["batch"]]
    run = opened(path, format)
    for frames, lengths in ((77, [77, 10, 31]), (120, [64]), (9, [9, 1])):
        maps, counts = torch.randn(len(lengths), 1, 16, frames), torch.tensor(lengths)
        with torch.no_grad():
            wanted, given = model(maps, counts), run(maps, counts)
        if head == "ctc":
            logits, ends = given
            assert ends.tolist() == model.output_lengths(counts).tolist()
        else:
            logits = given[0] if format == "onnx" else given
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["torchvision:resnet18", "timm:resnet18d", "converted"])
def test_plain_and_converted_networks(tmp_path: Path, source: str) -> None:
    from blnet import registry

    name = source if ":" in source else "torchvision:resnet18"
    model = lively(registry.build(name, num_classes=3))
    if source == "converted":
        model = lively(blnet.convert(model, 2, 2))
    done = blnet.export(model, tmp_path / "n.onnx", example_input=torch.empty(1, 3, 48, 48))
    assert done.parity is not None
    assert done.parity.error < 1e-5
    assert {shape[0] for shape in done.parity.shapes} == {1, 2, 3}
    assert any(shape[2] % 2 for shape in done.parity.shapes)


def pooling() -> nn.Module:
    """A network that takes no image below 9 x 9, of which torch.export finds that out itself."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(4, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


@pytest.mark.parametrize("format", ["onnx", "exported-program"])
def test_a_network_that_takes_no_small_images(tmp_path: Path, format: str) -> None:
    model, path = pooling(), tmp_path / f"n{FORMATS[format].suffix}"
    done = blnet.export(model, path, format, torch.empty(1, 3, 40, 40))
    assert done.dynamic
    assert done.least == {"height": 9, "width": 9}
    run, x = opened(path, format), torch.randn(2, 3, 9, 10)
    given = run(x)[0] if format == "onnx" else run(x)
    torch.testing.assert_close(given, model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError):
        model(x[:, :, 1:])
    if format == "onnx":
        assert axes_of(path) == [["batch", 3, "height", "width"]]
        said = {prop.key: prop.value for prop in onnx.load(path).metadata_props}["least_sizes"]
    else:
        extra = {"blnet.json": ""}
        torch.export.load(path, extra_files=extra)
        said = json.loads(extra["blnet.json"])["least_sizes"]
    assert json.loads(said) == done.least


def test_a_file_is_not_run_below_its_least_sizes() -> None:
    form, heights = prepared(network(), torch.empty(1, 3, 64, 64)), []

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heights.append(inputs[0].shape[2])
        return form.answer(*inputs)

    parity.compare(form, run, True, {"height": 60})
    assert heights == [64, 65]


def test_a_file_of_one_size(tmp_path: Path) -> None:
    model = network()
    for format, kind in FORMATS.items():
        path = tmp_path / f"net{kind.suffix}"
        done = blnet.export(model, path, format, torch.empty(1, 3, 33, 47), dynamic=False)
        assert done.parity is not None
        assert done.parity.shapes == ((1, 3, 33, 47),)
    shape = onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [1, 3, 33, 47]


def test_the_network_stays_as_it_is(tmp_path: Path) -> None:
    model = blnet.fuse(network()).train().double()
    before = copy.deepcopy(model.state_dict())
    blnet.export(model, tmp_path / "n.onnx", example_input=torch.empty(1, 3, 32, 32), check=False)
    assert model.training
    assert all(p.requires_grad and p.dtype is torch.float64 for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_config_of_ones_own_that_is_no_json_is_left_out() -> None:
    @dataclasses.dataclass
    class Own:
        kind: type = nn.ReLU

    model = nn.Sequential(nn.ReLU())
    model.config = Own()
    assert "config" not in describe(model)
    with pytest.raises(ValueError, match="metadata must be JSON"):
        describe(model, {"mine": nn.ReLU})


def test_metadata_is_in_every_file(tmp_path: Path) -> None:
    model, found = network(), {}
    for format, kind in FORMATS.items():
        path = tmp_path / f"n{kind.suffix}"
        blnet.export(model, path, format, torch.empty(1, 3, 32, 32), check=False,
                     metadata={"classes": ["cat", "dog"], "task": "vision"})  # fmt: skip
        extra = {"blnet.json": ""}
        if format == "onnx":
            found[format] = {p.key: p.value for p in onnx.load(path).metadata_props}
            continue
        if format == "torch":
            torch.jit.load(path, _extra_files=extra)
        else:
            torch.export.load(path, extra_files=extra)
        found[format] = json.loads(extra["blnet.json"])
    for said in found.values():
        assert said["blnet_version"] == blnet.__version__
        assert json.loads(said["classes"]) == ["cat", "dog"]
        assert said["task"] == "vision"
        assert BigLittleConfig.from_dict(json.loads(said["config"])) == model.config
    assert not list(tmp_path.glob(".blnet-*"))


@pytest.mark.parametrize("change", ["wrong", "fails", "nan", "shape"])
def test_a_wrong_file_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """At the sizes of its example the file is right, at an odd one it is not."""
    kind = FORMATS["torch"]

    def spoilt(path: Path) -> Any:
        run = kind.open(path)

        def answer(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (logits,) = run(inputs)
            if inputs[0].shape[2] % 2 == 0:
                return (logits,)
            if change == "fails":
                raise RuntimeError("no such size")
            if change == "shape":
                return (logits[:, :1],)
            return (logits * (float("nan") if change == "nan" else 1.001),)

        return answer

    monkeypatch.setitem(
        FORMATS, "torch", type(kind)(kind.suffix, kind.write, spoilt, kind.packages, kind.runtime)
    )
    path = tmp_path / "n.pt"
    with pytest.raises(ParityError, match="at 3x3x33x33"):
        blnet.export(network(), path, "torch", torch.empty(1, 3, 32, 32))
    assert not list(tmp_path.iterdir())


def test_a_network_of_one_size_is_said_to_be_fixed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(62 * 62, 5))
    done = blnet.export(model, tmp_path / "n.pt", "torch", torch.empty(1, 3, 64, 64))
    assert done.parity is not None
    assert done.parity.shapes == ((1, 3, 64, 64),)
    assert not done.dynamic


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("setting", ["float64", "meta", "autocast"])
def test_settings_around_the_call_change_nothing(tmp_path: Path, format: str, setting: str) -> None:
    model, path = pooling(), tmp_path / f"n{FORMATS[format].suffix}"
    around = torch.device("meta") if setting == "meta" else torch.autocast(
        "cpu", torch.bfloat16, enabled=setting == "autocast")  # fmt: skip
    torch.set_default_dtype(torch.float64 if setting == "float64" else torch.float32)
    try:
        with around:
            blnet.export(model, path, format, torch.empty(1, 3, 40, 40, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    run, x = opened(path, format), torch.randn(2, 3, 33, 40)
    given = run(x)[0] if format == "onnx" else run(x)
    assert given.dtype is torch.float32
    torch.testing.assert_close(given, model(x), rtol=1e-5, atol=1e-5)


def test_without_onnxruntime_only_unchecked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    path, example = tmp_path / "n.onnx", torch.empty(1, 3, 32, 32)
    with pytest.raises(ImportError, match=r"cannot be checked; install .*--no-check"):
        blnet.export(network(), path, example_input=example)
    assert blnet.export(network(), path, example_input=example, check=False).parity is None
    assert path.stat().st_size > 1000


def test_onnx_bytes_for_engines(capfd: pytest.CaptureFixture[str]) -> None:
    model = blnet.fuse(network())
    x = torch.randn(2, 3, 64, 64)
    data = onnx_bytes(model, x)
    graph = onnx.load_from_string(data).graph
    resizes = [node for node in graph.node if node.op_type == "Resize"]
    constants = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer}
    assert len(resizes) == 2
    for node in resizes:
        assert len(node.input) == 3
        assert constants[node.input[2]].tolist() == [1, 1, 2, 2]
    assert set(constants) <= {name for node in graph.node for name in node.input}
    (given,) = onnxruntime.InferenceSession(data).run(None, {"image": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), model(x).detach(), rtol=1e-4, atol=1e-4)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_onnx_bytes_at_odd_sizes() -> None:
    model, x = network(), torch.randn(1, 3, 37, 49)
    (given,) = onnxruntime.InferenceSession(onnx_bytes(model, x)).run(None, {"image": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), model(x).detach(), rtol=1e-4, atol=1e-4)


class Upsampling(nn.Module):
    """Halves a map as a strided convolution does, and copies it back."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample_nearest(x[:, :, ::2, ::2], (x.shape[2], x.shape[3]))


@pytest.mark.parametrize("side", [1, 2, 3, 4189, 5143, 20001])
def test_the_resize_is_exact_at_any_size(tmp_path: Path, side: int) -> None:
    """Ratios of sizes, rounded to float32, pick a neighbour from 4189 (PyTorch), 5143 (ORT) on."""
    x = torch.arange(float(side)).reshape(1, 1, side, 1).expand(1, 1, side, 2)
    wanted = x[:, :, ::2][:, :, nearest_index((side + 1) // 2, side)]
    for format, kind in FORMATS.items():
        path = tmp_path / f"n{kind.suffix}"
        blnet.export(Upsampling(), path, format, torch.empty(1, 1, 32, 32), check=False)
        given = opened(path, format)(x)
        given = given[0] if format == "onnx" else given
        assert torch.equal(given, wanted[..., :1].expand_as(wanted)), format


class Ratio(nn.Module):
    """A merge of sizes that are not one half, which takes indices instead of a resize."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample_nearest(x[:, :, ::3], (x.shape[2], x.shape[3]))


def test_other_ratios_are_exact_as_well() -> None:
    x = torch.randn(2, 3, 40, 8)
    dims = ({2: torch.export.Dim("height", min=1)},)
    with tracing():
        program = torch.export.export(Ratio(), (x,), dynamic_shapes=dims).module()
        script = torch.jit.trace(Ratio(), x, check_trace=False)
    other = torch.randn(2, 3, 47, 8)
    assert torch.equal(program(other), Ratio()(other))
    assert torch.equal(script(other), Ratio()(other))
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    assert buffer.getvalue()


@pytest.mark.parametrize("opset", [23])
def test_newer_opsets(tmp_path: Path, opset: int) -> None:
    path = tmp_path / "n.onnx"
    blnet.export(network(), path, example_input=torch.empty(1, 3, 32, 32), opset=opset)
    assert onnx.load(path).opset_import[0].version == opset


@pytest.mark.parametrize("opset", [17, 999, "18"])
def test_opsets_that_are_not_written(tmp_path: Path, opset: Any) -> None:
    with pytest.raises(ValueError, match="opset must be from 18 to"):
        blnet.export(network(), tmp_path / "n.onnx", opset=opset)
    assert not list(tmp_path.iterdir())
