"""Conversion of users' own networks, and what is said of those that cannot be converted."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import blnet
from blnet.module import BigLittleModule
from blnet.vision.models import bl_resnet18


class OwnBlock(nn.Module):
    """A user's block that makes its own shortcut and uses SiLU and GroupNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 5, stride, padding=2, bias=False)
        self.norm1 = nn.GroupNorm(4, out_channels)
        self.act = nn.SiLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.GroupNorm(4, out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(out + self.shortcut(x))


class StubbornBlock(OwnBlock):
    """The same with a constructor that tells nothing."""

    def __init__(self, settings: dict[str, int]) -> None:
        super().__init__(settings["a"], settings["b"], settings["c"])


class PreActivationBlock(nn.Module):
    """Normalisation and ReLU before each convolution; nothing after the add."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(torch.relu(self.bn1(x)))
        return self.conv2(torch.relu(self.bn2(out))) + self.shortcut(x)


class SeparableBlock(nn.Module):
    """A depthwise convolution, which may give more channels, before one that mixes them."""

    def __init__(
        self, in_planes: int, planes: int, stride: int = 1, more: int = 1, slopes: bool = False
    ) -> None:
        super().__init__()
        wide = in_planes * more
        self.conv1 = nn.Conv2d(in_planes, wide, 3, stride, 1, groups=in_planes, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.act = nn.PReLU(wide) if slopes else nn.ReLU()
        self.conv2 = nn.Conv2d(wide, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


def own_block(stubborn: bool) -> Callable[[int, int, int], nn.Module]:
    if stubborn:
        return lambda a, b, c: StubbornBlock({"a": a, "b": b, "c": c})
    return OwnBlock


class OwnNet(nn.Module):
    """Three stages in a ModuleList each, blocks in a loop, one input channel, a functional head."""

    def __init__(self, make: Callable[[int, int, int], nn.Module] = OwnBlock) -> None:
        super().__init__()
        self.entry = nn.Conv2d(1, 32, 3, padding=1)
        self.parts = nn.ModuleList(
            [
                nn.ModuleList([make(32, 32, 1), make(32, 32, 1), make(32, 32, 1)]),
                nn.ModuleList([make(32, 64, 2), make(64, 64, 1), make(64, 64, 1)]),
                nn.ModuleList([make(64, 128, 2), make(128, 128, 1)]),
            ]
        )
        self.classifier = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for part in self.parts:
            for block in part:  # type: ignore[attr-defined]
                x = block(x)
        return self.classifier(x.mean((2, 3)))


class FlatNet(nn.Module):
    """All blocks of all stages in one Sequential; takes 32x32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        plan = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.Sequential(*(PreActivationBlock(*shape) for shape in plan))
        self.fc = nn.Linear(64 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).flatten(1))


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("branches", [2, 3, 4])
def test_a_user_s_own_network_converts(stubborn: bool, branches: int) -> None:
    plain = OwnNet(own_block(stubborn))
    converted = blnet.convert(plain, 2, 2, branches, input_size=(1, 1, 40, 100))
    assert type(converted) is OwnNet
    modules = [m for m in converted.modules() if isinstance(m, BigLittleModule)]
    assert len(modules) == 2
    assert all(isinstance(module.activation, nn.SiLU) for module in modules)
    little = modules[0].branches[0]
    assert {type(m) for m in little} == {StubbornBlock if stubborn else OwnBlock}
    assert [m for m in little.modules() if isinstance(m, nn.GroupNorm)]
    assert not [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert next(m for m in little.modules() if isinstance(m, nn.Conv2d)).kernel_size == (5, 5)
    for size in ((40, 100), (33, 57)):
        assert converted(torch.randn(2, 1, *size)).shape == (2, 5)
    converted(torch.randn(2, 1, 40, 100)).sum().backward()


def test_one_sequence_of_all_blocks_is_cut_into_stages() -> None:
    converted = blnet.convert(FlatNet(), 2, 2, inherit_weights=True)
    assert [stage.length for stage in converted.plan.stages] == [2, 2, 2]
    assert [type(part) for part in converted.blocks] == [
        BigLittleModule, BigLittleModule, PreActivationBlock, PreActivationBlock,
    ]  # fmt: skip
    assert converted(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_pre_activation_block_is_not_silenced_for_good() -> None:
    converted = blnet.convert(FlatNet(), 2, 2)
    converted(torch.randn(4, 3, 32, 32)).square().sum().backward()
    little = converted.blocks[0].branches[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in little.parameters())


def test_a_stride_of_the_first_stage_becomes_a_pool() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Sequential(OwnBlock(16, 16, 2), OwnBlock(16, 16)),
        nn.Sequential(OwnBlock(16, 32, 2), OwnBlock(32, 32)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    converted = blnet.convert(plain, 2, 2, input_size=(1, 3, 32, 32)).eval()
    assert converted[1](torch.zeros(1, 16, 32, 32)).shape[-1] == 16
    assert converted[2](torch.zeros(1, 16, 16, 16)).shape[-1] == 8
    assert "average pool" in str(converted.plan)


class SettingsBlock(OwnBlock):
    """A block with settings that no layer shows, which behaves differently in training."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, gain: float = 1
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.gain_ = gain
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.conv1.in_channels:
            raise ValueError("a check that no graph tracer gets through")
        out = self.norm1(self.conv1(x))
        out = nn.functional.dropout(self.act(out), 0.5, training=self.training)
        out = self.drop(self.norm2(self.conv2(out))) * self.gain_
        return nn.functional.leaky_relu(out + self.shortcut(x), 0.2)


def settings_net() -> OwnNet:
    return OwnNet(lambda a, b, c: SettingsBlock(a, b, c, gain=0.25))


def test_settings_and_training_behaviour_are_kept() -> None:
    converted = blnet.convert(settings_net(), 2, 2, input_size=(1, 1, 32, 32))
    blocks = [m for m in converted.modules() if isinstance(m, SettingsBlock)]
    assert len(blocks) == 10
    assert {block.gain_ for block in blocks} == {0.25}
    assert {block.drop.p for block in blocks} == {0.3}
    for part in converted.modules():
        if isinstance(part, nn.GroupNorm):
            nn.init.ones_(part.weight)  # blocks start silent, and would hide a difference
    x = torch.randn(2, 1, 32, 32)
    assert not torch.equal(converted.train()(x), converted(x))
    assert torch.equal(converted.eval()(x), converted(x))


def test_what_could_not_be_read_is_noted() -> None:
    plan = blnet.convert(settings_net(), 2, 2, input_size=(1, 1, 32, 32)).plan
    notes = " ".join(plan.stages[0].notes)
    assert "its closing activation cannot be read; the merge uses ReLU" in notes
    assert "the big branch keeps its closing activation" in notes


class BareBlock(nn.Module):
    """No normalisation at all, convolutions with a bias."""

    def __init__(self, width_in: int, width_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1)
        self.skip = nn.Conv2d(width_in, width_out, 1, stride) if width_in != width_out else None

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.skip is None else self.skip(x)
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + skip)


def test_a_network_without_normalisation_gets_none() -> None:
    converted = blnet.convert(
        OwnNet(BareBlock), 2, 2, inherit_weights=True, input_size=(1, 1, 32, 32)
    )
    assert not [m for m in converted.modules() if "Norm" in type(m).__name__]
    assert converted(torch.randn(2, 1, 33, 40)).shape == (2, 5)


class LoopingNet(OwnNet):
    """Loops over an nn.Sequential and asks for its length and items."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(*part) for part in self.parts)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for part in self.parts:
            assert len(part) >= 1  # type: ignore[arg-type]
            x = part[0](x)  # type: ignore[index]
            for block in part[1:]:  # type: ignore[index]
                x = block(x)
        return self.classifier(x.mean((2, 3)))


def test_code_that_loops_over_a_stage_still_runs() -> None:
    converted = blnet.convert(LoopingNet(), 2, 2, input_size=(1, 1, 32, 32))
    assert converted(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_a_stage_that_stands_apart_is_told() -> None:
    class Apart(OwnNet):
        def __init__(self) -> None:
            super().__init__()
            self.extra = OwnBlock(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.extra(self.entry(x))
            for part in self.parts:
                for block in part:  # type: ignore[attr-defined]
                    x = block(x)
            return x

    with pytest.raises(ValueError, match="extra looks like a residual block but stands in no seq"):
        blnet.convert(Apart(), 2, 2, input_size=(1, 1, 32, 32))


def test_a_shared_block_is_told() -> None:
    plain = OwnNet()
    plain.parts[0][2] = plain.parts[0][1]  # type: ignore[index, operator]
    with pytest.raises(ValueError, match="convertible network is"):
        blnet.convert(plain, 2, 2, input_size=(1, 1, 32, 32))


def test_shared_modules_and_weights_survive() -> None:
    plain = OwnNet()
    shared = nn.PReLU()
    for part in plain.parts:
        for block in part:  # type: ignore[attr-defined]
            block.act = shared
    before = copy.deepcopy(plain.state_dict())
    converted = blnet.convert(plain, 2, 2, inherit_weights=True, input_size=(1, 1, 32, 32))
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())
    assert converted(torch.randn(2, 1, 32, 32)).isfinite().all()


def test_a_bare_shortcut_keeps_its_weights_and_gets_no_normalisation() -> None:
    plain = FlatNet()
    converted = blnet.convert(plain, 2, 2, inherit_weights=True)
    shortcut = converted.blocks[1].branches[-1][0].shortcut
    assert [type(part) for part in shortcut] == [nn.AvgPool2d, nn.Conv2d]
    assert torch.equal(shortcut[1].weight, plain.blocks[2].shortcut.weight)


REFUSED = [
    (lambda: torchvision.models.vgg11(), {}, "no stage was recognised in VGG"),
    (lambda: torchvision.models.densenet121(), {}, "no stage was recognised in DenseNet"),
    (lambda: torchvision.models.vit_b_16(), {}, "no stage was recognised in VisionTransformer"),
    (lambda: nn.Linear(3, 4), {}, "Linear has no Conv2d"),
    (lambda: timm.create_model("res2net50_26w_4s"), {}, "Bottle2neck was not recognised"),
    (lambda: timm.create_model("hrnet_w18_small"), {}, "no single chain"),
    (lambda: bl_resnet18(), {}, "holds Big-Little modules already"),
    (lambda: torchvision.models.resnet18(), {"alpha": 3}, "choose an alpha that divides"),
    (lambda: torchvision.models.resnet18(), {"alpha": 0}, "alpha must be a whole number"),
    (lambda: torchvision.models.resnet18(), {"beta": 1.5}, "beta must be a whole number"),
    (lambda: torchvision.models.resnet18(), {"branches": 0}, "branches must be a whole number"),
    (
        lambda: torchvision.models.resnet18(),
        {"input_size": (1, 4, 8, 8)},
        "does not run on one tensor",
    ),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(OwnBlock(8, 8), OwnBlock(8, 8))),
        {},
        "only one stage, 1, was",
    ),
]


@pytest.mark.parametrize(("make", "options", "text"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_cannot_be_converted_is_told(
    make: Callable[[], nn.Module], options: dict[str, object], text: str
) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        blnet.convert(make(), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_something_else_than_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got str"):
        blnet.convert("resnet50")  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [1, 2])
@pytest.mark.parametrize(("inherit", "slopes"), [(False, False), (True, False), (True, True)])
def test_a_block_may_begin_with_a_depthwise_convolution(
    more: int, inherit: bool, slopes: bool
) -> None:
    net = OwnNet(lambda a, b, c: SeparableBlock(a, b, c, more, slopes))
    made = blnet.convert(net, 2, 2, inherit_weights=inherit, input_size=(1, 1, 32, 32))
    made.train()(torch.randn(2, 1, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    depthwise = [m for m in made.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert {(m.groups == m.in_channels, m.out_channels == more * m.in_channels)
            for m in depthwise} == {(True, True)}  # fmt: skip
    assert {m.in_channels for m in depthwise} > {32}, "little branches are thinner inside"


class Curves(nn.Module):
    """Three numbers a channel before a block's first convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = (one.view(1, -1, 1, 1) for one in self.weight.unbind(1))
        return first * x + second * x.relu() + third * x.tanh()


class CurvedBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.curves = Curves(in_channels)
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.last = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        own = self.last(self.conv(self.curves(x)).relu())
        return (self.norm(own) + self.shortcut(x)).relu()


def test_what_is_no_channel_of_a_blocks_beginning_keeps_its_length() -> None:
    made = blnet.convert(OwnNet(CurvedBlock), 2, 2, input_size=(1, 1, 32, 32))
    made(torch.randn(2, 1, 32, 32))
    shapes = {tuple(m.weight.shape) for m in made.modules() if isinstance(m, Curves)}
    assert {count for _, count in shapes} == {3}
    assert len(shapes) > 1
