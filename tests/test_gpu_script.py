"""`make gpu`, with a stand-in for a GPU machine's Python: order, limits, failures."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from blnet.cli import COMMANDS, Parser

SCRIPT = Path(__file__).parents[1] / ".ci" / "gpu"
STAND_IN = """#!/bin/sh
case "$*" in
  *"$STUCK"*) trap "echo interrupted; exit 3" INT; sleep 60 & wait ;;
  *"$BROKEN"*) echo "it broke"; exit 2 ;;
esac
echo "$*" | sed 's/^-m //' >> "$CALLS"
echo "said: $*"
"""

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="timeout is not installed")


def run(folder: Path, **environment: str) -> tuple[int, list[str], str]:
    """Return the exit status, what was called to the end, and what was said."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")
    given = {"GPU_PYTHON": str(python), "OUT": str(folder / "out"), "CALLS": str(calls),
             "STUCK": "none", "BROKEN": "none", "PATH": "/usr/bin:/bin"}  # fmt: skip
    done = subprocess.run(
        [SCRIPT], env={**os.environ, **given, **environment}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, calls.read_text().splitlines()[1:], done.stdout


def names(calls: list[str]) -> list[str]:
    return [" ".join(call.split()[:3]) for call in calls]


def test_every_step_runs_in_its_order_and_keeps_what_it_says(tmp_path: Path) -> None:
    status, calls, said = run(tmp_path)
    assert status == 0, said
    assert names(calls)[:6] == [
        "blnet.cli doctor --json",
        "blnet.cli kernels check",
        "pytest -q tests/test_gpu_optimizing.py",
        "blnet.cli bench models",
        "blnet.cli bench kernels",
        "pytest -q tests/test_gpu_training.py",
    ]
    assert f"--output {tmp_path}/out/models" in calls[3]
    assert (tmp_path / "out" / "doctor.json").read_text() == "said: -m blnet.cli doctor --json\n"
    assert "said: -m blnet.cli kernels check" in (tmp_path / "out" / "check.txt").read_text()


def test_a_step_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    status, calls, said = run(tmp_path, BROKEN="bench models")
    assert status == 1
    assert "models failed (2)" in said
    assert "it broke" in said
    assert "blnet.cli bench kernels" in names(calls)


def test_a_step_is_stopped_and_what_no_time_is_left_for_is_said(tmp_path: Path) -> None:
    status, calls, said = run(tmp_path, STUCK="doctor", LIMIT="11")
    assert status == 1
    assert calls == []
    assert "doctor failed (124)" in said
    assert "interrupted" in (tmp_path / "out" / "doctor.json").read_text()
    assert "check was not run: no time is left of 11 s (LIMIT)" in said


def test_steps_are_the_tests_there_are() -> None:
    text = SCRIPT.read_text()
    named = {word for word in text.replace('"', " ").split() if word.startswith("tests/")}
    mine = Path(__file__).parent
    found = {f"tests/{path.name}" for path in mine.glob("test_gpu*.py")} - {
        "tests/test_gpu_script.py"
    }
    assert named == found


def test_its_commands_are_understood(tmp_path: Path) -> None:
    _, calls, _ = run(tmp_path)
    own = [call.split()[1:] for call in calls if call.startswith("blnet.cli ")]
    assert len(own) >= 4
    for words in own:
        name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
        parser = Parser(prog=name)
        importlib.import_module(COMMANDS[name][0]).configure(parser)
        parser.parse_args(words[len(name.split()) :])


def test_a_limit_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT], env={**os.environ, "LIMIT": "abc", "OUT": str(tmp_path)},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "LIMIT must be a number of seconds, got 'abc'\n"
