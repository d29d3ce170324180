"""What a run records and tells: its head, waiting, corrupt samples, and which epoch is the best."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from blnet.training.journal import METRICS, PLOT, RUN, read_rows
from blnet.training.progress import RunProgress
from blnet.training.run import describe, run
from blnet.training.task import Batch
from helpers.blobs import TinyTask, tiny_config, train_tiny

# --- the record ---------------------------------------------------------------------------------


def test_the_record_says_what_ran(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = train_tiny(str(folder), epochs=2, tensorboard=True, seed=7)
    head = json.loads((folder / RUN).read_text())
    assert head["facts"]["command"]
    assert f"torch {torch.__version__.partition('+')[0]}" in head["facts"]["versions"]
    assert "seed 7" in head["facts"]["run"]
    assert head["facts"]["device"].endswith("fp32")
    assert head["environment"]["cpu"]
    assert head["config"]["optimizer"]["lr"] == 0.05
    rows = list(read_rows(folder))
    assert [row["kind"] for row in rows] == ["start", *["train", "train", "epoch"] * 2]
    assert [row["step"] for row in rows] == [0, 2, 4, 4, 6, 8, 8]
    train = rows[1]
    assert 0 <= train["waiting"] <= 1
    assert train["samples_per_second"] > 0
    assert train["lr"] == pytest.approx(0.05 * (0.01 + 0.99 / 4))
    assert (folder / PLOT).is_file()
    assert list((folder / "tensorboard").iterdir())
    assert summary.seconds >= summary.train_seconds > 0
    assert "best accuracy" in describe("x", summary, TinyTask())


class Slow(TinyTask):
    """Data that takes a while."""

    def collate(self, samples: list[Any]) -> Batch:
        time.sleep(0.3)
        return super().collate(samples)


def test_waiting_for_data_is_measured_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(Slow(evaluation=48), tiny_config(str(tmp_path), epochs=1), tmp_path / "run")
    assert 0.8 < summary.waiting <= 1
    (row,) = read_rows(tmp_path / "run", "epoch")
    assert row["waiting"] == pytest.approx(summary.waiting)
    assert 0.8 < row["evaluation_waiting"] <= 1
    assert row["evaluation_seconds"] > 1.2
    told = capsys.readouterr().out
    for part in ("training", "evaluation"):
        assert f"of the {part} time went into waiting for it; raise --workers (now 0)" in told


def test_corrupt_samples_are_skipped_counted_and_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train_tiny(str(folder), {"train": 240, "corrupt": (5, 60)}, epochs=2)
    rows = list(read_rows(folder, "corrupt"))
    assert sorted(row["name"] for row in rows) == ["sample-5", "sample-60"]
    assert rows[0]["reason"] == "it was spoilt on purpose"
    told = capsys.readouterr().out
    assert told.count("warning: skipped") == 2
    assert "2 blobs could not be read and were skipped; metrics.jsonl names them" in told


def test_too_many_corrupt_samples_end_the_run(tmp_path: Path) -> None:
    told = r"3 of the 240 training blobs .*more than 1%.*; mend or replace them and go on with"
    with pytest.raises(ValueError, match=told):
        train_tiny(str(tmp_path / "run"), {"train": 240, "corrupt": (5, 60, 7)}, epochs=1)


def test_corrupt_samples_to_evaluate_on_end_a_run_before_its_first_step(tmp_path: Path) -> None:
    folder, broken = tmp_path / "run", {"evaluation": 24, "unread": (3,)}
    with pytest.raises(ValueError, match=r"1 of the 24 evaluation blobs .*, sample-3 among them"):
        train_tiny(str(folder), broken, epochs=1, log_steps=1)
    assert not list(read_rows(folder, "train"))
    (found,) = read_rows(folder, "corrupt")
    assert found["name"] == "sample-3"
    train_tiny(str(folder), epochs=1, resume="auto")  # with a readable one in its place


def test_what_is_corrupt_is_told_once_where_it_is_looked_at_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tiny(str(tmp_path / "run"), {"evaluation": 100, "unread": (3,)}, epochs=2)
    assert capsys.readouterr().out.count("skipped sample-3") == 1
    assert len(list(read_rows(tmp_path / "run", "corrupt"))) == 1


def test_too_much_to_evaluate_on_is_not_looked_at_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blnet.training.evaluation.LOOKED_AT", 23)
    with pytest.raises(ValueError, match=r"1 of the 24 evaluation blobs"):
        train_tiny(str(tmp_path / "run"), {"evaluation": 24, "unread": (3,)}, epochs=1)
    assert list(read_rows(tmp_path / "run", "train"))


def test_looking_at_it_before_takes_no_longer_than_it_may_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("blnet.training.evaluation.SILENT_SECONDS", 0.0)
    train_tiny(str(tmp_path / "run"), {"evaluation": 24}, epochs=1)
    told = "opening the 24 evaluation blobs before the first step"
    assert capsys.readouterr().out.count(told) == 1
    monkeypatch.setattr("blnet.training.evaluation.LOOK_SECONDS", 0.0)
    with pytest.raises(ValueError, match=r"1 of the 24 evaluation blobs"):
        train_tiny(str(tmp_path / "late"), {"evaluation": 24, "unread": (3,)}, epochs=1)
    assert list(read_rows(tmp_path / "late", "train"))
    assert told not in capsys.readouterr().out


def test_shares_are_told_in_percent_and_of_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train_tiny(str(folder), {"train": 12}, epochs=1)
    (row,) = read_rows(folder, "epoch")
    told = capsys.readouterr().out
    assert (
        f"epoch 1/1  training: loss {row['train_loss']:.4f}  evaluation: loss {row['loss']:.4f}  "
        f"accuracy {row['accuracy']:.2%} (best)  "
    ) in told
    assert ", 1 epoch of 1 step, seed " in told


def test_the_head_says_whose_command_it_is(tmp_path: Path) -> None:
    task, config = TinyTask(), tiny_config(str(tmp_path / "run"), epochs=1)
    run(task, config, tmp_path / "run", command="blnet train another")
    head = json.loads((tmp_path / "run" / RUN).read_text())
    assert head["facts"]["command"] == "blnet train another"


# --- best ---------------------------------------------------------------------------------------


def bests(values: list[float], maximize: bool = True) -> list[bool]:
    progress, found = RunProgress(), []
    for value in values:
        progress.end_epoch()
        found.append(progress.is_best(value, maximize))
    return found


def test_no_number_is_the_best_only_while_there_is_no_other() -> None:
    nan = math.nan
    assert bests([1, 2, 2, 1, 3]) == [True, True, False, False, True]
    assert bests([1, 2, 0.5], maximize=False) == [True, False, True]
    assert bests([nan, nan, 1, nan, 2]) == [True, False, True, False, True]
    assert bests([math.inf, nan, 1], maximize=False) == [True, False, True]


class Lost(TinyTask):
    """Finds no number in the evaluation of the first epochs."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        super().__init__()
        self.bad = bad
        self.epochs = 0

    def metrics(self) -> Any:
        self.epochs += 1
        value = math.nan if self.epochs in self.bad else None

        class Accuracy(MulticlassAccuracy):  # type: ignore[misc]
            def compute(self) -> Tensor:
                return super().compute() if value is None else torch.tensor(value)

        return MetricCollection({"accuracy": Accuracy(3, average="micro")})

    def loss(self, outputs: Tensor, batch: Batch, training: bool) -> Tensor:
        found = super().loss(outputs, batch, training)
        return found if training or self.epochs not in self.bad else found * math.inf


def test_an_evaluation_without_numbers_is_null_and_never_better(tmp_path: Path) -> None:
    summary = run(Lost((1, 3)), tiny_config(str(tmp_path), epochs=3), tmp_path / "run")
    rows = list(read_rows(tmp_path / "run", "epoch"))
    assert [row["loss"] is None for row in rows] == [True, False, True]
    assert [row["accuracy"] is None for row in rows] == [True, False, True]
    assert summary.best_epoch == 2
    assert summary.best == rows[1]["accuracy"]
    assert "NaN" not in (tmp_path / "run" / METRICS).read_text()
