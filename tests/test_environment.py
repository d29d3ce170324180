"""Facts about the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blnet.environment import Environment, collect, core_count, cpu_name, git_commit, versions


def test_the_facts_round_trip_through_json() -> None:
    found = collect()
    again = Environment.from_dict(json.loads(json.dumps(found.as_dict())))
    assert again == found
    values = found.as_dict()
    del values["cpu"]
    with pytest.raises(ValueError, match="lacks cpu"):
        Environment.from_dict(values)


def test_the_facts_are_those_of_this_process() -> None:
    found = collect("cpu")
    assert found.device == found.cpu == cpu_name()
    assert found.cores == core_count() >= 1
    assert found.threads == torch.get_num_threads()
    # The local part, "+cpu", stands in one of them or in both.
    assert found.packages["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "blnet" in found.packages
    assert found.date[:2] == "20"
    assert found.memory is None or found.memory > 1e8


def test_packages_that_are_not_there_are_left_out() -> None:
    assert set(versions(("torch", "no-such-package-anywhere"))) == {"torch"}


def test_the_commit_is_marked_where_files_differ(tmp_path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    marked = git_commit(tmp_path)
    subprocess.run([*git, "commit", "-q", "-m", "two"], check=True)
    clean = git_commit(tmp_path)
    assert marked is not None
    assert marked.endswith("+")
    assert clean is not None
    assert len(clean) == 40


def test_the_command_is_what_a_reader_would_type(tmp_path: Path) -> None:
    code = "from blnet.environment import command_line\nprint(command_line())\n"
    (tmp_path / "measure.py").write_text(code)
    for start, words in ((["measure.py"], "measure.py"), (["-m", "measure"], "python -m measure")):
        command = [sys.executable, *start, "--batch", "2 3"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == f"{words} --batch '2 3'\n"
