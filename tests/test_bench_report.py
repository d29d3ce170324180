"""What is written of a run, with or without a package, and `blnet bench report`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blnet.bench import report
from blnet.bench.report import page as page_module
from blnet.bench.results import Results, read_json, write_json
from blnet.cli import main
from helpers.results import BIG_LITTLE, PLAIN, merge, model, report_of, spread

KEPT = Path(__file__).resolve().parents[1] / "bench" / "results"


@pytest.fixture
def results() -> Results:
    return report_of(
        [
            model(PLAIN, 8, "eager", spread(0.4)),
            model(BIG_LITTLE, 8, "eager", spread(0.25)),
            merge("eager", spread(0.2), True),
            merge("blnet", spread(0.05), False),
        ]
    )


@pytest.fixture
def folder(results: Results, tmp_path: Path) -> Path:
    write_json(tmp_path / "run" / "results.json", results)
    return tmp_path / "run"


def test_write_all_writes_the_page_and_plots(results: Results, tmp_path: Path) -> None:
    written = report.write_all(results, tmp_path)
    assert written.notes == []
    assert written.files == [
        *("results.json", "results.csv", "report.md", "report.html", "models.png", "merge.png")
    ]
    assert {path.name for path in tmp_path.iterdir()} == set(written.files)
    for name in ("models.png", "merge.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


class Absent:
    """Finds no package of one name, as where it is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def take_away(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    page_module._plotly.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(package), *sys.meta_path])


@pytest.mark.parametrize(
    ("package", "missing"),
    [("plotly", {"report.html"}), ("matplotlib", {"models.png", "merge.png"})],
)
def test_a_missing_package_leaves_out_what_needs_it(
    results: Results, tmp_path: Path, monkeypatch, package: str, missing: set[str]
) -> None:
    full = set(report.write_all(results, tmp_path / "full").files)
    take_away(monkeypatch, package)
    written = report.write_all(results, tmp_path / "less")
    assert set(written.files) == full - missing
    assert {path.name for path in (tmp_path / "less").iterdir()} == full - missing
    (note,) = written.notes
    assert f"{package} is not installed; install it with: pip install 'blnet[bench]'" in note


def bench_report(*words: object) -> int:
    return main(["bench", "report", *map(str, words)])


def test_the_command_rewrites_a_run_s_report(folder: Path, capsys) -> None:
    assert bench_report(folder) == 0
    assert capsys.readouterr().out == f"written: {folder}/report.html, report.md\n"
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.md", "results.json"]
    html = (folder / "report.html").read_text()
    assert bench_report(folder / "results.json", "--output", folder.parent / "deep" / "out") == 0
    assert (folder.parent / "deep" / "out" / "report.html").read_text() == html


def test_a_report_elsewhere_links_the_plots_where_they_lie(tmp_path: Path) -> None:
    study = next(KEPT.glob("*accuracy-digits*"))
    assert bench_report(study, "--output", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    (link,) = re.findall(r"!\[accuracy\]\(<(.*)>\)", text)
    assert (tmp_path / "out" / link).samefile(study / "accuracy.png")


def test_the_command_puts_runs_together(folder: Path, results: Results, monkeypatch) -> None:
    study = next(KEPT.glob("*accuracy-digits*"))
    monkeypatch.chdir(folder.parent)
    assert bench_report(folder, study) == 0
    (made,) = (folder.parent / "results").iterdir()
    assert made.name.startswith("report-")
    text = (made / "report.md").read_text()
    assert text.startswith("# Test CPU, ")
    for run in (results, read_json(study / "results.json")):
        assert report.markdown(run).split("\n## ")[1].splitlines()[2] in text
    (link,) = re.findall(r"!\[accuracy\]\(<(.*)>\)", text)
    assert (made / link).is_file()
    page = (made / "report.html").read_text()
    assert 'id="r0-models-times"' in page
    assert 'id="r1-accuracy-study"' in page


def broken(folder: Path, change: Callable[[dict], object]) -> Path:
    values = json.loads((folder / "results.json").read_text())
    change(values)
    (folder / "results.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: [f.parent], "results.json does not exist; give the folder"),
        (lambda f: [f, f], "is the same run as"),
        (lambda f: [f, f / "results.json"], "is the same run as"),
        (lambda f: [broken(f, lambda v: v.update(schema=99))], "have format version 99"),
        (lambda f: [broken(f, lambda v: v.pop("networks"))], "it lacks 'networks'; measure again"),
        (
            lambda f: [broken(f, lambda v: v["measurements"][0].pop("suite"))],
            "measurement 1 lacks 'suite'",
        ),
        (lambda f: [broken(f, lambda v: v["environment"].pop("device"))], "lacks device"),
        (lambda f: [f, "--output", f / "results.json" / "out"], "is not a folder"),
    ],
)
def test_the_command_s_errors_are_one_sentence(folder: Path, capsys, make, message: str) -> None:
    assert bench_report(*make(folder)) == 2
    error = capsys.readouterr().err
    assert error.startswith("blnet bench report: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_the_command_needs_plotly(folder: Path, monkeypatch, capsys) -> None:
    take_away(monkeypatch, "plotly")
    assert bench_report(folder) == 2
    assert "pip install 'blnet[bench]'" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["results.json"]
