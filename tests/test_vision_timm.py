"""The Big-Little networks in timm: registration, weights, heads, features, errors."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import nn

import blnet
import blnet.vision
import blnet.vision.timm as registered
from blnet import vision
from blnet.checkpoint import read_header
from blnet.module import BigLittleModule
from blnet.official import official_key

ROOT = Path(__file__).resolve().parents[1]
TINY = {"width": 0.25, "num_classes": 10}


def tiny(name="bl_resnet18", **options):
    return timm.create_model(name, **{**TINY, **options}).eval()


def shaken(model):
    """Give a network weights with which no layer is silent, and return it."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.bias.data, module.running_mean):
                value.uniform_(0.1, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def images(*size, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, *(size or (65, 97)), generator=generator)


def published(model):
    weights = {f"module.{official_key(k)}": v for k, v in model.state_dict().items()}
    return {"epoch": 110, "state_dict": weights}


def one_sentence(caught):
    assert "\n" not in str(caught.value)


def test_timm_lists_the_ten():
    assert sorted(timm.list_models("bl_*")) == sorted(vision.__all__)
    assert set(vision.__all__) <= set(registered.__all__)
    for name in registered.__all__:
        assert hasattr(registered, name)


@pytest.mark.parametrize("name", vision.__all__)
def test_every_network_is_ours_with_timms_settings(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        ours = getattr(vision, name)()
    assert model.config == ours.config
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }
    cfg = model.pretrained_cfg
    assert (cfg["architecture"], cfg["input_size"], cfg["crop_pct"]) == (name, (3, 224, 224), 0.875)
    assert (cfg["mean"], cfg["interpolation"]) == ((0.485, 0.456, 0.406), "bilinear")
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["std"]) == ((3, 224, 224), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("settings_", [{}, {"alpha": 4, "beta": 2}, {"branches": 3}], ids=str)
def test_same_seed_same_logits_and_weights_move_both_ways(settings_):
    torch.manual_seed(3)
    model = timm.create_model("bl_resnet50", **TINY, **settings_)
    torch.manual_seed(3)
    ours = vision.bl_resnet50(**TINY, **settings_)
    for (key, value), (other, same) in zip(
        model.state_dict().items(), ours.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(value, same)
    shaken(ours).eval()
    model.load_state_dict(ours.state_dict())
    assert torch.equal(model.eval()(images()), ours(images()))
    ours.load_state_dict(shaken(model).state_dict())
    assert torch.equal(model(images()), ours(images()))


def test_heads():
    model = shaken(tiny(in_chans=1))
    x = images(channels=1)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.get_classifier()(pooled), model(x))
    assert (model.get_classifier(name_only=True), model.in_chans) == ("fc", 1)
    model.reset_classifier(7)
    assert (model(x).shape, model.num_classes, model.config.num_classes) == ((2, 7), 7, 7)
    assert not model.fc.training
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    with pytest.raises(
        ValueError, match="num_classes must be a whole number of at least 0, got -1"
    ):
        model.reset_classifier(-1, "max")
    assert (model.num_classes, model.global_pool) == (0, "avg")


def test_pools():
    x = images()
    features = tiny(num_classes=0, global_pool="")(x)
    assert features.shape == (2, 128, 3, 4)
    model = tiny(global_pool="max")
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(4, "catavgmax")
    assert (model.num_features, model.head_hidden_size, model.fc.in_features) == (128, 256, 256)
    both = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), both)
    assert model(x).shape == (2, 4)
    with pytest.raises(ValueError, match="leaves a map that no classifier takes, got 3 classes"):
        model.reset_classifier(3, "")


def test_dropout_is_in_training_only():
    model = tiny(drop_rate=0.5)
    features = torch.ones(2, 128, 3, 4)
    assert torch.equal(model.forward_head(features, pre_logits=True), torch.ones(2, 128))
    dropped = model.train().forward_head(features, pre_logits=True)
    share = (dropped == 0).float().mean().item()
    assert 0.3 < share < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 3}, "alpha 3 with 2 branches divides a width of"),
        ({"alpha": 0}, "alpha must be a whole number of at least 1, got 0"),
        ({"stem": "big"}, "stem must be one of imagenet, small, got 'big'"),
        ({"global_pool": "min"}, "global_pool must be one of avg, max"),
        ({"drop_rate": 1.5}, "drop_rate must be a number from 0 to below 1, got 1.5"),
        ({"drop_path_rate": 0.1}, "bl_resnet18 takes no option drop_path_rate; its options are al"),
        ({"in_channels": 1}, "takes no option in_channels"),
        ({"features_only": True, "feature_cls": "list"}, "feature_cls must be one of getter, hook"),
        ({"features_only": True, "out_indices": (1, 5)}, "out_indices must name levels from 0 to"),
        ({"features_only": True, "out_indices": ()}, "out_indices must name levels from 0 to 4"),
        ({"features_only": True, "out_indices": 6}, "out_indices must name levels from 0 to 4"),
        ({"pretrained": True}, r"no pretrained weights of bl_resnet18; .*blnet\.load_official"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        timm.create_model("bl_resnet18", **options)
    one_sentence(caught)


def test_asking_for_no_drop_path_is_no_error():
    assert tiny(drop_path_rate=0.0, drop_block_rate=0.0).num_classes == 10


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["bl_resnet18", "bl_resnet50"]),
    st.integers(1, 3),
    st.integers(33, 100),
    st.integers(33, 100),
    st.lists(st.integers(-5, 4), min_size=1, max_size=5, unique_by=lambda i: i % 5),
    st.sampled_from(["getter", "hook"]),
    st.sampled_from(["imagenet", "small"]),
)
def test_features_are_what_their_info_says(name, branches, height, width, levels, way, stem):
    with torch.device("meta"):
        net = timm.create_model(
            name,
            branches=branches,
            stem=stem,
            features_only=True,
            out_indices=tuple(levels),
            feature_cls=way,
        ).eval()
        maps = net(torch.empty(2, 3, height, width))
    finest = 1 if stem == "small" else 2
    widths = (64, 64, 128, 256, 512) if name == "bl_resnet18" else (64, 256, 512, 1024, 2048)
    reductions = (finest, *(finest**2 * r for r in (1, 2, 4, 8)))
    assert net.feature_info.channels() == [widths[level] for level in levels]
    assert net.feature_info.reduction() == [reductions[level] for level in levels]
    for features, level in zip(maps, levels, strict=True):
        size = (-(-height // reductions[level]), -(-width // reductions[level]))
        assert features.shape == (2, widths[level], *size)


def test_features_are_the_standard_ones_by_default():
    with torch.device("meta"):
        info = timm.create_model("bl_resnet50", features_only=True).feature_info
    assert info.channels() == [256, 512, 1024, 2048]
    assert info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_features_are_the_tensors_of_the_classifier(branches):
    model = shaken(tiny(branches=branches))
    x = images()
    seen = []
    hooks = [model.stem.relu.register_forward_hook(lambda *a: seen.append(a[-1]))]
    for index, stage in enumerate(model.stages):
        if isinstance(stage, BigLittleModule) and index < 2:
            hook = stage.fusion.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        else:
            hook = stage.register_forward_hook(lambda *a: seen.append(a[-1]))
        hooks.append(hook)
    expected = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, expected)
    assert all(torch.equal(a, b) for a, b in zip(maps, seen, strict=True))
    backward = model.forward_intermediates(x, [4, -4], intermediates_only=True)
    assert torch.equal(backward[0], maps[4])
    assert torch.equal(backward[1], maps[1])
    early, _ = model.forward_intermediates(x, [2], stop_early=True)
    assert torch.equal(early, maps[2])
    for level in range(5):
        pruned = tiny(branches=branches)
        pruned.load_state_dict(model.state_dict())
        before = sum(1 for _ in pruned.parameters())
        assert pruned.prune_intermediate_layers([level]) == [level]
        assert torch.equal(pruned(x), maps[level])
        assert pruned.num_features == maps[level].shape[1]
        assert sum(1 for _ in pruned.parameters()) < before
        pruned.train()(x).sum().backward()
        assert all(p.grad is not None for p in pruned.parameters()), level
    with pytest.raises(ValueError, match="output_fmt must be one of NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("branches", [1, 2])
def test_both_ways_give_the_same_features(branches):
    levels = {"features_only": True, "out_indices": (0, 1, 2, 3, 4), "branches": branches}
    model = shaken(tiny(branches=branches))
    for way in ("getter", "hook"):
        net = tiny(feature_cls=way, **levels)
        weights = {f"{'model' if way == 'getter' else 'body'}.{k}": v
                   for k, v in model.state_dict().items() if not k.startswith("fc.")}  # fmt: skip
        net.load_state_dict(weights)
        expected = model.forward_intermediates(images(), intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(net(images()), expected, strict=True)), way


def test_grad_checkpointing_keeps_the_gradients():
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = shaken(tiny())
        model.set_grad_checkpointing(enable)
        calls = []
        model.stages[0].branches[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(images()).square().sum().backward()
        assert len(calls) == 1 + enable  # run again for backward
        gradients.append([p.grad for p in model.parameters()])
    for without, with_ in zip(*gradients, strict=True):
        torch.testing.assert_close(without, with_)


def test_learning_rates_fall_with_depth():
    model = tiny("bl_resnet50", branches=3)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == sum(1 for _ in model.parameters())
    of = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    chain = [
        of["stem.conv1.weight"],
        of["stages.0.branches.2.0.conv1.weight"],
        of["stages.0.branches.2.1.conv1.weight"],
        of["stages.0.fusion.0.conv1.weight"],
        of["stages.1.branches.0.0.conv1.weight"],
        of["stages.3.0.conv1.weight"],
        of["stages.3.2.conv1.weight"],
        of["fc.weight"],
    ]
    assert chain == sorted(set(chain))
    assert of["stages.0.branches.0.0.conv1.weight"] == chain[1]
    assert of["stages.0.expands.0.0.weight"] == chain[3]


def test_a_saved_network_goes_both_ways(tmp_path):
    path = tmp_path / "net.safetensors"
    model = shaken(tiny(drop_rate=0.1))
    model.reset_classifier(4)
    blnet.save(model, path)
    assert read_header(path)["kind"] == "big-little"
    loaded = blnet.load(path)
    assert torch.equal(loaded(images()), model(images()))
    again = tiny(num_classes=4, checkpoint_path=str(path))
    assert torch.equal(again(images()), model(images()))
    model.reset_classifier(4, "max")
    blnet.save(model, path)
    assert read_header(path)["kind"] == "weights"  # a configuration knows no pool
    filled = blnet.load(path, tiny(num_classes=4, global_pool="max"))
    assert torch.equal(filled(images()), model(images()))


@pytest.mark.parametrize("kind", ["saved", "published"])
def test_pretrained_takes_a_local_file(tmp_path, kind):
    source = shaken(vision.bl_resnet50(**TINY)).eval()
    path = tmp_path / ("net.safetensors" if kind == "saved" else "net.pth")
    if kind == "saved":
        blnet.save(source, path)
    else:
        torch.save(published(source), path)
    overlay = {"file": str(path), "num_classes": 10}
    ask = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    assert torch.equal(tiny("bl_resnet50", **ask)(images()), source(images()))
    other = tiny("bl_resnet50", **ask, num_classes=3, in_chans=1)
    assert other(images(channels=1)).shape == (2, 3)
    assert torch.equal(other.stages[3][1].bn3.weight, source.stages[3][1].bn3.weight)
    summed = source.stem.conv1.weight.sum(1, keepdim=True)
    torch.testing.assert_close(other.stem.conv1.weight, summed)
    net = timm.create_model("bl_resnet50", width=0.25, features_only=True, **ask).eval()
    assert torch.equal(net(images())[-1], source.forward_features(images()))
    with pytest.raises(ValueError, match=r"do not fit the network; .*give the name, alpha, beta"):
        tiny("bl_resnet50", **ask, alpha=4)
    overlay["file"] = "absent.pth"
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist; check the path"):
        tiny("bl_resnet50", **ask)


def test_weights_of_another_kind_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="not a published Big-Little checkpoint") as caught:
        registered.checkpoint_filter_fn({"conv1.weight": torch.zeros(1)}, model)
    one_sentence(caught)


def test_blnets_tools_take_these_networks():
    model = shaken(tiny("bl_resnet50"))
    fused = blnet.fuse(model)
    assert any(not site.reason for site in blnet.fusions(fused))
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-4, atol=1e-4)
    for got, expected in zip(
        fused.forward_intermediates(images())[1],
        model.forward_intermediates(images())[1],
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    ours = blnet.profile(vision.bl_resnet50(**TINY))
    assert blnet.profile(model).macs == ours.macs
    plain = tiny(branches=1)
    converted = blnet.convert(plain, alpha=2, beta=4).eval()
    assert isinstance(converted, registered.TimmBigLittleNet)
    assert sum(isinstance(m, BigLittleModule) for m in converted.modules()) == 3
    assert converted(images()).shape == (2, 10)
    with pytest.raises(ValueError, match="holds Big-Little modules already"):
        blnet.convert(model)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False
    )


def test_importing_again_is_harmless():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(registered)
    assert sorted(timm.list_models("bl_*")) == sorted(vision.__all__)
    assert timm.__file__ != registered.__file__
    assert registered.__file__ == vision.__path__[0] + "/timm.py"


def test_vision_does_without_timm_and_says_how_to_get_it():
    done = run_python(
        "import sys\n"
        "import blnet.vision, blnet.vision.detection\n"
        "assert 'timm' not in sys.modules and 'blnet.vision.timm' not in sys.modules\n"
        "sys.modules['timm'] = None\n"
        "try:\n"
        "    import blnet.vision.timm\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "blnet.vision.timm needs timm; install it with: pip install 'blnet[train]'\n"
    )


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "timm.md").read_text()
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["features"].shape == (2, 2048, 3, 3)
    assert names["tuned"].num_classes == 3
    claimed = re.search(r"print\(shapes\)  # (.*)", text)[1]
    assert claimed == ", ".join(str(tuple(m.shape)) for m in names["maps"])
