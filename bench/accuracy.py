"""The tables and the plot of the studies of accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blnet.bench.intervals import Mean, mean
from blnet.bench.results import Measurement, Results
from blnet.bench.studies import median_epoch
from blnet.files import written_aside

# Suite -> what it shows.
STUDIES = {
    "accuracy": "networks trained alike",
    "conversion": "a converted network against training anew",
}
HEADER = {
    "accuracy": ["network", "alpha", "beta", "params, M", "GMACs", "MAC ratio", "top-1, % [95 %]",
                 "over plain, points [95 %]", "s/epoch", "epochs", "seeds"],
    "conversion": ["way", "epochs", "GMACs", "cost, TMACs", "top-1, % [95 %]",
                   "converted over it, points [95 %]", "s/epoch", "seeds"],
}  # fmt: skip
CONVERTED = "converted, fine-tuned"
NOTHING = "-"


@dataclass(frozen=True)
class StudyRow:
    """A network, or a way to one, over all seeds.

    Attributes:
        family: what the table calls it.
        facts: of its runs: alpha, beta, parameters, macs, epochs.
        accuracy: top-1 accuracy in percent.
        difference: of the accuracy to the row that it is held against, of the same seeds, points;
            None where there is none.
        mac_ratio: MACs of the plain network over its own; None where that was not run.
        epoch_seconds: median time of an epoch.
    """

    family: str
    facts: dict[str, Any]
    accuracy: Mean
    difference: Mean | None
    mac_ratio: float | None
    epoch_seconds: float | None


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
        accuracy=mean([100 * m.facts["accuracy"] for m in own]),
        difference=difference,
        mac_ratio=plain[0].facts["macs"] / facts["macs"] if plain else None,
        epoch_seconds=median_epoch(own),
    )


def _difference(own: list[Measurement], other: list[Measurement], sign: int) -> Mean | None:
    """Return the mean difference over the seeds that both ran with."""
    theirs = {m.facts["seed"]: m.facts["accuracy"] for m in other}
    found = [
        100 * sign * (m.facts["accuracy"] - theirs[m.facts["seed"]])
        for m in own
        if m.facts["seed"] in theirs
    ]
    return mean(found) if found else None


def cells(row: StudyRow, suite: str) -> list[str]:
    """Return the cells of a row, under `HEADER`."""
    facts = row.facts
    accuracy, difference = mean_text(row.accuracy), mean_text(row.difference, signed=True)
    seconds = NOTHING if row.epoch_seconds is None else f"{row.epoch_seconds:.2f}"
    macs = f"{facts['macs'] / 1e9:.4f}"
    seeds = str(row.accuracy.runs)
    if suite == "conversion":
        cost = f"{facts['cost'] / 1e12:.2f}" if "cost" in facts else NOTHING
        return [row.family, str(facts["epochs"]), macs, cost, accuracy, difference, seconds, seeds]
    return [
        str(facts["network"]),
        *(NOTHING if facts[name] is None else str(facts[name]) for name in ("alpha", "beta")),
        f"{facts['parameters'] / 1e6:.2f}",
        macs,
        NOTHING if row.mac_ratio is None else f"{row.mac_ratio:.2f}",
        accuracy,
        difference,
        seconds,
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
    on = "" if images is None else f", {images:,} evaluation images"
    return f"{STUDIES[suite]}: {scale}{on}"


def notes(suite: str) -> str:
    """Return how a study's table is to be read."""
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
        width = row.accuracy.half_width or 0.0
        marker = "s" if row.facts["alpha"] is None or row.family == "plain" else "o"
        axes.errorbar(x, row.accuracy.value, yerr=width, marker=marker, capsize=4, label=row.family)
    axes.set_xlabel("cost of training, TMACs" if key == "cost" else "GMACs an image, forward")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(title(results, suite), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=130)
    return True


def studies_of(results: Results) -> Sequence[str]:
    """Return the studies that a run has anything of."""
    return [suite for suite in STUDIES if any(True for _ in results.of(suite))]
