"""The measurements of a run as CSV, one line each."""

from __future__ import annotations

import csv
import io

from blnet.bench.results import Results
from blnet.bench.summary import NETWORK_SUITES, BatchRow, model_rows

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


def csv_text(results: Results) -> str:
    """Return one line for each measurement.

    A network's speed-up and realised speed-up stand in the line of its fastest rung of each batch.
    """
    gains: dict[tuple[str, str, str, str], BatchRow] = {
        (suite, found.group, row.network.label, found.rung): found
        for suite in NETWORK_SUITES
        for row in model_rows(results, suite)
        for found in row.batches.values()
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
                *_csv_gain(gains.get((m.suite, m.group, m.family, m.implementation))),
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
