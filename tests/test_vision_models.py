"""The image networks: paper.md's counts, torchvision's outputs, and what every builder must do."""

import copy
import inspect
import io
import pickle
from functools import cache, lru_cache

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import blnet
import blnet.vision
from blnet import registry
from blnet.blocks import ResidualBlock
from blnet.meta import run_on_meta
from blnet.network import BigLittleNet
from blnet.vision import models
from helpers.networks import on_meta

# Other tests may have registered the networks for speech.
BUILDERS = [name for name in registry.names(big_little=True) if hasattr(blnet.vision, name)]
PLAIN = {18: "resnet18", 34: "resnet34", 50: "resnet50", 101: "resnet101", 152: "resnet152"}

# (name, alpha, beta) -> (GMACs to the digits given, parameters), as paper.md has them.
PAPER = {
    ("bl_resnet50", 2, 2): ("2.911", 26_974_632),
    ("bl_resnet50", 2, 4): ("2.856", 26_694_568),
    ("bl_resnet50", 4, 2): ("2.491", 26_306_856),
    ("bl_resnet50", 4, 4): ("2.477", 26_236_456),
    ("bl_resnet101", 2, 4): ("3.893", 41_851_560),
    ("bl_resnet152", 2, 4): ("5.040", 57_359_016),
    ("bl_resnext50_32x4d", 2, 4): ("3.027", 26_192_168),
    ("bl_resnext101_32x4d", 2, 4): ("4.079", 41_512_744),
    ("bl_resnext101_64x4d", 2, 4): ("7.142", 77_355_816),
    ("bl_seresnext50_32x4d", 2, 4): ("3.030", 28_767_120),
    ("bl_seresnext101_32x4d", 2, 4): ("4.08", 45_881_952),
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def rounded(macs, like):
    return f"{macs / 1e9:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(("network", "expected"), PAPER.items(), ids=str)
def test_counts_are_those_of_the_paper(network, expected):
    name, alpha, beta = network
    counted = blnet.profile(on_meta(name, alpha=alpha, beta=beta))
    assert (rounded(counted.macs, expected[0]), counted.parameters) == expected


def test_plain_resnet50_has_the_counts_of_the_paper():
    counted = blnet.profile(on_meta("resnet50"))
    assert (rounded(counted.macs, "4.089"), counted.parameters) == ("4.089", 25_557_032)


def test_builders_are_the_ten_named():
    assert [
        *("bl_resnet18", "bl_resnet34", "bl_resnet50", "bl_resnet101", "bl_resnet152"),
        *("bl_resnext50_32x4d", "bl_resnext101_32x4d", "bl_resnext101_64x4d"),
        *("bl_seresnext50_32x4d", "bl_seresnext101_32x4d"),
    ] == BUILDERS
    for name in BUILDERS:
        build = getattr(blnet.vision, name)
        assert build is registry._ENTRIES[name].build
        assert list(inspect.signature(build).parameters) == [
            *("alpha", "beta", "branches", "num_classes", "in_channels", "stem", "width")
        ]


@pytest.mark.parametrize("name", ["bl_resnet18", "bl_resnet50", "resnet18", "resnet50"])
def test_width_multiplies_every_width(name):
    whole, half = on_meta(name), on_meta(name, width=0.5)
    # Sorted, as torchvision's networks and ours name layers otherwise.
    widths = [
        sorted(len(value) for key, value in model.named_parameters() if not key.startswith("fc."))
        for model in (whole, half)
    ]
    assert [2 * width for width in widths[1]] == widths[0]
    macs = blnet.profile(whole).macs / blnet.profile(half).macs
    assert 3.5 < macs < 4, "all but the first convolution and the classifier cost a quarter"


@pytest.mark.parametrize(
    ("name", "width", "said"),
    [
        ("bl_resnet18", 0.3, "choose|take one that gives whole numbers"),
        ("bl_resnet18", 0.001, "whole"),
        ("bl_resnet18", float("nan"), "whole"),
        ("wide_resnet50_2", 0.5, "width must be 1 for wide_resnet50_2"),
    ],
)
def test_a_width_that_makes_no_network_is_refused(name, width, said):
    with pytest.raises(ValueError, match=said):
        on_meta(name, width=width)


def test_plain_networks_begin_with_silent_residual_branches():
    # As in the paper and in ours, so that one recipe serves both.
    plain = registry.build("resnet18")
    assert not plain.layer1[0].bn2.weight.any()
    assert plain.layer1[0].bn1.weight.all()


# One branch is the plain network ------------------------------------------------------------------


def torchvision_key(key):
    stem = {"stem.conv1": "conv1", "stem.bn1": "bn1"}
    for ours, theirs in stem.items():
        key = key.replace(ours, theirs)
    if key.startswith("stages."):
        _, stage, rest = key.split(".", 2)
        key = f"layer{int(stage) + 1}.{rest}"
    return key


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((f"bl_resnet{depth}", plain) for depth, plain in PLAIN.items()),
        ("bl_resnext50_32x4d", "resnext50_32x4d"),
        ("bl_resnext101_64x4d", "resnext101_64x4d"),
    ],
)
def test_one_branch_equals_torchvision(ours, theirs):
    model = on_meta(ours, branches=1)
    with torch.device("meta"):
        reference = torchvision.models.get_model(theirs)
    assert parameters(model) == parameters(reference)
    assert blnet.profile(model).macs == blnet.profile(reference).macs

    reference = reference.to_empty(device="cpu")
    randomise(reference, 1)
    weights = reference.state_dict()
    names = {key: torchvision_key(key) for key in model.state_dict()}
    assert sorted(names.values()) == sorted(weights)
    model.load_state_dict({key: weights[name] for key, name in names.items()}, assign=True)
    images = torch.randn(2, 3, 65, 47)
    with torch.no_grad():
        expected = reference.eval()(images)
        # The same operations in the same order: only the order of sums may differ.
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


def test_one_branch_of_se_resnext_has_timms_count():
    timm = pytest.importorskip("timm")
    for name in ("seresnext50_32x4d", "seresnext101_32x4d"):
        with torch.device("meta"):
            reference = timm.create_model(name, pretrained=False)
        model = on_meta(f"bl_{name}", branches=1)
        assert parameters(model) == parameters(reference)
        # timm pools its gates by a mean, so that only convolutions and products count, as here.
        assert blnet.profile(model).macs == blnet.profile(reference).macs


# Options of every builder -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "beta", "branches"),
    [(1, 1, 2), (2, 2, 2), (2, 4, 2), (4, 2, 2), (4, 4, 2), (2, 2, 3), (2, 4, 4), (2, 2, 1)],
)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_takes_every_option(name, alpha, beta, branches):
    options = {"alpha": alpha, "beta": beta, "branches": branches}
    for classes, channels, stem, size in ((7, 1, "small", (9, 14)), (0, 5, "imagenet", (65, 33))):
        model = on_meta(name, num_classes=classes, in_channels=channels, stem=stem, **options)
        config = model.config
        assert (config.alpha, config.beta, config.branches) == (alpha, beta, branches)
        assert (config.num_classes, config.in_channels, config.stem) == (classes, channels, stem)
        out = run_on_meta(model, (2, channels, *size))
        assert out.shape == (2, classes or config.widths[-1])


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 3}, "alpha 3"),
        ({"alpha": 0}, "alpha must be a whole number"),
        ({"beta": 0.5}, "beta must be a whole number"),
        ({"branches": 0}, "branches must be a whole number"),
        ({"num_classes": -1}, "num_classes must be a whole number"),
        ({"in_channels": 0}, "in_channels must be a whole number"),
        ({"stem": "tiny"}, "stem must be one of imagenet, small, got 'tiny'"),
    ],
    ids=str,
)
def test_every_builder_refuses_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        on_meta(name, **options)


@pytest.mark.parametrize("name", models.PLAIN_MODELS)
def test_plain_networks(name):
    reference = getattr(torchvision.models, name)
    with torch.device("meta"):
        assert parameters(on_meta(name)) == parameters(reference())
    model = on_meta(name, num_classes=7, in_channels=1, stem="small").eval()
    assert model(torch.empty(2, 1, 9, 14, device="meta")).shape == (2, 7)
    headless = on_meta(name, num_classes=0, in_channels=4).eval()
    assert headless(torch.empty(2, 4, 33, 65, device="meta")).dim() == 2


def test_plain_small_stem_keeps_the_size():
    model = on_meta("resnet18", stem="small").eval()
    shapes = []
    model.layer1.register_forward_hook(lambda _m, inputs, _y: shapes.append(inputs[0].shape))
    model(torch.empty(1, 3, 31, 17, device="meta"))
    assert shapes == [(1, 64, 31, 17)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes must be a whole number of at least 0, got -1"),
        ({"num_classes": "ten"}, "num_classes must be a whole number of at least 0, got 'ten'"),
        ({"in_channels": 0}, "in_channels must be a whole number of at least 1, got 0"),
        ({"stem": "tiny"}, "stem must be one of imagenet, small, got 'tiny'"),
    ],
    ids=str,
)
def test_plain_networks_refuse_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        registry.build("resnet18", **options)


# What must work on every builder ------------------------------------------------------------------


def randomise(model, seed):
    """Give a network weights of which every one shows in the output, at any depth."""
    torch.manual_seed(seed)
    last = {id(m.last_norm) for m in model.modules() if isinstance(m, ResidualBlock)}
    last |= {id(m.bn3) for m in model.modules() if hasattr(m, "bn3")}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Small residuals, as in trained networks: else 50 blocks overflow a float16.
                low = 0.1 if id(module) in last else 0.5
                nn.init.uniform_(module.weight, low, 2 * low)
                nn.init.normal_(module.bias, 0, 0.1)
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                module.num_batches_tracked.zero_()
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, 0, (2 / fan_in) ** 0.5)
                if module.bias is not None:
                    nn.init.normal_(module.bias, 0, 0.1)


# One network at a time: ten of them, and a second worker's ten, are gigabytes.
@lru_cache(maxsize=1)
def trained(name):
    """Return a network that looks trained, built once; a test that changes it takes a copy."""
    model = on_meta(name, num_classes=10).to_empty(device="cpu")
    randomise(model, 0)
    return model.eval()


@cache
def some_images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@lru_cache(maxsize=1)
def logits(name):
    with torch.no_grad():
        return trained(name)(some_images())


def assert_near(actual, expected, tolerance):
    """Compare by norm: single logits near zero have no relative precision."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance


@pytest.fixture(scope="module", params=BUILDERS)
def builder(request):
    """Name each builder in turn; the scope makes pytest run all of a builder's tests together."""
    return request.param


def test_logits_tell_images_apart(builder):
    # Without this the comparisons below could hold for a network that has lost its input.
    first, second = logits(builder)
    assert logits(builder).isfinite().all()
    assert (first - second).norm() > 1e-3 * first.norm()


def test_feature_extractor(builder):
    model, images = trained(builder), some_images()
    nodes = {"stem": "stem", "stages.0": "first", "stages.3": "last", "fc": "logits"}
    extractor = create_feature_extractor(model, nodes)
    with torch.no_grad():
        features = extractor(images)
        assert torch.equal(features["logits"], logits(builder))
        stem = model.stem(images)
        assert torch.equal(features["stem"], stem)
        assert torch.equal(features["first"], model.stages[0](stem))
        assert torch.equal(features["last"], model.forward_features(images))
    _, evaluated = get_graph_node_names(model)
    # Merges are nodes of their own, so that a user can ask for what a module has merged.
    assert any(node.startswith("stages.0.merge") for node in evaluated)


def test_export_of_one_size():  # the others are exported for any batch, which asks more
    images = some_images()
    exported = torch.export.export(trained("bl_resnet18"), (images,))
    with torch.no_grad():
        assert_near(exported.module()(images), logits("bl_resnet18"), 1e-6)


@pytest.mark.parametrize("name", [b for b in BUILDERS if "101" not in b and "152" not in b])
def test_export_with_dynamic_batch(name):  # the deeper ones have more of the same blocks
    images = some_images()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(trained(name), (images,), dynamic_shapes=({0: batch},))
    three = torch.cat([images, images[:1]])
    with torch.no_grad():
        assert_near(exported.module()(three), trained(name)(three), 1e-6)
        assert exported.module()(images[:1]).shape == (1, 10)


def test_deepcopy(builder):
    model = trained(builder)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(some_images()), logits(builder))
    own, copied = model.state_dict(), twin.state_dict()
    assert list(own) == list(copied)
    assert not {v.data_ptr() for v in own.values()} & {v.data_ptr() for v in copied.values()}
    assert twin.config == model.config


def test_state_dict_pickles(builder):
    weights = pickle.loads(pickle.dumps(trained(builder).state_dict()))
    model = on_meta(builder, num_classes=10)
    model.load_state_dict(weights, assign=True)
    with torch.no_grad():
        assert torch.equal(model.eval()(some_images()), logits(builder))


def test_state_dict_goes_through_torch_save():
    file = io.BytesIO()
    torch.save(trained("bl_resnet18").state_dict(), file)
    file.seek(0)
    weights = torch.load(file, weights_only=True)
    model = on_meta("bl_resnet18", num_classes=10)
    model.load_state_dict(weights, assign=True)
    with torch.no_grad():
        assert torch.equal(model.eval()(some_images()), logits("bl_resnet18"))


def test_channels_last(builder):
    model = copy.deepcopy(trained(builder)).to(memory_format=torch.channels_last)
    images = some_images().to(memory_format=torch.channels_last)
    for stage in (model.stem.conv1, model.stages[0].branches[0][0].conv2):
        assert stage.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.is_contiguous(memory_format=torch.channels_last)
        assert_near(model(images), logits(builder), 1e-4)


# Rounding of a chain of up to 50 blocks, each one adding some eps to what it adds.
HALF = {torch.bfloat16: 16 * 2**-8, torch.float16: 16 * 2**-11}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(builder, dtype):
    model = copy.deepcopy(trained(builder)).to(dtype)
    with torch.no_grad():
        out = model(some_images().to(dtype))
    assert out.dtype == dtype
    assert_near(out, logits(builder), HALF[dtype])


def test_autocast(builder):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = trained(builder)(some_images())
    assert out.dtype == torch.bfloat16
    assert_near(out, logits(builder), HALF[torch.bfloat16])


def test_train_and_eval(builder):
    model, images = copy.deepcopy(trained(builder)), some_images()
    model.train()
    assert all(module.training for module in model.modules())
    before = {key: value.clone() for key, value in model.named_buffers()}
    model(images).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    for key, value in model.named_buffers():
        assert not torch.equal(value, before[key]), key
    model.eval()
    assert not any(module.training for module in model.modules())
    before = {key: value.clone() for key, value in model.named_buffers()}
    with torch.no_grad():
        both = model(images)
        # In evaluation an image's logits do not depend on the batch it is in.
        assert_near(torch.cat([model(images[:1]), model(images[1:])]), both, 1e-5)
    for key, value in model.named_buffers():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("size", [(33, 47), (1, 1)], ids=str)
def test_odd_sizes(builder, size):
    # Here the branches' sizes round differently; 1x1 is the least that there is.
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        out = trained(builder)(images)
    assert out.shape == (1, 10)
    assert out.isfinite().all()


def test_builders_are_documented():
    for name in BUILDERS:
        build = getattr(blnet.vision, name)
        assert build.__name__ == name
        for option in inspect.signature(build).parameters:
            assert f"{option}: " in build.__doc__
        assert isinstance(on_meta(name), BigLittleNet)
