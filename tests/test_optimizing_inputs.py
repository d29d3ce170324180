"""Networks that are particular about their inputs: that change them, or want them in rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blnet


class Shifting(nn.Module):
    """A network that normalises its input in place, and may give it back."""

    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.conv(x)


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("engine", ["pytorch", "compile"])
def test_a_network_that_changes_its_input(conv: bool, engine: str) -> None:
    model = Shifting(conv).eval()
    # Of two axes, so that no engine copies it to bring it into another layout.
    images = torch.randn(2, 3, 8, 8) if conv else torch.randn(2, 3)
    example = images.clone()
    fast: Any = blnet.optimize(model, example_input=example, engine=engine)
    assert torch.equal(example, images)
    with torch.no_grad():
        torch.testing.assert_close(fast(images.clone()), model(images.clone()))
    assert fast.report.trials[0].error < 1e-5


class Rows(nn.Module):
    """What many networks end with: a map taken for rows by `view`, which wants the usual layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.conv(x)).relu(), 2)
        return self.linear(x.view(x.size(0), -1))


class Standardized(nn.Conv2d):
    """Weight standardisation, as its authors published it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        scale = weight.view(len(weight), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / scale, self.bias)


@pytest.mark.parametrize("engine", ["pytorch", "compile", "onnxruntime"])
@pytest.mark.parametrize("model", [Rows(), nn.Sequential(Standardized(3, 8, 3), nn.ReLU())])
def test_code_that_wants_the_usual_layout(model: nn.Module, engine: str) -> None:
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
    model, images = model.eval(), torch.randn(2, 3, 8, 8)
    fast = blnet.optimize(model, example_input=images, engine=engine)
    with torch.no_grad():
        for x in (images, images[:1], images.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(fast(x), model(x.contiguous()), rtol=1e-4, atol=1e-5)


def test_without_an_example_it_is_told_how_to_run() -> None:
    fast = blnet.optimize(Rows().eval())
    with pytest.raises(RuntimeError, match=r"Rows takes maps for rows .* give .* example_input"):
        fast(torch.randn(2, 3, 8, 8))


def test_other_code_keeps_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    images = torch.randn(2, 3, 8, 8)
    for example in (None, images):
        fast: Any = blnet.optimize(model, example_input=example, engine="pytorch" if example is
                                   not None else "auto")  # fmt: skip
        with torch.no_grad():
            assert fast(images).is_contiguous(memory_format=torch.channels_last)


def test_other_errors_are_the_networks_own() -> None:
    fast = blnet.optimize(nn.Sequential(nn.Conv2d(3, 8, 3)).eval())
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4"):
        fast(torch.randn(2, 4, 8, 8))


def test_an_engine_of_float32_whatever_the_default_is() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    torch.set_default_dtype(torch.float64)
    try:
        fast: Any = blnet.optimize(model, example_input=images, engine="native")
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)


def test_an_example_by_name_is_refused_on_one_line() -> None:
    with pytest.raises(ValueError, match="example_input must be a tensor or several") as caught:
        blnet.optimize(nn.ReLU(), example_input={"x": torch.randn(4, 2)})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
