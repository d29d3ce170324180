"""moments' kernels in Triton's interpreter against float64."""

import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from blnet.kernels import (
    estimate_center,
    launch,
    mean_and_covariance,
    moments,
    reference,
    testing,
    use_backend,
)
from blnet.kernels.triton_shim import tl, triton
from helpers.drawing import DTYPES, fresh

# "blnet.kernels.moments" as an attribute is the function; this is the module.
moments_module = importlib.import_module("blnet.kernels.moments")

EXAMPLES = 60  # of each dtype, the same in every run
FRESH = fresh(8)  # of each dtype, others in every run


def draw_map(shape, dtype, layout="channels_last", offset=30.0, number=0):
    generator = torch.Generator().manual_seed(number)
    expand = testing.ExpandShape(*shape[:2], 1, *shape[2:], 0, 0, "drawn")
    return testing.expand_merge_inputs(expand, dtype, layout, "cpu", generator, offset)[0]


def check(x, shift):
    with testing.poisoned_outputs():
        sums, gram = moments(x, shift)
    z = x.double() if shift is None else x.double() - shift.double().view(-1, 1, 1)
    expected = reference.moments(z)
    # 16-bit maps too: with a good shift only the sums are rounded, in float32. They may cancel.
    error, size = (sums - expected[0]).abs(), z.abs().sum((0, 2, 3))
    assert (error <= 1e-6 * size).all(), f"sums: {error} of {size}"
    testing.assert_close(gram, expected[1], dtype=torch.float32, what="gram")
    assert sums.dtype is gram.dtype is torch.float32
    assert torch.equal(gram, gram.mT)
    return sums, gram


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", testing.EXPAND_SHAPES, ids=str)
def test_matrix(shape, dtype, layout):
    x, _ = testing.moments_inputs(shape, dtype, layout, "cpu", torch.Generator().manual_seed(0))
    check(x, estimate_center(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [4, 64, 65, 128, 129, 200, 257, 512])
def test_any_number_of_channel_tiles(channels, dtype):
    x = draw_map((1, channels, 5, 9), dtype)
    check(x, estimate_center(x))


@pytest.mark.parametrize("rows", [0, 1, 2, 127, 128, 129, 1024, 1025, 3000])
def test_any_number_of_rows(rows):
    x = draw_map((1, 20, rows, 1), torch.float32)
    check(x, estimate_center(x))


DRAWN = {
    "shape": st.tuples(
        st.integers(0, 3), st.sampled_from([1, 2, 3, 5, 16, 17, 40, 70]), *[st.integers(0, 30)] * 2
    ),
    "layout": st.sampled_from(testing.LAYOUTS),
    "offset": st.sampled_from([0.0, 1.0, 30.0]),
    "number": st.integers(0, 2**16),
}
QUIET = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@seed(20_250_101)
@settings(max_examples=EXAMPLES, **QUIET)
@given(**DRAWN)
def test_drawn_shapes(dtype, shape, layout, offset, number):
    x = draw_map(shape, dtype, layout, offset, number)
    check(x, estimate_center(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=FRESH, **QUIET)
@given(**DRAWN)
def test_drawn_shapes_with_a_fresh_seed(dtype, shape, layout, offset, number):
    x = draw_map(shape, dtype, layout, offset, number)
    check(x, estimate_center(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_and_covariance_far_from_zero(dtype):
    x = draw_map((2, 40, 20, 30), dtype, offset=30.0)
    shift = estimate_center(x)
    mean, covariance = mean_and_covariance(*moments(x, shift), 1200, shift)
    rows = reference.rows_of(x.double())
    deviation = rows - rows.mean(0)
    expected = deviation.mT @ deviation / 1200
    assert testing.relative_error(mean, rows.mean(0)) < 1e-7
    assert testing.relative_error(covariance, expected) < 1e-6
    # What the shift is for: without it the digits are gone.
    _, blunt = mean_and_covariance(*moments(x), 1200, None)
    assert testing.relative_error(blunt, expected) > 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_shift_the_moments_are_about_zero(dtype):
    check(draw_map((1, 20, 9, 9), dtype, offset=0.0), None)


def test_the_shift_may_be_of_any_dtype():
    x = draw_map((1, 20, 9, 9), torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        check(x, torch.full((20,), 2.0, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_16_bit_center_is_exact_or_zero(dtype):
    x = torch.randn(2, 4, 30, 30)
    x += torch.tensor([0.0, 2.0, -30.0, 300.0]).view(-1, 1, 1)
    center = estimate_center(x.to(dtype))
    assert center[:2].tolist() == [0.0, 0.0]
    assert torch.equal(center, center.to(dtype).float())
    assert (center[2:] - torch.tensor([-30.0, 300.0])).abs().max() < 2
    assert estimate_center(torch.full((1, 1, 3, 3), 7.0, dtype=dtype)).item() == 7.0
    assert estimate_center(torch.zeros(1, 1, 3, 3, dtype=dtype)).item() == 0.0


def test_a_float32_center_is_the_mean_of_a_sample():
    x = draw_map((1, 5, 16, 8), torch.float32)  # 128 pixels: the sample is all of them
    torch.testing.assert_close(estimate_center(x), x.mean((0, 2, 3)))
    assert estimate_center(x[:0]).tolist() == [0.0] * 5


def test_64_bit_offsets_give_the_same_bits(monkeypatch):
    x = draw_map((2, 70, 20, 9), torch.float32)
    shift = estimate_center(x)
    narrow = check(x, shift)
    monkeypatch.setattr(launch, "INT32_LIMIT", 0)
    assert moments_module.moments_launch(360, 70, 4).constants["WIDE"]
    wide = check(x, shift)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_bits_repeat():
    x = draw_map((2, 70, 40, 40), torch.bfloat16)
    first, second = moments(x), moments(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck():
    x = draw_map((2, 20, 9, 5), torch.float32)
    tests = ("test_schema", "test_faketensor")  # its gradient is refused
    torch.library.opcheck(torch.ops.blnet.moments.default, (x, torch.zeros(20)), test_utils=tests)
    torch.library.opcheck(torch.ops.blnet.center.default, (x,), test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    compiled = torch.compile(moments, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 20, 9, 5), (3, 20, 8, 7), (1, 20, 1, 1)):
        x, shift = draw_map(shape, torch.bfloat16), torch.ones(20)
        for got, expected in zip(compiled(x, shift), moments(x, shift), strict=True):
            assert torch.equal(got, expected)


def test_gradients_are_refused():
    x = draw_map((1, 4, 3, 3), torch.float32).requires_grad_()
    with pytest.raises(RuntimeError, match="blnet::moments cannot be differentiated"):
        moments(x)[1].sum().backward()


def test_flop_count_does_not_depend_on_the_backend():
    x = draw_map((2, 20, 9, 5), torch.float32)
    counts = []
    for backend in ("interpret", "torch"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            moments(x)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 90 * 20 * 20] * 2


def test_float64_runs_on_torch_unless_forced():
    x = draw_map((1, 4, 3, 3), torch.float32).double()
    assert moments(x)[0].dtype is torch.float64
    with use_backend("interpret"), pytest.raises(ValueError, match=r"cannot run torch\.float64"):
        moments(x)


# The tests above are only worth something if a broken kernel fails them. ------------------------


@triton.jit
def _forgets_the_shift(
    p_x, p_shift, p_sums, p_gram, rows, channels, chunk,
    TILES: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_channel = tl.arange(0, BLOCK)
    m_channel = o_channel < channels
    b_sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in tl.range(0, rows):
        b_sums += tl.load(p_x + row * channels + o_channel, mask=m_channel, other=0.0)
    tl.store(p_sums + o_channel, b_sums, mask=m_channel)


def test_a_broken_kernel_is_caught(monkeypatch):
    x = draw_map((1, 20, 3, 3), torch.float32)
    monkeypatch.setattr(moments_module, "_moments_kernel", _forgets_the_shift)
    with pytest.raises(AssertionError, match="sums: "):
        check(x, estimate_center(x))


def test_a_forgotten_share_is_caught(monkeypatch):
    plan = moments_module.moments_launch

    def one_share_short(*sizes):
        good = plan(*sizes)
        integers = {**good.integers, "chunk": good.integers["chunk"] // 2}
        return launch.Launch(good.grid, integers, good.constants)

    x = draw_map((1, 20, 30, 30), torch.float32)
    monkeypatch.setattr(moments_module, "moments_launch", one_share_short)
    with pytest.raises(AssertionError, match="sums: "):
        check(x, estimate_center(x))
