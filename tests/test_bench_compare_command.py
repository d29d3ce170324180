"""`blnet bench compare`: what it refuses, and what it writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blnet.bench.compare import Comparison, compare
from blnet.bench.report.comparison import FEW, comparison_markdown, shown
from blnet.bench.results import write_json
from blnet.cli import main
from helpers.results import run_of, steady

STUDY = {
    "network": "resnet18", "baseline": "resnet18", "alpha": None, "beta": None, "seed": 0,
    "parameters": 1, "macs": 1, "epochs": 1, "accuracy": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ("environment", {"device": "a GPU"}, "different devices (device: a CPU and a GPU)"),
        ("environment", {"gpus": ["a GPU"]}, "different devices (gpus: none and a GPU)"),
        ("environment", {"cpu": "other"}, "--across-devices"),
        ("environment", {"threads": 4}, "differ in threads (2 and 4)"),
        ("settings", {"dtype": "bfloat16"}, "differ in dtype (float32 and bfloat16)"),
        ("settings", {"size": 64, "batch": 1}, "batch (8 and 1), size (224 and 64)"),
        ("settings", {"input": [1, 64, 64]}, "input (none and 1, 64, 64)"),
    ],
)
def test_runs_that_do_not_compare_are_refused(
    where: str, change: dict[str, Any], said: str, tmp_path: Path, capsys: Any
) -> None:
    old, new = run_of([steady(3, 24)]), run_of([steady(3, 24)])
    getattr(new, where).update(change)
    write_json(tmp_path / "old.json", old)
    write_json(tmp_path / "new.json", new)
    words = ["bench", "compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert main([*words, "--across-devices"]) == (0 if where == "environment" else 2)


def test_batches_of_one_implementation_that_differ_are_refused() -> None:
    old, new = run_of([steady(3, 24)]), run_of([steady(3, 24)])
    new.measurements[1].facts["batch"] = 16
    with pytest.raises(ValueError, match=r"the batch of suite, group 0, family, way 1 \(8 and 16"):
        compare(old, new)


def results_file(path: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    values = run_of([steady(3, 24)]).as_dict()
    change(values)
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.update(schema=99), "format version 99"),
        (lambda v: v.pop("measurements"), "it lacks 'measurements'; measure again"),
        (lambda v: v["measurements"][0]["samples"].append(0.0), "no positive number"),
        (
            lambda v: [m.update(suite="accuracy", facts=STUDY) for m in v["measurements"]],
            "no implementation",
        ),
    ],
)
def test_a_file_that_holds_no_such_run(
    change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path, capsys: Any
) -> None:
    good = results_file(tmp_path / "good.json", lambda v: None)
    bad = results_file(tmp_path / "bad.json", change)
    assert main(["bench", "compare", good, bad]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_a_setting_that_an_earlier_version_lacks_is_its_default() -> None:
    old, new = run_of([steady(3, 24)]), run_of([steady(3, 24)])
    new.settings["graphs"] = False
    compare(old, new)
    new.settings["graphs"] = True
    with pytest.raises(ValueError, match=r"differ in graphs \(False and True\)"):
        compare(old, new)


def test_files_that_cannot_be_read_or_written(tmp_path: Path, capsys: Any) -> None:
    good = results_file(tmp_path / "results.json", lambda v: None)
    assert main(["bench", "compare", good, str(tmp_path / "nosuch")]) == 2
    assert "nosuch cannot be read (No such file or directory)" in capsys.readouterr().err
    (tmp_path / "text").write_text("not JSON")
    assert main(["bench", "compare", str(tmp_path / "text"), good]) == 2
    assert "text is not a results.json" in capsys.readouterr().err
    for json_path in (tmp_path, tmp_path / "text" / "deeper.json"):
        assert main(["bench", "compare", good, str(tmp_path), "--json", str(json_path)]) == 2
        assert f"--json {json_path} cannot be written" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "text"]


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("5 %", 0.05), ("5", 0.05), ("0", 0.0),
                                             ("2.5%", 0.025), ("0.5%", 0.005)])  # fmt: skip
def test_per_cent(text: str, share: float) -> None:
    from blnet.bench.compare_command import percent

    assert percent(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0.05", "-5%", "nan", "inf", "1001", "five", "", "5%%", "1e2"])
def test_no_per_cent(text: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", "compare", "a", "b", f"--fail-if-slower={text}"])
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert f"{text!r} is no per cent from 0 to 1000; write it as 5%" in said
    assert said.count("\n") == 1


def many() -> Comparison:
    new = steady(FEW + 2, 24, 2)
    new[-1] *= 1.2
    return compare(run_of([steady(FEW + 2, 24, 1)]), run_of([new]), 0.05)


def test_of_many_rows_only_those_that_changed_are_shown(tmp_path: Path, capsys: Any) -> None:
    comparison = many()
    assert [row.verdict for row in shown(comparison)] == ["slower"]
    assert len(shown(comparison, everything=True)) == FEW + 2
    few = dataclasses.replace(comparison, rows=comparison.rows[-FEW:])
    assert len(shown(few)) == FEW
    new = steady(FEW + 2, 24, 2)
    new[-1] *= 1.2
    write_json(tmp_path / "old.json", run_of([steady(FEW + 2, 24, 1)]))
    write_json(tmp_path / "new.json", run_of([new]))
    words = ["bench", "compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert main([*words, "--fail-if-slower", "5%"]) == 1
    text = capsys.readouterr().out
    assert f"and {FEW + 1} rows more without a change" in text
    assert f"1 of {FEW + 2} implementations are slower by more than 5 %." in text
    assert main([*words, "--all", "--json", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert "rows more" not in text
    assert "New time over old: a CPU, float32" in text
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["rows"][-1]["verdict"] == "slower"
    assert len(values["rows"]) == FEW + 2
    assert values["passed"] is False


def test_markdown_has_every_row() -> None:
    text = comparison_markdown(many())
    assert "New time over old: a CPU, float32." in text
    assert text.count("family, way") == FEW + 2
    assert "| suite, group 0 | family, way 0 (control) |" in text
    assert "| slower |" in text
    assert "| suite, group 0 | 2 | " in text  # how much the controls moved
