"""What `blnet.export` refuses, each in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blnet

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Asking(nn.Module):
    """Its answer depends on a value, of which a trace keeps one case."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)) if x.mean() > 9 else x.amax((1, 2, 3))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[()]:
        return ()


class Singular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.transpose(2, 3)


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x, x + 1)


class Brief(nn.Module):
    """A convolution that ONNX Runtime has not on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        weight = x.new_ones(4, 3, 3, 3, dtype=torch.bfloat16)
        return nn.functional.conv2d(x.bfloat16(), weight).float()


class Switching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[2] < 20 else 2 * x


@pytest.mark.parametrize(
    ("model", "format", "told"),
    [
        ("resnet18", "onnx", r"model must be a torch\.nn\.Module, .* got str; give"),
        (torch.jit.script(nn.ReLU()), "torch", "not of TorchScript, got RecursiveScriptModule"),
        (nn.Conv2d(3, 4, 3, device="meta"), "torch", "weight of Conv2d has no values yet; give"),
        (nn.LazyConv2d(4, 3), "torch", "weight of LazyConv2d has no values yet; give"),
        (Nothing(), "torch", "Nothing gives 0 values"),
        (Singular(), "onnx", r"as ONNX opset 18 \(No ONNX function found for .*svd"),
        (Spectrum(), "onnx", r"gives complex numbers, which ONNX files do not; have it return"),
        (Brief(), "onnx", r"written file cannot be opened \(.*bfloat16.*\); report it, and try"),
        (Square(), "exported-program", r"free sizes \(torch.export asks for width = height\);"),
        (Switching(), "onnx", r"torch\.export asks for height = Dim\('height', max=19\)"),
        (Two(), "onnx", r"needs 2 inputs \(x, y\)"),
        (Pair(), "torch", "gives 2 values"),
        (Asking(), "exported-program", "cannot be traced with free sizes"),
        (nn.Conv2d(4, 4, 3), "torch", "does not run on an input of shape"),
        (nn.Conv2d(3, 4, 3), "tensorrt", "format must be one of onnx, torch, exported-program"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, model: Any, format: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        blnet.export(model, tmp_path / "n", format, torch.empty(1, 3, 8, 8))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("example", [(1, 3, 8, 8), torch.tensor(1.0), torch.empty(0, 3, 8, 8)])
def test_examples_that_are_none(tmp_path: Path, example: Any) -> None:
    told = r"example_input must be a tensor of one input or more, got .*; give torch\.empty"
    with pytest.raises(ValueError, match=told):
        blnet.export(nn.Conv2d(3, 4, 3), tmp_path / "n.pt", "torch", example)
