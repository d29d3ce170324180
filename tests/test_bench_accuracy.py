"""The studies of accuracy: what they train, what they make of it, and that nothing is filled in."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console

from blnet.bench import accuracy, progress, runner, studies
from blnet.bench.catalogue import STUDIES, SUITES, default_suites
from blnet.bench.flags import parse_settings
from blnet.bench.intervals import mean
from blnet.bench.report import csv_text, html_page, markdown, print_tables
from blnet.bench.report.cells import device_of
from blnet.bench.results import Measurement, Results, read_json, write_json
from blnet.bench.session import Session
from blnet.bench.settings import Settings
from blnet.bench.suites import test_accuracy as accuracy_suite
from blnet.bench.suites import test_conversion as conversion_suite
from blnet.cli import main
from blnet.training.journal import read_rows
from blnet.training.run import run
from blnet.training.stopping import Interrupted


def result(family: str, seed: int, top1: float, macs: int = 100, **facts) -> Measurement:
    plain = family in ("resnet50", "plain")
    return Measurement(
        facts.pop("suite", "accuracy"),
        "digits",
        family,
        f"seed {seed}",
        facts={
            "network": family,
            "alpha": None if plain else 2,
            "beta": None if plain else 4,
            "baseline": "resnet50",
            "seed": seed,
            "accuracy": top1,
            "macs": macs,
            "parameters": 1000,
            "epochs": 3,
            "evaluation_images": 360,
            **facts,
        },
        status="ok",
        samples=[2.0, 1.0, 3.0],
    )


def results(*measurements: Measurement) -> Results:
    settings = Settings(device="cpu", dtype="float32", batch=8).as_dict()
    environment = {"device": "a CPU", "cpu": "a CPU", "threads": 2, "date": "now"}
    return Results(environment, settings, measurements=list(measurements))


def test_mean_is_student_s() -> None:
    # By hand: t with 2 degrees of freedom at 97.5 % is 4.30265, the standard error 1 / sqrt(3).
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.half_width == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert mean([5.0]).half_width is None
    with pytest.raises(ValueError, match="one sample"):
        mean([])


def test_rows_are_means_over_seeds_and_differences_seed_by_seed() -> None:
    found = results(
        result("resnet50", 0, 0.90, 200),
        result("bl_resnet50 a2 b4", 0, 0.92),
        result("resnet50", 1, 0.94, 200),
        result("bl_resnet50 a2 b4", 1, 0.96),
    )
    plain, ours = accuracy.rows(found, "accuracy")
    assert plain.score.value == pytest.approx(92)
    assert plain.difference is None
    assert ours.score.value == pytest.approx(94)
    assert ours.difference.value == pytest.approx(2)
    assert ours.difference.half_width == pytest.approx(0, abs=1e-9)  # each seed gained the same
    assert ours.mac_ratio == 2
    assert ours.epoch_seconds == 2.0


def test_a_run_that_failed_fills_no_cell() -> None:
    broken = result("bl_resnet50 a2 b4", 0, 0.5)
    broken.status, broken.note, broken.facts = "error", "the loss became nan", {"seed": 0}
    found = results(result("resnet50", 0, 0.9), broken)
    assert [row.family for row in accuracy.rows(found, "accuracy")] == ["resnet50"]
    text = markdown(found)
    assert "**Failed**" in text
    assert "the loss became nan" in text
    alone = results(result("bl_resnet50 a2 b4", 0, 0.9))
    row = accuracy.rows(alone, "accuracy")[0]
    assert (row.difference, row.mac_ratio) == (None, None)
    assert accuracy.cells(row, "accuracy").count("-") == 2


def test_tables_files_and_plot(tmp_path: Path) -> None:
    found = results(result("resnet50", 0, 0.9, 200), result("bl_resnet50 a2 b4", 0, 0.92))
    out = Console(file=io.StringIO(), width=140)
    print_tables(found, out)
    shown = out.file.getvalue()
    assert f"; {device_of(found)}" in shown
    assert "92.00" in shown
    assert "+2.00" in shown
    text = markdown(found)
    assert "| resnet50 | - | - | 0.00 | 0.0000 | 1.00 | 90.00 |" in text
    assert "![accuracy](accuracy.png)" in text
    assert "224x224" not in text, "a study has the size of its pictures"
    assert "How times are taken" not in text
    lines = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [line["accuracy"] for line in lines] == ["0.9", "0.92"]
    assert accuracy.plot(found, "accuracy", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert not accuracy.plot(results(), "accuracy", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_conversion_is_held_against_the_converted_one() -> None:
    options = {"suite": "conversion", "baseline": "plain"}
    found = results(
        result("plain", 0, 0.90, 200, **options, cost=6e12),
        result(accuracy.CONVERTED, 0, 0.95, **options, cost=7e12),
        result(conversion_suite.SAME_TOTAL, 0, 0.93, **options, cost=7e12),
    )
    _, converted, anew = accuracy.rows(found, "conversion")
    assert converted.difference is None
    assert anew.difference.value == pytest.approx(2)
    assert accuracy.cells(anew, "conversion")[3] == "7.00"
    assert accuracy.CONVERTED == conversion_suite.CONVERTED


def test_studies_run_by_name_only_and_are_the_paper_s_settings() -> None:
    assert set(STUDIES) <= set(SUITES)
    for full in (True, False):
        assert not set(STUDIES) & set(default_suites(Settings(device="cpu", full=full)))
    settings = parse_settings(["accuracy", "--seeds", "2", "--seed", "5"])
    found = accuracy_suite.cases(settings)
    assert len(found) == 10
    assert [case.family for case in found[:5]] == [
        "resnet50",
        "bl_resnet50 a2 b2",
        "bl_resnet50 a2 b4",
        "bl_resnet50 a4 b2",
        "bl_resnet50 a4 b4",
    ]
    assert {case.implementation for case in found} == {"seed 5", "seed 6"}


def test_runs_of_a_scale_are_those_of_its_recipe() -> None:
    settings = Settings(scale="imagenet", data="pictures", epochs=90)
    flags = ["--model.name=bl_resnet50", "--model.alpha=4"]
    config, command = studies.configure(settings, studies.VISION, flags, Path("out"), 7)
    assert (config.epochs, config.seed, config.optimizer.lr) == (90, 7, 0.1)
    assert (config.model.alpha, config.data.path, config.resume) == (4, "pictures", "auto")
    assert not config.baseline
    assert command.startswith("blnet train vision --recipe imagenet_paper")


@pytest.mark.parametrize("name", studies.SCALES)
def test_every_scale_has_a_recipe_that_takes_its_flags(name: str) -> None:
    scale = studies.SCALES[name]
    settings = Settings(scale=name, data="data.npz" if scale.needs_data else None)
    config, command = studies.configure(settings, scale.kind, [], Path("out"), 0)
    assert config.epochs > 0
    assert f"--recipe {scale.recipe} " in command
    if name == "cifar10_cpu":
        assert (config.data.name, config.model.width) == ("cifar10", 0.25)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["accuracy", "--scale", "imagenet"], "--scale imagenet needs --data"),
        (["conversion", "--scale", "cifar10"], "--scale cifar10 needs --data"),
        (["accuracy", "--scale", "mnist"], "invalid choice"),
        (["accuracy", "--scale", "synth"], "of a study of vision must be one of digits, cifar10"),
        (["speech", "--scale", "fsdd"], "--scale fsdd needs --data"),
        (["speech", "--scale", "fsdd", "--data", "no.zip"], "--data no.zip does not exist"),
        (["speech", "--scale", "so762", "--data", "no::x"], "--data no does not exist"),
        (["speech", "--scale", "digits"], "of a study of speech must be one of synth, fsdd"),
        (["accuracy", "--seeds", "0"], "--seeds must be at least 1"),
        (["accuracy", "--epochs", "0"], "--epochs must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(words, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["bench", *words, "--device", "cpu"])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits, few and with narrow networks."""
    flags = ("--model.width=0.125", "--data.limit=64", "--batch-size=32", "--device=cpu")
    monkeypatch.setitem(studies.SCALES, "digits", studies.Scale("digits", "tiny", flags))


def bench(suite: ModuleType, epochs: int, folder: Path, *more: str) -> int:
    """Run a study by its command, without pytest inside pytest."""
    small = ["--models", "bl_resnet18", "--alpha", "2", "--seeds", "1", "--threads", "1"]
    words = [*small, "--device", "cpu", "--epochs", str(epochs), "--output", str(folder), *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_suites", run_here)
        patch.setattr(progress, "error_console", lambda: Console(file=io.StringIO()))
        return main(["bench", suite.NAME, *words])


def run_here(suites: dict[str, str], session: Session) -> bool:
    """Do as `run_suites` does, in this process."""
    try:
        for module in map(importlib.import_module, suites.values()):
            for case in module.cases(session.settings):
                session.measured(module, case)
    except KeyboardInterrupt:
        session.results.interrupted = True
    return True


@pytest.mark.usefixtures("tiny")
def test_a_study_trains_keeps_its_runs_and_goes_on(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "study"
    assert bench(accuracy_suite, 1, folder) == 0
    found = read_json(folder / "results.json")
    assert [(m.family, m.status) for m in found.measurements] == [
        ("resnet18", "ok"),
        ("bl_resnet18 a2 b4", "ok"),
    ]
    for m in found.measurements:
        run = folder / "runs" / "accuracy" / f"{m.family.replace(' ', '-')}-seed0"
        row = list(read_rows(run, "epoch"))[-1]
        assert m.facts["accuracy"] == row["accuracy"], "the last epoch's, not the best one's"
        assert m.samples == [row["seconds"]]
        assert m.description.startswith("blnet train vision --recipe digits")
    assert (folder / "accuracy.png").is_file()
    # Finished runs are taken over, not trained again.
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("step-*/model.safetensors"))
    assert bench(accuracy_suite, 1, folder) == 0
    after = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("step-*/model.safetensors"))
    assert before == after
    again = read_json(folder / "results.json")
    assert [m.facts["accuracy"] for m in again.measurements] == [
        m.facts["accuracy"] for m in found.measurements
    ]


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_study_goes_on_with_the_same_command(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    folder, runs = tmp_path / "study", []

    def stopped(task, config, place, *rest):
        runs.append(place.name)
        if len(runs) == 2:
            raise Interrupted(2, 1)
        return run(task, config, place, *rest)

    monkeypatch.setattr("blnet.training.run.run", stopped)
    monkeypatch.setattr("sys.argv", ["blnet", "bench", "accuracy"])
    assert bench(accuracy_suite, 1, folder) == 130
    assert f"go on with: blnet bench --continue {folder}\n" in capsys.readouterr().err
    assert [m.family for m in read_json(folder / "results.json").measurements] == ["resnet18"]
    # The same command, and then with more seeds.
    assert bench(accuracy_suite, 1, folder) == 0
    assert bench(accuracy_suite, 1, folder, "--seeds", "2") == 0
    found = read_json(folder / "results.json")
    assert not found.interrupted
    assert len([m for m in found.measurements if m.status == "ok"]) == 4
    assert runs == 2 * ["resnet18-seed0", "bl_resnet18-a2-b4-seed0"] + [
        f"{name}-seed{seed}" for seed in (0, 1) for name in ("resnet18", "bl_resnet18-a2-b4")
    ]
    capsys.readouterr()
    assert bench(accuracy_suite, 2, folder) == 2
    assert "holds a study of --epochs 1, and here it is 2" in capsys.readouterr().err
    for suites in (["accuracy", "merge"], ["accuracy", "conversion"], ["conversion"], []):
        assert main(["bench", *suites, "--device", "cpu", "--output", str(folder)]) == 2
        assert "holds a results.json already" in capsys.readouterr().err


@pytest.fixture
def threads() -> Iterator[None]:
    """Give back the number of threads that a session sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("tiny", "threads")
def test_runs_keep_what_they_were_trained_with(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "study"
    assert bench(accuracy_suite, 1, folder) == 0
    said = "Trained in another environment than the report's"
    assert said not in capsys.readouterr().out
    assert bench(accuracy_suite, 1, folder, "--seeds", "2", "--threads", "2") == 0
    found = read_json(folder / "results.json")
    assert found.environment["threads"] == 2
    assert [m.facts.get("elsewhere") for m in found.measurements] == 2 * [{"threads": "1"}] + [
        None,
        None,
    ]
    note = (
        f"{said}, so that seconds may not compare: resnet18, seed 0; bl_resnet18 a2 b4, seed 0 "
        "(with threads 1)."
    )
    for text in (capsys.readouterr().out, markdown(found), html_page([found])):
        assert note in " ".join(text.replace("&#x27;", "'").split())
    for path in (folder / "runs" / "accuracy").glob("*-seed1/run.json"):
        path.unlink()
    assert bench(accuracy_suite, 1, folder, "--seeds", "2", "--threads", "2") == 0
    assert "seed 1 (with environment unknown)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("tiny")
def test_a_score_that_is_no_number_is_a_red_line(tmp_path: Path, monkeypatch, capsys) -> None:
    facts = studies._facts
    monkeypatch.setattr(studies, "_facts", lambda *of: {**facts(*of), "accuracy": math.nan})
    assert bench(accuracy_suite, 1, tmp_path / "study") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "FAILED accuracy, digits, resnet18, seed 0: its accuracy is no number" in said
    found = read_json(tmp_path / "study" / "results.json")
    assert [m.status for m in found.measurements] == ["error", "error"]


def test_a_study_s_results_are_not_lost_to_another_study(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", results(result("resnet50", 0, 0.9)))
    settings = Settings(suites=("conversion",))
    assert not studies.goes_on(settings, tmp_path, STUDIES)
    for suite in STUDIES:
        (tmp_path / "runs" / suite).mkdir(parents=True)
    with pytest.raises(ValueError, match="holds the study accuracy as well"):
        studies.goes_on(settings, tmp_path, STUDIES)
    assert studies.goes_on(Settings(suites=STUDIES), tmp_path, STUDIES)
    assert not studies.goes_on(Settings(suites=("accuracy", "merge")), tmp_path, STUDIES)


@pytest.mark.usefixtures("tiny")
def test_a_conversion_study_costs_what_it_says(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "study"
    assert bench(conversion_suite, 3, folder) == 0
    found = {m.family: m for m in read_json(folder / "results.json").measurements}
    assert tuple(found) == conversion_suite.FAMILIES
    assert all(m.status == "ok" for m in found.values()), json.dumps(
        {name: m.note for name, m in found.items()}
    )
    plain, tuned = found["plain"].facts, found[conversion_suite.CONVERTED].facts
    own, other = tuned["macs"], plain["macs"]
    assert plain["images"] == 3 * 64
    assert plain["cost"] == 3 * 64 * 3 * other
    assert tuned["epochs"] == 1
    assert tuned["cost"] == plain["cost"] + 64 * (3 * own + other)
    for family, least in (
        (conversion_suite.SAME_TUNING, tuned["cost"] - plain["cost"]),
        (conversion_suite.SAME_TOTAL, tuned["cost"]),
    ):
        facts = found[family].facts
        assert facts["cost"] == facts["epochs"] * 64 * 3 * facts["macs"]
        assert least <= facts["cost"] < least + 64 * 3 * facts["macs"]


@pytest.mark.usefixtures("tiny")
def test_a_run_that_cannot_be_trained_is_a_red_line(tmp_path: Path, monkeypatch, capsys) -> None:
    flags = (*studies.SCALES["digits"].flags, "--lr=1e6")
    monkeypatch.setitem(studies.SCALES, "digits", studies.Scale("digits", "tiny", flags))
    assert bench(accuracy_suite, 3, tmp_path / "study") == 1
    out = capsys.readouterr().out
    assert "FAILED accuracy, digits, resnet18, seed 0" in out
    assert "loss became" in out


def test_a_run_that_was_resumed_elsewhere_says_where_it_was(tmp_path: Path) -> None:
    session = SimpleNamespace(results=SimpleNamespace(environment={"threads": 2}))
    (tmp_path / "run.json").write_text(json.dumps({"environment": {"threads": 2}}))
    rows = [{"kind": "start", "step": 0, "device": name} for name in ("A", "A", "B", "B")]
    for count, found in ((2, {}), (4, {"elsewhere": {"device": "A, then B"}})):
        text = "".join(json.dumps(row) + "\n" for row in rows[:count])
        (tmp_path / "metrics.jsonl").write_text(text)
        assert studies._elsewhere(session, tmp_path) == found  # type: ignore[arg-type]
    for damaged in ("null", "[]", '{"environment": 3}', "{"):
        (tmp_path / "run.json").write_text(damaged)
        assert studies._elsewhere(session, tmp_path) == {"elsewhere": {"environment": "unknown"}}  # type: ignore[arg-type]
