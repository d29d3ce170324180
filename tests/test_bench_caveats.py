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
from blnet.bench.report.cells import FEW_ROUNDS
from blnet.bench.report.page import html_page
from blnet.bench.results import LEASHED, Check, Layer, Measurement, Network, Results
from blnet.bench.settings import Settings, resolve
from blnet.bench.summary import model_rows
from blnet.environment import collect

BL = "bl_resnet50 a2 b4"
ROUNDS = 5
PASSED = "the rates measured in this run are a lower estimate"


def model(family: str, rung: str, seconds: float | None, **more: Any) -> Measurement:
    """A rung at batch 8; without seconds it failed."""
    facts = {"network": family.split()[0], "batch": 8, **more.pop("facts", {})}
    values = {"status": "error" if seconds is None else "ok", "check": Check(1e-6, 1e-3, "x")}
    samples = [] if seconds is None else [seconds] * ROUNDS
    return Measurement("models", "batch 8", family, rung, facts=facts, samples=samples,
                       **{**values, **more})  # fmt: skip


def merge(name: str, seconds: float, baseline: bool) -> Measurement:
    facts = {"site": "s", "pass": "forward", "batch": 8, "bytes": 10**9, "baseline": baseline}
    return Measurement("merge", "s, forward", "s", name, facts=facts, samples=[seconds] * ROUNDS,
                       status="ok", check=Check(1e-8, 1e-5, "x"))  # fmt: skip


@pytest.fixture
def results() -> Results:
    found = Results(
        {**collect("cpu").as_dict(), "device": "Test CPU"},
        resolve(Settings(device="cpu")).as_dict(),
        ceilings={"copy_bandwidth": 40e9, "matmul_rate": 1e12},
    )
    found.networks = [
        Network("resnet50", "resnet50", None, None, "resnet50", 25_557_032, 4_089_000_000),
        Network(BL, "bl_resnet50", 2, 4, "resnet50", 26_689_256, 2_044_500_000),
    ]
    found.measurements = [
        model("resnet50", "eager", 0.4),
        model("resnet50", "folded", 0.3),
        model(BL, "eager", 0.25),
        model(BL, "folded", 0.2),
        merge("eager", 0.2, True),
        merge("blnet", 0.05, False),
    ]
    return found


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


# ---------------------------------------------------------------------------- too few rounds


def test_too_few_rounds_are_told_and_no_interval_or_verdict_is(
    results: Results, tmp_path: Path
) -> None:
    assert not any(FEW_ROUNDS in text for text in said_of(results))
    assert "1.50x [1.50, 1.50] as fast as resnet50 at batch 8 (" in said_of(results)[2]
    assert "clearly faster than the fastest of PyTorch's ways in 1 of 1" in said_of(results)[2]
    for text in said_of(few(results)):
        assert FEW_ROUNDS in text
        assert not re.search(r"\d\.\d\dx \[", text)
    page = said_of(results)[2]
    assert "1.50x as fast as resnet50 at batch 8, in too few rounds to be sure, (" in page
    assert "clearly faster than the fastest of PyTorch's ways in 0 of 1" in page
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
