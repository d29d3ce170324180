"""The plain PyTorch references: nearest indices in integers, and derivatives."""

import pytest
import torch
import torch.nn.functional as F

from blnet.kernels import reference

LARGEST = 200


def test_upsampling_takes_exactly_the_integer_index_for_every_pair_of_sizes():
    for size_big in range(1, LARGEST + 1):
        big = torch.arange(float(size_big)).view(1, 1, size_big, 1)
        for size in range(1, LARGEST + 1):
            expected = [i * size_big // size for i in range(size)]
            index = reference.nearest_index(size_big, size)
            assert index.tolist() == expected
            if size_big in (size, (size + 1) // 2):  # elsewhere it is this index by construction
                out = reference.upsample_nearest(big, (size, 1))
                assert out.flatten().tolist() == expected


def test_interpolate_is_exact_wherever_it_is_used():
    # Every size up to the limit that reference.py derives.
    for size in range(1, 3001):
        size_big = (size + 1) // 2
        assert reference._interpolate_is_exact(size_big, size)
        values = torch.arange(float(size_big)).view(1, 1, size_big, 1)
        out = F.interpolate(values, size=(size, 1), mode="nearest").flatten().long()
        assert torch.equal(out, reference.nearest_index(size_big, size))


def test_interpolate_is_not_exact_everywhere():
    # Why integers are needed at all: float32 picks a neighbour at some ratios.
    wrong = []
    for size_big in range(1, LARGEST + 1):
        values = torch.arange(float(size_big)).view(1, 1, size_big, 1)
        for size in range(1, LARGEST + 1):
            out = F.interpolate(values, size=(size, 1), mode="nearest").flatten().long()
            if not torch.equal(out, reference.nearest_index(size_big, size)):
                wrong.append((size_big, size))
    assert wrong
    assert not any(reference._interpolate_is_exact(*pair) for pair in wrong)


@pytest.mark.parametrize(
    ("size_big", "size"), [((4, 5), (8, 10)), ((4, 5), (7, 9)), ((3, 2), (7, 7)), ((5, 7), (3, 7))]
)
def test_upsampling_of_both_axes(size_big, size):
    big = torch.randn(2, 3, *size_big)
    rows = reference.nearest_index(size_big[0], size[0])
    columns = reference.nearest_index(size_big[1], size[1])
    assert torch.equal(reference.upsample_nearest(big, size), big[:, :, rows][:, :, :, columns])


def test_same_size_is_no_work():
    big = torch.randn(2, 3, 4, 5)
    assert reference.upsample_nearest(big, (4, 5)) is big


@pytest.mark.parametrize("size_big", [(2, 3), (4, 5), (3, 4), (5, 2)])
def test_derivatives(size_big):
    torch.manual_seed(0)
    big = torch.randn(2, 2, *size_big, dtype=torch.float64, requires_grad=True)
    little = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.merge, (big, little))
    assert torch.autograd.gradgradcheck(reference.merge, (big, little))


def test_inputs_are_left_alone():
    big, little = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    before = big.clone(), little.clone()
    reference.merge(big, little)
    assert torch.equal(big, before[0])
    assert torch.equal(little, before[1])
