"""expand_merge as a user meets it: errors, the plain PyTorch path, BatchNorm's behaviour, plans.

The kernels themselves run in tests/interpreter/test_expand_merge.py.
"""

import copy
import importlib
import logging

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

from blnet.kernels import expand_merge, expand_merge_train, moments, reference, testing
from blnet.kernels.center import estimate_center
from blnet.kernels.expand_merge import forward_launch
from blnet.kernels.expand_merge_input import input_launch
from blnet.kernels.expand_merge_reduce import reduce_launch
from blnet.kernels.expand_merge_sizes import Problem
from blnet.kernels.moments import moments_launch

# "blnet.kernels.expand_merge" as an attribute is the function; these are the modules.
forward_module = importlib.import_module("blnet.kernels.expand_merge")
train_module = importlib.import_module("blnet.kernels.expand_merge_train")

SHAPE = testing.EXPAND_SHAPES[1]


def tensors(**changes):
    """Return correct arguments with some of them changed."""
    arguments = {
        "x": torch.randn(2, 3, 4, 4),
        "weight": torch.randn(5, 3, 1, 1),
        "big": torch.randn(2, 5, 2, 2),
    }
    return arguments | changes


# Wrong inputs -----------------------------------------------------------------------------------

WRONG = {
    "x no tensor": ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
    "x rank": ({"x": torch.zeros(2, 3)}, "x must have 4 dimensions (N, C, H, W), got shape (2, 3)"),
    "x integers": ({"x": torch.zeros(2, 3, 4, 4).int()}, "got torch.int32; convert it"),
    "weight no tensor": ({"weight": None}, "weight must be a torch.Tensor, got NoneType"),
    "weight 3x3": ({"weight": torch.zeros(5, 3, 3, 3)}, "only ungrouped 1x1 convolutions"),
    "weight channels": ({"weight": torch.zeros(5, 4)}, "with K = 3, the channels of x, got (5, 4)"),
    "weight dtype": ({"weight": torch.zeros(5, 3).half()}, "x is torch.float32 and weight is"),
    "big rank": ({"big": torch.zeros(2, 5)}, "big must have 4 dimensions"),
    "big batch": ({"big": torch.zeros(1, 5, 2, 2)}, "big must have N = 2 like x and C = 5 like"),
    "big channels": ({"big": torch.zeros(2, 3, 2, 2)}, "got shape (2, 3, 2, 2)"),
    "big empty": ({"big": torch.zeros(2, 5, 0, 2)}, "big has height 0 and x height 4, so there is"),
    "big dtype": ({"big": torch.zeros(2, 5, 2, 2).half()}, "x is torch.float32 and big is"),
    "big device": ({"big": torch.zeros(2, 5, 2, 2, device="meta")}, "and big on 'meta'"),
}  # fmt: skip
OF_INFERENCE = {
    "scale size": (
        {"scale": torch.ones(3)},
        "scale must hold one floating-point number",
    ),
    "scale dtype": ({"scale": torch.ones(5).int()}, "got shape (5,) of torch.int32"),
    "shift no tensor": ({"shift": 1.0}, "shift must be a torch.Tensor or None, got float"),
    "shift device": (
        {"shift": torch.ones(5, device="meta")},
        "shift is on 'meta' and the map",
    ),
}
OF_TRAINING = {
    "gamma size": (
        {"gamma": torch.ones(5, 1)},
        "gamma must hold one floating-point number",
    ),
    "beta size": (
        {"beta": torch.ones(4)},
        "beta must hold one floating-point number",
    ),
    "running": ({"running_var": torch.ones(4)}, "running_var must hold one"),
    "momentum": (
        {"momentum": None},
        "momentum None averages over all batches, which needs",
    ),
}


def assert_refused(function, changes, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        function(**tensors(**changes))
    text = str(caught.value)
    assert text.startswith(f"{function.__name__}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("case", [*WRONG, *OF_INFERENCE])
def test_wrong_input_of_inference_is_one_clear_sentence(case):
    assert_refused(expand_merge, *(WRONG | OF_INFERENCE)[case])


@pytest.mark.parametrize("case", [*WRONG, *OF_TRAINING])
def test_wrong_input_of_training_is_one_clear_sentence(case):
    assert_refused(expand_merge_train, *(WRONG | OF_TRAINING)[case])


def test_wrong_input_of_moments():
    x = torch.randn(2, 3, 4, 4)
    for arguments, message in (
        (([1.0],), "moments: x must be a torch.Tensor, got list"),
        ((x[0],), "moments: x must have 4 dimensions"),
        ((x, torch.ones(4)), "moments: shift must hold one floating-point number for each of 3"),
        ((x, torch.ones(3, device="meta")), "moments: shift is on 'meta' and the map on 'cpu'"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
            moments(*arguments)
        assert str(caught.value).startswith(message)


# The plain PyTorch path --------------------------------------------------------------------------


def modules(shape, **options):
    conv = torch.nn.Conv2d(shape.k, shape.c, 1, bias=False)
    norm = torch.nn.BatchNorm2d(shape.c, **options)
    if norm.affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return conv, norm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.7, "eps": 1e-2},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_training_on_the_cpu_has_the_bits_of_conv_and_batch_norm(options):
    conv, norm = modules(SHAPE, **options)
    plain = copy.deepcopy(norm)
    for _ in range(3):
        x, _, _, _, big = testing.expand_merge_inputs(SHAPE)
        out = expand_merge_train(
            x, conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var,
            norm.momentum, norm.eps, big, num_batches_tracked=norm.num_batches_tracked,
        )  # fmt: skip
        assert torch.equal(out, reference.merge(big, plain(conv(x))))
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name))


def test_inference_on_the_cpu_is_conv_and_batch_norm_in_evaluation():
    conv, norm = modules(SHAPE)
    norm.eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x, _, _, _, big = testing.expand_merge_inputs(SHAPE)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    expected = reference.merge(big, norm(conv(x)))
    torch.testing.assert_close(expand_merge(x, conv.weight, scale, shift, big), expected)
    folded = conv.weight * scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(expand_merge(x, folded, None, shift, big), expected)


def test_one_value_a_channel_is_refused_in_the_words_of_batch_norm():
    conv, norm = modules(testing.ExpandShape(1, 3, 5, 1, 1, 0, 0, ""))
    x = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel") as theirs:
        norm(conv(x))
    with pytest.raises(ValueError, match="more than 1 value per channel") as ours:
        expand_merge_train(x, conv.weight)
    assert str(ours.value) == str(theirs.value)


def test_second_derivatives_on_the_cpu():
    x, weight, scale, shift, big = (
        t.double().requires_grad_()
        for t in testing.expand_merge_inputs(testing.ExpandShape(1, 2, 2, 2, 2, 1, 1, "tiny"))
    )
    assert torch.autograd.gradgradcheck(expand_merge, (x, weight, scale, shift, big))


def test_autocast_on_the_cpu():
    x, weight, scale, shift, big = testing.expand_merge_inputs(SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for function in (expand_merge, expand_merge_train):
            assert function(x, weight, scale, shift).dtype is torch.bfloat16
            assert function(x, weight, scale, shift, big=big).dtype is torch.float32
            half = function(x, weight, scale, shift, big=big.bfloat16())
            assert half.dtype is torch.bfloat16


@pytest.mark.parametrize("function", [expand_merge, expand_merge_train])
def test_compile_without_graph_breaks(function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, weight, scale, shift, big = testing.expand_merge_inputs(SHAPE)
    expected = function(x, weight, scale, shift, big=big)
    torch.testing.assert_close(compiled(x, weight, scale, shift, big=big), expected)


def test_moments_on_the_cpu():
    x = torch.randn(2, 3, 4, 5) + 30
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        shift = estimate_center(x.to(dtype))
        sums, gram = moments(x.to(dtype), shift)
        expected = reference.moments(x.to(dtype).double(), shift.double())
        testing.assert_close(gram, expected[1])
        testing.assert_close(sums, expected[0], dtype=torch.float16)  # they all but cancel


# The kernels, traced for a GPU that is not there -------------------------------------------------


class Context:
    """Stands for autograd's context: its engine cannot run for a GPU that is not there."""

    def __init__(self, needs_input_grad):
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def backward_of(module, inputs, out):
    context = Context([isinstance(value, torch.Tensor) for value in inputs])
    module._setup_context(context, inputs, out)
    return module._autograd(context, torch.empty_like(out))[:5]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size_big", [None, 14, 28])
@pytest.mark.parametrize("training", [False, True])
def test_shapes_dtypes_and_layouts_on_a_gpu(training, size_big, relu, driver):
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 64, 28, 28, device="cuda").to(memory_format=torch.channels_last)
        x, weight = x.bfloat16(), torch.empty(96, 64, device="cuda").bfloat16()
        c, k = torch.empty(96, device="cuda"), torch.empty(64, device="cuda")
        big = None
        if size_big is not None:
            big = torch.empty(2, 96, size_big, size_big, device="cuda").bfloat16()
        inputs, function = (x, weight, c, c, big), expand_merge_train if training else expand_merge
        out = function(*inputs[:4], big=big, relu=relu)
        if training:
            square = torch.empty(64, 64, device="cuda").double()
            rest = (k, k.double(), square, c.double(), c.double().sum(), None, None)
            gradients = backward_of(train_module, (*inputs, *rest, 1e-5, relu, ""), out)
        else:
            gradients = backward_of(forward_module, (*inputs, relu), out)
    assert (out.shape, out.dtype) == ((2, 96, 28, 28), torch.bfloat16)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for gradient, argument in zip(gradients, inputs, strict=True):
        if argument is None:
            assert gradient is None
        else:
            assert (gradient.shape, gradient.dtype) == (argument.shape, argument.dtype)


@pytest.mark.parametrize(
    "form",
    [
        "inference",
        "training",
        "reduce",
        "input",
        "moments",
        "statistics",
        "variance",
        "between",
        "second",
    ],
)
def test_the_compiler_sees_the_kernels_and_which_arguments_are_written(form, driver, caplog):
    ops = torch.ops.blnet
    with FakeTensorMode(), caplog.at_level(logging.WARNING):
        x = torch.empty(2, 64, 28, 28, device="cuda").to(memory_format=torch.channels_last)
        x = x.bfloat16()
        weight = torch.empty(96, 64, device="cuda").bfloat16()
        c, k = torch.empty(96, device="cuda"), torch.empty(64, device="cuda")
        big = torch.empty(2, 96, 14, 14, device="cuda").to(memory_format=torch.channels_last)
        big = big.bfloat16()
        out = torch.empty(2, 96, 28, 28, device="cuda").to(memory_format=torch.channels_last)
        out = out.bfloat16()
        square = torch.empty(64, 64, device="cuda")
        statistics = (k, k.double(), square.double(), c.double(), c.double().sum(), None, None)
        function, arguments, written = {
            "inference": (ops.expand_merge, (x, weight, c, c, big, True), [["p_out"]]),
            "training": (
                ops.expand_merge_train,
                (x, weight, c, c, big, *statistics, 1e-5, True, ""),
                [["p_scale", "p_shift"], ["p_out"]],
            ),
            "reduce": (
                ops.expand_merge_reduce,
                (out, out, x, k, 14, 14, True, True),
                [["p_dbig", "p_products", "p_sums"]],
            ),
            "input": (
                ops.expand_merge_input,
                (out, out, x, weight, c, c, square.bfloat16(), k, k, k),
                [["p_dx"]],
            ),
            "moments": (ops.moments, (x, k), [["p_gram", "p_sums"]]),
            "statistics": (
                ops.centered_statistics,
                (x,),
                [["p_center"], ["p_gram", "p_sums"], ["p_covariance", "p_mean"]],
            ),
            "variance": (
                ops.output_statistics,
                (weight, weight.double(), k.double(), 1568),
                [["p_batch_mean", "p_batch_variance", "p_variance"]],
            ),
            "between": (
                ops.expand_merge_between,
                (weight.float(), c, weight, weight.double(), c, c.double(), k.double(), k, 1e-5, 9),
                [["p_dbeta", "p_dgamma", "p_dweight", "p_offset", "p_scale", "p_u"]],
            ),
            "second": (
                ops.expand_merge_second,
                (square.double(), k.double(), k, x),
                [["p_constant", "p_second", "p_unit"]],
            ),
        }[form]

        class Call(torch.nn.Module):
            def forward(self, *tensors):
                result = function(*arguments)
                return result if isinstance(result, tuple) else (result,)

        graph, _ = aot_export_module(Call(), (x,), trace_joint=False)
    assert not caplog.records, caplog.text  # PyTorch understood which arguments are written
    nodes = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert [sorted(node.kwargs["tensors_to_clone"]) for node in nodes] == written


# The launch plans --------------------------------------------------------------------------------

SIZES = [
    (32, 128, 256, 56, 56, 28, 28),
    (1, 37, 75, 5, 7, 3, 4),
    (2, 512, 1024, 14, 14, 14, 14),
]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plans_cover_everything_once(sizes, itemsize):
    problem = Problem(*sizes, itemsize)
    flags = {"RELU": True, "PRODUCTS": True, "STORE_BIG": True}
    plan = reduce_launch(problem, **flags)
    rows = problem.rows if problem.same else problem.rows_big
    parts, chunk = plan.grid[1], plan.integers["chunk"]
    assert chunk % plan.constants["BLOCK_ROWS"] == 0
    assert parts * chunk >= rows == plan.integers["rows"]
    tiles_c = -(-problem.channels // plan.constants["BLOCK_C"])
    assert plan.grid[0] == tiles_c * plan.constants["TILES_K"]
    plan = moments_launch(problem.rows, problem.channels_in, itemsize)
    assert plan.grid[1] * plan.integers["chunk"] >= problem.rows
    tiles = plan.constants["TILES"]
    assert plan.grid[0] == tiles * (tiles + 1) // 2
    for plan, columns, block in (
        (forward_launch(problem), problem.channels, "BLOCK_C"),
        (input_launch(problem), problem.channels_in, "BLOCK_K"),
    ):
        row_tiles = -(-problem.rows // plan.constants["BLOCK_ROWS"])
        assert plan.grid == (row_tiles * -(-columns // plan.constants[block]),)


@pytest.mark.parametrize(
    ("sizes", "wide"),
    [
        ((256, 128, 256, 56, 56, 28, 28), False),
        ((2048, 64, 256, 112, 112, 56, 56), True),
        ((2048, 256, 64, 112, 112, 56, 56), True),  # x alone is too large
        ((1, 1, 1, 70_000, 1, 35_000, 1), True),  # few elements, but 70000 x 35000
    ],
)
def test_offsets_are_64_bits_where_32_do_not_reach(sizes, wide):
    assert Problem(*sizes, 2).wide is wide


def test_devices_must_agree_under_autocast_too():
    x, weight = torch.randn(1, 16, 4, 4), torch.randn(32, 16, device="meta")
    with (
        torch.autocast("cpu"),
        pytest.raises(ValueError, match="x is on 'cpu' and weight on 'meta'"),
    ):
        expand_merge(x, weight, torch.ones(32), torch.zeros(32))
    told = "x is on 'cpu' and big on 'meta'"
    big = torch.randn(1, 32, 2, 2, device="meta")
    with torch.autocast("cpu"), pytest.raises(ValueError, match=told):
        expand_merge(x, torch.randn(32, 16), torch.ones(32), torch.zeros(32), big)
