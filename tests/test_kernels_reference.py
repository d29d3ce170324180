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


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_moments_are_those_of_the_rows():
    x, shift = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    sums, gram = reference.moments(x, shift)
    rows = [x[n, :, i, j] - shift for n in range(2) for i in range(4) for j in range(5)]
    torch.testing.assert_close(sums, sum(rows))
    torch.testing.assert_close(gram, sum(torch.outer(row, row) for row in rows))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert reference.moments(x.to(dtype))[1].dtype is torch.float32


def test_derivatives_of_moments():
    assert torch.autograd.gradcheck(reference.moments, (drawn(2, 3, 2, 2), drawn(3)))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size_big", [None, (2, 3), (4, 5), (5, 2)], ids=str)
def test_derivatives_of_expand_merge(size_big, relu):
    torch.manual_seed(0)
    big = None if size_big is None else drawn(2, 3, *size_big)
    tensors = (drawn(2, 2, 4, 5), drawn(3, 2, 1, 1), drawn(3), drawn(3), big)
    assert torch.autograd.gradcheck(lambda *t: reference.expand_merge(*t, relu), tensors)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size_big", [None, (2, 3), (4, 5), (5, 2)], ids=str)
def test_derivatives_of_expand_merge_with_batch_statistics(size_big, relu):
    torch.manual_seed(0)
    big = None if size_big is None else drawn(2, 3, *size_big)

    def function(x, weight, gamma, beta, big):
        return reference.expand_merge_train(x, weight, gamma, beta, big=big, relu=relu)

    tensors = (drawn(2, 2, 4, 5), drawn(3, 2), drawn(3), drawn(3), big)
    assert torch.autograd.gradcheck(function, tensors)


def test_expand_merge_is_written_out():
    x, weight, big = torch.randn(2, 3, 4, 6), torch.randn(5, 3), torch.randn(2, 5, 2, 3)
    scale, shift = torch.randn(5), torch.randn(5)
    y = torch.einsum("nkij,ck->ncij", x, weight)
    upsampled = big.repeat_interleave(2, 2).repeat_interleave(2, 3)
    affine = y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    close = {"rtol": 1e-5, "atol": 1e-5}
    for got, expected in (
        (reference.expand_merge(x, weight, scale, shift, big), (affine + upsampled).relu()),
        (reference.expand_merge(x, weight, scale, shift, big, False), affine + upsampled),
        (reference.expand_merge(x, weight, scale, shift), affine.relu()),
        (reference.expand_merge(x, weight, None, shift), (y + shift.view(-1, 1, 1)).relu()),
        (reference.expand_merge(x, weight, scale, relu=False), y * scale.view(-1, 1, 1)),
        (reference.expand_merge(x, weight, relu=False), y),
    ):
        torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strided_convolutions_of_one_column_in_bfloat16(columns, layout):
    """On CPUs with AMX PyTorch itself returns memory that nobody wrote (its issue 169688)."""
    generator = torch.Generator().manual_seed(0)
    x, little = (torch.randn(1, c, 30, columns, generator=generator) for c in (3, 2))
    x, little = (part.bfloat16().contiguous(memory_format=layout) for part in (x, little))
    shapes = ((5, 4, 1, 1), (4, 5, 1, 1), (5, 3, 3, 3), (4, 2, 3, 3))
    expand, fusion, big, small = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    weights = {"weight_big": big, "weight_little": small}
    wanted = reference.stem(
        x.double(), little.double(), expand.double(), None, fusion.double(), None,
        **{name: weight.double() for name, weight in weights.items()},
    )  # fmt: skip
    for _ in range(5):
        spoilt = [torch.full((1 << n,), 3e38).bfloat16() for n in range(4, 16)]
        del spoilt
        out = reference.stem(x, little, expand, None, fusion, None, **weights)
        assert out.shape == wanted.shape
        assert float((out - wanted).abs().max() / wanted.abs().max()) < 0.02
