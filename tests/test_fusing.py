"""Putting fused ops into networks: what is found, what is left alone, that nothing else changes."""

from __future__ import annotations

import copy
import operator
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import blnet
from blnet.fusing import Fused, Fusion
from blnet.vision import bl_resnet18, bl_resnet50

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


class Block(nn.Module):
    """A residual block whose end tests vary."""

    def __init__(self, channels: int = 8, width: int = 16, **conv: object) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 1)
        self.conv = nn.Conv2d(channels, width, **{"kernel_size": 1, "bias": False, **conv})  # type: ignore[arg-type]
        self.norm: nn.Module = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(self.conv1(x))) + x)


def place_of(block: nn.Module) -> Fusion:
    (place,) = blnet.fusions(blnet.fuse(block))
    return place


def holds(block: nn.Module, x: Tensor | None = None) -> nn.Module:
    """Assert that a block's fused copy computes what it computes, and return the copy."""
    x = torch.randn(2, 16, 5, 7) if x is None else x
    fused = blnet.fuse(block)
    for training in (True, False):
        assert torch.equal(fused.train(training)(x), block.train(training)(x))
    return fused


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


# Code that a graph cannot stand for ---------------------------------------------------------------


class Optional(Block):
    """timm's DLA: the residual is the input unless one is given."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        shortcut = x if shortcut is None else shortcut
        return self.relu(self.norm(self.conv(self.conv1(x))) + shortcut)


class Random(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.conv1(x)))
        return self.relu(y + x) * (0.0 if self.training and random.random() < 0.5 else 1.0)


class Noisy(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(self.conv1(x))) + x) * torch.rand(1)


class Counting(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.relu(self.norm(self.conv(self.conv1(x))) + x)


class Keeping(Block):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(y := self.norm(self.conv(self.conv1(x))))
        return self.relu(y + x)


class OfLayersMode(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(self.conv1(x))) + x)
        return y * 2 if self.norm.training else y


class Buffered(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.relu(self.norm(self.conv(self.conv1(x))) + x)


class Freezing(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return self.relu(self.norm(self.conv(self.conv1(x))) + x)


class Island(Block):
    """Runs its end in float32 whatever autocast says outside."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.relu(self.norm(self.conv(self.conv1(x.float()))) + x)


class WithoutGradient(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.norm(self.conv(self.conv1(x)))
        return self.relu(y + x)


class AsksForGradient(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(self.conv1(x))) + x)
        return y if torch.is_grad_enabled() else y * 2


class Replayed(Block):
    def forward(self, x: Tensor) -> Tensor:
        inner = checkpoint(lambda v: self.norm(self.conv(v)), self.conv1(x), use_reentrant=False)
        result: Tensor = self.relu(inner + x)
        return result


class AsksForTypes(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2 if isinstance(x, Tensor) else x
        return self.relu(self.norm(self.conv(self.conv1(x))) + y)


class Swallowing(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.conv1(x)))
        try:
            if x.shape[0] > 1:
                x = x * 2
        except Exception:
            pass
        return self.relu(y + x)


REFUSED = [
    Optional, Random, Noisy, Counting, Keeping, OfLayersMode, Buffered, Freezing, Island,
    WithoutGradient, AsksForGradient, Replayed, AsksForTypes, Swallowing,
]  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_code_that_a_graph_cannot_stand_for_is_left_alone(kind: type[Block]) -> None:
    for _ in range(20):  # the random one must not slip through by chance
        block = kind()
        states = random.getstate(), torch.get_rng_state()
        assert not isinstance(blnet.fuse(block), Fused)
        assert blnet.fusions(block) == []
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert getattr(block, "calls", 0) == len(getattr(block, "kept", [])) == 0
        assert block.training
        assert block.norm.training
        assert getattr(block, "seen", 0) == 0


def test_dla_keeps_its_residuals() -> None:
    torch.manual_seed(0)
    model = initialised(timm.create_model("dla46_c", num_classes=3)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(blnet.fuse(model)(x), model(x))


class Aliased(Block):
    """x += y changes what skip holds as well."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        skip = x
        x += self.norm(self.conv(self.conv1(x)))
        return self.relu(x) + skip


class Unused(Block):
    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        identity.add_(self.norm(self.conv(self.conv1(x))))
        return F.relu(identity)


class ViewCleared(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        y = self.norm(self.conv(h))
        h.view(-1).zero_()
        return self.relu(y + x)


class WrittenInto(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        y = self.norm(self.conv(h))
        torch.mul(h, 0, out=h)
        return self.relu(y + x)


class BigCleared(Block):
    def forward(self, x: Tensor) -> Tensor:
        big = x.clone()
        y = self.norm(self.conv(self.conv1(x))) + big
        big.mul_(0)
        return self.relu(y) + big


@pytest.mark.parametrize("kind", [Aliased, Unused, ViewCleared, WrittenInto, BigCleared])
@torch.no_grad()
def test_changes_in_place_are_seen(kind: type[Block]) -> None:
    torch.manual_seed(0)
    assert not isinstance(holds(kind()), Fused)
    assert "in place" in place_of(kind()).reason


def test_an_add_in_place_fuses_the_summand_that_it_changes() -> None:
    # As in the first block of a wide ResNet, whose shortcut widens more than its last convolution.
    class Wide(Block):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(self.conv1(x)))
            y += self.down(x[:, :4])
            return self.relu(y)

    (place,) = blnet.fusions(holds(Wide()))
    assert (place.conv, place.reason) == ("conv", "")


def test_a_sum_with_itself_is_no_such_place() -> None:
    class Doubled(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(self.conv1(x)))
            return self.relu(y + y)

    not_found(Doubled())


def test_a_users_layer_that_reads_the_same_map_may_change_it() -> None:
    class Clearing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(0)

    class Own(Block):
        def __init__(self) -> None:
            super().__init__()
            self.clearing = Clearing()

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv1(x)
            y = self.norm(self.conv(h))
            self.clearing(h)
            return self.relu(y + x)

    with torch.no_grad():
        assert not isinstance(holds(Own()), Fused)


def test_data_parallel_replicas_stay_fused() -> None:
    fused = blnet.fuse(torchvision.models.resnet50(num_classes=2))
    for module in fused.modules():
        replica = module._replicate_for_data_parallel()
        assert type(replica) is type(module)


def test_a_parametrization_of_a_blocks_own_parameter_leaves_its_class_alone() -> None:
    class Gained(Block):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.norm(self.conv(self.conv1(x))) + x) * self.gain

    block, x = Gained(), torch.randn(2, 16, 3, 3)
    fused = blnet.fuse(block)
    for twin in (block, fused):
        nn.utils.parametrize.register_parametrization(twin, "gain", nn.Tanh())
    assert "gain" not in vars(Gained)
    assert torch.equal(fused(x), block(x))
    nn.utils.parametrize.remove_parametrizations(fused, "gain")
    assert torch.equal(fused(x), block(x))


@pytest.mark.parametrize("register", ["add_module", "register_module", "setattr"])
def test_a_layer_where_there_was_none_counts(register: str) -> None:
    class Dropping(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_module("more", None)

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.norm(self.conv(self.conv1(x))) + x)
            return y if self.more is None else self.more(y)

    block, x = Dropping(), torch.randn(2, 16, 3, 3)
    fused = blnet.fuse(block)
    assert isinstance(fused, Fused)
    for twin in (block, fused):
        if register == "setattr":
            twin.more = nn.Sigmoid()
        else:
            getattr(twin, register)("more", nn.Sigmoid())
    assert torch.equal(fused(x), block(x))


def test_torchs_own_notes_do_not_unfuse() -> None:
    fused = blnet.fuse(Block())
    fused.register_full_backward_hook(lambda *arguments: None)
    fused.compile(backend="eager")
    assert isinstance(fused, Fused)


def test_an_attribute_set_later_counts() -> None:
    class Scaled(Block):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.norm(self.conv(self.conv1(x))) + x) * self.scale

    block = Scaled()
    fused = blnet.fuse(block)
    assert isinstance(fused, Fused)
    fused.scale = block.scale = 3.0
    assert not isinstance(fused, Fused)
    x = torch.randn(2, 16, 3, 3)
    assert torch.equal(fused(x), block(x))


def test_activations_and_sequentials_exchanged_later_run_as_they_are() -> None:
    x = torch.randn(2, 16, 4, 4)

    class Down(Block):
        def __init__(self) -> None:
            super().__init__()
            self.tail = nn.Sequential(self.conv, self.norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.tail(self.conv1(x)) + x)

    block = Down()
    fused = holds(block)
    assert isinstance(fused, Fused)
    for twin in (block, fused):
        twin.relu = nn.SiLU()
    assert torch.equal(fused(x), block(x))
    for twin in (block, fused):
        twin.tail = nn.Sequential(*twin.tail, nn.Tanh())
    assert torch.equal(fused(x), block(x))
    assert isinstance(fused, Fused)


def test_hooks_are_called_whenever_they_come() -> None:
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *arguments: calls.append(name)

    early = Block()
    early.relu.register_forward_hook(note("relu"))
    late = blnet.fuse(Block())
    late.relu.register_forward_hook(note("relu"))
    late.norm.register_forward_pre_hook(note("norm"))
    late.conv.register_full_backward_hook(note("conv"))
    for block in (blnet.fuse(early), late):
        block(torch.randn(2, 16, 3, 3)).sum().backward()
    assert sorted(calls) == ["conv", "norm", "relu", "relu"]


def test_a_layer_with_a_forward_of_its_own_is_called() -> None:
    fused = blnet.fuse(Block())
    fused.conv.forward = lambda x: torch.zeros(x.shape[0], 16, *x.shape[2:])
    x = torch.randn(2, 16, 3, 3)
    expected = fused.norm.eval()(torch.zeros(2, 16, 3, 3)) + x
    assert torch.equal(fused(x), expected.relu())


def test_a_block_may_hold_itself_and_its_methods() -> None:
    class Bound(Block):
        def __init__(self) -> None:
            super().__init__()
            self.run = self.impl

        def impl(self, x: Tensor) -> Tensor:
            return self.relu(self.norm(self.conv(self.conv1(x))) + x)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.run(x)
            return result

    fused = holds(Bound())
    twin = copy.deepcopy(fused)
    assert isinstance(twin, Fused)
    assert twin.run.__self__ is twin


def test_a_shallow_copy_has_a_mode_of_its_own() -> None:
    fused = blnet.fuse(Block())
    twin = copy.copy(fused)
    twin.training = False
    assert fused.training
    assert twin.conv is fused.conv


def test_a_fused_network_can_be_traced_and_converted() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=4).eval()
    fused, x = blnet.fuse(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(fused)(x), model(x))
        converted = blnet.convert(fused)
        assert converted(x).shape == (1, 4)
    assert not any(isinstance(part, Fused) for part in converted.modules())


def test_an_add_that_broadcasts_still_broadcasts() -> None:
    class Gated(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.norm(self.conv(self.conv1(x))) + x.mean((0, 2, 3), keepdim=True))

    assert isinstance(holds(Gated()), Fused)


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


def test_layers_exchanged_after_fusing_run_as_they_are() -> None:
    block = Block()
    fused = blnet.fuse(block)
    for twin in (block, fused):
        torch.manual_seed(0)
        twin.norm = nn.GroupNorm(4, 16)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(fused(x), block(x))


def test_a_module_that_is_used_twice_is_fused_once() -> None:
    block = Block()
    model = nn.Sequential(block, block)
    fused = holds(model)
    assert fused[0] is fused[1]  # type: ignore[index]


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
