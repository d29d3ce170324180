"""The helpers that judge kernels must themselves tell right from wrong."""

import pytest
import torch

from blnet.kernels import launch, testing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rounding_passes_and_a_wrong_element_does_not(dtype):
    truth = torch.randn(4, 5, 6, 7, dtype=torch.float64)
    testing.assert_close(truth.to(dtype), truth)
    wrong = truth.to(dtype, copy=True)
    wrong[1, 2, 3, 4] = -wrong[1, 2, 3, 4] + 1
    with pytest.raises(AssertionError, match=r"out: 1 of 840 .* the first is \(1, 2, 3, 4\)"):
        testing.assert_close(wrong, truth, what="out")


def test_nan_is_wrong_and_shapes_must_agree():
    truth = torch.randn(2, 3, dtype=torch.float64)
    poisoned = truth.float()
    poisoned[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="1 of 6 elements"):
        testing.assert_close(poisoned, truth)
    with pytest.raises(AssertionError, match=r"shape \(2, 2\), expected \(2, 3\)"):
        testing.assert_close(truth[:, :2], truth)


def test_a_small_error_everywhere_is_wrong():
    truth = torch.randn(1000, dtype=torch.float64)
    biased = (truth * (1 + 1.2e-2)).bfloat16()  # truncation would look like this
    with pytest.raises(AssertionError, match="Frobenius"):
        testing.assert_close(biased, truth)


def test_empty_tensors_agree():
    testing.assert_close(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64))
    assert testing.relative_error(torch.empty(0), torch.empty(0)) == 0


def test_no_worse_compares_with_eager():
    truth = torch.ones(10, dtype=torch.float64)
    eager, ours = truth + 1e-3, truth + 1.2e-3
    testing.assert_no_worse(ours, eager, truth)
    with pytest.raises(AssertionError, match=r"above 1.25 x eager"):
        testing.assert_no_worse(truth + 1.3e-3, eager, truth)
    with pytest.raises(AssertionError, match="nan"):
        testing.assert_no_worse(truth * float("nan"), eager, truth)


def test_poison_is_on_only_inside():
    def allocate():
        return launch.allocate(torch.empty(0), (2, 3, 4, 5), torch.channels_last)

    with testing.poisoned_outputs():
        with testing.poisoned_outputs():
            assert allocate().isnan().all()
        assert allocate().isnan().all()
    assert launch._poison is False
    assert allocate().is_contiguous(memory_format=torch.channels_last)


TABLES = (
    testing.SHAPES,
    testing.EXPAND_SHAPES,
    testing.BOTTLENECK_SHAPES,
    testing.STEM_SHAPES,
)


@pytest.mark.parametrize("shapes", TABLES)
def test_every_shape_has_its_own_reason(shapes):
    reasons = [shape.reason for shape in shapes]
    assert all(reasons)
    assert len(set(reasons)) == len(reasons)
    assert len({str(shape) for shape in shapes}) == len(reasons)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_inputs(layout, dtype):
    shape = testing.SHAPES[0]
    first, again = (
        testing.merge_inputs(shape, dtype, layout, "cpu", torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    for one, other, size in zip(first, again, (shape.big, shape.little), strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, tuple(one.shape)) == (dtype, size)
    big, little = first
    last = torch.channels_last
    assert little.is_contiguous(memory_format=last) == (layout in ("channels_last", "mixed"))
    assert big.is_contiguous(memory_format=last) == (layout == "channels_last")
    assert (not little.is_contiguous()) == (layout != "contiguous")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_inputs_of_expand_merge(layout, dtype):
    shape = testing.EXPAND_SHAPES[0]
    first, again = (
        testing.expand_merge_inputs(
            shape, dtype, layout, "cpu", torch.Generator().manual_seed(3), offset=30.0
        )
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    x, weight, scale, shift, big = first
    assert tuple(x.shape) == shape.x
    assert (x.dtype, weight.dtype, big.dtype) == (dtype,) * 3
    assert (scale.dtype, shift.dtype) == (torch.float32,) * 2
    last = torch.channels_last
    assert x.is_contiguous(memory_format=last) == (layout in ("channels_last", "mixed"))
    assert x.is_contiguous() == (layout == "contiguous")
    assert x.float().mean((0, 2, 3)).abs().sub(30).abs().max() < 1
    y, center = testing.moments_inputs(shape, dtype, layout)
    assert (y.float().mean((0, 2, 3)) - center).abs().max() < 1


BLOCKS = {
    "bottleneck": (testing.bottleneck_inputs, testing.BOTTLENECK_SHAPES, (2, 4, 6, 9)),
    "stem": (testing.stem_inputs, testing.STEM_SHAPES, (3, 5, 7, 9)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("op", BLOCKS)
def test_inputs_of_blocks(op, layout, dtype):
    build, shapes, shifts = BLOCKS[op]
    last = torch.channels_last
    for shape in shapes:
        first, again = (
            build(shape, dtype, layout, "cpu", torch.Generator().manual_seed(3)) for _ in range(2)
        )
        for index, (one, other) in enumerate(zip(first, again, strict=True)):
            if one is not None:
                assert torch.equal(one, other)
                assert one.dtype is (torch.float32 if index in shifts else dtype)
        assert tuple(first[0].shape) == shape.x
    x, *rest = build(shapes[0], dtype, layout)
    assert x.is_contiguous(memory_format=last) == (layout in ("channels_last", "mixed"))
    assert x.is_contiguous() == (layout == "contiguous")
    kernels = [t for t in rest if t is not None and t.shape[2:] == (3, 3)]
    assert kernels
    for weight in kernels:  # packed for the kernels, or not
        assert weight.is_contiguous(memory_format=last) == (layout == "mixed")


def test_errors_of_float32_sums_are_no_worse():
    truth = torch.ones(10, dtype=torch.float64)
    testing.assert_no_worse(truth + 9e-7, truth, truth)
    with pytest.raises(AssertionError, match="above"):
        testing.assert_no_worse(truth + 2e-6, truth, truth)


def test_unknown_layout():
    with pytest.raises(ValueError, match=r"no layout 'nhwc'; choose one of 'channels_last'"):
        testing.merge_inputs(testing.SHAPES[0], layout="nhwc")
