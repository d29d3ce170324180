"""The report of a run as Markdown."""

from __future__ import annotations

from typing import Any

from blnet.bench import accuracy, kept
from blnet.bench.report import layers
from blnet.bench.report.cells import (
    GAINS,
    HOW,
    NOTHING,
    SHARES,
    batches_of,
    failure_texts,
    gain_header,
    gain_rows,
    is_timed,
    measured_on,
    megabytes,
    milliseconds,
    model_cells,
    model_header,
    number_text,
    reading,
    share_cells,
    share_header,
    share_rungs,
)
from blnet.bench.report.ops import op_cells, op_header, op_notes, op_title, op_where
from blnet.bench.results import Results
from blnet.bench.summary import NETWORK_SUITES, model_rows, op_rows, op_suites, share_rows

LAYERS_SHOWN = 10  # of each network


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + " --- |" * len(header))
    return lines


def markdown(results: Results) -> str:
    """Return the report as Markdown."""
    lines = ["# Big-Little Net, measured", ""]
    if results.interrupted:
        lines += ["**This run was interrupted: what was measured until then follows.**", ""]
    date = results.environment["date"]
    pixels = any(k.unit == "images" and model_rows(results, s) for s, k in NETWORK_SUITES.items())
    where = measured_on(results, "images" if pixels else "")
    lines += [f"{where}; {date}; {results.seconds:.0f} s.", ""]
    for suite, kind in NETWORK_SUITES.items():
        rows = model_rows(results, suite)
        if not rows:
            continue
        batches = batches_of(rows)
        cells = [model_cells(batches, row) for row in rows]
        header = model_header(batches, kind.unit)
        title = suite.replace("_", " ").capitalize()
        lines += [f"## {title}: {kind.what}", "", *table(header, cells), ""]
        lines += [reading(rows), ""]
        gains = gain_rows(rows)
        if gains:
            title = GAINS[0].upper() + GAINS[1:]
            lines += [f"### {title}", "", *table(gain_header(batches), gains), ""]
        found = share_rows(results, suite, rows)
        rungs = share_rungs(found)
        shares = [share_cells(rungs, row) for row in found]
        if shares:
            title = SHARES[0].upper() + SHARES[1:]
            lines += [f"### {title}", "", *table(share_header(rungs), shares), ""]
        memory = kept.rows(results) if suite == "training" else []
        if memory:
            lines += [f"### {kept.TITLE}", "", *table(kept.header(), memory), "", kept.NOTE, ""]
        lines += ["### Every rung", "", *_ladder_table(results, suite), ""]
    lines += _layer_sections(results)
    for suite in op_suites(results):
        cells = [op_cells(results, row) for row in op_rows(results, suite)]
        lines += [f"## {op_title(results, suite)}", "", f"{op_where(results, suite)}.", ""]
        lines += [*table(op_header(results), cells), ""]
        lines += [*op_notes(results, suite), ""]
    for suite in accuracy.studies_of(results):
        study = [accuracy.cells(row, suite) for row in accuracy.rows(results, suite)]
        lines += [f"## {suite.capitalize()}: {accuracy.title(results, suite)}", ""]
        lines += [*table(accuracy.HEADER[suite], study), "", accuracy.notes(results, suite), ""]
        if study:
            lines += [f"![{suite}]({suite}.png)", ""]
    lines += [f"- **Failed**: {text}" for text in failure_texts(results)]
    if is_timed(results):
        lines += ["", "## How times are taken", "", HOW]
    lines += ["", "## Environment", ""]
    lines += [*_facts(results.environment), "", "## Settings", "", *_facts(results.settings)]
    lines += ["", "## Command", "", "```", results.command, "```", ""]
    lines += [*(f"Note: {note}." for note in results.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _layer_sections(results: Results) -> list[str]:
    lines = [f"## {layers.TITLE}", ""] if results.layers else []
    for key, label, found in layers.networks(results):
        rows = layers.rows(found, LAYERS_SHOWN)
        lines += [f"### {label}: {key}", "", layers.reading(results, key, label), ""]
        lines += [*table(layers.HEADER, rows), ""]
    return [*lines, *layers.notes(results), ""] if lines else []


def _ladder_table(results: Results, suite: str) -> list[str]:
    header = ["network", "batch", "rung", "p20 (ms)", "p50 (ms)", "p90 (ms)", "rounds"]
    header += ["error", "build (s)", "memory (MB)", "note"]
    rows = []
    for m in results.of(suite):
        times = [milliseconds(m.quantile(p)) if m.timed else NOTHING for p in (20, 50, 90)]
        note = m.note if m.status == "ok" else f"{m.status}: {m.note}".removesuffix(": ")
        rows.append(
            [
                m.family,
                str(m.facts.get("batch", NOTHING)),
                m.implementation,
                *times,
                str(len(m.samples)),
                f"{m.check.error:.0e}" if m.check else NOTHING,
                number_text(m.build_seconds, 1),
                megabytes(m.peak_memory),
                note,
            ]
        )
    return table(header, rows)


def _facts(values: dict[str, Any]) -> list[str]:
    shown = []
    for key, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        shown.append(f"- {key}: {NOTHING if value in (None, '') else value}")
    return shown
