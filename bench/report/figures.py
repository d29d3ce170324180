"""The page's plots as plotly takes them: plain values, so that no package is needed to make them.

Colors are the page's: a trace names a tone (`meta.tone`), and page.js puts in the color that the
tone has on a light or a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blnet.bench import accuracy
from blnet.bench.report import series
from blnet.bench.report.cells import milliseconds, ratio_text
from blnet.bench.results import Layer, Results
from blnet.bench.summary import at_batch

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x", "hexagon")
TONES = 8  # as many as page.css has
_LINE, _BAR, _HEAD = 22, 18, 110  # pixels of a row, a bar, and of what stands around a plot
_TICKS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50)
LAYERS_SHOWN = 12
LABELLED = 12  # points; the names of more would cover each other
_COST = {
    "accuracy": "GMACs an image, forward",
    "conversion": "cost of training, TMACs",
    "speech": "GMACs a second of speech, forward",
}


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        caption: what it shows, one or two sentences.
        described: its numbers in words.
        height: pixels.
        data: plotly's traces.
        layout: plotly's layout, without what page.js sets for all.
    """

    caption: str
    described: str
    height: int
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def _text(value: str) -> str:
    """Return text that plotly takes as it is: it reads tags in every text."""
    return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _marker(index: int, **more: Any) -> dict[str, Any]:
    return {"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 9, **more}


def _around(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> dict[str, Any]:
    """Return error bars from interval ends."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [top - value for value, top in zip(values, high, strict=True)],
        "arrayminus": [value - bottom for value, bottom in zip(values, low, strict=True)],
        "thickness": 1.5,
        "width": 4,
    }


def speedups(groups: Sequence[tuple[str, Sequence[series.Point]]], title: str = "") -> Figure:
    """Return speed-up against the ratio of MACs, a trace for each named group of points."""
    every = [point for _, points in groups for point in points]
    top = max(point.mac_ratio for point in every) * 1.06
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [1, top],
            "y": [1, top],
            "name": "all arithmetic saved became time",
            "hoverinfo": "skip",
            "line": {"dash": "dash", "width": 1.5},
            "meta": {"tone": TONES - 1},
        },
    ]
    named = _named(every)
    for index, (name, points) in enumerate(groups):
        trace = {**_points(index, points, top), "name": _text(name), "mode": "markers+text"}
        trace["text"] = [_text(p.label) if p in named else "" for p in points]
        data.append(trace)
    described = "; ".join(
        f"{p.label} at batch {p.batch}{f' ({name})' if len(groups) > 1 else ''}: MAC ratio "
        f"{p.mac_ratio:.2f}, speed-up {ratio_text(p.speedup)}"
        for name, points in groups
        for p in points
    )
    layout = {
        "xaxis": {"title": {"text": "MAC ratio: plain network over this one"}},
        "yaxis": {"title": {"text": "speed-up"}},
    }
    caption = f"{title}Speed-up against the ratio of multiply-adds, with 95 % intervals. On the "
    caption += "dashed line all arithmetic saved became time saved; above it, more than that."
    height = 430 + _LINE * max(0, len(groups) - 3)  # the legend takes a line for each, on a phone
    return Figure(caption, f"Speed-up against MAC ratio. {described}.", height, data, layout)


def _named(points: Sequence[series.Point]) -> list[series.Point]:
    """Return the points that get a name: all, or each network's highest where they are many."""
    if len(points) <= LABELLED:
        return list(points)
    highest = {p.label: p for p in sorted(points, key=lambda p: p.speedup.value)}
    return list(highest.values()) if len(highest) <= LABELLED else []


def _points(index: int, points: Sequence[series.Point], top: float) -> dict[str, Any]:
    """Return the trace of a group of points on an axis that ends at `top`."""
    values = [p.speedup.value for p in points]
    low, high = ([p.ends[side] for p in points] for side in (0, 1))
    return {
        "type": "scatter",
        "textposition": [_beside(p.mac_ratio, top) for p in points],
        "x": [p.mac_ratio for p in points],
        "y": values,
        "error_y": _around(values, low, high),
        "marker": _marker(index),
        "hovertext": [
            f"{_text(p.label)}, batch {p.batch}: {ratio_text(p.speedup)}" for p in points
        ],
        "hoverinfo": "text",
        "meta": {"tone": index % (TONES - 1)},
    }


def _beside(x: float, top: float) -> str:
    """Return the side of a point that has room for its name, between 1 and the axis' end."""
    return "middle right" if x < (1 + top) / 2 else "middle left"


def gains(results: Results, suite: str, batch: int) -> Figure | None:
    """Return the ladder's steps stacked, each network's from the plain one in plain PyTorch."""
    ladders = series.ladders(results, suite, batch)
    if not ladders:
        return None
    labels = [_text(ladder.label) for ladder in ladders]
    lines = [
        (label, ladders[0].start / best.median)
        for label, best in series.plain_best(results, suite, batch).items()
        if label in {ladder.label for ladder in ladders}
    ]
    layout = {
        "barmode": "overlay",
        "bargap": 0.35,
        "uniformtext": {"mode": "hide", "minsize": 10},
        "xaxis": {
            "type": "log",
            "title": {"text": "speed; plain network in plain PyTorch = 1"},
            "tickvals": list(_TICKS),
            "ticktext": [f"{tick:g}x" for tick in _TICKS],
        },
        "yaxis": {"autorange": "reversed", "type": "category", "categoryarray": labels},
        "shapes": [_mark(x) for _, x in lines] if len(lines) == 1 else [],
    }
    described = "; ".join(
        f"{ladder.label}: "
        + ", ".join(f"{name} {ratio_text(step)}" for name, step in ladder.steps)
        + f", together {ladder.start / ladder.best:.2f}x"
        for ladder in ladders
    )
    caption = f"What each step of the ladder multiplies the speed by, batch {batch}; 1 where it "
    caption += "brought nothing."
    if len(lines) == 1:
        caption += f" The dotted line is the fastest rung of {lines[0][0]} that is not ours."
    return Figure(
        caption, f"Batch {batch}. {described}.", _rows_high(labels, 34), _stack(ladders), layout
    )


def _stack(ladders: Sequence[series.Ladder]) -> list[dict[str, Any]]:
    """Return a trace for each step: its bar in every network that has it."""
    traces = []
    for tone, name in enumerate(series.STEPS):
        bars = [bar for ladder in ladders if (bar := _piece(ladder, name))]
        if bars:
            labels, bases, lengths, gained = zip(*bars, strict=True)
            trace: dict[str, Any] = {"type": "bar", "orientation": "h", "name": name}
            trace |= {"y": list(map(_text, labels)), "base": list(bases), "x": list(lengths)}
            trace["meta"] = {"tone": tone}
            trace |= {
                "text": [text.split(" ")[0] for text in gained],
                "hovertext": [f"{name}: {text}" for text in gained],
                "hoverinfo": "text",
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
            }
            traces.append(trace)
    return traces


def _piece(ladder: series.Ladder, name: str) -> tuple[str, float, float, str] | None:
    """Return a network, where its bar of a step begins, how long it is, and what it says."""
    speed = 1.0
    for step, gain in ladder.steps:
        if step == name:
            return ladder.label, speed, speed * (gain.value - 1), ratio_text(gain)
        speed *= gain.value
    return None


def _mark(x: float) -> dict[str, Any]:
    line = {"dash": "dot", "width": 1.5}
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def _rows_high(rows: Sequence[Any], each: int = _LINE) -> int:
    return _HEAD + each * max(2, len(rows))


def rungs(results: Results, suite: str, batch: int) -> Figure | None:
    """Return the times of every rung as points with p20 and p90, a trace for each network."""
    found = at_batch(results, suite, batch)
    if not found:
        return None
    names = list(dict.fromkeys(m.implementation for m in found))
    data = []
    for index, family in enumerate(dict.fromkeys(m.family for m in found)):
        own = [m for m in found if m.family == family]
        values, low, high = ([m.quantile(p) * 1e3 for m in own] for p in (50, 20, 90))
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _text(family),
                "orientation": "h",
                "offsetgroup": str(index),
                "x": values,
                "y": [_text(m.implementation) for m in own],
                "marker": _marker(index),
                "error_x": _around(values, low, high),
                "meta": {"tone": index % TONES},
                "hovertext": [f"{_text(m.family)}, {milliseconds(m.median)} ms" for m in own],
                "hoverinfo": "text",
            }
        )
    layout = {
        "scattermode": "group",
        "scattergap": 0.4,
        "xaxis": {"title": {"text": "ms, median with p20 and p90"}, "rangemode": "tozero"},
        "yaxis": {
            "autorange": "reversed",
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [_text(name) for name in names],
        },
    }
    described = "; ".join(
        f"{m.family}, {m.implementation}: {milliseconds(m.median)} ms" for m in found
    )
    caption = f"Time of every rung, batch {batch}: left is faster."
    height = _rows_high(names, max(26, 9 * len(data)))
    return Figure(caption, f"{caption} {described}.", height, data, layout)


def ops(results: Results, suite: str) -> Figure | None:
    """Return an op's times as bars, a trace for each implementation."""
    found = [m for m in results.of(suite) if m.timed]
    if not found:
        return None
    data = []
    for index, (name, own) in enumerate(series.by_name(found)):
        values, low, high = ([m.quantile(p) * 1e3 for m in own] for p in (50, 20, 90))
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": _text(name),
                "x": values,
                "y": [_text(series.site(m)) for m in own],
                "meta": {"tone": index % TONES},
                "error_x": _around(values, low, high),
                "hoverinfo": "text",
                "hovertext": [f"{_text(name)}: {milliseconds(m.median)} ms" for m in own],
            }
        )
    layout = {
        "barmode": "group",
        "bargap": 0.25,
        "xaxis": {"title": {"text": "ms, median with p20 and p90"}},
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    described = "; ".join(
        f"{series.site(m)}, {m.implementation}: {milliseconds(m.median)} ms" for m in found
    )
    caption = f"Time of {suite} by implementation: shorter is faster."
    return Figure(caption, f"{caption} {described}.", _HEAD + _BAR * len(found), data, layout)


def layers(of: str, found: Sequence[Layer]) -> Figure | None:
    """Return the layers that lose most as bars: their bound, and what they take beyond it."""
    shown = [layer for layer in series.worst(found, LAYERS_SHOWN) if layer.seconds is not None]
    if not shown:
        return None
    names = [_text(layer.name) for layer in shown]
    bound = {
        "type": "bar",
        "orientation": "h",
        "name": "bound",
        "meta": {"tone": 0},
        "y": names,
        "x": [layer.bound * 1e3 for layer in shown],
        "hovertemplate": "%{x:.4g} ms<extra></extra>",
    }
    beyond = {
        **bound,
        "name": "beyond the bound",
        "meta": {"tone": 1},
        "x": [max(series.lost(layer) or 0.0, 0.0) * 1e3 for layer in shown],
    }
    layout = {
        "barmode": "stack",
        "bargap": 0.3,
        "xaxis": {"title": {"text": "ms"}},
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    described = "; ".join(
        f"{layer.name}: bound {milliseconds(layer.bound)} ms, taken {milliseconds(layer.seconds)}"
        for layer in shown
    )
    caption = f"{of}: the {len(shown)} layers that lose most time beyond their bound."
    height = _rows_high(shown)
    return Figure(caption, f"{caption} {described}.", height, [bound, beyond], layout)


def study(results: Results, suite: str) -> Figure | None:
    """Return a study's score over multiply-adds (of the conversion study, over cost)."""
    key, unit = ("cost", 1e12) if suite == "conversion" else ("macs", 1e9)
    found = [row for row in accuracy.rows(results, suite) if key in row.facts]
    if not found:
        return None
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": _text(row.family),
            "x": [row.facts[key] / unit],
            "y": [row.score.value],
            "marker": _marker(index),
            "error_y": {"type": "data", "array": [row.score.half_width or 0.0], "thickness": 1.5},
            "hovertext": [f"{_text(row.family)}: {accuracy.mean_text(row.score)}"],
            "hoverinfo": "text",
            "meta": {"tone": index % TONES},
        }
        for index, row in enumerate(found)
    ]
    score = "error, %" if suite == "speech" else "top-1 accuracy, %"
    cost = _COST[suite]
    layout = {"xaxis": {"title": {"text": cost}}, "yaxis": {"title": {"text": score}}}
    described = "; ".join(
        f"{row.family}: {row.facts[key] / unit:.4g}, {accuracy.mean_text(row.score)}"
        for row in found
    )
    caption = f"{score[0].upper()}{score[1:]} over {cost}, with 95 % intervals."
    return Figure(caption, f"{caption} {described}.", 400, data, layout)
