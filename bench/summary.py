"""From measurements to the numbers of the tables: speed-ups, realised speed-ups, bandwidths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from blnet.bench.intervals import Ratio, median_ratio
from blnet.bench.results import LEASHED, Measurement, Network, Results
from blnet.bench.roofline import least_seconds


@dataclass(frozen=True)
class NetworkSuite:
    """A suite of whole networks.

    Attributes:
        what: what it times.
        unit: what goes through a network, several of them.
    """

    what: str
    unit: str = "images"


NETWORK_SUITES = {
    "models": NetworkSuite("inference"),
    "training": NetworkSuite("training, forward and backward pass"),
    "speech_models": NetworkSuite("inference, clips of 3 s", "clips"),
}


@dataclass(frozen=True)
class BatchRow:
    """A network at one batch, on its fastest rung.

    Attributes:
        batch: images or clips at once.
        group: what they were timed in; a batch that was halved is timed in another's group.
        rung: name of its fastest rung.
        seconds: median time of a batch.
        throughput: images or clips a second.
        baseline_rung: name of the plain network's fastest rung that is not ours; None if none has
            a time.
        speedup: over that rung; None where the two are one, and where that has no time.
        realised: speed-up divided by the ratio of MACs; None where speedup is.
        architecture: what of the speed-up the architecture brings alone, both networks on their
            fastest rungs that are not ours; None for the plain network.
        engine: what our rungs bring alone, over the network's own fastest rung that is not ours;
            None where no rung of ours has a time.
        peak_memory: bytes; None if not measured.
        lacking: rungs that are not ours and of which the plain network has no time, because it
            failed on them or although this network has one: its fastest may be among them.
    """

    batch: int
    group: str
    rung: str
    seconds: float
    throughput: float
    baseline_rung: str | None
    speedup: Ratio | None
    realised: Ratio | None
    architecture: Ratio | None
    engine: Ratio | None
    peak_memory: int | None
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRow:
    """A network in the table.

    Attributes:
        network: what it is and what it costs.
        mac_ratio: MACs of its plain network divided by its own; None if that was not measured.
        batches: batch -> its numbers there; a batch where no rung has a time is missing.
    """

    network: Network
    mac_ratio: float | None
    batches: dict[int, BatchRow] = field(default_factory=dict)


@dataclass(frozen=True)
class ShareRow:
    """What of a network's saved arithmetic is saved time at a batch.

    Attributes:
        network: what it is.
        batch: images or clips at once.
        shares: rung -> speed-up over the plain network on the same rung, divided by the ratio of
            MACs, of the rungs on which both have a time.
    """

    network: Network
    batch: int
    shares: dict[str, Ratio]


@dataclass(frozen=True)
class OpRow:
    """An implementation of an op at one site.

    Attributes:
        measurement: what was measured.
        bandwidth: counted bytes over the median time, bytes/s; None without a time.
        rate: counted FLOPs over the median time, FLOP/s; None without a time or FLOPs.
        share: the least time that the run's measured rates allow, for the bytes or for the FLOPs,
            whichever takes longer, over the median time; None where they were not measured.
        speedup: over the group's fastest baseline, such as PyTorch's own ways; None without a time
            of both.
        fastest_baseline: whether it is that fastest way.
        over: name of that fastest way; None if no baseline of the group has a time.
        lacking: baselines of the group without a time, among which its fastest may be.
    """

    measurement: Measurement
    bandwidth: float | None
    rate: float | None
    share: float | None
    speedup: Ratio | None
    fastest_baseline: bool
    over: str | None
    lacking: tuple[str, ...] = ()


def fastest(measurements: list[Measurement]) -> Measurement | None:
    """Return the one with the smallest median; None if none has a time."""
    return min((m for m in measurements if m.timed), key=lambda m: m.median, default=None)


def model_rows(results: Results, suite: str = "models") -> list[ModelRow]:
    """Return a row for each network of a suite of whole networks, in their order.

    Args:
        results: of a run.
        suite: one of `NETWORK_SUITES`; without measurements of it there are no rows.
    """
    # A group that could not even be built has no facts.
    measurements = [m for m in results.of(suite) if "batch" in m.facts]
    if not measurements:
        return []
    batches = sorted({m.facts["batch"] for m in measurements})
    families = {m.family for m in measurements}
    networks = [network for network in results.networks if network.label in families]
    macs = {network.label: network.macs for network in networks}
    rows = []
    for network in networks:
        plain_macs = macs.get(network.baseline)
        ratio = plain_macs / network.macs if plain_macs and network.macs else None
        row = ModelRow(network, ratio)
        for batch in batches:
            found = _batch_row(at_batch(results, suite, batch), network, batch, ratio)
            if found is not None:
                group = [m for m in results.of(suite) if m.group == found.group]
                row.batches[batch] = replace(found, lacking=_lacking(group, network))
        rows.append(row)
    return rows


def at_batch(results: Results, suite: str, batch: int) -> list[Measurement]:
    """Return what of a suite of networks has a time at a batch, in one group.

    A batch that was halved may end where another group is, and the two did not take turns.
    """
    found = [m for m in results.of(suite) if m.timed and m.facts.get("batch") == batch]
    return [m for m in found if m.group == found[0].group]


def _batch_row(
    here: list[Measurement], network: Network, batch: int, mac_ratio: float | None
) -> BatchRow | None:
    own = [m for m in here if m.family == network.label]
    best, others = fastest(own), fastest(list(filter(is_baseline, own)))
    if best is None:
        return None
    plain = fastest([m for m in here if m.family == network.baseline and is_baseline(m)])
    ours = fastest([m for m in own if not is_baseline(m)])
    speedup = _over(plain, best)
    return BatchRow(
        batch=batch,
        group=best.group,
        rung=best.implementation,
        seconds=best.median,
        throughput=batch / best.median,
        baseline_rung=plain.implementation if plain else None,
        speedup=speedup,
        realised=speedup.scaled(1 / mac_ratio) if speedup and mac_ratio else None,
        architecture=_over(plain, others) if network.label != network.baseline else None,
        engine=_over(others, ours),
        peak_memory=best.peak_memory,
    )


def _lacking(group: list[Measurement], network: Network) -> tuple[str, ...]:
    """Return the rungs of `BatchRow.lacking` from all of a group, timed or not."""
    others = [m for m in group if is_baseline(m)]
    plain = [m for m in others if m.family == network.baseline]
    own = [m.implementation for m in others if m.family == network.label and m.timed]
    failed = [m.implementation for m in plain if m.failed]
    known = [m.implementation for m in plain if not _unknown(m)]
    return tuple(dict.fromkeys([*failed, *(rung for rung in own if rung not in known)]))


def _unknown(measurement: Measurement) -> bool:
    """Return whether nothing is known of its time, so that it may have been the fastest.

    What was dropped for its times was slower than all that stayed.
    """
    return not measurement.timed and LEASHED not in measurement.facts


def share_rows(results: Results, suite: str, rows: Sequence[ModelRow]) -> list[ShareRow]:
    """Return a row for each batch of each network that shares a rung with its plain network.

    Apart from `model_rows`, as the intervals of every rung take longer than all that is there.

    Args:
        results: of a run.
        suite: one of `NETWORK_SUITES`.
        rows: what `model_rows` returns of it.
    """
    found = []
    for row in rows:
        network = row.network
        if row.mac_ratio is None or network.label == network.baseline:
            continue
        for batch in row.batches:
            here = at_batch(results, suite, batch)
            plain = {m.implementation: m for m in here if m.family == network.baseline}
            own = {m.implementation: m for m in here if m.family == network.label}
            shares = {
                rung: median_ratio(plain[rung].samples, m.samples).scaled(1 / row.mac_ratio)
                for rung, m in own.items()
                if rung in plain
            }
            if shares:
                found.append(ShareRow(network, batch, shares))
    return found


def is_baseline(measurement: Measurement) -> bool:
    """Return whether others are held against it: our own rungs are no baseline."""
    return not measurement.facts.get("ours", False)


def _over(slow: Measurement | None, fast: Measurement | None) -> Ratio | None:
    """Return how much faster one is than another; None where one of them has no time."""
    if slow is None or fast is None or slow is fast:
        return None
    return median_ratio(slow.samples, fast.samples)


def op_suites(results: Results) -> list[str]:
    """Return the names of the suites of single ops in a run, in their order."""
    return list(dict.fromkeys(m.suite for m in results.measurements if "bytes" in m.facts))


def op_rows(results: Results, suite: str) -> list[OpRow]:
    """Return a row for each implementation of an op's suite, in their order."""
    measurements = list(results.of(suite))
    rows = []
    for measurement in measurements:
        same = [m for m in measurements if m.group == measurement.group]
        baselines = [m for m in same if m.facts.get("baseline")]
        plain = fastest(baselines)
        bandwidth = rate = share = speedup = None
        if measurement.timed and "bytes" in measurement.facts:
            bandwidth = measurement.facts["bytes"] / measurement.median
            rate = measurement.facts.get("flops", 0) / measurement.median or None
            share = _share(measurement, results.ceilings)
        if measurement.timed and plain:
            speedup = median_ratio(plain.samples, measurement.samples)
        row = OpRow(
            measurement,
            bandwidth,
            rate,
            share,
            speedup,
            measurement is plain,
            plain.implementation if plain else None,
            tuple(m.implementation for m in baselines if _unknown(m)),
        )
        rows.append(row)
    return rows


def _share(measurement: Measurement, ceilings: dict[str, float]) -> float | None:
    if "copy_bandwidth" not in ceilings:
        return None
    moved, flops = measurement.facts["bytes"], measurement.facts.get("flops", 0)
    return least_seconds(moved, flops, ceilings) / measurement.median
