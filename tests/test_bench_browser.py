"""The report's page in a real browser, Chromium without a window."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blnet.bench.report import csv_text, html_page
from blnet.bench.results import Check, Layer, Measurement, Results, read_json, write_json
from blnet.bench.summary import model_rows

KEPT = Path(__file__).resolve().parents[1] / "bench" / "results"
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
ALL_DRAWN = "[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))"
LOCAL = ("file:", "data:", "blob:")
CONTRAST = 4.5  # WCAG 2.2, success criterion 1.4.3


def lacking(reason: str) -> None:
    """Skip with a reason; where CI is set a check that did not run may not look like a pass."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set: this check must run there")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        lacking("chromium is not on the path")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        lacking("playwright is not installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def run() -> Results:
    """A kept run of models and an op, with a failure and layers added."""
    runs = (read_json(path) for path in sorted(KEPT.glob("*/results.json")))
    found = next(
        each for each in runs if {"models", "merge"} <= {m.suite for m in each.measurements}
    )
    first = found.measurements[0]
    found.measurements.append(
        Measurement(
            *("models", first.group, first.family, "broken", "A rung that is wrong."),
            facts=first.facts,
            status="wrong",
            note="relative error 0.5",
            check=Check(0.5, 1e-3, "float64"),
        )
    )
    layers = [Layer(f"layer{i}", "Conv2d", (8, 64), 9, 9, 1e-3, 1e-3 * i) for i in range(2, 9)]
    found.layers = {"models, batch 8": {first.family: layers}}
    return found


@pytest.fixture(scope="module")
def site(run: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    studies = [read_json(path) for path in sorted(KEPT.glob("*-speech-*/results.json"))]
    (folder / "one.html").write_text(html_page([run]), encoding="utf-8")
    (folder / "all.html").write_text(html_page([run, *studies]), encoding="utf-8")
    write_json(folder / "results.json", run)
    return folder


class Opened:
    """A page in the browser, and what it said and asked for."""

    def __init__(self, browser: Any, path: Path, width: int, height: int, **more: Any) -> None:
        size = {"width": width, "height": height}
        self.context = browser.new_context(viewport=size, accept_downloads=True, **more)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.said.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.until("window.Plotly !== undefined")  # from then on plots are drawn when they are near

    def until(self, condition: str) -> None:
        """Wait for a condition; playwright's own way needs `eval`, which the page forbids."""
        end = time.monotonic() + 60  # a busy machine takes its time
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, condition
            self.page.wait_for_timeout(20)

    def draw_all(self) -> None:
        """Scroll past every plot, so that it is drawn."""
        for place in self.page.query_selector_all(".plot"):
            place.scroll_into_view_if_needed()
        self.until(ALL_DRAWN)

    def column(self, table: str, title: str) -> list[float | None]:
        """Return the raw values of a column, in the order shown."""
        found: list[float | None] = self.page.evaluate(
            """([name, title]) => {
              const table = document.getElementById(name);
              const heads = [...table.tHead.rows[0].cells];
              const at = heads.findIndex((cell) => cell.textContent === title);
              return [...table.tBodies[0].rows].filter((row) => !row.hidden).map(
                (row) => row.cells[at].dataset.value === undefined
                  ? null : Number(row.cells[at].dataset.value));
            }""",
            [table, title],
        )
        return found

    def color(self, script: str) -> tuple[float, ...]:
        text = self.page.evaluate(script)
        return tuple(map(float, text[text.index("(") + 1 : -1].split(",")[:3]))


@pytest.fixture
def opened(browser: Any, site: Path) -> Iterator[Opened]:
    found = Opened(browser, site / "one.html", 1280, 800)
    yield found
    assert [url for url in found.asked if not url.startswith(LOCAL)] == []
    assert found.said == []
    found.context.close()


def heading(opened: Opened, table: str, title: str) -> Any:
    buttons = opened.page.locator(f"#{table} thead button")
    return buttons.get_by_text(title, exact=True)


def test_it_draws_every_plot_and_asks_nobody(browser: Any, site: Path) -> None:
    found = Opened(browser, site / "all.html", 1280, 800)
    found.draw_all()
    plots = json.loads(found.page.locator("#figures").text_content())
    assert found.page.locator(".plot .main-svg").count() >= len(plots) > 10
    assert found.said == []
    assert found.asked
    assert [url for url in found.asked if not url.startswith(LOCAL)] == []
    # The page's own policy forbids it even to a script that got in.
    blocked = found.page.evaluate(
        "fetch('https://example.invalid/').then(() => 'sent', () => 'blocked')"
    )
    assert blocked == "blocked"
    assert "Content Security Policy" in found.said[0]
    found.context.close()


def test_the_first_screen_says_how_much_faster(opened: Opened, run: Results) -> None:
    found = [row for row in model_rows(run) if row.network.label != row.network.baseline]
    for row in found:
        sentence = opened.page.locator(".card p", has_text=f"{row.network.label} runs ")
        gain = row.batches[8].speedup
        assert f"{gain.value:.2f}x [{gain.low:.2f}, {gain.high:.2f}]" in sentence.text_content()
        box = sentence.bounding_box()
        assert box["y"] + box["height"] <= 800
    opened.until("document.querySelector('#speedups .main-svg') !== null")
    box = opened.page.locator("#speedups .main-svg").first.bounding_box()
    assert box["y"] + box["height"] <= 800


def test_numbers_are_those_of_the_results(opened: Opened, site: Path) -> None:
    measurements = json.loads((site / "results.json").read_text())["measurements"]
    medians = [m["quantiles"]["p50"] if m["quantiles"] else None for m in measurements]
    assert opened.column("raw-table", "p50, ms") == medians
    assert opened.column("raw-table", "rounds") == [len(m["samples"]) for m in measurements]


def test_a_click_sorts_and_the_next_one_turns_it_round(opened: Opened) -> None:
    title, head = "p50, ms", "#raw-table th[aria-sort]"
    values = [value for value in opened.column("raw-table", title) if value is not None]
    assert values != sorted(values)
    heading(opened, "raw-table", title).click()
    assert opened.column("raw-table", title) == [*sorted(values), None]
    assert opened.page.get_attribute(head, "aria-sort") == "ascending"
    heading(opened, "raw-table", title).click()
    assert opened.column("raw-table", title) == [*sorted(values, reverse=True), None]
    assert opened.page.get_attribute(head, "aria-sort") == "descending"
    assert opened.page.locator("#said").text_content() == "sorted by p50, ms, descending"


def test_enter_sorts(opened: Opened) -> None:
    button = heading(opened, "raw-table", "error")
    button.focus()
    opened.page.keyboard.press("Enter")
    values = [value for value in opened.column("raw-table", "error") if value is not None]
    assert values == sorted(values)
    assert opened.page.locator("#raw-table th[aria-sort]").count() == 1
    # Tab goes on to the next column.
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.textContent") == "build, s"
    # Texts sort as texts.
    heading(opened, "raw-table", "implementation").click()
    names = opened.page.locator("#raw-table tbody tr td:nth-child(4)").all_text_contents()
    assert names == sorted(names)


def test_a_filter_keeps_the_rows_that_have_its_words(opened: Opened, run: Results) -> None:
    rows = opened.page.locator("#raw-table tbody tr:visible")
    opened.page.get_by_label("Filter rows").last.fill("A4 onnxruntime")
    wanted = [m for m in run.measurements if "a4" in m.family and m.implementation == "onnxruntime"]
    assert rows.count() == len(wanted) == 2
    said = opened.page.locator("output[for='raw-table-filter']").text_content()
    assert said == f"2 of {len(run.measurements)} rows"
    opened.page.get_by_label("Filter rows").last.fill("")
    assert rows.count() == len(run.measurements)


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Return the contrast of two colors, as WCAG 2.2 defines it."""

    def luminance(color: tuple[float, ...]) -> float:
        parts = [value / 255 for value in color]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark(opened: Opened) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    axis = "getComputedStyle(document.querySelector('#speedups .xtick text')).fill"
    seen = []
    opened.until("document.querySelector('#speedups .xtick text') !== null")
    for pressed in ("false", "true", "false"):
        assert opened.page.get_attribute("#theme", "aria-pressed") == pressed
        behind = opened.color(ground)
        seen.append(behind)
        assert contrast(opened.color(axis), behind) >= CONTRAST, "the plots follow"
        for place in ("body", "header p", "figcaption", "thead button", "td", "tr.failed td"):
            own = f"getComputedStyle(document.querySelector('{place}'))"
            failed = f"{own}.backgroundColor" if place.startswith("tr") else ground
            assert contrast(opened.color(f"{own}.color"), opened.color(failed)) >= CONTRAST, place
        opened.page.click("#theme")
    assert seen[0] == seen[2] != seen[1]


def test_it_begins_as_the_system_is(browser: Any, site: Path) -> None:
    found = Opened(browser, site / "one.html", 1280, 800, color_scheme="dark")
    assert sum(found.color("getComputedStyle(document.body).backgroundColor")) < 150
    found.page.emulate_media(media="print")
    found.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert sum(found.color("getComputedStyle(document.body).backgroundColor")) == 3 * 255
    assert found.page.locator("nav").is_hidden()
    assert found.page.evaluate(ALL_DRAWN)
    found.context.close()


def test_a_phone_scrolls_down_only(browser: Any, site: Path) -> None:
    found = Opened(browser, site / "all.html", 375, 812, has_touch=True)
    found.draw_all()
    assert found.page.evaluate("document.documentElement.scrollWidth") == 375
    wide = "[...document.querySelectorAll('.scroll')].some(b => b.scrollWidth > b.clientWidth)"
    assert found.page.evaluate(wide), "wide tables scroll inside their own box"
    assert found.said == []
    found.context.close()


def test_a_phone_shows_every_link_beside_the_button(browser: Any, site: Path) -> None:
    phone = Opened(browser, site / "all.html", 390, 844)
    covered = phone.page.evaluate(
        """() => {
          const edge = document.getElementById("theme").getBoundingClientRect().left;
          return [...document.querySelectorAll("nav a")]
            .filter((link) => link.getBoundingClientRect().right > edge)
            .map((link) => link.textContent);
        }"""
    )
    assert covered == []
    phone.context.close()


def test_it_can_be_read_without_seeing_it(browser: Any, site: Path) -> None:
    found = Opened(browser, site / "all.html", 1280, 800)
    levels = found.page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => Number(h.tagName[1]))"
    )
    assert found.page.get_attribute("html", "lang") == "en"
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    for landmark in ("header", "nav[aria-label]", "main", "footer"):
        assert found.page.locator(landmark).count() == 1
    nameless = found.page.evaluate(
        """[...document.querySelectorAll('button,input,[role=img],[role=region],nav,section')]
          .filter((e) => !(e.ariaLabel || (e.labels && e.labels.length) || e.textContent.trim()
            || document.getElementById(e.getAttribute('aria-labelledby'))))
          .map((e) => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    broken = found.page.evaluate(
        """['aria-labelledby', 'for', 'href'].flatMap((key) =>
          [...document.querySelectorAll(`[${key}]`)].map((e) => e.getAttribute(key))
            .filter((to) => !to.startsWith('data:'))
            .filter((to) => !document.getElementById(to.replace('#', ''))))"""
    )
    assert broken == []
    bare = found.page.evaluate(
        """[...document.querySelectorAll('table')].filter((t) => !t.caption
          || [...t.querySelectorAll('th')].some((th) => !th.scope)).length"""
    )
    assert bare == 0
    for plot in found.page.query_selector_all(".plot"):
        assert any(letter.isdigit() for letter in plot.get_attribute("aria-label"))
    found.context.close()


def test_the_keyboard_reaches_all(opened: Opened) -> None:
    opened.page.keyboard.press("Tab")
    focus = "document.activeElement"
    assert opened.page.evaluate(f"{focus}.textContent") == "Skip to the results"
    assert opened.page.evaluate(f"{focus}.getBoundingClientRect().x") >= 0
    opened.page.keyboard.press("Enter")
    assert opened.page.evaluate(f"{focus}.id") == "main"
    opened.page.locator("nav a", has_text="Raw data").focus()
    outline = opened.page.evaluate(f"getComputedStyle({focus}).outlineStyle")
    assert outline == "solid", "what has the focus is seen"
    opened.page.keyboard.press("Enter")
    opened.until("Math.abs(document.getElementById('raw').getBoundingClientRect().y) < 200")
    opened.until("document.querySelector('nav a[aria-current]').textContent === 'Raw data'")


def test_files_can_be_taken_out(opened: Opened, run: Results, site: Path) -> None:
    texts, begun = {}, re.sub("[T:]", "-", run.environment["date"][:16])
    for kind in ("json", "csv"):
        with opened.page.expect_download() as waiting:
            opened.page.get_by_text(f"results.{kind}", exact=True).click()
        assert waiting.value.suggested_filename == f"amd-epyc-{begun}-results.{kind}"
        texts[kind] = Path(waiting.value.path()).read_text()
    assert texts["json"] == (site / "results.json").read_text()
    assert texts["csv"] == csv_text(run)
