"""Our checkpoints: bit-equal round trips, and whole files or none."""

import copy
import os
import stat

import pytest
import safetensors.torch
import torch
from torch import nn

import blnet
from blnet import checkpoint, files
from blnet.network import BigLittleConfig, BigLittleNet
from helpers.networks import assert_same_state, small


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# Round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"block": "basic"}, {"se_reduction": 4}, {"branches": 3}, {"branches": 1}, {"alpha": 4},
     {"cardinality": 4, "base_width": 32}, {"stem": "small", "in_channels": 1, "num_classes": 0}],
    ids=str,
)  # fmt: skip
def test_big_little_network(path, options):
    model = small(**options)
    blnet.save(model, path)
    loaded = blnet.load(path)
    assert type(loaded) is BigLittleNet
    assert loaded.config == model.config
    assert not loaded.training
    assert_same_state(loaded, model)
    images = torch.randn(2, model.config.in_channels, 33, 47)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dtype_is_kept(path, dtype):
    model = small().to(dtype)
    blnet.save(model, path)
    loaded = blnet.load(path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_same_state(loaded, model)


def test_loaded_network_trains(path):
    blnet.save(small(), path)
    loaded = blnet.load(path).train()
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    loaded(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_training_mode_network_is_saved_unchanged(path):
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    blnet.save(model, path)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not blnet.load(path).training


def test_channels_last_is_stored_contiguous(path):
    model = small().to(memory_format=torch.channels_last)
    weight = model.stages[0].branches[0][0].conv2.weight
    assert not weight.is_contiguous()
    blnet.save(model, path)
    loaded = blnet.load(path)
    assert all(value.is_contiguous() for value in loaded.state_dict().values())
    assert_same_state(loaded, model)
    assert not weight.is_contiguous()  # the network itself stays as it was


def test_loaded_weights_are_not_bound_to_the_file(path):
    model = small()
    blnet.save(model, path)
    loaded = blnet.load(path)
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    assert_same_state(loaded, model)


def test_two_networks_of_one_file_share_nothing(path):
    blnet.save(small(), path)
    first, second = blnet.load(path), blnet.load(path)
    with torch.no_grad():
        first.fc.weight.zero_()
    assert second.fc.weight.any()


def test_files_of_equal_networks_are_equal(tmp_path):
    files = [tmp_path / name for name in ("one.safetensors", "two.safetensors")]
    for file in files:
        blnet.save(small(), file, epoch=3, note="x")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_random_state_is_left_alone(path):
    blnet.save(small(), path)
    state = torch.get_rng_state()
    blnet.load(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_header_and_extra(path):
    model = small()
    blnet.save(model, path, epoch=7, metrics={"top1": 0.5}, notes=["a", None])
    header = checkpoint.read_header(path)
    assert (header["format"], header["version"]) == ("blnet-checkpoint", checkpoint.VERSION)
    assert header["kind"] == "big-little"
    assert header["extra"] == {"epoch": 7, "metrics": {"top1": 0.5}, "notes": ["a", None]}
    assert BigLittleConfig.from_dict(header["config"]) == model.config


def test_plain_safetensors_tools_can_read_the_weights(path):
    model = small()
    blnet.save(model, path)
    weights = safetensors.torch.load_file(path)
    assert weights.keys() == model.state_dict().keys()


# What cannot be written ---------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pth", ".pt"])
def test_an_ending_of_pickled_files_is_refused(tmp_path, ending):
    with pytest.raises(ValueError, match=r"safetensors is written; name it net\.safetensors$"):
        blnet.save(nn.Linear(2, 2), tmp_path / f"net{ending}")
    assert not list(tmp_path.iterdir())


def unsaved(model, path, message, error=ValueError, **extra):
    with pytest.raises(error, match=message) as caught:
        blnet.save(model, path, **extra)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_without_values(path):
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    unsaved(model, path, "weight is on the meta device and has no values")
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    "value", [torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex128)], ids=str
)
def test_tensors_that_have_no_safetensors_form(path, value):
    model = nn.Module()
    model.register_buffer("odd", value)
    unsaved(model, path, "odd is a .*, which safetensors cannot hold; make it")
    assert not list(path.parent.iterdir())


def test_state_that_is_no_tensor(path):
    class Stateful(nn.Module):
        def get_extra_state(self):
            return {"a": 1}

    unsaved(Stateful(), path, "_extra_state is a dict; a checkpoint holds tensors only")


def test_extra_that_is_no_json(path):
    unsaved(nn.Linear(2, 2), path, "its header must be JSON .* give plain numbers", when=object())
    assert not list(path.parent.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for place, message in (
        (tmp_path, "is a folder; give the name of a file to write"),
        (tmp_path / "no" / "such" / "m", f"folder {tmp_path}/no/such does not exist; create it"),
        (tmp_path / "file" / "m", f"{tmp_path}/file is not a folder; choose another place"),
        ("/dev/null", "is not a regular file; give the name of a file to write"),
    ):
        text = unsaved(nn.Linear(2, 2), place, message, OSError)
        assert text.startswith(str(place))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_folder_without_permission(path, monkeypatch):
    # By a stand-in: the permissions of folders do not hold for root, which tests may run as.
    def deny(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", deny)
    text = unsaved(
        nn.Linear(2, 2), path, r"\(Permission denied\); choose a folder that", PermissionError
    )
    assert text.startswith(f"{path} cannot be written: no file can be made in folder {path.parent}")


def no_space(*_args, **_keywords):
    raise OSError(28, "No space left on device")


def interrupt(*_args, **_keywords):
    raise KeyboardInterrupt


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize(
    ("where", "fault", "error"),
    [
        ((files.os, "fsync"), no_space, OSError),
        ((files.os, "replace"), no_space, OSError),
        ((checkpoint.Path, "write_bytes"), no_space, OSError),
        ((checkpoint.Path, "write_bytes"), interrupt, KeyboardInterrupt),
        ((files.os, "fsync"), interrupt, KeyboardInterrupt),
    ],
    ids=["flush", "rename", "write", "write-interrupted", "flush-interrupted"],
)
def test_failure_in_the_middle_leaves_the_old_file(path, monkeypatch, where, fault, error, existed):
    if existed:
        path.write_bytes(b"the old file")
    with monkeypatch.context() as patch:
        patch.setattr(*where, fault)
        with pytest.raises(error) as caught:
            blnet.save(nn.Linear(2, 2), path)
    if error is OSError:
        assert str(caught.value).startswith(f"{path} could not be written (No space left")
        assert "as it was before" in str(caught.value)
    assert [p.name for p in path.parent.iterdir()] == ([path.name] if existed else [])
    assert not existed or path.read_bytes() == b"the old file"


def test_file_is_flushed_before_it_is_renamed(path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        files.os,
        "fsync",
        lambda fd: (events.append(("fsync", os.fstat(fd).st_size)), fsync(fd)),
    )
    monkeypatch.setattr(
        files.os, "replace", lambda a, b: (events.append(("replace", 0)), replace(a, b))
    )
    blnet.save(nn.Linear(2, 2), path)
    names = [name for name, _ in events]
    assert names == ["fsync", "replace", "fsync"]
    assert events[0][1] == path.stat().st_size


def test_old_file_is_replaced(path):
    blnet.save(small(0), path)
    blnet.save(small(1), path)
    assert_same_state(blnet.load(path), small(1))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_link_is_followed(tmp_path, path):
    link = tmp_path / "latest.safetensors"
    link.symlink_to(path)
    blnet.save(small(), link)
    assert link.is_symlink()
    assert_same_state(blnet.load(path), small())


def test_permissions_are_those_of_the_umask(path):
    old = os.umask(0o027)
    try:
        blnet.save(nn.Linear(2, 2), path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_long_names(tmp_path):
    # The file beside it must not have a longer name than file systems take.
    path = tmp_path / ("m" * 243 + ".safetensors")
    blnet.save(small(), path)
    assert_same_state(blnet.load(path), small())


def exchanged(change):
    net = BigLittleNet(
        BigLittleConfig(depths=(1, 1), widths=(16, 32), stem_width=16, num_classes=3)
    )
    change(net.eval())
    return net


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.stem, "relu", nn.GELU()),
        lambda net: setattr(net, "pool", nn.AdaptiveMaxPool2d(1)),
        lambda net: setattr(net.stem.bn1, "eps", 0.1),
        lambda net: setattr(net.stem.conv1, "stride", (1, 1)),
    ],
)
def test_a_network_whose_layers_were_exchanged_is_weights_alone(path, change):
    net = exchanged(change)
    blnet.save(net, path)
    assert checkpoint.read_header(path)["kind"] == "weights"
    with pytest.raises(ValueError, match="model"):
        blnet.load(path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(blnet.load(path, exchanged(change)).eval()(x), net(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.stem.bn1, "momentum", 0.5),
        lambda net: setattr(net.stem.relu, "inplace", False),
        lambda net: setattr(net.stem, "bn1", nn.SyncBatchNorm(16)),
    ],
)
def test_what_changes_no_answer_is_the_same_network(path, change):
    blnet.save(exchanged(change), path)
    assert isinstance(blnet.load(path), BigLittleNet)


def test_a_fused_network_is_the_same_network(path):
    blnet.save(blnet.fuse(exchanged(lambda net: None)), path)
    assert isinstance(blnet.load(path), BigLittleNet)
