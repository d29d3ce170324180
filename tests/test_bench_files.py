"""The files of results: what is written, what is read, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blnet.bench import report
from blnet.bench.accuracy import STUDIES
from blnet.bench.results import Check, Results, read_json, write_json, write_text
from blnet.bench.settings import Settings, resolve
from blnet.bench.summary import model_rows
from blnet.cli import main
from helpers.results import BIG_LITTLE, PLAIN, merge, model, report_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def results() -> Results:
    nan = Check(math.nan, 1e-3, "float64")
    return report_of(
        [
            model(PLAIN, 1, "eager", [0.06] * 5),
            model(PLAIN, 1, "folded", [], status="wrong", check=nan, note="relative error nan"),
            model(BIG_LITTLE, 1, "eager", [0.04] * 5),
            merge("blnet", [0.05] * 5, False, note="on a CPU"),
        ]
    )


def test_results_round_trip(results, tmp_path) -> None:
    path = tmp_path / "deep" / "results.json"
    write_json(path, results)
    again = read_json(path)
    wrong = again.failures[0].check
    assert math.isnan(wrong.error)  # NaN is not JSON: null there, NaN here
    assert not wrong.passed
    wrong.error = results.failures[0].check.error = 0.5
    assert again.measurements == results.measurements
    assert again.networks == results.networks
    assert model_rows(again) == model_rows(results)
    values = json.loads(path.read_text())
    assert values["schema"] == 1
    assert values["measurements"][0]["quantiles"]["p50"] == 0.06
    assert values["measurements"][0]["samples"] == [0.06] * 5
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_other_versions_and_other_files_are_refused(results, tmp_path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**results.as_dict(), "schema": 99, "measurements": []}))
    with pytest.raises(ValueError, match="version 99"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"is not a results\.json"):
        read_json(path)


def of_measurement(**changes) -> Callable[[dict], None]:
    return lambda values: values["measurements"][0].update(changes)


def of_facts(**changes) -> Callable[[dict], None]:
    return lambda values: values["measurements"][0]["facts"].update(changes)


def of_study(suite: str = "accuracy", **figures) -> Callable[[dict], None]:
    """Make a trained network of the first one, with these figures."""
    facts = dict.fromkeys(("alpha", "beta")) | dict.fromkeys(("network", "baseline"), "n")
    facts |= dict.fromkeys(("parameters", "macs", "epochs", "seed"), 1) | figures
    return of_measurement(suite=suite, facts=facts)


ODD: list[tuple[object, str]] = [
    ([], "it is [], not an object"),
    (None, "it is None, not an object"),
    (lambda v: v.pop("schema"), "it lacks 'schema'"),
    (lambda v: v.update(settings={}), "it lacks device, dtype, batch, size of its settings"),
    (lambda v: v.update(settings=[]), "it has [] as its 'settings'"),
    (lambda v: v["settings"].update(batch="8"), "the settings has '8' as its 'batch'"),
    (lambda v: v["settings"].update(suites="merge"), "has 'merge' as its 'suites'"),
    (lambda v: v["environment"].pop("date"), "it lacks date of its environment"),
    (lambda v: v.update(measurements={}), "it has {} as its 'measurements'"),
    (lambda v: v["measurements"].append("x"), "has ["),
    (lambda v: v["networks"][0].pop("macs"), "a network lacks 'macs'"),
    (lambda v: v["networks"][0].update(macs="many"), "a network has 'many' as its 'macs'"),
    (lambda v: v.update(ceilings={"copy_bandwidth": 0.0}), "is no positive number"),
    (lambda v: v.update(layers={"models, batch 8": {"a": [{}]}}), "a layer of a lacks 'name'"),
    (of_measurement(samples=["x"]), "measurement 1 has ['x'] as its 'samples'"),
    (of_measurement(samples=[-0.5]), "a time of models, batch 1, resnet50, eager is no positive"),
    (of_measurement(status="great"), "has 'great' as its 'status'"),
    (of_measurement(facts=None), "has None as its 'facts'"),
    (of_measurement(check={}), "the check of models, batch 1, resnet50, eager lacks 'tolerance'"),
    (of_measurement(suite="accuracy"), "lacks baseline, beta, epochs, macs, parameters, seed"),
    (of_facts(batch="8"), "has '8' as its 'batch'"),
    (of_study(accuracy=math.nan), "has nan as its 'accuracy'"),
    (of_study(), "resnet50, eager lacks accuracy or wer"),
    (of_study("speech", wer=0.5), "resnet50, eager lacks steps"),
    (of_study("speech", wer=0.5, steps=0), "resnet50, eager has 0 as its 'steps'"),
]


@pytest.mark.parametrize(("change", "said"), ODD, ids=[said for _, said in ODD])
def test_odd_files_are_refused_in_a_sentence_by_every_command(
    results, change: Any, said: str, tmp_path, capsys: Any
) -> None:
    results.interrupted = True
    values = json.loads(json.dumps(results.as_dict()).replace("NaN", "null"))
    (tmp_path / "good.json").write_text(json.dumps(values))
    values = change if not callable(change) else (change(values), values)[1]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(values))
    for words in (
        ["bench", "report", str(tmp_path)],
        ["bench", "compare", str(tmp_path), str(tmp_path / "good.json")],
        ["bench", "compare", str(tmp_path / "good.json"), str(path)],
        ["bench", "--continue", str(tmp_path)],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{path} is not a results.json that this 'blnet bench' reads" in error
        assert said in error
        assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.json", "results.json"]


def test_what_a_later_version_added_is_left_out(results, tmp_path) -> None:
    values = json.loads(json.dumps(results.as_dict()).replace("NaN", "null"))
    values["settings"]["nosuch"] = values["nosuch"] = {"a": 1}
    for item in (*values["networks"], *values["measurements"]):
        item["nosuch"] = 1
    values["measurements"][0]["check"]["nosuch"] = 1
    path = tmp_path / "results.json"
    path.write_text(json.dumps(values))
    again = read_json(path)
    assert model_rows(again) == model_rows(results)
    assert Settings.from_dict(again.settings) == resolve(Settings(device="cpu"))
    assert main(["bench", "compare", str(tmp_path), str(tmp_path)]) == 0
    assert main(["bench", "report", str(tmp_path)]) == 0


def test_writing_is_all_or_nothing(tmp_path) -> None:
    path = tmp_path / "report.md"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


def test_committed_results_can_be_read() -> None:
    files = list((ROOT / "bench" / "results").glob("*/results.json"))
    assert files
    for path in files:
        found = read_json(path)
        text = report.markdown(found)
        shown = {m.suite for m in found.measurements}
        if "models" in shown:
            assert "| realised b1 |" in text
        for study in shown & set(STUDIES):
            assert f"({study}.png)" in text
            assert (path.parent / f"{study}.png").is_file()
