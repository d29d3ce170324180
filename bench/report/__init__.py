"""The report of a run: in the terminal, as Markdown, as CSV, as JSON, and the studies' plots."""

from __future__ import annotations

from pathlib import Path

from blnet.bench import accuracy
from blnet.bench.report.markdown import markdown
from blnet.bench.report.spreadsheet import csv_text
from blnet.bench.report.terminal import print_tables
from blnet.bench.results import Results, write_json, write_text

__all__ = ["csv_text", "markdown", "print_tables", "write_all"]


def write_all(results: Results, folder: Path) -> None:
    """Write results.json, results.csv and report.md into a folder, each of them whole.

    Of a study there is a plot as well, <study>.png.
    """
    write_json(folder / "results.json", results)
    write_text(folder / "results.csv", csv_text(results))
    write_text(folder / "report.md", markdown(results))
    for suite in accuracy.studies_of(results):
        accuracy.plot(results, suite, folder / f"{suite}.png")
