"""Two runs compared, as tables: in the terminal and as Markdown."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.text import Text

from blnet.bench.compare import Comparison, Row, Shift
from blnet.bench.intervals import Ratio
from blnet.bench.missing import Missing
from blnet.bench.report.cells import NOTHING, interval_text, milliseconds
from blnet.bench.report.markdown import table
from blnet.bench.report.terminal import rich_table
from blnet.bench.results import FAILED
from blnet.wording import counted

FEW = 24  # rows that a table shows without --all, whether they changed or not
HEADER = ["suite, group", "implementation", "old, ms", "new, ms", "ratio [95 %]"]
HEADER += ["against controls [95 %]", "p", "verdict"]
SHIFT_HEADER = ["suite, group", "controls", "moved by [95 %]"]
# Why something has a time in the old run alone.
SLOWER = "lost their time because they are far slower now"
FAILS = "lost their time because they fail now"
SKIPPED = "lost their time because they are skipped now"
DROPPED = "dropped by the new run, which fails no gate"
LEFT_OUT = "left out by the new run on purpose"
GONE = "gone without a word from the new run (if that is meant, measure the old one again)"
ONLY_OLD = "in the old run alone"
REASONS = (SLOWER, FAILS, SKIPPED, DROPPED, LEFT_OUT, GONE, ONLY_OLD)
TITLE = "New time over old"
SHIFT_TITLE = "How much the controls moved: ways to run the same that are not ours"
STYLES = {"slower": "bold red", "faster": "green", "unclear": "yellow", "too few": "yellow"}


def print_comparison(comparison: Comparison, console: Console, everything: bool = False) -> None:
    """Print a comparison.

    Args:
        comparison: what to print.
        console: where to.
        everything: show the rows without a change too, however many there are.
    """
    rows = shown(comparison, everything)
    for note in comparison.notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    if rows:
        made = rich_table(f"{TITLE}: {comparison.where}", HEADER, left=(0, 1, 7))
        for row in rows:
            made.add_row(*map(Text, _cells(row)), style=STYLES.get(row.verdict, ""))
        console.print(made)
    if len(rows) < len(comparison.rows):
        rest = counted(len(comparison.rows) - len(rows), "row")
        text = f"and {rest} more without a change (--all)"
        console.print(text, markup=False, highlight=False)
    shifts = _shown_shifts(comparison, rows)
    if shifts:
        made = rich_table(SHIFT_TITLE, SHIFT_HEADER, left=(0,))
        for shift in shifts:
            made.add_row(*map(Text, _shift_cells(shift)))
        console.print(made)
    told = shown_missing(comparison, everything)
    for missing in told:
        style = "bold red" if missing.failed else ""
        console.print(Text(_missing_text(missing), style=style), soft_wrap=True)
    if len(told) < len(comparison.missing):
        text = f"and {len(comparison.missing) - len(told)} more that one run alone has (--all)"
        console.print(text, markup=False, highlight=False)
    style = "bold" if comparison.passed else "bold red"
    console.print(Text(conclusion(comparison), style=style), soft_wrap=True)


def comparison_markdown(comparison: Comparison) -> str:
    """Return a comparison as Markdown, every row of it, to stand in a report."""
    lines = [*(f"- {note}" for note in comparison.notes), "", f"{TITLE}: {comparison.where}."]
    lines += ["", *table(HEADER, [_cells(row) for row in comparison.rows]), ""]
    if comparison.shifts:
        lines += [f"{SHIFT_TITLE}.", ""]
        lines += [*table(SHIFT_HEADER, [_shift_cells(s) for s in comparison.shifts]), ""]
    lines += [f"- {_missing_text(missing)}" for missing in comparison.missing]
    return "\n".join([*lines, "", conclusion(comparison)]).strip() + "\n"


def shown(comparison: Comparison, everything: bool = False) -> list[Row]:
    """Return the rows that a terminal shows: those that changed, and all where they are few."""
    if everything or len(comparison.rows) <= FEW:
        return comparison.rows
    return [row for row in comparison.rows if row.verdict != "same"]


def shown_missing(comparison: Comparison, everything: bool = False) -> list[Missing]:
    """Return what a terminal names of what has no pair: all that the new run was asked for.

    The rest is as much as suites or networks that only one of the runs took; all where it is few.
    """
    rest = [missing for missing in comparison.missing if missing.kind.startswith("only")]
    left_out = [] if everything else rest[FEW:]
    return [missing for missing in comparison.missing if missing not in left_out]


def conclusion(comparison: Comparison) -> str:
    """Return one sentence on the whole."""
    parts = _blind(comparison) if comparison.blind else _verdicts(comparison)
    return "; ".join([*parts, *_lost(comparison)]) + "."


def _blind(comparison: Comparison) -> list[str]:
    return [
        f"Nothing can be told: {_rounds(comparison.rows)} rounds are too few for "
        f"{len(comparison.rows)} implementations",
        "measure both with --repeat 8 or more",
    ]


def _verdicts(comparison: Comparison) -> list[str]:
    parts = [
        f"{len(comparison.of('slower'))} of {len(comparison.rows)} implementations are slower by "
        f"more than {comparison.threshold * 100:g} %"
    ]
    if comparison.of("faster"):
        parts.append(f"{len(comparison.of('faster'))} faster")
    if comparison.of("unclear"):
        parts.append(
            f"{len(comparison.of('unclear'))} unclear (they moved as a control did, or against "
            "the controls alone: measure both again on an idle machine)"
        )
    if comparison.of("too few"):
        rounds = _rounds(comparison.of("too few"))
        parts.append(
            f"{len(comparison.of('too few'))} cannot be told, as {rounds} rounds are too few"
        )
    return parts


def _lost(comparison: Comparison) -> list[str]:
    """Return what has no row, counted by why, and what else fails a gate."""
    counts = Counter(_reason(missing) for missing in comparison.missing)
    parts = [f"{counts[reason]} {reason}" for reason in REASONS if counts[reason]]
    if comparison.lost_groups:
        names = " and ".join(", ".join(group) for group in comparison.lost_groups)
        parts.append(f"nothing is left to compare of {names}")
    if comparison.interrupted:
        parts.append("the new run was interrupted, so the rest cannot be told")
    return parts


def _reason(missing: Missing) -> str:
    """Return which of `REASONS` something without a pair has; "" of what is new or not done."""
    if missing.slower:
        return SLOWER
    found = {"gone": GONE, "only old": ONLY_OLD, "skipped": SKIPPED, "dropped": DROPPED}
    found["left out"] = LEFT_OUT
    return found.get(missing.status or missing.kind, FAILS if missing.status in FAILED else "")


def _rounds(rows: list[Row]) -> str:
    found = sorted({count for row in rows for count in row.rounds})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _cells(row: Row) -> list[str]:
    return [
        f"{row.suite}, {row.group}",
        f"{row.family}, {row.implementation}" + (" (control)" if row.control else ""),
        milliseconds(row.old),
        milliseconds(row.new),
        _ratio(row.ratio),
        _ratio(row.relative),
        f"{row.p:.1e}" if row.p < 0.001 else f"{row.p:.3f}",
        row.verdict,
    ]


def _shown_shifts(comparison: Comparison, rows: list[Row]) -> list[Shift]:
    groups = {(row.suite, row.group) for row in rows}
    return [shift for shift in comparison.shifts if (shift.suite, shift.group) in groups]


def _shift_cells(shift: Shift) -> list[str]:
    return [f"{shift.suite}, {shift.group}", str(shift.controls), _ratio(shift.ratio)]


def _ratio(ratio: Ratio | None) -> str:
    """Return a ratio with a digit more than a speed-up has: a per cent counts here."""
    if ratio is None:
        return NOTHING
    return f"{ratio.value:.3f}{interval_text(ratio, 3)}"


def _missing_text(missing: Missing) -> str:
    name = f"{missing.suite}, {missing.group}, {missing.family}, {missing.implementation}"
    if missing.kind == "lost":
        return f"lost its time: {name}: {missing.status}" + (
            f", {missing.note}" if missing.note else ""
        )
    if missing.kind == "left out":
        return f"left out by the new run: {name}: {missing.note}"
    if missing.kind == "gone":
        return f"gone without a word from the new run: {name}"
    return f"{missing.kind.removeprefix('only ')} run only: {name}"
