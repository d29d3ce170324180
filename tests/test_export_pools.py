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


def pooled(path: Path, size: tuple[int, ...]) -> onnxruntime.InferenceSession:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten())
    done = blnet.export(network, path, example_input=torch.empty(1, 3, 12, 15))
    assert done.dynamic
    assert not done.least
    return onnxruntime.InferenceSession(path)


# The example's sizes are multiples of the first two, which PyTorch's own translation keeps to.
@pytest.mark.parametrize("size", [(6, 5), (12, 1), (7, 4), (1, 3), (20, 30)])
def test_windows_are_those_of_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    session = pooled(tmp_path / "n.onnx", size)
    for height, width in ((12, 15), (13, 14), (1, 1), (3, 50), (97, 6), (24, 30)):
        x = torch.randn(2, 3, height, width)
        wanted = nn.functional.adaptive_avg_pool2d(x, size).flatten(1)
        (given,) = session.run(None, {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_windows(tmp_path: Path) -> None:
    session, x = pooled(tmp_path / "n.onnx", (6, 4)), torch.randn(1, 3, 7, 9)
    x[0, 0, 3, 4], x[0, 1, 6, 8] = torch.nan, torch.inf
    wanted = nn.functional.adaptive_avg_pool2d(x, (6, 4)).flatten(1)
    (given,) = session.run(None, {"image": x.numpy()})
    assert 0 < int(wanted.isfinite().sum()) < wanted.numel()
    torch.testing.assert_close(torch.from_numpy(given), wanted, equal_nan=True)
