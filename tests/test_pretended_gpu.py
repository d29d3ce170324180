"""Whole commands on a GPU that is none: their way to the end, not their times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.pretended_gpu import NAME
from helpers.processes import environment


def command(folder: Path, *words: str) -> str:
    """Return what a command says that must end well."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.pretended_gpu", "--debug", *words, "--device", "cuda"],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(folder: Path, *words: str) -> dict[str, Any]:
    """Return the results of suites."""
    said = command(folder, "bench", *words, "--repeat", "5", "--output", "out")
    assert NAME in said
    assert NAME in (folder / "out" / "report.md").read_text()
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found


def test_networks(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        *("models", "training", "--models", "bl_resnet18", "--alpha", "2"),
        *("--size", "32", "--batch", "4"),
    )
    assert found["ceilings"] == {"copy_bandwidth": 4e12, "matmul_rate": 7e14}
    states = {(one["suite"], one["implementation"]): one for one in found["measurements"]}
    for name in ("eager", "folded", "compile, frozen", "folded, graph"):
        assert states["models", name]["status"] == "ok"
    assert states["models", "blnet kernels"]["note"].startswith("no kernel runs on this device")
    assert states["training", "channels-last"]["status"] == "ok"
    layers = found["layers"]["models, batch 4"]["resnet18"]
    assert {"bytes": 0, "bound": 0.0}.items() <= layers[-1].items()
    assert all(one["seconds"] > 0 for one in layers)


@pytest.mark.parametrize("graphs", [(), ("--graphs",)])
def test_ops(tmp_path: Path, graphs: tuple[str, ...]) -> None:
    found = run(tmp_path, "moments", "stem", "--batch", "1", *graphs)
    assert {one["status"] for one in found["measurements"]} == {"ok"}


def test_training(tmp_path: Path) -> None:
    words = ("--epochs", "1", "--data.limit", "200", "--baseline", "false", "--output", "run")
    assert NAME in command(tmp_path, "train", "vision", *words)
    assert NAME in command(tmp_path, "evaluate", "vision", "run")
