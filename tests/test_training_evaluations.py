"""Runs that are not evaluated after each epoch: the same training, fewer figures, fewer files."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from blnet.training.checkpoints import CheckpointFolder
from blnet.training.journal import plot, read_rows
from blnet.training.reporting import Reporter
from blnet.training.run import run
from blnet.training.stopping import Interrupted
from helpers.blobs import TinyTask, check_same_weights, tiny_config

EPOCHS = 5
KEPT: dict[str, Any] = {"keep": 9, "checkpoint_steps": 0}


def train(folder: Path, every: int, **changes: Any) -> Any:
    config = tiny_config(str(folder), epochs=EPOCHS, evaluate_epochs=every, **{**KEPT, **changes})
    return run(TinyTask(), config, folder)


def test_every_second_epoch_and_the_last_are_evaluated_and_kept(tmp_path: Path) -> None:
    usual, summary = train(tmp_path / "usual", 1), train(tmp_path / "run", 2)
    check_same_weights(tmp_path / "usual", tmp_path / "run")
    assert summary.last == usual.last
    rows = list(read_rows(tmp_path / "run", "epoch"))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in rows if "accuracy" in row] == [2, 4, 5]
    assert all("evaluation_seconds" in row for row in rows if "accuracy" in row)
    every = list(read_rows(tmp_path / "usual", "epoch"))
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in every]
    assert summary.best == max(row["accuracy"] for row in rows if "accuracy" in row)
    steps = rows[0]["step"]
    names = [int(path.name[5:]) for path in CheckpointFolder(tmp_path / "run").all()]
    # That of the first epoch, as no run is without one for long.
    assert names == [steps * epoch for epoch in (1, 2, 4, 5)]
    assert plot(tmp_path / "run", "accuracy", "title") is not None


def test_a_run_longer_than_its_evaluations_apart_is_evaluated_at_its_end(tmp_path: Path) -> None:
    train(tmp_path, 100)
    rows = list(read_rows(tmp_path, "epoch"))
    assert ["accuracy" in row for row in rows] == [False] * (EPOCHS - 1) + [True]


@pytest.mark.parametrize("epoch", [3, 4])
def test_a_stop_after_any_epoch_is_kept_and_gone_on_from(
    epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "usual", 2)
    told = Reporter.epoch

    def stopping(self: Reporter, progress: Any, *rest: Any) -> None:
        told(self, progress, *rest)
        if progress.epoch == epoch:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Reporter, "epoch", stopping)
    with pytest.raises(Interrupted) as stop:
        train(tmp_path / "run", 2)
    latest = CheckpointFolder(tmp_path / "run").latest()
    assert latest is not None
    assert int(latest.name[5:]) == stop.value.step
    monkeypatch.undo()
    train(tmp_path / "run", 2, resume="auto", output=str(tmp_path / "run"))
    check_same_weights(tmp_path / "usual", tmp_path / "run")
    rows = list(read_rows(tmp_path / "run", "epoch"))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in rows if "accuracy" in row] == [2, 4, 5]
