"""The sections of the page, each from the runs that have something for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blnet.bench import accuracy, kept
from blnet.bench.intervals import Ratio
from blnet.bench.report import cells as texts
from blnet.bench.report import elements as html
from blnet.bench.report import figures, ops, series
from blnet.bench.report import layers as layer_texts
from blnet.bench.report.claims import Claim, batch_rows, claims, lesser
from blnet.bench.report.elements import Cell, Row
from blnet.bench.results import Layer, Measurement, Results
from blnet.bench.summary import (
    NETWORK_SUITES,
    BatchRow,
    ModelRow,
    ShareRow,
    model_rows,
    op_rows,
    op_suites,
    share_rows,
)

OVER = (
    "Each speed-up is over the plain network's fastest rung that is not ours, in brackets its 95 % "
    "interval (bootstrap over rounds)."
)
SPEECH_SUITES = ("speech_models",)
LAYERS_SHOWN = 20


@dataclass(frozen=True)
class Run:
    """A run on the page.

    Attributes:
        results: what it found.
        name: device and date, unlike that of any other run on the page.
        key: of its elements' names.
    """

    results: Results
    name: str
    key: str


@dataclass
class Page:
    """What the page is made from.

    Attributes:
        runs: the runs, in the order given.
        plots: name of an element -> its plot.
    """

    runs: Sequence[Run]
    plots: dict[str, figures.Figure] = field(default_factory=dict)

    def plot(self, name: str, figure: figures.Figure | None) -> str:
        """Return the place of a plot, and remember the plot; nothing where there is none."""
        if figure is None:
            return ""
        self.plots[name] = figure
        return html.figure(name, figure.caption, figure.described, figure.height)

    @property
    def run_header(self) -> list[str]:
        """The column that names a row's run, where there are several."""
        return ["run"] if len(self.runs) > 1 else []

    def run_cells(self, run: Run) -> list[Cell]:
        """Return the cell below `run_header`."""
        return [Cell(run.name)] if len(self.runs) > 1 else []

    def heading(self, text: str, run: Run) -> str:
        """Return the heading of a part; it names the run where there are several."""
        of = f" <small>{html.escape(run.name)}</small>" if len(self.runs) > 1 else ""
        return f"<h3>{html.escape(text)}{of}</h3>"


def _value(ratio: Ratio | None) -> float | None:
    return ratio.value if ratio else None


# ---------------------------------------------------------------------------- summary


def summary(page: Page) -> str:
    """Return the sentences, the plot of the speed-ups, and all of them in a table."""
    several = len(page.runs) > 1
    parts = [_cards(run, several) for run in page.runs]
    groups = [
        (f"{suite.replace('_', ' ')}, batch {batch}{f', {run.name}' if several else ''}", found)
        for run in page.runs
        for suite in NETWORK_SUITES
        for batch in series.batches(run.results, suite)
        if (found := [p for p in series.points(run.results, suite) if p.batch == batch])
    ]
    plot = page.plot("speedups", figures.speedups(groups)) if groups else ""
    over = html.paragraph(OVER, "notes") if groups else ""
    body = f'<div class="claims">{"".join(parts)}{over}</div>{plot}'
    lead = f'<div class="{"lead" if plot else "words"}">{body}</div>'
    return lead + _every_speedup(page)


def _cards(run: Run, several: bool) -> str:
    found = claims(run.results)
    heading = f"<h3>{html.escape(run.name)}</h3>" if several else ""
    if not found:
        nothing = "Nothing was compared in this run: there is no speed-up to tell."
        return heading + html.paragraph(nothing)
    notes = [html.paragraph(f"Note: {note}.", "note") for note in run.results.notes]
    return heading + "".join([*map(_card, found), *notes])


def _card(claim: Claim) -> str:
    large = "".join(
        f"<div><b>{html.escape(number)}</b> <span>{html.escape(of)}</span></div>"
        for number, of in claim.figures
    )
    # The sentence repeats them, in full.
    large = f'<div class="large" aria-hidden="true">{large}</div>' if large else ""
    subject = f'<p class="subject" aria-hidden="true">{html.escape(claim.subject)}</p>'
    return f'<div class="card">{subject}{large}{html.paragraph(claim.text)}</div>'


def _every_speedup(page: Page) -> str:
    rows = [
        _speedup_row(page, run, *found) for run in page.runs for found in batch_rows(run.results)
    ]
    if not rows:
        return ""
    header = [*page.run_header, "network", "suite", "batch", "MAC ratio", "speed-up [95 %]"]
    header += ["realised", "ms a batch", "rung", "over"]
    return html.table("speedups-table", "Every speed-up", header, rows)


def _speedup_row(
    page: Page, run: Run, suite: str, row: ModelRow, batch: int, found: BatchRow
) -> Row:
    over = f"{row.network.baseline}, {found.baseline_rung}{lesser(found)}"
    return Row(
        [
            *page.run_cells(run),
            Cell(row.network.label),
            Cell(suite),
            Cell(str(batch), batch),
            Cell(texts.number_text(row.mac_ratio), row.mac_ratio),
            Cell(texts.ratio_text(found.speedup), _value(found.speedup)),
            Cell(
                texts.ratio_text(found.realised, interval=False).removesuffix("x"),
                _value(found.realised),
            ),
            Cell(texts.milliseconds(found.seconds), found.seconds),
            Cell(found.rung),
            Cell(over),
        ]
    )


# ---------------------------------------------------------------------------- networks


def networks(page: Page, speech: bool) -> str:
    """Return the suites of whole networks, those of speech or the others."""
    wanted = [suite for suite in NETWORK_SUITES if (suite in SPEECH_SUITES) == speech]
    return "".join(
        _networks(page, run, suite)
        for suite in wanted
        for run in page.runs
        if model_rows(run.results, suite)
    )


def _networks(page: Page, run: Run, suite: str) -> str:
    results, kind, name = run.results, NETWORK_SUITES[suite], f"{run.key}-{suite}"
    rows = model_rows(results, suite)
    parts = [page.heading(f"{suite.replace('_', ' ').capitalize()}: {kind.what}", run)]
    parts.append(html.paragraph(texts.measured_on(results, kind.unit) + ".", "where"))
    batches = texts.batches_of(rows)
    shown = [Row(_model_row(batches, row)) for row in rows]
    header = texts.model_header(batches, kind.unit)
    parts.append(html.table(f"{name}-times", "Latency and throughput", header, shown))
    parts.append(html.paragraph(texts.reading(rows)))
    gains = texts.gain_rows(rows)
    if gains:
        made = [Row(_gain_row(batches, *pair)) for pair in zip(rows, gains, strict=True)]
        title = texts.GAINS[0].upper() + texts.GAINS[1:]
        parts.append(html.table(f"{name}-gains", title, texts.gain_header(batches), made))
    found = share_rows(results, suite, rows)
    rungs = texts.share_rungs(found)
    shares = [Row(_share_row(rungs, row)) for row in found]
    if shares:
        title = texts.SHARES[0].upper() + texts.SHARES[1:]
        parts.append(html.table(f"{name}-shares", title, texts.share_header(rungs), shares))
    memory = kept.rows(results) if suite == "training" else []
    if memory:
        counted = [Row([Cell(text) for text in row]) for row in memory]
        parts.append(html.table(f"{name}-kept", kept.TITLE, kept.header(), counted))
        parts.append(html.paragraph(kept.NOTE))
    parts.append("<h4>The ladder</h4>")
    for batch in batches:
        stacked = page.plot(f"{name}-gains-{batch:d}", figures.gains(results, suite, batch))
        times = page.plot(f"{name}-rungs-{batch:d}", figures.rungs(results, suite, batch))
        parts.append(f'<div class="pair">{stacked}{times}</div>')
    parts.append(_every_rung(f"{name}-ladder", list(results.of(suite))))
    return "".join(parts)


def _model_row(batches: Sequence[int], row: ModelRow) -> list[Cell]:
    network = row.network
    measured = [row.batches.get(batch) for batch in batches]
    low, top = measured[0], measured[-1]
    values = [
        None,
        network.alpha,
        network.beta,
        network.parameters,
        network.macs,
        row.mac_ratio,
        low.seconds if low else None,
        top.throughput if top else None,
        *(
            _value(gain)
            for found in measured
            for gain in ((found.speedup, found.realised) if found else (None, None))
        ),
        top.peak_memory if top else None,
        None,
    ]
    return html.cells(texts.model_cells(batches, row), values)


def _gain_row(batches: Sequence[int], row: ModelRow, shown: Sequence[str]) -> list[Cell]:
    found = [row.batches.get(batch) for batch in batches]
    gains = [(b.architecture, b.engine, b.speedup) if b else (None,) * 3 for b in found]
    return html.cells(shown, [None, *(_value(gain) for batch in gains for gain in batch)])


def _share_row(rungs: Sequence[str], row: ShareRow) -> list[Cell]:
    values = [None, row.batch, *(_value(row.shares.get(rung)) for rung in rungs)]
    return html.cells(texts.share_cells(rungs, row), values)


def _every_rung(name: str, measurements: Sequence[Measurement]) -> str:
    header = ["network", "batch", "rung", "status", "p20, ms", "p50, ms", "p90, ms", "rounds"]
    header += ["error", "build, s", "memory, MB", "note"]
    rows = []
    for m in measurements:
        # A group that could not even be built has no facts.
        batch = Cell(str(m.facts.get("batch", texts.NOTHING)), m.facts.get("batch"))
        first = [Cell(m.family), batch, Cell(m.implementation)]
        rows.append(Row([*first, *measured(m)], m.failed))
    return html.table(name, "Every rung", header, rows)


def measured(m: Measurement) -> list[Cell]:
    """Return the cells of what was measured of anything, from its status to its note."""
    times = [m.quantile(p) if m.timed else None for p in (20, 50, 90)]
    error = m.check.error if m.check else None
    return [
        Cell(f"failed: {m.status}" if m.failed else m.status),
        *(Cell(texts.milliseconds(time), time) for time in times),
        Cell(str(len(m.samples)), len(m.samples)),
        Cell(texts.NOTHING if error is None else f"{error:.0e}", error),
        Cell(texts.number_text(m.build_seconds, 1), m.build_seconds),
        Cell(texts.megabytes(m.peak_memory), m.peak_memory),
        Cell(m.note),
    ]


# ---------------------------------------------------------------------------- ops


def kernels(page: Page) -> str:
    """Return the suites of single ops."""
    suites = dict.fromkeys(suite for run in page.runs for suite in op_suites(run.results))
    return "".join(
        _op(page, run, suite, f"{run.key}-op{number}")
        for number, suite in enumerate(suites)
        for run in page.runs
        if suite in op_suites(run.results)
    )


def _op(page: Page, run: Run, suite: str, name: str) -> str:
    results, rows = run.results, []
    for row in op_rows(results, suite):
        m = row.measurement
        share = [row.share] if "copy_bandwidth" in results.ceilings else []
        seconds, error = m.median if m.timed else None, m.check.error if m.check else None
        values = [None, None, m.facts.get("batch"), None, seconds, row.bandwidth, row.rate]
        values += [*share, _value(row.speedup), error]
        shown = html.cells(ops.op_cells(results, row), values)
        rows.append(Row([*shown, Cell(_what_became(m))], m.failed))
    header = [*ops.op_header(results), "note"]
    return "".join(
        [
            page.heading(ops.op_title(results, suite), run),
            html.paragraph(ops.op_where(results, suite) + ".", "where"),
            page.plot(f"{name}-bars", figures.ops(results, suite)),
            html.table(f"{name}-ops", f"{suite}, every implementation", header, rows),
            html.items(bullets(ops.op_notes(results, suite)), "notes"),
        ]
    )


def _what_became(m: Measurement) -> str:
    if m.status == "ok":
        return m.note
    return f"{'failed, ' if m.failed else ''}{m.status}: {m.note}".removesuffix(": ")


# ---------------------------------------------------------------------------- layers


def layers(page: Page) -> str:
    """Return the layers that lose most, of every network whose layers were looked at."""
    parts = []
    for run in page.runs:
        for number, (key, label, found) in enumerate(layer_texts.networks(run.results)):
            name = f"{run.key}-layers-{number}"
            parts.append(page.heading(f"{label}: {key}", run))
            parts.append(html.paragraph(layer_texts.reading(run.results, key, label)))
            parts.append(page.plot(f"{name}-bars", figures.layers(f"{label}, {key}", found)))
            parts.append(_layers(name, found))
        if run.results.layers:
            parts.append(html.items(bullets(layer_texts.notes(run.results)), "notes"))
    return "".join(parts)


def _layers(name: str, found: Sequence[Layer]) -> str:
    worst = series.worst(found, LAYERS_SHOWN)
    shown = zip(layer_texts.rows(found, LAYERS_SHOWN), worst, strict=True)
    rows = [Row(html.cells(cells, _layer_values(layer))) for cells, layer in shown]
    caption = f"The {len(rows)} of {len(found)} layers that lose most"
    return html.table(name, caption, layer_texts.HEADER, rows)


def _layer_values(layer: Layer) -> list[float | None]:
    share = layer.bound / layer.seconds if layer.seconds and layer.bound else None
    sizes = [layer.flops or None, layer.bytes or None]
    return [None, None, None, *sizes, layer.bound, layer.seconds, series.lost(layer), share]


def bullets(lines: Sequence[str]) -> list[str]:
    """Return the items of a Markdown list, each on one line."""
    found = "\n".join(lines).removeprefix("- ").split("\n- ")
    return [" ".join(item.split()) for item in found]


# ---------------------------------------------------------------------------- studies


def studies(page: Page, speech: bool) -> str:
    """Return the studies, that of speech or the others."""
    return "".join(
        _study(page, run, suite)
        for suite in accuracy.STUDIES
        for run in page.runs
        if (suite == "speech") == speech and suite in accuracy.studies_of(run.results)
    )


def _study(page: Page, run: Run, suite: str) -> str:
    results, name = run.results, f"{run.key}-{suite}-study"
    found = [Row(_study_row(row, suite)) for row in accuracy.rows(results, suite)]
    title = accuracy.title(results, suite)
    return "".join(
        [
            page.heading(f"{suite.capitalize()}: {title}", run),
            html.paragraph(texts.device_of(results) + ".", "where"),
            page.plot(f"{name}-plot", figures.study(results, suite)),
            html.table(name, accuracy.STUDIES[suite].capitalize(), accuracy.HEADER[suite], found),
            html.paragraph(accuracy.notes(results, suite), "notes"),
        ]
    )


def _study_row(row: accuracy.StudyRow, suite: str) -> list[Cell]:
    facts: dict[str, Any] = row.facts
    difference = row.difference.value if row.difference else None
    score, seconds, runs = row.score.value, row.epoch_seconds, row.score.runs
    if suite == "conversion":
        values = [None, facts["epochs"], facts["macs"], facts.get("cost")]
        return html.cells(accuracy.cells(row, suite), [*values, score, difference, seconds, runs])
    values = [None, facts["alpha"], facts["beta"], facts["parameters"], facts["macs"]]
    values += [row.mac_ratio, score, difference]
    if suite == "speech":
        values += [rate.value if rate else None for rate in (row.cer, row.ngram_wer)]
        values += [None if seconds is None else seconds / facts["steps"], row.real_time_factor]
    else:
        values += [seconds]
    return html.cells(accuracy.cells(row, suite), [*values, facts["epochs"], runs])
