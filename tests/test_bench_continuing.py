"""Runs that were interrupted, memory that runs out, groups that cannot be made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blnet.bench.continuing import check_same, read_unfinished
from blnet.bench.measure import Group, Implementation
from blnet.bench.results import read_json, write_json
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings
from blnet.cli import main

GROUPS = ("first", "second")


class TwoGroups:
    """A suite of two groups with one implementation each; some batches do not fit."""

    NAME = "two"

    def __init__(self, fits: int = 99, broken: str = "") -> None:
        self.fits, self.broken = fits, broken
        self.built: list[str] = []

    def cases(self, settings: Settings) -> list[Case]:
        return [Case(group, "f", "one") for group in GROUPS]

    def build(self, group: str, session: Session) -> Group:
        if group == self.broken:
            raise RuntimeError("no such thing")
        self.built.append(group)
        ones = torch.ones(session.batch(self.NAME, group, 8))

        def call() -> torch.Tensor:
            if len(ones) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return ones

        one = Implementation("one", "f", lambda: call, facts={"batch": len(ones)}, memory=False)
        references = {"f": lambda: ones}
        return Group(self.NAME, group, [one], references, 1e-6, "exact", 3)


def session_of(folder: Path | None = None, **options: Any) -> Session:
    return Session(Settings(device="cpu"), folder=folder, **options)


def test_every_finished_group_is_on_disk_at_once(tmp_path: Path) -> None:
    suite, session = TwoGroups(), session_of(tmp_path)
    session.measured(suite, Case("first", "f", "one"))
    kept = read_json(tmp_path / "results.json")
    assert kept.interrupted, "until the run ends"
    assert not session.results.interrupted
    assert kept.finished == ["two, first"]
    assert len(kept.measurements[0].samples) == 3


def test_a_run_goes_on_with_the_groups_that_are_left(tmp_path: Path) -> None:
    first, session = TwoGroups(), session_of(tmp_path)
    session.measured(first, Case("first", "f", "one"))
    before = read_unfinished(tmp_path)
    # One that was stopped in the middle: its rounds are no series.
    before.measurements.append(
        session._groups["two, first"][0].__class__("two", "second", "f", "one")
    )
    second = TwoGroups()
    before.left_out = {f"two, {group}": {"another": "it is slow"} for group in GROUPS}
    again = session_of(tmp_path, before=before)
    assert again.results.left_out == {"two, first": {"another": "it is slow"}}
    samples = again.measured(second, Case("first", "f", "one")).samples
    assert samples == before.measurements[0].samples
    again.measured(second, Case("second", "f", "one"))
    assert second.built == ["second"]
    assert again.results.finished == ["two, first", "two, second"]
    assert [m.group for m in again.results.measurements] == list(GROUPS)
    assert any("went on" in note for note in again.results.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "Another CPU"}, "device Another CPU and here it is"),
        ({"commit": "0123"}, "commit 0123 and here it is"),
        ({"packages": {"torch": "1.0"}}, "packages torch 1.0 and here it is"),
    ],
)
def test_halves_that_could_not_be_compared_are_refused(change: Any, said: str) -> None:
    session = session_of()
    before = session_of().results
    before.environment |= change
    with pytest.raises(ValueError, match=said):
        check_same(before, session.results.environment)


def test_continue_names_what_is_wrong(tmp_path: Path, capsys: Any) -> None:
    assert main(["bench", "--continue", str(tmp_path)]) == 2
    assert "there is no results.json in it" in capsys.readouterr().err
    session = session_of()
    write_json(tmp_path / "results.json", session.results)
    assert main(["bench", "--continue", str(tmp_path)]) == 2
    assert "that run is finished; start another one" in capsys.readouterr().err
    session.results.interrupted = True
    write_json(tmp_path / "results.json", session.results)
    assert main(["bench", "--continue", str(tmp_path), "--batch", "4"]) == 2
    assert "leave out --batch" in capsys.readouterr().err
    assert main(["bench", "merge", "--continue", str(tmp_path)]) == 2
    assert "leave out SUITE merge" in capsys.readouterr().err
    session.results.settings["suites"] = ["merge", "coming"]
    write_json(tmp_path / "results.json", session.results)
    assert main(["bench", "--continue", str(tmp_path)]) == 2
    assert "that run has the suite 'coming', which this blnet lacks" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"schema": 99}')
    assert main(["bench", "--continue", str(tmp_path)]) == 2
    assert "format version 99" in capsys.readouterr().err


def test_a_write_that_fails_between_groups_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, results: Any) -> None:
        raise OSError(28, "No space left on device")

    suite, session = TwoGroups(), session_of(tmp_path)
    monkeypatch.setattr("blnet.bench.session.write_json", full)
    for group in GROUPS:
        assert session.measured(suite, Case(group, "f", "one")).status == "ok"
    said = [note for note in session.results.notes if "No space left on device" in note]
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'results.json'} could not be written between groups")


def test_what_does_not_fit_into_memory_is_halved_until_it_does() -> None:
    session = session_of()
    found = session.measured(TwoGroups(fits=3), Case("first", "f", "one"))
    assert (found.status, found.facts["batch"]) == ("ok", 2)
    assert len(session.results.measurements) == 1
    halved = [note for note in session.results.notes if "does not fit into memory" in note]
    assert [note.split(" (")[0] for note in halved] == [
        "two, first: batch 8 does not fit into memory",
        "two, first: batch 4 does not fit into memory",
    ]
    assert halved[-1].endswith("so it is measured at 2")


def test_one_that_does_not_fit_at_batch_1_is_an_error() -> None:
    session = session_of()
    found = session.measured(TwoGroups(fits=0), Case("first", "f", "one"))
    assert (found.status, found.facts["batch"]) == ("error", 1)
    assert "out of memory" in found.note


def test_a_group_that_cannot_be_made_leaves_the_others() -> None:
    session, suite = session_of(), TwoGroups(broken="first")
    found = session.measured(suite, Case("first", "f", "one"))
    assert (found.status, found.note) == ("error", "RuntimeError: no such thing")
    assert session.measured(suite, Case("second", "f", "one")).status == "ok"


OWN = """
import torch
from torchvision.models import resnet18

def make():
    return resnet18(num_classes=7)

def wide():
    network = resnet18(num_classes=7)
    network.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return network

def other():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(2))
"""
QUICK = ("--device", "cpu", "--repeat", "2", "--batch", "1", "--threads", "1", "--output", "out")


def bench_own(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "mine.py").write_text(OWN)
    return subprocess.run(
        [sys.executable, "-m", "blnet.cli", "bench", "models", *words, *QUICK],
        cwd=folder,
        env={**os.environ, "CXX": str(folder / "no-compiler")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_network_of_one_s_own_is_measured_against_its_conversion(tmp_path: Path) -> None:
    """With an image that is not square and has one channel; (3, 4) does not divide its width."""
    words = ("--model", "mine:wide", "--input", "1x96x64", "--alpha", "2", "3", "--beta", "1")
    done = bench_own(tmp_path, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [n["label"] for n in values["networks"]] == ["mine:wide", "mine:wide a2 b1"]
    status: dict[str, set[str]] = {}
    for m in values["measurements"]:
        status.setdefault(m["family"], set()).add(m["status"])
        if m["family"] == "mine:wide a3 b1":
            assert "3" in m["note"]
    assert status["mine:wide a3 b1"] == {"error"}
    assert "ok" in status["mine:wide a2 b1"]
    assert not {"error", "wrong"} & (status["mine:wide"] | status["mine:wide a2 b1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nowhere:make"], "module 'nowhere' cannot be imported"),
        (["--model", "json:nothing"], "has no function 'nothing'"),
        (["--model", "json:dumps"], "json:dumps cannot be built"),
        (["--model", "bl_resnet50"], "measure it with --models bl_resnet50"),
        (["--model", "resnet18", "--models", "resnet34"], "exclude each other"),
        (["--input", "224x224"], "is not channels x height x width"),
        (["--input", "0x224x224"], "is not channels x height x width"),
        (["--input", "1x224x224"], "needs a --model that takes so many"),
        (
            ["--model", "resnet18", "--input", "3x8x64"],
            "must have sides of 32 to 8192 pixels, got 8",
        ),
        (["merge", "--model", "resnet18"], "leave out merge"),
    ],
)
def test_bad_words_about_a_network_of_one_s_own(words: list[str], said: str, capsys: Any) -> None:
    try:
        status = main(["bench", "--device", "cpu", *words])
    except SystemExit as done:
        status = done.code
    assert status == 2
    assert said in capsys.readouterr().err
