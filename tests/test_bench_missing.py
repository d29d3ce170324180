"""Comparison of runs: what has a time in one of them only."""

from __future__ import annotations

from typing import Any

import pytest

from blnet.bench.compare import compare, is_control
from blnet.bench.report.comparison import FEW, comparison_markdown, conclusion, shown_missing
from blnet.bench.results import LATE, LEASHED, REPLAYS, Results
from helpers.results import run_of, steady


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
        m.suite = "another"
    assert not compare(old, new, 0.05).passed, "both runs were asked for the same suites"
    new.settings["suites"] = ["suite"]
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
    found = compare(three, four)
    assert (found.missing[0].kind, found.missing[0].implementation) == ("only new", "way 3")
    assert "new run only: suite, group 0, family, way 3" in comparison_markdown(found)
    assert found.passed


# ---------------------------------------------------------------------------- gone


def without(results: Results, *numbers: int) -> Results:
    """Leave out measurements, as a run that never declared them."""
    kept = enumerate(results.measurements)
    results.measurements = [m for number, m in kept if number not in numbers]
    return results


def test_what_the_new_run_no_longer_declares_fails_the_gate_and_is_counted() -> None:
    old, new = run_of([steady(4, 24)]), without(run_of([steady(4, 24)]), 2, 3)
    comparison = compare(old, new, 0.05)
    assert [missing.kind for missing in comparison.missing] == ["gone", "gone"]
    assert not comparison.passed
    assert comparison.lost_groups == []
    text = comparison_markdown(comparison)
    assert "gone without a word from the new run: suite, group 0, family, way 3" in text
    assert conclusion(comparison).count("2 gone without a word from the new run") == 1
    assert compare(new, old, 0.05).passed, "what is new was never measured before"


def test_what_the_new_run_leaves_out_on_purpose_is_told_and_fails_no_gate() -> None:
    old, new = run_of([steady(4, 24)]), without(run_of([steady(4, 24)]), 2, 3)
    new.left_out = {"suite, group 0": {"way 2": "it is slow", "way 3": "it is slow"}}
    comparison = compare(old, new, 0.05)
    assert [missing.kind for missing in comparison.missing] == ["left out", "left out"]
    assert comparison.passed
    text = comparison_markdown(comparison)
    assert "- left out by the new run: suite, group 0, family, way 3: it is slow" in text
    assert "; 2 left out by the new run on purpose." in conclusion(comparison)
    assert shown_missing(comparison) == comparison.missing
    del new.left_out["suite, group 0"]["way 3"]
    comparison = compare(old, new, 0.05)
    assert [missing.kind for missing in comparison.missing] == ["left out", "gone"]
    assert not comparison.passed, "the other one is gone without a word"


def test_a_group_that_is_left_out_on_purpose_is_not_lost() -> None:
    old, new = run_of([steady(3, 24)] * 2), run_of([steady(3, 24)])
    new.left_out = {"suite, group 1": {f"way {number}": "slow" for number in range(3)}}
    comparison = compare(old, new, 0.05)
    assert comparison.lost_groups == []
    assert comparison.passed


def two_networks() -> Results:
    """A group of two networks on two rungs each."""
    found = run_of([steady(4, 24)])
    for m in found.measurements:
        m.suite = "models"
    found.measurements[2].family = found.measurements[3].family = "another network"
    return found


@pytest.mark.parametrize(
    ("then", "now", "kind"),
    [
        ({}, {}, "gone"),
        ({"models": ["a", "b"]}, {"models": ["a"]}, "only old"),
        ({"branchings": [[2, 4], [4, 4]]}, {"branchings": [[2, 4]]}, "only old"),
        ({"full": True}, {}, "only old"),
        ({}, {"full": True}, "gone"),
    ],
)
def test_a_case_fails_the_gate_only_if_the_new_run_was_asked_for_it(
    then: dict[str, Any], now: dict[str, Any], kind: str
) -> None:
    old, new = two_networks(), without(two_networks(), 2, 3)
    old.settings |= then
    new.settings |= now
    comparison = compare(old, new, 0.05)
    assert {missing.kind for missing in comparison.missing} == {kind}
    assert comparison.passed is (kind == "only old")
    counted = "2 in the old run alone" if comparison.passed else "2 gone without a word"
    assert counted in conclusion(comparison)


def test_a_rung_fails_the_gate_whatever_other_networks_were_left_out() -> None:
    old, new = two_networks(), without(two_networks(), 1, 2, 3)
    old.settings["models"] = ["a", "b"]
    comparison = compare(old, new, 0.05)
    assert [missing.kind for missing in comparison.missing] == ["gone", "only old", "only old"]
    assert not comparison.passed
    old.settings["full"] = True  # of which a quick run takes some rungs
    assert compare(old, new, 0.05).passed


def test_a_full_run_and_a_quick_one_compare_and_all_that_is_not_is_counted() -> None:
    old, new = run_of([steady(4, 24)] * 12), run_of([steady(4, 24)])
    old.settings["full"] = True
    comparison = compare(old, new, 0.05)
    assert comparison.passed
    assert comparison.lost_groups == []
    assert "; 44 in the old run alone." in conclusion(comparison)
    assert len(shown_missing(comparison)) == FEW
    assert len(shown_missing(comparison, everything=True)) == 44
    assert not compare(old, lose(new, "wrong", "so"), 0.05).passed


def test_other_devices_take_other_rungs() -> None:
    old, new = run_of([steady(4, 24)]), without(run_of([steady(4, 24)]), 3)
    assert not compare(old, new, 0.05).passed
    new.environment["device"] = "another CPU"
    comparison = compare(old, new, 0.05, across_devices=True)
    assert comparison.passed
    assert "1 gone without a word" in conclusion(comparison)
    new.settings["device"] = "cuda"
    comparison = compare(old, new, 0.05, across_devices=True)
    assert comparison.passed
    assert "1 in the old run alone" in conclusion(comparison)


def test_what_an_interrupted_run_did_not_reach_is_not_gone() -> None:
    old, new = run_of([steady(3, 24)] * 2), run_of([steady(3, 24)])
    new.interrupted = True
    comparison = compare(old, new, 0.05)
    assert {missing.kind for missing in comparison.missing} == {"only old"}
    assert not comparison.passed


def test_what_is_gone_is_counted_where_the_rounds_are_too_few() -> None:
    comparison = compare(run_of([steady(4, 3)]), without(run_of([steady(4, 3)]), 3), 0.05)
    assert "measure both with --repeat 8 or more; 1 gone without a word" in conclusion(comparison)


# ---------------------------------------------------------------------------- the rest


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
    comparison = compare(old, new, 0.05, across_devices=True)
    assert comparison.passed
    assert comparison.where == "a CPU -> another CPU, float32"
    said = "0 of 3 implementations are slower by more than 5 %; 1 lost their time because they are "
    assert conclusion(comparison) == f"{said}skipped now."
