"""Big-Little networks under torchvision's detectors."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.detection import FasterRCNN

import blnet.vision.timm  # noqa: F401  # registers them
from blnet.vision import bl_resnet18, bl_resnet50
from blnet.vision.detection import fpn_backbone
from blnet.vision.features import feature_maps

SIZE = {"min_size": 80, "max_size": 120}


def detector(model):
    return FasterRCNN(fpn_backbone(model, out_channels=16), num_classes=3, **SIZE)


def made_up():
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, 97, 75, generator=generator) for _ in range(2)]
    pictures[1] = pictures[1][:, :65, :]
    boxes = torch.tensor([[8.0, 8.0, 50.0, 41.0], [20.0, 5.0, 70.0, 60.0]])
    return pictures, [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in pictures]


@pytest.mark.parametrize(
    "make",
    [
        lambda: bl_resnet18(width=0.25),
        lambda: bl_resnet50(width=0.25, num_classes=0),
        lambda: bl_resnet18(width=0.25, branches=3),
        lambda: timm.create_model("bl_resnet18", width=0.25, features_only=True),
        lambda: timm.create_model("bl_resnet18", width=0.25),
    ],
    ids=["basic", "bottleneck", "three branches", "timm's features", "timm's classifier"],
)
def test_a_detector_trains_a_step_and_detects(make):
    torch.manual_seed(0)
    model = detector(make()).train()
    pictures, targets = made_up()
    losses = model(pictures, targets)
    assert set(losses) == {
        *("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    }
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    # Every layer is used: DDP waits for parameters that get no gradient.
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    (stem,) = (p for n, p in model.named_parameters() if n.endswith("stem.conv1.weight"))
    before = stem.detach().clone()
    assert stem.grad.abs().sum() > 0
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert not torch.equal(stem, before)
    with torch.no_grad():
        found = model.eval()([torch.rand(3, 71, 93), torch.rand(3, 33, 40)])
    for detections in found:
        assert detections["boxes"].shape == (len(detections["scores"]), 4)
        assert torch.isfinite(detections["boxes"]).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(33, 130), st.integers(33, 130), st.integers(1, 3))
def test_the_pyramid_is_at_strides_4_to_64(height, width, branches):
    with torch.device("meta"):
        backbone = fpn_backbone(bl_resnet50(branches=branches), out_channels=24).eval()
        maps = backbone(torch.empty(1, 3, height, width))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    for features, stride in zip(maps.values(), (4, 8, 16, 32, 64), strict=True):
        assert features.shape == (1, 24, -(-height // stride), -(-width // stride))
    channels = [block[0].in_channels for block in backbone.fpn.inner_blocks]
    assert channels == [256, 512, 1024, 2048]


def test_the_backbone_shares_the_networks_layers():
    model = bl_resnet18(width=0.25).eval()
    backbone = fpn_backbone(model)
    assert backbone.out_channels == 256
    weights = {key.removeprefix("body."): value for key, value in backbone.state_dict().items()}
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    assert own.keys() == {key for key in weights if not key.startswith("fpn.")}
    assert all(weights[key].data_ptr() == value.data_ptr() for key, value in own.items())
    x = torch.randn(1, 3, 45, 51)
    assert torch.equal(backbone.body(x)[-1], model.forward_features(x))


def test_levels_beyond_the_last_wanted_are_not_run():
    model = bl_resnet18(width=0.25).eval()
    ran = []
    for name, part in model.named_modules():
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    maps = feature_maps(model.stem, model.stages, torch.randn(1, 3, 64, 64), last=1)
    assert [m.shape[1] for m in maps] == [16, 16]
    assert not any(name.startswith(("stages.0.fusion", "stages.1")) for name in ran)
    ran.clear()
    assert len(feature_maps(model.stem, model.stages, torch.randn(1, 3, 64, 64), last=0)) == 1
    assert "stem.pool" not in ran


def test_the_backbone_of_some_levels():
    net = timm.create_model("bl_resnet18", width=0.25, features_only=True, out_indices=(2, 4))
    maps = fpn_backbone(net.eval(), 8)(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(8, 8, 8), (8, 2, 2), (8, 1, 1)]


@pytest.mark.parametrize(
    ("model", "out_channels", "message"),
    [
        (
            nn.Linear(1, 1),
            8,
            "model must be a BigLittleNet or a network of timm's with",
        ),
        (nn.Identity(), 0, "out_channels must be a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(model, out_channels, message):
    with pytest.raises(ValueError, match=message) as caught:
        fpn_backbone(model, out_channels)
    assert "\n" not in str(caught.value)


def test_five_levels_are_told_of_and_taken():
    net = timm.create_model("resnet18", features_only=True)
    with pytest.warns(UserWarning, match=r"gives 5 maps, .* take 4: .*out_indices=\(1, 2, 3, 4\)"):
        backbone = fpn_backbone(net, 8)
    maps = backbone(torch.zeros(1, 3, 64, 64))
    assert list(maps) == ["0", "1", "2", "3", "4", "pool"]
