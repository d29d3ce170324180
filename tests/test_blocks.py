"""Residual blocks against their equations, written out by hand in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blnet.blocks import (
    BasicBlock,
    BlockSpec,
    Bottleneck,
    SqueezeExcitation,
    is_strided,
    make_shortcut,
)


def random_state(module):
    """Give every weight and statistic a value that a mistake would show."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.3
            value.copy_(drawn.abs() + 0.5 if name.endswith(("running_var", "bn.weight")) else drawn)
    return module.double().eval()


def norm(bn, x):
    shape = (1, -1, 1, 1)
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return (x - bn.running_mean.view(shape)) * scale.view(shape) + bn.bias.view(shape)


def expected_shortcut(block, x, stride, pooled):
    layers = block.downsample
    if layers is None:
        return x
    if pooled and stride == 2:
        x = F.avg_pool2d(x, 3, stride=2, padding=1)
        layers = layers[1:]
        stride = 1
    if len(layers) == 0:
        return x
    conv, bn = layers
    return norm(bn, F.conv2d(x, conv.weight, stride=stride))


def expected_gates(se, x):
    pooled = x.mean((2, 3), keepdim=True)
    hidden = F.relu(F.conv2d(pooled, se.fc1.weight, se.fc1.bias))
    return torch.sigmoid(F.conv2d(hidden, se.fc2.weight, se.fc2.bias))


def expected_output(block, x, spec, pooled):
    stride = spec.stride
    if isinstance(block, BasicBlock):
        y = F.relu(norm(block.bn1, F.conv2d(x, block.conv1.weight, stride=stride, padding=1)))
        y = norm(block.bn2, F.conv2d(y, block.conv2.weight, padding=1))
    else:
        y = F.relu(norm(block.bn1, F.conv2d(x, block.conv1.weight)))
        conv = block.conv2
        y = F.conv2d(y, conv.weight, stride=stride, padding=1, groups=conv.groups)
        y = norm(block.bn3, F.conv2d(F.relu(norm(block.bn2, y)), block.conv3.weight))
    if block.se is not None:
        y = y * expected_gates(block.se, y)
    y = y + expected_shortcut(block, x, stride, pooled)
    return F.relu(y) if spec.closing_activation else y


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "strided"])
@pytest.mark.parametrize("se", [0, 4], ids=["plain", "se"])
@pytest.mark.parametrize(
    "spec",
    [
        BlockSpec(16, 16),
        BlockSpec(16, 16, closing_activation=False),
        BlockSpec(16, 16, stride=2),
        BlockSpec(8, 16),
        BlockSpec(8, 16, stride=2),
        BlockSpec(8, 16, stride=2, closing_activation=False),
    ],
    ids=["same", "open", "stride", "widen", "both", "both-open"],
)
@pytest.mark.parametrize("make", [BasicBlock, Bottleneck])
def test_block_equals_its_equation(make, spec, se, pooled):
    block = random_state(make(spec, se_reduction=se, pooled_shortcut=pooled))
    x = torch.randn(2, spec.in_channels, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x.clone()), expected_output(block, x, spec, pooled))


def test_grouped_block_equals_its_equation():
    spec = BlockSpec(32, 64, stride=2, narrow=2)
    block = random_state(Bottleneck(spec, cardinality=8, base_width=32))
    x = torch.randn(2, 32, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x.clone()), expected_output(block, x, spec, True))


def test_block_leaves_its_input_alone():
    # The ReLUs work in place; none of them may work on the block's input.
    for make in (BasicBlock, Bottleneck):
        x = torch.randn(1, 16, 8, 8)
        before = x.clone()
        make(BlockSpec(16, 16))(x)
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("spec", "pooled", "kinds"),
    [
        (BlockSpec(8, 8), True, None),
        (BlockSpec(8, 8), False, None),
        # As in the published networks: a pooled shortcut of equal width has no convolution.
        (BlockSpec(8, 8, stride=2), True, [nn.AvgPool2d]),
        (BlockSpec(8, 8, stride=2), False, [nn.Conv2d, nn.BatchNorm2d]),
        (BlockSpec(8, 16), True, [nn.Conv2d, nn.BatchNorm2d]),
        (BlockSpec(8, 16, stride=2), True, [nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d]),
        (BlockSpec(8, 16, stride=(2, 1)), True, [nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d]),
        (BlockSpec(8, 16, stride=2), False, [nn.Conv2d, nn.BatchNorm2d]),
    ],
)
def test_shortcut_structure(spec, pooled, kinds):
    shortcut = make_shortcut(spec, pooled)
    assert (shortcut and [type(layer) for layer in shortcut]) == kinds
    if kinds and nn.AvgPool2d in kinds:
        pool = shortcut[0]
        assert (pool.kernel_size, pool.stride, pool.padding) == (3, spec.stride, 1)
        assert all(layer.stride == (1, 1) for layer in shortcut if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize(
    ("stride", "strided"), [(1, False), ((1, 1), False), (2, True), ((2, 1), True), ((1, 2), True)]
)
def test_is_strided(stride, strided):
    assert is_strided(stride) is strided


@pytest.mark.parametrize("narrow", [1, 2, 4])
@pytest.mark.parametrize(("cardinality", "base_width"), [(32, 4), (64, 4), (8, 32)])
def test_narrow_group_rule(cardinality, base_width, narrow):
    # The paper: the little branch has cardinality / alpha groups of base width * alpha.
    for width in (256, 512):
        block = Bottleneck(BlockSpec(64, width // narrow, narrow=narrow), cardinality, base_width)
        groups = cardinality // narrow
        group_width = base_width * narrow * (width // narrow // 4) // 64
        assert block.conv2.groups == groups
        assert block.conv2.in_channels == block.conv2.out_channels == groups * group_width


@pytest.mark.parametrize("narrow", [1, 2, 4])
def test_narrow_bottleneck_width(narrow):
    block = Bottleneck(BlockSpec(64, 256 // narrow, narrow=narrow))
    assert block.conv2.groups == 1
    assert block.conv2.out_channels == 256 // (4 * narrow)


def test_rectangular_stride():
    block = Bottleneck(BlockSpec(8, 16, stride=(2, 1)))
    assert block(torch.randn(1, 8, 9, 7)).shape == (1, 16, 5, 7)


def test_squeeze_excitation_equals_its_equation():
    se = random_state(SqueezeExcitation(32, reduction=8))
    assert se.fc1.out_channels == 32 // 8
    x = torch.randn(2, 32, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(se(x), x * expected_gates(se, x))


def test_last_norm_is_the_one_before_the_add():
    basic, bottleneck = BasicBlock(BlockSpec(8, 8)), Bottleneck(BlockSpec(8, 8))
    assert basic.last_norm is basic.bn2
    assert bottleneck.last_norm is bottleneck.bn3
    for block in (basic, bottleneck):
        nn.init.zeros_(block.last_norm.weight)
        x = torch.randn(1, 8, 5, 5)
        torch.testing.assert_close(block(x), F.relu(x))
