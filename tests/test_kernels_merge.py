"""merge as a user meets it: errors, the plain PyTorch path, graph capture, the launch plan.

The kernels themselves run in tests/interpreter/test_merge.py; here they are traced for a CUDA
device that need not exist.
"""

import copy
import logging

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from blnet.kernels import launch, merge, reference, testing
from blnet.kernels.merge import backward_launch, forward_launch

SHAPE = testing.SHAPES[1]


def maps(big=(2, 3, 2, 2), little=(2, 3, 4, 4), **options):
    return torch.randn(big, **options), torch.randn(little, **options)


# Wrong inputs -----------------------------------------------------------------------------------

WRONG = {
    "big no tensor": ([1.0], maps()[1], "big must be a torch.Tensor, got list; pass a tensor"),
    "little no tensor": (maps()[0], None, "little must be a torch.Tensor, got NoneType"),
    "big rank": (
        torch.zeros(2, 3),
        maps()[1],
        "big must have 4 dimensions (N, C, H, W), got shape",
    ),
    "little rank": (maps()[0], torch.zeros(1, 2, 3, 4, 4), "got shape (1, 2, 3, 4, 4); add the"),
    "integers": (maps()[0].int(), maps()[1].int(), "got torch.int32; convert it, for example with"),
    "complex": (maps()[0], maps()[1].cfloat(), "little must be float32, float16, bfloat16 or floa"),
    "batch": (*maps((1, 3, 2, 2)), "must have the same N and C, got shapes (1, 3, 2, 2) and (2, 3"),
    "channels": (*maps((2, 4, 2, 2)), "project the channels with a 1x1 convolution first"),
    "no rows": (*maps((2, 3, 0, 2)), "big has height 0 and little height 4, so there is no pixel"),
    "no columns": (*maps((2, 3, 2, 0)), "big has width 0 and little width 4, so there is no pixe"),
    "dtypes": (maps()[0].half(), maps()[1], "big is torch.float16 and little is torch.float32; co"),
    "devices": (
        maps(device="meta")[0],
        maps()[1],
        "big is on 'meta' and little on 'cpu'; move one",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_sentence(case):
    big, little, message = WRONG[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        merge(big, little)
    text = str(caught.value)
    assert text.startswith("merge: ")
    assert message in text
    assert "\n" not in text


# The plain PyTorch path --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*testing.TOLERANCES], ids=str)
@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_result_on_the_cpu(shape, dtype):
    big, little = testing.merge_inputs(shape, dtype, generator=torch.Generator().manual_seed(0))
    out = merge(big, little)
    rows = torch.arange(shape.h) * shape.h_big // max(shape.h, 1)
    columns = torch.arange(shape.w) * shape.w_big // max(shape.w, 1)
    upsampled = big.double()[:, :, rows][:, :, :, columns]
    testing.assert_close(out, (upsampled + little.double()).clamp_min(0))
    assert out.dtype == dtype


@pytest.mark.parametrize("layout", ["channels_last", "mixed"])
def test_result_on_the_cpu_keeps_the_layout_of_little(layout):
    for shape in testing.SHAPES[:3]:
        big, little = testing.merge_inputs(shape, layout=layout)
        assert merge(big, little).is_contiguous(memory_format=torch.channels_last)


def test_second_derivatives_on_the_cpu():
    big, little = maps(dtype=torch.float64)
    big.requires_grad_()
    little.requires_grad_()
    assert torch.autograd.gradgradcheck(merge, (big, little))


def test_autocast_promotes_to_the_wider():
    big, little = maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert merge(big.bfloat16(), little).dtype is torch.float32
        assert merge(big.bfloat16(), little.half()).dtype is torch.float32
        assert merge(big.bfloat16(), little.bfloat16()).dtype is torch.bfloat16


def test_meta_tensors():
    out = merge(*maps(device="meta"))
    assert out.device.type == "meta"
    assert out.shape == (2, 3, 4, 4)


# Graph capture -----------------------------------------------------------------------------------


class Merge(torch.nn.Module):
    def forward(self, big, little):
        return merge(big, little)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in testing.SHAPES[:3]:
        big, little = testing.merge_inputs(shape)
        torch.testing.assert_close(compiled(big, little), reference.merge(big, little))


def test_inductor_compiles_it():
    big, little = testing.merge_inputs(SHAPE)
    compiled = torch.compile(merge, fullgraph=True)
    torch.testing.assert_close(compiled(big, little), reference.merge(big, little))


def test_export_sees_plain_operations():
    big, little = testing.merge_inputs(SHAPE)
    program = torch.export.export(copy.deepcopy(Merge()), (big, little))
    assert "blnet" not in str(program.graph)
    assert torch.equal(program.module()(big, little), merge(big, little))


def test_export_with_sizes_left_open_is_right_for_all_of_them():
    dim = torch.export.Dim
    sizes = {0: dim.DYNAMIC, 2: dim.DYNAMIC, 3: dim.DYNAMIC}
    program = torch.export.export(
        Merge(), maps((3, 4, 5, 6), (3, 4, 10, 12)), dynamic_shapes=(sizes, sizes)
    )
    for big, little in (((2, 4, 4, 5), (2, 4, 7, 9)), ((5, 4, 9, 3), (5, 4, 4, 11))):
        arguments = maps(big, little)
        assert torch.equal(program.module()(*arguments), reference.merge(*arguments))


def test_fx_takes_it_as_a_leaf():
    tracer = torch.fx.Tracer(autowrap_functions=(merge,))
    graph = tracer.trace(Merge())
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [merge]


# The kernels, traced for a GPU that is not there -------------------------------------------------


class MergeBackward(torch.nn.Module):
    def __init__(self, *flags):
        super().__init__()
        self.flags = flags

    def forward(self, grad, out):
        results = torch.ops.blnet.merge_backward(grad, out, *self.flags)
        return tuple(result for result in results if result.dim() == 4)


def kernel_calls(module, *arguments):
    graph, _ = aot_export_module(module, arguments, trace_joint=False)
    nodes = graph.graph.nodes
    return [n.kwargs for n in nodes if "triton_kernel_wrapper" in str(n.target)], graph


def test_compiler_sees_the_kernel_and_its_plan(driver, caplog):
    with FakeTensorMode(), caplog.at_level(logging.WARNING):
        big = torch.empty(2, 64, 14, 14, device="cuda").to(memory_format=torch.channels_last)
        little = torch.empty(2, 64, 28, 28, device="cuda").to(memory_format=torch.channels_last)
        big, little = big.bfloat16(), little.bfloat16()
        [forward], graph = kernel_calls(MergeTuple(), big, little)
        [backward], _ = kernel_calls(
            MergeBackward(14, 14, True, True), little, torch.empty_like(little)
        )
        [mask], _ = kernel_calls(
            MergeBackward(28, 28, False, True), little, torch.empty_like(little)
        )
    assert not caplog.records, caplog.text  # PyTorch understood which arguments are written
    assert forward["tensors_to_clone"] == ["p_out"]
    assert backward["tensors_to_clone"] == ["p_dbig", "p_dlittle"]
    assert mask["tensors_to_clone"] == ["p_dlittle"]
    plan = forward_launch((2, 28, 28, 64), (14, 14), 2)
    assert forward["grid"] == [(*plan.grid, 1, 1)]
    assert {**plan.integers, **plan.constants}.items() <= forward["kwargs"].items()
    plan = backward_launch((2, 28, 28, 64), (14, 14), 2, True, True)
    assert {**plan.integers, **plan.constants}.items() <= backward["kwargs"].items()
    copies = [n for n in graph.graph.nodes if "clone" in str(n.target)]
    assert not copies  # the layouts agree: nothing is moved


class MergeTuple(torch.nn.Module):
    def forward(self, big, little):
        return (merge(big, little),)


def test_open_sizes_take_the_general_path_and_add_no_guards(driver):
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, static_shapes=False)
    open_sizes = StatelessSymbolicContext(
        dynamic_sizes=[
            DimDynamic.DYNAMIC,
            DimDynamic.STATIC,
            DimDynamic.DYNAMIC,
            DimDynamic.DYNAMIC,
        ]
    )
    sizes = [
        mode.from_tensor(torch.empty(shape, device="meta"), symbolic_context=open_sizes).shape
        for shape in ((3, 8, 6, 4), (3, 8, 12, 8))
    ]
    with mode:
        big, little = (torch.empty(size, device="cuda") for size in sizes)
        [call], _ = kernel_calls(MergeTuple(), big, little)
    constants = call["kwargs"]
    assert (constants["SAME"], constants["RATIO_H"], constants["WIDE"]) == (False, 0, True)
    # Only what the user's call implies: both maps have the same batch.
    assert all("Eq(" in str(guard.expr) for guard in environment.guards)
    assert len(environment.guards) <= 1


def test_device_guard_leaves_tracing_alone():
    # On a machine without CUDA torch.cuda.device would raise: it must not be entered.
    with FakeTensorMode():
        fake = torch.empty(1, device="cuda")
    for tensor in (fake, torch.empty(1)):
        with launch.device_guard(tensor) as entered:
            assert entered is None


# The launch plan ---------------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", [s for s in testing.SHAPES if all(s.little)], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_tiles_cover_every_element_once(shape, layout, itemsize):
    outer, inner = (shape.n, shape.c) if layout == "channels_last" else (shape.n * shape.c, 1)
    blocked, size_big = (outer, shape.h, shape.w, inner), (shape.h_big, shape.w_big)
    for plan, tile_bytes in (
        (forward_launch(blocked, size_big, itemsize), 8192),
        (backward_launch(blocked, size_big, itemsize, True, True), 2048),
    ):
        rows, columns = plan.constants["BLOCK_ROWS"], plan.constants["BLOCK_INNER"]
        assert rows & (rows - 1) == columns & (columns - 1) == 0
        assert rows * columns * itemsize == tile_bytes
        programs = -(-plan.integers["rows"] // rows) * -(-plan.integers["inner"] // columns)
        assert plan.grid == (programs,)


@pytest.mark.parametrize(
    ("channels", "block"), [(1, 1), (3, 4), (16, 16), (24, 16), (64, 64), (96, 32), (200, 32)]
)
def test_channel_tiles_leave_few_lanes_idle(channels, block):
    assert launch.inner_block(channels) == block


@pytest.mark.parametrize(
    ("shape", "size_big", "wide"),
    [
        ((256, 56, 56, 256), (28, 28), False),
        ((2048, 112, 112, 128), (56, 56), True),  # too many elements
        ((1, 70_000, 1, 1), (35_000, 1), True),  # few, but 70000 x 35000 rows
        ((1, 2, 70_000, 1), (2, 70_000), True),
        ((1, 1, 1, 1), (50_000, 50_000), True),  # big alone is too large
    ],
)
def test_offsets_are_64_bits_where_32_do_not_reach(shape, size_big, wide):
    assert forward_launch(shape, size_big, 2).constants["WIDE"] is wide
    assert backward_launch(shape, size_big, 2, True, True).constants["WIDE"] is wide
