"""expand_merge among PyTorch's operators: BatchNorm's options, compile, export, autocast, FLOPs."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from blnet.kernels import expand_merge, expand_merge_train, reference, testing, use_backend
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
