"""Pools to so many windows, at any size: as the classics have before their linear layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import blnet

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


AVERAGES, MAXIMA = nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d


def pooled(
    path: Path, size: tuple[int, ...], pool: type[nn.Module] = AVERAGES
) -> onnxruntime.InferenceSession:
    network = nn.Sequential(pool(size), nn.Flatten())
    done = blnet.export(network, path, example_input=torch.empty(1, 3, 12, 15))
    assert done.dynamic
    assert not done.least
    return onnxruntime.InferenceSession(path)


# The example's sizes are multiples of the first two, which PyTorch's own translation keeps to.
@pytest.mark.parametrize("size", [(6, 5), (12, 1), (7, 4), (1, 3), (20, 30), (1, 1)])
@pytest.mark.parametrize("pool", [AVERAGES, MAXIMA])
def test_windows_are_those_of_any_size(
    tmp_path: Path, pool: type[nn.Module], size: tuple[int, int]
) -> None:
    session = pooled(tmp_path / "n.onnx", size, pool)
    for height, width in ((12, 15), (13, 14), (1, 1), (3, 50), (97, 6), (24, 30)):
        x = torch.randn(2, 3, height, width)
        wanted = pool(size)(x).flatten(1)
        (given,) = session.run(None, {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", [AVERAGES, MAXIMA])
def test_nan_stays_in_its_windows(tmp_path: Path, pool: type[nn.Module]) -> None:
    session, x = pooled(tmp_path / "n.onnx", (6, 4), pool), torch.randn(1, 3, 7, 9)
    x[0, 0, 3, 4], x[0, 1, 6, 8] = torch.nan, torch.inf
    wanted = pool((6, 4))(x).flatten(1)
    (given,) = session.run(None, {"image": x.numpy()})
    assert 0 < int(wanted.isfinite().sum()) < wanted.numel()
    torch.testing.assert_close(torch.from_numpy(given), wanted, equal_nan=True)


def test_a_largest_value_may_be_below_zero(tmp_path: Path) -> None:
    session, x = pooled(tmp_path / "n.onnx", (6, 4), MAXIMA), -1 - torch.rand(1, 3, 7, 9)
    (given,) = session.run(None, {"image": x.numpy()})
    assert torch.equal(torch.from_numpy(given), MAXIMA((6, 4))(x).flatten(1))


@pytest.mark.parametrize("size", [(6, 5), (1, 1)])
def test_largest_values_at_one_size(tmp_path: Path, size: tuple[int, int]) -> None:
    network = nn.Sequential(MAXIMA(size), nn.Flatten())
    x = torch.randn(1, 3, 13, 15)
    assert not blnet.export(network, tmp_path / "n.onnx", example_input=x, dynamic=False).dynamic
    (given,) = onnxruntime.InferenceSession(tmp_path / "n.onnx").run(None, {"image": x.numpy()})
    assert torch.equal(torch.from_numpy(given), network(x))


@pytest.mark.parametrize("sides", [1, 2])
def test_where_the_largest_lie_is_not_translated(tmp_path: Path, sides: int) -> None:
    class Places(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pool = {1: nn.functional.adaptive_max_pool1d, 2: nn.functional.adaptive_max_pool2d}
            return pool[sides](x.flatten(1 + sides), 2, return_indices=True)[1]

    with pytest.raises(ValueError, match="largest values lie"):
        blnet.export(
            Places(), tmp_path / "n.onnx", example_input=torch.rand(1, 3, 8, 8), check=False
        )
    assert not (tmp_path / "n.onnx").exists()
