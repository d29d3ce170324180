"""`blnet export`: what it takes, prints and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import blnet
from blnet.cli import main

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torchvision")

PREPROCESSING = {"size": 32, "crop_ratio": 0.875, "channels": 3, "mean": [0.5] * 3,
                 "std": [0.25] * 3, "interpolation": "bilinear"}  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run's folder with its best network."""
    folder = tmp_path_factory.mktemp("run")
    config = blnet.BigLittleConfig("basic", (2, 1), (8, 8), stem_width=8, num_classes=2)
    extra = {"task": "vision", "preprocessing": PREPROCESSING, "classes": ["cat", "dog"]}
    blnet.save(blnet.BigLittleNet(config), folder / "best.safetensors", **extra)
    return folder


def failed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail, and return its one line."""
    try:
        status = main(["export", *map(str, words)])
    except SystemExit as error:
        status = error.code
    text = capsys.readouterr().err
    assert status == 2, text
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize(
    ("format", "name"), [("onnx", "n.onnx"), ("torch", "n.pt"), ("exported-program", "n.pt2")]
)
def test_a_trained_network(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, name: str
) -> None:
    path = tmp_path / name
    assert main(["export", str(run_folder), "--output", str(path), "--format", format]) == 0
    text = capsys.readouterr().out
    assert f"wrote {path}" in text
    # The size is that of its preprocessing.
    assert "1x3x32x32, 3x3x33x33, 1x3x29x35, 2x3x33x47: largest relative error" in text
    if format == "onnx":
        said = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
        assert said["classes"] == '["cat", "dog"]'
        assert '"mean": [0.5, 0.5, 0.5]' in said["preprocessing"]


def test_a_plain_network_by_name_is_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "n.pt"
    words = ["torchvision:resnet18", "--alpha", "4", "--num-classes", "3", "--format", "torch",
             "--size", "3x64x96", "--static", "--output", str(path)]  # fmt: skip
    assert main(["export", *words]) == 0
    text = capsys.readouterr().out
    assert "new weights" in text
    assert "batch and sizes fixed" in text
    assert "checked at 1x3x64x96:" in text
    assert "branches.1" in " ".join(name for name, _ in torch.jit.load(path).named_parameters())


def test_speech_networks_have_names_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "n.pt"
    words = ["bl_resnet22", "--format", "torch", "--size", "1x64x40", "--output", str(path)]
    assert main(["export", *words]) == 0
    assert "maps, lengths -> logits" in capsys.readouterr().out


def test_files_are_replaced_only_when_asked(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "n.pt"
    path.write_text("mine")
    words = [run_folder, "--format", "torch", "--output", path, "--no-check"]
    assert "add --overwrite" in failed(capsys, *words)
    assert path.read_text() == "mine"
    assert main(["export", *map(str, words), "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert "sizes free as traced)\nnot checked: nothing was run" in text
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resnet18", "--format", "tensorrt", "--output", "n.onnx"], "invalid choice: 'tensorrt'"),
        (["resnet18", "--output", "n.pt"], "must end with .onnx"),
        (["resnet18", "--output", "none/n.onnx"], "folder .*none does not exist"),
        (["none/best.safetensors", "--output", "n.onnx"], "none/best.safetensors does not exist"),
        (["resnet19", "--output", "n.onnx"], "no network is named 'resnet19'"),
        (["resnet18", "--alpha", "0", "--output", "n.onnx"], "whole number of at least 1"),
        (["resnet18", "--size", "0", "--output", "n.onnx"], "is no size"),
        (["resnet18", "--size", "1x32x32", "--output", "n.onnx"], "does not run on an input"),
        (["resnet18", "--opset", "18", "--format", "torch", "--output", "n.pt"], "--opset is ONNX"),
        (["resnet18", "--opset", "17", "--output", "n.onnx"], "opset must be from 18"),
    ],
)
def test_bad_inputs_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    text = failed(capsys, *words)
    import re

    assert re.search(told, text), text
    assert not list(tmp_path.iterdir())


def test_a_trained_network_takes_no_settings(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [run_folder, "--alpha", 2, "--num-classes", 3, "--output", tmp_path / "n.onnx"]
    assert "leave out --alpha, --num-classes" in failed(capsys, *words)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    text = failed(capsys, run_folder, "--output", tmp_path / "n.onnx")
    assert f"{package} is not installed" in text
    assert "pip install 'blnet[export]'" in text
