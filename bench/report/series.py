"""The numbers behind the plots of the page and the PNG files, taken from a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blnet.bench.intervals import Ratio, median_ratio
from blnet.bench.results import Layer, Measurement, Results
from blnet.bench.summary import at_batch, fastest, is_baseline, model_rows

_PLAIN_PYTORCH = ("eager", "channels-last")
_FOLDED = "folded"
_GRAPH = "graph"
ARCHITECTURE = "architecture"
FOLDING, ENGINES = "folding", "compile and other engines"
OURS, GRAPHS = "our engine or kernels", "CUDA graph"
STEPS = (ARCHITECTURE, FOLDING, ENGINES, OURS, GRAPHS)


@dataclass(frozen=True)
class Point:
    """A network at one batch, for the plot of the speed-up against the ratio of MACs.

    Attributes:
        label: of the network.
        batch: images or clips at once.
        mac_ratio: MACs of the plain network over its own.
        speedup: over the plain network's fastest rung that is not ours.
    """

    label: str
    batch: int
    mac_ratio: float
    speedup: Ratio

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of its error bar, which has no length where there is no interval."""
        return self.speedup.interval or (self.speedup.value, self.speedup.value)


@dataclass(frozen=True)
class Ladder:
    """How a network's time falls from step to step of its ladder.

    Attributes:
        label: of the network.
        start: time of the plain network in plain PyTorch, seconds; the steps count from there.
        steps: (name, speed-up of the step alone), of those that were measured, in order.
        best: time of its own fastest rung, seconds.
    """

    label: str
    start: float
    steps: tuple[tuple[str, Ratio], ...]
    best: float


def points(results: Results, suite: str) -> list[Point]:
    """Return the networks of a suite that have a speed-up and a ratio of MACs."""
    return [
        Point(row.network.label, batch, row.mac_ratio, found.speedup)
        for row in model_rows(results, suite)
        for batch, found in row.batches.items()
        if found.speedup and row.mac_ratio
    ]


def ladders(results: Results, suite: str, batch: int) -> list[Ladder]:
    """Return the steps of every network of a suite whose plain network ran in plain PyTorch.

    A step is taken from the fastest rung so far to the fastest with the step's rungs added, so
    that no step but the architecture makes it slower. The architecture is between the two
    networks, both in plain PyTorch. A step of which no rung has a time is left out.
    """
    here = at_batch(results, suite, batch)
    found = []
    for network in results.networks:
        own = [m for m in here if m.family == network.label]
        plain = [m for m in here if m.family == network.baseline]
        start = fastest([m for m in plain if step_of(m) == ARCHITECTURE])
        first = fastest([m for m in own if step_of(m) == ARCHITECTURE])
        if start is None or first is None:
            continue
        steps = []
        if network.label != network.baseline:
            steps.append((ARCHITECTURE, median_ratio(start.samples, first.samples)))
        for name in STEPS[1:]:
            added = fastest([m for m in own if step_of(m) == name])
            if added is not None:
                best = min(first, added, key=lambda m: m.median)
                steps.append((name, median_ratio(first.samples, best.samples)))
                first = best
        found.append(Ladder(network.label, start.median, tuple(steps), first.median))
    return found


def step_of(measurement: Measurement) -> str:
    """Return which of `STEPS` a rung belongs to."""
    name = measurement.implementation
    if name in _PLAIN_PYTORCH:
        return ARCHITECTURE
    if _GRAPH in name:
        return GRAPHS
    if not is_baseline(measurement):
        return OURS
    return FOLDING if name == _FOLDED else ENGINES


def plain_best(results: Results, suite: str, batch: int) -> dict[str, Measurement]:
    """Return the fastest rung that is not ours of every plain network that has one."""
    found = {}
    for label in dict.fromkeys(network.baseline for network in results.networks):
        rungs = [m for m in at_batch(results, suite, batch) if m.family == label]
        best = fastest([m for m in rungs if is_baseline(m)])
        if best is not None:
            found[label] = best
    return found


def batches(results: Results, suite: str) -> list[int]:
    """Return the batches that a suite of networks has times of."""
    return sorted({m.facts["batch"] for m in results.of(suite) if m.timed and "batch" in m.facts})


def by_name(measurements: Sequence[Measurement]) -> Iterator[tuple[str, list[Measurement]]]:
    """Return the measurements with a time, by implementation, in the order of the run."""
    for name in dict.fromkeys(m.implementation for m in measurements if m.timed):
        yield name, [m for m in measurements if m.timed and m.implementation == name]


def site(measurement: Measurement) -> str:
    """Return where and in which pass an op was measured."""
    way = measurement.facts.get("pass")
    return f"{measurement.family}, {way}" if way else measurement.family


def lost(layer: Layer) -> float | None:
    """Return the seconds that a layer takes beyond its bound; None if it was not measured."""
    return None if layer.seconds is None else layer.seconds - layer.bound


def worst(layers: Sequence[Layer], count: int) -> list[Layer]:
    """Return the layers that lose most, those that were not measured last."""

    def key(layer: Layer) -> float:
        found = lost(layer)
        return float("-inf") if found is None else found

    return sorted(layers, key=key, reverse=True)[:count]
