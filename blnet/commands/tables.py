"""What both tables of ``blnet table`` share: their flags, their CSV, and where they are printed."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from blnet.files import StrPath, written_aside


def add_flags(parser: argparse.ArgumentParser, formats: Iterable[str]) -> None:
    """Add the flags that say how a table is printed, and where."""
    parser.add_argument(
        "--format", choices=tuple(formats), default="text", help="how to print it (default: text)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write it to FILE instead of the standard output"
    )


def as_csv(rows: Sequence[Any]) -> str:
    """Return dataclasses of one class, one or more, as CSV with a line of column names."""
    out = io.StringIO()
    columns = [field.name for field in dataclasses.fields(rows[0])]
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return out.getvalue()


def put(text: str, output: StrPath | None) -> None:
    """Print a table, or write it whole to a file.

    Raises:
        OSError: if the file cannot be written.
    """
    if output is None:
        sys.stdout.write(text)
        return
    with written_aside(output) as aside:
        aside.write_text(text, encoding="utf-8")
