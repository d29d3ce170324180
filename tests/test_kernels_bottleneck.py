"""bottleneck as a user meets it: errors, the plain PyTorch path, plans, tracing for a GPU.

The kernels themselves run in tests/interpreter/test_bottleneck.py.
"""

import logging

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

from blnet.blocks import BlockSpec, Bottleneck
from blnet.kernels import bottleneck, reference, testing
from blnet.kernels.bottleneck_close import CloseProblem, chains, close_launch
from blnet.kernels.conv3x3 import ConvolutionProblem, convolution_launch
from blnet.kernels.expand_merge_sizes import Problem

NAMES = ("x", "weight1", "shift1", "weight2", "shift2", "weight3", "shift3", "shortcut")
CHAIN = ("weight_expand", "shift_expand", "big")


def tensors(**changes):
    """Return correct arguments with some of them changed."""
    arguments = {
        "x": torch.randn(2, 6, 4, 4),
        "weight1": torch.randn(3, 6, 1, 1),
        "shift1": torch.randn(3),
        "weight2": torch.randn(3, 3, 3, 3),
        "shift2": torch.randn(3),
        "weight3": torch.randn(6, 3, 1, 1),
        "shift3": torch.randn(6),
        "weight_expand": torch.randn(5, 6, 1, 1),
        "shift_expand": torch.randn(5),
        "big": torch.randn(2, 5, 2, 2),
    }
    return arguments | changes


WRONG = {
    "x no tensor": ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
    "x rank": ({"x": torch.zeros(2, 6)}, "x must have 4 dimensions (N, C, H, W), got shape (2, 6)"),
    "x integers": ({"x": torch.zeros(2, 6, 4, 4).int()}, "got torch.int32; convert it"),
    "weight1 no tensor": ({"weight1": None}, "weight1 must be a torch.Tensor, got NoneType"),
    "weight1 channels": ({"weight1": torch.zeros(3, 5)},
        "weight1 must have shape (C, K) or (C, K, 1, 1) with K = 6, the channels of x, got (3, 5)"),
    "weight1 dtype": ({"weight1": torch.zeros(3, 6).half()}, "x is torch.float32 and weight1 is"),
    "weight2 1x1": ({"weight2": torch.zeros(3, 3, 1, 1)}, "only ungrouped 3x3 convolutions can"),
    "weight2 matrix": ({"weight2": torch.zeros(3, 3)}, "must have shape (C, K, 3, 3) with K = 3"),
    "weight2 grouped": ({"weight2": torch.zeros(3, 1, 3, 3)}, "the rows of weight1, got (3, 1, 3"),
    "weight2 widens": ({"weight2": torch.zeros(4, 3, 3, 3)}, "must map I = 3 channels to as many"),
    "weight2 device": ({"weight2": torch.zeros(3, 3, 3, 3, device="meta")}, "weight2 on 'meta'"),
    "weight3 channels": ({"weight3": torch.zeros(6, 4)}, "with K = 3, the rows of weight2, got (6"),
    "shift1 size": ({"shift1": torch.ones(6)}, "shift1 must hold one floating-point number for"),
    "shift2 integers": ({"shift2": torch.ones(3).int()}, "got shape (3,) of torch.int32"),
    "shift3 no tensor": ({"shift3": 1.0}, "shift3 must be a torch.Tensor or None, got float"),
    "shift3 device": ({"shift3": torch.ones(6, device="meta")}, "shift3 is on 'meta' and the map"),
    "no shortcut": ({"weight3": torch.zeros(8, 3), "shift3": None},
        "without a shortcut x is added, which has 6 channels where weight3 makes 8; pass the proj"),
    "shortcut rank": ({"shortcut": torch.zeros(2, 6)}, "shortcut must have 4 dimensions"),
    "shortcut size": ({"shortcut": torch.zeros(2, 6, 2, 2)},
        "shortcut must have shape (2, 6, 4, 4), that of x with the channels of weight3, got (2, 6"),
    "shortcut dtype": ({"shortcut": torch.zeros(2, 6, 4, 4).half()}, "and shortcut is torch.float"),
    "expand channels": ({"weight_expand": torch.zeros(5, 3)}, "K = 6, the rows of weight3, got (5"),
    "expand dtype": ({"weight_expand": torch.zeros(5, 6).half()}, "and weight_expand is torch.fl"),
    "expand shift": ({"shift_expand": torch.ones(6)}, "shift_expand must hold one floating-point"),
    "lost shift": ({"weight_expand": None, "big": None}, "shift_expand is given without weight"),
    "lost big": ({"weight_expand": None, "shift_expand": None}, "big is given without weight_exp"),
    "big rank": ({"big": torch.zeros(2, 5)}, "big must have 4 dimensions"),
    "big channels": ({"big": torch.zeros(2, 6, 2, 2)},
        "big must have N = 2 like x and C = 5 like weight_expand, got shape (2, 6, 2, 2)"),
    "big empty": ({"big": torch.zeros(2, 5, 0, 2)}, "big has height 0 and x height 4, so there is"),
    "big dtype": ({"big": torch.zeros(2, 5, 2, 2).half()}, "x is torch.float32 and big is"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_sentence(case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        bottleneck(**tensors(**changes))
    text = str(caught.value)
    assert text.startswith("bottleneck: ")
    assert message in text
    assert "\n" not in text


# The plain PyTorch path --------------------------------------------------------------------------


def folded(conv, norm):
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


def randomised(module):
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module.eval()


@pytest.mark.parametrize("closing", [True, False])
@pytest.mark.parametrize("channels", [(16, 32), (32, 32)], ids=str)
def test_on_the_cpu_it_is_the_block_of_the_network(channels, closing):
    block = randomised(Bottleneck(BlockSpec(*channels, closing_activation=closing)))
    x = torch.randn(2, channels[0], 5, 6)
    layers = [folded(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3)]
    with torch.no_grad():
        shortcut = None if block.downsample is None else block.downsample(x)
        out = bottleneck(x, *layers[0], *layers[1], *layers[2], shortcut, closing)
        torch.testing.assert_close(out, block(x), rtol=1e-4, atol=1e-4)


def test_the_chain_on_the_cpu_is_the_expansion_and_the_merge():
    given = tensors()
    block = {name: given[name] for name in NAMES if name in given}
    expand, norm = nn.Conv2d(6, 5, 1, bias=False), randomised(nn.BatchNorm2d(5))
    weight, shift = folded(expand, norm)
    with torch.no_grad():
        out = bottleneck(**block, weight_expand=weight, shift_expand=shift, big=given["big"])
        expected = reference.merge(given["big"], norm(expand(bottleneck(**block))))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("absent", [(), CHAIN, ("big",), ("shift2", "shift_expand")], ids=str)
def test_derivatives_of_the_reference(absent, relu):
    torch.manual_seed(0)
    shape = testing.BottleneckShape(1, 2, 2, 2, 2, 3, 2, 1, 2, "tiny")
    drawn = testing.bottleneck_inputs(shape)
    # Far from the corners of relu.
    leaves = [None if t is None else t.double().requires_grad_() for t in drawn]
    named = dict(zip((*NAMES, *CHAIN), leaves, strict=True))
    named |= dict.fromkeys(absent)
    names = [name for name, leaf in named.items() if leaf is not None]

    def function(*given):
        return reference.bottleneck(**(named | dict(zip(names, given, strict=True))), relu=relu)

    assert torch.autograd.gradcheck(function, [named[name] for name in names])
    assert bottleneck(**named, relu=relu).requires_grad


def test_matrices_and_shifts_of_another_dtype():
    given = tensors()
    expected = bottleneck(**given)
    flat = {name: given[name].flatten(1) for name in ("weight1", "weight3", "weight_expand")}
    assert torch.equal(bottleneck(**(given | flat)), expected)
    shifts = {name: given[name].double() for name in given if name.startswith("shift")}
    halves = {name: value.bfloat16() for name, value in given.items() if name not in shifts}
    low = {name: value.float() for name, value in shifts.items()}
    assert bottleneck(**(halves | low)).dtype is torch.bfloat16


def test_compile_without_graph_breaks_on_the_cpu():
    given = tensors()
    compiled = torch.compile(bottleneck, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), bottleneck(**given))


# The kernels, traced for a GPU that is not there -------------------------------------------------


def fake_inputs(dtype, c=128, layout=torch.channels_last):
    shape = testing.BottleneckShape(2, c, 32, c, 28, 28, 256, 14, 14, "as in a network")
    maps = testing.bottleneck_inputs(shape, dtype)
    return [t if t is None else _on_gpu(t, layout) for t in maps]


def _on_gpu(t, layout):
    fake = torch.empty(t.shape, dtype=t.dtype, device="cuda")
    return fake.to(memory_format=layout) if t.dim() == 4 else fake


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chain", [False, True])
def test_shapes_dtypes_and_layouts_on_a_gpu(chain, dtype, layout, driver):
    with FakeTensorMode(), torch.no_grad():
        given = fake_inputs(dtype, layout=layout)
        rest = given[8:] if chain else (None, None, None)
        out = bottleneck(*given[:8], True, *rest)
    assert (out.shape, out.dtype) == ((2, 256 if chain else 128, 28, 28), dtype)
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("dtype", "c", "kernels"),
    [(torch.bfloat16, 128, 2), (torch.bfloat16, 512, 3), (torch.float32, 128, 4)],
)
def test_the_compiler_sees_the_kernels_and_which_arguments_are_written(
    dtype, c, kernels, driver, caplog
):
    with FakeTensorMode(), caplog.at_level(logging.WARNING):
        given = fake_inputs(dtype, c)

        class Call(torch.nn.Module):
            def forward(self, *tensors):
                return (bottleneck(*given[:8], True, *given[8:]),)

        graph, _ = aot_export_module(Call(), (given[0],), trace_joint=False)
    assert not caplog.records, caplog.text  # PyTorch understood which arguments are written
    nodes = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert [sorted(node.kwargs["tensors_to_clone"]) for node in nodes] == [["p_out"]] * kernels


def test_an_inner_width_that_does_not_fit_says_what_to_do(driver):
    shape = testing.BottleneckShape(1, 8, 129, 8, 2, 2, 0, 0, 0, "too wide")
    with FakeTensorMode():
        given = [None if t is None else t.cuda() for t in testing.bottleneck_inputs(shape)]
        message = r"from 1 to 128 channels on the kernels, got 129; run its convolutions one by one"
        with pytest.raises(ValueError, match=message):
            bottleneck(*given[:8], True, *given[8:])


# The launch plans --------------------------------------------------------------------------------


def plan(inner, sizes, chained, choice=None):
    return close_launch(CloseProblem(inner, Problem(*sizes, 2), chained), choice, RELU=True)


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("inner", [1, 16, 37, 100, 128])
@pytest.mark.parametrize("channels", [16, 48, 100, 256])
def test_plans_cover_everything_once(inner, channels, chained):
    sizes = (3, channels, 70 if chained else channels, 9, 7, 5, 4)
    made = plan(inner, sizes, chained)
    assert made.grid[0] * made.constants["BLOCK_ROWS"] >= 3 * 9 * 7
    assert made.constants["BLOCK_I"] >= inner
    assert made.constants["TILES_K"] * made.constants["BLOCK_K"] >= inner
    assert not chained or made.constants["BLOCK_C"] >= channels
    assert made.integers["channels"] == channels
    assert made.integers["channels_out"] == sizes[2]


def test_a_choice_overrides_the_rule():
    sizes = (3, 64, 64, 9, 7, 9, 7)
    choice = {"BLOCK_ROWS": 32, "BLOCK_K": 16, "num_warps": 2, "num_stages": 5}
    made = plan(64, sizes, False, choice)
    assert (made.num_warps, made.num_stages) == (2, 5)
    assert made.grid == (6,)
    assert made.constants["TILES_K"] == 4
    made = convolution_launch(ConvolutionProblem(3, 40, 64, 9, 7, 2), choice)
    assert (made.num_warps, made.grid, made.constants["TILES_K"]) == (2, (4,), 3)


def test_what_chains():
    assert chains((64, 256, 512))
    assert not chains((128, 512, 1024))  # would spill
    assert not chains((9, 32, 64))  # unaligned rows
    assert not chains((16, 32, 75))


@pytest.mark.parametrize(
    ("inner", "sizes", "wide"),
    [
        (64, (256, 128, 256, 56, 56, 28, 28), False),
        (16, (2048, 64, 256, 112, 112, 56, 56), True),
        (128, (1400, 16, 16, 112, 112, 112, 112), True),  # h alone is too large
    ],
)
def test_offsets_are_64_bits_where_32_do_not_reach(inner, sizes, wide):
    assert CloseProblem(inner, Problem(*sizes, 2), True).wide is wide


def test_offsets_of_a_convolution_are_64_bits_where_32_do_not_reach():
    assert not ConvolutionProblem(256, 64, 64, 112, 112, 2).wide
    assert ConvolutionProblem(2048, 64, 64, 224, 224, 2).wide
    assert ConvolutionProblem(2048, 16, 512, 112, 112, 1).wide
