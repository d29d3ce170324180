"""Checkpoints are whole or not there, keep what a run needs, and say what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from blnet.trained import EMA, MODEL
from blnet.training import checkpoints as module
from blnet.training.checkpoints import (
    TRAINING,
    CheckpointFolder,
    Saved,
    read_training,
    restore_model,
    restore_optimizer,
)
from blnet.training.config import OptimizerConfig
from blnet.training.optimization import make_optimizer

SAVED = Saved({"step": 3}, {"epochs": 2}, {}, {"scale": 2.0})


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    return model.to(memory_format=torch.channels_last)


def trained(name: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(2)
    model = network()
    optimizer = make_optimizer(model, OptimizerConfig(name=name, lr=0.1))  # type: ignore[arg-type]
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 2, 4, 4, generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(images), torch.tensor([0, 1, 1, 0])).backward()
    optimizer.step()


def save(folder: CheckpointFolder, number: int, name: str = "adamw") -> Path:
    model, optimizer = trained(name)
    return folder.save(number, model, model, optimizer, SAVED, {"epoch": 1})


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_what_is_restored_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path), 3, name)
    whole, optimizer = trained(name)
    step(whole, optimizer)
    again = network()
    restore_model(path / MODEL, again)
    saved, state = read_training(path)
    own = make_optimizer(again, OptimizerConfig(name=name, lr=0.5))  # type: ignore[arg-type]
    restore_optimizer(own, state)
    assert saved == SAVED
    assert again[0].weight.is_contiguous(memory_format=torch.channels_last)
    for values in own.state.values():
        for value in values.values():
            if isinstance(value, torch.Tensor) and value.ndim == 4:
                assert value.is_contiguous(memory_format=torch.channels_last)
    step(again, own)
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert own.param_groups[0]["lr"] == 0.1


def test_restoring_copies_in_place_and_holds_the_weights_once(tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path), 3)
    model = network()
    tied = nn.ModuleDict({"one": model, "other": model})
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    copied: list[int] = []
    deepcopy = module.copy.deepcopy

    def watched(model: nn.Module, memo: Any) -> nn.Module:
        found = deepcopy(model, memo)
        copied.extend(t.numel() for t in found.state_dict().values() if not t.is_meta)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.copy, "deepcopy", watched)
        restore_model(path / MODEL, tied["one"])
    assert copied == []
    assert before == {key: value.data_ptr() for key, value in model.state_dict().items()}


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.latest() is None
    for number in (5, 9, 10, 100_000_000):
        save(folder, number)
    assert [path.name for path in folder.all()] == ["step-00000010", "step-100000000"]
    assert folder.latest() == folder.all()[-1]


def test_what_was_replaced_takes_no_place_among_those_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for number in (4, 8, 8):
        save(folder, number)
    assert [path.name for path in folder.all()] == ["step-00000004", "step-00000008"]
    # Of a run that was killed between the two names it is all there is of the step.
    os.rename(folder.all()[-1], folder.folder / "step-00000008.old")
    save(folder, 9)
    assert [path.name for path in folder.all()] == ["step-00000008.old", "step-00000009"]


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    (folder.folder / ".step-00000002-ab.partial").mkdir()
    (tmp_path / ".blnet-1-ab.partial").write_text("half")
    save(folder, 3)
    assert sorted(path.name for path in folder.folder.iterdir()) == [
        "step-00000001", "step-00000003"]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_second_one_of_a_step_replaces_the_first_and_there_is_always_one(
    keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path, keep)
    path = save(folder, 4)
    (path / "mark").touch()
    replaces: list[Path | None] = []
    replace = os.replace

    def watched(*paths: Any) -> None:
        replace(*paths)
        replaces.append(folder.latest())

    monkeypatch.setattr(os, "replace", watched)
    assert save(folder, 4) == path
    assert None not in replaces
    assert not (path / "mark").exists()
    assert folder.latest() == path
    # The next save prunes what was replaced, or the last did.
    save(folder, 5)
    save(folder, 6)
    assert all("old" not in path.name for path in folder.all())


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path)
    path = save(folder, 4)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_training", full)
    with pytest.raises(OSError, match=r"step 5 .*\(No space left on device\); earlier") as caught:
        save(folder, 5)
    assert len(str(caught.value).splitlines()) == 1
    assert [each.name for each in folder.folder.iterdir()] == [path.name]
    restore_model(path / MODEL, network())


@pytest.mark.parametrize("file", [MODEL, EMA, TRAINING])
@pytest.mark.parametrize("damage", ["cut", "missing", "noise", "folder", "foreign"])
def test_damage_names_the_folder_to_remove(damage: str, file: str, tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path), 4)
    target = path / file
    if damage == "cut":
        target.write_bytes(target.read_bytes()[:-7])
    elif damage == "noise":
        target.write_bytes(b"\x01" * 100)
    elif damage == "foreign":
        save_file({"x": torch.zeros(1)}, target)
    else:
        target.unlink()
    if damage == "folder":
        target.mkdir()
    with pytest.raises(ValueError, match=rf"^{file} of checkpoint {path} cannot be") as caught:
        _ = read_training(path) if file == TRAINING else restore_model(target, network())
    assert "remove that folder" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("entry", ["progress", "config", "layout", "scaler", "groups", "numbers"])
def test_a_header_that_lacks_something_is_damage(entry: str, tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path), 4)
    for value in (None, 3):
        header = rewritten(path, **{entry: value})
        assert header[entry] == value
        with pytest.raises(ValueError, match="remove that folder"):
            read_training(path)


def rewritten(path: Path, **changes: Any) -> dict[str, Any]:
    import safetensors

    with safetensors.safe_open(path / TRAINING, framework="pt") as opened:
        header = json.loads(opened.metadata()[module._ENTRY])
    header |= changes
    save_file(load_file(path / TRAINING), path / TRAINING, {module._ENTRY: json.dumps(header)})
    return header


def test_another_version_says_so(tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path), 4)
    rewritten(path, version=2)
    with pytest.raises(ValueError, match="is of version 2, and 1 is read here"):
        read_training(path)


def test_another_network_is_told_from_damage(tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path), 4)
    model = nn.Sequential(nn.Linear(3, 3))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"does not fit the network.*another --output"):
        restore_model(path / MODEL, model)
    assert torch.equal(before, model[0].weight)
