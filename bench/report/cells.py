"""The cells of a run's tables as text, for the terminal, Markdown and the page alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from blnet.bench import accuracy
from blnet.bench.intervals import LEAST_ROUNDS, Ratio
from blnet.bench.results import Measurement, Network, Results
from blnet.bench.summary import BatchRow, ModelRow, ShareRow
from blnet.wording import counted

NOTHING = "-"
GAINS = "what the speed-up is made of [95 %]"
SHARES = "saved time over saved arithmetic, the same rung on both sides [95 %]"
HOW = """\
Every implementation is built, run once and compared with its reference in higher precision; what
does not match gets no time. After warming up until their times settle (at most ten calls), the
implementations of a group (all networks and rungs at one batch) take turns, round by round, and
every single time is kept in results.json. On a CPU the clock is `time.perf_counter`, right after an
untimed call of the same; on a GPU CUDA events around the call, after a 256 MiB buffer has been
overwritten, so that the L2 cache is cold (for single ops ten times, so that they are launched
meanwhile and the device's work is what is timed).
Times are medians; p20 and p90 stand beside them. Speed-up is the median of the plain network's
fastest rung that is not this project's work divided by that of the network's own fastest rung, at
the same batch and precision; its 95 % interval is a bootstrap over rounds (4,000 resamples), and of
fewer than five rounds there is none. Realised speed-up divides that by the ratio of MACs: 1 means
that all the arithmetic saved became time saved. So does the table of the same rung on both sides,
where no engine's work is counted to the architecture. Peak memory is weights
+ input + the most that was allocated at once during one call of the fastest rung (on a CPU as
PyTorch's profiler sees its allocator; scratch space inside oneDNN or cuDNN is not in it).
A rung more than four times slower than the fastest of its network is dropped with a note if all its
rounds would also take more than four seconds, and so is one that takes too long to build. Input:
real pictures, cropped and normalised; weights: random, BN statistics of the pictures themselves."""


FEW_ROUNDS = (
    f"Ratios of fewer than {LEAST_ROUNDS} rounds have no interval: so few cannot tell what is "
    f"faster; measure with --repeat {LEAST_ROUNDS} or more."
)

# ---------------------------------------------------------------------------- numbers as text


def ratio_text(ratio: Ratio | None, interval: bool = True) -> str:
    """Return "1.36x [1.33, 1.40]", "1.36x" of too few rounds for an interval, or "-"."""
    if ratio is None:
        return NOTHING
    return f"{ratio.value:.2f}x" + (interval_text(ratio) if interval else "")


def interval_text(ratio: Ratio, digits: int = 2) -> str:
    """Return " [1.33, 1.40]", or nothing where a ratio has no interval."""
    ends = ", ".join(f"{end:.{digits}f}" for end in ratio.interval or ())
    return f" [{ends}]" if ends else ""


def few_rounds(ratios: Iterable[Ratio | None]) -> list[str]:
    """Return a sentence on ratios of too few rounds, where there are any."""
    return [FEW_ROUNDS] if any(ratio and not ratio.interval for ratio in ratios) else []


def milliseconds(seconds: float | None) -> str:
    """Return seconds as milliseconds with four digits or so, or "-"."""
    if seconds is None:
        return NOTHING
    value = seconds * 1e3
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def number_text(value: Any, digits: int = 2) -> str:
    """Return a number with so many digits after the point, or "-"."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def share_text(value: float | None) -> str:
    """Return a share as "42%", with a digit where that would be "0%", or "-"."""
    if value is None:
        return NOTHING
    return f"{value:.0%}" if round(value, 2) else f"{100 * value:.1g}%"


def megabytes(value: int | None) -> str:
    """Return bytes as megabytes, or "-"."""
    return NOTHING if value is None else f"{value / 1e6:.0f}"


# ---------------------------------------------------------------------------- models


def batches_of(rows: Sequence[ModelRow]) -> list[int]:
    """Return the batches that a table of networks shows: those at which any has a time.

    They need not be those asked for: a batch that did not fit the memory was halved.
    """
    return sorted({batch for row in rows for batch in row.batches}) or [1]


def model_header(batches: Sequence[int], unit: str = "images") -> list[str]:
    """Return the columns of a table of networks at these batches, smallest first."""
    low, top = batches[0], batches[-1]
    gains = [(f"speed-up b{batch} [95 %]", f"realised b{batch}") for batch in batches]
    return [
        "network",
        "alpha",
        "beta",
        "params, M",
        "GMACs",
        "MAC ratio",
        f"latency b{low}, ms",
        f"{unit}/s b{top}",
        *(name for pair in gains for name in pair),
        f"memory b{top}, MB",
        "best rung " + ", ".join(f"b{batch}" for batch in batches),
    ]


def model_cells(batches: Sequence[int], row: ModelRow) -> list[str]:
    """Return the cells of a network's row, under the header of the same batches."""
    network = row.network
    measured = [row.batches.get(batch) for batch in batches]
    low, top = measured[0], measured[-1]
    rungs = [batch.rung if batch else NOTHING for batch in measured]
    return [
        _name(network),
        number_text(network.alpha, 0),
        number_text(network.beta, 0),
        f"{network.parameters / 1e6:.2f}",
        f"{network.macs / 1e9:.3f}",
        number_text(row.mac_ratio),
        milliseconds(low.seconds if low else None),
        f"{top.throughput:.1f}" if top else NOTHING,
        *(cell for batch in measured for cell in (_speedup(batch), _realised(batch))),
        megabytes(top.peak_memory if top else None),
        "; ".join(dict.fromkeys(rungs)),
    ]


def _name(network: Network) -> str:
    """Return a network's name with what its label says beyond alpha and beta, as " pyramid"."""
    known = f"{network.name} a{network.alpha} b{network.beta}"
    more = network.label.removeprefix(known) if network.label.startswith(known) else ""
    return network.name + more


def _speedup(row: BatchRow | None) -> str:
    return ratio_text(row.speedup if row else None)


def _realised(row: BatchRow | None) -> str:
    return ratio_text(row.realised if row else None, interval=False).removesuffix("x")


def device_of(results: Results) -> str:
    """Return the device of a run, and of a CPU how many threads."""
    where = results.environment
    if results.settings["device"] == "cuda":
        return str(where["device"])
    return f"{where['cpu']}, {counted(where['threads'], 'thread')}"


def measured_on(results: Results, unit: str = "images") -> str:
    """Return the device, precision and, where images of it are what was timed, size of a run."""
    settings, on = results.settings, device_of(results)
    if not is_timed(results):
        return on
    _, height, width = settings.get("input") or (3, settings["size"], settings["size"])
    pixels = f", {height}x{width} pixels" if unit == "images" else ""
    return f"{on}, {settings['dtype']}{pixels}"


def failure_texts(results: Results) -> list[str]:
    """Return a line for each reason for which anything of a family failed."""
    found: dict[tuple[str, str, str], list[Measurement]] = {}
    for m in results.failures:
        found.setdefault((m.suite, m.family, m.note), []).append(m)
    lines = []
    for (suite, family, note), failed in found.items():
        groups = " and ".join(dict.fromkeys(m.group for m in failed))
        names = list(dict.fromkeys(m.implementation for m in failed))
        which = names[0] if len(names) == 1 else f"{len(names)} implementations"
        lines.append(f"{suite}, {groups}, {family}, {which}: {note}")
    return lines


def is_timed(results: Results) -> bool:
    """Return whether anything was timed; a study trains, at a size and precision of its own."""
    return any(m.suite not in accuracy.STUDIES for m in results.measurements)


def reading(rows: Sequence[ModelRow]) -> str:
    """Return sentences on what the speed-ups are against, and on what to know of them."""
    sentences = []
    for label in dict.fromkeys(row.network.baseline for row in rows):
        plain = next((row for row in rows if row.network.label == label), None)
        if plain is None:
            continue
        over = {batch: b.baseline_rung for batch, b in plain.batches.items() if b.baseline_rung}
        rungs = [f"{over[batch]} at batch {batch}" for batch in batches_of(rows) if batch in over]
        text = " and ".join(rungs) or "none, so there is no speed-up"
        none = [f"batch {batch}" for batch in batches_of(rows) if batch not in over]
        if rungs and none:
            text += f", none at {' and '.join(none)}, so there is no speed-up there"
        others = " that is not ours" if any(b.engine for b in plain.batches.values()) else ""
        sentences.append(f"Speed-ups are over the fastest rung of {label}{others}: {text}.")
    gains = [found.speedup for row in rows for found in row.batches.values()]
    return " ".join([*sentences, *_lesser_baselines(rows), *few_rounds(gains)])


def _lesser_baselines(rows: Sequence[ModelRow]) -> list[str]:
    """Return a sentence for each batch at which a plain network lacks rungs that it may miss."""
    lacking: dict[tuple[str, int], dict[str, None]] = {}
    for row in rows:
        for batch, found in row.batches.items():
            if found.speedup and found.lacking:
                rungs = lacking.setdefault((row.network.baseline, batch), {})
                rungs.update(dict.fromkeys(found.lacking))
    return [lesser(label, rungs, f"batch {batch}") for (label, batch), rungs in lacking.items()]


def lesser(label: str, rungs: Iterable[str], where: str) -> str:
    """Return a sentence on rungs without a time, among which the fastest may be."""
    return (
        f"{label} has no time on {' and '.join(rungs)} at {where}, so speed-ups there may be over "
        "a lesser rung than its fastest."
    )


def gain_header(batches: Sequence[int]) -> list[str]:
    """Return the columns of the table of what a speed-up is made of."""
    names = ("architecture", "our engine", "both")
    return ["network", *(f"{name} b{batch}" for batch in batches for name in names)]


def gain_rows(rows: Sequence[ModelRow]) -> list[list[str]]:
    """Return the cells of that table; none where no rung of ours has a time.

    What the architecture brings is between the fastest rungs that are not ours, of the plain
    network and of this one; what our engine or kernels bring is between this network's fastest
    rung that is not ours and its fastest that is; both are the speed-up of the first table, or
    less where ours is not the fastest.
    """
    batches = batches_of(rows)
    if not any(found.engine for row in rows for found in row.batches.values()):
        return []
    cells = []
    for row in rows:
        found = [row.batches.get(batch) for batch in batches]
        gains = [(b.architecture, b.engine, b.speedup) if b else (None,) * 3 for b in found]
        texts = [ratio_text(gain) for batch in gains for gain in batch]
        cells.append([row.network.label, *texts])
    return cells


def share_rungs(rows: Sequence[ShareRow]) -> list[str]:
    """Return the rungs of the table of the same rung on both sides, in their order."""
    fullest_first = sorted(rows, key=lambda row: -len(row.shares))  # some lack a rung in the middle
    return list(dict.fromkeys(rung for row in fullest_first for rung in row.shares))


def share_header(rungs: Sequence[str]) -> list[str]:
    """Return the columns of that table."""
    return ["network", "batch", *rungs]


def share_cells(rungs: Sequence[str], row: ShareRow) -> list[str]:
    """Return the cells of a row of that table."""
    shares = [ratio_text(row.shares.get(rung)).replace("x", "") for rung in rungs]
    return [row.network.label, str(row.batch), *shares]


# ---------------------------------------------------------------------------- bounds


def ceiling_notes(results: Results) -> list[str]:
    """Return the rates that bounds follow from, as items of a Markdown list."""
    copy, cache, held, product = (
        results.ceilings.get(name)
        for name in ("copy_bandwidth", "cache_bandwidth", "cache_bytes", "matmul_rate")
    )
    lines = []
    if copy:
        lines.append(f"- Copy bandwidth measured in this run: {copy / 1e9:.0f} GB/s.")
    if cache and held:
        lines.append(
            f"- Of a copy within the last caches: {cache / 1e9:.0f} GB/s, the bound of what moves "
            f"at most the {held / 1e6:.0f} MB that they hold."
        )
    if product:
        lines.append(f"- Rate of a matrix product in this run: {product / 1e12:.3g} TFLOP/s.")
    if copy and results.settings["device"] == "cpu":
        lines.append(
            "- On a CPU the rate of a product is that of a 3x3 convolution if that is faster. A "
            "share can pass 100 %: part of a larger map is still in a cache, and memory that is "
            "read more than written is faster than a copy."
        )
    return lines
