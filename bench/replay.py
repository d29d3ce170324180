"""Hands samples that were taken elsewhere to pytest-benchmark.

pytest-benchmark times one test after the other with one clock; our times are taken interleaved and,
on a GPU, with events. So a test replays its samples: the function that pytest-benchmark times does
nothing but advance a virtual clock by the next sample. Its columns, JSON, compare and autosave then
show our samples exactly.
"""

from __future__ import annotations

from typing import Any

import pytest

from blnet.bench.measure import Call
from blnet.bench.results import Measurement


class _Clock:
    now = 0.0


def virtual_clock() -> float:
    """Return the virtual time, seconds: the timer of every test of a suite."""
    return _Clock.now


def _reset() -> None:
    # From zero every time, so that end - start is the sample itself, to the last bit.
    _Clock.now = 0.0


def _player(samples: list[float]) -> Call:
    left = iter(samples)

    def play() -> None:
        _Clock.now += next(left)

    return play


def replay(benchmark: Any, measurement: Measurement) -> None:
    """Give a measurement to pytest-benchmark, or end the test with the reason for its lack.

    Args:
        benchmark: pytest-benchmark's fixture; its test must be marked with
            `pytest.mark.benchmark(timer=virtual_clock)`.
        measurement: of this test's implementation.
    """
    benchmark.group = f"{measurement.suite}, {measurement.group}"
    benchmark.extra_info.update(extra_info(measurement))
    if measurement.failed:
        pytest.fail(measurement.note, pytrace=False)
    if not measurement.timed:
        pytest.skip(measurement.note or "interrupted")
    benchmark.pedantic(
        _player(measurement.samples), setup=_reset, rounds=len(measurement.samples), iterations=1
    )


def extra_info(measurement: Measurement) -> dict[str, Any]:
    """Return what pytest-benchmark's JSON carries of a measurement beside its samples."""
    info: dict[str, Any] = {
        "family": measurement.family,
        "implementation": measurement.implementation,
        "status": measurement.status,
        "note": measurement.note,
        "build_seconds": measurement.build_seconds,
        "peak_memory": measurement.peak_memory,
        "error": measurement.check.error if measurement.check else None,
        **measurement.facts,
    }
    if measurement.timed:
        info |= {f"p{p}": measurement.quantile(p) for p in (20, 50, 90)}
        if "batch" in measurement.facts:
            info["throughput"] = measurement.facts["batch"] / measurement.median
    return info
