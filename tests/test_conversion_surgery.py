"""The converter's small operations, each by itself."""

from __future__ import annotations

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import blnet
from blnet.blocks import BlockSpec
from blnet.conversion.surgery import (
    SHORTCUT_NAMES,
    norm_like,
    pooled_shortcut,
    resize_norm,
    shortcut_name,
    shortcut_projection,
)
from blnet.tracing import trace_own_code


def test_a_group_norm_keeps_its_groups_where_they_divide() -> None:
    for channels, groups in ((32, 8), (12, 4), (64, 8)):
        norm = nn.GroupNorm(8, 64)
        resize_norm(norm, channels)
        assert (norm.num_groups, norm.num_channels) == (groups, channels)
        assert norm(torch.randn(2, channels, 3, 3)).shape[1] == channels


def test_a_norm_in_front_of_an_add_has_no_activation() -> None:
    make = norm_like(BatchNormAct2d(8))
    assert make is not None
    assert make(16)(torch.randn(4, 16, 5, 5)).min() < 0


class Modal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3 if self.training else x + 1


def test_code_that_differs_in_training_is_not_traced() -> None:
    for training in (True, False):
        block = Modal().train(training)
        assert trace_own_code(block) is None
        assert block.training is training
    assert trace_own_code(nn.Sequential(nn.ReLU())) is not None


def test_a_shortcut_without_normalisation_stays_without() -> None:
    block = nn.Module()
    block.shortcut = nn.Conv2d(8, 16, 1, 2, bias=False)
    project = shortcut_projection(block, norm_like(nn.BatchNorm2d(16)))
    made = pooled_shortcut(BlockSpec(8, 16, 2), project)
    assert made is not None
    assert [type(part) for part in made] == [nn.AvgPool2d, nn.Conv2d]
    assert made[1].bias is None


class AddingBlock(nn.Module):
    """A block whose code knows its shortcut under a name of its own."""

    def __init__(self, name: str, in_channels: int, out_channels: int, lean: bool = False) -> None:
        super().__init__()
        self.name, stride = name, out_channels // in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        wider = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        same = None if lean else nn.Identity()
        norm = nn.BatchNorm2d(out_channels)
        setattr(self, name, nn.Sequential(wider, norm) if stride > 1 else same)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = getattr(self, self.name)
        y = self.norm(self.conv2(self.conv1(x).relu()))
        y += x if shortcut is None else shortcut(x)
        return y.relu()


def adding_net(name: str, lean: bool) -> nn.Module:
    torch.manual_seed(0)
    stages = [
        nn.Sequential(AddingBlock(name, a, b, lean), AddingBlock(name, b, b, lean))
        for a, b in ((16, 16), (16, 32), (32, 64))
    ]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("lean", [False, True], ids=["identity", "none"])
def test_a_shortcut_of_any_name_is_known_by_its_role(lean: bool) -> None:
    converted = []
    for name in ("shortcut", "short"):
        plain = adding_net(name, lean)
        torch.manual_seed(1)
        converted.append(blnet.convert(plain, 2, 2, inherit_weights=True).eval())
    named, unnamed = converted
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(named(images), unnamed(images))
    assert str(named.plan) == str(unnamed.plan)


class OtherRoles(nn.Module):
    """Layers on a block's input, most of which are no shortcuts."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code
        self.conv = nn.Conv2d(8, 8, 1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.gate = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.side = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return {
            "conv(x) + x": lambda: self.conv(x) + x,
            "body(x) + gate(x)": lambda: self.body(x) + self.gate(x),
            "body(x) + x + side(x)": lambda: self.body(x) + x + self.side(x),
            "conv(x) + side(x)": lambda: self.conv(x) + self.side(x),
            "body(x) + side(x)": lambda: self.body(x) + self.side(x),
            "body(x) * side(x)": lambda: self.body(x) * self.side(x),
            "body(x) + side(2 * x)": lambda: self.body(x) + self.side(2 * x),
        }[self.code]()


@pytest.mark.parametrize(
    "code",
    [
        "conv(x) + x",
        "body(x) + gate(x)",
        "body(x) + x + side(x)",
        "conv(x) + side(x)",
        "body(x) * side(x)",
        "body(x) + side(2 * x)",
    ],
)
def test_no_other_layer_is_taken_for_a_shortcut(code: str) -> None:
    assert shortcut_name(OtherRoles(code)) is None


def test_the_layer_that_is_added_to_the_others_is_the_shortcut() -> None:
    assert shortcut_name(OtherRoles("body(x) + side(x)")) == "side"


def test_the_names_of_shortcuts_are_told() -> None:
    class Block(AddingBlock):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv2(self.conv1(x).relu()))
            return (y + x if x.shape == y.shape else y + getattr(self, self.name)(x)).relu()

    stages = [nn.Sequential(Block("s", a, b), Block("s", b, b)) for a, b in ((8, 8), (8, 16))]
    with pytest.raises(ValueError, match=rf"Block .* named {', '.join(SHORTCUT_NAMES)} or such to"):
        blnet.convert(nn.Sequential(nn.Conv2d(3, 8, 3), *stages), 2, 2)
