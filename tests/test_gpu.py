"""What only a GPU can show. On a machine without one the file says so and is skipped."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import blnet
from blnet.fusing import Fused
from blnet.kernels import merge, reference, testing, use_backend
from blnet.vision import bl_resnet50

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA or ROCm device here", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FUSED = (False, True)  # without blnet.fuse, and with it


@pytest.fixture(autouse=True)
def exact_and_repeatable() -> Iterator[None]:
    """Keep PyTorch's own convolutions to float32, as the kernels do, and to the same bits."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield


def network(fused: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = bl_resnet50(num_classes=10)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.0)
    if fused:
        model = blnet.fuse(model)
    return model.cuda().to(memory_format=torch.channels_last)


def images(batch: int = 4, size: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(batch, 3, size, size, generator=generator)
    return pictures.cuda().contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_merge_forward_and_backward(shape: testing.Shape, layout: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = testing.merge_inputs(shape, dtype, layout, "cuda", generator)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    truths = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with testing.poisoned_outputs():
        out = merge(*leaves)
        upstream = torch.randn(out.shape, generator=generator).to("cuda", dtype)
        gradients = torch.autograd.grad(out, leaves, upstream)
    truth = reference.merge(*truths)
    testing.assert_close(out, truth, what="out")
    # The mask is the rounded output's: a sum that rounds to zero passes no gradient.
    masked = torch.where(out > 0, upstream, torch.zeros_like(upstream)).double()
    expected = torch.autograd.grad(
        reference.upsample_nearest(truths[0], shape.little[2:]) + truths[1], truths, masked
    )
    for name, gradient, wanted in zip(("dbig", "dlittle"), gradients, expected, strict=True):
        testing.assert_close(gradient, wanted, what=name)


def test_bits_repeat() -> None:
    big, little = testing.merge_inputs(testing.SHAPES[0], torch.bfloat16, device="cuda")
    leaves = [big.requires_grad_(), little.requires_grad_()]
    upstream = torch.randn_like(little)
    runs = [torch.autograd.grad(merge(*leaves), leaves, upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("fused", FUSED)
def test_a_whole_network_agrees_with_float64(fused: bool) -> None:
    model = network(fused).eval()
    x = images()
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        testing.assert_close(model(x), truth, dtype=torch.float16, what="logits")


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("training", [False, True])
def test_kernels_and_torch_agree_in_a_network(training: bool, fused: bool) -> None:
    model, x = network(fused).train(training), images()
    results = {}
    for name in ("triton", "torch", "float64"):
        twin, pictures = copy.deepcopy(model), x
        if name == "float64":
            twin, pictures = twin.double(), x.double()
        with use_backend(name if name == "triton" else "torch"):
            loss = twin(pictures).square().mean()
            loss.backward()
        gradient = torch.cat([p.grad.flatten().double() for p in twin.parameters()])
        results[name] = (loss.detach(), gradient)
    truth = results["float64"]
    testing.assert_close(results["triton"][0], truth[0], dtype=torch.float16, what="loss")
    # Rounding flips ReLUs of so deep a network, in PyTorch's own way of running it as well.
    errors = {name: testing.relative_error(results[name][1], truth[1]) for name in results}
    assert errors["triton"] <= 2 * errors["torch"] + 1e-2, errors


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("training", [False, True])
def test_a_whole_network_compiles_without_a_graph_break(training: bool, fused: bool) -> None:
    model, x = network(fused).train(training), images()
    twin = copy.deepcopy(model)
    with torch.set_grad_enabled(training):
        expected = twin(x)
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
        if training:
            actual.sum().backward()


@pytest.mark.parametrize("fused", FUSED)
def test_a_cuda_graph_replays_a_network(fused: bool) -> None:
    model, x = network(fused).eval().bfloat16(), images().bfloat16()
    with torch.inference_mode():
        expected = model(x).clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(out, expected)


def test_a_cuda_graph_replays_a_training_step() -> None:
    model, x = network(fused=True).train(), images()
    twin = copy.deepcopy(model)

    def step(net: torch.nn.Module) -> None:
        net.zero_grad(set_to_none=True)
        net(x).square().mean().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(model)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model)
    graph.replay()
    step(twin)  # running statistics differ by now, gradients of a batch do not depend on them
    torch.cuda.synchronize()
    got, expected = (
        torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (model, twin)
    )
    assert testing.relative_error(got, expected) < 5e-2  # see above: ReLUs may flip


def test_bits_of_a_fused_training_step_repeat() -> None:
    tails = [part for part in network(fused=True).modules() if isinstance(part, Fused)]
    block = copy.deepcopy(tails[-1]).train()  # a whole bottleneck of the last stage
    x = torch.randn(8, 2048, 7, 7, device="cuda").contiguous(memory_format=torch.channels_last)
    runs = []
    for _ in range(2):
        twin = copy.deepcopy(block)
        twin(x).square().mean().backward()
        runs.append([p.grad for p in twin.parameters()] + list(twin.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_fused_training_saves_less() -> None:
    held = []
    for fused in FUSED:
        # Large enough for the statistics' K x K matrices not to count.
        model, x = network(fused).train().bfloat16(), images(32, 224).bfloat16()
        model(x).sum().backward()  # what is made once: handles, gradients
        before = torch.cuda.memory_allocated()
        out = model(x)
        held.append(torch.cuda.memory_allocated() - before)
        del out
    assert held[1] < 0.8 * held[0]


@pytest.mark.parametrize("fused", FUSED)
def test_autocast_trains(fused: bool) -> None:
    model, x = network(fused).train(), images()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Last, as compiling takes longest: whatever time runs out must not hide the rest.
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("backend", "fused"), [("triton", False), ("triton", True), ("torch", False)]
)
def test_inductor_compiles_a_stage(training: bool, backend: str, fused: bool) -> None:
    # A Big-Little stage, because Inductor takes minutes for a network.
    model, x = network(fused).get_submodule("stages.0").train(training), images(4, 224)
    x = torch.nn.functional.interpolate(x[:, :1], scale_factor=0.25).expand(-1, 64, -1, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    with use_backend(backend), torch.set_grad_enabled(training):
        expected = copy.deepcopy(model)(x)
        actual = torch.compile(model, fullgraph=True)(x)
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
        if training:
            actual.sum().backward()
