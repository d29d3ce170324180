"""The cells of an op's table as text, and what stands above and below it."""

from __future__ import annotations

from collections.abc import Sequence

from blnet.bench.report.cells import (
    NOTHING,
    ceiling_notes,
    device_of,
    few_rounds,
    lesser,
    milliseconds,
    number_text,
    ratio_text,
    share_text,
)
from blnet.bench.results import Results
from blnet.bench.summary import OpRow, op_rows

COUNTED = "what any implementation must move and multiply"


def op_title(results: Results, suite: str) -> str:
    """Return what stands above the table of an op."""
    computes = next((m.facts.get("computes") for m in results.of(suite)), None)
    return f"{suite}: {computes}" if computes else suite


def op_where(results: Results, suite: str) -> str:
    """Return the device and the precision of an op's suite, which need not be the run's."""
    dtype = next((m.facts["dtype"] for m in results.of(suite) if "dtype" in m.facts), None)
    return f"{device_of(results)}, {dtype or results.settings['dtype']}"


def op_header(results: Results) -> list[str]:
    """Return the columns of an op's table; a share only where the device's rates were measured."""
    share = ["of bound"] if "copy_bandwidth" in results.ceilings else []
    over = "speed-up over the baseline [95 %]"
    first = ["site", "pass", "batch", "implementation", "p50, ms", "GB/s", "TFLOP/s"]
    return [*first, *share, over, "error"]


def op_cells(results: Results, row: OpRow) -> list[str]:
    """Return the cells of a row of an op's table."""
    m = row.measurement
    against = "is the baseline" if row.fastest_baseline else ratio_text(row.speedup)
    share = [share_text(row.share)]
    return [
        m.family,
        m.facts.get("pass", NOTHING),
        str(m.facts.get("batch", NOTHING)),
        m.implementation,
        milliseconds(m.median) if m.timed else m.status,
        number_text(row.bandwidth / 1e9 if row.bandwidth else None, 1),
        number_text(row.rate / 1e12 if row.rate else None, 2),
        *(share if "copy_bandwidth" in results.ceilings else []),
        against,
        f"{m.check.error:.0e}" if m.check else NOTHING,
    ]


def baseline_text(results: Results, suite: str) -> str:
    """Return what an op's speed-ups are over: "the fastest of PyTorch's eager and compile"."""
    found = (m.implementation for m in results.of(suite) if m.facts.get("baseline"))
    names = list(dict.fromkeys(found))
    which = ("PyTorch's " if "eager" in names else "") + (" and ".join(names) or "no baseline")
    return f"the fastest of {which}" if len(names) > 1 else which


def op_legend(results: Results, suite: str) -> list[str]:
    """Return sentences on what the columns of an op's table are."""
    counted = next((m.facts["counted"] for m in results.of(suite) if "counted" in m.facts), COUNTED)
    share = (
        "Of bound is the least time that the rates measured in this run allow for that, over the "
        "median."
    )
    return [
        f"Speed-ups are over {baseline_text(results, suite)} at the same site and pass, with 95 % "
        "intervals in brackets.",
        f"GB/s and TFLOP/s count {counted}.",
        *([share] if "copy_bandwidth" in results.ceilings else []),
    ]


def op_notes(results: Results, suite: str) -> list[str]:
    """Return the lines below the table of an op, as items of a Markdown list."""
    notes = dict.fromkeys(
        f"- {m.implementation}: {m.note}." for m in results.of(suite) if m.note and m.status == "ok"
    )
    legend, caveats = op_legend(results, suite), op_caveats(op_rows(results, suite))
    return [
        *notes,
        *(f"- {text}" for text in legend),
        *ceiling_notes(results),
        *(f"- {text}" for text in caveats),
    ]


def op_caveats(rows: Sequence[OpRow]) -> list[str]:
    """Return sentences on what the figures of an op's table do not say."""
    most = max((row.share for row in rows if row.share), default=0.0)
    passed = (
        f"Up to {most:.0%} of a bound was reached: the rates measured in this run are a lower "
        "estimate of what the device can do, so that a bound may lie above the least time."
    )
    return [
        *lesser_op_baselines(rows),
        *few_rounds(row.speedup for row in rows),
        *([passed] if round(most, 2) > 1 else []),
    ]


def lesser_op_baselines(rows: Sequence[OpRow]) -> list[str]:
    """Return a sentence for each set of baselines without a time, and one where none has any."""
    lacking: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        if row.lacking or not row.over:
            groups = lacking.setdefault(row.lacking if row.over else (), {})
            groups[row.measurement.group] = None
    texts = []
    for names, groups in lacking.items():
        where = " and ".join(groups)
        none = f"The baseline has no time at {where}, so there is no speed-up there."
        texts.append(lesser("The baseline", names, where) if names else none)
    return texts
