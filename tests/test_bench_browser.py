"""The report in a real browser, headless Chromium: it works, and nothing leaves the file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from blnet.bench.report.page import page
from blnet.bench.results import read_json

KEPT = Path(__file__).parent.parent / "bench" / "results" / "2026-11-23-cpu-amd-epyc"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        # A check that was left out may not look like one that passed.
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Chromium is not installed")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        running = play.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page([read_json(KEPT / "results.json")]), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser: Any, report: str) -> Iterator[Any]:
    """Open the report, and find at the end that nothing went wrong and nothing left the file."""
    shown = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
    wrong: list[str] = []
    asked: list[str] = []
    shown.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(report)
    shown.wait_for_selector(".plot .main-svg")
    yield shown
    shown.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_first_screen_answers_how_much_on_what_against_what(opened: Any) -> None:
    claim = opened.locator("#summary p", has_text="as fast as resnet50").first
    text = claim.inner_text()
    assert "AMD EPYC" in text
    assert "[" in text, "with its interval"
    box = claim.bounding_box()
    assert box["y"] + box["height"] < 800


def longest_table(opened: Any) -> str:
    """Return the id of the table with most rows among those that have a filter."""
    return opened.evaluate(
        "() => [...document.querySelectorAll('input[data-table]')].map(i => i.dataset.table)"
        ".sort((a, b) => document.getElementById(b).rows.length"
        " - document.getElementById(a).rows.length)[0]"
    )


def numbers(opened: Any, table: str, column: int) -> list[float]:
    return opened.evaluate(
        "([table, column]) => [...document.getElementById(table).tBodies[0].rows]"
        ".map(r => r.cells[column].dataset.value).filter(v => v !== undefined).map(Number)",
        [table, column],
    )


def first_number_column(opened: Any, table: str) -> int:
    return opened.evaluate(
        "table => [...document.getElementById(table).tHead.rows[0].cells]"
        ".findIndex(c => c.classList.contains('number'))",
        table,
    )


@pytest.mark.parametrize("way", ["click", "Enter"])
def test_a_header_sorts(opened: Any, way: str) -> None:
    table = longest_table(opened)
    column = first_number_column(opened, table)
    header = opened.locator(f"#{table} thead th").nth(column)
    for order, reverse in (("ascending", False), ("descending", True)):
        button = header.locator("button")
        button.click() if way == "click" else button.press("Enter")
        assert header.get_attribute("aria-sort") == order
        found = numbers(opened, table, column)
        assert len(set(found)) > 1
        assert found == sorted(found, reverse=reverse)


def test_a_filter_filters(opened: Any) -> None:
    table = longest_table(opened)
    rows = opened.locator(f"#{table} tbody tr")
    opened.fill(f"input[data-table={table}]", "onnxruntime")
    shown = [row for row in rows.all() if row.is_visible()]
    assert 0 < len(shown) < rows.count()
    assert all("onnxruntime" in row.inner_text() for row in shown)
    opened.fill(f"input[data-table={table}]", "no such words")
    assert not any(row.is_visible() for row in rows.all())


def test_the_numbers_are_those_of_the_results(opened: Any) -> None:
    values = set(
        opened.evaluate(
            "() => [...document.querySelectorAll('td[data-value]')].map(c => +c.dataset.value)"
        )
    )
    times = [m.median for m in read_json(KEPT / "results.json").measurements if m.timed]
    assert times
    assert [time for time in times if time not in values] == []


def test_light_and_dark(opened: Any) -> None:
    def ground() -> str:
        return opened.evaluate("getComputedStyle(document.body).backgroundColor")

    light = ground()
    opened.click("#theme")
    assert ground() != light
    assert opened.get_attribute("#theme", "aria-pressed") == "true"
    opened.click("#theme")
    assert ground() == light


def test_a_phone_scrolls_down_only(opened: Any) -> None:
    opened.set_viewport_size({"width": 375, "height": 700})
    opened.wait_for_timeout(200)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 375


def test_on_paper_there_is_no_navigation(opened: Any) -> None:
    opened.emulate_media(media="print")
    assert not opened.locator("nav").is_visible()


def test_those_who_cannot_see_it_find_their_way(opened: Any) -> None:
    levels = opened.evaluate(
        "() => [...document.querySelectorAll('h1,h2,h3,h4,h5')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    unnamed = opened.evaluate(
        "() => [...document.querySelectorAll('[role=img], button, input, table')].filter(e =>"
        " !(e.getAttribute('aria-label') || e.textContent.trim()"
        " || (e.labels && e.labels.length))).length"
    )
    assert unnamed == 0
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.getAttribute('href')") == "#main"
    assert opened.evaluate("document.documentElement.lang") == "en"


def test_the_results_can_be_taken_away(opened: Any) -> None:
    with opened.expect_download() as download:
        opened.locator("button[data-kind=json]").first.click()
    again = read_json(Path(download.value.path()))
    assert again.measurements == read_json(KEPT / "results.json").measurements
