"""expand_merge's kernels, forward and backward, in Triton's interpreter against float64."""

import importlib

import pytest
import torch
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st

from blnet.kernels import (
    check,
    expand_merge,
    expand_merge_train,
    launch,
    reference,
    testing,
)
from blnet.kernels.catalogue import OPS
from helpers.drawing import DTYPES, QUIET, fresh
from helpers.expand_merge import (
    ALONE,
    DOUBLING,
    NAMES,
    RESIDUAL,
    SMALL,
    doubled,
    inputs,
    of_reference,
    run,
)

# "blnet.kernels.expand_merge" as an attribute is the function; these are the modules.
forward_module = importlib.import_module("blnet.kernels.expand_merge")
reduce_module = importlib.import_module("blnet.kernels.expand_merge_reduce")
input_module = importlib.import_module("blnet.kernels.expand_merge_input")

INFERENCE, TRAINING = OPS[2], OPS[3]
FORMS = {op.name: op for op in (INFERENCE, TRAINING)}
EXAMPLES = 70  # of each dtype and op, the same in every run
FRESH = fresh(3)  # of each dtype and op, others in every run


def hold(function, tensors, grad, dtype=torch.float32, **options):
    """Compare with float64 and with eager PyTorch; return the results."""
    plain = of_reference(function)
    with testing.poisoned_outputs():
        ours = run(function, tensors, grad, **options)
    eager = run(plain, tensors, grad, **options)
    truth = run(plain, doubled(tensors), grad.double(), **options)
    for name, expected in truth.items():
        check.judge(ours[name], eager[name], expected, dtype, name)
        assert ours[name].dtype == eager[name].dtype
    return ours


# All layouts of the first few; what a layout changes does not depend on the sizes.
CASES = [
    (shape, layout)
    for number, shape in enumerate(testing.EXPAND_SHAPES)
    for layout in testing.LAYOUTS[: 4 if number < 2 else 1]
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matrix(form, shape, layout, dtype):
    row = check.check_row(FORMS[form], dtype, layout, shape, "cpu")
    assert row.failure == ""


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
def test_the_output_and_dx_take_the_layout_of_x(function, layout):
    tensors, grad = inputs(SMALL, layout=layout)
    results = run(function, tensors, grad)
    for name in ("out", "dx"):
        expected = launch.memory_format_of(tensors[0])
        assert results[name].is_contiguous(memory_format=expected)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [DOUBLING, RESIDUAL, ALONE, SMALL], ids=str)
@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
def test_with_and_without_relu_and_vectors(function, shape, relu):
    (x, weight, scale, shift, big), grad = inputs(shape)
    for vectors in ((scale, shift), (None, shift), (scale, None), (None, None)):
        hold(function, (x, weight, *vectors, big), grad, relu=relu)


# Means far from zero -----------------------------------------------------------------------------


def statistics_of(function, tensors, **options):
    mean, variance = torch.zeros(tensors[1].shape[0]), torch.ones(tensors[1].shape[0])
    x, weight, gamma, beta, big = tensors
    if x.dtype is torch.float64:
        mean, variance = mean.double(), variance.double()
    function(x, weight, gamma, beta, mean, variance, 1.0, big=big, **options)
    return mean, variance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0, 5.0, 30.0])
def test_means_far_from_zero(offset, dtype):
    shape = testing.ExpandShape(4, 32, 64, 12, 12, 6, 6, "large enough for errors to average")
    tensors, grad = inputs(shape, dtype, offset=offset)
    hold(expand_merge_train, tensors, grad, dtype)
    ours = statistics_of(expand_merge_train, tensors)
    eager = statistics_of(reference.expand_merge_train, tensors)
    truth = statistics_of(reference.expand_merge_train, doubled(tensors))
    for got, plain, expected in zip(ours, eager, truth, strict=True):
        assert testing.relative_error(got, expected) < 1e-4  # in 16 bits too
        testing.assert_no_worse(got, plain, expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_gradient_is_no_worse_than_eager_where_g_has_a_large_mean(dtype):
    # BN takes the mean of g off: what is left must not carry the rounding of what was there.
    shape = testing.ExpandShape(4, 32, 64, 12, 12, 6, 6, "upstream gradients far from zero")
    tensors, grad = inputs(shape, dtype)
    hold(expand_merge_train, tensors, (grad.float() + 10).to(dtype), dtype, relu=False)


@pytest.mark.parametrize(("deviation", "size"), [(30.0, 0.01), (100.0, 0.1), (1000.0, 1.0)])
def test_small_corrections_survive_float16(deviation, size):
    # BN's correction for the variance is a matrix of size / deviation^2: below float16's numbers.
    shape = testing.ExpandShape(4, 16, 32, 9, 9, 0, 0, "maps far wider than their gradient")
    (x, weight, gamma, beta, big), grad = inputs(shape, torch.float16, offset=0.0)
    tensors = ((x.float() * deviation).half(), weight, gamma, beta, big)
    hold(expand_merge_train, tensors, (grad.float() * size).half(), torch.float16, relu=False)


@pytest.mark.parametrize("number", range(5))
def test_inputs_that_all_but_cancel_lose_the_digits_that_the_docs_say(number):
    # y = x1 - x2, a hundredth as wide as either: its variance is what is left of float32 sums.
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 2, 16, 16, generator=generator)
    x[:, 1] = x[:, 0] + 0.01 * torch.randn(4, 16, 16, generator=generator)
    weight = torch.tensor([[1.0, -1.0]])
    out = expand_merge_train(x, weight, relu=False)
    truth = reference.expand_merge_train(x.double(), weight.double(), relu=False)
    assert testing.relative_error(out, truth) < 1e-3


# Drawn shapes ------------------------------------------------------------------------------------


@st.composite
def shapes(draw):
    with_big = draw(st.sampled_from([True, True, True, False]))
    h_big, w_big = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    h, w = (draw(st.integers(1, min(2 * size + 2, 6))) for size in (h_big, w_big))
    k, c = (draw(st.sampled_from([1, 2, 3, 5, 16, 17])) for _ in range(2))
    if not with_big:
        h_big = w_big = 0
    elif draw(st.integers(0, 3)) == 0:
        h_big, w_big = h, w
    return testing.ExpandShape(draw(st.integers(0, 2)), k, c, h, w, h_big, w_big, "drawn")


DRAWN = {
    "shape": shapes(),
    "layout": st.sampled_from(testing.LAYOUTS),
    "relu": st.booleans(),
    "number": st.integers(0, 2**16),
}
FEW = 16  # pixels: over fewer BN's gradients are what is left of numbers that cancel


def drawn_case(dtype, shape, function, layout, relu, number):
    pixels = shape.n * shape.h * shape.w
    assume(function is expand_merge or pixels == 0 or pixels >= FEW)
    tensors, grad = inputs(shape, dtype, layout, number)
    results = run(function, tensors, grad, relu=relu)
    truth = run(of_reference(function), doubled(tensors), grad.double(), relu=relu)
    for name, expected in truth.items():
        # Single elements beat or lose to eager by chance, so only the size of errors is held.
        bound = 1e-5 if dtype is torch.float32 else 5e-2
        error = (results[name].double() - expected).norm()
        assert error <= bound * max(expected.norm(), gradient_scale(name, tensors, grad)), name


def gradient_scale(name, tensors, grad):
    """Return the size of what adds up to a gradient: sums of a few terms may all but cancel."""
    x, weight = tensors[0].double(), tensors[1].double()
    g = grad.double().norm()
    return {
        "out": 1e-3,
        "dx": g * weight.norm(),
        "dweight": g * x.norm(),
        "dscale": g * x.norm() * weight.norm(),
        "dshift": g * grad.numel() ** 0.5,
        "dbig": g,
    }[name]


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@seed(20_250_101)
@settings(max_examples=EXAMPLES, **QUIET)
@given(**DRAWN)
def test_drawn_shapes(dtype, function, shape, layout, relu, number):
    drawn_case(dtype, shape, function, layout, relu, number)


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=FRESH, **QUIET)
@given(**DRAWN)
def test_drawn_shapes_with_a_fresh_seed(dtype, function, shape, layout, relu, number):
    drawn_case(dtype, shape, function, layout, relu, number)


# Details -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
@pytest.mark.parametrize("shape", [DOUBLING, RESIDUAL, SMALL, ALONE], ids=str)
def test_64_bit_offsets_give_the_same_bits(shape, function, monkeypatch):
    tensors, grad = inputs(shape)
    narrow = run(function, tensors, grad)
    monkeypatch.setattr(launch, "INT32_LIMIT", 0)
    wide = run(function, tensors, grad)
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
def test_bits_repeat(function):
    tensors, grad = inputs(testing.EXPAND_SHAPES[7], torch.bfloat16)
    first, second = (run(function, tensors, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
@pytest.mark.parametrize("shape", [DOUBLING, RESIDUAL, SMALL], ids=str)
@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(wanted, shape, function):
    tensors, grad = inputs(shape)
    expected = run(of_reference(function), doubled(tensors), grad.double())[f"d{wanted}"]
    leaves = dict(zip(NAMES, (t.clone() for t in tensors), strict=True))
    leaves[wanted].requires_grad_()
    with testing.poisoned_outputs():
        x, weight, scale, shift, big = leaves.values()
        function(x, weight, scale, shift, big=big).backward(grad)
    testing.assert_close(leaves[wanted].grad, expected)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_without_relu_a_residual_passes_its_gradient_on_safely():
    (x, weight, scale, shift, big), grad = inputs(RESIDUAL)
    big.requires_grad_()
    kept = grad.clone()
    expand_merge(x, weight, scale, shift, big, relu=False).backward(grad)
    assert torch.equal(big.grad, kept)
    big.grad.mul_(0)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
def test_finite_differences(function):
    tensors, grad = inputs(SMALL)
    # Far from the corners of relu: without it.
    gradients = run(function, tensors, grad, relu=False)

    def loss():
        x, weight, scale, shift, big = tensors
        out = function(x, weight, scale, shift, big=big, relu=False)
        return (out.double() * grad.double()).sum()

    step = 2.0**-6
    for name, tensor in zip(NAMES, tensors, strict=True):
        for index in {0, tensor.numel() // 2, tensor.numel() - 1}:
            place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), tensor.shape))
            values = []
            for sign in (step, -step):
                tensor[place] += sign
                values.append(loss())
                tensor[place] -= sign
            measured = (values[0] - values[1]) / (2 * step)
            got = gradients[f"d{name}"][place].double()
            torch.testing.assert_close(got, measured, rtol=2e-2, atol=1e-3)


def test_nan_passes_and_stays_in_its_pixel_in_inference():
    (x, weight, scale, shift, big), _ = inputs(DOUBLING)
    x[1, 3, 2, 2] = float("nan")
    out = expand_merge(x, weight, scale, shift, big)
    assert out[1, :, 2, 2].isnan().all()
    assert out.isnan().sum() == DOUBLING.c


# The tests above are only worth something if broken code fails them. ------------------------------


@pytest.mark.parametrize("constant", ["RELU", "HAS_BIG", "HAS_SCALE", "HAS_SHIFT", "SAME"])
def test_a_broken_forward_plan_is_caught(constant, monkeypatch):
    plan = forward_module.forward_launch

    def broken(problem, choice=None, **flags):
        good = plan(problem, choice, **flags)
        constants = {**good.constants, constant: not good.constants[constant]}
        return launch.Launch(good.grid, good.integers, constants)

    tensors, grad = inputs(DOUBLING)
    monkeypatch.setattr(forward_module, "forward_launch", broken)
    with pytest.raises(AssertionError, match=r"out: .* elements are off"):
        hold(expand_merge, tensors, grad)


@pytest.mark.parametrize(
    ("name", "constant", "wrong"),
    [("reduce_launch", "RELU", False), ("reduce_launch", "RATIO_W", 1),
     ("input_launch", "RELU", False), ("input_launch", "STATISTICS", False)],
)  # fmt: skip
def test_a_broken_backward_plan_is_caught(name, constant, wrong, monkeypatch):
    module = reduce_module if name == "reduce_launch" else input_module
    plan = getattr(module, name)

    def broken(problem, choice=None, **flags):
        good = plan(problem, choice, **flags)
        return launch.Launch(good.grid, good.integers, {**good.constants, constant: wrong})

    tensors, grad = inputs(DOUBLING)
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError, match=r"d\w+: .* elements are off"):
        hold(expand_merge_train, tensors, grad)
