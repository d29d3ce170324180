"""The tables and the plot of the studies of accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blnet.bench.intervals import Mean, mean
from blnet.bench.results import ELSEWHERE, Measurement, Results
from blnet.bench.studies import median_epoch
from blnet.files import written_aside

# Suite -> what it shows.
STUDIES = {
    "accuracy": "networks trained alike",
    "conversion": "a converted network against training anew",
    "speech": "acoustic models trained alike",
}
HEADER = {
    "accuracy": ["network", "alpha", "beta", "params, M", "GMACs", "MAC ratio", "top-1, % [95 %]",
                 "over plain, points [95 %]", "s/epoch", "epochs", "seeds"],
    "conversion": ["way", "epochs", "GMACs", "cost, TMACs", "top-1, % [95 %]",
                   "converted over it, points [95 %]", "s/epoch", "seeds"],
    "speech": ["network", "alpha", "beta", "params, M", "GMACs/s", "MAC ratio", "error, % [95 %]",
               "over plain, points [95 %]", "CER, %", "WER with n-grams, %", "ms/step",
               "real-time factor", "epochs", "runs"],
}  # fmt: skip
PLAIN, CONVERTED = "plain", "converted, fine-tuned"  # families of the conversion study
NOTHING = "-"
_X = {
    "accuracy": "GMACs an image, forward",
    "conversion": "cost of training, TMACs",
    "speech": "GMACs a second of speech, forward",
}


@dataclass(frozen=True)
class StudyRow:
    """A network, or a way to one, over all seeds.

    Attributes:
        family: what the table calls it.
        facts: of its runs: alpha, beta, parameters, macs, epochs.
        score: what is compared, percent: top-1 accuracy; in the speech study the error, that is
            the share of wrong words or the word error rate.
        difference: of the score to the row that it is held against, of the same seeds, points;
            None where there is none.
        mac_ratio: MACs of the plain network over its own; None where that was not run.
        epoch_seconds: median time of an epoch.
        cer: character error rate, percent; None where nothing is spelled.
        ngram_wer: word error rate of a beam search with n-grams of the training transcripts,
            percent; None where there were none.
        real_time_factor: mean of the seconds that a second of speech takes; None of pictures.
    """

    family: str
    facts: dict[str, Any]
    score: Mean
    difference: Mean | None
    mac_ratio: float | None
    epoch_seconds: float | None
    cer: Mean | None = None
    ngram_wer: Mean | None = None
    real_time_factor: float | None = None


def rows(results: Results, suite: str) -> list[StudyRow]:
    """Return a row for each network of a study that was trained at least once, in their order."""
    runs: dict[str, list[Measurement]] = {}
    for m in results.of(suite):
        if m.timed:
            runs.setdefault(m.family, []).append(m)
    return [_row(family, found, runs) for family, found in runs.items()]


def _row(family: str, own: list[Measurement], runs: dict[str, list[Measurement]]) -> StudyRow:
    facts = own[0].facts
    plain = runs.get(facts["baseline"], [])
    reference = runs.get(CONVERTED, []) if CONVERTED in runs else plain
    difference = None
    if reference and reference is not own:
        sign = -1 if CONVERTED in runs else 1
        difference = _difference(own, reference, sign)
    return StudyRow(
        family=family,
        facts=facts,
        score=mean([score(m) for m in own]),
        difference=difference,
        mac_ratio=plain[0].facts["macs"] / facts["macs"] if plain else None,
        epoch_seconds=median_epoch(own),
        cer=_rate(own, "cer"),
        ngram_wer=_rate(own, "ngram_wer"),
        real_time_factor=_mean_of(own, "real_time_factor"),
    )


def _rate(runs: list[Measurement], name: str) -> Mean | None:
    """Return an error rate in percent, where every run has it."""
    if not all(name in m.facts for m in runs):
        return None
    return mean([100 * m.facts[name] for m in runs])


def _mean_of(runs: list[Measurement], name: str) -> float | None:
    found = [m.facts[name] for m in runs if name in m.facts]
    return sum(found) / len(found) if found else None


def score(run: Measurement) -> float:
    """Return what a run is compared by, percent; see `StudyRow.score`."""
    if "wer" in run.facts:
        return float(100 * run.facts["wer"])
    accuracy = float(100 * run.facts["accuracy"])
    return 100 - accuracy if run.suite == "speech" else accuracy


def _difference(own: list[Measurement], other: list[Measurement], sign: int) -> Mean | None:
    """Return the mean difference over the seeds that both ran with."""
    theirs = {m.facts["seed"]: score(m) for m in other}
    found = [sign * (score(m) - theirs[m.facts["seed"]]) for m in own if m.facts["seed"] in theirs]
    return mean(found) if found else None


def cells(row: StudyRow, suite: str) -> list[str]:
    """Return the cells of a row, under `HEADER`."""
    facts = row.facts
    value, difference = mean_text(row.score), mean_text(row.difference, signed=True)
    seconds = NOTHING if row.epoch_seconds is None else f"{row.epoch_seconds:.2f}"
    macs = f"{facts['macs'] / 1e9:.4f}"
    seeds = str(row.score.runs)
    if suite == "conversion":
        cost = f"{facts['cost'] / 1e12:.2f}" if "cost" in facts else NOTHING
        return [row.family, str(facts["epochs"]), macs, cost, value, difference, seconds, seeds]
    last = [seconds]
    if suite == "speech":
        factor = row.real_time_factor
        step = NOTHING
        if row.epoch_seconds is not None:
            step = f"{1000 * row.epoch_seconds / facts['steps']:.1f}"
        rates = [mean_text(row.cer), mean_text(row.ngram_wer)]
        last = [*rates, step, NOTHING if factor is None else f"{factor:.4f}"]
    return [
        str(facts["network"]),
        *(NOTHING if facts[name] is None else str(facts[name]) for name in ("alpha", "beta")),
        f"{facts['parameters'] / 1e6:.2f}",
        macs,
        NOTHING if row.mac_ratio is None else f"{row.mac_ratio:.2f}",
        value,
        difference,
        *last,
        str(facts["epochs"]),
        seeds,
    ]


def mean_text(value: Mean | None, signed: bool = False) -> str:
    """Return "97.31 ± 0.42", or what there is of it."""
    if value is None:
        return NOTHING
    text = f"{value.value:{'+' if signed else ''}.2f}"
    return text if value.half_width is None else f"{text} ± {value.half_width:.2f}"


def title(results: Results, suite: str) -> str:
    """Return what stands above a study's table."""
    scale = next((m.group for m in results.of(suite)), "")
    images = next((m.facts.get("evaluation_images") for m in results.of(suite) if m.timed), None)
    unit = "recordings" if suite == "speech" else "images"
    on = "" if images is None else f", {images:,} evaluation {unit}"
    return f"{STUDIES[suite]}: {scale}{on}"


def notes(results: Results, suite: str) -> str:
    """Return how a study's table is to be read, and which of its runs were trained elsewhere."""
    return " ".join([_how(suite), *_elsewhere(results, suite)])


def _elsewhere(results: Results, suite: str) -> list[str]:
    """Return a sentence for each other environment that runs of a study were trained in."""
    found: dict[str, list[str]] = {}
    for m in results.of(suite):
        had = ", ".join(f"{name} {value}" for name, value in m.facts.get(ELSEWHERE, {}).items())
        if had:
            found.setdefault(had, []).append(f"{m.family}, {m.implementation}")
    return [
        f"Trained in another environment than the report's, so that seconds may not compare: "
        f"{'; '.join(runs)} (with {had})."
        for had, runs in found.items()
    ]


def _how(suite: str) -> str:
    if suite == "speech":
        return (
            "Error of the last epoch's network on the evaluation recordings: the share of wrong "
            "words, or of transcripts the word error rate, mean over runs with the 95 % interval "
            "of Student's t; differences are taken run by run. WER and CER are of the likeliest "
            "path, WER with n-grams of a beam search with a language model of the training "
            "transcripts' words. Runs differ in their seed or, on "
            "fsdd_speakers, in the speaker that is held out. ms/step is the median over all epochs "
            "of all runs, training alone; the real-time factor is the evaluation's, reading, "
            "features and decoding included. Both are rough where other programs ran beside them; "
            "the suite speech_models is for speed."
        )
    text = (
        "Top-1 accuracy of the last epoch's network on the evaluation images, mean over seeds with "
        "the 95 % interval of Student's t; differences are taken seed by seed. It says how much a "
        "run's seed matters, not how well so few images stand for others. Seconds an epoch are the "
        "median over all epochs of all seeds, training alone."
    )
    if suite == "conversion":
        text += (
            " Cost is all multiply-adds of a way: three forward passes for an image trained on, "
            "one for the teacher's answer, and the plain network's training where it is needed."
        )
    return text


def plot(results: Results, suite: str, path: Path) -> bool:
    """Draw accuracy over MACs (of the conversion study, over cost) as a PNG.

    Returns:
        Whether there was anything to draw.
    """
    found = rows(results, suite)
    if not found:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    key, unit = ("cost", 1e12) if suite == "conversion" else ("macs", 1e9)
    for row in (row for row in found if key in row.facts):
        x = row.facts[key] / unit
        width = row.score.half_width or 0.0
        marker = "s" if row.facts["alpha"] is None or row.family == PLAIN else "o"
        axes.errorbar(x, row.score.value, yerr=width, marker=marker, capsize=4, label=row.family)
    axes.set_xlabel(_X[suite])
    axes.set_ylabel("error, %" if suite == "speech" else "top-1 accuracy, %")
    axes.set_title(title(results, suite), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=130)
    return True


def studies_of(results: Results) -> Sequence[str]:
    """Return the studies that a run has anything of."""
    return [suite for suite in STUDIES if any(True for _ in results.of(suite))]
