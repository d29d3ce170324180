"""pytest-benchmark shows our samples exactly, in its statistics and its JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from blnet.bench.replay import extra_info, replay, virtual_clock
from blnet.bench.results import Check, Measurement

SAMPLES = [0.125, 0.1, 1e-7, 0.30000000000000004, 2.5]


def measurement(status="ok", samples=SAMPLES, note="") -> Measurement:
    return Measurement(
        "models",
        "batch 1",
        "resnet50",
        "eager",
        facts={"batch": 1},
        status=status,
        samples=list(samples),
        note=note,
        check=Check(1e-7, 1e-3, "float64"),
        peak_memory=7,
    )


@pytest.mark.benchmark(timer=virtual_clock)
def test_statistics_equal_the_samples(benchmark) -> None:
    replay(benchmark, measurement())
    assert benchmark.group == "models, batch 1"
    if benchmark.enabled:  # pytest-xdist switches pytest-benchmark off
        assert benchmark.stats.stats.data == SAMPLES
        assert benchmark.stats.stats.median == 0.125
        assert benchmark.stats.stats.max == 2.5


class Unused:
    """A stand-in for the fixture that must not be asked to time anything."""

    group = None

    def __init__(self) -> None:
        self.extra_info: dict = {}


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("wrong", pytest.fail.Exception),
        ("error", pytest.fail.Exception),
        ("dropped", pytest.skip.Exception),
        ("skipped", pytest.skip.Exception),
        ("pending", pytest.skip.Exception),
    ],
)
def test_what_has_no_time_is_not_replayed(status, outcome) -> None:
    benchmark = Unused()
    with pytest.raises(outcome, match="because"):
        replay(benchmark, measurement(status, note="because"))
    assert benchmark.extra_info["status"] == status
    assert "p50" not in benchmark.extra_info


def test_extra_info_carries_our_numbers() -> None:
    info = extra_info(measurement())
    assert (info["p50"], info["peak_memory"], info["error"], info["batch"]) == (0.125, 7, 1e-7, 1)
    assert info["throughput"] == 8.0
    assert "throughput" not in extra_info(measurement("wrong"))


SUITE = '''
"""A suite in a file of its own."""
import pytest, torch
from blnet.bench.measure import Group, Implementation
from blnet.bench.plugin import measured, pytest_generate_tests
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.session import Case

NAME = "tiny"
ONE = torch.ones(3)

def cases(settings):
    return [Case("g", "f", name) for name in ("right", "wrong")]

def build(group, session):
    makes = {"right": lambda: ONE, "wrong": lambda: -ONE}
    return Group(NAME, group, [Implementation(n, "f", lambda c=c: c) for n, c in makes.items()],
                 {"f": lambda: ONE}, 1e-6, "exact", session.settings.rounds(1))

@pytest.mark.benchmark(timer=virtual_clock)
def test_tiny(case, measured, benchmark):
    replay(benchmark, measured(case))
'''


def test_plain_pytest_runs_a_suite(tmp_path) -> None:
    (tmp_path / "test_tiny.py").write_text(SUITE)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--config-file=/dev/null", "--rootdir=."),
            *(
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                "--benchmark-json=b.json",
                "test_tiny.py",
            ),
        ],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "BLNET_BENCH": "--device cpu --repeat 7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    (entry,) = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    assert entry["extra_info"]["implementation"] == "right"
    assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) == 7
    assert entry["stats"]["median"] == entry["extra_info"]["p50"]


def test_wrong_flags_in_the_environment_are_one_clear_error(tmp_path) -> None:
    (tmp_path / "test_tiny.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--config-file=/dev/null", "test_tiny.py"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "BLNET_BENCH": "--batch 0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "BLNET_BENCH: --batch must be at least 1, got 0" in done.stdout + done.stderr
