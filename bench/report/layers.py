"""Where the time of a network goes: its lower bound, and the layers that lose most, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blnet.bench.report.cells import NOTHING, ceiling_notes, milliseconds, number_text, share_text
from blnet.bench.results import Layer, Results
from blnet.bench.summary import fastest

TITLE = "Where the time goes"
HEADER = ["layer", "kind", "output", "GFLOP", "MB", "bound, ms", "measured, ms", "lost, ms"]
HEADER.append("of bound")
NOTES = """\
- Layers are timed one by one on the folded rung: eager, channels-last, BN folded. Lost is what a
  layer takes beyond its bound; those that lose most stand first.
- A layer's bound is the longer of moving input, weights and output once and of doing its FLOPs, at
  the rates measured in this run. The network's is their sum, for a network that runs layer by
  layer in the usual arithmetic: fused layers move less and Winograd convolutions multiply less, so
  a rung can pass 100 %.
- "between layers" is the whole pass less its layers: adds, activations, merges, and calling them
  from Python. Its bound is 0, since the layer before can do such work on what it writes."""


PASSED = (
    "More than 100 % of a bound: the rates measured in this run are a lower estimate of what the "
    "device can do, or less was moved or multiplied than is counted."
)


def networks(results: Results) -> Iterator[tuple[str, str, list[Layer]]]:
    """Yield suite and batch, label and layers of every network whose layers were looked at."""
    for key, found in results.layers.items():
        for label, layers in found.items():
            yield key, label, layers


def reading(results: Results, key: str, label: str) -> str:
    """Return a sentence on a network's lower bound and how near its fastest rung comes to it.

    Args:
        results: of a run.
        key: suite and batch, as in `Results.layers`.
        label: of the network.
    """
    found = results.layers[key][label]
    bound = sum(layer.bound for layer in found)
    texts = [f"bound {milliseconds(bound)} ms"]
    suite, _, group = key.partition(", ")
    best = fastest([m for m in results.of(suite) if (m.group, m.family) == (group, label)])
    passed = ""
    if best is not None:
        share = bound / best.median
        text = f"fastest rung ({best.implementation}) {milliseconds(best.median)} ms"
        texts.append(f"{text}: {share_text(share)} of the bound")
        passed = f" {PASSED}" if round(share, 2) > 1 else ""
    timed = [layer.seconds for layer in found if layer.seconds is not None]
    if timed:
        texts.append(f"layer by layer {milliseconds(sum(timed))} ms")
    return f"{label}: {', '.join(texts)}.{passed}"


def rows(found: Sequence[Layer], most: int) -> list[list[str]]:
    """Return the cells of the layers that lose most, at most so many."""
    return [_cells(layer) for layer in sorted(found, key=_lost, reverse=True)[:most]]


def _lost(layer: Layer) -> float:
    """Return the seconds beyond the bound; below any other where it was not timed."""
    return float("-inf") if layer.seconds is None else layer.seconds - layer.bound


def _cells(layer: Layer) -> list[str]:
    timed = layer.seconds is not None
    share = layer.bound / layer.seconds if layer.seconds and layer.bound else None
    return [
        layer.name,
        layer.kind,
        "x".join(map(str, layer.shape)) or NOTHING,
        number_text(layer.flops / 1e9, 3) if layer.flops else NOTHING,
        number_text(layer.bytes / 1e6, 1) if layer.bytes else NOTHING,
        milliseconds(layer.bound),
        milliseconds(layer.seconds),
        milliseconds(_lost(layer)) if timed else NOTHING,
        share_text(share),
    ]


def notes(results: Results) -> list[str]:
    """Return what stands below the tables, as items of a Markdown list."""
    return [*NOTES.splitlines(), *ceiling_notes(results)]
