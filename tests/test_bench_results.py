"""The numbers of the tables, and the tables themselves."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from blnet.bench import report
from blnet.bench.report import cells, plots, series
from blnet.bench.results import (
    Check,
    Measurement,
    Network,
    Results,
)
from blnet.bench.summary import ModelRow, model_rows, op_rows, op_suites, share_rows
from helpers.results import BIG_LITTLE as BL
from helpers.results import merge, model, report_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def results() -> Results:
    nan = Check(math.nan, 1e-3, "float64")
    return report_of(
        [
            model("resnet50", 1, "eager", [0.06] * 5),
            model("resnet50", 1, "folded", [0.05] * 5),
            model(BL, 1, "eager", [0.04] * 5),
            model("resnet50", 8, "eager", [0.4] * 5),
            model(
                "resnet50", 8, "folded", [], status="wrong", check=nan, note="relative error nan"
            ),
            model(BL, 8, "eager", [0.25] * 5),
            model(BL, 8, "folded", [0.2] * 5),
            merge("eager", [0.2] * 5, True),
            merge("compile", [0.1] * 5, True),
            merge("blnet", [0.05] * 5, False, note="on a CPU"),
        ]
    )


def test_the_speed_up_is_over_the_fastest_rung_with_a_time(results) -> None:
    plain, ours = model_rows(results)
    assert plain.batches[1].rung == "folded"
    assert plain.batches[8].rung == "eager"  # the wrong one does not count
    assert plain.batches[1].speedup is None
    assert ours.mac_ratio == 2.0
    one, eight = ours.batches[1], ours.batches[8]
    assert (one.speedup.value, one.baseline_rung) == (pytest.approx(1.25), "folded")
    assert (eight.speedup.value, eight.rung) == (pytest.approx(2.0), "folded")
    assert one.realised.value == pytest.approx(0.625)
    assert eight.realised.value == pytest.approx(1.0)
    assert eight.throughput == pytest.approx(40.0)


def test_a_share_is_of_the_same_rung_on_both_sides(results) -> None:
    results.measurements.append(model(BL, 1, "compile", [0.01] * 5))
    one, eight = share_rows(results, "models", model_rows(results))
    assert (one.network.label, one.batch, eight.batch) == (BL, 1, 8)
    # Only ours was compiled, and of the plain network's folded rung nothing was right at batch 8.
    assert set(one.shares) == set(eight.shares) == {"eager"}
    assert one.shares["eager"].value == pytest.approx(0.06 / 0.04 / 2)
    assert eight.shares["eager"].value == pytest.approx(0.4 / 0.25 / 2)
    results.networks[0] = replace(results.networks[0], macs=0)  # were not counted
    assert share_rows(results, "models", model_rows(results)) == []


def test_the_table_of_shares_has_a_column_for_each_rung_in_order(results) -> None:
    for batch, rungs in ((1, ("kernels",)), (8, ("compile", "kernels"))):
        pairs = [(name, rung) for name in ("resnet50", BL) for rung in rungs]
        results.measurements += [model(name, batch, rung, [0.1] * 5) for name, rung in pairs]
    text = report.markdown(results).partition("### Saved time")[2].partition("###")[0]
    half = "0.50 [0.50, 0.50]"
    assert "| network | batch | eager | compile | kernels |" in text
    assert f"| {BL} | 1 | 0.75 [0.75, 0.75] | - | {half} |" in text
    assert f"| {BL} | 8 | 0.80 [0.80, 0.80] | {half} | {half} |" in text
    assert "| resnet50 |" not in text
    console = Console(width=132, record=True, file=io.StringIO())
    report.print_tables(results, console)
    printed = console.export_text().partition("saved time over saved arithmetic")[2]
    assert re.search(r"a2 b4 +8 +0\.80 +0\.50 +0\.50", printed)
    results.measurements = [m for m in results.measurements if m.family != BL]
    assert "### Saved time" not in report.markdown(results)


def test_a_network_without_times_keeps_its_row(results) -> None:
    for m in results.measurements:
        if m.family == "resnet50":
            m.status = "error"
    plain, ours = model_rows(results)
    assert plain.batches == {}
    assert ours.batches[8].speedup is None
    assert ours.batches[8].seconds == 0.2


def test_op_rows(results) -> None:
    assert op_suites(results) == ["merge"]
    rows = {row.measurement.implementation: row for row in op_rows(results, "merge")}
    assert rows["compile"].fastest_baseline
    assert rows["blnet"].bandwidth == pytest.approx(20e9)
    assert rows["blnet"].speedup.value == pytest.approx(2.0)
    assert rows["blnet"].share is rows["blnet"].rate is None
    results.ceilings["copy_bandwidth"] = 40e9
    rows = {row.measurement.implementation: row for row in op_rows(results, "merge")}
    assert rows["blnet"].share == pytest.approx(0.5)


def test_the_bound_of_an_op_is_the_longer_of_moving_and_multiplying(results) -> None:
    results.ceilings.update(copy_bandwidth=40e9, matmul_rate=10e9)
    for m in results.of("merge"):
        m.facts["flops"] = 4e8
    rows = {row.measurement.implementation: row for row in op_rows(results, "merge")}
    assert rows["blnet"].rate == pytest.approx(8e9)
    assert rows["blnet"].share == pytest.approx(0.8)  # 0.5 for the bytes
    assert "Rate of a matrix product in this run: 0.01 TFLOP/s" in report.markdown(results)


def test_the_printed_table_has_the_numbers(results) -> None:
    console = Console(width=150, record=True, file=io.StringIO())
    report.print_tables(results, console)
    text = console.export_text()
    ours = next(line for line in text.splitlines() if "bl_resnet50" in line).split()
    assert ours[1:8] == ["2", "4", "26.69", "2.045", "2.00", "40.00", "40.0"]
    assert ours[8:13] == ["1.25x", "0.62", "2.00x", "1.00", "250"]
    assert "FAILED models, batch 8, resnet50, folded: relative error nan" in text
    assert "over the fastest rung of resnet50: folded at batch 1 and eager at batch 8" in text
    assert "…" not in text


def test_the_printed_table_fits_132_columns(results) -> None:
    for m in results.measurements:
        m.implementation = "compile, frozen" if m.implementation == "folded" else m.implementation
    console = Console(width=132, record=True, file=io.StringIO())
    report.print_tables(results, console)
    table = console.export_text().partition("Speed-ups are")[0]
    assert " bl_resnet50 " in table, "a name was folded"
    assert "[1.25, 1.25]" in table
    assert max(map(len, table.splitlines())) <= 132


@pytest.mark.parametrize("kept", [{1}, {8}, {1, 8}, set()])
def test_the_columns_are_those_of_the_batches_that_have_times(results, kept: set[int]) -> None:
    """A halved batch is not the one asked for, and the table must not be empty there."""
    results.settings["batch"] = 16
    results.measurements = [m for m in results.measurements if m.facts["batch"] in kept]
    rows = model_rows(results)
    batches = cells.batches_of(rows)
    header = cells.model_header(batches)
    assert len(set(header)) == len(header)
    assert [name for name in header if name.startswith("speed-up")] == [
        f"speed-up b{batch} [95 %]" for batch in sorted(kept) or [1]
    ]
    for row in rows:
        shown = dict(zip(header, cells.model_cells(batches, row), strict=True))
        assert (cells.NOTHING in shown[f"images/s b{batches[-1]}"]) == (not row.batches)


def test_failures_are_red(results) -> None:
    console = Console(width=150, file=io.StringIO(), force_terminal=True, color_system="standard")
    report.print_tables(results, console)
    line = next(s for s in console.file.getvalue().splitlines() if "FAILED" in s)
    assert "\x1b[1;31m" in line


def test_markdown_has_every_rung(results) -> None:
    results.interrupted = True
    text = report.markdown(results)
    assert "interrupted" in text
    assert (
        "| bl_resnet50 | 2 | 4 | 26.69 | 2.045 | 2.00 | 40.00 | 40.0 | 1.25x [1.25, 1.25] | 0.62 | "
        "2.00x [2.00, 2.00] | 1.00 | 250 |" in text
    )
    assert "| resnet50 | 8 | folded | - | - | - | 0 | nan |" in text
    assert "wrong: relative error nan" in text
    assert f"| {BL} | 8 | folded | 200.0 | 200.0 | 200.0 | 5 |" in text
    assert "| s | forward | 8 | blnet | 50.00 | 20.0 | - | 2.00x [2.00, 2.00] | 1e-08 |" in text
    assert f"- python: {results.environment['python']}" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {15, 12, 10, 4}


def fail_of(results: Results, suite: str, group: str) -> None:
    """Add what a session keeps of a group that could not be built: measurements without facts."""
    own = {(m.family, m.implementation) for m in results.of(suite)}
    results.measurements += [
        Measurement(suite, group, *names, status="error", note="no such thing")
        for names in sorted(own)
    ]


@pytest.mark.parametrize("suite", ["models", "merge"])
def test_a_group_that_could_not_be_built_is_reported(results, suite: str, tmp_path: Path) -> None:
    fail_of(results, suite, "batch 16")
    fail_of(results, suite, "batch 32")
    written = report.write_all(results, tmp_path)
    assert not written.notes
    assert {"report.md", "report.html", "models.png", "merge.png"} <= set(written.files)
    console = Console(width=200, record=True, file=io.StringIO())
    report.print_tables(results, console)
    family, count = {"models": (BL, 2), "merge": ("s", 3)}[suite]
    line = f"{suite}, batch 16 and batch 32, {family}, {count} implementations: no such thing"
    text = (tmp_path / "report.md").read_text()
    assert text.count("no such thing") >= 1
    assert text.count(f"- **Failed**: {line}\n") == 1
    assert console.export_text().count(f"FAILED {line}") == 1
    page = (tmp_path / "report.html").read_text()
    failures = 1 + 2 * {"models": 4, "merge": 3}[suite]
    reasons = {"models": 3, "merge": 2}[suite]
    assert f"{failures} measurements failed, for {reasons} reasons, and got no time" in page
    assert f"<li>{line}</li>" in page


def test_a_network_is_named_with_what_sets_it_apart() -> None:
    for label, text in (
        ("bl_resnet22 a4 b1", "bl_resnet22"),
        ("bl_resnet22 a4 b1 pyramid", "bl_resnet22 pyramid"),
    ):
        row = ModelRow(Network(label, "bl_resnet22", 4, 1, "resnet22", 3_000_000, 10**9), None)
        assert cells.model_cells([1], row)[0] == text


def test_a_batch_that_was_halved_is_not_mixed_with_another_group(results) -> None:
    halved = [model(BL, 1, "eager", [0.001] * 3), model("resnet50", 1, "eager", [0.002] * 3)]
    for m in halved:
        m.group = "batch 2"
    results.measurements += halved
    assert model_rows(results)[1].batches[1].seconds == 0.04
    assert series.ladders(results, "models", 1)[0].start == 0.06
    lines = list(csv.DictReader(io.StringIO(report.csv_text(results))))
    assert [line["speedup"] for line in lines if line["group"] == "batch 2"] == ["", ""]


def test_the_size_is_that_of_the_input(results, tmp_path: Path) -> None:
    results.settings["input"] = [3, 96, 64]
    assert cells.measured_on(results).endswith("float32, 96x64 pixels")
    assert "96x64 pixels; " in report.markdown(results)
    results.measurements = list(results.of("merge"))  # sites have sizes of their own
    assert "pixels" not in report.markdown(results).partition("## Merge")[0].splitlines()[2]


def test_the_plot_of_an_op_names_no_size(results, monkeypatch, tmp_path: Path) -> None:
    titles = []
    monkeypatch.setattr(plots, "_write", lambda figure, axes, path: titles.append(axes.get_title()))
    plots.plot_op(results, "merge", tmp_path / "merge.png")
    assert titles[0].startswith("merge: ")
    assert "pixels" not in titles[0]


def test_csv_has_a_line_for_each_measurement(results) -> None:
    rows = list(csv.DictReader(io.StringIO(report.csv_text(results))))
    assert len(rows) == len(results.measurements)
    last = rows[6]
    assert (last["family"], last["implementation"], last["rounds"]) == (BL, "folded", "5")
    assert float(last["p50_ms"]) == pytest.approx(200.0)
    assert float(last["images_per_s"]) == pytest.approx(40.0)
    assert (float(last["speedup"]), float(last["realised"])) == pytest.approx((2.0, 1.0))
    assert float(rows[2]["realised"]) == pytest.approx(0.625)
    assert float(last["speedup_low"]) <= float(last["speedup"]) <= float(last["speedup_high"])
    assert [row["speedup"] for row in (rows[0], rows[1], rows[5], rows[8])] == [""] * 4
    assert (rows[4]["status"], rows[4]["p50_ms"]) == ("wrong", "")


def test_csv_names_the_device_and_has_the_speed_ups_of_ops(results) -> None:
    results.environment |= {"cpu": "Some CPU", "threads": 1}
    rows = list(csv.DictReader(io.StringIO(report.csv_text(results))))
    assert {row["device"] for row in rows} == {"Some CPU, 1 thread"}
    eager, compiled, ours = (row for row in rows if row["suite"] == "merge")
    for row, speedup in ((eager, 0.5), (ours, 2.0)):
        ends = [float(row[f"speedup{end}"]) for end in ("_low", "", "_high")]
        assert ends == pytest.approx([speedup] * 3)
        assert row["realised"] == ""
    assert compiled["speedup"] == "", "the fastest baseline, which the others are held against"
    results.settings["device"], results.environment["device"] = "cuda", "Some GPU"
    assert report.csv_text(results).splitlines()[1].startswith("Some GPU,models,batch 1,")


def test_an_empty_run_has_a_report(results) -> None:
    results.measurements, results.networks = [], []
    assert "# Big-Little Net" in report.markdown(results)
    report.print_tables(results, Console(file=io.StringIO()))
