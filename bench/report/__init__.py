"""The report of a run: terminal, Markdown, CSV, JSON, one HTML page, and plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blnet.bench import accuracy
from blnet.bench.report.markdown import markdown
from blnet.bench.report.page import html_page
from blnet.bench.report.plots import plot_networks, plot_op
from blnet.bench.report.spreadsheet import csv_text
from blnet.bench.report.terminal import print_tables
from blnet.bench.results import Results, write_json, write_text
from blnet.bench.summary import NETWORK_SUITES, op_suites

__all__ = ["Written", "csv_text", "html_page", "markdown", "print_tables", "write_all"]


@dataclass(frozen=True)
class Written:
    """What was written of a run.

    Attributes:
        files: names in the folder.
        notes: sentences on what was left out.
    """

    files: list[str]
    notes: list[str]


def write_all(results: Results, folder: Path) -> Written:
    """Write results.json, results.csv, report.md and report.html, each of them whole.

    Of every suite there is a plot as well, <suite>.png. The page needs plotly and the plots need
    matplotlib; where one is missing the rest is written, and a note says so.
    """
    write_json(folder / "results.json", results)
    write_text(folder / "results.csv", csv_text(results))
    write_text(folder / "report.md", markdown(results))
    written = Written(["results.json", "results.csv", "report.md"], [])
    try:
        write_text(folder / "report.html", html_page([results]))
        written.files.append("report.html")
    except ModuleNotFoundError as error:
        written.notes.append(_left_out("report.html", error))
    try:
        written.files.extend(_plots(results, folder))
    except ModuleNotFoundError as error:
        written.notes.append(_left_out("the plots (PNG)", error))
    return written


def _plots(results: Results, folder: Path) -> list[str]:
    draw = {
        **dict.fromkeys(NETWORK_SUITES, plot_networks),
        **dict.fromkeys(op_suites(results), plot_op),
        **dict.fromkeys(accuracy.studies_of(results), accuracy.plot),
    }
    drawn = [suite for suite, plot in draw.items() if plot(results, suite, folder / f"{suite}.png")]
    return [f"{suite}.png" for suite in drawn]


def _left_out(what: str, error: ModuleNotFoundError) -> str:
    return (
        f"{what} left out: {error.name} is not installed; "
        "install it with: pip install 'blnet[bench]'"
    )
