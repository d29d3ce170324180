"""Trained networks are found in what training wrote, and it is said why where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from blnet import registry
from blnet.trained import EMA, check_task, load_network, trained_task
from blnet.training.checkpoints import CheckpointFolder, Saved
from blnet.training.config import OptimizerConfig
from blnet.training.optimization import make_optimizer


def test_the_best_network_is_found_in_the_runs_folder(tmp_path: Path) -> None:
    import blnet.vision.models  # noqa: F401  (registers the name)

    options = {"num_classes": 3, "width": 0.125, "stem": "small"}
    model = registry.build("bl_resnet18", **options)
    CheckpointFolder(tmp_path).save_best(model, {"epoch": 3})
    found, extra = load_network(tmp_path)
    assert extra == {"epoch": 3}
    for one, other in zip(model.state_dict().values(), found.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    plain = registry.build("torchvision:resnet18", num_classes=3)
    named = {"name": "torchvision:resnet18", "options": {"num_classes": 3}}
    CheckpointFolder(tmp_path).save_best(plain, {"network": named})
    assert type(load_network(tmp_path)[0]) is type(plain)


def test_a_checkpoint_s_folder_is_its_network_the_average_first(tmp_path: Path) -> None:
    import blnet.vision.models  # noqa: F401  (registers the name)

    options = {"num_classes": 3, "width": 0.125, "stem": "small"}
    one, other = (registry.build("bl_resnet18", **options) for _ in range(2))
    optimizer = make_optimizer(one, OptimizerConfig())
    path = CheckpointFolder(tmp_path).save(
        4, one, other, optimizer, Saved({}, {}, {}, {}), {"epoch": 1}
    )
    for expected in (other, one):
        found, extra = load_network(path)
        assert extra == {"epoch": 1}
        assert torch.equal(found.fc.weight, expected.fc.weight)
        (path / EMA).unlink(missing_ok=True)


def test_a_network_that_cannot_be_found_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder without best.safetensors"):
        load_network(tmp_path)
    folder = CheckpointFolder(tmp_path)
    folder.save_best(nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="weights only"):
        load_network(tmp_path)
    folder.save_best(nn.Linear(2, 2), {"network": {"name": "os:system", "options": {}}})
    with pytest.raises(ValueError, match=r"rebuilding it would import and call that"):
        load_network(tmp_path)


def test_a_network_of_another_task_is_said_to_be_one(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save_best(
        nn.Linear(2, 2), {"task": "vision", "network": {"name": "unknown", "options": {}}}
    )
    assert trained_task(tmp_path) == "vision"
    check_task(tmp_path, "vision", "--flag")
    told = "--flag .* holds a vision network where one for speech is needed; name a run of 'blnet "
    with pytest.raises(ValueError, match=told):
        check_task(tmp_path, "speech", "--flag")
    for extra in ({}, {"task": None}):
        folder.save_best(nn.Linear(2, 2), extra)
        assert trained_task(tmp_path) is None
        check_task(tmp_path, "speech", "--flag")
    check_task(tmp_path / "published.pth", "vision", "--flag")
