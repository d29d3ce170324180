"""stem as a user meets it: errors, the plain PyTorch path, plans, tracing for a GPU.

The kernels themselves run in tests/interpreter/test_stem.py.
"""

import logging

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

from blnet.kernels import reference, stem, testing
from blnet.kernels.stem_close import StemProblem, fits_at_once, stem_launch
from blnet.stem import BigLittlePool

NAMES = (
    "x", "little", "weight_expand", "shift_expand", "weight_fusion", "shift_fusion",
    "weight_big", "shift_big", "weight_little", "shift_little",
)  # fmt: skip


def tensors(**changes):
    """Return correct arguments with some of them changed."""
    arguments = {
        "x": torch.randn(2, 4, 7, 8),
        "little": torch.randn(2, 2, 7, 8),
        "weight_expand": torch.randn(6, 3, 1, 1),
        "shift_expand": torch.randn(6),
        "weight_fusion": torch.randn(5, 6, 1, 1),
        "shift_fusion": torch.randn(5),
        "weight_big": torch.randn(6, 4, 3, 3),
        "shift_big": torch.randn(6),
        "weight_little": torch.randn(3, 2, 3, 3),
        "shift_little": torch.randn(3),
    }
    return arguments | changes


WRONG = {
    "x no tensor": ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
    "little rank": ({"little": torch.zeros(2, 3)}, "little must have 4 dimensions (N, C, H, W)"),
    "x integers": ({"x": torch.zeros(2, 4, 7, 8).int()}, "got torch.int32; convert it"),
    "big channels": ({"weight_big": torch.zeros(6, 3, 3, 3)},
        "weight_big must have shape (C, K, 3, 3) with K = 4, the channels of x, got (6, 3, 3, 3)"),
    "big kernel": ({"weight_big": torch.zeros(6, 4, 1, 1)}, "only ungrouped 3x3 convolutions can"),
    "little channels": ({"weight_little": torch.zeros(3, 4, 3, 3)},
        "weight_little must have shape (C, K, 3, 3) with K = 2, the channels of little, got (3, 4"),
    "little no tensor": ({"weight_little": 1.0}, "weight_little must be a torch.Tensor, got flo"),
    "expand channels": ({"weight_expand": torch.zeros(6, 2)},
        "with K = 3, the little branch's channels, got (6, 2); only ungrouped 1x1 convolutions"),
    "expand kernel": ({"weight_expand": torch.zeros(6, 3, 3, 3)}, "only ungrouped 1x1 convolution"),
    "fusion none": ({"weight_fusion": None}, "weight_fusion must be a torch.Tensor, got NoneType"),
    "fusion channels": ({"weight_fusion": torch.zeros(5, 3)}, "K = 6, the rows of weight_expand"),
    "shift_expand": ({"shift_expand": torch.ones(3)}, "shift_expand must hold one floating-point"),
    "shift_fusion": ({"shift_fusion": torch.ones(6)}, "shift_fusion must hold one floating-point"),
    "shift_big": ({"shift_big": torch.ones(6, device="meta")}, "shift_big is on 'meta' and the"),
    "shift_little": ({"shift_little": 1}, "shift_little must be a torch.Tensor or None, got int"),
    "lost shift_big": ({"weight_big": None}, "shift_big is given without weight_big, which it bel"),
    "lost shift_little": ({"weight_little": None}, "shift_little is given without weight_little"),
    "sizes": ({"little": torch.zeros(2, 2, 5, 8)},
        "the big branch gives shape (2, 6, 4, 4) and the little one, expanded, (2, 6, 3, 4); they"),
    "batch": ({"little": torch.zeros(1, 2, 7, 8)}, "the little one, expanded, (1, 6, 4, 4)"),
    "big given": ({"weight_big": None, "shift_big": None}, "the big branch gives shape (2, 4, 7"),
    "little dtype": ({"little": torch.zeros(2, 2, 7, 8).half()}, "x is torch.float32 and little"),
    "weight dtype": ({"weight_big": torch.zeros(6, 4, 3, 3).half()}, "and weight_big is torch.f"),
    "little device": ({"little": torch.zeros(2, 2, 7, 8, device="meta"), "shift_little": None},
        "x is on 'cpu' and little on 'meta'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_sentence(case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        stem(**tensors(**changes))
    text = str(caught.value)
    assert text.startswith("stem: ")
    assert message in text
    assert "\n" not in text


# The plain PyTorch path --------------------------------------------------------------------------


def folded(conv, norm):
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


@pytest.mark.parametrize("convolved", [(), ("big",), ("little",), ("big", "little")], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 6)], ids=str)
def test_on_the_cpu_it_is_the_stem_of_the_network(size, convolved):
    pool = BigLittlePool(8, 2)
    for part in pool.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    pool.eval()
    x = torch.randn(2, 8, *size)
    with torch.no_grad():
        big, little = x, pool.little[:3](x)
        weights = [*folded(*pool.expand), *folded(*pool.fusion[:2])]
        weights += folded(*pool.big) if "big" in convolved else (None, None)
        weights += folded(*pool.little[3:5]) if "little" in convolved else (None, None)
        if "big" not in convolved:
            big = pool.big(x)
        if "little" not in convolved:
            little = pool.little(x)
        torch.testing.assert_close(stem(big, little, *weights), pool(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("convolved", [(0, 0), (2, 0), (0, 2), (2, 1)], ids=str)
def test_derivatives_of_the_reference(convolved):
    torch.manual_seed(0)
    shape = testing.StemShape(1, *convolved, 2, 3, 2, 4, 3, "tiny")
    leaves = [
        None if t is None else t.double().requires_grad_() for t in testing.stem_inputs(shape)
    ]
    places = [i for i, leaf in enumerate(leaves) if leaf is not None]

    def function(*given):
        arguments = [None] * len(leaves)
        for place, value in zip(places, given, strict=True):
            arguments[place] = value
        return reference.stem(*arguments)

    assert torch.autograd.gradcheck(function, [leaves[i] for i in places])
    assert stem(*leaves).requires_grad


def test_matrices_and_shifts_of_another_dtype():
    given = tensors()
    flat = {name: given[name].flatten(1) for name in ("weight_expand", "weight_fusion")}
    assert torch.equal(stem(**(given | flat)), stem(**given))
    low = {n: t if n.startswith("shift") else t.bfloat16() for n, t in given.items()}
    assert stem(**low).dtype is torch.bfloat16


def test_compile_without_graph_breaks_on_the_cpu():
    given = tensors()
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), stem(**given))


# The kernels, traced for a GPU that is not there -------------------------------------------------


def fake_inputs(dtype, convolved=(64, 32), layout=torch.channels_last):
    shape = testing.StemShape(2, *convolved, 32, 64, 64, 28, 28, "as in a network")
    fakes = []
    for t in testing.stem_inputs(shape, dtype):
        fake = None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda")
        fakes.append(fake.to(memory_format=layout) if t is not None and t.dim() == 4 else fake)
    return fakes


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("convolved", [(64, 32), (0, 32), (0, 0)], ids=str)
def test_shapes_dtypes_and_layouts_on_a_gpu(convolved, dtype, layout, driver):
    with FakeTensorMode(), torch.no_grad():
        out = stem(*fake_inputs(dtype, convolved, layout))
    assert (out.shape, out.dtype) == ((2, 64, 14, 14), dtype)
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.bfloat16, 1), (torch.float32, 4)])
def test_the_compiler_sees_the_kernels_and_which_arguments_are_written(
    dtype, kernels, driver, caplog
):
    with FakeTensorMode(), caplog.at_level(logging.WARNING):
        given = fake_inputs(dtype)

        class Call(torch.nn.Module):
            def forward(self, *tensors):
                return (stem(*given),)

        graph, _ = aot_export_module(Call(), (given[0],), trace_joint=False)
    assert not caplog.records, caplog.text  # PyTorch understood which arguments are written
    nodes = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert [sorted(node.kwargs["tensors_to_clone"]) for node in nodes] == [["p_out"]] * kernels


@pytest.mark.parametrize(("narrow", "c", "which"), [(129, 8, "little"), (8, 129, "big")])
def test_a_width_that_does_not_fit_says_what_to_do(narrow, c, which, driver):
    drawn = testing.stem_inputs(testing.StemShape(1, 0, 0, narrow, c, 8, 4, 4, "too wide"))
    with FakeTensorMode():
        given = [None if t is None else torch.empty(t.shape, device="cuda") for t in drawn]
        message = rf"the {which} branch's width must be from 1 to 128 channels on the kernels, got"
        with pytest.raises(ValueError, match=message):
            stem(*given)


# The launch plans --------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(64, 32, 32, 64, 64), (5, 3, 70, 66, 9), (100,) * 5], ids=str)
def test_plans_cover_everything_once(widths):
    c_x, c_little, narrow, c, _ = widths
    problem = StemProblem(3, *widths, 9, 7, (18, 13), (17, 14))
    plan = stem_launch(problem, CONV_BIG=True, CONV_LITTLE=True)
    blocks = plan.constants
    assert plan.grid[0] * blocks["BLOCK_ROWS"] >= problem.rows == 3 * 9 * 7
    assert blocks["BLOCK_L"] >= narrow
    assert blocks["BLOCK_C"] >= c
    assert blocks["TILES_X"] * blocks["BLOCK_X"] >= c_x
    assert blocks["TILES_LITTLE"] * blocks["BLOCK_LITTLE"] >= c_little


def test_a_choice_overrides_the_rule():
    problem = StemProblem(3, 64, 32, 32, 64, 64, 9, 7, (18, 13), (17, 14))
    choice = {"BLOCK_ROWS": 32, "BLOCK_X": 16, "num_warps": 2, "num_stages": 5}
    plan = stem_launch(problem, choice, CONV_BIG=True, CONV_LITTLE=True)
    assert (plan.num_warps, plan.num_stages, plan.grid) == (2, 5, (6,))
    assert plan.constants["TILES_X"] == 4


@pytest.mark.parametrize(
    ("n", "widths", "wide"),
    [
        (256, (64, 32, 32, 64, 64), False),
        (4096, (64, 32, 32, 64, 64), True),  # x
        (4096, (16, 64, 32, 16, 16), True),  # little
        (2048, (16, 16, 16, 16, 512), True),  # the output
    ],
)
def test_offsets_are_64_bits_where_32_do_not_reach(n, widths, wide):
    assert StemProblem(n, *widths, 56, 56, (112, 112), (112, 112)).wide is wide


def test_what_runs_in_one_kernel():
    sizes = (56, 56, (56, 56), (56, 56))
    assert fits_at_once(StemProblem(1, 128, 128, 128, 128, 128, *sizes))
    assert fits_at_once(StemProblem(1, 48, 16, 16, 80, 96, *sizes))
    assert not fits_at_once(StemProblem(1, 64, 9, 16, 64, 64, *sizes))
    assert not fits_at_once(StemProblem(1, 101, 9, 9, 101, 101, *sizes))  # would spill
