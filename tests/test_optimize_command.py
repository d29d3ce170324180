"""``blnet optimize`` prints what was done, for names and for trained networks."""

from __future__ import annotations

import pytest
import torch

import blnet
from blnet.cli import main
from blnet.vision.models import bl_resnet18


def test_a_name_is_optimised_and_explained(capsys) -> None:
    words = "optimize bl_resnet18 --alpha 2 --beta 4 --size 33 --batch 2 --engine pytorch"
    assert main(words.split()) == 0
    text, told = capsys.readouterr()
    assert told == "building pytorch\ntiming pytorch\n"
    assert "pytorch for (2, 3, 33, 33) float32 on cpu" in text
    assert "stem.bn1 (BatchNorm2d): folded into stem.conv1" in text


def test_a_checkpoint_is_optimised_in_another_precision(tmp_path, capsys) -> None:
    path = tmp_path / "net.safetensors"
    blnet.save(bl_resnet18(alpha=2, beta=4, num_classes=3), path)
    words = ["optimize", str(path), "--size", "3x32x40", "--precision", "bfloat16"]
    assert main([*words, "--engine", "pytorch"]) == 0
    assert "bfloat16 on cpu: pytorch for (1, 3, 32, 40) bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "shape"), [("bl_resnet22", "(1, 1, 64, 300)"), ("bl_resnet18", "(1, 3, 224, 224)")]
)
def test_without_a_size_the_example_is_export_s(name, shape, capsys) -> None:
    assert main(["optimize", name, "--engine", "pytorch"]) == 0
    assert f"pytorch for {shape} float32 on cpu" in capsys.readouterr().out


def test_in_python_nothing_is_said(capsys) -> None:
    said: list[str] = []
    model, images = bl_resnet18(alpha=2, beta=4).eval(), torch.randn(1, 3, 32, 32)
    blnet.optimize(model, example_input=images, engine="pytorch")
    assert capsys.readouterr() == ("", "")
    blnet.optimize(model, example_input=images, engine="pytorch", say=said.append)
    assert said == ["building pytorch", "timing pytorch"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bl_resnet18 --size 32 --engine tvm", "'compile', 'kernels, compile'"),
        ("bl_resnet18 --size 32 --batch 0", "at least 1"),
        ("bl_resnet18 --size 4x32x32", "does not take the example_input"),
        ("nothing.safetensors --size 32", "does not exist"),
        ("bl_resnet18 --size 32 --device cuda", "no CUDA device"),
        ("bl_resnet18 --size 32 --engine native --precision float16", "float32 only"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys) -> None:
    try:
        status = main(["optimize", *words.split()])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
