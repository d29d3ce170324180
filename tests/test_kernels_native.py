"""The native engine's steps against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.kernels.native import Builder, Output, pixel_table, status
from blnet.kernels.native.packing import METHODS as ALL_METHODS
from blnet.kernels.native.winograd import TILES
from blnet.kernels.reference import nearest_index, upsample_nearest

pytestmark = pytest.mark.skipif(not status().works, reason=f"{status().reason}")

TOLERANCE = 2e-5  # of the largest value, to tiles of 4x4; those of 5x5 and 4x6 err twice as much
LARGE_TILES = ("winograd 5x5", "winograd 4x6")
ALL = ((1, 1), (2, 1), (2, 2))
STRIDES = {
    "direct": ALL,
    "winograd 2x2": ALL,
    "winograd 4x4": ALL,
    "winograd 5x5": ALL[:1],
    "winograd 4x6": ALL[:2],
}
METHODS = tuple(STRIDES)
WAYS = [(method, stride) for method, strides in STRIDES.items() for stride in strides]


def error(out, expected):
    assert out.shape == expected.shape
    return float((out.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def tolerance(method):
    return 2 * TOLERANCE if method in LARGE_TILES else TOLERANCE


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest_table(size_big, size):
    rows, columns = (nearest_index(b, s) for b, s in zip(size_big, size, strict=True))
    return pixel_table(rows, columns, size_big[1])


# Convolutions -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 70),
    out=st.integers(1, 70),
    size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    relu=st.booleans(),
    last=st.booleans(),
)
def test_convolution_of_any_size(images, channels, out, size, kernel, stride, padding, relu, last):
    padding = tuple(
        max(pad, (k - s + 1) // 2) for pad, k, s in zip(padding, kernel, size, strict=True)
    )
    x = drawn(0, images, channels, *size)
    weight, bias = drawn(1, out, channels, *kernel), drawn(2, out)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    builder = Builder(tuple(x.shape))
    y = builder.conv(
        builder.input, weight, bias, stride=stride, padding=padding, relu=relu, method="direct"
    )
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    out = builder.build([y])(x)[0]
    assert out.shape == expected.shape
    # What rounding may do to a sum goes with its terms, which may cancel.
    terms = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), stride, padding)
    wrong = (out - (expected.relu() if relu else expected)).abs() / terms.clamp(min=1e-3)
    assert float(wrong.max()) < 1e-6


@settings(max_examples=120, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    images=st.integers(1, 4),
    channels=st.integers(5, 50),
    out=st.integers(1, 100),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    padding=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_3x3_convolution_each_way(way, images, channels, out, size, padding):
    method, stride = way
    x, weight = drawn(0, images, channels, *size), drawn(1, out, channels, 3, 3)
    bias = drawn(2, out)
    builder = Builder(tuple(x.shape))
    y = builder.conv(builder.input, weight, bias, stride=stride, padding=padding, method=method)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    out = builder.build([y])(x)[0]
    if method not in LARGE_TILES:
        assert error(out, expected) < TOLERANCE
        return
    # A map of few numbers may hold none as large as sums of so many products commonly are.
    largest = max(float(expected.abs().max()), (9 * channels) ** 0.5)
    assert (out - expected).abs().max() < tolerance(method) * largest


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 4),
    out=st.integers(1, 70),
    size=st.tuples(st.integers(7, 50), st.integers(7, 150)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    table=st.sampled_from([None, "same", "upsampled"]),
    relu=st.booleans(),
    last=st.booleans(),
)
def test_stem_by_winograd(images, channels, out, size, padding, table, relu, last):
    x, weight = drawn(0, images, channels, *size), drawn(1, out, channels, 7, 7)
    bias = drawn(2, out)
    builder = Builder(tuple(x.shape))
    expected = F.conv2d(x.double(), weight.double(), bias.double(), 2, padding)
    options = {}
    if table:
        shape = expected.shape[2:] if table == "same" else (1, 3)
        windows = [[(0, 1, 1)] * n for n in shape]
        first = drawn(3, out, channels, 1, 1)
        small = builder.pool(builder.conv(builder.input, first), *windows, average=True)
        options["residual"] = small
        if table == "upsampled":
            options["table"] = nearest_table(shape, tuple(expected.shape[2:]))
        corner = F.conv2d(x.double(), first.double())[:, :, :1, :1]
        expected = expected + corner
    y = builder.conv(
        builder.input, weight, bias, stride=(2, 2), padding=padding, relu=relu,
        method="winograd 1x4", **options,
    )  # fmt: skip
    program = builder.build([y])
    result = program(x.contiguous(memory_format=torch.channels_last) if last else x)[0]
    wrong = (result - (expected.relu() if relu else expected)).abs().max()
    assert wrong < 4e-6 * max(float(expected.abs().max()), (49 * channels) ** 0.5)


def test_stem_of_large_maps_image_by_image():
    x, weight = drawn(0, 2, 3, 224, 224), drawn(1, 64, 3, 7, 7)
    builder = Builder(tuple(x.shape))
    y = builder.conv(builder.input, weight, stride=(2, 2), padding=(3, 3))
    program = builder.build([y])
    assert program.steps[0] == "conv 7x7 3->64/2 winograd 1x4"
    expected = F.conv2d(x.double(), weight.double(), None, 2, 3)
    assert error(program(x)[0], expected) < 2e-6


def test_every_way_is_tested():
    assert set(ALL_METHODS) == {*METHODS, "winograd 1x4"}
    assert set(WAYS) == {("direct", s) for s in ALL} | {(t.name, t.stride) for t in TILES}


@pytest.mark.parametrize(
    ("channels", "out", "groups"),
    [(64, 64, 64), (32, 32, 8), (24, 48, 3), (96, 192, 2), (128, 128, 32), (40, 20, 20), (3, 6, 3)],
)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_grouped_convolution(channels, out, groups, stride):
    x, weight = drawn(0, 2, channels, 9, 11), drawn(1, out, channels // groups, 3, 3)
    builder = Builder(tuple(x.shape))
    y = builder.conv(builder.input, weight, stride=stride, padding=(1, 1), groups=groups)
    expected = F.conv2d(x.double(), weight.double(), None, stride, 1, 1, groups)
    assert error(builder.build([y])(x)[0], expected) < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    channels=st.integers(5, 40),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    big=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    relu=st.booleans(),
)
def test_upsampled_residual_of_any_ratio(method, channels, size, big, relu):
    kernel = 1 if method == "direct" else 3
    x, weight = drawn(0, 2, channels, *size), drawn(1, channels, channels, kernel, kernel)
    shift = drawn(2, channels)
    builder = Builder(tuple(x.shape))
    windows = [[(i * s // b, -(-(i + 1) * s // b), 2) for i in range(b)]
               for s, b in zip(size, big, strict=True)]  # fmt: skip
    small = builder.pool(builder.input, *windows, average=False)
    y = builder.conv(
        builder.input, weight, shift, padding=(kernel // 2,) * 2, residual=small,
        table=nearest_table(big, size), relu=relu, method=method,
    )  # fmt: skip
    pooled = F.adaptive_max_pool2d(x.double(), big)
    expected = F.conv2d(x.double(), weight.double(), shift.double(), 1, kernel // 2)
    expected = expected + upsample_nearest(pooled, size)
    out = builder.build([y])(x)[0]
    assert error(out, expected.relu() if relu else expected) < 5 * tolerance(method)


def test_residual_of_the_same_size_at_each_width():
    for width in range(1, 32):
        x, weight = drawn(width, 1, 20, 3, width), drawn(1, 20, 20, 1, 1)
        builder = Builder(tuple(x.shape))
        y = builder.conv(builder.input, weight, residual=builder.input, relu=True)
        expected = (F.conv2d(x.double(), weight.double()) + x).relu()
        assert error(builder.build([y])(x)[0], expected) < 1e-6


# Pools and the rest -------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_steps_that_touch_each_value_once(threads):
    x, scale, shift = drawn(0, 2, 20, 6, 5), drawn(1, 20), drawn(2, 20)
    builder = Builder(tuple(x.shape), threads)
    one = builder.affine(builder.input, scale, shift, relu=True)
    gates = builder.sigmoid(builder.pool(one, [(0, 6, 6)], [(0, 5, 5)], average=True))
    gated = builder.combine(one, gates, torch.zeros(30, dtype=torch.int32), multiply=True)
    twice = builder.combine(gated, builder.input, relu=True)
    resized = builder.resize(twice, nearest_table((6, 5), (9, 2)), (9, 2))
    outs = builder.build([one, gates, gated, twice, resized])(x)
    a = (x.double() * scale[:, None, None] + shift[:, None, None]).relu()
    b = a.mean((2, 3), keepdim=True).sigmoid()
    d = (a * b + x).relu()
    for out, expected in zip(outs, [a, b, a * b, d, upsample_nearest(d, (9, 2))], strict=True):
        assert error(out, expected) < 1e-6


def test_cat_of_blocks():
    x = drawn(0, 2, 32, 4, 5)
    builder = Builder(tuple(x.shape))
    narrow = builder.conv(builder.input, drawn(1, 7, 32, 1, 1))
    y = builder.cat([builder.input, builder.combine(builder.input, relu=True), narrow])
    expected = torch.cat([x, x.relu(), F.conv2d(x, drawn(1, 7, 32, 1, 1))], 1).double()
    assert error(builder.build([y])(x)[0], expected) < 1e-6
    with pytest.raises(ValueError, match="multiple of 16 channels"):
        builder.cat([narrow, builder.input])


def test_outputs_in_another_order():
    x = drawn(0, 2, 20, 3, 5)
    builder = Builder(tuple(x.shape))
    y = builder.combine(builder.input, relu=True)
    flat, last = Output(y, (2, 300)), Output(y, (2 * 3, 5, 20), channels_last=True)
    first, second = builder.build([flat, last])(x)
    assert torch.equal(first, x.relu().flatten(1))
    assert torch.equal(second, x.relu().permute(0, 2, 3, 1).reshape(6, 5, 20))
    with pytest.raises(ValueError, match=r"shape \(2, 20\) does not hold \(2, 20, 3, 5\)"):
        builder.build([Output(y, (2, 20))])


# What passes through ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_hidden(method, value):
    x, weight = drawn(0, 1, 16, 9, 9), drawn(1, 16, 16, 3, 3)
    x[0, 3, 4, 4] = value
    builder = Builder(tuple(x.shape))
    y = builder.conv(builder.input, weight, padding=(1, 1), relu=True, method=method)
    top = builder.pool(y, [(0, 9, 1)], [(0, 9, 1)], average=False)
    mean = builder.pool(y, [(0, 9, 9)], [(0, 9, 9)], average=True)
    sums = builder.combine(y, y, relu=True)
    out, top_out, mean_out, sums_out = builder.build([y, top, mean, sums])(x)
    assert (~out.isfinite())[0, :, 3:6, 3:6].flatten(1).any(1).all()
    if value != value:
        assert out[0, :, 3:6, 3:6].isnan().all()
        assert top_out.isnan().all()
        assert mean_out.isnan().all()
        assert sums_out[0, :, 3:6, 3:6].isnan().all()
    if method == "direct":
        assert out[0, :, :3].isfinite().all()


# Errors -------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused():
    x = drawn(0, 1, 16, 4, 4)
    builder = Builder(tuple(x.shape))
    program = builder.build([builder.combine(builder.input, relu=True)])
    for wrong in (x[:, :, 1:], x.double(), x.to("meta")):
        with pytest.raises(ValueError, match="takes float32 tensors of shape"):
            program(wrong)
    with pytest.raises(ValueError, match="reads strided tensors"):
        program(x.to_sparse())
    with pytest.raises(ValueError, match="the batch of shape"):
        Builder((0, 16, 4, 4))
    builder = Builder((1, 16, 4, 4))
    with pytest.raises(ValueError, match="does not fit an input"):
        builder.conv(builder.input, drawn(0, 8, 15, 1, 1))
    with pytest.raises(ValueError, match="larger than the padded input"):
        builder.conv(builder.input, drawn(0, 8, 16, 5, 5))
    with pytest.raises(ValueError, match="needs a table"):
        builder.conv(builder.input, drawn(0, 16, 16, 3, 3), residual=builder.input)
    with pytest.raises(ValueError, match="table for shapes"):
        builder.resize(builder.input, torch.tensor([16], dtype=torch.int32), (1, 1))


@pytest.mark.parametrize(
    ("method", "shape", "options"),
    [
        ("winograd 7x7", (16, 16, 3, 3), {}),
        ("winograd 4x4", (16, 16, 3, 3), {"stride": (1, 2)}),
        ("winograd 4x6", (16, 16, 3, 3), {"stride": (2, 2)}),
        ("winograd 5x5", (16, 16, 3, 3), {"stride": (2, 1)}),
        ("winograd 2x2", (16, 8, 3, 3), {"groups": 2}),
        ("winograd 2x2", (16, 16, 5, 5), {"padding": (2, 2)}),
        ("winograd 1x4", (16, 16, 7, 7), {"stride": (2, 2), "padding": (3, 3)}),
    ],
)
def test_a_method_that_does_not_fit_is_refused(method, shape, options):
    builder = Builder((1, 16, 9, 9))
    with pytest.raises(ValueError, match=r"method must be|is for kernels of [37]x[37]"):
        builder.conv(builder.input, drawn(0, *shape), method=method, **options)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((16, 3, 3, 3), {"stride": (2, 2)}),
        ((16, 3, 7, 7), {"stride": (2, 1)}),
        ((3, 1, 7, 7), {"stride": (2, 2), "groups": 3}),
    ],
)
def test_a_stem_that_is_none_is_refused(shape, options):
    with pytest.raises(ValueError, match="is for kernels of 7x7"):
        Builder((1, 3, 19, 19)).conv(
            Builder((1, 3, 19, 19)).input, drawn(0, *shape), method="winograd 1x4", **options
        )


def test_a_stem_of_short_rows_is_summed_as_it_is():
    builder = Builder((1, 1, 61, 12))
    y = builder.conv(builder.input, drawn(0, 40, 1, 7, 7), stride=(2, 2), padding=(3, 3))
    assert builder.build([y]).steps[0] == "conv 7x7 1->40/2"


def test_winograd_of_three_channels():
    x, weight = drawn(0, 2, 3, 9, 9), drawn(1, 16, 3, 3, 3)
    builder = Builder(tuple(x.shape))
    y = builder.conv(builder.input, weight, method="winograd 2x2")
    assert error(builder.build([y])(x)[0], F.conv2d(x.double(), weight.double())) < TOLERANCE
