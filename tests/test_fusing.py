"""Putting fused ops into networks: what is found, what is left alone, that nothing else changes."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import blnet
from blnet.fusing import Fused
from blnet.vision import bl_resnet18, bl_resnet50
from helpers.blocks import Block, holds, place_of

KERNELS_DOC = Path(__file__).parents[1] / "docs" / "kernels.md"


def initialised(model: nn.Module) -> nn.Module:
    """Give every normalisation statistics and gains of its own."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.0)
            nn.init.normal_(part.running_mean, std=0.1)
    return model


# Name -> (what makes it, places that run as one op)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # One conv3 a bottleneck (1 + 2, 3 + 2, 5 + 2 in the stages, 3 in the last), 4 merges.
    "bl_resnet50": (lambda: bl_resnet50(num_classes=10), 23),
    "bl_resnet18": (lambda: bl_resnet18(num_classes=10), 4),
    "torchvision": (lambda: torchvision.models.resnet50(num_classes=10), 16),
    "timm": (lambda: timm.create_model("resnet50", num_classes=10), 16),
    "converted": (lambda: blnet.convert(torchvision.models.resnet50(num_classes=10)), 23),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_the_same_with_the_same_keys(name: str) -> None:
    torch.manual_seed(0)
    make, count = NETWORKS[name]
    model = initialised(make())
    fused = blnet.fuse(model)
    assert sum(not fusion.reason for fusion in blnet.fusions(fused)) == count
    assert not any(isinstance(part, Fused) for part in model.modules())
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in model.named_modules()]
    fused.load_state_dict(model.state_dict())
    model.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 64, 48)
    for training in (True, False):
        with torch.no_grad():
            assert torch.equal(fused.train(training)(x), model.train(training)(x))
    for got, expected in zip(fused.buffers(), model.buffers(), strict=True):
        assert torch.equal(got, expected)


def test_gradients_are_those_of_the_plain_network() -> None:
    torch.manual_seed(0)
    config = blnet.BigLittleConfig(widths=(32, 64), depths=(3, 2), stem_width=16, num_classes=5)
    model = initialised(blnet.BigLittleNet(config))
    fused = blnet.fuse(model)
    x = torch.randn(2, 3, 40, 32)
    for network in (model, fused):
        network(x).square().sum().backward()
    for (name, got), expected in zip(fused.named_parameters(), model.parameters(), strict=True):
        assert got.grad is not None, name
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-6)


def test_dla_keeps_its_residuals() -> None:
    torch.manual_seed(0)
    model = initialised(timm.create_model("dla46_c", num_classes=3)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(blnet.fuse(model)(x), model(x))


def test_data_parallel_replicas_stay_fused() -> None:
    fused = blnet.fuse(torchvision.models.resnet50(num_classes=2))
    for module in fused.modules():
        replica = module._replicate_for_data_parallel()
        assert type(replica) is type(module)


def test_a_fused_network_can_be_traced_and_converted() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=4).eval()
    fused, x = blnet.fuse(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(fused)(x), model(x))
        converted = blnet.convert(fused)
        assert converted(x).shape == (1, 4)
    assert not any(isinstance(part, Fused) for part in converted.modules())


def test_a_fused_block_keeps_its_class_and_its_attributes() -> None:
    model = bl_resnet50(num_classes=3)
    fused = blnet.fuse(model)
    block, plain = fused.get_submodule("stages.3.1"), model.get_submodule("stages.3.1")
    assert isinstance(block, type(plain))
    assert isinstance(block, Fused)
    assert block.last_norm is block.bn3
    assert type(block).__name__ == "FusedBottleneck"


@pytest.mark.parametrize("name", ["bl_resnet50", "converted"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_fused(again: Callable[[nn.Module], nn.Module], name: str) -> None:
    make, count = NETWORKS[name]
    fused = blnet.fuse(make()).eval()
    twin = again(fused)
    assert sum(not fusion.reason for fusion in blnet.fusions(twin)) == count
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(twin(x), fused(x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in fused.parameters()}


def test_what_is_kept_beside_the_maps_is_what_the_docs_say() -> None:
    model = bl_resnet50()
    places = blnet.fusions(blnet.fuse(model))
    convs = [cast("nn.Conv2d", model.get_submodule(place.conv)) for place in places]
    kept = sum(8 * conv.in_channels**2 for conv in convs)  # a covariance each, float64
    assert f"{kept / 1e6:.0f} MB in all for bL-ResNet-50" in KERNELS_DOC.read_text()


def test_fusing_twice_and_unfusing() -> None:
    model = bl_resnet18(num_classes=3)
    fused = blnet.fuse(blnet.fuse(model))
    assert sum(isinstance(part, Fused) for part in fused.modules()) == 4
    plain = blnet.unfuse(fused)
    assert [type(part) for part in plain.modules()] == [type(part) for part in model.modules()]
    assert sum(isinstance(part, Fused) for part in fused.modules()) == 4
    reasons = {fusion.reason for fusion in blnet.fusions(plain)}
    assert reasons == {"the network is not fused; call blnet.fuse"}


def test_sync_batch_norm_may_come_before_or_after() -> None:
    torch.manual_seed(0)
    model = bl_resnet18(num_classes=3).eval()
    x = torch.randn(1, 3, 40, 40)
    before = blnet.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
    after = nn.SyncBatchNorm.convert_sync_batchnorm(blnet.fuse(model))
    for network in (before, after):
        assert sum(not fusion.reason for fusion in blnet.fusions(network)) == 4
        with torch.no_grad():
            assert torch.equal(network(x), model(x))


# What is such a place, and what is not ------------------------------------------------------------

ENDS: dict[str, tuple[Callable[[Block, Tensor, Tensor], Tensor], bool]] = {
    "relu of a sum": (lambda b, y, x: b.relu(y + x), True),
    "the other way round": (lambda b, y, x: b.relu(x + y), True),
    "in place": (lambda b, y, x: F.relu_(operator.iadd(y, x)), True),
    "torch.add": (lambda b, y, x: torch.relu(torch.add(x, y)), True),
    "methods": (lambda b, y, x: y.add_(x).relu_(), True),
    "F.relu": (lambda b, y, x: F.relu(y.add(x), inplace=True), True),
    "no activation": (lambda b, y, x: y + x, False),
    "another activation": (lambda b, y, x: F.silu(y + x), False),
    "the sum has two users": (lambda b, y, x: b.relu(s := y + x) * s, False),
}


@pytest.mark.parametrize("name", ENDS)
def test_ways_to_write_the_end_of_a_block(name: str) -> None:
    end, closes = ENDS[name]

    class Own(Block):
        def forward(self, x: Tensor) -> Tensor:
            return end(self, self.norm(self.conv(self.conv1(x))), x)

    fused = holds(Own())
    (place,) = blnet.fusions(fused)
    assert (place.conv, place.norm, place.relu, place.merge) == ("conv", "norm", closes, False)
    assert place.reason == ""
    assert str(place) == "conv + norm + add" + " + relu" * closes


def not_found(block: nn.Module) -> None:
    assert blnet.fusions(blnet.fuse(block)) == []
    holds(block)


def test_what_is_not_such_a_place() -> None:
    class Scaled(Block):
        def forward(self, x: Tensor) -> Tensor:
            return torch.add(self.norm(self.conv(self.conv1(x))), x, alpha=0.5)

    class Constant(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(self.conv1(x))) + 1.0

    class Shared(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(self.conv1(x)))
            return y + x + y.mean()

    class Modal(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(self.conv1(x)))
            return y + x if self.training else y - x

    class Branching(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(self.conv1(x)))
            return y + x if x.sum() > 0 else y

    three = Block(kernel_size=3, padding=1)
    for block in (Scaled(), Constant(), Shared(), Modal(), Branching(), three, nn.Conv2d(16, 8, 1)):
        not_found(block)


def test_a_sum_with_itself_is_no_such_place() -> None:
    class Doubled(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(self.conv1(x)))
            return self.relu(y + y)

    not_found(Doubled())


def test_an_add_that_broadcasts_still_broadcasts() -> None:
    class Gated(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.norm(self.conv(self.conv1(x))) + x.mean((0, 2, 3), keepdim=True))

    assert isinstance(holds(Gated()), Fused)


def test_a_module_that_is_used_twice_is_fused_once() -> None:
    block = Block()
    model = nn.Sequential(block, block)
    fused = holds(model)
    assert fused[0] is fused[1]  # type: ignore[index]


def with_norm(norm: nn.Module) -> Block:
    block = Block()
    block.norm = norm
    return block


def with_hook() -> Block:
    block = Block()
    block.norm.register_forward_hook(lambda module, arguments, output: output * 2)
    return block


class Overwriting(Block):
    """Changes the convolution's input after it has been read and before the add."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        y = self.norm(self.conv(h))
        return y + (self.relu(h).sum() + x)


LEFT = {
    "a bias": (lambda: Block(bias=True), "the convolution has a bias"),
    "groups": (lambda: Block(groups=4), "the convolution has 4 groups"),
    "GroupNorm": (lambda: with_norm(nn.GroupNorm(4, 16)), "GroupNorm is not a plain BatchNorm2d"),
    "a hook": (with_hook, "hooks"),
    "no widening": (lambda: Block(channels=9), "widens by 1.77778, which saves nothing below 2"),
    "in place": (Overwriting, "something may be changed in place"),
}


@pytest.mark.parametrize("name", LEFT)
def test_places_that_are_left_as_they_are_say_why(name: str) -> None:
    make, reason = LEFT[name]
    block = make()
    assert reason in place_of(block).reason
    assert f"left as it is, {place_of(block).reason}" in str(place_of(block))
    assert not isinstance(holds(block), Fused)
