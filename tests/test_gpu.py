"""What only a GPU can show. On a machine without one the file says so and is skipped."""

from __future__ import annotations

import copy

import pytest
import torch

import blnet
from blnet.kernels import merge, reference, testing, use_backend
from blnet.vision import bl_resnet50

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA or ROCm device here", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def network(**options: object) -> blnet.BigLittleNet:
    torch.manual_seed(0)
    model = bl_resnet50(num_classes=10, **options)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.0)
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


def test_a_whole_network_agrees_with_float64() -> None:
    model = network().eval()
    x = images()
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        testing.assert_close(model(x), truth, dtype=torch.float16, what="logits")


@pytest.mark.parametrize("training", [False, True])
def test_kernels_and_torch_agree_in_a_network(training: bool) -> None:
    model, x = network().train(training), images()
    losses, gradients = [], []
    for name in ("triton", "torch"):
        twin = copy.deepcopy(model)
        with use_backend(name):
            loss = twin(x).square().mean()
            loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-5)
    assert testing.relative_error(gradients[0], gradients[1]) < 2e-2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compile_without_a_graph_break(training: bool, backend: str) -> None:
    model, x = network().train(training), images()
    with use_backend(backend), torch.set_grad_enabled(training):
        expected = copy.deepcopy(model)(x)
        actual = torch.compile(model, fullgraph=True)(x)
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
        if training:
            actual.sum().backward()


def test_a_cuda_graph_replays_a_network() -> None:
    model, x = network().eval().bfloat16(), images().bfloat16()
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


def test_autocast_trains() -> None:
    model, x = network().train(), images()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
