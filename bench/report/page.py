"""The report of one or several runs as one HTML file that needs nothing else.

plotly.js and the runs' results lie in the file compressed (gzip, base64); page.js unpacks them. A
policy in the file's head forbids the browser every request.
"""

from __future__ import annotations

import base64
import functools
import gzip
import importlib.resources
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from blnet.bench.report import elements as html
from blnet.bench.report import sections
from blnet.bench.report.cells import HOW, NOTHING, failure_texts, is_timed
from blnet.bench.report.elements import Cell, Row
from blnet.bench.report.sections import Page, Run
from blnet.bench.report.spreadsheet import csv_text
from blnet.bench.results import Results

TITLE = "Big-Little Net, measured"
LIMIT = 6_000_000  # bytes of the file; samples beyond that stay in results.json
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def html_page(runs: Sequence[Results]) -> str:
    """Return the report of runs as HTML.

    Args:
        runs: one at least, no two the same.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    text = _page(runs, samples=True)
    return text if len(text.encode()) < LIMIT else _page(runs, samples=False)


def run_names(runs: Sequence[Results]) -> list[str]:
    """Return a name for each run: its device and date, and a number where two have the same."""
    names = []
    for run in runs:
        date = str(run.environment["date"]).replace("T", " ")[:16]
        names.append(f"{run.environment['device']}, {date}")
    counts, seen = Counter(names), Counter[str]()
    for index, name in enumerate(names):
        seen[name] += 1
        if counts[name] > 1:
            names[index] = f"{name} ({seen[name]})"
    return names


def _page(found: Sequence[Results], samples: bool) -> str:
    names = run_names(found)
    runs = [Run(run, name, f"r{i}") for i, (run, name) in enumerate(zip(found, names, strict=True))]
    made = Page(runs)
    parts = [
        ("summary", "Summary", sections.summary(made)),
        ("models", "Models", sections.networks(made, speech=False)),
        ("kernels", "Kernels", sections.kernels(made)),
        ("layers", "Layers", sections.layers(made)),
        ("accuracy", "Accuracy", sections.studies(made, speech=False)),
        ("speech", "Speech", sections.networks(made, True) + sections.studies(made, True)),
        ("environment", "Environment", _environment(made)),
        ("raw", "Raw data", _raw(made, samples)),
    ]
    shown = [part for part in parts if part[2]]
    plots = {name: {"data": p.data, "layout": p.layout} for name, p in made.plots.items()}
    values = {
        "title": html.escape(TITLE),
        "runs": html.escape("; ".join(names)),
        "style": _own("page.css"),
        "alerts": _alerts(runs),
        "links": "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in shown),
        "sections": "".join(_section(*part) for part in shown),
        "figures": html.script_json(plots),
        "files": html.script_json([_files(run) for run in runs]),
        "packed": "".join(_packed(run, samples) for run in runs),
        "plotly": _plotly(),
        "script": _own("page.js"),
    }
    return _PLACE.sub(lambda place: values[place[1]], _own("page.html"))


def _own(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _section(key: str, title: str, body: str) -> str:
    return (
        f'<section id="{key}" aria-labelledby="{key}-h">'
        f'<h2 id="{key}-h">{title}</h2>{body}</section>'
    )


def _pack(text: str) -> str:
    # No time in the header: the same results make the same file.
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return _pack(get_plotlyjs())


def _packed(run: Run, samples: bool) -> str:
    # As in results.json: what is not a number is null there.
    values = json.loads(json.dumps(run.results.as_dict()), parse_constant=lambda _: None)
    for measurement in () if samples else values["measurements"]:
        measurement["samples"] = []
    texts = {"json": json.dumps(values, indent=1) + "\n", "csv": csv_text(run.results)}
    return "".join(
        f'<script type="text/plain" id="{run.key}-{kind}">{_pack(text)}</script>\n'
        for kind, text in texts.items()
    )


def _files(run: Run) -> dict[str, str]:
    stem = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")
    return {"key": run.key, "stem": stem}


def _alerts(runs: Sequence[Run]) -> str:
    """Return what a reader must know before all else."""
    found = []
    for run in runs:
        of = f" ({run.name})" if len(runs) > 1 else ""
        if run.results.interrupted:
            text = "This run was interrupted: what was measured until then follows"
            found.append(html.paragraph(f"{text}{of}.", "alert"))
        failures = len(run.results.failures)
        if failures:
            many = f"{failures} measurements" if failures > 1 else "1 measurement"
            reasons = len(failure_texts(run.results))
            why = "" if reasons == failures else f", for {reasons} reason{'s' * (reasons > 1)},"
            text = f"{many} failed{of}{why} and got no time; the section Environment says why."
            found.append(html.paragraph(text, "alert"))
    return "".join(found)


def _facts(values: dict[str, Any]) -> dict[str, str]:
    shown: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            shown |= {f"{key}: {name}": str(item) for name, item in value.items()}
        elif isinstance(value, list | tuple):
            shown[key] = ", ".join(map(str, value)) or NOTHING
        else:
            shown[key] = NOTHING if value in (None, "") else str(value)
    return shown


def _environment(made: Page) -> str:
    names = [run.name for run in made.runs]
    found = [run.results for run in made.runs]
    where = [_facts(run.environment) for run in found]
    how = [
        {"command": run.command, "seconds": f"{run.seconds:.0f}", **_facts(run.settings),
         **{f"ceiling: {name}": f"{rate:.4g}" for name, rate in run.ceilings.items()}}
        for run in found
    ]  # fmt: skip
    parts = [
        "<h3>Machine and software</h3>",
        html.side_by_side("Device, driver and versions", names, where),
        "<h3>Command and settings</h3>",
        html.side_by_side("Command, settings and measured rates", names, how),
    ]
    for run in made.runs:
        lost = failure_texts(run.results)
        if lost:
            parts += [made.heading("Failures", run), html.items(lost, "failures")]
        if run.results.notes:
            notes = [f"{note}." for note in run.results.notes]
            parts += [made.heading("Notes", run), html.items(notes, "notes")]
    if any(map(is_timed, found)):
        parts += ["<h3>How times are taken</h3>", html.paragraph(HOW, "notes")]
    return "".join(parts)


def _raw(made: Page, samples: bool) -> str:
    header = [*made.run_header, "family", "suite", "group", "implementation", "status"]
    header += ["p20, ms", "p50, ms", "p90, ms", "rounds", "error", "build, s", "memory, MB", "note"]
    rows = [
        Row(
            [*made.run_cells(run), *map(Cell, (m.family, m.suite, m.group, m.implementation)),
             *sections.measured(m)],
            m.failed,
        )
        for run in made.runs
        for m in run.results.measurements
    ]  # fmt: skip
    if not rows:
        return html.paragraph("Nothing was measured.")
    buttons = "".join(
        f'<li>{html.escape(run.name)} <button type="button" data-run="{run.key}" data-kind="{kind}"'
        f' aria-label="Download {file} of {html.escape(run.name)}">{file}</button></li>'
        for run in made.runs
        for kind, file in (("json", "results.json"), ("csv", "results.csv"))
    )
    left_out = "" if samples else " The single times are left out for their size: see results.json."
    text = f"Every measurement of the report; the files hold every single time as well.{left_out}"
    return (
        html.paragraph(text)
        + f'<ul class="downloads">{buttons}</ul>'
        + html.table("raw-table", "Every measurement", header, rows)
    )
