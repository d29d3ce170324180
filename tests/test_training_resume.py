"""Runs that were stopped go on to the same bits, whatever moment they were stopped at."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blnet.trained import EMA, MODEL
from blnet.training import loop
from blnet.training.checkpoints import TRAINING, CheckpointFolder
from blnet.training.config import EmaConfig, OptimizerConfig
from blnet.training.journal import read_rows
from helpers.blobs import lead_group, report_eagerly, report_tiny, train_tiny

KILLS = 20
EPOCHS = 6


Launch = Callable[..., Any]
Whole = Callable[[str], Path]


def check_whole(folder: Path) -> None:
    """Every file that has its final name can be read."""
    for path in folder.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            assert load_file(path), path


def check_same(one: Path, other: Path) -> None:
    first, second = (CheckpointFolder(folder).latest() for folder in (one, other))
    assert first is not None
    assert second is not None
    assert first.name == second.name
    for name in (MODEL, EMA):
        if name == EMA and not (first / name).exists():
            assert not (second / name).exists()
            continue
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert (one / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    states = [load_file(path / TRAINING) for path in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert states[0]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    # The record too: each step once, with the same figures.
    for kind in ("train", "epoch"):
        told = [
            [(row["step"], row["loss"], row["accuracy"]) for row in read_rows(folder, kind)]
            for folder in (one, other)
        ]
        assert told[0] == told[1]
        assert told[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Give a function that returns the folder of a run that was never stopped."""

    @functools.cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        train_tiny(str(folder), **{"epochs": 3, "log_steps": 1, **SETTINGS[name]})
        return folder

    return run


@pytest.mark.timeout(300)
def test_a_run_killed_twenty_times_ends_with_the_same_bits(launch: Launch, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    process = launch(train_tiny, str(whole), epochs=EPOCHS)
    assert finish(process) == 0
    longest = time.monotonic() - began
    kills = finished = 0
    draw = random.Random()
    while kills < KILLS or not finished:
        process = launch(train_tiny, str(killed), epochs=EPOCHS)
        process.join(draw.uniform(0, longest) if kills < KILLS else None)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        check_whole(killed)
        if process.exitcode == 0:
            check_same(whole, killed)
            finished += 1
            shutil.rmtree(killed)
        else:
            assert process.exitcode == -9


# --- other ends -----------------------------------------------------------------------------------


def finish(process: Any, seconds: float = 60) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return int(process.exitcode)


def words(folder: Path) -> str:
    return Path(f"{folder}.0.txt").read_text()


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw in bf16": {
        "optimizer": OptimizerConfig(name="adamw", lr=0.01, decay_norms=False),
        "precision": "bf16",
        "channels_last": False,
    },
    "lamb, no average": {
        "optimizer": OptimizerConfig(name="lamb", lr=0.01),
        "ema": EmaConfig(),
        "accumulate": 2,
    },
    "a stream, two readers": {"task": {"stream": True}, "workers": 2},
    "corrupt samples": {"task": {"train": 240, "corrupt": (5, 60)}},
    "loading processes": {"workers": 1},
    "long": {"epochs": 9},
}


@pytest.mark.parametrize(
    ("name", "trouble", "at"),
    [
        # While a step is taken inside an epoch, the last one, the first one.
        ("sgd", "terminate", 5),
        ("sgd", "interrupt", 7),
        ("sgd", "terminate", 8),
        ("adamw in bf16", "interrupt", 5),
        ("lamb, no average", "kill", 10),
        ("a stream, two readers", "terminate", 5),
        ("a stream, two readers", "kill", 10),
        ("corrupt samples", "terminate", 30),
        ("loading processes", "kill", 9),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    name: str, trouble: str, at: int, launch: Launch, tmp_path: Path, whole: Whole
) -> None:
    stopped = tmp_path / "stopped"
    settings = {"epochs": 3, "log_steps": 1, **SETTINGS[name]}
    task = {**settings.pop("task", {})}
    at *= settings.get("accumulate", 1)
    process = launch(report_tiny, str(stopped), {**task, "trouble": trouble, "at": at}, **settings)
    expected = {"interrupt": 130, "terminate": 143, "kill": -9}[trouble]
    assert finish(process) == expected
    check_whole(stopped)
    if trouble != "kill":
        step = at // settings.get("accumulate", 1) + 1
        assert words(stopped) == f"stopped after step {step}"
        latest = CheckpointFolder(stopped).latest()
        assert latest is not None
        assert latest.name == f"step-{step:08d}"
        if step > 4 and "corrupt" not in task:  # an epoch is over
            assert (stopped / "summary.png").is_file()
    train_tiny(str(stopped), task, **settings)
    check_same(whole(name), stopped)
    names = [row["name"] for row in read_rows(stopped, "corrupt")]
    assert len(names) == len(set(names)) == len(task.get("corrupt", ()))


@pytest.mark.parametrize("trouble", ["terminate", "interrupt", "kill", "memory"])
def test_an_evaluation_that_ends_early_costs_no_training(
    trouble: str, launch: Launch, tmp_path: Path
) -> None:
    # At the second of four batches of the second epoch's evaluation, which begins after step 8.
    stopped = tmp_path / "stopped"
    settings = {"epochs": 3, "log_steps": 1, "checkpoint_steps": 0}
    task = {"evaluation": 48, "trouble": trouble, "at": 5, "evaluating": True}
    process = launch(report_eagerly, str(stopped), task, **settings)
    assert finish(process) == {"terminate": 143, "interrupt": 130, "kill": -9, "memory": 2}[trouble]
    latest = CheckpointFolder(stopped).latest()
    assert latest is not None
    assert latest.name == "step-00000008"
    assert len(list(read_rows(stopped, "epoch"))) == 1, "it stops before the evaluation's end"
    train_tiny(str(stopped), {"evaluation": 48}, **settings)
    train_tiny(str(tmp_path / "whole"), {"evaluation": 48}, **settings)
    check_same(tmp_path / "whole", stopped)


def test_short_epochs_are_written_once_and_the_first_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    save = CheckpointFolder.save

    def counted(self: CheckpointFolder, step: int, *rest: Any) -> Path:
        written.append(step)
        return save(self, step, *rest)

    monkeypatch.setattr(CheckpointFolder, "save", counted)
    train_tiny(str(tmp_path / "run"), epochs=3, checkpoint_steps=0)
    assert written == [4, 4, 8, 12]
    written.clear()
    monkeypatch.setattr(loop, "MOST_LOST", -1.0)
    train_tiny(str(tmp_path / "other"), epochs=3, checkpoint_steps=0)
    assert written == [4, 4, 8, 8, 12, 12]


def test_a_second_signal_stops_at_once(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = launch(report_tiny, str(folder), {"trouble": "stuck", "at": 2}, checkpoint_steps=1)
    wait_for(folder / "checkpoints" / "step-00000002")
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)  # what a launcher hands on is the same request
    time.sleep(1.0)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process, 10) == -signal.SIGTERM
    check_whole(folder)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.005)


def test_ctrl_c_reaches_the_loading_processes_and_spares_them(
    launch: Launch, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings: dict[str, Any] = {"epochs": 20, "workers": 2, "checkpoint_steps": 0}
    process = launch(lead_group, str(stopped), **settings)
    wait_for(stopped / "checkpoints")
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process) == 130
    assert words(stopped).startswith("stopped after step")
    train_tiny(str(stopped), **settings)
    train_tiny(str(whole), **{**settings, "workers": 0})
    check_same(whole, stopped)


def test_the_number_of_loading_processes_may_change(launch: Launch, tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train_tiny(str(whole), epochs=3)
    for at, workers in ((3, 2), (2, 0), (4, 1)):
        task = {"trouble": "terminate", "at": at}
        process = launch(report_tiny, str(moved), task, epochs=3, workers=workers)
        assert finish(process) == 143
    train_tiny(str(moved), epochs=3)
    check_same(whole, moved)


def test_a_streams_readers_may_not_change(launch: Launch, tmp_path: Path) -> None:
    folder, task = tmp_path / "run", {"stream": True}
    process = launch(report_tiny, str(folder), {**task, "trouble": "terminate", "at": 3})
    assert finish(process) == 143
    with pytest.raises(ValueError, match=r"readers on each 1 and here are .*readers on each 2"):
        train_tiny(str(folder), task, workers=2)
    train_tiny(str(folder), task, workers=1)  # one process reads what the run itself did


def test_a_loading_process_that_dies_ends_the_run_in_words(launch: Launch, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_tiny(str(whole), epochs=3, workers=1)
    task = {"trouble": "kill-worker", "at": 7}
    assert finish(launch(report_tiny, str(broken), task, epochs=3, workers=1)) == 2
    assert "a data loading process died" in words(broken)
    assert len(words(broken).splitlines()) == 1
    train_tiny(str(broken), epochs=3, workers=1)
    check_same(whole, broken)


@pytest.mark.parametrize(
    ("size", "what"),
    [
        (2000, "metrics.jsonl could not be written"),
        (4000, "the checkpoint of step 8 could not be written"),
        (8000, "metrics.jsonl or the files of tensorboard"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(
    size: int, what: str, launch: Launch, tmp_path: Path, whole: Whole
) -> None:
    full = tmp_path / "full"
    settings = {**SETTINGS["long"], "log_steps": 1, "tensorboard": size == 8000}
    process = launch(report_tiny, str(full), {"trouble": "terminate", "at": 7}, **settings)
    assert finish(process) == 143
    before = held(full)
    assert finish(launch(report_tiny, str(full), None, size, **settings)) == 2
    assert what in words(full)
    assert "File too large" in words(full)
    assert len(words(full).splitlines()) == 1
    check_whole(full)
    assert (held(full) == before) == (size < 8000)
    train_tiny(str(full), **settings)
    check_same(whole("long"), full)


def held(folder: Path) -> dict[str, bytes]:
    """Return what the newest checkpoint holds."""
    path = CheckpointFolder(folder).latest()
    assert path is not None
    return {f"{path.name}/{file.name}": file.read_bytes() for file in path.iterdir()}


# --- what is there when a run comes back ----------------------------------------------------------


def test_a_finished_run_returns_its_summary_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = train_tiny(str(folder), epochs=3)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = train_tiny(str(folder), epochs=3)
    assert again == first
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", [MODEL, EMA, TRAINING])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_names_its_folder_and_the_run_goes_on_without(
    damage: str, file: str, tmp_path: Path, whole: Whole
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole("sgd"), folder)
    path = CheckpointFolder(folder).latest()
    assert path is not None
    if damage == "cut":
        (path / file).write_bytes((path / file).read_bytes()[:-1])
    else:
        (path / file).unlink()
    settings = {"epochs": 3, "log_steps": 1}
    with pytest.raises(ValueError, match=rf"{file} of checkpoint {path} .*remove that folder"):
        train_tiny(str(folder), **settings)
    shutil.rmtree(path)
    train_tiny(str(folder), **settings)
    check_same(whole("sgd"), folder)
