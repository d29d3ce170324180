"""Stems against compositions written by hand."""

from math import ceil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blnet.stem import BigLittlePool, BigLittleStem, PlainStem, SmallStem


def norm(bn, x):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


def ready(stem):
    for layer in stem.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1)
            nn.init.normal_(layer.bias, 0, 0.2)
            nn.init.normal_(layer.running_mean, 0, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return stem.double().eval()


SIZES = [(32, 32), (33, 31), (7, 18), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alpha", [1, 2, 4])
def test_big_little_stem(alpha, size):
    stem = ready(BigLittleStem(3, 16, alpha))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        y = F.relu(norm(stem.bn1, F.conv2d(x, stem.conv1.weight, stride=2, padding=3)))
        conv, bn = stem.pool.big
        big = norm(bn, F.conv2d(y, conv.weight, stride=2, padding=1))
        conv0, bn0, _, conv1, bn1, _ = stem.pool.little
        little = F.relu(norm(bn0, F.conv2d(y, conv0.weight, padding=1)))
        little = F.relu(norm(bn1, F.conv2d(little, conv1.weight, stride=2, padding=1)))
        conv, bn = stem.pool.expand
        merged = F.relu(big + norm(bn, F.conv2d(little, conv.weight)))
        conv, bn, _ = stem.pool.fusion
        expected = F.relu(norm(bn, F.conv2d(merged, conv.weight)))
        torch.testing.assert_close(stem(x), expected)
    assert expected.shape == (2, 16, *(ceil(n / 4) for n in size))


@pytest.mark.parametrize("alpha", [1, 2, 4])
def test_big_little_stem_widths(alpha):
    stem = BigLittleStem(5, 64, alpha)
    shapes = {
        "conv1": (64, 5, 7, 7),
        "pool.big.0": (64, 64, 3, 3),
        "pool.little.0": (64 // alpha, 64, 3, 3),
        "pool.little.3": (64 // alpha, 64 // alpha, 3, 3),
        "pool.expand.0": (64, 64 // alpha, 1, 1),
        "pool.fusion.0": (64, 64, 1, 1),
    }
    convs = {name: m for name, m in stem.named_modules() if isinstance(m, nn.Conv2d)}
    assert {name: tuple(conv.weight.shape) for name, conv in convs.items()} == shapes
    assert all(conv.bias is None for conv in convs.values())
    strides = {name: conv.stride[0] for name, conv in convs.items()}
    assert [name for name, stride in strides.items() if stride == 2] == [
        "conv1",
        "pool.big.0",
        "pool.little.3",
    ]


@pytest.mark.parametrize("size", SIZES)
def test_plain_stem(size):
    stem = ready(PlainStem(4, 16))
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    conv, bn = stem.conv1, stem.bn1
    with torch.no_grad():
        y = F.relu(norm(bn, F.conv2d(x, conv.weight, stride=2, padding=3)))
        torch.testing.assert_close(stem(x), F.max_pool2d(y, 3, stride=2, padding=1))
    assert conv.weight.shape == (16, 4, 7, 7)


@pytest.mark.parametrize("size", SIZES)
def test_small_stem_keeps_the_size(size):
    stem = ready(SmallStem(4, 16))
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    with torch.no_grad():
        out = stem(x)
        expected = F.relu(norm(stem.bn1, F.conv2d(x, stem.conv1.weight, padding=1)))
        torch.testing.assert_close(out, expected)
    assert out.shape == (2, 16, *size)


def test_width_that_alpha_does_not_divide():
    for make in (BigLittleStem, BigLittlePool):
        with pytest.raises(ValueError, match="alpha 3 with 2 branches divides a width of 64"):
            make(width=64, alpha=3)
