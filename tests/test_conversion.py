"""Conversion of torchvision's and timm's networks: what they become, inherit and keep."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import nn

import blnet
from blnet.conversion import ConversionPlan
from blnet.module import BigLittleModule
from blnet.stem import BigLittlePool
from blnet.vision.models import bl_resnet18, bl_resnet50, bl_resnext50_32x4d


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


def test_the_map_shrinks_where_it_did() -> None:
    """Each module's total step is that of the stage that follows; the last stage strides itself."""
    converted = blnet.convert(torchvision.models.resnet18(), 2, 2)
    sizes = []
    for stage in (converted.layer1, converted.layer2, converted.layer3, converted.layer4):
        stage.register_forward_hook(lambda _, i, o: sizes.append((i[0].shape[-1], o.shape[-1])))
    converted(torch.zeros(1, 3, 224, 224))
    assert sizes == [(56, 28), (28, 14), (14, 14), (14, 7)]


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


def test_normalisation_is_that_of_the_network_everywhere() -> None:
    plain = torchvision.models.resnet18(norm_layer=lambda width: nn.GroupNorm(8, width))
    converted = blnet.convert(plain, 2, 2)
    assert not [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    frozen = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    converted = blnet.convert(frozen, 2, 2)
    assert not [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]


def test_changed_maps_between_stages_are_noted() -> None:
    features = timm.create_model("resnet18", features_only=True)
    converted = blnet.convert(features, 2, 2)
    assert "maps taken between stages are smaller" in str(converted.plan)
    assert blnet.convert(torchvision.models.resnet18(), 2, 2).plan.notes == ()


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


def test_frozen_weights_are_noted() -> None:
    plain = torchvision.models.resnet18().requires_grad_(False)
    assert "were frozen stay so" in str(blnet.convert(plain, 2, 4, inherit_weights=True).plan)
