"""expand_merge's kernels, forward and backward, in Triton's interpreter against float64."""

import copy
import importlib
import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from blnet.kernels import (
    check,
    expand_merge,
    expand_merge_train,
    launch,
    reference,
    testing,
    use_backend,
)
from blnet.kernels.catalogue import OPS

# "blnet.kernels.expand_merge" as an attribute is the function; these are the modules.
forward_module = importlib.import_module("blnet.kernels.expand_merge")
reduce_module = importlib.import_module("blnet.kernels.expand_merge_reduce")
input_module = importlib.import_module("blnet.kernels.expand_merge_input")

INFERENCE, TRAINING = OPS[2], OPS[3]
FORMS = {op.name: op for op in (INFERENCE, TRAINING)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEEP = int(os.environ.get("BLNET_DEEP", "0"))  # how many fresh examples to draw in all; 0 for few
EXAMPLES = 70  # of each dtype and op, the same in every run
FRESH = DEEP // len(DTYPES) or 3  # of each dtype and op, others in every run
NAMES = ("x", "weight", "scale", "shift", "big")

SMALL = testing.ExpandShape(2, 5, 7, 6, 7, 3, 4, "small, odd, several windows")
DOUBLING = testing.EXPAND_SHAPES[0]
RESIDUAL = testing.EXPAND_SHAPES[2]
ALONE = testing.EXPAND_SHAPES[3]


def inputs(shape, dtype=torch.float32, layout="channels_last", number=0, offset=1.0):
    generator = torch.Generator().manual_seed(number)
    tensors = testing.expand_merge_inputs(shape, dtype, layout, "cpu", generator, offset)
    return tensors, testing.draw(shape.out, dtype, "contiguous", "cpu", generator)


def run(function, tensors, grad, **options):
    """Return the output and the gradients of the tensors, and the running statistics if any."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    x, weight, scale, shift, big = leaves
    out = function(x, weight, scale, shift, big=big, **options)
    wanted = [leaf for leaf in leaves if leaf is not None]
    results = {"out": out.detach()}
    grads = torch.autograd.grad(out, wanted, grad.to(out.dtype))
    names = [name for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None]
    return results | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def doubled(tensors):
    return [t if t is None else t.double() for t in tensors]


def of_reference(function):
    return {
        expand_merge: reference.expand_merge,
        expand_merge_train: reference.expand_merge_train,
    }[function]


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
QUIET = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
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


# BatchNorm's options -----------------------------------------------------------------------------


def norm_of(shape, **options):
    norm = torch.nn.BatchNorm2d(shape.c, **options)
    if norm.affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-2},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "momentum": None},
    ],
    ids=str,
)
def test_options_of_batch_norm(options):
    ours, truth = norm_of(SMALL, **options), None
    truth = copy.deepcopy(ours).double()
    for number in range(3):
        (x, weight, _, _, big), _ = inputs(SMALL, number=number)
        out = expand_merge_train(
            x, weight, ours.weight, ours.bias, ours.running_mean, ours.running_var, ours.momentum,
            ours.eps, big, num_batches_tracked=ours.num_batches_tracked,
        )  # fmt: skip
        y = truth(torch.conv2d(x.double(), weight.double()))
        testing.assert_close(out, reference.merge(big.double(), y))
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer.double(), truth.get_buffer(name).double())


def test_an_empty_batch_leaves_the_running_statistics_alone():
    (x, weight, gamma, beta, big), _ = inputs(testing.EXPAND_SHAPES[-1])
    mean, variance = torch.randn(16), torch.rand(16)
    before = mean.clone(), variance.clone()
    out = expand_merge_train(x, weight, gamma, beta, mean, variance, 0.1, big=big)
    assert out.shape == testing.EXPAND_SHAPES[-1].out
    assert torch.equal(mean, before[0])
    assert torch.equal(variance, before[1])


def test_one_value_a_channel_is_refused_in_the_words_of_batch_norm():
    x, weight = torch.randn(1, 3, 1, 1), torch.randn(5, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when") as ours:
        expand_merge_train(x, weight)
    with pytest.raises(ValueError, match="Expected more than 1 value") as theirs:
        torch.nn.BatchNorm2d(5)(torch.conv2d(x, weight[..., None, None]))
    assert str(ours.value) == str(theirs.value)


# Registration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", [DOUBLING, ALONE, SMALL], ids=str)
def test_opcheck(shape, layout):
    (x, weight, scale, shift, big), grad = inputs(shape, layout=layout)
    weight = weight.flatten(1)
    leaves = [t if t is None else t.requires_grad_() for t in (x, weight, scale, shift, big)]
    torch.library.opcheck(torch.ops.blnet.expand_merge.default, (*leaves, True))
    k, c = shape.k, shape.c
    wide = {"dtype": torch.float64}
    statistics = (torch.zeros(k), torch.zeros(k, **wide), torch.eye(k, **wide),
                  torch.ones(c, **wide), torch.tensor(9.0, **wide), None, None)  # fmt: skip
    arguments = (*leaves, *statistics, 1e-5, True, "")
    torch.library.opcheck(torch.ops.blnet.expand_merge_train.default, arguments)
    # Their gradients are refused, which opcheck's autograd test would count as a failure.
    tests = ("test_schema", "test_faketensor")
    out = torch.randn(shape.out)
    x, weight = x.detach(), weight.detach()
    size = (shape.h_big or shape.h, shape.w_big or shape.w)
    for flags in ((True, True), (False, True), (True, False)):
        arguments = (grad, out, x, torch.zeros(k), *size, *flags)
        op = torch.ops.blnet.expand_merge_reduce.default
        torch.library.opcheck(op, arguments, test_utils=tests)
    op = torch.ops.blnet.expand_merge_input.default
    torch.library.opcheck(op, (grad, None, x, weight, *(None,) * 6), test_utils=tests)
    rest = (torch.ones(c), torch.ones(c), torch.eye(k), *(torch.ones(k) for _ in range(3)))
    torch.library.opcheck(op, (grad, out, x, weight, *rest), test_utils=tests)


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic, function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in (DOUBLING, RESIDUAL, SMALL):
        tensors, grad = inputs(shape, torch.bfloat16)
        ours, plain = run(compiled, tensors, grad), run(function, tensors, grad)
        assert all(torch.equal(ours[name], plain[name]) for name in ours)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_training_updates_the_running_statistics(momentum):
    (x, weight, gamma, beta, big), _ = inputs(DOUBLING)
    compiled = torch.compile(expand_merge_train, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, expand_merge_train):
        buffers = [torch.zeros(DOUBLING.c), torch.ones(DOUBLING.c)]
        batches = torch.tensor(0)
        for _ in range(2):
            function(x, weight, gamma, beta, *buffers, momentum, 1e-5, big,
                     num_batches_tracked=batches)  # fmt: skip
        results.append((*buffers, batches))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2] == 2


class Inference(torch.nn.Module):
    def forward(self, *tensors):
        return expand_merge(*tensors)


def test_export_and_deepcopy_keep_the_op():
    tensors, _ = inputs(DOUBLING)
    program = torch.export.export(copy.deepcopy(Inference()), tensors)
    assert "blnet.expand_merge" in str(program.graph)
    assert torch.equal(copy.deepcopy(program.module())(*tensors), expand_merge(*tensors))


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
def test_autocast_casts_as_conv2d_does(function):
    (x, weight, scale, shift, big), grad = inputs(DOUBLING)
    low = (x.bfloat16(), weight.bfloat16(), scale, shift, big)
    leaves = [t.clone().requires_grad_() for t in (x, weight, scale, shift, big)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(*leaves[:4], big=leaves[4])
        assert out.dtype is torch.float32  # big's, as in torch.add
        assert function(*leaves[:4], big=leaves[4].bfloat16()).dtype is torch.bfloat16
        assert function(*leaves[:4]).dtype is torch.bfloat16
    out.backward(grad)
    truth = run(of_reference(function), doubled(low), grad.double())
    testing.assert_close(out, truth["out"], dtype=torch.bfloat16)
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert leaf.grad.dtype is torch.float32
        testing.assert_close(leaf.grad, truth[f"d{name}"], dtype=torch.bfloat16, what=name)


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
def test_second_derivatives_are_refused(function):
    (x, weight, scale, shift, big), _ = inputs(SMALL)
    x.requires_grad_()
    weight.requires_grad_()
    out = function(x, weight, scale, shift, big=big)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only; call .*use_backend"):
        first.sum().backward()


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
def test_checkpointing(function):
    tensors, grad = inputs(SMALL)

    def again(x, weight, scale, shift, big):
        def inner(*leaves):
            return function(*leaves[:4], big=leaves[4])

        return checkpoint(inner, x, weight, scale, shift, big, use_reentrant=False)

    plain, replayed = run(function, tensors, grad), run(again, tensors, grad)
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
def test_flop_count_does_not_depend_on_the_backend(function):
    tensors, grad = inputs(DOUBLING)
    counts = []
    for backend in ("interpret", "torch"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            run(function, tensors, grad)
        counts.append(counter.get_total_flops())
    convolution = 2 * DOUBLING.n * DOUBLING.h * DOUBLING.w * DOUBLING.k * DOUBLING.c
    assert counts == [3 * convolution] * 2


def test_float64_runs_on_torch_unless_forced():
    tensors, _ = inputs(SMALL)
    wide = doubled(tensors)
    assert torch.equal(expand_merge(*wide), reference.expand_merge(*wide))
    for function in (expand_merge, expand_merge_train):
        with (
            use_backend("interpret"),
            pytest.raises(ValueError, match=r"'interpret' cannot run torch\.float64.*float32"),
        ):
            function(*wide[:4], big=wide[4])


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


class Counter(TorchDispatchMode):
    """Counts the operations that would be launches of their own on a GPU."""

    FREE = ("view", "detach", "t", "expand", "new_empty", "empty_like", "alias", "unsqueeze")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in self.FREE
        return function(*args, **(kwargs or {}))


def test_a_training_step_is_few_operations():
    # With PyTorch's operations between the passes over the maps it was about a hundred launches.
    (x, weight, gamma, beta, big), grad = inputs(DOUBLING, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, gamma, beta, big)]
    running, batches = [torch.zeros(DOUBLING.c), torch.ones(DOUBLING.c)], torch.tensor(0)
    with Counter() as forward:
        out = expand_merge_train(*leaves[:4], *running, big=big, num_batches_tracked=batches)
    with Counter() as backward:
        torch.autograd.grad(out, leaves, grad)
    # statistics, W S, variance, two running ones, the count of batches; the pass itself
    assert forward.count <= 9
    # reduce, W in float64, W S, between, W^T U, second, input
    assert backward.count <= 9
