"""Linear layers at a network's end as steps of the native engine, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blnet.kernels.native import status
from blnet.optimizing.native import build

pytestmark = pytest.mark.skipif(not status().works, reason=f"{status().reason}")

TOLERANCE = 1e-5


def check(model, x):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    run = build(model.eval(), x)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
    out = run(x)
    assert (out.dtype, out.shape) == (torch.float32, expected.shape)
    assert float((out.double() - expected).abs().max() / expected.abs().max()) < TOLERANCE
    return run


class Answers(nn.Module):
    """Maps of 20 channels, 7 rows and 11 columns, and an end of the caller's."""

    def __init__(self, end):
        super().__init__()
        self.end = end
        self.conv, self.fc = nn.Conv2d(5, 20, 3, padding=1), nn.Linear(140, 6)
        self.columns, self.pixels = nn.Linear(11, 6), nn.Linear(77, 6)

    def forward(self, x):
        maps = self.conv(x).relu()
        return self.end(self, maps, maps.flatten(1, 2).transpose(1, 2))


def twice(answers):
    return answers + answers.relu()


FOR_EACH_COLUMN = {
    "linear": lambda m, x, f: m.fc(f),
    "no bias": lambda m, x, f: F.linear(f, m.fc.weight),
    "a product and a sum": lambda m, x, f: m.fc.bias + f @ m.fc.weight.T,
    "one bias for all": lambda m, x, f: torch.addmm(
        m.fc.bias[:1], f.reshape(-1, 140), m.fc.weight.T
    ),
    "a bias for each column": lambda m, x, f: f @ m.fc.weight.T + m.columns.weight.T,
    "and then": lambda m, x, f: m.fc(f).log_softmax(-1),
    "answers read twice": lambda m, x, f: twice(m.fc(f)),
}
OTHERS = {
    "features read twice": lambda m, x, f: m.fc(f) + m.fc(f).relu(),
    "features read as well": lambda m, x, f: m.fc(f) + f.mean(2, keepdim=True),
    "columns, not rows": lambda m, x, f: m.columns(x.flatten(1, 2)),
    "pixels": lambda m, x, f: m.pixels(x.flatten(2)),
    "a mean": lambda m, x, f: m.fc(f.mean(1)),
    "nothing": lambda m, x, f: f,
}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", [*FOR_EACH_COLUMN, *OTHERS])
def test_one_linear_layer_for_every_column_is_a_convolution(name, images):
    run = check(Answers({**FOR_EACH_COLUMN, **OTHERS}[name]), torch.randn(images, 5, 7, 11))
    assert ("conv 7x1 20->6" in run.steps) == (name in FOR_EACH_COLUMN)


def test_answers_are_contiguous_as_pytorchs_are():
    out = build(Answers(FOR_EACH_COLUMN["linear"]).eval(), torch.randn(2, 5, 7, 11))
    assert out(torch.randn(2, 5, 7, 11)).is_contiguous()


class Classifier(nn.Module):
    """One vector for each image, and an end of the caller's."""

    def __init__(self, end):
        super().__init__()
        self.end = end
        self.conv, self.fc = nn.Conv2d(5, 20, 3, padding=1), nn.Linear(20, 6)
        self.all, self.image = nn.Linear(20 * 77, 6), nn.Linear(5 * 77, 6)

    def forward(self, x):
        maps = self.conv(x).relu()
        return self.end(self, maps, maps.mean((2, 3), keepdim=True).flatten(1), x)


FOR_EACH_IMAGE = {
    "linear": ("1x1 20->6", lambda m, maps, f, x: m.fc(f)),
    "no bias": ("1x1 20->6", lambda m, maps, f, x: F.linear(f, m.fc.weight)),
    "one bias for all": (
        "1x1 20->6",
        lambda m, maps, f, x: torch.addmm(m.fc.bias[:1], f, m.fc.weight.T),
    ),
    "and then": ("1x1 20->6", lambda m, maps, f, x: m.fc(f).log_softmax(-1)),
    "all pixels": ("7x11 20->6", lambda m, maps, f, x: m.all(maps.flatten(1))),
    "the input's": ("7x11 5->6", lambda m, maps, f, x: m.image(x.flatten(1)) + m.fc(f)),
}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", FOR_EACH_IMAGE)
def test_a_linear_layer_of_one_image_is_a_convolution(name, images):
    step, end = FOR_EACH_IMAGE[name]
    run = check(Classifier(end), torch.randn(images, 5, 7, 11))
    assert (f"conv {step}" in run.steps) == (images == 1)


@pytest.mark.parametrize(
    "end",
    [
        lambda m, maps, f, x: m.fc(f) + f.mean(1, keepdim=True),
        lambda m, maps, f, x: torch.addmm(m.fc.bias, f, m.fc.weight.T, beta=0.5),
        lambda m, maps, f, x: f @ f.T,
    ],
    ids=["vector read as well", "half of the bias", "no weight"],
)
def test_what_is_no_linear_layer_is_left_to_pytorch(end):
    run = check(Classifier(end), torch.randn(1, 5, 7, 11))
    assert not any(step.startswith("conv 1x1") for step in run.steps)
