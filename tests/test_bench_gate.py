"""The gate of `blnet bench --compare` end to end: slow code, wrong code, the same code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blnet.bench.catalogue import SUITES
from blnet.bench.results import Results, read_json, write_json
from blnet.cli import main

TINY_SUITE = """
import os
import pytest, torch
from blnet.bench.measure import Group, Implementation
from blnet.bench.plugin import measured, pytest_generate_tests
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.session import Case
from blnet.limits import UnavailableError

NAME = "tiny"
WAYS = ("eager", "compile", "blnet")

def declared():
    return WAYS[:-1] if os.environ.get("TINY") == "gone" else WAYS

def cases(settings):
    return [Case("g", "f", way) for way in declared()]

def build(group, session):
    right = torch.ones(2, 3)

    def make(way):
        broken = os.environ.get("TINY", "") if way == "blnet" else ""
        if broken == "skipped":
            raise UnavailableError("nosuch is not installed")
        sign = torch.tensor([1.0, -1.0 if broken.startswith("flipped") else 1.0, 1.0])

        def call():
            return right * sign
        call.seconds = {"slow": 0.006, "far slower": 0.5}.get(broken, 0.003)  # see `tiny`
        return call

    ways = [
        Implementation(way, "f", lambda way=way: make(way), facts={"batch": 8, "baseline":
            way != "blnet", "bytes": 8, "pass": "forward"})
        for way in declared()
    ]
    return Group(NAME, group, ways, {"f": lambda: right}, 1e-6, "exact", session.settings.rounds(1))

@pytest.mark.benchmark(timer=virtual_clock)
def test_tiny(case, measured, benchmark):
    replay(benchmark, measured(case))
    if os.environ.get("TINY") == "flipped and a crash" and case.implementation == "eager":
        raise KeyError("a mistake of the suite")
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return what runs a suite of three ways, of which TINY in the environment breaks ours.

    Each way tells its own time, so that a busy machine changes no verdict.
    """
    monkeypatch.setattr("blnet.bench.measure.make_clock", lambda device: lambda call: call.seconds)
    (tmp_path / "test_tiny_compared.py").write_text(TINY_SUITE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SUITES, "tiny", ("test_tiny_compared", "of a test"))
    monkeypatch.chdir(tmp_path)

    def run(output: str, *words: str, broken: str = "", repeat: int = 12) -> int:
        monkeypatch.setenv("TINY", broken)
        common = ["bench", "tiny", "--device", "cpu", "--repeat", str(repeat)]
        return main([*common, "--output", output, *words])

    return run


def test_the_gate_catches_slow_and_wrong_code_and_nothing_else(
    tiny: Callable[..., int], capfd: Any
) -> None:
    gate = ("--compare", "old", "--fail-if-slower", "30%")
    assert tiny("old") == 0
    assert tiny("same", *gate) == 0
    assert "0 of 3 implementations are slower by more than 30 %" in capfd.readouterr().out
    assert tiny("slow", *gate, broken="slow") == 1
    assert "1 of 3 implementations are slower by more than 30 %" in capfd.readouterr().out
    assert tiny("noted", "--compare", "old", broken="slow") == 0  # without a gate nothing fails
    assert tiny("wrong", *gate, broken="flipped") == 1
    said = capfd.readouterr().out
    assert "FAILED tiny, g, f, blnet: relative error" in said
    assert "lost its time: tiny, g, f, blnet: wrong, relative error" in said
    wrong = read_json(Path("wrong/results.json")).failures
    assert [(m.implementation, m.samples) for m in wrong] == [("blnet", [])]
    for name, status in (("same", 0), ("slow", 1), ("wrong", 1)):
        words = ["bench", "compare", "old", name]
        assert main([*words, "--fail-if-slower", "30%"]) == status
        assert main(words) == 0


def test_the_gate_catches_what_is_too_slow_to_be_timed(
    tiny: Callable[..., int], capfd: Any
) -> None:
    """Half a second a call: in 12 rounds more than the leash lets anything cost."""
    gate = ("--compare", "old", "--fail-if-slower", "30%")
    assert tiny("old") == 0
    assert tiny("far", *gate, broken="far slower") == 1
    said = capfd.readouterr().out
    assert "lost its time: tiny, g, f, blnet: dropped, 166.7 times slower" in said
    assert "1 lost their time because they are far slower now" in said


def test_the_gate_catches_what_is_skipped_now(tiny: Callable[..., int], capfd: Any) -> None:
    """A package that is gone must not hide what runs on it."""
    gate = ("--compare", "old", "--fail-if-slower", "30%")
    assert tiny("old") == 0
    assert tiny("new", *gate, broken="skipped") == 1
    said = capfd.readouterr().out
    assert "lost its time: tiny, g, f, blnet: skipped, nosuch is not installed" in said
    assert "1 lost their time because they are skipped now" in said
    assert "fail now" not in said
    for words, status in ((["old", "new"], 1), (["new", "new"], 0), (["new", "old"], 0)):
        assert main(["bench", "compare", *words, "--fail-if-slower", "30%"]) == status


def test_the_gate_catches_what_is_no_longer_declared(tiny: Callable[..., int], capfd: Any) -> None:
    assert tiny("old") == 0
    assert tiny("new", "--compare", "old", "--fail-if-slower", "30%", broken="gone") == 1
    said = capfd.readouterr().out
    assert "gone without a word from the new run: tiny, g, f, blnet" in said
    assert "0 of 2 implementations are slower by more than 30 %; 1 gone without a word" in said


def test_too_few_rounds_on_one_side_tell_nothing(tiny: Callable[..., int], capfd: Any) -> None:
    """Ranks of 4 and 12 rounds would be sure, but the 4 have no interval."""
    assert tiny("old") == 0
    gate = ("--compare", "old", "--fail-if-slower", "30%")
    assert tiny("few", *gate, broken="slow", repeat=4) == 1
    said = capfd.readouterr().out
    assert "Nothing can be told: 4 to 12 rounds are too few" in said
    assert "2.000 [" not in said
    assert " slower" not in said
    assert main(["bench", "compare", "old", "few", "--json", "compared.json"]) == 0
    row = json.loads(Path("compared.json").read_text())["rows"][-1]
    assert row["verdict"] == "too few"
    assert row["ratio"] == {"value": 2.0, "low": None, "high": None}


def test_a_crash_of_a_suite_is_told_and_the_run_is_kept(
    tiny: Callable[..., int], capfd: Any
) -> None:
    """An implementation that fails honestly beside it hides it no more."""
    assert tiny("out", broken="flipped and a crash", repeat=2) == 1
    found = read_json(Path("out/results.json"))
    assert [m.status for m in found.measurements] == ["ok", "ok", "wrong"]
    said = [note for note in found.notes if "a suite's own code failed" in note]
    assert said == [
        "a suite's own code failed in test_tiny[g | f | eager]: KeyError: 'a mistake of the suite'"
    ]
    assert Path("out/report.md").is_file()
    assert "a mistake of the suite" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_at_the_end_leaves_the_table(
    tiny: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def full(results: Results, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blnet.bench.report.write_all", full)
    assert tiny("out", repeat=2) == 1
    captured = capfd.readouterr()
    assert "GB/s" in captured.out
    assert "out could not be written (No space left on device)" in captured.err


def test_what_cannot_be_compared_is_told_before_anything_is_measured(
    tiny: Callable[..., int], capfd: Any
) -> None:
    assert tiny("old", repeat=2) == 0
    changed = read_json(Path("old/results.json"))
    changed.environment["device"] = "another"
    write_json(Path("another.json"), changed)
    write_json(Path("studies.json"), dataclasses.replace(changed, measurements=[]))
    capfd.readouterr()
    for words, said in (
        (("--compare", "nosuch"), "nosuch cannot be read"),
        (("--compare", "another.json"), "add --across-devices"),
        (("--compare", "old", "--size", "64"), "differ in size (224 and 64)"),
        (("--compare", "studies.json", "--across-devices"), "has no time of tiny; it has none"),
        (("--fail-if-slower", "5%"), "name it with --compare FILE"),
        (("--across-devices",), "name it with --compare FILE"),
        (
            ("--compare", "old", "--fail-if-slower", "5%"),
            "has 2 rounds, too few to tell",
        ),
    ):
        assert tiny("new", *words) == 2
        captured = capfd.readouterr()
        assert said in captured.err
        assert captured.err.count("\n") == 1
        assert not Path("new").exists()


def test_an_interrupted_run_is_compared_and_stays_interrupted(
    tiny: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    assert tiny("old") == 0

    def interrupted(results: Results, folder: Path, whole: bool) -> int:
        write_json(folder / "results.json", results)
        return 130

    monkeypatch.setattr("blnet.bench.runner.finish", interrupted)
    gate = ("--compare", "old", "--fail-if-slower", "30%")
    assert tiny("slow", *gate, broken="slow") == 130
    assert "1 of 3 implementations are slower" in capfd.readouterr().out
