"""Loading checkpoints into networks of every origin, and errors that say what does not fit."""

import copy
import dataclasses
import json
import os
import sys
import types

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import blnet
from blnet import checkpoint
from blnet.network import BigLittleConfig, BigLittleNet
from helpers.networks import SMALL, assert_same_state, small


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def refused(path, message, model=None, error=ValueError, **options):
    with pytest.raises(error, match=message) as caught:
        blnet.load(path, model, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Networks that only the caller can build ----------------------------------------------------------


class Tied(nn.Module):
    """An encoder and a decoder with one weight between them, and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("cache", torch.ones(2), persistent=False)


def test_any_module_needs_the_model(path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    blnet.save(model, path)
    assert checkpoint.read_header(path)["kind"] == "weights"
    refused(path, r"holds weights only; give the network they belong to: blnet.load\(path, model\)")
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    loaded = blnet.load(path, other)
    assert loaded is other
    assert not loaded.training
    assert_same_state(loaded, model)


def test_model_on_the_meta_device_is_filled(path):
    model = small()
    blnet.save(model, path)
    with torch.device("meta"):
        empty = BigLittleNet(model.config)
    assert_same_state(blnet.load(path, empty), model)


def test_frozen_parameters_stay_frozen(path):
    blnet.save(small(), path)
    model = small(1)
    model.stem.requires_grad_(False)
    loaded = blnet.load(path, model)
    assert not any(p.requires_grad for p in loaded.stem.parameters())
    assert all(p.requires_grad for p in loaded.stages.parameters())


def test_tied_weights_are_stored_once_and_stay_tied(path):
    model = Tied()
    blnet.save(model, path)
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["first.bias", "first.weight", "second.bias", "steps"]
    loaded = blnet.load(path, Tied())
    assert_same_state(loaded, model)
    assert loaded.second.weight is loaded.first.weight
    assert loaded.cache.tolist() == [1, 1]


def test_tied_weights_with_nan(path):
    model = Tied()
    with torch.no_grad():
        model.first.weight.fill_(float("nan"))
    blnet.save(model, path)
    assert blnet.load(path, Tied()).second.weight.isnan().all()


def test_tied_file_into_a_network_that_does_not_tie(path):
    blnet.save(Tied(), path)
    other = Tied()
    other.second.weight = nn.Parameter(torch.zeros(4, 4))
    loaded = blnet.load(path, other)
    assert torch.equal(loaded.first.weight, loaded.second.weight)
    with torch.no_grad():
        loaded.first.weight.zero_()
    assert loaded.second.weight.any()


def test_untied_file_into_a_network_that_ties(path):
    model = Tied()
    model.second.weight = nn.Parameter(torch.zeros(4, 4))
    blnet.save(model, path)
    refused(path, "different first.weight and second.weight, which the network ties", Tied())


def test_views_of_one_storage(path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.arange(12.0).reshape(3, 4)
            for name, view in (("whole", whole), ("row", whole[1]), ("turned", whole.t())):
                self.register_buffer(name, view)
            self.register_buffer("none", torch.empty(0, 3))
            self.register_buffer("nothing", torch.empty(0, 3))

    blnet.save(Views(), path)
    other = Views()
    for buffer in other.buffers():
        buffer.zero_()
    loaded = blnet.load(path, other)
    assert_same_state(loaded, Views())


def test_network_with_another_classifier_needs_the_model(path):
    model = small()
    model.fc = nn.Linear(64, 3)
    blnet.save(model, path)
    refused(path, "holds weights only")
    other = small(1)
    other.fc = nn.Linear(64, 3)
    assert_same_state(blnet.load(path, other), model)


def test_subclass_needs_the_model(path):
    class Twice(BigLittleNet):
        def forward(self, x):
            return 2 * super().forward(x)

    blnet.save(Twice(BigLittleConfig(**SMALL)), path)
    refused(path, "holds weights only")


# Converted networks -------------------------------------------------------------------------------


def converted(source, options, build=None, **settings):
    from blnet import registry

    model = blnet.convert((build or registry.build)(source, **options), **settings).eval()
    model.plan = dataclasses.replace(model.plan, source=source, source_options=options)
    return model


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize(
    ("source", "options"),
    [("torchvision:resnet18", {"num_classes": 5}), ("timm:resnet18d", {"num_classes": 5})],
)
def test_converted_network(path, source, options, branches):
    if source.startswith("timm"):
        pytest.importorskip("timm")
    model = converted(source, options, alpha=2, beta=2, branches=branches)
    blnet.save(model, path)
    assert checkpoint.read_header(path)["kind"] == "converted"
    state = torch.get_rng_state()
    loaded = blnet.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(model)
    assert_same_state(loaded, model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    # What was loaded can be saved and loaded again.
    blnet.save(loaded, path)
    assert_same_state(blnet.load(path), model)


def blunted(model):
    model.relu = nn.GELU()
    return model


def test_converted_network_whose_layers_were_exchanged_is_weights_alone(path):
    # Of resnet50 the big branches end with a graph, of a class of its own in each network.
    source, options = "torchvision:resnet50", {"num_classes": 3}
    model = blunted(converted(source, options, alpha=2, beta=4))
    blnet.save(model, path)
    refused(path, "holds weights only")
    loaded = blnet.load(path, blunted(converted(source, options, alpha=2, beta=4)))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    same = blnet.fuse(converted(source, options, alpha=2, beta=4))
    blnet.save(same, path)
    assert checkpoint.read_header(path)["kind"] == "converted"


def test_a_run_rebuilds_its_converted_network_once(path, monkeypatch):
    checkpoint._reconverted_on_meta.cache_clear()
    model = converted("torchvision:resnet18", {"num_classes": 3}, alpha=2, beta=2)
    blnet.save(model, path)
    monkeypatch.setattr("blnet.conversion.convert", None)
    blnet.save(model, path)
    assert checkpoint.read_header(path)["kind"] == "converted"
    blnet.save(blunted(model), path)
    assert checkpoint.read_header(path)["kind"] == "weights"


def test_converted_from_a_users_object_needs_the_model(path):
    import torchvision

    model = blnet.convert(torchvision.models.resnet18(num_classes=5), alpha=2, beta=2)
    blnet.save(model, path)
    refused(path, "was converted from a network without a name; convert that network again")
    again = blnet.convert(torchvision.models.resnet18(num_classes=5), alpha=2, beta=2)
    assert_same_state(blnet.load(path, again), model)


def test_a_file_cannot_make_us_call_what_it_names(path, monkeypatch):
    import torchvision

    called = []
    module = types.ModuleType("their_module")

    def build(num_classes):
        called.append(num_classes)
        return torchvision.models.resnet18(num_classes=num_classes)

    module.build = build
    monkeypatch.setitem(sys.modules, "their_module", module)
    model = converted("their_module:build", {"num_classes": 5}, alpha=2, beta=2)
    blnet.save(model, path)
    called.clear()
    refused(path, "from their_module:build, and rebuilding it would import and call that; pass")
    assert called == []
    assert_same_state(blnet.load(path, trust_source=True), model)
    assert called == [5]


def test_rebuilding_downloads_nothing(path):
    options = {"num_classes": 1000, "weights": "IMAGENET1K_V1"}

    def build(source, num_classes, weights):
        from blnet import registry

        return registry.build(source, num_classes=num_classes)

    model = converted("torchvision:resnet18", options, build, alpha=2, beta=2)
    blnet.save(model, path)
    assert_same_state(blnet.load(path), model)


def test_source_that_cannot_be_built(path):
    model = converted("torchvision:resnet18", {}, alpha=2, beta=2)
    model.plan = dataclasses.replace(model.plan, source="torchvision:resnet17")
    blnet.save(model, path)
    refused(path, "cannot be rebuilt from torchvision:resnet17: torchvision has no")


def test_plan_that_is_no_plan_is_ignored(path):
    model = nn.Linear(2, 2)
    model.plan = "a word of the user's own"
    blnet.save(model, path)
    assert checkpoint.read_header(path)["kind"] == "weights"


# What does not fit --------------------------------------------------------------------------------


def test_keys_and_shapes_that_do_not_fit(path):
    blnet.save(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), path)
    model = nn.ModuleDict({"0": nn.Linear(3, 5), "2": nn.Linear(4, 4)})
    before = copy.deepcopy(model.state_dict())
    text = refused(path, "does not fit the network; ", model)
    assert "missing keys: 2.weight, 2.bias;" in text
    assert "extra keys: 1.bias, 1.weight;" in text
    assert "wrong shapes: 0.weight (4, 3) for (5, 3), 0.bias (4,) for (5,)" in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


def test_long_lists_are_cut(path):
    blnet.save(nn.Sequential(*(nn.Linear(1, 1) for _ in range(10))), path)
    text = refused(path, "extra keys", nn.Sequential())
    assert text.endswith("and 8 more")
    assert text.count("weight") + text.count("bias") == 12


def test_numbers_of_another_kind(path):
    class Steps(nn.Module):
        def __init__(self, steps):
            super().__init__()
            self.register_buffer("steps", steps)

    blnet.save(Steps(torch.arange(3)), path)
    refused(path, "wrong dtypes: steps torch.int64 for torch.float32", Steps(torch.zeros(3)))


def header_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["blnet"])


def with_header(path, **changes):
    """Write a small network's file with a header changed; None removes an entry."""
    blnet.save(small(), path)
    header = {**header_of(path), **changes}
    header = {key: value for key, value in header.items() if value is not None}
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights, path, {"blnet": json.dumps(header)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has format version 2 and this blnet reads up to 1; install a newer"),
        ({"version": "1"}, "has a damaged header"),
        ({"version": None}, "has a damaged header"),
        ({"format": "other"}, "no checkpoint that blnet.save wrote"),
        ({"kind": None}, "has a damaged header"),
        ({"kind": "picture"}, "has a damaged header of kind 'picture'"),
        ({"ties": None}, "has a damaged header"),
        ({"ties": {"a": []}}, "has a damaged header"),
        ({"ties": {"a": "b"}}, "is damaged: its header ties a to b"),
        ({"ties": {"fc.bias": "fc.weight"}}, "is damaged: its header ties fc.bias"),
        ({"config": None}, "has a damaged header of kind 'big-little'"),
        ({"config": {"alpha": 0}}, "describes no network: alpha must be a whole number"),
        ({"config": {"alfa": 2}}, "describes no network: the configuration has no field alfa"),
        ({"config": {}}, "does not fit the network; "),
        ({"kind": "converted"}, "has a damaged header of kind 'converted'"),
        ({"kind": "converted", "plan": {"source": "timm:resnet18"}}, "has a damaged plan"),
    ],
    ids=str,
)
def test_bad_headers(path, changes, message):
    with_header(path, **changes)
    refused(path, message)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"blnet": "{"}, {"blnet": "[1]"}])
def test_foreign_safetensors_file(path, metadata):
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata)
    refused(path, "is a safetensors file but no checkpoint that blnet.save wrote")


@pytest.mark.parametrize("keep", [0, 4, 30, 2000, -1], ids=str)
def test_truncated_file(path, keep):
    blnet.save(small(), path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "is not a whole safetensors file")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_refused_in_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / f"bytes-{os.getpid()}.safetensors"
    path.write_bytes(content)
    refused(path, "is not a whole safetensors file|no checkpoint that blnet.save wrote")


def test_torch_file_is_told_where_to_go(path):
    torch.save({"a": torch.zeros(2)}, path)
    refused(path, "is not a whole safetensors file .*blnet.load_official reads")


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.safetensors", "does not exist; check the path", error=OSError)
    refused(tmp_path, "is not a file; give the checkpoint file itself")


def test_a_file_that_may_not_be_read_is_there_all_the_same(path, monkeypatch):
    """Tests may run as root, whom no permission stops; safetensors says "No such file"."""
    path.write_bytes(b"x")

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", refuse)
    refused(path, "Permission denied", error=PermissionError)
