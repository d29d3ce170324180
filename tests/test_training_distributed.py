"""Several processes train as one does: the same curve, the same stops, the same last words."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blnet.trained import MODEL
from blnet.training.checkpoints import TRAINING, CheckpointFolder
from blnet.training.config import OptimizerConfig, ScheduleConfig
from blnet.training.journal import read_rows
from helpers.blobs import train_tiny, train_together, weights
from helpers.processes import environment, free_port

SECONDS = 60  # after which a process hangs
Start = Callable[..., list[Any]]
# One line a step, and figures that a different order of the sums cannot move far.
FINE = {"log_steps": 1, "epochs": 2}


def finish(processes: list[Any]) -> list[int]:
    for process in processes:
        process.join(SECONDS)
    return [process.exitcode for process in processes]


def words(folder: Path, rank: int) -> str:
    return Path(f"{folder}.{rank}.txt").read_text()


def curve(folder: Path) -> list[tuple[int, float, float]]:
    rows = list(read_rows(folder, "train"))
    assert rows
    return [(row["step"], row["loss"], row["accuracy"]) for row in rows]


def check_near(one: Path, other: Path, **tolerance: float) -> None:
    first, second = curve(one), curve(other)
    assert [row[0] for row in first] == [row[0] for row in second]
    assert [row[1:] for row in first] == [pytest.approx(row[1:], **tolerance) for row in second]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_have_the_curve_of_one_that_accumulates(
    accumulate: int, launch_together: Start, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # 51 samples leave a rest, and odd numbers are evaluated.
    task = {"train": 51, "evaluation": 25}
    train_tiny(str(one), task, accumulate=2 * accumulate, **FINE)
    processes = launch_together(two, task=task, accumulate=accumulate, **FINE)
    assert finish(processes) == [0, 0]
    check_near(one, two, rel=1e-6)
    for key, value in weights(one).items():
        if "running" not in key and "batches" not in key:  # the first process's statistics
            assert torch.allclose(value, weights(two)[key], atol=1e-6), key


def test_evaluation_over_two_processes_takes_each_sample_once(
    launch_together: Start, tmp_path: Path
) -> None:
    # Without batch statistics of its own, the network is the same and so must be what is found.
    one, two = tmp_path / "one", tmp_path / "two"
    settings: dict[str, Any] = {**FINE, "epochs": 1, "task": {"evaluation": 37, "norm": False}}
    train_tiny(str(one), accumulate=2, **settings)
    assert finish(launch_together(two, **settings)) == [0, 0]
    (alone,), (both,) = read_rows(one, "epoch"), read_rows(two, "epoch")
    assert both["accuracy"] == alone["accuracy"]
    assert both["accuracy"] * 37 == pytest.approx(round(both["accuracy"] * 37))
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_two_processes_go_on_to_the_same_bits_after_a_kill(
    launch_together: Start, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings: dict[str, Any] = {"epochs": 8, "log_steps": 1}
    processes = launch_together(whole, **settings)
    assert finish(processes) == [0, 0]
    processes = launch_together(killed, **settings)
    deadline = time.monotonic() + SECONDS
    while CheckpointFolder(killed).latest() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in processes:
        process.kill()
    assert finish(processes) == [-9, -9]
    assert finish(launch_together(killed, **settings)) == [0, 0]
    for name in (MODEL, TRAINING):
        one, other = weights(whole, name), weights(killed, name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    check_near(whole, killed, rel=1e-12)
    first, second = ([row["train_loss"] for row in read_rows(folder, "epoch")]
                     for folder in (whole, killed))  # fmt: skip
    assert first == pytest.approx(second, rel=1e-12)


def test_a_run_of_two_processes_goes_on_as_one_that_accumulates(
    launch_together: Start, tmp_path: Path
) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train_tiny(str(whole), accumulate=2, **FINE)
    task = {"trouble": "terminate", "at": 4}
    assert finish(launch_together(moved, task=task, **FINE)) == [143, 143]
    with pytest.raises(ValueError, match=r"micro-batch 6 and here are .* 12.*--accumulate"):
        train_tiny(str(moved), **FINE)
    train_tiny(str(moved), accumulate=2, **FINE)
    check_near(whole, moved, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both_after_the_same_step(
    rank: int, launch_together: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    task = {"trouble": "terminate", "at": 2, "rank": rank}
    assert finish(launch_together(folder, task=task, checkpoint_steps=0)) == [143, 143]
    # The signal came in step 3; lines, at which processes meet, are written at even steps.
    assert [words(folder, each) for each in (0, 1)] == ["stopped after step 4"] * 2
    latest = CheckpointFolder(folder).latest()
    assert latest is not None
    assert latest.name == "step-00000004"


def test_checkpoints_are_written_at_steps_without_a_line(
    launch_together: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    changes = {"checkpoint_steps": 3, "log_steps": 1000, "keep": 9, "epochs": 2}
    assert finish(launch_together(folder, **changes)) == [0, 0]
    # Four steps an epoch: those of step 4 and 8 end one.
    names = [int(path.name[5:]) for path in CheckpointFolder(folder).all()]
    assert names == [3, 4, 6, 8]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"file_size": 4000}, "the checkpoint of step 3 could not be written .*File too large"),
        (
            {"file_size": 8000, "task": {"train": 4800}, "log_steps": 1, "checkpoint_steps": 0},
            "metrics.jsonl .*cannot be written .*File too large",
        ),
        # Both were asked at the second step, not only when the epoch was over.
        (
            {"task": {"train": 240, "corrupt": tuple(range(0, 240, 2))}},
            r"^\d\d? of the 240 training blobs cannot be read",
        ),
        # One of them in each process, which counts those of both.
        ({"task": {"unread": (0, 1)}}, "^2 of the 24 evaluation blobs cannot be read"),
        (
            {"optimizer": OptimizerConfig(lr=1e30)},
            "the loss became nan by step 2 and no checkpoint",
        ),
    ],
)
def test_both_processes_end_with_the_same_sentence(
    settings: dict[str, Any], what: str, launch_together: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert finish(launch_together(folder, **settings)) == [2, 2]
    first, second = words(folder, 0), words(folder, 1)
    assert first == second
    assert len(first.splitlines()) == 1
    assert re.search(what, first), first


def test_batch_statistics_over_processes_are_for_gpus(
    launch_together: Start, tmp_path: Path
) -> None:
    assert finish(launch_together(tmp_path / "run", sync_bn=True)) == [2, 2]
    assert words(tmp_path / "run", 0).startswith("--sync-bn needs GPUs")
    assert not (tmp_path / "run").exists()


def test_a_process_that_fails_alone_does_not_leave_the_other_waiting(
    launch_together: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    task = {"trouble": "memory", "at": 5, "rank": 1}
    assert finish(launch_together(folder, task=task)) == [2, 2]
    assert "memory" in words(folder, 1)
    assert "another process of this run has ended" in words(folder, 0)


def test_processes_that_find_different_checkpoints_say_so(
    launch_together: Start, launch: Callable[..., Any], tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    train_tiny(str(here), accumulate=2, epochs=1)
    port = free_port()
    processes = [
        launch(train_together, rank, 2, port, str(folder), epochs=2)
        for rank, folder in enumerate((here, there))
    ]
    assert finish(processes) == [2, 2]
    assert words(here, 0) == words(there, 1)
    assert "in a folder that all machines share" in words(here, 0)


SCRIPT = """
import sys
from blnet.training.config import ScheduleConfig
from helpers.blobs import report_tiny
report_tiny(sys.argv[1], epochs=100_000, log_steps=1, schedule=ScheduleConfig("constant"))
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # "multi_gpu" starts processes of any kind; "cpu" alone would want MPI for more than one.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                   "--main_process_port", "0"],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_it_and_ctrl_c_stops_it(launcher: str, tmp_path: Path) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(script), str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(OMP_NUM_THREADS="1"),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while len(list(read_rows(folder, "epoch"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # As a terminal does; the launcher then hands it on once more.
        os.killpg(process.pid, signal.SIGINT)
        process.wait(SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    first, second = words(folder, 0), words(folder, 1)
    assert first == second
    assert first.startswith("stopped after step")
    latest = CheckpointFolder(folder).latest()
    assert latest is not None
    assert int(latest.name[5:]) == int(first.split()[-1])
    one = tmp_path / "one"
    constant = ScheduleConfig("constant")
    train_tiny(str(one), accumulate=2, epochs=2, log_steps=1, schedule=constant)
    expected = curve(one)
    assert curve(folder)[: len(expected)] == [pytest.approx(row, rel=1e-6) for row in expected]
