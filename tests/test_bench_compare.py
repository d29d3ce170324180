"""Comparison of runs: its verdicts, how often it errs, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blnet.bench.changes import corrected
from blnet.bench.compare import ALPHA, Comparison, compare, is_control
from blnet.bench.intervals import median_ratio
from blnet.bench.report.comparison import FEW, comparison_markdown, shown
from blnet.bench.results import LATE, LEASHED, Measurement, Results, read_json, write_json
from blnet.cli import main

ENVIRONMENT = {
    "date": "2026-11-24", "device": "a CPU", "gpus": [], "cpu": "a CPU", "cpu_features": "AVX2",
    "threads": 2, "packages": {"torch": "2.11.0"}, "commit": "aaaa",
}  # fmt: skip
SETTINGS = {"device": "cpu", "dtype": "float32", "batch": 8, "size": 224}
STUDY = {
    "network": "resnet18", "baseline": "resnet18", "alpha": None, "beta": None, "seed": 0,
    "parameters": 1, "macs": 1, "epochs": 1, "accuracy": 0.5,
}  # fmt: skip
Array = NDArray[np.float64]


def run_of(groups: Sequence[Array], controls: int = 2) -> Results:
    """Return a run whose groups hold these samples, (implementations, rounds), controls first."""
    measurements = [
        Measurement(
            *("suite", f"group {number}", "family", f"way {row}"),
            facts={"baseline": row < controls, "batch": 8},
            status="ok",
            samples=times.tolist(),
        )
        for number, samples in enumerate(groups)
        for row, times in enumerate(samples)
    ]
    return Results(dict(ENVIRONMENT), dict(SETTINGS), "blnet bench", measurements=measurements)


def drawn(
    draw: np.random.Generator,
    implementations: int,
    rounds: int,
    noise: float,
    machine: float = 0.0,
    own: float = 0.0,
) -> Array:
    """Return times of about 1 s, with the noise that the committed results have.

    Args:
        draw: gives the random numbers.
        implementations: how many.
        rounds: how many.
        noise: within the run: a part that all share, which lasts over some rounds, a
            heavy-tailed part of each one's own, and now and then a stall many times as long.
        machine: spread of a factor on the whole run.
        own: spread of a factor on each implementation of the run.
    """
    shared = draw.normal(size=rounds)
    for number in range(1, rounds):
        shared[number] = 0.8 * shared[number - 1] + 0.6 * shared[number]
    each = draw.standard_t(2, (implementations, rounds))
    stalls = draw.exponential(11, each.shape) * (draw.random(each.shape) < 0.04)
    factors = draw.normal(0, machine) + draw.normal(0, own, (implementations, 1))
    return np.exp(factors + noise * (1.3 * shared + 0.7 * each + stalls))


def steady(implementations: int, rounds: int, seed: int = 0) -> Array:
    return drawn(np.random.default_rng(seed), implementations, rounds, 0.002)


# ---------------------------------------------------------------------------- how often it errs


def spread(samples: Array) -> tuple[float, float, float]:
    """Return the noise of a group: MAD, lag-1 correlation, largest deviation in MADs."""
    logs = np.log(samples / np.median(samples, axis=1, keepdims=True))
    mad = 1.4826 * np.median(np.abs(logs), axis=1)
    lagged = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in logs]
    far = np.abs(logs).max(axis=1) / mad
    return float(np.median(mad)), float(np.mean(lagged)), float(np.median(far))


def committed() -> list[Array]:
    """Return the groups of the committed runs that were timed for rounds enough to model."""
    groups: dict[tuple[str, str, str], list[list[float]]] = {}
    for path in Path(__file__).parent.parent.glob("bench/results/*cpu*/results.json"):
        for m in read_json(path).measurements:
            if m.timed and m.suite in ("models", "speech_models", "merge") and len(m.samples) >= 20:
                groups.setdefault((str(path), m.suite, m.group), []).append(m.samples)
    return [np.array([row[: min(map(len, rows))] for row in rows]) for rows in groups.values()]


def test_the_simulated_noise_is_as_bad_as_the_committed_one() -> None:
    real = [spread(group) for group in committed()]
    assert len(real) >= 4
    draw = np.random.default_rng(3)
    made = [spread(drawn(draw, 10, 28, noise)) for noise in NOISE for _ in range(10)]
    for number in range(3):
        found = float(np.median([of[number] for of in made]))
        assert found >= 0.8 * np.median([of[number] for of in real])
    assert max(of[0] for of in made) >= 0.9 * max(of[0] for of in real)


NOISE = (0.015, 0.025, 0.045, 0.06, 0.11)


def random_groups(draw: np.random.Generator) -> list[tuple[int, int, float]]:
    """Return how many implementations and rounds the groups of a run have, and their noise."""
    groups, left = [], int(draw.integers(10, 61))
    while left > 0:
        size = min(int(draw.integers(9, 37)), max(left, 3))
        groups.append((size, int(draw.choice((8, 10, 24, 32, 60))), float(draw.choice(NOISE))))
        left -= size
    return groups


def test_identical_code_fails_less_than_once_in_a_hundred_runs() -> None:
    # 10 to 63 pairs, 8 to 60 rounds; a machine that is 8 % faster or slower from run to run.
    draw, failed, runs = np.random.default_rng(0), 0, 1000
    for _ in range(runs):
        groups = random_groups(draw)
        old, new = (
            run_of([drawn(draw, *group, machine=0.08, own=0.01) for group in groups])
            for _ in range(2)
        )
        failed += not compare(old, new, 0.05, resamples=20).passed
    # Were it once in a hundred, 3 or fewer of 1000 would be seen in 1 of 100 such tests.
    assert failed <= 3


def test_the_committed_results_do_not_differ_from_themselves() -> None:
    groups = committed()
    old, new = run_of([g[:, ::2] for g in groups]), run_of([g[:, 1::2] for g in groups])
    assert compare(old, new, 0.05).of("slower") == []


@pytest.mark.parametrize("pairs", [10, 60])
def test_a_slow_down_of_ten_per_cent_is_caught(pairs: int) -> None:
    draw, caught, runs = np.random.default_rng(1), 0, 100
    for _ in range(runs):
        old, new = (1 + 0.02 * draw.normal(size=(2, pairs, 24))).tolist()
        new = np.array(new)
        new[-1] *= 1.1
        comparison = compare(run_of([np.array(old)]), run_of([new]), 0.05, resamples=200)
        caught += comparison.rows[-1].verdict == "slower" and not comparison.passed
    assert caught > 95


# ---------------------------------------------------------------------------- verdicts


def verdicts(
    slow: Callable[[Array], None], rounds: int = 24, controls: int = 2, threshold: float = 0.05
) -> list[str]:
    old, new = steady(4, rounds, 1), steady(4, rounds, 2)
    slow(new)
    found = compare(run_of([old], controls), run_of([new], controls), threshold)
    return [row.verdict for row in found.rows]


def times(factors: Sequence[float]) -> Callable[[Array], None]:
    def slow(samples: Array) -> None:
        samples *= np.array(factors)[:, None]

    return slow


@pytest.mark.parametrize(
    ("factors", "found"),
    [
        ((1, 1, 1, 1.1), ["same", "same", "same", "slower"]),
        ((1, 1, 1, 0.9), ["same", "same", "same", "faster"]),
        ((1, 1, 1, 1.04), ["same"] * 4),
        # The machine is slower: not told from code that is, and not silent.
        ((1.2, 1.2, 1.2, 1.2), ["unclear"] * 4),
        # Slower code on a slower machine is slower all the same; on a faster one it may hide.
        ((1.1, 1.1, 1.1, 1.3), ["unclear", "unclear", "unclear", "slower"]),
        ((0.9, 0.9, 0.9, 1.0), ["unclear", "unclear", "unclear", "unclear"]),
        ((0.9, 0.9, 0.9, 1.1), ["unclear", "unclear", "unclear", "slower"]),
        # Controls that lie far apart say how far identical code may.
        ((1.3, 1.0, 1.0, 1.2), ["unclear", "same", "same", "unclear"]),
    ],
)
def test_verdicts(factors: Sequence[float], found: list[str]) -> None:
    assert verdicts(times(factors)) == found


def test_without_controls_the_times_decide_alone() -> None:
    assert verdicts(times((1.2, 1.2, 1.2, 1.2)), controls=0) == ["slower"] * 4
    old, new = run_of([steady(2, 24, 1)], 0), run_of([steady(2, 24, 2)], 0)
    comparison = compare(old, new)
    assert [row.relative for row in comparison.rows] == [None, None]
    assert comparison.shifts == []


def test_a_single_control_is_held_against_itself() -> None:
    assert verdicts(times((1.2, 1.0, 1.2, 1.2)), controls=1) == ["unclear"] * 4


def test_the_threshold_decides_what_is_slower() -> None:
    assert verdicts(times((1, 1, 1, 1.03)), threshold=0.0)[3] == "slower"
    assert verdicts(times((1, 1, 1, 1.03)), threshold=0.05)[3] == "same"


@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_few_rounds_are_told_and_pass_no_gate(rounds: int, tmp_path: Path, capsys: Any) -> None:
    assert verdicts(times((1, 1, 1, 5.0)), rounds) == ["too few"] * 4
    for name in ("old", "new"):
        write_json(tmp_path / name / "results.json", run_of([steady(4, rounds)]))
    words = ["bench", "compare", str(tmp_path / "old"), str(tmp_path / "new")]
    assert main([*words, "--fail-if-slower", "5%"]) == 1
    assert f"Nothing can be told: {rounds} rounds are too few" in capsys.readouterr().out
    assert main(words) == 0


def test_rounds_that_suffice_for_some_are_told_of_the_rest() -> None:
    old = run_of([steady(4, 24), steady(4, 3)])
    comparison = compare(old, old, 0.05)
    assert comparison.passed
    assert len(comparison.of("too few")) == 4
    assert "4 cannot be told, as 3 rounds are too few" in comparison_markdown(comparison)


def test_equal_times_are_ties_and_the_same() -> None:
    equal = run_of([np.ones((3, 10))])
    assert [row.verdict for row in compare(equal, equal).rows] == ["same"] * 3


def test_the_ratio_and_the_interval_of_two_runs() -> None:
    old, new = steady(3, 30, 1), 1.5 * steady(3, 30, 2)
    row = compare(run_of([old]), run_of([new])).rows[2]
    assert row.ratio.value == pytest.approx(np.median(new[2]) / np.median(old[2]))
    paired = median_ratio(new[2].tolist(), old[2].tolist())
    assert row.ratio.low < row.ratio.value < row.ratio.high
    assert row.ratio.high - row.ratio.low == pytest.approx(paired.high - paired.low, rel=1.0)


def test_corrected_is_holms() -> None:
    found = corrected(np.array([0.01, 0.04, 0.03, 0.005]))
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert corrected(np.array([[0.9, 0.8]])).max() == 1.0
    assert ALPHA == 0.01


@pytest.mark.parametrize(
    ("facts", "control"),
    [
        ({"network": "resnet50", "baseline": "resnet50", "alpha": None, "ours": False}, True),
        ({"network": "resnet50", "baseline": "resnet50", "alpha": None, "ours": True}, False),
        ({"network": "resnet50", "baseline": "resnet50", "alpha": 2, "ours": False}, False),
        ({"network": "bl_resnet50", "baseline": "resnet50", "alpha": 2, "ours": False}, False),
        ({"baseline": True}, True),
        ({"baseline": False}, False),
        ({}, False),
    ],
)
def test_controls_are_what_our_code_cannot_touch(facts: dict[str, Any], control: bool) -> None:
    assert is_control(Measurement("s", "g", "f", "i", facts=facts)) is control


# ---------------------------------------------------------------------------- what is missing


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


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ("environment", {"device": "a GPU"}, "different devices (device: a CPU and a GPU)"),
        ("environment", {"gpus": ["a GPU"]}, "different devices (gpus: none and a GPU)"),
        ("environment", {"cpu": "other"}, "--across-devices"),
        ("environment", {"threads": 4}, "differ in threads (2 and 4)"),
        ("settings", {"dtype": "bfloat16"}, "differ in dtype (float32 and bfloat16)"),
        ("settings", {"size": 64, "batch": 1}, "batch (8 and 1), size (224 and 64)"),
        ("settings", {"input": [1, 64, 64]}, "input (none and 1, 64, 64)"),
    ],
)
def test_runs_that_do_not_compare_are_refused(
    where: str, change: dict[str, Any], said: str, tmp_path: Path, capsys: Any
) -> None:
    old, new = run_of([steady(3, 24)]), run_of([steady(3, 24)])
    getattr(new, where).update(change)
    write_json(tmp_path / "old.json", old)
    write_json(tmp_path / "new.json", new)
    words = ["bench", "compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert main([*words, "--across-devices"]) == (0 if where == "environment" else 2)


def test_batches_of_one_implementation_that_differ_are_refused() -> None:
    old, new = run_of([steady(3, 24)]), run_of([steady(3, 24)])
    new.measurements[1].facts["batch"] = 16
    with pytest.raises(ValueError, match=r"the batch of suite, group 0, family, way 1 \(8 and 16"):
        compare(old, new)


def results_file(path: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    values = run_of([steady(3, 24)]).as_dict()
    change(values)
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.update(schema=99), "format version 99"),
        (lambda v: v.pop("measurements"), "it lacks 'measurements'; measure again"),
        (lambda v: v["measurements"][0]["samples"].append(0.0), "no positive number"),
        (
            lambda v: [m.update(suite="accuracy", facts=STUDY) for m in v["measurements"]],
            "no implementation",
        ),
    ],
)
def test_a_file_that_holds_no_such_run(
    change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path, capsys: Any
) -> None:
    good = results_file(tmp_path / "good.json", lambda v: None)
    bad = results_file(tmp_path / "bad.json", change)
    assert main(["bench", "compare", good, bad]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_a_setting_that_an_earlier_version_lacks_is_its_default() -> None:
    old, new = run_of([steady(3, 24)]), run_of([steady(3, 24)])
    new.settings["graphs"] = False
    compare(old, new)
    new.settings["graphs"] = True
    with pytest.raises(ValueError, match=r"differ in graphs \(False and True\)"):
        compare(old, new)


def test_files_that_cannot_be_read_or_written(tmp_path: Path, capsys: Any) -> None:
    good = results_file(tmp_path / "results.json", lambda v: None)
    assert main(["bench", "compare", good, str(tmp_path / "nosuch")]) == 2
    assert "nosuch cannot be read (No such file or directory)" in capsys.readouterr().err
    (tmp_path / "text").write_text("not JSON")
    assert main(["bench", "compare", str(tmp_path / "text"), good]) == 2
    assert "text is not a results.json" in capsys.readouterr().err
    for json_path in (tmp_path, tmp_path / "text" / "deeper.json"):
        assert main(["bench", "compare", good, str(tmp_path), "--json", str(json_path)]) == 2
        assert f"--json {json_path} cannot be written" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "text"]


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("5 %", 0.05), ("5", 0.05), ("0", 0.0),
                                             ("2.5%", 0.025), ("0.5%", 0.005)])  # fmt: skip
def test_per_cent(text: str, share: float) -> None:
    from blnet.bench.compare_command import percent

    assert percent(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0.05", "-5%", "nan", "inf", "1001", "five", "", "5%%", "1e2"])
def test_no_per_cent(text: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", "compare", "a", "b", f"--fail-if-slower={text}"])
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert f"{text!r} is no per cent from 0 to 1000; write it as 5%" in said
    assert said.count("\n") == 1


# ---------------------------------------------------------------------------- what is written


def many() -> Comparison:
    new = steady(FEW + 2, 24, 2)
    new[-1] *= 1.2
    return compare(run_of([steady(FEW + 2, 24, 1)]), run_of([new]), 0.05)


def test_of_many_rows_only_those_that_changed_are_shown(tmp_path: Path, capsys: Any) -> None:
    comparison = many()
    assert [row.verdict for row in shown(comparison)] == ["slower"]
    assert len(shown(comparison, everything=True)) == FEW + 2
    few = dataclasses.replace(comparison, rows=comparison.rows[-FEW:])
    assert len(shown(few)) == FEW
    new = steady(FEW + 2, 24, 2)
    new[-1] *= 1.2
    write_json(tmp_path / "old.json", run_of([steady(FEW + 2, 24, 1)]))
    write_json(tmp_path / "new.json", run_of([new]))
    words = ["bench", "compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert main([*words, "--fail-if-slower", "5%"]) == 1
    text = capsys.readouterr().out
    assert f"and {FEW + 1} rows more without a change" in text
    assert f"1 of {FEW + 2} implementations are slower by more than 5 %." in text
    assert main([*words, "--all", "--json", str(tmp_path / "out.json")]) == 0
    assert "rows more" not in capsys.readouterr().out
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["rows"][-1]["verdict"] == "slower"
    assert len(values["rows"]) == FEW + 2
    assert values["passed"] is False


def test_markdown_has_every_row() -> None:
    text = comparison_markdown(many())
    assert text.count("family, way") == FEW + 2
    assert "| suite, group 0 | family, way 0 (control) |" in text
    assert "| slower |" in text
    assert "| suite, group 0 | 2 | " in text  # how much the controls moved


def test_equal_times_do_not_blind_the_gate() -> None:
    draw = np.random.default_rng(3)
    old, new = 1 + 0.01 * draw.random((2, 45, 8))
    new[5:] *= 3
    tied = old.copy()
    tied[0, 1] = tied[0, 0]
    for before in (old, tied, np.round(old, 2)):
        comparison = compare(run_of([before]), run_of([new]), 0.05, resamples=200)
        assert len(comparison.of("slower")) == 40
        assert not comparison.passed


def test_equal_runs_of_a_coarse_clock_are_the_same() -> None:
    draw = np.random.default_rng(4)
    old, new = np.round(1 + 0.01 * draw.random((2, 45, 24)), 3)
    assert compare(run_of([old]), run_of([new]), resamples=200).of("slower") == []


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
