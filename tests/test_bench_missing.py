"""Comparison of runs: what has a time in one of them only."""

from __future__ import annotations

from typing import Any

import pytest

from blnet.bench.compare import compare, is_control
from blnet.bench.report.comparison import comparison_markdown
from blnet.bench.results import LATE, LEASHED, REPLAYS, Results
from blnet.bench.testing import run_of, steady


def lose(results: Results, status: Any, note: str) -> Results:
    last = results.measurements[-1]
    last.samples, last.status, last.note = [], status, note
    return results


@pytest.mark.parametrize(("status", "passed"), [("wrong", False), ("error", False),
                                                ("dropped", True), ("skipped", False)])  # fmt: skip
def test_what_lost_its_time_is_named(status: str, passed: bool) -> None:
    old = run_of([steady(4, 24)])
    comparison = compare(old, lose(run_of([steady(4, 24)]), status, "because"), 0.05)
    assert [(m.kind, m.status) for m in comparison.missing] == [("lost", status)]
    assert comparison.passed is passed
    text = comparison_markdown(comparison)
    assert f"lost its time: suite, group 0, family, way 3: {status}, because" in text
    assert ("lost their time" in text) is not passed


@pytest.mark.parametrize(
    ("seconds", "moved", "passed"), [(4.0, 1.0, False), (1.04, 1.0, True), (1.5, 1.6, True)]
)
def test_what_was_dropped_for_its_times_fails_where_they_are_slower(
    seconds: float, moved: float, passed: bool
) -> None:
    """It took 1 s; what its controls became as well is the machine's."""
    new = steady(4, 24)
    new[:2] *= moved
    lost = lose(run_of([new]), "dropped", "4.1 times slower than the fastest")
    lost.measurements[-1].facts["leash"] = seconds
    comparison = compare(run_of([steady(4, 24)]), lost, 0.05)
    assert comparison.passed is passed
    text = "1 lost their time because they are far slower now"
    assert (text in comparison_markdown(comparison)) is not passed


def test_a_group_without_any_pair_fails_the_gate() -> None:
    old, new = run_of([steady(3, 24), steady(3, 24)]), run_of([steady(3, 24)])
    comparison = compare(old, new, 0.05)
    assert comparison.lost_groups == [("suite", "group 1")]
    assert not comparison.passed
    assert "nothing is left to compare of suite, group 1" in comparison_markdown(comparison)
    for m in old.measurements[3:]:
        m.suite = "another"  # the new run was not asked for it
    assert compare(old, new, 0.05).passed
    new.settings["suites"] = ["suite", "another"]
    assert not compare(old, new, 0.05).passed


def test_a_run_that_was_interrupted_passes_no_gate() -> None:
    run, stopped = run_of([steady(3, 24)]), run_of([steady(3, 24)])
    stopped.interrupted = True
    assert compare(stopped, run, 0.05).passed
    assert any("the old run was interrupted" in n for n in compare(stopped, run).notes)
    comparison = compare(run, stopped, 0.05)
    assert not comparison.passed
    assert "the new run was interrupted, so the rest cannot be told" in comparison_markdown(
        comparison
    )


def test_what_only_one_run_has_is_listed() -> None:
    three, four = run_of([steady(3, 24)]), run_of([steady(4, 24)])
    assert compare(four, three).missing[0].kind == "only old"
    found = compare(three, four)
    assert (found.missing[0].kind, found.missing[0].implementation) == ("only new", "way 3")
    assert "new run only: suite, group 0, family, way 3" in comparison_markdown(found)
    assert found.passed


def test_versions_and_commits_are_noted() -> None:
    old, new = run_of([steady(3, 24)]), run_of([steady(3, 24)])
    new.environment |= {"packages": {"torch": "2.12.0", "onnx": "1"}, "commit": "bbbb"}
    new.notes.append("the machine was busy")
    notes = compare(old, new).notes
    assert "torch 2.11.0 -> 2.12.0" in notes
    assert "onnx none -> 1" in notes
    assert "commit aaaa -> bbbb" in notes
    assert "new: the machine was busy" in notes


@pytest.mark.parametrize(("before", "passed"), [(1.0, False), (40.0, True), (None, True)])
def test_what_was_dropped_for_its_build_fails_where_that_took_far_less(
    before: float | None, passed: bool
) -> None:
    old = run_of([steady(4, 24)])
    old.measurements[-1].build_seconds = before
    new = lose(run_of([steady(4, 24)]), "dropped", "building took more than 60.0 s")
    assert compare(old, new, 0.05).passed, "of what the run's time was up for nothing is known"
    new.measurements[-1].facts = {**new.measurements[-1].facts, LATE: 60.0}
    assert compare(old, new, 0.05).passed is passed


def test_a_control_that_was_dropped_is_the_machines() -> None:
    old, new = run_of([steady(4, 24)]), lose(run_of([steady(4, 24)]), "dropped", "slow")
    for run in (old, new):
        run.measurements[-1].facts = {**run.measurements[0].facts, LEASHED: 9.0}
    assert is_control(old.measurements[-1])
    assert compare(old, new, 0.05).passed


def test_a_graph_is_not_judged_by_what_its_rung_took_to_compile() -> None:
    """It took a capture while the rung was compiled in time, and compiles itself where not."""
    old = run_of([steady(4, 24)])
    old.measurements[-1].build_seconds = 1.0
    new = lose(run_of([steady(4, 24)]), "dropped", "building took more than 60.0 s")
    facts = {**new.measurements[-1].facts, LATE: 60.0}
    new.measurements[-1].facts = facts
    assert not compare(old, new, 0.05).passed
    new.measurements[-1].facts = {**facts, REPLAYS: "way 2"}
    assert compare(old, new, 0.05).passed


def test_another_device_may_skip_what_it_does_not_run() -> None:
    old = run_of([steady(4, 24)])
    new = lose(run_of([steady(4, 24)]), "skipped", "no kernel runs on this device")
    assert not compare(old, new, 0.05, across_devices=True).passed
    new.environment["device"] = "another CPU"
    assert compare(old, new, 0.05, across_devices=True).passed
