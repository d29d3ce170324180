"""BigLittleNet and its configuration."""

import dataclasses
import json
from functools import cache
from math import ceil, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blnet.blocks import BasicBlock, Bottleneck, ResidualBlock
from blnet.module import BigLittleModule, branch_length
from blnet.network import BigLittleConfig, BigLittleNet
from blnet.stem import BigLittleStem, PlainStem, SmallStem

SMALL = {"widths": (32, 64, 64), "depths": (3, 4, 2), "stem_width": 16, "num_classes": 10}


def on_meta(config):
    with torch.device("meta"):
        return BigLittleNet(config)


@st.composite
def configs(draw):
    """Draw any valid configuration of a small network."""
    block = draw(st.sampled_from(["basic", "bottleneck"]))
    alpha, branches = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    narrow = alpha ** (branches - 1)
    grouped = block == "bottleneck" and draw(st.booleans())
    stages = draw(st.integers(1, 4))
    unit = (4 if block == "bottleneck" else 1) * narrow
    return BigLittleConfig(
        block=block,
        depths=tuple(draw(st.integers(1, 6)) for _ in range(stages)),
        # Whole numbers of channels a group at any width: 64 times the least.
        widths=tuple(
            draw(st.integers(1, 2)) * (64 if grouped else 4) * unit for _ in range(stages)
        ),
        alpha=alpha,
        beta=draw(st.integers(1, 4)),
        branches=branches,
        cardinality=draw(st.integers(2, 3)) * narrow if grouped else 1,
        base_width=draw(st.integers(1, 8)) if grouped else 64,
        se_reduction=draw(st.integers(0, 4)),
        stem=draw(st.sampled_from(["imagenet", "small"])),
        stem_width=draw(st.integers(1, 8)) * alpha,
        in_channels=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(0, 12)),
    )


@given(configs())
def test_config_round_trips_through_json(config):
    again = BigLittleConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert json.loads(config.to_json()) == json.loads(json.dumps(dataclasses.asdict(config)))


@settings(max_examples=25, deadline=None)
@given(configs(), st.integers(1, 70), st.integers(1, 70))
def test_every_valid_config_builds_and_runs(config, height, width):
    model = on_meta(config).eval()
    images = torch.empty(2, config.in_channels, height, width, device="meta")
    features = model.forward_features(images)
    size = torch.tensor([height, width])
    halvings = (2 if config.stem == "imagenet" else 0) + len(config.depths) - 1
    for _ in range(halvings):
        size = (size + 1) // 2
    assert features.shape == (2, config.widths[-1], *size.tolist())
    outputs = config.num_classes or config.widths[-1]
    assert model(images).shape == (2, outputs)


def test_config_fields_left_out_keep_their_defaults():
    assert BigLittleConfig.from_json("{}") == BigLittleConfig()
    assert BigLittleConfig.from_json('{"depths": [1, 2, 3, 4]}').depths == (1, 2, 3, 4)


COUNT = "must be a whole number of at least"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 0}, rf"alpha {COUNT} 1, got 0"),
        ({"beta": -2}, rf"beta {COUNT} 1, got -2"),
        ({"branches": 1.5}, rf"branches {COUNT} 1, got 1\.5"),
        ({"alpha": True}, rf"alpha {COUNT} 1, got True"),
        ({"block": "wide"}, "block must be one of basic, bottleneck, got 'wide'"),
        ({"block": ["basic"]}, r"block must be one of basic, bottleneck, got \['basic'\]"),
        ({"stem": None}, "stem must be one of imagenet, small, got None"),
        ({"depths": (3, 0, 6, 3)}, rf"each of depths {COUNT} 1, got 0"),
        ({"depths": (3, 4, 6, "3")}, rf"each of depths {COUNT} 1, got '3'"),
        ({"widths": (64, 64, 64, 2.0)}, rf"each of widths {COUNT} 1, got 2\.0"),
        ({"depths": (3, 4, 6)}, "must name the same stages, got 3 depths and 4 widths"),
        ({"depths": (), "widths": ()}, "must name the same stages, got 0 depths"),
        ({"depths": 5}, "depths must be a list of whole numbers, got 5"),
        ({"widths": None}, "widths must be a list of whole numbers, got None"),
        ({"cardinality": 0}, rf"cardinality {COUNT} 1, got 0"),
        ({"base_width": "4"}, rf"base_width {COUNT} 1, got '4'"),
        ({"stem_width": 0}, rf"stem_width {COUNT} 1, got 0"),
        ({"in_channels": 0}, rf"in_channels {COUNT} 1, got 0"),
        ({"num_classes": -1}, rf"num_classes {COUNT} 0, got -1"),
        ({"se_reduction": -1}, rf"se_reduction {COUNT} 0, got -1"),
        ({"alpha": 3}, "alpha 3 with 2 branches divides a width of"),
        ({"alpha": 4, "branches": 5}, "alpha 4 with 5 branches divides a width of"),
        ({"stem_width": 15}, "divides a width of 15 channels by 2"),
        ({"cardinality": 3, "base_width": 4}, "cardinality 3 needs bottleneck blocks and an alpha"),
        (
            {"block": "basic", "cardinality": 2},
            "cardinality 2 needs bottleneck blocks and an alpha that divides it, got block 'basic'",
        ),
        ({"se_reduction": 4096}, "se_reduction 4096 leaves no channel of the 128"),
        ({"widths": (2,) * 4, "alpha": 1}, "base_width 64 leaves no channel inside a bottleneck"),
        (
            {"widths": (16,) * 4, "cardinality": 4, "base_width": 4, "alpha": 1},
            "base_width 4 leaves",
        ),
    ],
    ids=str,
)
def test_bad_config_is_one_clear_error(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        BigLittleConfig(**values)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        BigLittleConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the configuration is not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ('{"alfa": 2, "zeta": 1}', "has no field alfa, zeta; the fields are block, depths"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message):
        BigLittleConfig.from_json(text)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("alpha", [1, 2])
@pytest.mark.parametrize("branches", [2, 3, 4])
@pytest.mark.parametrize("size", [(224, 224), (97, 131)])
def test_structure_and_resolutions(size, branches, alpha, block):
    config = BigLittleConfig(block=block, alpha=alpha, beta=2, branches=branches, num_classes=10)
    model = on_meta(config).eval()
    sizes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _x, y, name=name: sizes.update({name: y.shape}))
    model(torch.empty(1, 3, *size, device="meta"))

    expected = tuple(ceil(ceil(n / 2) / 2) for n in size)
    assert sizes["stem"] == (1, 64, *expected)
    *modules, last = model.stages
    plan = zip(modules, config.depths, config.widths, (2, 2, 1), strict=False)
    for stage, (module, length, width, stride) in enumerate(plan):
        assert isinstance(module, BigLittleModule)
        for index, branch in enumerate(module.branches):
            divisions = branches - 1 - index
            shape = sizes[f"stages.{stage}.branches.{index}"]
            scaled = tuple(ceil(n / 2**index) for n in expected)
            assert shape == (1, width // alpha**divisions, *scaled)
            blocks = [layer for layer in branch if isinstance(layer, ResidualBlock)]
            assert len(blocks) == branch_length(length, 2, divisions)
        expected = tuple(ceil(n / stride) for n in expected)
        assert sizes[f"stages.{stage}"] == (1, width, *expected)
    expected = tuple(ceil(n / 2) for n in expected)
    assert sizes["stages.3"] == (1, config.widths[3], *expected)
    assert len(last) == config.depths[3]
    kind = BasicBlock if block == "basic" else Bottleneck
    assert all(type(m) is kind for m in model.modules() if isinstance(m, ResidualBlock))


@cache
def shortcut_kinds(branches):
    model = on_meta(BigLittleConfig(**SMALL, branches=branches))
    shortcuts = (m.downsample for m in model.modules() if isinstance(m, ResidualBlock))
    return {type(layer) for shortcut in shortcuts if shortcut is not None for layer in shortcut}


def test_only_big_little_shortcuts_pool():
    assert nn.AvgPool2d in shortcut_kinds(2)
    assert nn.AvgPool2d not in shortcut_kinds(1)


@pytest.mark.parametrize(
    ("stem", "branches", "kind"),
    [("imagenet", 2, BigLittleStem), ("imagenet", 1, PlainStem), ("small", 2, SmallStem)],
)
def test_stem_choice(stem, branches, kind):
    model = on_meta(BigLittleConfig(**SMALL, stem=stem, branches=branches, in_channels=5))
    assert type(model.stem) is kind
    assert model.stem.conv1.in_channels == 5


def test_no_classes_leave_the_features():
    torch.manual_seed(0)
    model = BigLittleNet(BigLittleConfig(**{**SMALL, "num_classes": 0})).eval()
    images = torch.randn(2, 3, 32, 32)
    pooled = model.forward_features(images).mean((2, 3))
    torch.testing.assert_close(model(images), pooled)


def test_blocks_start_as_their_shortcut_and_convolutions_as_kaiming_fan_out():
    torch.manual_seed(0)
    model = BigLittleNet(BigLittleConfig(widths=(64, 128, 256), depths=(2, 2, 2), se_reduction=4))
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    zeroed = {id(block.last_norm) for block in blocks}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == (0 if id(module) in zeroed else 1)).all()
            assert (module.bias == 0).all()
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2 // module.groups
            expected = sqrt(2 / fan_out)
            # 4,000 draws give the deviation to about 1.1 %; 6 % is more than five sigma.
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert (module.bias == 0).all()


def test_the_same_seed_gives_the_same_network():
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(BigLittleNet(BigLittleConfig(**SMALL)).eval()(torch.ones(1, 3, 32, 32)))
    assert torch.equal(*outputs)


def test_default_network_is_bl_resnet50():
    model = on_meta(None)
    assert model.config == BigLittleConfig()
    # paper.md: bL-ResNet-50, alpha 2, beta 4.
    assert sum(p.numel() for p in model.parameters()) == 26_694_568
