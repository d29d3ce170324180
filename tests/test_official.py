"""Published checkpoints: read right, refused clearly, and computing what the published nets do."""

import json
import os
import pickle
import re
import zlib
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import blnet
from blnet.network import BigLittleConfig, BigLittleNet
from blnet.official import infer_config, official_key


def randomise(model):
    """Give a network weights of which every one shows in the output."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.num_batches_tracked.fill_(3)
    return model.eval()


def published(model, prefix="module."):
    return {prefix + official_key(key): value for key, value in model.state_dict().items()}


def outputs(model):
    images = torch.randn(2, model.config.in_channels, 49, 65, generator=torch.manual_seed(5))
    with torch.no_grad():
        return model(images)


@lru_cache(maxsize=1)
def small():
    """Return a small network to spoil in many ways, its published weights untouched."""
    torch.manual_seed(0)
    return randomise(BigLittleNet(BigLittleConfig(**SMALL)))


SMALL = {"widths": (64, 64, 128, 128), "depths": (3, 4, 6, 3), "stem_width": 16, "num_classes": 10}

# What the published networks compute --------------------------------------------------------------


def rebuilt_weights(keys):
    """Return the weights that the data folder's README makes up for a list of keys and shapes."""
    weights = {}
    for key, shape in keys:
        generator = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)
        shape = tuple(shape)
        if key.endswith("num_batches_tracked"):
            value = np.array(1)
        elif key.endswith("running_var"):
            value = generator.uniform(0.5, 1.5, shape)
        elif key.endswith("running_mean"):
            value = generator.normal(0, 0.1, shape)
        elif len(shape) == 1 and key.endswith("weight"):
            value = generator.uniform(0.5, 1.0, shape)
        elif len(shape) == 1:
            value = generator.normal(0, 0.1, shape)
        else:
            value = generator.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        kind = torch.int64 if key.endswith("num_batches_tracked") else torch.float32
        weights[key] = torch.tensor(value, dtype=kind)
    return weights


@pytest.fixture
def published_facts(shared):
    facts, logits = (shared(f"official_parity.{kind}") for kind in ("json", "npz"))
    return json.loads(Path(facts).read_text()), np.load(logits)


def test_parity_data_holds_three_networks(published_facts):
    assert len(published_facts[0]) == 3


@pytest.mark.parametrize("index", range(3))
def test_outputs_are_those_of_the_published_networks(index, published_facts):
    networks, logits = published_facts
    name, facts = sorted(networks.items())[index]
    model = blnet.load_official({"state_dict": rebuilt_weights(facts["keys"])})
    # 97x131: the branches' sizes round differently.
    for size in ((96, 96), (97, 131)):
        drawn = np.random.RandomState(7).normal(size=(2, 3, *size)).astype(np.float32)
        with torch.no_grad():
            ours = model(torch.tensor(drawn))[:, ::10].double().numpy()
        theirs = logits[f"{name}/{size[0]}x{size[1]}"].astype(np.float64)
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


# A round trip that needs no file ------------------------------------------------------------------

FAMILIES = {
    "basic-18": {"block": "basic", "depths": (2, 2, 2, 2), "widths": (32, 32, 64, 64)},
    "50": {},
    "50-grouped": {"cardinality": 8, "base_width": 16, "widths": (128, 128, 256, 256)},
    "50-se": {"se_reduction": 4},
    "101": {"depths": (4, 8, 18, 3)},
    "three-stages": {"depths": (3, 9, 2), "widths": (64, 64, 128)},
    "grey": {"in_channels": 1, "num_classes": 3},
}


@pytest.mark.parametrize(("alpha", "beta"), [(2, 2), (2, 4), (4, 2), (4, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, alpha, beta):
    torch.manual_seed(1)
    config = BigLittleConfig(**{**SMALL, **FAMILIES[family]}, alpha=alpha, beta=beta)
    model = randomise(BigLittleNet(config))
    loaded = blnet.load_official({"state_dict": published(model), "epoch": 110})
    if family == "basic-18":
        # Every beta gives stages of two blocks the same little branch: the paper's habit is said.
        assert loaded.config == BigLittleConfig(**{**SMALL, **FAMILIES[family]}, alpha=alpha)
    else:
        assert loaded.config == config
    assert not loaded.training
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("outer", [True, False])
def test_prefix_and_outer_dict_are_optional(prefix, outer):
    weights = OrderedDict(published(small(), prefix))
    loaded = blnet.load_official({"state_dict": weights, "arch": "x"} if outer else weights)
    assert torch.equal(outputs(loaded), outputs(small()))


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_file(tmp_path, prefix):
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": published(small(), prefix)}, path)
    for source in (path, str(path)):
        assert torch.equal(outputs(blnet.load_official(source)), outputs(small()))


def test_gates_published_as_linear_layers():
    torch.manual_seed(2)
    model = randomise(BigLittleNet(BigLittleConfig(**SMALL, se_reduction=4)))
    weights = published(model)
    gates = [key for key in weights if ".se_layer." in key and key.endswith("weight")]
    assert gates
    flat = {key: weights[key].flatten(1) for key in gates}
    loaded = blnet.load_official({**weights, **flat})
    assert torch.equal(outputs(loaded), outputs(model))


def test_missing_batch_counters_are_forgiven():
    weights = published(small())
    old = {key: value for key, value in weights.items() if "num_batches_tracked" not in key}
    assert len(old) < len(weights)
    loaded = blnet.load_official(old)
    assert torch.equal(outputs(loaded), outputs(small()))
    assert loaded.stem.bn1.num_batches_tracked == 0
    assert blnet.load_official(weights).stem.bn1.num_batches_tracked == 3


def test_source_is_not_shared_nor_changed():
    weights = published(small())
    before = {key: value.clone() for key, value in weights.items()}
    loaded = blnet.load_official(weights)
    sources = {value.untyped_storage().data_ptr() for value in weights.values()}
    with torch.no_grad():
        for value in loaded.state_dict().values():
            assert value.untyped_storage().data_ptr() not in sources
            value.zero_()
    assert all(torch.equal(value, before[key]) for key, value in weights.items())


def test_half_precision_source_becomes_float32():
    weights = {
        key: value.half() if value.is_floating_point() else value
        for key, value in published(small()).items()
    }
    loaded = blnet.load_official(weights)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.fc.weight, small().fc.weight.half().float())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("stem.conv1.weight", "conv1.weight"),
        ("stem.pool.little.4.running_mean", "bn_l1.running_mean"),
        ("stem.pool.expand.0.weight", "l_conv2.weight"),
        ("stem.pool.fusion.1.bias", "bn_bl_init.bias"),
        ("stages.0.branches.0.0.conv1.weight", "layer1.little.0.conv1.weight"),
        ("stages.1.branches.1.2.downsample.1.weight", "layer2.big.2.downsample.1.weight"),
        ("stages.2.expands.0.1.bias", "layer3.little_e.1.bias"),
        ("stages.2.fusion.0.bn3.weight", "layer3.fusion.0.bn3.weight"),
        ("stages.3.2.se.fc1.bias", "layer4.2.se_layer.fc1.bias"),
        ("fc.bias", "fc.bias"),
    ],
)
def test_official_key(ours, theirs):
    assert official_key(ours) == theirs


# What is refused ----------------------------------------------------------------------------------


def refused(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        blnet.load_official(source)
    assert str(caught.value).isprintable(), "more than one line, or colours"
    return str(caught.value)


def test_missing_and_extra_keys_are_listed():
    weights = published(small())
    for key in ("layer2.fusion.0.conv2.weight", "bn_b0.running_var"):
        del weights[f"module.{key}"]
    weights |= {"module.layer9.bias": torch.zeros(1), "module.odd": torch.zeros(1)}
    text = refused(weights, "the checkpoint does not fit its own network")
    assert "missing keys: bn_b0.running_var, layer2.fusion.0.conv2.weight" in text
    assert "extra keys: layer9.bias, odd" in text


def test_long_lists_are_cut():
    extra = {f"extra{index:02}": torch.zeros(1) for index in range(40)}
    text = refused({**published(small(), ""), **extra}, "extra keys: extra00, extra01")
    assert text.endswith("extra38, extra39")
    more = {f"extra{index:02}": torch.zeros(1) for index in range(50)}
    text = refused({**published(small(), ""), **more}, "extra keys: extra00, extra01")
    assert "extra39 and 10 more" in text
    assert "extra40" not in text


def test_a_key_is_told_on_one_line_whatever_it_is():
    odd = {"two\nlines": torch.zeros(1), "\x1b[1mbold": torch.zeros(1)}
    assert "'two\\nlines'" in refused({**published(small(), ""), **odd}, "extra keys")


def test_a_key_with_and_without_the_prefix():
    weights = published(small())
    text = refused({**weights, "fc.bias": weights["module.fc.bias"] + 1}, "fc.bias twice")
    assert "'module.'" in text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(10, dtype=torch.complex64), "fc.bias is of torch.complex64, .*torch.float32"),
        (torch.zeros(10, dtype=torch.int64), "fc.bias is of torch.int64, the network needs"),
        (torch.zeros(10).to_sparse(), "must be dense tensors with values.*as are fc.bias"),
        (torch.zeros(10, device="meta"), "must be dense tensors with values.*as are fc.bias"),
    ],
    ids=["complex", "integer", "sparse", "meta"],
)
def test_weights_of_another_kind(value, message):
    refused({**published(small(), ""), "fc.bias": value}, message)


@pytest.mark.parametrize("source", [None, 5, [1]], ids=str)
def test_what_is_neither_a_path_nor_a_dict(source):
    refused(source, "takes the path of a published checkpoint or the dict .* got (NoneType|int|li)")


@pytest.mark.parametrize(
    "key", ["conv1.weight", "l_conv0.weight", "fc.weight", "layer1.big.0.conv1.weight"]
)
def test_missing_decisive_key(key):
    weights = published(small(), "")
    del weights[key]
    refused(weights, f"not a published Big-Little checkpoint: {re.escape(key)} is missing")


def test_missing_width_key():
    weights = published(small(), "")
    del weights["layer2.big.0.conv3.weight"]
    refused(weights, "'layer2.big.0.conv3.weight' is missing, which decides a width")


def test_wrong_shape_is_told():
    weights = published(small(), "")
    weights["layer3.fusion.0.conv2.weight"] = torch.zeros(3, 3)
    refused(weights, r"layer3.fusion.0.conv2.weight has shape \(3, 3\), the network .* needs")


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 3), (0, 0, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "key",
    [
        *("conv1.weight", "l_conv0.weight", "fc.weight", "layer1.big.0.conv2.weight"),
        *("layer1.big.0.conv3.weight", "layer2.big.0.conv3.weight"),
        "layer1.big.0.se_layer.fc1.weight",
    ],
)
def test_wrong_shape_of_a_decisive_key(key, shape):
    if shape == (3, 3) and key == "fc.weight":
        shape = (3, 3, 3)
    refused({**published(small(), ""), key: torch.zeros(shape)}, "checkpoint")


def test_blocks_that_no_beta_explains():
    weights = {
        key: value
        for key, value in published(small(), "").items()
        if not key.startswith("layer3.big.3.")
    }
    refused(weights, "no beta gives|does not fit")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "it is empty"),
        ({"state_dict": {}}, "it is empty"),
        ({"state_dict": [1]}, "'state_dict' must be a dict of tensors, got list"),
        ({"epoch": 3, "arch": "x"}, "no tensors: epoch, arch"),
    ],
    ids=str,
)
def test_not_a_state_dict(source, message):
    refused(source, message)


def test_plain_resnet_is_told_where_to_go():
    import torchvision

    with torch.device("meta"):
        weights = torchvision.models.resnet18().state_dict()
    refused(weights, "not a published Big-Little checkpoint: l_conv0.weight.*blnet.convert")


class Code:
    """What a pickle must not be allowed to do."""

    ran = False

    def __reduce__(self):
        return (exec, ("import blnet.official; blnet.official.RAN = True",))


def test_pickle_with_code_is_refused_and_not_run(tmp_path):
    for name, write in (
        ("new.pth", lambda p: torch.save({"state_dict": Code()}, p)),
        ("old.pth", lambda p: torch.save(Code(), p, _use_new_zipfile_serialization=False)),
        ("bare.pkl", lambda p: p.write_bytes(pickle.dumps(Code()))),
    ):
        path = tmp_path / name
        write(path)
        text = refused(path, "is not a torch checkpoint of plain tensors")
        assert str(path) in text
        assert not hasattr(blnet.official, "RAN")


def test_whole_module_is_refused(tmp_path):
    path = tmp_path / "module.pth"
    torch.save(nn.Linear(2, 2), path)
    text = refused(path, "is not a torch checkpoint of plain tensors, which is all that is read")
    assert "weights_only" not in text, "PyTorch advises to load it without care"


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02", b"PK\x03\x04" + bytes(50)])
def test_other_files(tmp_path, content):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    refused(path, "file.pth is not a torch checkpoint")


def test_truncated_file(tmp_path):
    path = tmp_path / "cut.pth"
    torch.save(published(small()), path)
    path.write_bytes(path.read_bytes()[:5000])
    refused(path, "cut.pth is not a torch checkpoint")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_in_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / f"bytes-{os.getpid()}.pth"
    path.write_bytes(content)
    refused(path, "is not a torch checkpoint|holds a")


def test_a_list_of_tensors_is_no_checkpoint(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([torch.zeros(2)], path)
    refused(path, "holds a list; a checkpoint holds a dict")


def test_folder_and_missing_file(tmp_path):
    refused(tmp_path, "is a folder; give the checkpoint file itself")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        blnet.load_official(tmp_path / "none.pth")


def test_infer_config_reads_nothing_but_shapes():
    with torch.device("meta"):
        model = BigLittleNet(BigLittleConfig())
    weights = {official_key(key): value for key, value in model.state_dict().items()}
    assert infer_config(weights) == BigLittleConfig()
