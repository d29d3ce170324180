"""The report as one HTML file: what is in it, what is escaped, and `blnet bench report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blnet.bench.report import write_all
from blnet.bench.report.page import page
from blnet.bench.results import Measurement, Results, read_json
from blnet.cli import main

pytest.importorskip("plotly")
KEPT = Path(__file__).parent.parent / "bench" / "results"
IMAGES = KEPT / "2026-11-23-cpu-amd-epyc"
SPEECH = KEPT / "2026-11-23-speech-models-cpu-amd-epyc"
STUDY = KEPT / "2026-11-23-accuracy-digits-cpu-amd-epyc"
MOST = 6_000_000  # bytes


def empty() -> Results:
    where = read_json(IMAGES / "results.json").environment
    return Results(environment=where, settings=read_json(IMAGES / "results.json").settings)


def test_every_time_of_a_run_is_in_its_page() -> None:
    results = read_json(IMAGES / "results.json")
    text = page([results])
    for m in results.measurements:
        if m.timed:
            assert f'data-value="{m.median!r}"' in text, (m.family, m.implementation)
    assert len(text.encode()) < MOST


def test_several_runs_are_one_page_of_less_than_6_mb() -> None:
    runs = [read_json(folder / "results.json") for folder in (IMAGES, SPEECH, STUDY)]
    text = page(runs)
    assert len(text.encode()) < MOST
    for run in runs:
        assert run.environment["date"][:10] in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_what_a_file_says_is_text_and_never_code() -> None:
    results = empty()
    bad = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    results.measurements = [
        Measurement("merge", bad, bad, bad, facts={"batch": 1}, status="error", note=bad)
    ]
    results.notes, results.command = [bad], bad
    text = page([results])
    assert "<img src=x" not in text
    assert "<script>alert" not in text
    assert "&lt;img src=x" in text


def test_interrupted_runs_and_failures_say_so() -> None:
    results = empty()
    results.interrupted = True
    results.measurements = [
        Measurement("merge", "g", "f", "flipped", status="wrong", note="relative error 1e+00")
    ]
    text = page([results])
    assert "interrupted" in text
    assert "relative error 1e+00" in text
    assert 'class="failed"' in text


def test_a_run_of_nothing_is_a_page_too() -> None:
    assert "Big-Little Net, measured" in page([empty()])


def test_without_plotly_the_rest_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    def missing(runs: Any) -> str:
        raise ModuleNotFoundError("No module named 'plotly'", name="plotly")

    monkeypatch.setattr("blnet.bench.report.page", missing)
    written = write_all(empty(), tmp_path)
    assert "report.html" not in written.files
    assert (tmp_path / "report.md").is_file()
    assert any("report.html left out: plotly" in note for note in written.notes)


def test_the_command_merges_runs(tmp_path: Path, capsys: Any) -> None:
    assert main(["bench", "report", str(IMAGES), str(STUDY), "--output", str(tmp_path)]) == 0
    assert "report.html, report.md" in capsys.readouterr().out
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.count("# Big-Little Net, measured") == 2
    assert (tmp_path / "report.html").stat().st_size < MOST


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere does not exist; give the folder"),
        (["bad"], "is not a results.json"),
        (["old"], "format version 0"),
        (["half"], "is not a results.json of 'blnet bench'"),
        ([str(IMAGES), str(IMAGES / "results.json")], "is the same run as"),
        ([str(IMAGES), "--output", "bad/results.json"], "is not a folder"),
    ],
)
def test_bad_words(words: list[str], said: str, tmp_path: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.chdir(tmp_path)
    for name, text in (("bad", "no"), ("old", '{"schema": 0}'), ("half", '{"schema": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    assert main(["bench", "report", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
