"""The tables of a run: in the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blnet.bench import accuracy, kept
from blnet.bench.intervals import Ratio
from blnet.bench.results import Results, write_json, write_text
from blnet.bench.summary import (
    NETWORK_SUITES,
    BatchRow,
    ModelRow,
    OpRow,
    model_rows,
    op_rows,
    op_suites,
)

NOTHING = "-"
SHOWN_DROPPED = 6  # of the implementations left out; the report has all
CSV_COLUMNS = (
    "suite",
    "group",
    "family",
    "implementation",
    "status",
    "batch",
    "network",
    "alpha",
    "beta",
    "pass",
    "rounds",
    "p20_ms",
    "p50_ms",
    "p90_ms",
    "images_per_s",
    "speedup",
    "speedup_low",
    "speedup_high",
    "realised",
    "bytes",
    "error",
    "peak_memory_bytes",
    "build_s",
    "accuracy",
    "seed",
    "epochs",
    "parameters",
    "macs",
    "note",
)

GAINS = "what the speed-up is made of [95 %]"
HOW = """\
Every implementation is built, run once and compared with its reference in higher precision; what
does not match gets no time. After warming up until their times settle (at most ten calls), the
implementations of a group (all networks and rungs at one batch) take turns, round by round, and
every single time is kept in results.json. On a CPU the clock is `time.perf_counter`, right after an
untimed call of the same; on a GPU CUDA events around the call, after a 256 MiB buffer has been
overwritten, so that the L2 cache is cold.
Times are medians; p20 and p90 stand beside them. Speed-up is the median of the plain network's
fastest rung that is not this project's work divided by that of the network's own fastest rung, at
the same batch and precision; its 95 % interval is a bootstrap over rounds (4,000 resamples).
Realised speed-up divides that by the ratio of MACs: 1 means that all the arithmetic saved became
time saved. Peak memory is weights
+ input + the most that was allocated at once during one call of the fastest rung (on a CPU as
PyTorch's profiler sees its allocator; scratch space inside oneDNN or cuDNN is not in it).
A rung more than four times slower than the fastest of its network, or one that takes too long to
build, is dropped with a note. Input: real pictures, cropped and normalised; weights: random, BN
statistics of the pictures themselves."""


def write_all(results: Results, folder: Path) -> None:
    """Write results.json, results.csv and report.md into a folder, each of them whole.

    Of a study there is a plot as well, <study>.png.
    """
    write_json(folder / "results.json", results)
    write_text(folder / "results.csv", csv_text(results))
    write_text(folder / "report.md", markdown(results))
    for suite in accuracy.studies_of(results):
        accuracy.plot(results, suite, folder / f"{suite}.png")


# ---------------------------------------------------------------------------- numbers as text


def ratio_text(ratio: Ratio | None, interval: bool = True) -> str:
    """Return "1.36x [1.33, 1.40]", or "-"."""
    if ratio is None:
        return NOTHING
    text = f"{ratio.value:.2f}x"
    return f"{text} [{ratio.low:.2f}, {ratio.high:.2f}]" if interval else text


def milliseconds(seconds: float | None) -> str:
    """Return seconds as milliseconds with four digits or so, or "-"."""
    if seconds is None:
        return NOTHING
    value = seconds * 1e3
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _number(value: Any, digits: int = 2) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _megabytes(value: int | None) -> str:
    return NOTHING if value is None else f"{value / 1e6:.0f}"


# ---------------------------------------------------------------------------- models


def model_header(results: Results, unit: str = "images") -> list[str]:
    """Return the columns of a table of networks; the batches are those of the run."""
    top = _top_batch(results)
    batches = _batches(results)
    gains = [(f"speed-up b{batch} [95 %]", f"realised b{batch}") for batch in batches]
    return [
        "network",
        "alpha",
        "beta",
        "params, M",
        "GMACs",
        "MAC ratio",
        "latency b1, ms",
        f"{unit}/s b{top}",
        *(name for pair in gains for name in pair),
        f"memory b{top}, MB",
        "best rung " + ", ".join(f"b{batch}" for batch in batches),
    ]


def model_cells(results: Results, row: ModelRow) -> list[str]:
    """Return the cells of a network's row."""
    network = row.network
    one, top = row.batches.get(1), row.batches.get(_top_batch(results))
    measured = [row.batches.get(batch) for batch in _batches(results)]
    rungs = [batch.rung if batch else NOTHING for batch in measured]
    return [
        network.name,
        _number(network.alpha, 0),
        _number(network.beta, 0),
        f"{network.parameters / 1e6:.2f}",
        f"{network.macs / 1e9:.3f}",
        _number(row.mac_ratio),
        milliseconds(one.seconds if one else None),
        f"{top.throughput:.1f}" if top else NOTHING,
        *(cell for batch in measured for cell in (_speedup(batch), _realised(batch))),
        _megabytes(top.peak_memory if top else None),
        "; ".join(dict.fromkeys(rungs)),
    ]


def _speedup(row: BatchRow | None) -> str:
    return ratio_text(row.speedup if row else None)


def _realised(row: BatchRow | None) -> str:
    return ratio_text(row.realised if row else None, interval=False).removesuffix("x")


def _top_batch(results: Results) -> int:
    return int(results.settings["batch"])


def _batches(results: Results) -> list[int]:
    """Return the batches that the table shows: 1 for latency, and the throughput batch."""
    return sorted({1, _top_batch(results)})


def print_tables(results: Results, console: Console) -> None:
    """Print the table of each suite that ran, and a red line for each failure."""
    for suite, kind in NETWORK_SUITES.items():
        rows = model_rows(results, suite)
        if not rows:
            continue
        cells = [model_cells(results, row) for row in rows]
        header = model_header(results, kind.unit)
        title = f"{kind.what}: {_title(results, kind.unit)}"
        table = _rich_table(title, header, left=(0, len(header) - 1), gap=0)
        for texts in cells:
            # An interval goes below its value: fourteen columns must fit a terminal.
            table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in texts))
        console.print(table)
        console.print(_reading(rows), soft_wrap=True, markup=False, highlight=False)
        gains = gain_rows(results, rows)
        if gains:
            made = _rich_table(GAINS, gain_header(results), left=(0,), gap=0)
            for texts in gains:
                made.add_row(*(Text(cell.replace(" [", "\n[")) for cell in texts))
            console.print(made)
    for suite in op_suites(results):
        table = _rich_table(_op_title(results, suite), op_header(results), left=(0, 1, 2))
        for op_row in op_rows(results, suite):
            style = "red" if op_row.measurement.failed else ""
            table.add_row(*map(Text, op_cells(results, op_row)), style=style)
        console.print(table)
    for suite in accuracy.studies_of(results):
        table = _rich_table(accuracy.title(results, suite), accuracy.HEADER[suite], left=(0,))
        for row in accuracy.rows(results, suite):
            table.add_row(*map(Text, accuracy.cells(row, suite)))
        console.print(table)
        console.print(accuracy.notes(suite), soft_wrap=True, markup=False, highlight=False)
    dropped = [m for m in results.measurements if m.status in ("dropped", "skipped")]
    for m in dropped[:SHOWN_DROPPED]:
        text = f"left out: {m.suite}, {m.group}, {m.family}, {m.implementation}: {m.note}"
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    if len(dropped) > SHOWN_DROPPED:
        console.print(f"and {len(dropped) - SHOWN_DROPPED} more; report.md lists all")
    for failure in results.failures:
        line = f"FAILED {failure.suite}, {failure.group}, {failure.family}, "
        line += f"{failure.implementation}: {failure.note}"
        console.print(Text(line, style="bold red"), soft_wrap=True)


def _rich_table(title: str, header: list[str], left: tuple[int, ...], gap: int = 1) -> Table:
    """Return an empty table; `gap` is the space between columns beside that of the box."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0))
    for number, name in enumerate(header):
        # Words of a header stand below each other, so that the numbers set the width.
        text = name if number in left else name.replace(" ", "\n").replace("[95\n%]", "[95 %]")
        table.add_column(
            Text(text),
            justify="left" if number in left else "right",
            vertical="top",
            overflow="fold",
            no_wrap=number not in left,
        )
    return table


def _title(results: Results, unit: str = "images") -> str:
    settings, where = results.settings, results.environment
    on = where["device"] if settings["device"] == "cuda" else f"{where['cpu']}, "
    if settings["device"] != "cuda":
        on += f"{where['threads']} threads"
    if not _is_timed(results):
        return on
    pixels = f", {settings['size']}x{settings['size']} pixels" if unit == "images" else ""
    return f"{on}, {settings['dtype']}{pixels}"


def _is_timed(results: Results) -> bool:
    """Return whether anything was timed; a study trains, at a size and precision of its own."""
    return any(m.suite not in accuracy.STUDIES for m in results.measurements)


def _reading(rows: list[ModelRow]) -> str:
    """Return a sentence on what the speed-ups are against."""
    sentences = []
    for label in dict.fromkeys(row.network.baseline for row in rows):
        plain = next((row for row in rows if row.network.label == label), None)
        if plain is None:
            continue
        found = sorted(plain.batches.items())
        rungs = [f"{b.baseline_rung} at batch {batch}" for batch, b in found if b.baseline_rung]
        text = " and ".join(rungs) or "none, so there is no speed-up"
        others = " that is not ours" if any(b.engine for _, b in found) else ""
        sentences.append(f"Speed-ups are over the fastest rung of {label}{others}: {text}.")
    return " ".join(sentences)


def gain_header(results: Results) -> list[str]:
    """Return the columns of the table of what a speed-up is made of."""
    names = ("architecture", "our engine", "both")
    return ["network", *(f"{name} b{batch}" for batch in _batches(results) for name in names)]


def gain_rows(results: Results, rows: list[ModelRow]) -> list[list[str]]:
    """Return the cells of that table; none where no rung of ours has a time.

    What the architecture brings is between the fastest rungs that are not ours, of the plain
    network and of this one; what our engine or kernels bring is between this network's fastest
    rung that is not ours and its fastest that is; both are the speed-up of the first table, or
    less where ours is not the fastest.
    """
    batches = _batches(results)
    if not any(found.engine for row in rows for found in row.batches.values()):
        return []
    cells = []
    for row in rows:
        found = [row.batches.get(batch) for batch in batches]
        gains = [(b.architecture, b.engine, b.speedup) if b else (None,) * 3 for b in found]
        texts = [ratio_text(gain) for batch in gains for gain in batch]
        cells.append([row.network.label, *texts])
    return cells


# ---------------------------------------------------------------------------- ops


def _op_title(results: Results, suite: str) -> str:
    computes = next((m.facts.get("computes") for m in results.of(suite)), None)
    return f"{suite}: {computes}" if computes else suite


def op_header(results: Results) -> list[str]:
    """Return the columns of an op's table; a share only where the device's rates were measured."""
    share = ["of bound"] if "copy_bandwidth" in results.ceilings else []
    over = "speed-up over PyTorch's fastest [95 %]"
    return ["site", "pass", "implementation", "p50, ms", "GB/s", "TFLOP/s", *share, over, "error"]


def op_cells(results: Results, row: OpRow) -> list[str]:
    """Return the cells of a row of an op's table."""
    m = row.measurement
    against = "is the fastest" if row.fastest_baseline else ratio_text(row.speedup)
    share = [NOTHING if row.share is None else f"{row.share:.0%}"]
    return [
        m.family,
        m.facts["pass"],
        m.implementation,
        milliseconds(m.median) if m.timed else m.status,
        _number(row.bandwidth / 1e9 if row.bandwidth else None, 1),
        _number(row.rate / 1e12 if row.rate else None, 2),
        *(share if "copy_bandwidth" in results.ceilings else []),
        against,
        f"{m.check.error:.0e}" if m.check else NOTHING,
    ]


# ---------------------------------------------------------------------------- files


def csv_text(results: Results) -> str:
    """Return one line for each measurement.

    A network's speed-up and realised speed-up stand in the line of its fastest rung of each batch.
    """
    gains: dict[tuple[str, str, Any, str], BatchRow] = {
        (suite, row.network.label, batch, found.rung): found
        for suite in NETWORK_SUITES
        for row in model_rows(results, suite)
        for batch, found in row.batches.items()
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for m in results.measurements:
        quantiles = [m.quantile(p) * 1e3 if m.timed else "" for p in (20, 50, 90)]
        batch = m.facts.get("batch")
        facts = [m.facts.get(key) for key in ("batch", "network", "alpha", "beta", "pass")]
        writer.writerow(
            [
                *(m.suite, m.group, m.family, m.implementation, m.status),
                *facts,
                len(m.samples),
                *quantiles,
                batch / m.median if m.timed and batch else "",
                *_csv_gain(gains.get((m.suite, m.family, batch, m.implementation))),
                m.facts.get("bytes"),
                m.check.error if m.check else "",
                m.peak_memory,
                m.build_seconds,
                *(m.facts.get(k) for k in ("accuracy", "seed", "epochs", "parameters", "macs")),
                m.note,
            ]
        )
    return text.getvalue()


def _csv_gain(row: BatchRow | None) -> list[float | None]:
    if row is None or row.speedup is None:
        return [None] * 4
    realised = row.realised.value if row.realised else None
    return [row.speedup.value, row.speedup.low, row.speedup.high, realised]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + " --- |" * len(header))
    return lines


def markdown(results: Results) -> str:
    """Return the report as Markdown."""
    lines = ["# Big-Little Net, measured", ""]
    if results.interrupted:
        lines += ["**This run was interrupted: what was measured until then follows.**", ""]
    lines += [f"{_title(results)}; {results.environment['date']}; {results.seconds:.0f} s.", ""]
    for suite, kind in NETWORK_SUITES.items():
        rows = model_rows(results, suite)
        if not rows:
            continue
        cells = [model_cells(results, row) for row in rows]
        header = model_header(results, kind.unit)
        title = suite.replace("_", " ").capitalize()
        lines += [f"## {title}: {kind.what}", "", *_table(header, cells), ""]
        lines += [_reading(rows), ""]
        gains = gain_rows(results, rows)
        if gains:
            title = GAINS[0].upper() + GAINS[1:]
            lines += [f"### {title}", "", *_table(gain_header(results), gains), ""]
        memory = kept.rows(results) if suite == "training" else []
        if memory:
            lines += [f"### {kept.TITLE}", "", *_table(kept.header(), memory), "", kept.NOTE, ""]
        lines += ["### Every rung", "", *_ladder_table(results, suite), ""]
    for suite in op_suites(results):
        cells = [op_cells(results, row) for row in op_rows(results, suite)]
        lines += [f"## {_op_title(results, suite)}", "", *_table(op_header(results), cells), ""]
        lines += [*_op_notes(results, suite), ""]
    for suite in accuracy.studies_of(results):
        study = [accuracy.cells(row, suite) for row in accuracy.rows(results, suite)]
        lines += [f"## {suite.capitalize()}: {accuracy.title(results, suite)}", ""]
        lines += [*_table(accuracy.HEADER[suite], study), "", accuracy.notes(suite), ""]
        if study:
            lines += [f"![{suite}]({suite}.png)", ""]
    lines += [
        f"- **Failed**: {f.group}, {f.family}, {f.implementation}: {f.note}"
        for f in results.failures
    ]
    if _is_timed(results):
        lines += ["", "## How times are taken", "", HOW]
    lines += ["", "## Environment", ""]
    lines += [*_facts(results.environment), "", "## Settings", "", *_facts(results.settings)]
    lines += ["", "## Command", "", "```", results.command, "```", ""]
    lines += [*(f"Note: {note}." for note in results.notes)]
    return "\n".join(lines).rstrip() + "\n"


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
                str(m.facts["batch"]),
                m.implementation,
                *times,
                str(len(m.samples)),
                f"{m.check.error:.0e}" if m.check else NOTHING,
                _number(m.build_seconds, 1),
                _megabytes(m.peak_memory),
                note,
            ]
        )
    return _table(header, rows)


def _op_notes(results: Results, suite: str) -> list[str]:
    notes = dict.fromkeys(
        f"- {m.implementation}: {m.note}." for m in results.of(suite) if m.note and m.status == "ok"
    )
    lines = [*notes, "- GB/s and TFLOP/s count what any implementation must move and multiply."]
    copy, product = (results.ceilings.get(name) for name in ("copy_bandwidth", "matmul_rate"))
    if copy:
        lines.append(f"- Copy bandwidth measured in this run: {copy / 1e9:.0f} GB/s.")
    if product:
        lines.append(f"- Rate of a matrix product in this run: {product / 1e12:.0f} TFLOP/s.")
    return lines


def _facts(values: dict[str, Any]) -> list[str]:
    shown = []
    for key, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        shown.append(f"- {key}: {NOTHING if value in (None, '') else value}")
    return shown
