"""Blocks that must not be fused, or run as before: odd code, changes in place and later ones."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import blnet
from blnet.fusing import Fused
from helpers.blocks import Block, holds, place_of

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


# What happens to a fused module later -------------------------------------------------------------


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


def test_layers_exchanged_after_fusing_run_as_they_are() -> None:
    block = Block()
    fused = blnet.fuse(block)
    for twin in (block, fused):
        torch.manual_seed(0)
        twin.norm = nn.GroupNorm(4, 16)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(fused(x), block(x))


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
