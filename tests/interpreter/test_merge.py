"""merge's kernels, forward and backward, in Triton's interpreter against float64."""

import copy
import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from blnet.kernels import launch, merge, reference, testing, use_backend
from blnet.kernels.triton_shim import tl, triton
from helpers.drawing import DTYPES, fresh

# "blnet.kernels.merge" as an attribute is the function; this is the module.
merge_module = importlib.import_module("blnet.kernels.merge")

EXAMPLES = 70  # of each dtype, the same in every run
FRESH = fresh(8)  # of each dtype, others in every run

SMALL = testing.Shape(2, 5, 6, 7, 3, 4, "small, odd, several windows")


def run(function, big, little, grad):
    big, little = big.detach().requires_grad_(), little.detach().requires_grad_()
    out = function(big, little)
    return [out.detach(), *torch.autograd.grad(out, (big, little), grad)]


def truth_of(big, little, grad):
    return run(reference.merge, big.double(), little.double(), grad.double())


def check(big, little, grad, against_eager=True):
    with testing.poisoned_outputs():
        ours = run(merge, big, little, grad)
    eager = run(reference.merge, big, little, grad)
    truth = truth_of(big, little, grad)
    names = ("out", "dbig", "dlittle")
    for name, got, plain, expected in zip(names, ours, eager, truth, strict=True):
        testing.assert_close(got, expected, what=name)
        assert got.dtype == big.dtype
        if against_eager and big.dtype is not torch.float32:
            testing.assert_no_worse(got, plain, expected, what=name)
    return ours


def inputs(shape, dtype=torch.float32, layout="channels_last", number=0):
    generator = torch.Generator().manual_seed(number)
    big, little = testing.merge_inputs(shape, dtype, layout, "cpu", generator)
    return big, little, testing.draw(shape.little, dtype, "contiguous", "cpu", generator)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_matrix(shape, dtype, layout):
    big, little, grad = inputs(shape, dtype, layout)
    out, dbig, dlittle = check(big, little, grad)
    expected = launch.memory_format_of(little)
    for result in (out, dlittle):
        assert result.is_contiguous(memory_format=expected)
    if dbig.numel():  # an empty map's strides mean nothing
        assert dbig.is_contiguous() or dbig.is_contiguous(memory_format=torch.channels_last)


@st.composite
def shapes(draw):
    # Up to three times and a bit: the interpreter takes a loop iteration for each pixel of a
    # window, and the table of shapes has the extreme ratios.
    h_big, w_big = draw(st.integers(1, 8) | st.just(17)), draw(st.integers(1, 8))
    h, w = (draw(st.integers(1, min(3 * size + 2, 20))) for size in (h_big, w_big))
    n, c = draw(st.integers(0, 2)), draw(st.sampled_from([1, 2, 3, 5, 16, 17, 40]))
    return testing.Shape(n, c, h, w, h_big, w_big, "drawn")


DRAWN = {
    "shape": shapes(),
    "layout": st.sampled_from(testing.LAYOUTS),
    "number": st.integers(0, 2**16),
}
QUIET = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def drawn_case(shape, dtype, layout, number):
    # Single elements can beat or lose to eager by chance: only the matrix compares with it.
    check(*inputs(shape, dtype, layout, number), against_eager=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@seed(20_250_101)
@settings(max_examples=EXAMPLES, **QUIET)
@given(**DRAWN)
def test_drawn_shapes(dtype, shape, layout, number):
    drawn_case(shape, dtype, layout, number)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=FRESH, **QUIET)
@given(**DRAWN)
def test_drawn_shapes_with_a_fresh_seed(dtype, shape, layout, number):
    drawn_case(shape, dtype, layout, number)


def test_indices_whose_products_pass_32_bits():
    # 70000 x 35001 is above 2**31 although neither map has many elements.
    shape = testing.Shape(1, 1, 70_000, 1, 35_001, 1, "index arithmetic")
    big, little, grad = inputs(shape)
    plan = merge_module.forward_launch((1, 70_000, 1, 1), (35_001, 1), 4)
    assert plan.constants["WIDE"]
    check(big, little, grad)


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_64_bit_offsets_give_the_same_bits(shape, monkeypatch):
    big, little, grad = inputs(shape)
    narrow = check(big, little, grad)
    monkeypatch.setattr(launch, "INT32_LIMIT", 0)
    wide = check(big, little, grad)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_bits_repeat():
    big, little, grad = inputs(testing.SHAPES[7], torch.bfloat16)
    first, second = (run(merge, big, little, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_has_the_bits_of_eager_pytorch(dtype):
    # One addition, rounded once: there is nothing to differ in.
    big, little, grad = inputs(testing.SHAPES[0], dtype)
    ours, eager = run(merge, big, little, grad), run(reference.merge, big, little, grad)
    assert torch.equal(ours[0], eager[0])
    assert torch.equal(ours[2], eager[2])


@pytest.mark.parametrize("size_big", [(2, 2), (4, 4)], ids=["doubling", "same"])
def test_nan_infinity_and_ties_are_those_of_torch_relu(size_big):
    inf, nan = float("inf"), float("nan")
    little = torch.randn(1, 1, 4, 4)
    little[0, 0, 0] = torch.tensor([nan, inf, -inf, 1.0])
    big = torch.randn(1, 1, *size_big)
    big[0, 0, 0, 1] = -inf
    little[0, 0, 3, 3] = -big[0, 0, -1, -1]  # the sum is exactly 0: gradient 0
    grad = torch.randn(1, 1, 4, 4)
    ours, eager = run(merge, big, little, grad), run(reference.merge, big, little, grad)
    for got, expected in zip(ours, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert ours[2][0, 0, 3, 3] == 0


@pytest.mark.parametrize("shape", [testing.SHAPES[0], testing.SHAPES[2], SMALL], ids=str)
@pytest.mark.parametrize("wanted", ["big", "little"])
def test_one_gradient_alone(shape, wanted):
    big, little, grad = inputs(shape)
    expected = dict(zip(("big", "little"), truth_of(big, little, grad)[1:], strict=True))
    leaves = {"big": big, "little": little}
    leaves[wanted].requires_grad_()
    with testing.poisoned_outputs():
        merge(**leaves).backward(grad)
    testing.assert_close(leaves[wanted].grad, expected[wanted])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_equal_sizes_share_one_gradient_safely():
    big, little, grad = inputs(testing.SHAPES[2])
    big.requires_grad_()
    little.requires_grad_()
    merge(big, little).backward(grad)
    expected = little.grad.clone()
    big.grad.mul_(0)  # an optimiser or a hook may write to one of them
    assert torch.equal(little.grad, expected)
    x = big.detach().requires_grad_()
    merge(x, x).backward(grad)
    doubled = run(lambda a, b: torch.relu(a + b), x, x, grad)
    torch.testing.assert_close(x.grad, doubled[1] + doubled[2])


@pytest.mark.parametrize("view", ["expanded", "transposed", "channels_last"])
def test_upstream_gradients_of_any_layout(view):
    big, little, _ = inputs(SMALL)
    grad = {
        "expanded": torch.randn(1, 1, 1, 1).expand(SMALL.little),
        "transposed": torch.randn(SMALL.little[::-1]).permute(3, 2, 1, 0),
        "channels_last": torch.randn(SMALL.little).to(memory_format=torch.channels_last),
    }[view]
    check(big, little, grad)


def test_finite_differences():
    big, little, grad = inputs(SMALL)
    little = little.sign() * (little.abs() + 2)  # far from the corner of relu
    big = big.clamp(-1, 1)
    _, dbig, dlittle = run(merge, big, little, grad)
    step = 0.25  # exact in float32, and merge is linear between corners
    for tensor, gradient in ((big, dbig), (little, dlittle)):
        for index in [(0, 0, 0, 0), (1, 4, 2, 3), (1, 2, 1, 1)]:
            values = []
            for sign in (step, -step):
                tensor[index] += sign
                values.append((merge(big, little).double() * grad.double()).sum())
                tensor[index] -= sign
            measured = (values[0] - values[1]) / (2 * step)
            torch.testing.assert_close(gradient[index].double(), measured, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "mixed"])
@pytest.mark.parametrize("shape", [testing.SHAPES[0], testing.SHAPES[2], SMALL], ids=str)
def test_opcheck(shape, layout):
    big, little, grad = inputs(shape, layout=layout)
    leaves = (big.requires_grad_(), little.requires_grad_())
    torch.library.opcheck(torch.ops.blnet.merge.default, leaves)
    out = merge(big, little).detach()
    for flags in ((True, True), (False, True), (True, False)):
        arguments = (grad, out, shape.h_big, shape.w_big, *flags)
        # Its gradient is refused, which opcheck's autograd test would count as a failure.
        torch.library.opcheck(
            torch.ops.blnet.merge_backward.default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in (testing.SHAPES[0], testing.SHAPES[1], testing.SHAPES[2]):
        big, little, grad = inputs(shape, torch.bfloat16)
        ours, plain = run(compiled, big, little, grad), run(merge, big, little, grad)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_compile_keeps_the_op_in_the_graph():
    graphs = []

    def remember(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    big, little, _ = inputs(SMALL)
    compiled = torch.compile(lambda b, s: merge(b, s) + 1, fullgraph=True, backend=remember)
    torch.testing.assert_close(compiled(big, little), merge(big, little) + 1)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("blnet.merge" in target for target in targets) == 1
    with use_backend("torch"):  # the choice is guarded on: no stale graph
        compiled(big, little)
    assert "blnet.merge" not in str([node.target for node in graphs[1].graph.nodes])


class Merge(torch.nn.Module):
    def forward(self, big, little):
        return merge(big, little)


def test_export_and_deepcopy_keep_the_op():
    big, little, _ = inputs(testing.SHAPES[0])
    program = torch.export.export(copy.deepcopy(Merge()), (big, little))
    assert "blnet.merge" in str(program.graph)
    assert torch.equal(copy.deepcopy(program.module())(big, little), merge(big, little))


def test_autocast_promotes_to_the_wider():
    big, little, _ = inputs(SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = merge(big.bfloat16(), little)
        assert out.dtype is torch.float32
        assert merge(big.bfloat16(), little.bfloat16()).dtype is torch.bfloat16
        assert merge(big.bfloat16(), little.half()).dtype is torch.float32  # as torch.add
    testing.assert_close(out, reference.merge(big.bfloat16().double(), little.double()))
    with pytest.raises(ValueError, match=r"merge: big is torch\.bfloat16 and little is torch\.f"):
        merge(big.bfloat16(), little)


def test_gradients_under_autocast_return_in_their_own_dtype():
    big, little, grad = inputs(SMALL)
    low = big.bfloat16().requires_grad_()
    little.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge(low, little).backward(grad)
    assert low.grad.dtype is torch.bfloat16
    _, dbig, dlittle = truth_of(low, little, grad)
    testing.assert_close(low.grad, dbig)
    testing.assert_close(little.grad, dlittle)


def test_second_derivatives_are_refused():
    big, little, _ = inputs(SMALL)
    little.requires_grad_()
    big.requires_grad_()
    scale = torch.ones((), requires_grad=True)
    (first,) = torch.autograd.grad((merge(big, little) * scale).sum(), little, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only; call .*use_backend"):
        first.sum().backward()


def test_checkpointing():
    big, little, grad = inputs(SMALL)
    plain = run(merge, big, little, grad)
    again = run(lambda b, s: checkpoint(merge, b, s, use_reentrant=False), big, little, grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_flop_count_does_not_depend_on_the_backend():
    big, little, grad = inputs(SMALL)
    weight = torch.randn(5, 5, 1, 1)
    counts = []
    for backend in ("interpret", "torch"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            run(lambda b, s: merge(torch.conv2d(b, weight), s), big, little, grad)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_float64_runs_on_torch_unless_forced():
    big, little, _ = inputs(SMALL, torch.float64)
    assert torch.equal(merge(big, little), reference.merge(big, little))
    with (
        use_backend("interpret"),
        pytest.raises(ValueError, match=r"'interpret' cannot run torch\.float64.*float32"),
    ):
        merge(big, little)


def test_forced_interpreter_refuses_other_devices():
    big, little, _ = inputs(SMALL)
    with use_backend("interpret"), pytest.raises(ValueError, match="on device 'meta'; move them"):
        merge(big.to("meta"), little.to("meta"))
    with pytest.raises(ValueError, match=r"'triton' does not work here because TRITON_INTERPRET"):
        use_backend("triton")


# The tests above are only worth something if a broken kernel fails them. ------------------------


@triton.jit
def _adds_wrongly(
    p_big, p_little, p_out, rows, inner, height, width, height_big, width_big,
    SAME: tl.constexpr, RATIO_H: tl.constexpr, RATIO_W: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    o_tile = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_tile = o_tile < rows
    b_out = tl.load(p_little + o_tile, mask=m_tile) - tl.load(p_big + o_tile, mask=m_tile)
    tl.store(p_out + o_tile, tl.where(b_out <= 0, 0.0, b_out), mask=m_tile)


@triton.jit
def _forgets_the_last(
    p_big, p_little, p_out, rows, inner, height, width, height_big, width_big,
    SAME: tl.constexpr, RATIO_H: tl.constexpr, RATIO_W: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    o_tile = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_tile = o_tile < rows - 1
    b_out = tl.load(p_little + o_tile, mask=m_tile) + tl.load(p_big + o_tile, mask=m_tile)
    tl.store(p_out + o_tile, tl.where(b_out <= 0, 0.0, b_out), mask=m_tile)


@pytest.mark.parametrize("kernel", [_adds_wrongly, _forgets_the_last], ids=lambda k: k.__name__)
def test_a_broken_kernel_is_caught(kernel, monkeypatch):
    big, little, grad = inputs(testing.SHAPES[2])
    check(big, little, grad)
    monkeypatch.setattr(merge_module, "_forward_kernel", kernel)
    with pytest.raises(AssertionError, match=r"out: .* elements are off"):
        check(big, little, grad)


def test_a_window_cut_short_is_caught(monkeypatch):
    plan = merge_module.backward_launch

    def one_column_short(shape, size_big, *rest):
        good = plan(shape, size_big, *rest)
        return launch.Launch(good.grid, good.integers, {**good.constants, "RATIO_W": 1})

    big, little, grad = inputs(testing.SHAPES[0])
    monkeypatch.setattr(merge_module, "backward_launch", one_column_short)
    with pytest.raises(AssertionError, match=r"d(big|little): .* elements are off"):
        check(big, little, grad)
