"""What the reports say beside their figures: lesser baselines, too few rounds, bounds passed."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blnet.bench import report
from blnet.bench.report import figures, layers, plots, series
from blnet.bench.report.cells import FEW_ROUNDS, share_text
from blnet.bench.report.page import html_page
from blnet.bench.results import LEASHED, Layer, Measurement, Results
from blnet.bench.summary import model_rows
from helpers import results as made_up
from helpers.results import BIG_LITTLE as BL

ROUNDS = 5
PASSED = "the rates measured in this run are a lower estimate"


def model(family: str, rung: str, seconds: float | None, **more: Any) -> Measurement:
    """A rung at batch 8; without seconds it failed."""
    status = "error" if seconds is None else "ok"
    samples = [] if seconds is None else [seconds] * ROUNDS
    return made_up.model(family, 8, rung, samples, **{"status": status, **more})


def merge(name: str, seconds: float, baseline: bool) -> Measurement:
    return made_up.merge(name, [seconds] * ROUNDS, baseline)


@pytest.fixture
def results() -> Results:
    return made_up.report_of(
        [
            model("resnet50", "eager", 0.4),
            model("resnet50", "folded", 0.3),
            model(BL, "eager", 0.25),
            model(BL, "folded", 0.2),
            merge("eager", 0.2, True),
            merge("blnet", 0.05, False),
        ],
        ceilings={"copy_bandwidth": 40e9, "matmul_rate": 1e12},
    )


def few(results: Results, rounds: int = 4) -> Results:
    """Leave so many rounds of every measurement."""
    for m in results.measurements:
        m.samples = m.samples[:rounds]
    return results


def printed(results: Results) -> str:
    console = Console(width=132, record=True, file=io.StringIO())
    report.print_tables(results, console)
    return " ".join(console.export_text().split())


def said_of(results: Results) -> tuple[str, str, str]:
    """What the terminal, the Markdown and the page say, line breaks left out."""
    page = html_page([results]).replace("&#x27;", "'")
    return printed(results), " ".join(report.markdown(results).split()), " ".join(page.split())


# ---------------------------------------------------------------------------- lesser baselines


@pytest.mark.parametrize("status", ["error", "wrong", "dropped", "skipped"])
def test_a_plain_network_without_its_best_rung_is_told_beside_the_speed_up(
    results: Results, status: Any
) -> None:
    note = "resnet50 has no time on folded at batch 8, so speed-ups there may be over a lesser rung"
    assert not any(note in text for text in said_of(results))
    results.measurements[1].status = status
    ours = model_rows(results)[1].batches[8]
    assert (ours.baseline_rung, ours.lacking) == ("eager", ("folded",))
    assert all(note in text for text in said_of(results))
    page = said_of(results)[2]
    assert "(on folded, over resnet50's eager; it has no time on folded)" in page
    assert "<td>resnet50, eager; it has no time on folded</td>" in re.sub(r"<td [^>]*", "<td", page)


def test_a_rung_that_no_network_has_or_that_is_slow_is_not_missed(results: Results) -> None:
    for family in ("resnet50", BL):
        results.measurements.append(model(family, "openvino", None, status="skipped"))
    results.measurements += [
        model("resnet50", "compile", None, status="dropped", facts={LEASHED: 2.0}),
        model(BL, "compile", 0.24),
        model("resnet50", "blnet kernels", None, facts={"ours": True}),
        model(BL, "blnet kernels", 0.1, facts={"ours": True}),
    ]
    assert [row.batches[8].lacking for row in model_rows(results)] == [(), ()]
    results.measurements.append(model(BL, "onnx", 0.24))  # of which the plain network knows nothing
    assert [row.batches[8].lacking for row in model_rows(results)] == [(), ("onnx",)]


def test_a_rung_that_failed_for_both_networks_is_told_all_the_same(results: Results) -> None:
    """Out of memory on both, but which of them would have gained more?"""
    results.measurements += [model(family, "onnx", None) for family in ("resnet50", BL)]
    assert model_rows(results)[1].batches[8].lacking == ("onnx",)


# ---------------------------------------------------------------------------- an op's baselines


OPS_OVER = "Speed-ups are over the fastest of PyTorch's eager and compile at the same site and pass"


def test_a_legend_says_what_the_columns_of_an_op_are(results: Results) -> None:
    results.measurements.append(merge("compile", 0.3, True))
    for text in said_of(results):
        assert f"{OPS_OVER}, with 95 % intervals in brackets." in text
        assert "Of bound is the least time that the rates measured in this run allow" in text
        assert "GB/s and TFLOP/s count what any implementation must move and multiply." in text
        assert "is the baseline" in text
    results.ceilings = {}
    assert not any("Of bound is" in text for text in said_of(results))


def test_the_baseline_of_an_op_need_not_be_pytorch_s(results: Results) -> None:
    results.measurements[4].implementation = "librosa"
    assert all("Speed-ups are over librosa at the same site" in text for text in said_of(results))
    assert "ours is clearly faster than librosa in 1 of 1 measurements" in said_of(results)[2]


@pytest.mark.parametrize("status", ["error", "wrong", "dropped", "skipped"])
def test_an_op_s_baseline_that_is_lost_is_told(results: Results, status: Any) -> None:
    lesser = (
        "The baseline has no time on eager at s, forward, so speed-ups there may be over a lesser"
    )
    none = "The baseline has no time at s, forward, so there is no speed-up there."
    compiled = merge("compile", 0.3, True)
    results.measurements.append(compiled)
    assert not any(lesser in text or none in text for text in said_of(results))
    results.measurements[4].status = status
    assert all(lesser in text for text in said_of(results))
    assert "in 1 of 1 measurements" in said_of(results)[2]
    assert said_of(results)[2].count(lesser) == 2, "in the summary and below the table"
    compiled.status = status
    for text in said_of(results):
        assert none in text
        assert lesser not in text
    assert f"merge has no speed-up. {none}" in said_of(results)[2]
    compiled.status, results.measurements[5].status = "ok", status
    assert (
        "merge has no speed-up. Ours has no time. The baseline has no time on eager"
        in said_of(results)[2]
    )
    results.measurements[4].status = "ok"
    assert "merge has no speed-up. Ours has no time." in said_of(results)[2]


def test_an_op_s_baseline_that_was_dropped_as_slow_is_not_missed(results: Results) -> None:
    slow = merge("compile", 9.0, True)
    slow.status, slow.samples, slow.facts[LEASHED] = "dropped", [], 9.0
    results.measurements.append(slow)
    assert not any("The baseline has no time" in text for text in said_of(results))
    results.measurements[4].status = "error"
    assert all("The baseline has no time at s, forward" in text for text in said_of(results))


def test_places_where_an_op_lost_its_baseline_are_named_once(results: Results) -> None:
    for group in ("t, forward", "t, both"):
        more = merge("eager", 0.2, True), merge("compile", 0.2, True), merge("blnet", 0.05, False)
        for m in more:
            m.group = group
        more[1].status = "error"
        results.measurements += more
    for text in said_of(results):
        assert "has no time on compile at t, forward and t, both, so speed-ups" in text


# ---------------------------------------------------------------------------- too few rounds


def test_too_few_rounds_are_told_and_no_interval_or_verdict_is(
    results: Results, tmp_path: Path
) -> None:
    assert not any(FEW_ROUNDS in text for text in said_of(results))
    assert "1.50x [1.50, 1.50] as fast as resnet50 at batch 8 (" in said_of(results)[2]
    assert "clearly faster than PyTorch's eager in 1 of 1" in said_of(results)[2]
    for text in said_of(few(results)):
        assert FEW_ROUNDS in text
        assert not re.search(r"\d\.\d\dx \[", text)
    page = said_of(results)[2]
    assert "1.50x as fast as resnet50 at batch 8, in too few rounds to be sure, (" in page
    assert "clearly faster than PyTorch's eager in 0 of 1" in page
    lines = list(csv.DictReader(io.StringIO(report.csv_text(results))))
    assert [lines[3][name] for name in ("speedup_low", "speedup_high")] == ["", ""]
    points = series.points(results, "models")
    assert points[0].ends == (points[0].speedup.value,) * 2
    bars = figures.speedups([("models", points)]).data[1]["error_y"]
    assert (bars["array"], bars["arrayminus"]) == ([0.0], [0.0])
    assert plots.plot_networks(results, "models", tmp_path / "models.png")


# ---------------------------------------------------------------------------- bounds passed


def test_a_bound_that_was_passed_is_told(results: Results) -> None:
    assert not any(PASSED in text for text in said_of(results))
    results.ceilings["copy_bandwidth"] = 18e9  # 1 GB takes 55.6 ms, and ours 50
    texts = said_of(results)
    assert all(f"Up to 111% of a bound was reached: {PASSED}" in text for text in texts)


def test_a_network_that_passes_its_bound_is_told(results: Results) -> None:
    layer = Layer("conv", "Conv2d", (8, 64, 28, 28), 10**9, 10**7, 0.21, 0.2)
    results.layers = {"models, batch 8": {BL: [layer]}}
    said = layers.reading(results, "models, batch 8", BL)
    assert said.endswith(f"105% of the bound, layer by layer 200.0 ms. {layers.PASSED}")
    assert all(layers.PASSED in text for text in said_of(results))
    results.layers["models, batch 8"][BL][0] = Layer(
        "conv", "Conv2d", (8, 64, 28, 28), 10**9, 10**7, 0.2, 0.2
    )
    assert layers.PASSED not in layers.reading(results, "models, batch 8", BL)


# ---------------------------------------------------------------------------- where and how much


@pytest.mark.parametrize(("threads", "said"), [(1, "1 thread"), (2, "2 threads")])
def test_an_op_s_table_says_where_and_at_which_batch(
    threads: int, said: str, results: Results
) -> None:
    results.environment |= {"cpu": "Some CPU", "threads": threads}
    results.measurements = list(results.of("merge"))
    results.measurements[1].facts["batch"] = 4  # halved, and the table must not hide it
    terminal, text, page = said_of(results)
    where = f"Some CPU, {said}, float32"
    assert f"merge; {where}" in terminal
    assert f"## merge {where}." in text
    assert f"{where}." in page
    assert re.search(r"s forward 4 blnet", terminal)
    assert "| s | forward | 4 | blnet |" in text
    assert re.search(r"forward</td><td[^>]*>4</td><td[^>]*>blnet</td>", page)


def test_the_precision_of_an_op_is_its_own(results: Results) -> None:
    results.settings["dtype"] = "bfloat16"
    results.environment["threads"] = 2
    results.measurements = list(results.of("merge"))
    assert all("threads, bfloat16" in text for text in said_of(results))
    for m in results.measurements:
        m.facts["dtype"] = "float32"
    terminal, text, page = said_of(results)
    assert "threads, bfloat16" not in terminal + page
    assert "## merge Test CPU" in text.replace(results.environment["cpu"], "Test CPU")
    assert all("threads, float32" in said for said in (terminal, text, page))


def test_a_batch_at_which_the_plain_network_has_no_time_is_told(results: Results) -> None:
    for family, seconds in (("resnet50", 0.1), (BL, 0.05)):
        results.measurements.append(made_up.model(family, 1, "eager", [seconds] * ROUNDS))
    told = "Speed-ups are over the fastest rung of resnet50: eager at batch 1 and {} at batch 8"
    assert all(told.format("folded") in text for text in said_of(results))
    for m in results.measurements[:2]:
        m.status = "error"
    none = told.format("none").replace(" and none", ", none")
    assert all(f"{none}, so there is no speed-up there." in text for text in said_of(results))
    assert "It has no speed-up at batch 8." in said_of(results)[2]


def test_a_small_share_is_not_rounded_to_nothing() -> None:
    shares = (0.0004, 0.004, 0.02, 0.996, 1.11)
    assert [share_text(share) for share in shares] == ["0.04%", "0.4%", "2%", "100%", "111%"]
    assert share_text(None) == "-"
