"""The report as one HTML file, without a browser."""

from __future__ import annotations

import base64
import csv
import dataclasses
import gzip
import io
import json
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.graph_objects import Figure

from blnet.bench.report import figures, plots, series
from blnet.bench.report import page as page_module
from blnet.bench.report.elements import script_json
from blnet.bench.report.page import LIMIT, html_page
from blnet.bench.results import Check, Layer, Network, Results, read_json, write_json
from blnet.bench.summary import NETWORK_SUITES, model_rows, share_rows
from helpers.results import BIG_LITTLE as BL
from helpers.results import merge, model, report_of, spread

KEPT = Path(__file__).resolve().parents[1] / "bench" / "results"
EVIL = "</script><img src=x onerror=alert(1)>\"'&{{style}}"
VOID = {"meta", "link", "input", "img", "br"}


class Reader(HTMLParser):
    """Reads a page: its elements, the rows of its tables, its scripts, and that all is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[str, float | None]]]] = {}
        self.texts: dict[str, str] = {}
        self.table = self.name = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = found.get("id") or "facts"
            self.tables[self.table] = []
        if tag == "tr":
            self.tables[self.table].append([])
        if tag in ("td", "th"):
            value = found.get("data-value")
            self.tables[self.table][-1].append(("", None if value is None else float(value)))
        if tag == "script":
            self.name = found.get("id") or "code"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            row = self.tables[self.table][-1]
            row[-1] = (row[-1][0] + data, row[-1][1])
        if self.open and self.open[-1] == "script":
            self.texts[self.name] = self.texts.get(self.name, "") + data

    def unpacked(self, name: str) -> str:
        return gzip.decompress(base64.b64decode(self.texts[name])).decode()

    def values(self, table: str) -> set[float]:
        return {value for row in self.tables[table] for _, value in row if value is not None}


@pytest.fixture
def results() -> Results:
    found = report_of(
        [
            model("resnet50", 1, "eager", spread(0.06)),
            model("resnet50", 1, "folded", spread(0.05)),
            model("resnet50", 1, "blnet kernels, graph", spread(0.045)),
            model(BL, 1, "eager", spread(0.04)),
            model(BL, 1, "folded", spread(0.032)),
            model(BL, 1, "blnet kernels, graph", spread(0.02)),
            model("resnet50", 8, "eager", spread(0.4)),
            model(BL, 8, "eager", spread(0.25)),
            merge("eager", spread(0.2, 0.05), True),
            merge("blnet", spread(0.05, 0.05), False),
        ],
        ceilings={"copy_bandwidth": 40e9, "matmul_rate": 1e12},
    )
    layer = Layer("stages.0.big", "Conv2d", (8, 64, 28, 28), 10**9, 10**7, 0.001, 0.004)
    found.layers = {"models, batch 8": {BL: [layer, Layer("fc", "Linear", (8, 10), 9, 9, 1e-6)]}}
    return found


@pytest.fixture
def folder(results: Results, tmp_path: Path) -> Path:
    write_json(tmp_path / "run" / "results.json", results)
    return tmp_path / "run"


def test_the_page_is_one_file_below_its_limit(results: Results) -> None:
    text = html_page([results])
    assert len(text.encode()) < LIMIT <= 6_000_000
    found = Reader(text)
    for tag, attributes in found.elements:
        assert tag not in ("iframe", "object", "base")
        assert not attributes.get("src")
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
        assert not any(name.startswith("on") for name in attributes), tag
    assert "@import" not in text
    assert "url(" not in text
    policy = [a["content"] for tag, a in found.elements if a.get("http-equiv")]
    assert "default-src 'none'" in policy[0]
    assert found.unpacked("plotly").lstrip().startswith("/**\n* plotly.js")
    names = [a["id"] for _, a in found.elements if a.get("id")]
    assert len(names) == len(set(names))
    assert html_page([results]) == text, "the same results make the same file"


def test_all_numbers_of_the_results_stand_in_the_page(results: Results) -> None:
    found = Reader(html_page([results]))
    rows = found.tables["raw-table"][1:]
    assert [row[0][0] for row in rows] == [m.family for m in results.measurements]
    for m, row in zip(results.measurements, rows, strict=True):
        values = [value for _, value in row if value is not None]
        wanted = [*(m.quantile(p) for p in (20, 50, 90)), len(m.samples), m.check.error]
        assert values[:5] == wanted
    plain, ours = model_rows(results)
    gains = [row.batches[b].speedup.value for row, b in ((plain, 1), (ours, 1), (ours, 8))]
    assert set(gains) <= found.values("speedups-table")
    assert set(gains) | {plain.network.macs, ours.mac_ratio} <= found.values("r0-models-times")
    assert ours.batches[1].architecture.value in found.values("r0-models-gains")
    compared = share_rows(results, "models", [plain, ours])
    shares = {share.value for row in compared for share in row.shares.values()}
    assert shares
    assert shares <= found.values("r0-models-shares")
    assert {1e9 / results.measurements[-1].median} <= found.values("r0-op0-ops")
    assert {0.001, 0.004, 0.003} <= found.values("r0-layers-0")


def test_the_raw_data_are_the_files(results: Results, folder: Path) -> None:
    results.measurements[0].check = Check(math.nan, 1e-3, "float64")
    write_json(folder / "results.json", results)
    found = Reader(html_page([results]))
    assert found.unpacked("r0-json") == (folder / "results.json").read_text()
    lines = list(csv.DictReader(io.StringIO(found.unpacked("r0-csv"))))
    assert [line["implementation"] for line in lines] == [
        m.implementation for m in results.measurements
    ]


def test_samples_that_would_not_fit_are_left_out(results: Results, monkeypatch) -> None:
    monkeypatch.setattr(page_module, "LIMIT", 1000)
    text = html_page([results])
    kept = json.loads(Reader(text).unpacked("r0-json"))
    assert all(m["samples"] == [] and m["quantiles"]["p50"] > 0 for m in kept["measurements"])
    assert "single times are left out" in text


def test_the_first_sentence_says_how_much_faster_on_what_against_what(results: Results) -> None:
    text = html_page([results])
    one, eight = (model_rows(results)[1].batches[b].speedup for b in (1, 8))
    sentence = re.search(r"<p>(bl_resnet50 a2 b4 runs [^<]*)</p>", text)
    assert sentence is not None
    said = sentence[1].replace("&#x27;", "'")
    assert f"runs {one.value:.2f}x [{one.low:.2f}, {one.high:.2f}] as fast as resnet50" in said
    assert f"{eight.value:.2f}x [" in said
    assert "at batch 1 (on blnet kernels, graph, over resnet50's folded)" in said
    assert "float32, 224x224 pixels. It has 2.00 times fewer multiply-adds." in said


def test_a_slower_network_is_called_slower(results: Results) -> None:
    for m in results.measurements:
        if m.family == BL:
            m.samples = [sample * 3 for sample in m.samples]
    assert "at batch 8, which is slower, (" in html_page([results])


def test_large_figures_say_what_they_are_over(results: Results) -> None:
    eight = model_rows(results)[1].batches[8].speedup
    shown = f"<b>{eight.value:.2f}x</b> <span>resnet50, batch 8</span>"
    assert shown in html_page([results])


def test_points_are_named_in_every_plot_of_speed_ups(results: Results, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "_write", lambda figure, axes, path: drawn.append(axes))
    plots.plot_networks(results, "models", Path("models.png"))
    points = series.points(results, "models")
    assert [text.get_text() for text in drawn[0].texts] == [point.label for point in points]
    few = figures.speedups([("models", points)])
    assert few.data[1]["text"] == [point.label for point in points]
    many = figures.speedups(
        [(f"run {n}", [dataclasses.replace(p, batch=10 * n + p.batch) for p in points])
         for n in range(7)]
    )  # fmt: skip
    names = [text for trace in many.data[1:] for text in trace["text"] if text]
    assert sorted(names) == sorted({point.label for point in points}), "each at its highest point"
    assert many.height > few.height, "lines of a legend take nothing of the plot"


def test_steps_multiply_to_the_whole(results: Results) -> None:
    plain, ours = series.ladders(results, "models", 1)
    assert [name for name, _ in plain.steps] == ["folding", "CUDA graph"]
    assert [name for name, _ in ours.steps] == ["architecture", "folding", "CUDA graph"]
    for ladder in (plain, ours):
        product = math.prod(gain.value for _, gain in ladder.steps)
        assert product == pytest.approx(ladder.start / ladder.best)
    results.measurements = [m for m in results.measurements if m.implementation != "eager"]
    assert series.ladders(results, "models", 1) == [], "nothing that was not run gets a bar"


def check_plots(page: Reader) -> int:
    """Return how many plots a page has, of which each must be one that plotly takes."""
    figures = json.loads(page.texts["figures"])
    for name, figure in figures.items():
        Figure(figure)  # raises on a property that plotly does not know
        assert all("tone" in trace["meta"] for trace in figure["data"]), name
    return len(figures)


def test_plots_are_what_plotly_takes(results: Results) -> None:
    assert check_plots(Reader(html_page([results]))) >= 5


def test_names_of_a_file_are_text_and_never_markup(results: Results) -> None:
    results.networks[1] = Network(EVIL, EVIL, 2, 4, "resnet50", 1, 1_000)
    for m in results.measurements:
        m.family = EVIL if m.family == BL else m.family
        m.suite = EVIL if m.suite == "merge" else m.suite
        m.note = m.description = EVIL
    results.layers = {EVIL: {EVIL: results.layers["models, batch 8"][BL]}}
    results.notes = [EVIL]
    results.command = results.environment["device"] = results.settings["device"] = EVIL
    results.environment[EVIL] = {EVIL: EVIL}
    results.environment["cpu"] = EVIL
    text = html_page([results])
    found = Reader(text)
    assert "<img" not in text
    assert not [tag for tag, _ in found.elements if tag == "img"]
    assert any(row[0][0] == EVIL for row in found.tables["raw-table"])
    assert "</script" not in found.texts["figures"]
    assert "<" not in script_json({EVIL: EVIL})
    assert json.loads(script_json({EVIL: EVIL})) == {EVIL: EVIL}
    assert json.loads(found.unpacked("r0-json"))["command"] == EVIL
    plot = json.loads(found.texts["figures"])["r0-models-rungs-8"]
    assert "<" not in plot["data"][1]["name"], "plotly reads tags in its texts"


def test_several_runs_stand_side_by_side(results: Results) -> None:
    other = Results.from_dict(json.loads(json.dumps(results.as_dict())))
    other.environment["device"] = "Other GPU"
    found = Reader(html_page([results, other]))
    rows = found.tables["speedups-table"][1:]
    names = list(dict.fromkeys(row[0][0] for row in rows))
    assert [name.split(",")[0] for name in names] == ["Test CPU", "Other GPU"]
    assert len(rows) == 6
    assert len(found.tables["raw-table"]) == 1 + 2 * len(results.measurements)
    assert found.unpacked("r1-json") != found.unpacked("r0-json")
    assert {"r0-models-times", "r1-models-times"} <= set(found.tables)
    assert check_plots(found) > 10


def test_what_was_not_run_has_no_section(results: Results) -> None:
    text = html_page([results])
    assert 'href="#models"' in text
    assert 'href="#speech"' not in text
    assert 'href="#accuracy"' not in text
    results.measurements, results.networks, results.layers = [], [], {}
    text = html_page([results])
    Reader(text)
    assert "Nothing was compared in this run" in text
    assert "Nothing was measured" in text
    for name in ("models", "kernels", "layers"):
        assert f'id="{name}"' not in text


def test_an_interrupted_run_says_so_at_the_top(results: Results) -> None:
    assert "interrupted:" not in html_page([results])
    results.interrupted = True
    text = html_page([results])
    assert text.index("This run was interrupted") < text.index("<h2")


def test_failures_are_told_in_words(results: Results) -> None:
    wrong = model(BL, 8, "folded", [0.1], status="wrong", note="relative error 0.5")
    raised = model(BL, 8, "compile", [], status="error", note="no compiler")
    results.measurements += [wrong, raised]
    text = html_page([results])
    assert text.index("2 measurements failed") < text.index("<h2")
    rows = {row[2][0]: row for row in Reader(text).tables["r0-models-ladder"][1:] if row[1][1] == 8}
    assert rows["folded"][3][0] == "failed: wrong"
    assert rows["compile"][3][0] == "failed: error"
    assert rows["folded"][5] == ("-", None), "what was wrong has no time"
    assert text.count('<tr class="failed">') == 4  # in the ladder and in the raw data


@pytest.mark.parametrize("path", sorted(KEPT.glob("*/results.json")), ids=lambda p: p.parent.name)
def test_kept_runs_make_a_page(path: Path) -> None:
    found = read_json(path)
    read = Reader(html_page([found]))
    assert check_plots(read) >= 1
    assert len(read.tables["raw-table"]) == 1 + len(found.measurements)
    sections = {a["id"] for tag, a in read.elements if tag == "section"}
    suites = {m.suite for m in found.measurements}
    assert ("models" in sections) == bool(suites & {"models", "training"})
    assert ("speech" in sections) == bool(suites & {"speech", "speech_models"})
    assert ("accuracy" in sections) == bool(suites & {"accuracy", "conversion"})
    studied = [name for name in read.tables if name.endswith("-study")]
    assert len(studied) == len(suites & {"accuracy", "conversion", "speech"})
    if suites & set(NETWORK_SUITES):
        assert read.tables["speedups-table"]


def test_the_page_s_own_files_are_installed_with_it() -> None:
    project = tomllib.loads((KEPT.parents[1] / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["package-data"]["blnet.bench.report"]
    home = KEPT.parent / "report"
    assert sorted(listed) == sorted(p.name for p in home.iterdir() if p.suffix not in (".py", ""))
