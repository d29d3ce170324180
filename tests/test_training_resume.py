"""Runs that were stopped go on to the same bits, whatever moment they were stopped at."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blnet.training.checkpoints import EMA, MODEL, TRAINING, CheckpointFolder
from blnet.training.journal import read_rows
from blnet.training.testing import train_tiny

KILLS = 20
EPOCHS = 12


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that begin with everything imported and nothing computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blnet.training.testing"])
    first = context.Process(target=time.sleep, args=(0,))  # waits for the imports
    first.start()
    first.join()
    return context


def start(processes: ForkServerContext, folder: Path, **changes: Any) -> Any:
    process = processes.Process(
        target=train_tiny, args=(str(folder),), kwargs={"epochs": EPOCHS, **changes}
    )
    process.start()
    return process


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


@pytest.mark.timeout(300)
def test_a_run_killed_twenty_times_ends_with_the_same_bits(
    processes: ForkServerContext, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    process = start(processes, whole)
    process.join()
    assert process.exitcode == 0
    longest = time.monotonic() - began
    print(longest)
    kills = finished = 0
    draw = random.Random()
    while kills < KILLS or not finished:
        process = start(processes, killed)
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
