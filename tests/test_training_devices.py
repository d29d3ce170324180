"""How the devices of a run are set: by its configuration and by what its batches are like."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blnet.training.config import TrainingConfig
from blnet.training.devices import let_cudnn_search, make_accelerator
from blnet.training.run import run
from helpers.blobs import TinyTask, tiny_config


@pytest.fixture(autouse=True)
def settings_are_restored() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize(
    ("device", "one_shape", "deterministic", "searches"),
    [
        ("cuda", True, False, True),
        ("cuda", False, False, False),
        ("cuda", True, True, False),
        ("cpu", True, False, False),
    ],
)
def test_cudnn_searches_where_one_shape_comes_again(
    device: str, one_shape: bool, deterministic: bool, searches: bool
) -> None:
    torch.backends.cudnn.benchmark = not searches
    config = TrainingConfig(deterministic=deterministic)
    let_cudnn_search(config, torch.device(device), one_shape)
    assert torch.backends.cudnn.benchmark is searches


def test_a_run_says_how_its_batches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr("blnet.training.run.let_cudnn_search", lambda *given: told.append(given))
    config = tiny_config(str(tmp_path), epochs=1)
    accelerator = make_accelerator(config)
    run(TinyTask(), config, tmp_path, accelerator)
    assert told == [(config, accelerator.device, TinyTask.one_shape)]
