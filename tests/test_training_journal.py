"""The record of a run: what is in it, and that it survives kills and full disks."""

from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blnet.training.config import TrainingConfig
from blnet.training.corrupt import CorruptLog
from blnet.training.devices import make_accelerator
from blnet.training.display import Display, clock
from blnet.training.journal import METRICS, PLOT, Journal, plot, read_rows
from blnet.training.loading import Corrupt
from blnet.wording import counted


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path, writes=True, tensorboard=True)
    made.begin()
    return made


def events(folder: Path) -> list[Any]:
    """Return what TensorBoard reads from a run's event files, in their order."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    paths = sorted((folder / "tensorboard").iterdir())
    assert all("tfevents" in path.name for path in paths)
    return [event for path in paths for event in EventFileLoader(str(path)).Load()]


def test_lines_are_json_and_come_back(journal: Journal, tmp_path: Path) -> None:
    journal.write("train", 2, loss=0.5, accuracy=None)
    journal.write("epoch", 4, epoch=1, loss=math.inf, accuracy=math.nan)
    # Before it is closed: a killed run leaves every line.
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"kind": "train", "step": 2, "loss": 0.5, "accuracy": None},
        {"kind": "epoch", "step": 4, "epoch": 1, "loss": None, "accuracy": None},
    ]
    assert [row["step"] for row in read_rows(tmp_path, "epoch")] == [4]
    journal.close()


def test_a_half_written_line_is_passed_over(journal: Journal, tmp_path: Path) -> None:
    journal.write("train", 2, loss=0.5)
    journal.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "train", "st')
    assert [row["step"] for row in read_rows(tmp_path)] == [2]
    again = Journal(tmp_path, writes=True, tensorboard=False)
    again.begin(step=2)
    again.write("train", 4, loss=0.4)
    again.close()
    assert [row["step"] for row in read_rows(tmp_path)] == [2, 4]


def test_a_resumed_run_drops_the_lines_of_later_steps(journal: Journal, tmp_path: Path) -> None:
    for step in (2, 4, 6):
        journal.write("train", step, loss=1 / step)
    journal.close()
    again = Journal(tmp_path, writes=True, tensorboard=True)
    again.begin(step=4)
    again.write("train", 6, loss=9.0)
    again.close()
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == [
        (2, 1 / 2), (4, 1 / 4), (6, 9.0)]  # fmt: skip
    # TensorBoard is told the same: a session that starts at a step voids what was later.
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 5]


def test_a_run_that_goes_on_before_an_evaluation_drops_what_that_found(
    journal: Journal, tmp_path: Path
) -> None:
    for epoch in (1, 2):
        journal.write("train", 4 * epoch, epoch=epoch)
        journal.write("epoch", 4 * epoch, epoch=epoch)
    journal.close()
    for over, kept in ((2, ["train", "epoch", "train", "epoch"]), (1, ["train", "epoch", "train"])):
        again = Journal(tmp_path, writes=True, tensorboard=False)
        again.begin(step=8, epoch=over)
        again.close()
        assert [row["kind"] for row in read_rows(tmp_path)] == kept


def test_a_run_that_starts_anew_starts_the_record_anew(journal: Journal, tmp_path: Path) -> None:
    journal.write("start", 0)
    journal.close()
    again = Journal(tmp_path, writes=True, tensorboard=False)
    again.begin(step=0)
    again.close()
    assert list(read_rows(tmp_path)) == []


def test_tensorboard_reads_every_number(journal: Journal, tmp_path: Path) -> None:
    journal.write("train", 2, loss=0.5, accuracy=None, name="x")
    journal.write("epoch", 4, loss=0.25)
    # Before it is closed: one may look while the run runs.
    told = {
        (value.tag, event.step): value.tensor.float_val[0]
        for event in events(tmp_path)
        for value in event.summary.value
    }
    assert told == {("train/loss", 2): 0.5, ("epoch/loss", 4): 0.25}
    assert abs(events(tmp_path)[-1].wall_time - time.time()) < 60
    journal.close()


def test_a_file_that_refuses_is_one_sentence(journal: Journal, tmp_path: Path) -> None:
    journal._file.close()
    descriptor = os.open(tmp_path / METRICS, os.O_RDONLY)
    journal._file = os.fdopen(descriptor, "w", encoding="utf-8")
    told = r"metrics.jsonl .*cannot be written \(Bad file descriptor\).*--resume auto$"
    with pytest.raises(OSError, match=told) as caught:
        journal.write("train", 2, loss=0.5)
    assert len(str(caught.value).splitlines()) == 1
    journal.close()  # and again, without an error


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    silent = Journal(tmp_path, writes=False, tensorboard=True)
    silent.begin()
    silent.head({})
    silent.write("train", 2, loss=0.5)
    silent.flush()
    silent.close()
    assert list(tmp_path.iterdir()) == []


# --- summary.png --------------------------------------------------------------------------------


def test_the_curves_are_drawn(journal: Journal, tmp_path: Path) -> None:
    assert plot(tmp_path, "accuracy", "tiny") is None
    title = "tiny: $a_$"
    for epoch, loss in enumerate((1.0, math.nan, 0.0, -1.0), 1):
        journal.write("epoch", 4 * epoch, epoch=epoch, train_loss=loss, loss=loss, accuracy=loss)
    journal.close()
    path = plot(tmp_path, "accuracy", title)
    assert path == tmp_path / PLOT
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_metric_that_never_was_a_number_is_drawn_as_nothing(
    journal: Journal, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    journal.write("epoch", 4, epoch=1, loss=1.0)
    journal.close()
    assert plot(tmp_path, "accuracy", "tiny") is not None
    assert not [str(warning.message) for warning in recwarn]


# --- the screen ---------------------------------------------------------------------------------


def shown(terminal: bool, shows: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200, color_system=None)
    with Display("blobs", shows, console) as display:
        display.head({"command": "x [bold]y[/bold]", "run": "z"})
        display.step(0.25, "1/4", 0.5, 0.75, 1234.5, 3725)
        time.sleep(0.3)
        display.say("epoch 1/4 [done]")
    return file.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    text = shown(terminal=True)
    assert "25 %" in text
    assert "epoch 1/4  training: loss 0.5000  accuracy 75.00%  1,234 blobs/s  1:02:05 left" in text
    assert "epoch 1/4 [done]" in text


def test_a_log_gets_plain_lines() -> None:
    assert shown(terminal=False) == "command  x [bold]y[/bold]\nrun      z\nepoch 1/4 [done]\n"


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    now = [0.0]
    monkeypatch.setattr("blnet.training.display.time.monotonic", lambda: now[0])
    with Display("blobs", True, Console(file=file, width=200)) as display:
        for second in range(0, 200, 10):
            now[0] = float(second)
            display.step(0.5, f"{second}", 0.5, None, 1.0, 60)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["70", "140"]


def test_other_processes_show_nothing() -> None:
    assert shown(terminal=True, shows=False) == ""
    assert shown(terminal=False, shows=False) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05"), (-3, "0:00")],
)
def test_a_clock_is_read_as_one(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_one_is_counted_in_the_singular() -> None:
    assert [counted(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


# --- corrupt samples ----------------------------------------------------------------------------


@pytest.fixture
def log() -> tuple[CorruptLog, list[str], list[tuple[str, str]]]:
    told: list[str] = []
    noted: list[tuple[str, str]] = []
    accelerator = make_accelerator(TrainingConfig(device="cpu"))
    made = CorruptLog(
        "images", accelerator, told.append, lambda *entry: noted.append(entry), known=["old"]
    )
    return made, told, noted


def test_each_corrupt_sample_is_named_once(log: Any) -> None:
    made, told, noted = log
    for _ in range(3):
        made.add([Corrupt("a", "empty"), Corrupt("old", "empty")], "training", 1000)
    assert noted == [("a", "empty")]
    assert told == ["warning: skipped a, which cannot be read: empty"]


def test_more_than_one_percent_is_an_error(log: Any) -> None:
    made, _, noted = log
    made.add([Corrupt("old", "empty")], "training", 200)
    made.add([Corrupt("a", "empty")], "training", 200)  # 2 of 200 are one percent
    made.add([Corrupt("a", "empty")], "evaluation", 100)
    with pytest.raises(ValueError, match=r"^3 of the 200 training images .*more than 1%, b among"):
        made.add([Corrupt("b", "cut short")], "training", 200)
    assert ("b", "cut short") in noted


def test_a_file_that_two_samples_are_of_counts_twice(log: Any) -> None:
    made, told, noted = log
    for _ in range(3):  # each epoch finds them again
        made.add([Corrupt("a", "empty", 4), Corrupt("a", "empty", 9)], "training", 200)
    assert noted == [("a", "empty")]
    assert len(told) == 1
    with pytest.raises(ValueError, match=r"^3 of the 200 training images "):
        made.add([Corrupt("a", "empty", 11)], "training", 200)


def test_many_are_not_all_shown(log: Any) -> None:
    made, told, noted = log
    for number in range(30):
        made.add([Corrupt(f"{number}", "empty")], "training", 100_000)
    assert len(noted) == 30
    assert len(told) == 21
