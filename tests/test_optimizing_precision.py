"""A trained network in 16 bits says of real pictures what it says in float32."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blnet
from blnet.optimizing.choosing import difference

datasets = pytest.importorskip("sklearn.datasets")
PICTURES = 1000
CONFIG = blnet.BigLittleConfig(
    block="basic", depths=(2, 2), widths=(16, 32), alpha=2, beta=2, stem="small", stem_width=16,
    in_channels=1, num_classes=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor]:
    digits = datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    maps = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    return maps, torch.tensor(digits.target)[order]


@pytest.fixture(scope="module")
def trained(pictures) -> nn.Module:
    """Train on the pictures that the test does not ask about."""
    torch.manual_seed(0)
    maps, labels = (part[PICTURES:] for part in pictures)
    model = blnet.BigLittleNet(CONFIG).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for step in range(100):
        chosen = torch.arange(64) * 7 + 64 * step
        index = chosen % len(maps)
        loss = F.cross_entropy(model(maps[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def test_the_network_has_learned(trained, pictures) -> None:
    maps, labels = (part[:PICTURES] for part in pictures)
    assert (trained(maps).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@torch.no_grad()
def test_16_bits_agree_on_real_pictures(precision, trained, pictures) -> None:
    maps = pictures[0][:PICTURES]
    fast = blnet.optimize(trained, precision=precision)
    exact = trained(maps)
    agreement = (fast(maps).argmax(1) == exact.argmax(1)).float().mean()
    assert agreement >= 0.995
    dtype = getattr(torch, precision)
    double = copy.deepcopy(trained).double()(maps.double())
    eager = copy.deepcopy(trained).to(dtype)(maps.to(dtype))
    assert difference(fast(maps), double) <= 1.25 * difference(eager, double)
