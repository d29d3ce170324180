"""What only a GPU can show of `blnet.optimize`: fused ops, CUDA graphs, two streams."""

from __future__ import annotations

import pytest
import torch

import blnet
from blnet.kernels import merge, testing
from blnet.optimizing.choosing import difference, tolerance
from blnet.optimizing.graphs import captured_where_made
from blnet.vision import bl_resnet50

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA or ROCm device here", allow_module_level=True)


def images(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(4, 3, 96, 96, generator=generator)
    return pictures.cuda().contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("built", [True, False], ids=["inference mode", "no_grad"])
def test_every_captured_way_is_right_and_streams_take_turns(built: bool) -> None:
    torch.manual_seed(0)
    model = bl_resnet50(num_classes=10).cuda().eval()
    with torch.inference_mode(built):
        fast = blnet.optimize(model, example_input=images(0), engine="kernels", graph=True)
    assert [trial.note for trial in fast.report.trials] == ["", ""], "one stream, and two"
    here, others = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in range(2)]
    pictures = [images(seed) for seed in range(6)]
    with torch.no_grad():
        expected = [model(x) for x in pictures]
        results = []
        for number, x in enumerate(pictures):
            stream = (here, *others)[number % 3]
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                results.append(fast(x))
        torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert difference(result, right) <= tolerance(torch.float32, right.device)


def test_a_backward_pass_by_itself_is_captured() -> None:
    big, little = testing.merge_inputs(testing.SHAPES[0], torch.bfloat16, device="cuda")
    leaves = [big.requires_grad_(), little.requires_grad_()]
    upstream = torch.randn_like(little)
    expected = torch.autograd.grad(merge(*leaves), leaves, upstream)

    def make():  # type: ignore[no-untyped-def]
        out = merge(*leaves)
        return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    captured = captured_where_made(make)
    for gradient in expected:  # what the replay does not write is not there by chance
        assert gradient.any()
    replayed = captured()
    for gradient in replayed:
        gradient.zero_()
    replayed = captured()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))
