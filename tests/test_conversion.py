"""Conversion of torchvision's, timm's and users' own networks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import blnet
from blnet.conversion import ConversionPlan
from blnet.module import BigLittleModule
from blnet.stem import BigLittlePool
from blnet.vision.models import bl_resnet18, bl_resnet50, bl_resnext50_32x4d


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

    def __init__(self, make: Callable[[int, int, int], nn.Module] = PreActivationBlock) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        plan = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.Sequential(*(make(*shape) for shape in plan))
        self.fc = nn.Linear(64 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).flatten(1))


def randomised(model: nn.Module) -> nn.Module:
    """A network whose normalisations are no identities, so that a lost one shows."""
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.1, generator=generator)
            part.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize(
    ("plain", "ours"),
    [
        (torchvision.models.resnet18, bl_resnet18),
        (torchvision.models.resnet50, bl_resnet50),
        (torchvision.models.resnext50_32x4d, bl_resnext50_32x4d),
    ],
)
@pytest.mark.parametrize(("alpha", "beta", "branches"), [(2, 4, 2), (4, 2, 2), (2, 2, 3)])
def test_torchvision_becomes_the_paper_s_network(
    plain: Callable[[], nn.Module],
    ours: Callable[..., nn.Module],
    alpha: int,
    beta: int,
    branches: int,
) -> None:
    with torch.device("meta"):
        converted = blnet.convert(plain(), alpha, beta, branches)
        own = ours(alpha=alpha, beta=beta, branches=branches)
    size = (1, 3, 224, 224)
    a, b = blnet.profile(converted, size), blnet.profile(own, size)
    assert (a.parameters, a.macs) == (b.parameters, b.macs)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_converted_network_computes_what_ours_does(depth: int) -> None:
    """The same weights in the same places give the same logits, odd sizes included."""
    plain = getattr(torchvision.models, f"resnet{depth}")(num_classes=7)
    converted = randomised(blnet.convert(plain, 2, 4)).eval()
    own = {18: bl_resnet18, 50: bl_resnet50}[depth](num_classes=7).eval()
    places = {"conv1.": "stem.conv1.", "bn1.": "stem.bn1.", "maxpool.": "stem.pool."}
    places |= {f"layer{n + 1}.": f"stages.{n}." for n in range(4)}
    weights = {}
    for key, value in converted.state_dict().items():
        old = next((place for place in places if key.startswith(place)), None)
        rest = key[len(old or "") :]
        # A converted stage is a sequence of one module, so that code may loop over it.
        if old in ("layer1.", "layer2.", "layer3."):
            rest = rest.removeprefix("0.")
        weights[(places[old] if old else "") + rest] = value
    own.load_state_dict(weights)
    image = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        torch.testing.assert_close(converted(image), own(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50d", "seresnet18", "seresnext26d_32x4d", "resnet26t"],
)
@pytest.mark.parametrize("branches", [2, 3])
def test_timm_networks_convert(name: str, branches: int) -> None:
    plain = timm.create_model(name, num_classes=5)
    converted = blnet.convert(plain, 2, 2, branches).eval()
    assert not any(stage.notes for stage in converted.plan.stages[:-1])
    assert isinstance(converted.maxpool, BigLittlePool)
    assert blnet.profile(converted).macs < blnet.profile(plain).macs
    assert converted(torch.randn(2, 3, 64, 96)).shape == (2, 5)


FAITHFUL = [
    "resnetv2_50",  # pre-activation, activation inside the normalisation
    "resnet50_clip",  # activation inside the normalisation, pools in the chain
    "gcresnet50t",  # another gate
    "resnet50_gn",  # GroupNorm: the number of groups is the layer's own
    "resnetaa50",  # strides in a pool of the chain
    "resnetblur50",
    "resnetrs50",  # a gate whose reduction the constructor does not take
    "resnext26ts",  # settings in an object
]


@pytest.mark.parametrize("name", FAITHFUL)
def test_inherited_blocks_compute_what_they_did(name: str) -> None:
    """The fusion block of a stage that keeps its size is the old stage's last block, exactly."""
    plain = randomised(timm.create_model(name, num_classes=5)).eval()
    converted = blnet.convert(plain, 2, 2, inherit_weights=True).eval()
    modules = [m for m in converted.modules() if isinstance(m, BigLittleModule)]
    old = plain.get_submodule(converted.plan.stages[-2].name)[-1]
    fusion = modules[-1].fusion[0]
    assert type(fusion) is type(old)
    x = torch.randn(2, converted.plan.stages[-2].out_channels, 9, 9)
    with torch.no_grad():
        assert torch.equal(fusion(x), old(x))
    assert converted(torch.randn(1, 3, 224, 224)).shape == (1, 5)


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


def test_the_map_shrinks_where_it_did() -> None:
    """Each module's total step is that of the stage that follows; the last stage strides itself."""
    converted = blnet.convert(torchvision.models.resnet18(), 2, 2)
    sizes = []
    for stage in (converted.layer1, converted.layer2, converted.layer3, converted.layer4):
        stage.register_forward_hook(lambda _, i, o: sizes.append((i[0].shape[-1], o.shape[-1])))
    converted(torch.zeros(1, 3, 224, 224))
    assert sizes == [(56, 28), (28, 14), (14, 14), (14, 7)]


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


def test_the_big_branch_ends_without_activation() -> None:
    converted = blnet.convert(torchvision.models.resnet50(), 2, 4).eval()
    big = randomised(converted.layer2[0].branches[-1])
    assert big(torch.randn(1, 256, 16, 16)).min() < 0
    assert converted.layer2[0].branches[0](torch.randn(1, 256, 16, 16)).min() >= 0
    single = randomised(blnet.convert(torchvision.models.resnet18(), 2, 2).eval().layer1[0])
    assert single.branches[-1](torch.randn(1, 64, 16, 16)).min() >= 0


def test_dilation_is_kept() -> None:
    plain = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    converted = blnet.convert(plain, 2, 4).eval()
    assert converted.layer3[0].branches[0][0].conv2.dilation == (2, 2)
    features = nn.Sequential(*list(converted.children())[:-2])
    assert features(torch.zeros(1, 3, 64, 64)).shape[-1] == 8


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


def test_one_branch_gives_the_plain_network_back() -> None:
    plain = randomised(torchvision.models.resnet18()).eval()
    same = blnet.convert(plain, branches=1)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(plain(image), same(image))
    assert same is not plain
    assert "unchanged" in str(same.plan)


def test_weights_are_inherited_to_their_places() -> None:
    plain = randomised(torchvision.models.resnet50(num_classes=4)).eval()
    converted = blnet.convert(plain, 2, 4, inherit_weights=True)
    for stage, module in ((plain.layer1, converted.layer1[0]), (plain.layer3, converted.layer3[0])):
        big, fusion = module.branches[-1], module.fusion[0]
        for old, new in zip([*stage[:-1], stage[-1]], [*big, fusion], strict=True):
            for layer in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"):
                for key, value in getattr(old, layer).state_dict().items():
                    assert torch.equal(value, getattr(new, layer).state_dict()[key])
        assert torch.equal(stage[0].downsample[0].weight, big[0].downsample[1].weight)
        assert torch.equal(stage[0].downsample[1].running_var, big[0].downsample[2].running_var)
        assert (module.expands[0][1].weight == 0).all()
    for key, value in plain.state_dict().items():
        if key.startswith(("conv1", "bn1", "fc")):
            assert torch.equal(value, converted.state_dict()[key])
    assert torch.equal(
        plain.layer4[0].downsample[0].weight, converted.layer4[0].downsample[1].weight
    )
    assert torch.equal(plain.layer4[2].conv3.weight, converted.layer4[2].conv3.weight)
    assert not any(stage.notes for stage in converted.plan.stages[:-1])


def test_inherited_branches_compute_what_the_stage_did() -> None:
    """The big branch and the fusion block alone are the old stage, but for size and shortcut."""
    plain = randomised(torchvision.models.resnet18()).eval()
    converted = blnet.convert(plain, 2, 2, inherit_weights=True).eval()
    x = torch.relu(torch.randn(1, 64, 16, 16))
    with torch.no_grad():
        module = converted.layer1[0]
        half = torch.nn.functional.interpolate(module.branches[-1](x), size=(16, 16))
        expand = module.expands[0][1]
        expected = module.fusion(torch.relu(half + expand.bias[None, :, None, None]))
        torch.testing.assert_close(module(x), expected)


def test_without_inheriting_nothing_trained_is_left() -> None:
    plain = torchvision.models.resnet18()
    for parameter in plain.parameters():
        nn.init.constant_(parameter, 77.0)
    converted = blnet.convert(plain, 2, 2)
    assert not any((p == 77).any() for p in converted.parameters())


def test_the_original_is_untouched() -> None:
    plain = torchvision.models.resnet18()
    before = copy.deepcopy(plain.state_dict())
    mode = {name: m.training for name, m in plain.named_modules()}
    blnet.convert(plain, 2, 2, inherit_weights=True)
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())
    assert mode == {name: m.training for name, m in plain.named_modules()}
    assert not plain._forward_hooks
    assert not hasattr(plain, "plan")


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_dtype_are_kept(training: bool) -> None:
    plain = torchvision.models.resnet18().to(torch.float64).train(training)
    converted = blnet.convert(plain, 2, 2)
    assert {p.dtype for p in converted.parameters()} == {torch.float64}
    assert {m.training for m in converted.modules()} == {training}


def test_a_converted_network_is_an_ordinary_module() -> None:
    converted = blnet.convert(torchvision.models.resnet18(num_classes=3), 2, 2).eval()
    image = torch.randn(2, 3, 64, 64)
    expected = converted(image)
    assert torch.equal(copy.deepcopy(converted)(image), expected)
    stream = io.BytesIO()
    torch.save(converted.state_dict(), stream)
    stream.seek(0)
    fresh = blnet.convert(torchvision.models.resnet18(num_classes=3), 2, 2).eval()
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(fresh(image), expected)
    exported = torch.export.export(converted, (image,))
    torch.testing.assert_close(exported.module()(image), expected)
    nodes = {"layer3": "features"}
    extractor = torchvision.models.feature_extraction.create_feature_extractor(converted, nodes)
    assert extractor(image)["features"].shape[1] == 256
    converted.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        converted(image.contiguous(memory_format=torch.channels_last)),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_plan_says_what_was_found_and_chosen() -> None:
    plan = blnet.convert(torchvision.models.resnet50(), 2, 4).plan
    assert isinstance(plan, ConversionPlan)
    text = str(plan)
    for part in (
        "alpha 2, beta 4, 2 branches",
        "maxpool becomes two branches of 64 channels and its 1/2",
        "layer2: 4 x Bottleneck, 256 -> 512 channels, stride 2",
        "little 1 x 256 channels at full resolution",
        "big    3 x 512 channels at 1/2 resolution",
        "layer4: 3 x Bottleneck, 1024 -> 2048 channels, stride 2\n  stays plain",
        "head: avgpool, fc",
    ):
        assert part in text
    assert plan.to_dict()["stages"][0]["branches"][0]["width"] == 128


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


def test_normalisation_is_that_of_the_network_everywhere() -> None:
    plain = torchvision.models.resnet18(norm_layer=lambda width: nn.GroupNorm(8, width))
    converted = blnet.convert(plain, 2, 2)
    assert not [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    frozen = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    converted = blnet.convert(frozen, 2, 2)
    assert not [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]


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


def test_changed_maps_between_stages_are_noted() -> None:
    features = timm.create_model("resnet18", features_only=True)
    converted = blnet.convert(features, 2, 2)
    assert "maps taken between stages are smaller" in str(converted.plan)
    assert blnet.convert(torchvision.models.resnet18(), 2, 2).plan.notes == ()


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


def test_a_network_on_meta_stays_there() -> None:
    with torch.device("meta"):
        plain = torchvision.models.resnet18()
    converted = blnet.convert(plain, 2, 4, inherit_weights=True)
    assert all(p.is_meta for p in converted.parameters())


def test_layout_is_kept() -> None:
    plain = torchvision.models.resnet18().to(memory_format=torch.channels_last)
    converted = blnet.convert(plain, 2, 4)
    convs = [m.weight for m in converted.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convs)


def test_a_bare_shortcut_keeps_its_weights_and_gets_no_normalisation() -> None:
    plain = FlatNet()
    converted = blnet.convert(plain, 2, 2, inherit_weights=True)
    shortcut = converted.blocks[1].branches[-1][0].shortcut
    assert [type(part) for part in shortcut] == [nn.AvgPool2d, nn.Conv2d]
    assert torch.equal(shortcut[1].weight, plain.blocks[2].shortcut.weight)


def test_frozen_weights_are_noted() -> None:
    plain = torchvision.models.resnet18().requires_grad_(False)
    assert "were frozen stay so" in str(blnet.convert(plain, 2, 4, inherit_weights=True).plan)


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
