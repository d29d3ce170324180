"""Whole networks through the native engine, against the same network in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import blnet
from blnet.bench.ladder import fold_batch_norm
from blnet.bench.suites.test_speech_models import SpeechSpec
from blnet.kernels.native import status
from blnet.optimizing.native import UnsupportedError, build
from blnet.vision import bl_resnet18, bl_resnet50, bl_seresnext50_32x4d

pytestmark = pytest.mark.skipif(not status().works, reason=f"{status().reason}")

TOLERANCE = 1e-4


def ready(model):
    """Give a network weights and statistics that no step may leave out, in evaluation mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0.0, 0.1)
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def check(model, x):
    model = ready(model)
    run = build(model, x)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
    out = run(x)
    assert out.dtype == torch.float32
    assert out.shape == expected.shape
    assert float((out.double() - expected).abs().max() / expected.abs().max()) < TOLERANCE
    return run


def speech(name, *options, **more):
    return SpeechSpec(name, *options, "resnet22", **more).build()


def ours(function, **options):
    return lambda: function(num_classes=10, **options)


def torchvision_resnet(name):
    import torchvision

    return getattr(torchvision.models, name)(num_classes=10)


def timm_network(name):
    import timm

    return timm.create_model(name, num_classes=10)


NETWORKS = {
    "bl_resnet18": (ours(bl_resnet18, alpha=2, beta=2), (2, 3, 65, 47)),
    "bl_resnet50": (ours(bl_resnet50, alpha=2, beta=4), (1, 3, 97, 61)),
    "bl_resnet50 of a batch": (ours(bl_resnet50, alpha=4, beta=4), (2, 3, 192, 160)),
    "bl_seresnext50": (ours(bl_seresnext50_32x4d, alpha=2, beta=4), (1, 3, 64, 64)),
    "torchvision 18": (lambda: torchvision_resnet("resnet18"), (2, 3, 64, 95)),
    "torchvision 50": (lambda: torchvision_resnet("resnet50"), (1, 3, 64, 64)),
    "timm resnet50d": (lambda: timm_network("resnet50d"), (1, 3, 64, 64)),
    "timm seresnet50": (lambda: timm_network("seresnet50"), (2, 3, 64, 64)),
    "converted": (
        lambda: blnet.convert(torchvision_resnet("resnet18"), alpha=2, beta=2),
        (1, 3, 80, 64),
    ),
    "speech": (lambda: speech("resnet22", None, None), (2, 1, 64, 101)),
    "speech pyramid": (lambda: speech("bl_resnet22", 4, 1, pyramid=True), (1, 1, 64, 100)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_it_computed(name):
    make, shape = NETWORKS[name]
    check(make(), torch.randn(shape))


def test_what_follows_a_convolution_is_part_of_it():
    model = ready(bl_resnet50(alpha=2, beta=4, num_classes=10))
    steps = build(model, torch.randn(1, 3, 128, 128)).steps
    kinds = [step.split()[0] for step in steps]
    assert set(kinds) == {"conv", "average", "write"}
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    assert kinds.count("conv") == layers
    assert kinds.count("average") == 7  # six shortcuts and the end
    assert sum(" + upsampled + relu" in step for step in steps) == 3
    assert sum("winograd" in step for step in steps) >= 8


def test_folded_networks_and_channels_last_inputs():
    model = ready(bl_resnet18(alpha=2, beta=2, num_classes=10))
    x = torch.randn(2, 3, 64, 64)
    out = build(fold_batch_norm(model, x), x.contiguous(memory_format=torch.channels_last))(x)
    torch.testing.assert_close(out, build(model, x)(x), rtol=1e-4, atol=1e-4)
    last = build(model, x)(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(last, build(model, x)(x))


class Odd(nn.Module):
    """A block that does one thing of the caller's between two convolutions."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.norm = nn.Conv2d(5, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.last = nn.Conv2d(20, 20, 1)

    def forward(self, x):
        return self.last(self.function(self.first(x), self))


PIECES = {
    "a norm after a ReLU": lambda x, m: m.norm(x.relu()).relu(),
    "read twice": lambda x, m: x.relu() + x,
    "added to itself": lambda x, m: x + x,
    "a ReLU of what others read": lambda x, m: m.norm(x).relu() + m.last(x),
    "resized both ways": lambda x, m: F.interpolate(F.interpolate(x, (4, 5)), (11, 7)).relu() + x,
    "scaled by torch's rounding": lambda x, m: F.interpolate(x, scale_factor=(1.3, 0.7)),
    "ceil mode": lambda x, m: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "ceil mode, padding": lambda x, m: F.avg_pool2d(x, (3, 2), 2, 1, ceil_mode=True),
    "divisor": lambda x, m: F.avg_pool2d(x, 2, divisor_override=3),
    "max pool": lambda x, m: F.max_pool2d(x, (3, 2), 2, 1, ceil_mode=True),
    "adaptive": lambda x, m: F.adaptive_avg_pool2d(x, (3, 5)),
    "gates": lambda x, m: (x.mean((2, 3), keepdim=True)).sigmoid() * x,
    "dropout": lambda x, m: F.dropout(x, 0.5, training=m.training).clone(),
}


@pytest.mark.parametrize("name", PIECES)
def test_one_operation_at_a_time(name):
    check(Odd(PIECES[name]), torch.randn(2, 5, 11, 7))


REFUSED = {
    "tanh": lambda x, m: x.tanh(),
    "convolution": lambda x, m: F.conv2d(x, m.last.weight, dilation=2),
    "mul": lambda x, m: x * 2,
    "add": lambda x, m: x + 1,
    "flip": lambda x, m: x.flip(1),
    "max_pool2d": lambda x, m: F.max_pool2d(x, 3, dilation=2),
    "exported": lambda x, m: x if x.sum() > 0 else -x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_that_is_not_there_is_named(name):
    with pytest.raises(UnsupportedError, match=name) as caught:
        build(Odd(REFUSED[name]).eval(), torch.randn(1, 5, 11, 7))
    assert "take another engine" in str(caught.value)


def test_wrong_inputs_and_modes():
    model = bl_resnet18(alpha=2, beta=2, num_classes=10)
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        build(model, x)
    with pytest.raises(ValueError, match="takes float32 maps"):
        build(model.eval(), x.double())
    run = build(model, x)
    with pytest.raises(ValueError, match=r"build one for this shape"):
        run(torch.randn(2, 3, 64, 64))
    assert not run(x).requires_grad


def test_weights_changed_afterwards_do_not_matter():
    model, x = ready(bl_resnet18(alpha=2, beta=2, num_classes=10)), torch.randn(1, 3, 64, 64)
    run = build(model, x)
    before = run(x)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert torch.equal(run(x), before)
    assert before.abs().max() > 0
