"""The tables of a run in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blnet.bench import accuracy
from blnet.bench.report import layers
from blnet.bench.report.cells import (
    GAINS,
    SHARES,
    batches_of,
    device_of,
    failure_texts,
    gain_header,
    gain_rows,
    measured_on,
    model_cells,
    model_header,
    reading,
    share_cells,
    share_header,
    share_rungs,
)
from blnet.bench.report.ops import op_caveats, op_cells, op_header, op_legend, op_title, op_where
from blnet.bench.results import Results
from blnet.bench.summary import NETWORK_SUITES, model_rows, op_rows, op_suites, share_rows

LAYERS_SHOWN = 5  # of each network; the report has more
SHOWN_DROPPED = 6  # of the implementations left out; the report has all


def print_tables(results: Results, console: Console) -> None:
    """Print the table of each suite that ran, and a red line for each failure."""
    for suite, kind in NETWORK_SUITES.items():
        rows = model_rows(results, suite)
        if not rows:
            continue
        batches = batches_of(rows)
        cells = [model_cells(batches, row) for row in rows]
        header = model_header(batches, kind.unit)
        title = f"{kind.what}: {measured_on(results, kind.unit)}"
        table = rich_table(title, header, left=(0, len(header) - 1), gap=0)
        for texts in cells:
            # An interval goes below its value: fourteen columns must fit a terminal.
            table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in texts))
        console.print(table)
        console.print(reading(rows), soft_wrap=True, markup=False, highlight=False)
        found = share_rows(results, suite, rows)
        rungs = share_rungs(found)
        shares = [share_cells(rungs, row) for row in found]
        _print_ratios(GAINS, gain_header(batches), gain_rows(rows), console)
        _print_ratios(SHARES, share_header(rungs), shares, console)
    _print_layers(results, console)
    for suite in op_suites(results):
        title = f"{op_title(results, suite)}; {op_where(results, suite)}"
        table = rich_table(title, op_header(results), left=(0, 1, 3))
        op = op_rows(results, suite)
        for op_row in op:
            style = "red" if op_row.measurement.failed else ""
            table.add_row(*map(Text, op_cells(results, op_row)), style=style)
        console.print(table)
        for text in (" ".join(op_legend(results, suite)), *op_caveats(op)):
            console.print(text, soft_wrap=True, markup=False, highlight=False)
    for suite in accuracy.studies_of(results):
        title = f"{accuracy.title(results, suite)}; {device_of(results)}"
        table = rich_table(title, accuracy.HEADER[suite], left=(0,), gap=0)
        for row in accuracy.rows(results, suite):
            table.add_row(*map(Text, accuracy.cells(row, suite)))
        console.print(table)
        said = accuracy.notes(results, suite)
        console.print(said, soft_wrap=True, markup=False, highlight=False)
    dropped = [m for m in results.measurements if m.status in ("dropped", "skipped")]
    for m in dropped[:SHOWN_DROPPED]:
        text = f"left out: {m.suite}, {m.group}, {m.family}, {m.implementation}: {m.note}"
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    if len(dropped) > SHOWN_DROPPED:
        console.print(f"and {len(dropped) - SHOWN_DROPPED} more; report.md lists all")
    for text in failure_texts(results):
        console.print(Text(f"FAILED {text}", style="bold red"), soft_wrap=True)


def _print_ratios(title: str, header: list[str], rows: list[list[str]], console: Console) -> None:
    if not rows:
        return
    table = rich_table(title, header, left=(0,), gap=0)
    for texts in rows:
        table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in texts))
    console.print(table)


def _print_layers(results: Results, console: Console) -> None:
    for key, label, found in layers.networks(results):
        title = f"{layers.TITLE.lower()}: {label}, {key}"
        table = rich_table(title, layers.HEADER, left=(0, 1, 2), gap=0)
        for texts in layers.rows(found, LAYERS_SHOWN):
            table.add_row(*map(Text, texts))
        console.print(table)
        said = layers.reading(results, key, label)
        console.print(said, soft_wrap=True, markup=False, highlight=False)


def rich_table(title: str, header: list[str], left: tuple[int, ...], gap: int = 1) -> Table:
    """Return an empty table; `gap` is the space between columns beside that of the box."""
    table = Table(
        title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0)
    )
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
