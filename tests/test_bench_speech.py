"""The suites of speech: speed of the acoustic models, and the study that trains them."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from blnet.bench import accuracy, progress, runner, studies
from blnet.bench.ladder import rungs
from blnet.bench.report import csv_text, markdown
from blnet.bench.results import Measurement, Results, read_json
from blnet.bench.session import Session
from blnet.bench.settings import Settings
from blnet.bench.suites import test_speech as study_suite
from blnet.bench.suites import test_speech_models as speed_suite
from blnet.bench.summary import model_rows
from blnet.cli import main
from blnet.speech import bl_resnet22
from helpers.tones import WORDS, keyword, write

TWO = (
    speed_suite.SpeechSpec("resnet22", None, None, "resnet22"),
    speed_suite.SpeechSpec("bl_resnet22", 4, 1, "resnet22", pyramid=True),
)


def test_networks_are_those_of_the_papers_table() -> None:
    labels = [spec.label for spec in speed_suite.SPECS]
    assert labels == [
        "resnet22",
        "bl_resnet22 a4 b1",
        "bl_resnet22 a4 b2",
        "bl_resnet22 a4 b3",
        "bl_resnet22 a2 b3",
        "bl_resnet22 a4 b1 pyramid",
    ]
    built = speed_suite.SPECS[-1].build()
    assert built.network.config.pyramid


def test_clips_are_what_the_network_says_of_whole_maps() -> None:
    network = bl_resnet22(width=0.25, head="ctc").eval()
    torch.nn.init.normal_(network.fc.weight)
    x = torch.randn(2, 1, 64, 30)
    torch.testing.assert_close(speed_suite.Clips(network)(x), network(x, torch.tensor([30, 30])))


def test_rungs_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_suite, "SPECS", TWO)
    monkeypatch.setattr(speed_suite, "FRAMES", 20)
    quick = [rung for rung in rungs("cpu") if not rung.compiles]
    monkeypatch.setattr(speed_suite, "ladder", lambda *_: quick)
    session = Session(Settings(device="cpu", batch=2, repeat=3))
    for case in speed_suite.cases(session.settings):
        if case.group == speed_suite.group_name(2):  # one batch tells, and takes half the time
            session.measured(speed_suite, case)
    found = session.results.measurements
    assert {(m.family, m.status) for m in found} == {(spec.label, "ok") for spec in TWO}
    assert all(m.check is not None and 0 < m.check.error < 1e-3 for m in found)
    plain, ours = model_rows(session.results, "speech_models")
    assert plain.batches[2].architecture is None
    # Over its own fastest rung that is not ours, where ours is faster still.
    on_ours = plain.batches[2].rung != plain.batches[2].baseline_rung
    assert (plain.batches[2].speedup is not None) == on_ours
    assert ours.batches[2].speedup is not None
    assert ours.mac_ratio == pytest.approx(plain.network.macs / ours.network.macs)
    assert model_rows(session.results) == []
    text = markdown(session.results)
    assert "## Speech models: inference" in text
    assert "clips/s b2" in text
    assert "pixels" not in text.split("## How")[0].split("## Speech models")[1]
    assert csv_text(session.results).count("speech_models") == len(found)


@pytest.fixture
def tones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of three tones in a folder for each, as the scale of the study."""
    for word in WORDS:
        (tmp_path / "tones" / word).mkdir(parents=True)
        for seed in range(12):
            write(tmp_path / "tones" / word / f"{seed}.wav", keyword(word, seed))
    flags = (
        "--data.name=folder", f"--data.path={tmp_path / 'tones'}", "--data.sample-rate=8000",
        "--features.bins=16", "--model.width=0.25", "--batch-size=8", "--data.holdout=0.25",
        "--augment.shift=0",
    )  # fmt: skip
    scale = studies.Scale("keyword", "tones", flags, kind=studies.SPEECH)
    monkeypatch.setitem(studies.SCALES, "synth", scale)
    return tmp_path


def bench(folder: Path, *more: str) -> int:
    """Run the study by its command, without pytest inside pytest."""
    words = ["--alpha", "4", "--beta", "2", "--device", "cpu", "--epochs", "2", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_suites", run_here)
        patch.setattr(progress, "error_console", lambda: Console(file=io.StringIO()))
        return main(["bench", "speech", *words, "--output", str(folder), *more])


def run_here(suites: dict[str, str], session: Session) -> bool:
    """Do as `run_suites` does, in this process."""
    for module in map(importlib.import_module, suites.values()):
        for case in module.cases(session.settings):
            session.measured(module, case)
    return True


def test_the_study_trains_and_compares(tones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tones / "study"
    assert bench(folder, "--seeds", "2") == 0
    found = read_json(folder / "results.json")
    assert [(m.family, m.implementation, m.status) for m in found.measurements] == [
        (family, f"seed {seed}", "ok")
        for seed in (0, 1)
        for family in ("resnet22", "bl_resnet22 a4 b2")
    ]
    for m in found.measurements:
        assert m.facts["real_time_factor"] > 0
        assert m.facts["steps"] == 27 // 8  # a quarter of 36 is held out
        assert m.description.startswith("blnet train speech --recipe keyword")
    plain, ours = accuracy.rows(found, "speech")
    errors = [100 * (1 - m.facts["accuracy"]) for m in found.measurements]
    assert plain.score.value == pytest.approx((errors[0] + errors[2]) / 2)
    assert ours.difference is not None
    assert ours.difference.value == pytest.approx(
        (errors[1] - errors[0] + errors[3] - errors[2]) / 2
    )
    assert (folder / "speech.png").stat().st_size > 1000
    report = (folder / "report.md").read_text()
    assert "real-time factor" in report
    assert "acoustic models trained alike: synth, 9 evaluation recordings" in report
    assert "acoustic models trained alike" in capsys.readouterr().out


def test_speakers_are_held_out_in_turn(tmp_path: Path) -> None:
    settings = Settings(scale="fsdd_speakers", data="fsdd.zip")
    assert list(studies.run_seeds(settings, studies.SPEECH)) == list(range(6))
    held = set()
    for seed in range(6):
        config, command = studies.configure(settings, studies.SPEECH, [], tmp_path, seed)
        assert config.seed == seed
        held.add(config.data.holdout_speaker)
        assert f"--data.holdout-speaker={config.data.holdout_speaker}" in command
    assert held == {"george", "jackson", "lucas", "nicolas", "theo", "yweweler"}
    assert len(study_suite.cases(settings)) == 6 * 6


def test_a_manifest_is_evaluated_on_the_one_beside_it(tmp_path: Path) -> None:
    for data, expected in (
        ("a/b.zip::train.tsv", "a/b.zip::test.tsv"),
        ("x/train.tsv", "x/test.tsv"),
    ):
        settings = Settings(scale="so762", data=data)
        config, _ = studies.configure(settings, studies.SPEECH, [], tmp_path, 0)
        assert config.data.eval_path == expected


def test_of_transcripts_the_word_error_rate_is_compared() -> None:
    facts = {"wer": 0.5, "cer": 0.25}
    assert accuracy.score(Measurement("speech", "yesno", "x", "seed 0", facts=facts)) == 50
    facts = {"accuracy": 0.9}
    assert accuracy.score(
        Measurement("speech", "synth", "x", "seed 0", facts=facts)
    ) == pytest.approx(10)
    assert accuracy.score(Measurement("accuracy", "digits", "x", "y", facts=facts)) == 90


def test_a_search_with_ngrams_has_its_column_where_every_run_has_it() -> None:
    facts = {"network": "x", "alpha": None, "beta": None, "baseline": "x", "parameters": 1e6,
             "macs": 1e9, "epochs": 1, "steps": 1, "wer": 0.5, "cer": 0.25}  # fmt: skip
    runs = [
        Measurement("speech", "yesno", "x", f"seed {seed}", status="ok", samples=[1.0],
                    facts={**facts, "seed": seed, "ngram_wer": rate})
        for seed, rate in enumerate((0.01, 0.03))
    ]  # fmt: skip
    column = accuracy.HEADER["speech"].index("WER with n-grams, %")
    (row,) = accuracy.rows(_results(runs), "speech")
    assert accuracy.cells(row, "speech")[column].startswith("2.00 ± ")
    del runs[1].facts["ngram_wer"]
    (row,) = accuracy.rows(_results(runs), "speech")
    assert accuracy.cells(row, "speech")[column] == accuracy.NOTHING
    assert len(accuracy.cells(row, "speech")) == len(accuracy.HEADER["speech"])


def _results(measurements: list[Measurement]) -> Results:
    return Results(environment={}, settings={}, measurements=measurements)
