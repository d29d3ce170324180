"""The measurements of a run as CSV, one line each."""

from __future__ import annotations

import csv
import io

from blnet.bench.intervals import Ratio
from blnet.bench.missing import Key, key_of
from blnet.bench.report.cells import device_of
from blnet.bench.results import Results
from blnet.bench.summary import NETWORK_SUITES, model_rows, op_rows, op_suites

CSV_COLUMNS = (
    "device",
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

    A network's speed-up and realised speed-up stand in the line of its fastest rung of each batch;
    an op's speed-up in the line of each implementation but the fastest baseline.
    """
    gains, device = _gains(results), device_of(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for m in results.measurements:
        quantiles = [m.quantile(p) * 1e3 if m.timed else "" for p in (20, 50, 90)]
        batch = m.facts.get("batch")
        facts = [m.facts.get(key) for key in ("batch", "network", "alpha", "beta", "pass")]
        writer.writerow(
            [
                *(device, m.suite, m.group, m.family, m.implementation, m.status),
                *facts,
                len(m.samples),
                *quantiles,
                batch / m.median if m.timed and batch else "",
                *gains.get(key_of(m), (None,) * 4),
                m.facts.get("bytes"),
                m.check.error if m.check else "",
                m.peak_memory,
                m.build_seconds,
                *(m.facts.get(k) for k in ("accuracy", "seed", "epochs", "parameters", "macs")),
                m.note,
            ]
        )
    return text.getvalue()


def _gains(results: Results) -> dict[Key, tuple[float | None, ...]]:
    """Return the speed-ups that the report has, their ends and realised ones."""
    gains = {
        (suite, found.group, row.network.label, found.rung): _cells(found.speedup, found.realised)
        for suite in NETWORK_SUITES
        for row in model_rows(results, suite)
        for found in row.batches.values()
    }
    return gains | {
        key_of(row.measurement): _cells(row.speedup)
        for suite in op_suites(results)
        for row in op_rows(results, suite)
        if not row.fastest_baseline
    }


def _cells(speedup: Ratio | None, realised: Ratio | None = None) -> tuple[float | None, ...]:
    if speedup is None:
        return (None,) * 4
    return (speedup.value, speedup.low, speedup.high, realised.value if realised else None)
