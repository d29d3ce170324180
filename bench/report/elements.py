"""Pieces of the page as HTML: tables that sort and filter, figures, and facts side by side."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FILTERED = 4  # rows; a shorter table is read faster than a filter is typed
LONG = 40  # characters; longer texts are broken into lines


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what is shown.
        value: the number behind it, which sorts the column; None where there is none.
    """

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        cells: as many as the table has columns.
        failed: whether it is of something that raised or was wrong.
    """

    cells: Sequence[Cell]
    failed: bool = False


def escape(value: Any) -> str:
    """Return a value's text, safe between tags and in quoted attributes."""
    return html.escape(str(value), quote=True)


def script_json(value: Any) -> str:
    """Return a value as JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def cells(texts: Sequence[str], values: Sequence[float | None]) -> list[Cell]:
    """Return cells from texts and the numbers behind them."""
    return [Cell(text, value) for text, value in zip(texts, values, strict=True)]


def table(name: str, caption: str, header: Sequence[str], rows: Sequence[Row]) -> str:
    """Return a table in a box of its own that scrolls, with a filter where it has many rows.

    Args:
        name: of the page's element, unique on the page: letters, digits, "-" and "_".
        caption: what the table shows.
        header: names of the columns.
        rows: in the order first shown.
    """
    columns = [[row.cells[i] for row in rows] for i in range(len(header))]
    kinds = [_kind(column) for column in columns]
    head = "".join(
        f'<th scope="col"{_class(kind)}><button type="button">{escape(title)}</button></th>'
        for title, kind in zip(header, kinds, strict=True)
    )
    body = "".join(_row(row, kinds) for row in rows)
    box = (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-caption">'
        f'<table id="{name}"><caption id="{name}-caption">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    return f'<div class="table">{_filter(name, len(rows))}{box}</div>'


def _filter(name: str, rows: int) -> str:
    if rows < FILTERED:
        return ""
    return (
        f'<p class="filter"><label for="{name}-filter">Filter rows</label> '
        f'<input id="{name}-filter" type="search" data-table="{name}" autocomplete="off" '
        f'spellcheck="false" placeholder="words to look for"> '
        f'<output for="{name}-filter">{rows} rows</output></p>'
    )


def _kind(column: Sequence[Cell]) -> str:
    """Return how a column is set: "number", "long" where its texts need lines, or nothing."""
    if any(cell.value is not None for cell in column):
        return "number"
    return "long" if any(len(cell.text) > LONG for cell in column) else ""


def _row(row: Row, kinds: Sequence[str]) -> str:
    parts = []
    for index, (cell, kind) in enumerate(zip(row.cells, kinds, strict=True)):
        tag = 'th scope="row"' if index == 0 else "td"
        finite = cell.value is not None and math.isfinite(cell.value)
        value = f' data-value="{float(cell.value or 0.0)!r}"' if finite else ""
        parts.append(f"<{tag}{_class(kind)}{value}>{escape(cell.text)}</{tag.split()[0]}>")
    return f"<tr{_class('failed' if row.failed else '')}>{''.join(parts)}</tr>"


def figure(name: str, caption: str, described: str, height: int) -> str:
    """Return the place of a plot.

    Args:
        name: of the plot among the page's figures, as a table's.
        caption: what it shows, for everyone.
        described: the same with its numbers, for who cannot see it.
        height: pixels.
    """
    return (
        f'<figure aria-labelledby="{name}-caption">'
        f'<div class="plot" id="{name}" role="img" aria-label="{escape(described)}" '
        f'style="height:{height}px"></div>'
        f'<figcaption id="{name}-caption">{escape(caption)}</figcaption></figure>'
    )


def side_by_side(caption: str, names: Sequence[str], facts: Sequence[dict[str, str]]) -> str:
    """Return facts of several runs, a column each; a fact that a run lacks is left empty."""
    keys = dict.fromkeys(key for fact in facts for key in fact)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td>{escape(fact.get(key, ''))}</td>" for fact in facts)
        + "</tr>"
        for key in keys
    )
    return (
        f'<div class="table"><div class="scroll" role="region" tabindex="0" '
        f'aria-label="{escape(caption)}"><table class="facts"><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">fact</th>{head}</tr></thead><tbody>{body}</tbody></table>'
        f"</div></div>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of plain text."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def items(texts: Sequence[str], kind: str = "") -> str:
    """Return a list of plain texts; nothing where there are none."""
    if not texts:
        return ""
    listed = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul{_class(kind)}>{listed}</ul>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
