"""stem's kernels in Triton's interpreter against float64."""

import copy
import importlib

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from blnet.kernels import check, launch, reference, stem, testing, use_backend
from blnet.kernels.catalogue import OPS
from helpers.drawing import DTYPES, QUIET, fresh

# "blnet.kernels.stem" as an attribute is the function; these are the modules.
op_module = importlib.import_module("blnet.kernels.stem")
close_module = importlib.import_module("blnet.kernels.stem_close")
convolution_module = importlib.import_module("blnet.kernels.conv3x3")

(OP,) = (op for op in OPS if op.name == "stem")
EXAMPLES = 70  # of each dtype, the same in every run
FRESH = fresh(3)  # of each dtype, others in every run

SHAPES = testing.STEM_SHAPES
BOTH, NEITHER, OF_LITTLE, OF_BIG = SHAPES[:4]
IN_PARTS = SHAPES[7]
SHIFTS = (3, 5, 7, 9)


def inputs(shape, dtype=torch.float32, layout="channels_last", number=0):
    generator = torch.Generator().manual_seed(number)
    return testing.stem_inputs(shape, dtype, layout, "cpu", generator)


def changed(tensors, convert):
    return tuple(t if t is None else convert(t) for t in tensors)


def hold(tensors):
    """Compare with float64 and with eager PyTorch; return the result."""
    with testing.poisoned_outputs():
        out = stem(*tensors)
    eager = reference.stem(*tensors)
    truth = reference.stem(*changed(tensors, torch.Tensor.double))
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
def test_the_output_takes_the_layout_of_x(layout, dtype):
    tensors = inputs(BOTH, dtype, layout)
    out = stem(*tensors)
    assert out.is_contiguous(memory_format=launch.memory_format_of(tensors[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [BOTH, NEITHER, OF_LITTLE, OF_BIG], ids=str)
def test_with_and_without_shifts(shape, dtype):
    tensors = list(inputs(shape, dtype))
    for absent in (*((i,) for i in SHIFTS), SHIFTS):
        hold([None if i in absent else t for i, t in enumerate(tensors)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [BOTH, NEITHER], ids=str)
def test_shifts_in_the_dtype_of_the_weights(shape, dtype):
    hold(changed(inputs(shape, dtype), lambda t: t.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_pixel_there_is_nothing_to_do(dtype):
    shape = testing.StemShape(2, 16, 16, 16, 16, 32, 0, 4, "no rows")
    assert stem(*inputs(shape, dtype)).shape == (2, 32, 0, 2)


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        (torch.bfloat16, BOTH, ["close_stem"]),
        (torch.bfloat16, NEITHER, ["close_stem"]),
        (torch.bfloat16, IN_PARTS, ["convolve", "convolve", "forward", "forward"]),
        (torch.float32, BOTH, ["convolve", "convolve", "forward", "forward"]),
        (torch.float32, OF_BIG, ["convolve", "forward", "forward"]),
        (torch.float32, NEITHER, ["forward", "forward"]),
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

    for name in ("forward", "close_stem", "convolve"):
        monkeypatch.setattr(op_module, name, recorded(name))
    stem(*inputs(shape, dtype))
    assert seen == expected


# Drawn shapes ------------------------------------------------------------------------------------


@st.composite
def shapes(draw):
    # In 16 bits only multiples of 16 run in one kernel.
    aligned = draw(st.integers(0, 2))
    width = st.sampled_from([16, 32, 48] if aligned else [1, 3, 16, 17])
    given = st.one_of(st.just(0), width)
    return testing.StemShape(
        draw(st.integers(1, 2)), draw(given), draw(given), draw(width), draw(width), draw(width),
        draw(st.integers(1, 9)), draw(st.integers(1, 9)), "drawn",
    )  # fmt: skip


DRAWN = {
    "shape": shapes(),
    "layout": st.sampled_from(testing.LAYOUTS),
    "absent": st.sets(st.sampled_from(SHIFTS)),
    "number": st.integers(0, 2**16),
}


def drawn_case(dtype, shape, layout, absent, number):
    tensors = inputs(shape, dtype, layout, number)
    tensors = [None if i in absent else t for i, t in enumerate(tensors)]
    with testing.poisoned_outputs():
        out = stem(*tensors)
    truth = reference.stem(*changed(tensors, torch.Tensor.double))
    # Single elements beat or lose to eager by chance, so only the size of errors is held.
    bound = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert (out.double() - truth).norm() <= bound * max(truth.norm(), truth.numel() ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@seed(20_250_103)
@settings(max_examples=EXAMPLES, **QUIET)
@given(**DRAWN)
def test_drawn_shapes(dtype, shape, layout, absent, number):
    drawn_case(dtype, shape, layout, absent, number)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=FRESH, **QUIET)
@given(**DRAWN)
def test_drawn_shapes_with_a_fresh_seed(dtype, shape, layout, absent, number):
    drawn_case(dtype, shape, layout, absent, number)


# Details -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [BOTH, NEITHER, SHAPES[4], IN_PARTS], ids=str)
def test_64_bit_offsets_give_the_same_bits(shape, dtype, monkeypatch):
    tensors = inputs(shape, dtype)
    narrow = stem(*tensors)
    monkeypatch.setattr(launch, "INT32_LIMIT", 0)
    assert torch.equal(stem(*tensors), narrow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_repeat(dtype):
    tensors = inputs(SHAPES[13], dtype)
    assert torch.equal(stem(*tensors), stem(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_nan_passes_and_stays_in_its_window(index, dtype):
    tensors = inputs(BOTH, dtype)
    tensors[index][1, 3, 2, 7] = float("nan")  # row 2 is read by row 1, column 7 by 3 and 4
    out = stem(*tensors)
    assert out[1, :, 1, 3:5].isnan().all()
    assert out.isnan().sum() == 2 * BOTH.c_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lanes_past_the_last_channel_do_not_turn_infinity_into_nan(dtype):
    shape = testing.StemShape(1, 48, 48, 48, 48, 48, 9, 9, "three quarters of each tile")
    for index in (0, 1):
        tensors = changed(inputs(shape, dtype), torch.Tensor.abs)
        tensors[index][0, 3, 4, 4] = float("inf")
        out = stem(*tensors)
        assert not out.isnan().any()
        assert out[0, :, 2, 2].isinf().all()
        assert out.isinf().sum() == 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_and_matrices_as_weights(dtype):
    tensors = list(inputs(BOTH, dtype))
    expected = stem(*tensors)
    for index in (2, 4):
        tensors[index] = tensors[index].flatten(1).mT.contiguous().mT
    for index in (6, 8):
        tensors[index] = tensors[index].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for index in SHIFTS:
        tensors[index] = tensors[index].repeat_interleave(2)[::2]
    assert not any(t.is_contiguous() for t in tensors[2:])
    assert torch.equal(stem(*tensors), expected)


# Registration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", [BOTH, NEITHER, IN_PARTS], ids=str)
def test_opcheck(shape, layout, dtype):
    tensors = list(inputs(shape, dtype, layout))
    for index in (2, 4):
        tensors[index] = tensors[index].flatten(1)
    # Gradients are refused, which opcheck's autograd tests would count as a failure.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.blnet.stem.default, tuple(tensors), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in (BOTH, NEITHER, OF_LITTLE):
        tensors = inputs(shape, dtype)
        assert torch.equal(compiled(*tensors), stem(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dynamic_graph_serves_other_sizes(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, h, w in ((2, 12, 12), (3, 7, 9), (5, 11, 4)):
        tensors = inputs(testing.StemShape(n, 32, 16, 16, 32, 32, h, w, "drawn"), dtype)
        assert torch.equal(compiled(*tensors), stem(*tensors))


class End(torch.nn.Module):
    def forward(self, *tensors):
        return stem(*tensors)


@pytest.mark.parametrize("shape", [BOTH, NEITHER], ids=str)
def test_export_and_deepcopy_keep_the_op(shape):
    tensors = inputs(shape, torch.bfloat16)
    program = torch.export.export(copy.deepcopy(End()), tensors)
    assert "blnet.stem" in str(program.graph)
    assert torch.equal(copy.deepcopy(program.module())(*tensors), stem(*tensors))


@pytest.mark.parametrize("shape", [BOTH, NEITHER, OF_LITTLE, OF_BIG, IN_PARTS], ids=str)
def test_autocast_casts_as_conv2d_does(shape):
    tensors = inputs(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stem(*tensors)
        with use_backend("torch"):
            eager = stem(*tensors)
    assert out.dtype == eager.dtype == torch.bfloat16
    wide = list(changed(tensors, torch.Tensor.double))
    convolved = (0,) if shape.c_x else ()  # a map that is only added is not rounded
    for index in (*convolved, 1, 2, 4, 6, 8):
        wide[index] = None if wide[index] is None else wide[index].bfloat16().double()
    truth = reference.stem(*wide)
    testing.assert_close(out, truth, dtype=torch.bfloat16)
    testing.assert_no_worse(out, eager, truth)


def test_autocast_of_a_given_map_in_parts():
    tensors = inputs(testing.StemShape(1, 0, 0, 70, 66, 5, 8, 8, "in parts"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stem(*tensors).dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_is_refused(dtype):
    tensors = inputs(BOTH, dtype)
    tensors[2].requires_grad_()
    out = stem(*tensors)
    message = r"^blnet::stem is for inference and has no gradient; call it under torch\.no_grad\(\)"
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()
    with use_backend("torch"):
        stem(*tensors).sum().backward()
    assert tensors[2].grad.any()
    with torch.no_grad():
        assert not stem(*tensors).requires_grad


@pytest.mark.parametrize("shape", [BOTH, NEITHER, OF_LITTLE, OF_BIG], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flop_count_does_not_depend_on_the_backend(dtype, shape):
    tensors = inputs(shape, dtype)
    counts = []
    for backend in ("interpret", "torch"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            stem(*tensors)
        counts.append(counter.get_total_flops())
    n, c_out, h, w = shape.out
    products = 9 * shape.c_x * shape.c + 9 * shape.c_little * shape.narrow
    products += shape.narrow * shape.c + shape.c * c_out
    assert counts == [2 * n * h * w * products] * 2


def test_float64_runs_on_torch_unless_forced():
    wide = changed(inputs(BOTH), torch.Tensor.double)
    assert torch.equal(stem(*wide), reference.stem(*wide))
    with (
        use_backend("interpret"),
        pytest.raises(ValueError, match=r"'interpret' cannot run torch\.float64.*float32"),
    ):
        stem(*wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("narrow", "c", "which"), [(129, 8, "little"), (8, 129, "big")])
def test_a_width_that_does_not_fit_is_refused(narrow, c, which, dtype):
    tensors = inputs(testing.StemShape(1, 0, 0, narrow, c, 8, 4, 4, "too wide"), dtype)
    message = rf"stem: the {which} branch's width must be from 1 to 128 .*, got 129; run .*'torch'"
    with pytest.raises(ValueError, match=message):
        stem(*tensors)
    with use_backend("torch"):
        stem(*tensors)


# The tests above are only worth something if broken code fails them. ------------------------------


def break_plan(monkeypatch, module, name, constant, wrong):
    plan = getattr(module, name)

    def broken(problem, choice=None, **flags):
        good = plan(problem, choice, **flags)
        assert good.constants[constant] != wrong
        return launch.Launch(good.grid, good.integers, {**good.constants, constant: wrong})

    monkeypatch.setattr(module, name, broken)


BROKEN = [
    (BOTH, "CONV_BIG", False),
    (BOTH, "CONV_LITTLE", False),
    (BOTH, "HAS_BIG_SHIFT", False),
    (BOTH, "HAS_LITTLE_SHIFT", False),
    (BOTH, "HAS_EXPAND_SHIFT", False),
    (BOTH, "HAS_FUSION_SHIFT", False),
    (SHAPES[5], "TILES_X", 1),
    (SHAPES[5], "TILES_LITTLE", 1),
]


@pytest.mark.parametrize(("shape", "constant", "wrong"), BROKEN, ids=str)
def test_a_broken_plan_is_caught(shape, constant, wrong, monkeypatch):
    break_plan(monkeypatch, close_module, "stem_launch", constant, wrong)
    with pytest.raises(AssertionError, match=r"out: .* elements are off|out: relative error"):
        hold(inputs(shape, torch.bfloat16))


def test_too_few_programs_are_caught(monkeypatch):
    plan = close_module.stem_launch

    def broken(problem, choice=None, **flags):
        good = plan(problem, choice, **flags)
        return launch.Launch((good.grid[0] - 1,), good.integers, good.constants)

    monkeypatch.setattr(close_module, "stem_launch", broken)
    with pytest.raises(AssertionError, match=r"out: .* elements are off|out: relative error"):
        hold(inputs(BOTH, torch.bfloat16))


@pytest.mark.parametrize(("constant", "wrong"), [("STRIDE", 1), ("HAS_SHIFT", False)])
def test_a_broken_plan_of_the_convolution_is_caught(constant, wrong, monkeypatch):
    break_plan(monkeypatch, convolution_module, "convolution_launch", constant, wrong)
    with pytest.raises(AssertionError, match=r"out: .* elements are off"):
        hold(inputs(BOTH))
