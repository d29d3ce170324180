"""What a run found, in sentences: how much faster, on what, against what."""

from __future__ import annotations

from dataclasses import dataclass

from blnet.bench import accuracy
from blnet.bench.intervals import Ratio
from blnet.bench.report.cells import few_rounds, measured_on, ratio_text
from blnet.bench.report.ops import baseline_text, lesser_op_baselines, op_where
from blnet.bench.results import Results
from blnet.bench.summary import (
    NETWORK_SUITES,
    BatchRow,
    ModelRow,
    model_rows,
    op_rows,
    op_suites,
)

# Suite of networks -> what a network does in it.
_DOES = {"models": "runs", "training": "trains", "speech_models": "runs"}


@dataclass(frozen=True)
class Claim:
    """A sentence, and the figures that stand large beside it.

    Attributes:
        subject: what it is about.
        suite: that it comes from.
        text: the sentence.
        figures: (number, what it is of), such as ("1.52x", "resnet50, batch 8").
    """

    subject: str
    suite: str
    text: str
    figures: tuple[tuple[str, str], ...] = ()


def claims(results: Results) -> list[Claim]:
    """Return what is to say of a run, the networks first."""
    found = []
    for suite, kind in NETWORK_SUITES.items():
        where = measured_on(results, kind.unit)
        for row in model_rows(results, suite):
            claim = _network(row, suite, where)
            if claim is not None:
                found.append(claim)
    found += [_op(results, suite) for suite in op_suites(results)]
    for suite in accuracy.studies_of(results):
        found += _study(results, suite)
    return found


def _network(row: ModelRow, suite: str, where: str) -> Claim | None:
    network = row.network
    if network.label == network.baseline:
        return None
    compared = [
        (batch, found, found.speedup) for batch, found in row.batches.items() if found.speedup
    ]
    if not compared:
        return Claim(network.label, suite, f"{network.label} has no speed-up: {_why(row)}.")
    parts = " and ".join(
        f"{ratio_text(gain)} as fast as {network.baseline} at batch {batch}{_clear(gain)} "
        f"(on {found.rung}, over {network.baseline}'s {found.baseline_rung}{lesser(found)})"
        for batch, found, gain in compared
    )
    macs = ""
    if row.mac_ratio:
        macs = f" It has {row.mac_ratio:.2f} times fewer multiply-adds."
        if row.mac_ratio < 1:
            macs = f" It has {1 / row.mac_ratio:.2f} times the multiply-adds."
    without = " and ".join(f"batch {b}" for b, found in row.batches.items() if not found.speedup)
    lost = f" It has no speed-up at {without}." if without else ""
    text = f"{network.label} {_DOES[suite]} {parts}, on {where}.{macs}{lost}"
    figures = tuple(
        (ratio_text(gain, interval=False), f"{network.baseline}, batch {batch}")
        for batch, _, gain in compared
    )
    return Claim(network.label, suite, text, figures)


def _why(row: ModelRow) -> str:
    if not row.batches:
        return "none of its rungs has a time"
    return f"no rung of {row.network.baseline} that is not ours has a time"


def lesser(found: BatchRow) -> str:
    """Return what the plain network has no time on, where its fastest rung may be among it."""
    return f"; it has no time on {' and '.join(found.lacking)}" if found.lacking else ""


def _clear(gain: Ratio) -> str:
    if gain.interval is None:
        return ", in too few rounds to be sure,"
    if gain.above(1):
        return ""
    return ", which is slower," if gain.below(1) else ", which is no clear difference,"


def _op(results: Results, suite: str) -> Claim:
    rows = op_rows(results, suite)
    own = [row for row in rows if row.speedup and not row.measurement.facts.get("baseline")]
    lesser_baselines = lesser_op_baselines(rows)
    subject = f"{suite} (op)"
    if not own:
        ours = [row for row in rows if not row.measurement.facts.get("baseline")]
        lost = [] if any(row.measurement.timed for row in ours) else ["Ours has no time."]
        text = " ".join([f"{suite} has no speed-up.", *lost, *lesser_baselines])
        return Claim(subject, suite, text)
    ratios = [row.speedup for row in own if row.speedup]
    faster = sum(ratio.above(1) for ratio in ratios)
    low, high = min(ratios, key=lambda r: r.value), max(ratios, key=lambda r: r.value)
    text = (
        f"{suite}: ours is clearly faster than {baseline_text(results, suite)} in {faster} of "
        f"{len(ratios)} measurements, from {ratio_text(low)} to {ratio_text(high)}, on "
        f"{op_where(results, suite)}."
    )
    notes = dict.fromkeys(row.measurement.note for row in own if row.measurement.note)
    text += "".join(f" {note[0].upper()}{note[1:]}." for note in notes)
    text += "".join(f" {note}" for note in [*lesser_baselines, *few_rounds(ratios)])
    return Claim(subject, suite, text, ((f"{faster} of {len(ratios)}", "clearly faster"),))


def _study(results: Results, suite: str) -> list[Claim]:
    found = []
    about = accuracy.title(results, suite)
    score = "error" if suite == "speech" else "top-1 accuracy"
    for row in accuracy.rows(results, suite):
        if row.difference is None:
            continue
        difference = accuracy.mean_text(row.difference, signed=True)
        way = suite == "conversion"
        against = f"{accuracy.CONVERTED} over it" if way else "over the plain network"
        text = f"{row.family}: {score} {accuracy.mean_text(row.score)} %, "
        text += f"{against} {difference} points; {about}."
        found.append(Claim(row.family, suite, text))
    return found


def batch_rows(results: Results) -> list[tuple[str, ModelRow, int, BatchRow]]:
    """Return (suite, network, batch, its numbers) of all networks that have a speed-up."""
    return [
        (suite, row, batch, found)
        for suite in NETWORK_SUITES
        for row in model_rows(results, suite)
        for batch, found in row.batches.items()
        if found.speedup
    ]
