"""The plots of a run as PNG files, for readers of report.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blnet.bench.report import series
from blnet.bench.report.cells import measured_on
from blnet.bench.report.figures import LABELLED
from blnet.bench.report.ops import op_where
from blnet.bench.results import Results
from blnet.bench.summary import NETWORK_SUITES
from blnet.files import written_aside

_INCHES, _BAR = 7.0, 0.16  # width of a plot, height of a bar
_MARKERS = "osD^vP*X"


def plot_networks(results: Results, suite: str, path: Path) -> bool:
    """Draw a suite's speed-ups against the ratios of MACs.

    Args:
        results: of a run.
        suite: one of `blnet.bench.summary.NETWORK_SUITES`.
        path: of the PNG.

    Returns:
        Whether there was anything to draw.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        OSError: if the file cannot be written.
    """
    points = series.points(results, suite)
    if not points:
        return False
    figure, axes = _axes(4.2)
    top = max(point.mac_ratio for point in points) * 1.06
    axes.plot([1, top], [1, top], "--", color="gray", label="all arithmetic saved became time")
    for index, batch in enumerate(sorted({point.batch for point in points})):
        own = [point for point in points if point.batch == batch]
        values = [point.speedup.value for point in own]
        bars = [[abs(p.ends[side] - p.speedup.value) for p in own] for side in (0, 1)]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.errorbar(
            [point.mac_ratio for point in own], values, yerr=bars, fmt=marker, capsize=3,
            label=f"batch {batch}",
        )  # fmt: skip
    for point in points if len(points) <= LABELLED else ():
        left = point.mac_ratio > (1 + top) / 2  # the side that has room
        axes.annotate(
            point.label, (point.mac_ratio, point.speedup.value), fontsize=7,
            xytext=(-6 if left else 6, -2), textcoords="offset points",
            horizontalalignment="right" if left else "left",
        )  # fmt: skip
    axes.set_xlabel("MAC ratio: plain network over this one")
    axes.set_ylabel("speed-up [95 %]")
    kind = NETWORK_SUITES[suite]
    axes.set_title(f"{kind.what}: {measured_on(results, kind.unit)}", fontsize=9)
    return _write(figure, axes, path)


def plot_op(results: Results, suite: str, path: Path) -> bool:
    """Draw an op's times by implementation; see `plot_networks`."""
    found = [m for m in results.of(suite) if m.timed]
    if not found:
        return False
    sites = list(dict.fromkeys(map(series.site, found)))
    names = list(series.by_name(found))
    figure, axes = _axes(1.5 + _BAR * len(sites) * (len(names) + 1))
    for index, (name, own) in enumerate(names):
        bars = [sites.index(series.site(m)) * (len(names) + 1) + index for m in own]
        axes.barh(bars, [m.median * 1e3 for m in own], label=name)
    middle = (len(names) - 1) / 2
    places = [site * (len(names) + 1) + middle for site in range(len(sites))]
    axes.set_yticks(places, sites, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms, median")
    axes.set_title(f"{suite}: {op_where(results, suite)}", fontsize=9)
    return _write(figure, axes, path)


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_INCHES, height), layout="constrained")
    return figure, figure.subplots()


def _write(figure: Any, axes: Any, path: Path) -> bool:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=130)
    return True
