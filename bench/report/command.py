"""`blnet bench report`: writes the report of runs that were measured before, several in one."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from blnet.bench.report.markdown import markdown
from blnet.bench.report.page import html_page, run_names
from blnet.bench.results import Results, read_json, write_text
from blnet.bench.settings import RESULTS, check_writable

_IMAGE = re.compile(r"^!\[(\w+)\]\((\w+\.png)\)$", re.MULTILINE)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `blnet bench report`."""
    parser.add_argument("runs", nargs="+", metavar="DIR", help=f"folder of a run, or its {RESULTS}")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for report.html and report.md (default: the run's own folder, "
        "of several runs results/report-<date-time>)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write report.html and report.md of one or several runs; returns 0.

    Raises:
        ValueError: if a run cannot be read, is given twice, or the output cannot be written.
        ModuleNotFoundError: if plotly is not installed.
    """
    paths = [_file(name) for name in arguments.runs]
    found = [read_json(path) for path in paths]
    _check_different(paths, found)
    folder = Path(arguments.output or _default_folder(paths))
    check_writable(folder, goes_on=True)
    html = html_page(found)
    text = _linked(paths[0], found[0], folder)
    if len(found) > 1:
        text = _together(paths, found, folder)
    write_text(folder / "report.html", html)
    write_text(folder / "report.md", text)
    print(f"written: {folder}/report.html, report.md")
    return 0


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        path = path / RESULTS
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder that 'blnet bench' wrote")
    return path


def _check_different(paths: Sequence[Path], found: Sequence[Results]) -> None:
    seen: dict[tuple[str, str, str], Path] = {}
    for path, results in zip(paths, found, strict=True):
        where = results.environment
        first = seen.setdefault((where["date"], where["device"], results.command), path)
        if first is not path:
            raise ValueError(f"{path} is the same run as {first}; give each run once")


def _default_folder(paths: Sequence[Path]) -> Path:
    if len(paths) == 1:
        return paths[0].parent
    return Path("results") / f"report-{datetime.now():%Y%m%d-%H%M%S}"


def _together(paths: Sequence[Path], found: Sequence[Results], folder: Path) -> str:
    """Return the reports one after the other."""
    return "\n".join(
        f"# {name}\n\n{_linked(path, results, folder)}"
        for path, results, name in zip(paths, found, run_names(found), strict=True)
    )


def _linked(path: Path, results: Results, folder: Path) -> str:
    """Return the report of a run, its plots linked where they lie."""
    home = os.path.relpath(path.parent.resolve(), folder.resolve()).replace(os.sep, "/")
    text = markdown(results)
    return text if home == "." else _IMAGE.sub(rf"![\1](<{home}/\2>)", text)
