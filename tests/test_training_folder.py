"""A run's folder: nothing in it is overwritten, and what does not fit together is told."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blnet.trained import BEST
from blnet.training.checkpoints import CheckpointFolder, Saved
from blnet.training.config import OptimizerConfig
from blnet.training.journal import METRICS, read_rows
from blnet.training.run import default_folder
from helpers.blobs import report_tiny, train_tiny, weights

Launch = Callable[..., Any]


def test_a_folder_that_is_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"--output .*cannot be written to \(.*choose a folder"):
            train_tiny(str(folder))


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train_tiny(str(tmp_path / "run"), epochs=1)
    with pytest.raises(ValueError, match=r"holds a run already; go on with it with --resume auto"):
        train_tiny(str(tmp_path / "run"), epochs=1, resume="never")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 3}, "--seed was 0 and is 3"),
        ({"optimizer": OptimizerConfig(lr=0.1, clip_norm=1.0)}, "--optimizer.lr was 0.05 and is"),
        ({"accumulate": 2}, "samples in a micro-batch 12 and here are samples in a micro-batch 6"),
        ({"task": {"train": 50}}, r"the data had 48 training blobs and has 50; give"),
        ({"task": {"train": 36}}, r"had 48 .* and has 36, had 4 steps an epoch and has 3; give"),
        ({"task": {"evaluation": 9}}, r"the data had 24 evaluation blobs and has 9; give"),
    ],
)
def test_another_runs_checkpoint_says_what_differs(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    train_tiny(str(tmp_path / "run"), epochs=1)
    with pytest.raises(ValueError, match=told) as caught:
        train_tiny(str(tmp_path / "run"), **{"epochs": 1, **changes})
    assert "another --output" in str(caught.value)


def test_a_checkpoint_that_says_nothing_of_its_data_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As versions before this one wrote them.
    save = CheckpointFolder.save

    def forgetful(*arguments: Any) -> Path:
        (saved,) = (each for each in arguments if isinstance(each, Saved))
        saved.layout = {"samples in a micro-batch": 12}
        return save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "save", forgetful)
        train_tiny(str(tmp_path / "run"), epochs=1)
    train_tiny(str(tmp_path / "run"), {"train": 50}, epochs=1)
    with pytest.raises(ValueError, match="samples in a micro-batch 12 and here"):
        train_tiny(str(tmp_path / "run"), epochs=1, accumulate=2)


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("left", [BEST, METRICS])
def test_what_is_left_of_a_run_is_not_overwritten(left: str, resume: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_tiny(str(folder), epochs=1)
    shutil.rmtree(folder / "checkpoints")
    for path in folder.iterdir():
        if path.name != left:
            path.unlink()
    before = (folder / left).read_bytes()
    with pytest.raises(ValueError, match=r"a run whose checkpoints are gone.*another folder"):
        train_tiny(str(folder), epochs=1, resume=resume)
    assert (folder / left).read_bytes() == before


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="the loss became nan"):
        train_tiny(str(folder), {"trouble": "nan", "at": 2}, log_steps=1)
    assert list(read_rows(folder, "train"))
    assert CheckpointFolder(folder).latest() is None
    train_tiny(str(folder), epochs=1, log_steps=1)
    assert [row["step"] for row in read_rows(folder, "train")] == [1, 2, 3, 4]


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    for folder in (tmp_path / "run", tmp_path / "several" / "deep"):
        with pytest.raises(ValueError, match="more than the 11"):
            train_tiny(str(folder), {"train": 11})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="more than the 11"):
        train_tiny(str(tmp_path / "mine"), {"train": 11})
    assert (tmp_path / "mine").is_dir(), "only what this run made is removed"
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_is_one_runs_at_a_time(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = launch(report_tiny, str(folder), {"trouble": "stuck", "at": 3})
    deadline = time.monotonic() + 60
    while CheckpointFolder(folder).latest() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)  # until what is done with a checkpoint is done
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for resume in ("auto", "never"):
        with pytest.raises(ValueError, match=r"run is in use by another run.*another folder"):
            train_tiny(str(folder), resume=resume)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before == after
    process.kill()
    process.join()
    train_tiny(str(folder))  # a run that ended, however it did, holds nothing
    assert [row["epoch"] for row in read_rows(folder, "epoch")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_network_is_left_alone(tmp_path: Path) -> None:
    train_tiny(str(tmp_path / "run"), epochs=1)
    before = weights(tmp_path / "run")
    with pytest.raises(ValueError, match=r"does not fit the network.*another --output"):
        train_tiny(str(tmp_path / "run"), {"norm": False}, epochs=1)
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_name_of_a_folder_is_not_too_long_for_one() -> None:
    name = default_folder("vision", "ä" * 200).name
    assert len(name.encode()) < 150
    assert name.startswith("vision-ää")
