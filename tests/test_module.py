"""BigLittleModule: its structure, and its output against a composition written by hand."""

from functools import partial
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blnet.blocks import BasicBlock, BlockSpec, Bottleneck
from blnet.module import (
    BigLittleModule,
    branch_length,
    check_branching,
    divide_width,
    make_branch,
    make_module,
    plain_stage,
)


def blocks(branch):
    return [layer for layer in branch if not isinstance(layer, nn.AvgPool2d)]


def random_norms(module):
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1)
            nn.init.normal_(layer.bias, 0, 0.2)
            nn.init.normal_(layer.running_mean, 0, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module.double().eval()


def upsample(x, size):
    """Nearest: floor(i * H_big / H), as design and paper say, by index."""
    rows = torch.arange(size[0]) * x.shape[2] // size[0]
    columns = torch.arange(size[1]) * x.shape[3] // size[1]
    return x[:, :, rows][:, :, :, columns]


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 3))
def test_branch_length(length, beta, divisions):
    divided = length
    for _ in range(divisions):
        divided //= beta
    assert branch_length(length, beta, divisions) == max(1, divided - 1)


@pytest.mark.parametrize(
    ("length", "big", "little2", "little4"),
    # The stage plan of the paper: max(1, floor(L / beta) - 1) for the little branch.
    [(3, 2, 1, 1), (4, 3, 1, 1), (6, 5, 2, 1), (8, 7, 3, 1), (18, 17, 8, 3), (30, 29, 14, 6)],
)
def test_branch_lengths_of_the_paper(length, big, little2, little4):
    assert branch_length(length, 2, 0) == branch_length(length, 4, 0) == big
    assert branch_length(length, 2, 1) == little2
    assert branch_length(length, 4, 1) == little4


@pytest.mark.parametrize("branches", [2, 3, 4])
@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("make", [BasicBlock, Bottleneck])
def test_structure(make, length, alpha, beta, branches):
    width, stride = 256, 2
    with torch.device("meta"):
        module = make_module(
            make, 32, width, length, alpha=alpha, beta=beta, branches=branches, stride=stride
        )
    assert len(module.branches) == branches
    assert len(module.expands) == branches - 1
    sizes = [branch(torch.empty(1, 32, 37, 45, device="meta")).shape for branch in module.branches]
    for index, (branch, size) in enumerate(zip(module.branches, sizes, strict=True)):
        divisions = branches - 1 - index
        assert size[1] == width // alpha**divisions
        assert size[2:] == (ceil(37 / 2**index), ceil(45 / 2**index))
        assert len(blocks(branch)) == branch_length(length, beta, divisions)
        for block in blocks(branch)[:-1]:
            assert block.closing_activation
        # Only the big branch ends without a ReLU, and a branch of one block never does.
        is_open = divisions == 0 and len(blocks(branch)) > 1
        assert blocks(branch)[-1].closing_activation is not is_open
    for expand, size in zip(module.expands, sizes, strict=False):
        conv, bn = expand
        assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (size[1], width, (1, 1))
        assert conv.bias is None
        assert bn.num_features == width
    (fusion,) = module.fusion
    assert fusion.closing_activation
    assert fusion.conv1.in_channels == width


def test_first_block_of_the_big_branch_pools_its_shortcut():
    module = make_module(Bottleneck, 64, 256, 3, alpha=2, beta=4)
    pool, conv, _ = blocks(module.branches[1])[0].downsample
    assert isinstance(pool, nn.AvgPool2d)
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    assert conv.stride == (1, 1)
    assert not any(isinstance(m, nn.AvgPool2d) for m in module.branches[0].modules())


def test_branch_with_fewer_blocks_than_halvings_begins_with_pools():
    branch = make_branch(BasicBlock, 8, 16, length=1, halvings=3)
    assert [type(layer) for layer in branch] == [nn.AvgPool2d, nn.AvgPool2d, BasicBlock]
    assert branch(torch.randn(1, 8, 16, 24)).shape == (1, 16, 2, 3)


@pytest.mark.parametrize("size", [(16, 16), (13, 7), (1, 5)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_forward_equals_composition(branches, stride, size):
    torch.manual_seed(branches)
    module = make_module(
        partial(Bottleneck, se_reduction=4), 24, 64, 5, alpha=2, beta=2, branches=branches,
        stride=stride,
    )  # fmt: skip
    random_norms(module)
    x = torch.randn(2, 24, *size, dtype=torch.float64)
    with torch.no_grad():
        out = module.branches[-1](x)
        for index in reversed(range(branches - 1)):
            conv, bn = module.expands[index]
            little = bn(conv(module.branches[index](x)))
            out = F.relu(upsample(out, little.shape[2:]) + little)
        if branches > 1:
            out = module.fusion[0](out)
        torch.testing.assert_close(module(x), out)
    assert out.shape[2:] == tuple(ceil(n / stride) for n in size)


def test_other_activation():
    class Cube(nn.Module):
        def forward(self, x):
            return x**3

    big, little = nn.AvgPool2d(2), nn.Identity()
    module = BigLittleModule([little, big], [nn.Identity()], activation=Cube())
    x = torch.randn(1, 3, 8, 6, dtype=torch.float64)
    expected = (upsample(F.avg_pool2d(x, 2), (8, 6)) + x) ** 3
    torch.testing.assert_close(module(x), expected)


def test_relu_given_as_a_module_is_the_fused_merge():
    module = BigLittleModule([nn.Identity(), nn.AvgPool2d(2)], [nn.Identity()], None, nn.ReLU())
    assert module.activation is None
    x = torch.randn(1, 3, 8, 6)
    assert torch.equal(module(x), F.relu(upsample(F.avg_pool2d(x, 2), (8, 6)) + x))


def test_gradients_reach_every_branch():
    module = make_module(BasicBlock, 8, 16, 4, alpha=2, beta=1, branches=3)
    module(torch.randn(2, 8, 16, 16)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_one_branch_is_the_plain_stage():
    block = partial(BasicBlock, pooled_shortcut=False)
    module = make_module(block, 8, 16, 3, alpha=2, beta=2, branches=1, stride=2)
    plain = plain_stage(block, 8, 16, 3, 2)
    plain.load_state_dict(module.branches[0].state_dict())
    assert module.fusion is None
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(module.eval()(x), plain.eval()(x))


def test_block_gets_the_spec_it_needs():
    asked = []

    def block(spec):
        asked.append(spec)
        return nn.Conv2d(spec.in_channels, spec.out_channels, 1, spec.stride)

    make_module(block, 8, 64, 3, alpha=4, beta=3, branches=2, stride=(2, 1))
    assert asked == [
        BlockSpec(8, 16, 1, narrow=4),
        BlockSpec(8, 64, 2),
        BlockSpec(64, 64, 1, closing_activation=False, position=1),
        BlockSpec(64, 64, (2, 1), position=-1),
    ]


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2", None])
@pytest.mark.parametrize("name", ["alpha", "beta", "branches"])
def test_bad_branching(name, value):
    settings = {"alpha": 2, "beta": 2, "branches": 2, name: value}
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got"):
        check_branching(**settings)
    with pytest.raises(ValueError, match=f"{name} must be"):
        make_module(BasicBlock, 8, 16, 2, **settings)


def test_bad_length():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        make_module(BasicBlock, 8, 16, 0, alpha=2, beta=2)


def test_width_that_alpha_does_not_divide():
    assert divide_width(64, 4, 2) == 4
    with pytest.raises(ValueError, match="alpha 3 with 2 branches divides a width of 64"):
        make_module(BasicBlock, 8, 64, 2, alpha=3, beta=2)


@pytest.mark.parametrize(("branches", "expands"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_wrong_number_of_expands(branches, expands):
    with pytest.raises(ValueError, match="expands must be one fewer than branches"):
        BigLittleModule([nn.Identity()] * branches, [nn.Identity()] * expands)
