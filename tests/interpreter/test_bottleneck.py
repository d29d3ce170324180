"""bottleneck's kernels in Triton's interpreter against float64."""

import copy
import importlib

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from blnet.kernels import bottleneck, check, launch, reference, testing, use_backend
from blnet.kernels.catalogue import OPS
from blnet.kernels.triton_shim import tl, triton
from helpers.drawing import DTYPES, QUIET, fresh

# "blnet.kernels.bottleneck" as an attribute is the function; these are the modules.
op_module = importlib.import_module("blnet.kernels.bottleneck")
close_module = importlib.import_module("blnet.kernels.bottleneck_close")
convolution_module = importlib.import_module("blnet.kernels.conv3x3")

(OP,) = (op for op in OPS if op.name == "bottleneck")
EXAMPLES = 70  # of each dtype, the same in every run
FRESH = fresh(3)  # of each dtype, others in every run

SHAPES = testing.BOTTLENECK_SHAPES
CHAINED, PROJECTED, ODD = SHAPES[:3]
WIDE, UNALIGNED = SHAPES[8], SHAPES[9]


def inputs(shape, dtype=torch.float32, layout="channels_last", number=0):
    generator = torch.Generator().manual_seed(number)
    return testing.bottleneck_inputs(shape, dtype, layout, "cpu", generator)


def run(tensors, relu=True, function=bottleneck):
    return function(*tensors[:8], relu, *tensors[8:])


def changed(tensors, convert):
    return tuple(t if t is None else convert(t) for t in tensors)


def hold(tensors, relu=True):
    """Compare with float64 and with eager PyTorch; return the result."""
    with testing.poisoned_outputs():
        out = run(tensors, relu)
    eager = run(tensors, relu, reference.bottleneck)
    truth = run(changed(tensors, torch.Tensor.double), relu, reference.bottleneck)
    check.judge(out, eager, truth, out.dtype, "out")
    assert out.dtype == eager.dtype
    return out


# All layouts of the first two; what a layout changes does not depend on the sizes.
CASES = [
    (shape, layout)
    for number, shape in enumerate(SHAPES)
    for layout in testing.LAYOUTS[: 4 if number < 2 else 1]
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_matrix(shape, layout, dtype):
    row = check.check_row(OP, dtype, layout, shape, "cpu")
    assert row.failure == ""
    assert dtype is torch.float32 or row.error <= testing.NO_WORSE * row.eager_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", [CHAINED, WIDE], ids=str)
def test_the_output_takes_the_layout_of_x(shape, layout, dtype):
    tensors = inputs(shape, dtype, layout)
    out = run(tensors)
    assert out.is_contiguous(memory_format=launch.memory_format_of(tensors[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [CHAINED, PROJECTED, UNALIGNED], ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_with_and_without_relu_and_shifts(relu, shape, dtype):
    tensors = list(inputs(shape, dtype))
    hold(tensors, relu)
    for index in (2, 4, 6, 9):
        without = list(tensors)
        without[index] = None
        hold(without, relu)
    hold([None if i in (2, 4, 6, 9) else t for i, t in enumerate(tensors)], relu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [CHAINED, ODD, PROJECTED], ids=str)
def test_shifts_in_the_dtype_of_the_weights(shape, dtype):
    hold(changed(inputs(shape, dtype), lambda t: t.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shortcut_is_added_even_where_x_could_be(dtype):
    tensors = list(inputs(CHAINED, dtype))
    plain = run(tensors)
    tensors[7] = tensors[0].clone()
    assert torch.equal(hold(tensors), plain)
    tensors[7] = tensors[0] + 1
    assert not torch.equal(hold(tensors), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_pixel_there_is_nothing_to_do(dtype):
    shape = testing.BottleneckShape(2, 16, 16, 16, 0, 4, 32, 2, 2, "no rows")
    assert run(inputs(shape, dtype)).shape == (2, 32, 0, 4)
    assert run((*inputs(shape, dtype)[:8], None, None, None)).shape == (2, 16, 0, 4)


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        (torch.bfloat16, CHAINED, ["forward", "close"]),
        (torch.bfloat16, PROJECTED, ["forward", "close"]),
        (torch.bfloat16, WIDE, ["forward", "close", "forward"]),
        (torch.bfloat16, UNALIGNED, ["forward", "close", "forward"]),
        (torch.float32, CHAINED, ["forward", "convolve", "forward", "forward"]),
        (torch.float32, PROJECTED, ["forward", "convolve", "forward"]),
    ],
)
def test_how_many_launches(dtype, shape, expected, monkeypatch):
    seen = []

    def recorded(name):
        function = getattr(op_module, name)

        def record(*arguments):
            seen.append(name)
            return function(*arguments)

        return record

    for name in ("forward", "close", "convolve"):
        monkeypatch.setattr(op_module, name, recorded(name))
    run(inputs(shape, dtype))
    assert seen == expected


# Drawn shapes ------------------------------------------------------------------------------------


@st.composite
def shapes(draw):
    # In 16 bits only multiples of 16 chain.
    aligned = draw(st.booleans())
    width = st.sampled_from([16, 32, 48] if aligned else [1, 3, 16, 17])
    h, w = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    k, i = draw(width), draw(width)
    c = k if draw(st.booleans()) else draw(width)
    c_out = draw(st.one_of(st.just(0), width))
    h_big = w_big = 0
    if c_out and draw(st.integers(0, 3)):
        same = draw(st.integers(0, 3)) == 0
        h_big, w_big = (size if same else draw(st.integers(1, 7)) for size in (h, w))
    return testing.BottleneckShape(draw(st.integers(1, 2)), k, i, c, h, w, c_out, h_big, w_big, "")


DRAWN = {
    "shape": shapes(),
    "layout": st.sampled_from(testing.LAYOUTS),
    "relu": st.booleans(),
    "absent": st.sets(st.sampled_from([2, 4, 6, 9])),
    "number": st.integers(0, 2**16),
}


def drawn_case(dtype, shape, layout, relu, absent, number):
    tensors = inputs(shape, dtype, layout, number)
    tensors = [None if i in absent else t for i, t in enumerate(tensors)]
    with testing.poisoned_outputs():
        out = run(tensors, relu)
    truth = run(changed(tensors, torch.Tensor.double), relu, reference.bottleneck)
    # Single elements beat or lose to eager by chance, so only the size of errors is held.
    bound = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert (out.double() - truth).norm() <= bound * max(truth.norm(), truth.numel() ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@seed(20_250_102)
@settings(max_examples=EXAMPLES, **QUIET)
@given(**DRAWN)
def test_drawn_shapes(dtype, shape, layout, relu, absent, number):
    drawn_case(dtype, shape, layout, relu, absent, number)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=FRESH, **QUIET)
@given(**DRAWN)
def test_drawn_shapes_with_a_fresh_seed(dtype, shape, layout, relu, absent, number):
    drawn_case(dtype, shape, layout, relu, absent, number)


# Details -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [CHAINED, PROJECTED, ODD, UNALIGNED], ids=str)
def test_64_bit_offsets_give_the_same_bits(shape, dtype, monkeypatch):
    tensors = inputs(shape, dtype)
    narrow = run(tensors)
    monkeypatch.setattr(launch, "INT32_LIMIT", 0)
    assert torch.equal(run(tensors), narrow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_repeat(dtype):
    tensors = inputs(SHAPES[16], dtype)
    assert torch.equal(run(tensors), run(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_passes_and_stays_in_its_window(dtype):
    tensors = inputs(CHAINED, dtype)
    tensors[0][1, 3, 2, 7] = float("nan")
    out = run(tensors)
    assert out[1, :, 1:4, 6:].isnan().all()
    assert out.isnan().sum() == CHAINED.c_out * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lanes_past_the_last_channel_do_not_turn_infinity_into_nan(dtype):
    shape = testing.BottleneckShape(1, 48, 48, 48, 5, 5, 48, 0, 0, "three quarters of each tile")
    tensors = changed(inputs(shape, dtype), torch.Tensor.abs)
    tensors[0][0, 3, 2, 2] = float("inf")
    out = run(tensors)
    assert not out.isnan().any()
    assert out[..., 1:4, 1:4].isinf().all()
    assert out.isinf().sum() == 48 * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_and_matrices_as_weights(dtype):
    tensors = list(inputs(CHAINED, dtype))
    expected = run(tensors)
    for index in (1, 5, 8):
        tensors[index] = tensors[index].flatten(1).mT.contiguous().mT
    tensors[3] = tensors[3].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for index in (2, 4, 6, 9):
        tensors[index] = tensors[index].repeat_interleave(2)[::2]
    assert not any(tensors[index].is_contiguous() for index in (1, 2, 3, 4, 5, 6, 8, 9))
    assert torch.equal(run(tensors), expected)


# Registration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", [CHAINED, PROJECTED, UNALIGNED], ids=str)
def test_opcheck(shape, layout, dtype):
    x, weight1, shift1, weight2, shift2, weight3, *rest = inputs(shape, dtype, layout)
    shift3, shortcut, expand, shift_expand, big = rest
    expand = None if expand is None else expand.flatten(1)
    arguments = (x, weight1.flatten(1), shift1, weight2, shift2, weight3.flatten(1), shift3)
    arguments += (x if shortcut is None else shortcut, True, expand, shift_expand, big)
    # Gradients are refused, which opcheck's autograd tests would count as a failure.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.blnet.bottleneck.default, arguments, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(bottleneck, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in (CHAINED, PROJECTED, UNALIGNED):
        tensors = inputs(shape, dtype)
        assert torch.equal(run(tensors, function=compiled), run(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dynamic_graph_serves_other_sizes(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(bottleneck, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, h, w in ((2, 8, 8), (3, 7, 9), (5, 12, 4)):
        shape = testing.BottleneckShape(n, 32, 16, 32, h, w, 64, (h + 1) // 2, (w + 1) // 2, "")
        tensors = inputs(shape, dtype)
        assert torch.equal(run(tensors, function=compiled), run(tensors))


class Block(torch.nn.Module):
    def forward(self, *tensors):
        return run(tensors)


@pytest.mark.parametrize("shape", [CHAINED, PROJECTED], ids=str)
def test_export_and_deepcopy_keep_the_op(shape):
    tensors = inputs(shape, torch.bfloat16)
    program = torch.export.export(copy.deepcopy(Block()), tensors)
    assert "blnet.bottleneck" in str(program.graph)
    assert torch.equal(copy.deepcopy(program.module())(*tensors), run(tensors))


@pytest.mark.parametrize("shape", [CHAINED, PROJECTED, WIDE], ids=str)
def test_autocast_casts_as_conv2d_does(shape):
    tensors = inputs(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(tensors)
        with use_backend("torch"):
            eager = run(tensors)
        assert out.dtype == eager.dtype == torch.float32  # big's or the shortcut's, as in torch.add
        if shape.big is not None:
            assert run((*tensors[:-1], tensors[-1].bfloat16())).dtype is torch.bfloat16
            assert run((*tensors[:-1], None)).dtype is torch.bfloat16
    wide = list(changed(tensors, torch.Tensor.double))
    wide[7] = wide[0] if wide[7] is None else wide[7]  # added without rounding
    for index in (0, 1, 3, 5, 8):
        wide[index] = None if wide[index] is None else wide[index].bfloat16().double()
    truth = run(wide, function=reference.bottleneck)
    testing.assert_close(out, truth, dtype=torch.bfloat16)
    testing.assert_no_worse(out, eager, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_is_refused(dtype):
    tensors = inputs(CHAINED, dtype)
    tensors[1].requires_grad_()
    out = run(tensors)
    message = r"^blnet::bottleneck is for inference and has no gradient; call it under torch\.no_"
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()
    with use_backend("torch"):
        run(tensors).sum().backward()
    assert tensors[1].grad.any()
    with torch.no_grad():
        assert not run(tensors).requires_grad


@pytest.mark.parametrize("shape", [CHAINED, PROJECTED, WIDE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flop_count_does_not_depend_on_the_backend(dtype, shape):
    tensors = inputs(shape, dtype)
    counts = []
    for backend in ("interpret", "torch"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            run(tensors)
        counts.append(counter.get_total_flops())
    i, c = shape.i, shape.c
    products = shape.k * i + 9 * i * i + i * c + c * shape.c_out
    assert counts == [2 * shape.n * shape.h * shape.w * products] * 2


def test_float64_runs_on_torch_unless_forced():
    wide = changed(inputs(CHAINED), torch.Tensor.double)
    assert torch.equal(run(wide), run(wide, function=reference.bottleneck))
    with (
        use_backend("interpret"),
        pytest.raises(ValueError, match=r"'interpret' cannot run torch\.float64.*float32"),
    ):
        run(wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_inner_width_that_does_not_fit_is_refused(dtype):
    shape = testing.BottleneckShape(1, 8, 129, 8, 2, 2, 0, 0, 0, "too wide")
    message = r"bottleneck: the inner width must be from 1 to 128 .*, got 129; run its .*'torch'"
    with pytest.raises(ValueError, match=message):
        run(inputs(shape, dtype))
    with use_backend("torch"):
        run(inputs(shape, dtype))


# The tests above are only worth something if broken code fails them. ------------------------------


def break_plan(monkeypatch, module, name, **wrong):
    plan = getattr(module, name)

    def broken(problem, choice=None, **flags):
        good = plan(problem, choice, **flags)
        constants = dict(good.constants)
        for key, value in wrong.items():
            assert constants[key] != value
            constants[key] = value
        return launch.Launch(good.grid, good.integers, constants)

    monkeypatch.setattr(module, name, broken)


BROKEN = [
    (CHAINED, "RELU", False),
    (CHAINED, "HAS_BIG", False),
    (CHAINED, "HAS_SHIFT2", False),
    (CHAINED, "HAS_SHIFT3", False),
    (CHAINED, "HAS_SHIFT_EXPAND", False),
    (CHAINED, "CHAIN", False),
    (CHAINED, "RATIO_W", 1),
    (CHAINED, "SAME", True),
    (SHAPES[12], "TILES_K", 1),
]


@pytest.mark.parametrize(("shape", "constant", "wrong"), BROKEN, ids=str)
def test_a_broken_plan_is_caught(shape, constant, wrong, monkeypatch):
    break_plan(monkeypatch, close_module, "close_launch", **{constant: wrong})
    with pytest.raises(AssertionError, match=r"out: .* elements are off|out: relative error"):
        hold(inputs(shape, torch.bfloat16))


@pytest.mark.parametrize(("constant", "wrong"), [("STRIDE", 2), ("RELU", False)])
def test_a_broken_plan_of_the_convolution_is_caught(constant, wrong, monkeypatch):
    break_plan(monkeypatch, convolution_module, "convolution_launch", **{constant: wrong})
    with pytest.raises(AssertionError, match=r"out: .* elements are off"):
        hold(inputs(CHAINED))


@triton.jit
def _without_borders(
    p_x, p_weight, o_row, m_row, o_c, m_c, channels_in, height, width, height_in, width_in,
    STRIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    TILES_K: tl.constexpr,
):  # fmt: skip
    # The map taken for one long line: a pixel at the end of a line sees the first of the next.
    one_line = width_in * height
    return convolution_module.conv3x3(
        p_x, p_weight, o_row, m_row, o_c, m_c, channels_in, 1, one_line, 1, one_line,
        STRIDE, BLOCK_ROWS, BLOCK_C, BLOCK_K, TILES_K,
    )  # fmt: skip


def test_a_broken_kernel_is_caught(monkeypatch):
    monkeypatch.setattr(close_module, "conv3x3", _without_borders)
    with pytest.raises(AssertionError, match=r"out: relative error 0\.\d"):
        hold(inputs(CHAINED, torch.bfloat16))
