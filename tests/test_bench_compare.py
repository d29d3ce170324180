"""Comparison of runs: its verdicts, and how often it errs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blnet.bench.changes import corrected
from blnet.bench.compare import ALPHA, compare, is_control
from blnet.bench.intervals import median_ratio
from blnet.bench.report.comparison import comparison_markdown
from blnet.bench.results import Measurement, read_json, write_json
from blnet.cli import main
from helpers.results import Array, drawn, run_of, steady

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
