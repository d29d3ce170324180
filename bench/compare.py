"""Compares two runs: which implementations became slower, and by how much.

A pair is an implementation that has a time in both runs. Its ratio is new over old, of medians,
with a bootstrap interval (each run resampled for itself). It is called slower only if both hold:

- a rank test (Mann-Whitney, one-sided, of the new times against the old ones times 1 + threshold,
  corrected by Holm over all pairs of the comparison) gives p <= 0.01, so that identical code is
  called slower in fewer than one comparison of a hundred;
- the lower end of the interval is above 1 + threshold.

Both are asked twice: of the times as they are, and of the times held against the controls. Controls
are implementations that are not ours: other projects' ways to run the plain network or the op, some
of them on a network that our folding prepared; they run in the same rounds, so a machine that runs
slower as a whole (frequency, another process) moves them too. Two runs on the machine of
`bench/results` lay 11 % apart at batch 1 and 15 % at batch 8, PyTorch's own ways like ours: judged
by the times alone, a gate of 5 % would have failed on all of them. To be slower, an implementation
must have moved more than each control did, for how far the controls lie apart is how far identical
code may. So the verdict is

- slower or faster if the times say so, and they say so against the controls too;
- unclear if only one of the two says so: all of the group became slower, or a slow-down hides in a
  machine that became faster. It does not fail a gate, but is always shown and counted, so that
  nothing is hidden: measure both again on an idle machine;
- too few if a run has fewer than five rounds, whose ratios have no interval, or even the smallest p
  that so few can give, every new time above every old one, is not small enough.

The controls of a Big-Little network are those of the plain network alone: its own eager rung gets
slower when our blocks do. A control is held against the other controls, and with fewer than two
others against itself. In a group without any the times decide alone, and a slower machine looks
like slower code.

What has no time in the new run fails a gate if it raised, is wrong, was skipped, was dropped for
times that are slower, or is gone: the new run was asked for it and says nothing of it
(`blnet.bench.missing`). So do a group without any pair, and a run that was interrupted. What the
new run was not asked for (other suites or networks, a quick run after a full one), or says that it
left out on purpose (`Results.left_out`), fails nothing, but all that only the old run has is
counted.

What differs between two runs of one implementation but not between its rounds, such as where its
buffers lie, is in no sample: a threshold must stay above it, and 5 % is little for ops of a few
milliseconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from blnet.bench.catalogue import STUDIES
from blnet.bench.changes import Array, Change, change, corrected
from blnet.bench.intervals import RESAMPLES, Ratio
from blnet.bench.missing import Key, Missing, Part, asked, key_of, lost_groups, missing
from blnet.bench.results import Measurement, Results
from blnet.bench.settings import Settings

Verdict = Literal["slower", "faster", "same", "unclear", "too few"]
Pairs = list[tuple[Measurement, Measurement]]
ALPHA = 0.01  # of a comparison as a whole
DEVICE = ("device", "gpus", "cpu", "cpu_features")
SETTINGS = ("dtype", "batch", "size", "input", "graphs")
SOFTWARE = ("python", "driver", "cuda", "system", "commit")


@dataclass(frozen=True)
class Row:
    """An implementation that has a time in both runs.

    Attributes:
        suite: name of the suite.
        group: name of the group.
        family: what it computes.
        implementation: its name.
        old: median time in the old run, seconds.
        new: median time in the new run, seconds.
        rounds: how many samples each run has.
        ratio: new over old.
        relative: the ratio divided by the median of the controls'; None without controls.
        p: of the rank test on the times, in the direction that they moved, corrected; small if
            they moved by more than the threshold.
        control: whether it is a control.
        verdict: see the module.
    """

    suite: str
    group: str
    family: str
    implementation: str
    old: float
    new: float
    rounds: tuple[int, int]
    ratio: Ratio
    relative: Ratio | None
    p: float
    control: bool
    verdict: Verdict


@dataclass(frozen=True)
class Shift:
    """How much the controls of a group moved.

    Attributes:
        suite: name of the suite.
        group: name of the group.
        ratio: median over the controls of new over old.
        controls: how many there are.
    """

    suite: str
    group: str
    ratio: Ratio
    controls: int


@dataclass(frozen=True)
class Comparison:
    """Two runs compared.

    Attributes:
        threshold: share of the old time from which on a slow-down counts, 0.05 for 5 %.
        rows: a row for each pair.
        shifts: one for each group that has controls.
        missing: what has a time in one run only.
        notes: what differs between the runs beside their code: versions, commits.
        lost_groups: (suite, group) of the old run that the new one took, without any pair.
        interrupted: whether the new run was, so that it may lack what would have been slower.
        where: the device and the precision, of both runs where they differ.
    """

    threshold: float
    rows: list[Row]
    shifts: list[Shift]
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost_groups: list[Part] = field(default_factory=list)
    interrupted: bool = False
    where: str = ""

    def of(self, verdict: Verdict) -> list[Row]:
        """Return the rows with a verdict."""
        return [row for row in self.rows if row.verdict == verdict]

    @property
    def blind(self) -> bool:
        """Whether no row has rounds enough to tell anything."""
        return len(self.of("too few")) == len(self.rows)

    @property
    def passed(self) -> bool:
        """Whether nothing is slower, gone or lost its time by failing, and all could be told."""
        lost = self.lost_groups or any(missing.failed for missing in self.missing)
        return not (self.of("slower") or lost or self.interrupted or self.blind)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, fit for JSON."""
        return {**asdict(self), "passed": self.passed}


def compare(
    old: Results,
    new: Results,
    threshold: float = 0.0,
    across_devices: bool = False,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare two runs.

    Args:
        old: the run that is held to be good.
        new: the run to judge.
        threshold: how much slower is too slow, as a share: 0.05 for 5 %.
        across_devices: let the devices differ.
        resamples: of the bootstrap.

    Raises:
        ValueError: if their times cannot be compared, or no implementation has a time in both.
    """
    check_comparable(old, new, across_devices)
    before, after = timed(old), timed(new)
    if not before.keys() & after.keys():
        raise ValueError(
            "no implementation has a time in both runs; give two runs of the same suites and "
            "networks"
        )
    groups: dict[Part, Pairs] = {}
    for key, measurement in before.items():
        if key in after:
            groups.setdefault(key[:2], []).append((measurement, after[key]))
    changes = list(_changes(groups.values(), threshold, resamples))
    wanted = asked(old, new)
    return Comparison(
        threshold,
        _rows(list(groups.values()), changes, threshold),
        [
            Shift(*key, found.shift, found.controls)
            for key, found in zip(groups, changes, strict=True)
            if found.shift is not None
        ],
        missing(
            before,
            after,
            new,
            wanted,
            _slowest(before, groups, threshold),
            {key for key, measurement in before.items() if is_control(measurement)},
            any(old.environment.get(fact) != new.environment.get(fact) for fact in DEVICE),
        ),
        _differences(old, new),
        lost_groups(before, after, new, wanted),
        new.interrupted,
        _where(old, new),
    )


def check_comparable(old: Results, new: Results, across_devices: bool = False) -> None:
    """Check that the times of two runs may be compared.

    Args:
        old: a run.
        new: another one, or one to come, of which only environment and settings are there.
        across_devices: let the devices, and their numbers of threads, differ.

    Raises:
        ValueError: if devices or settings differ.
    """
    for fact in () if across_devices else DEVICE:
        ours, theirs = (run.environment.get(fact) for run in (old, new))
        if _text(ours) != _text(theirs):
            raise ValueError(
                f"the runs are of different devices ({fact}: {_text(ours)} and {_text(theirs)}), "
                "whose times say nothing on the code; add --across-devices to compare all the same"
            )
    # What a run of an earlier version does not have is the default.
    settings = [Settings.from_dict(run.settings) for run in (old, new)]
    set_to = {name: [_text(getattr(of, name)) for of in settings] for name in SETTINGS}
    different = [
        f"{name} ({' and '.join(values)})"
        for name, values in set_to.items()
        if values[0] != values[1]
    ]
    threads = [run.environment.get("threads") for run in (old, new)]
    if not across_devices and old.settings.get("device") == "cpu" and threads[0] != threads[1]:
        different.append(f"threads ({threads[0]} and {threads[1]})")
    after = timed(new)
    for key, measurement in timed(old).items():
        batches = [m.facts.get("batch") for m in (measurement, after.get(key, measurement))]
        if batches[0] != batches[1] and not different:
            different.append(f"the batch of {', '.join(key)} ({batches[0]} and {batches[1]})")
    if different:
        raise ValueError(
            f"the runs differ in {', '.join(different)}, so their times do not compare; measure "
            "again with the settings of the old run"
        )


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def is_control(measurement: Measurement) -> bool:
    """Return whether it is not ours: PyTorch's and other projects' ways, of the plain network."""
    facts = measurement.facts
    baseline = facts.get("baseline")
    if isinstance(baseline, str):
        plain = baseline == facts.get("network") and facts.get("alpha") is None
        return plain and not facts.get("ours", False)
    return baseline is True


def timed(results: Results) -> dict[Key, Measurement]:
    """Return what can be compared: a study trains, and its samples are no repetitions."""
    return {key_of(m): m for m in results.measurements if m.timed and m.suite not in STUDIES}


# ---------------------------------------------------------------------------- verdicts


def _changes(groups: Iterable[Pairs], threshold: float, resamples: int) -> Iterator[Change]:
    for pairs in groups:
        control = np.array([is_control(old) for old, _ in pairs])
        old, new = (_samples(run) for run in zip(*pairs, strict=True))
        yield change(old, new, control, threshold, resamples)


def _samples(measurements: Iterable[Measurement]) -> Array:
    """Return the samples of a group in one run, (implementations, rounds that all have)."""
    samples = [measurement.samples for measurement in measurements]
    rounds = min(map(len, samples))
    return np.array([times[:rounds] for times in samples], dtype=np.float64)


def _rows(groups: list[Pairs], changes: list[Change], threshold: float) -> list[Row]:
    p = corrected(np.concatenate([found.p for found in changes], axis=1))
    rows: list[Row] = []
    for pairs, found in zip(groups, changes, strict=True):
        for number, (old, new) in enumerate(pairs):
            here = p[:, len(rows)]
            verdict = _verdict(found, number, here, threshold)
            if verdict == "same" and found.least_p * p.shape[1] > ALPHA:
                verdict = "too few"
            rows.append(
                Row(
                    *key_of(old),
                    old=old.median,
                    new=new.median,
                    rounds=(len(old.samples), len(new.samples)),
                    ratio=found.ratios[number],
                    relative=found.relatives[number] if found.controls else None,
                    p=float(here[0 if found.ratios[number].value >= 1 else 2]),
                    control=is_control(old),
                    verdict=verdict,
                )
            )
    return rows


def _verdict(found: Change, number: int, p: Array, threshold: float) -> Verdict:
    """Return what the times say, and the times against the controls, of one implementation."""
    sure, above, below = p <= ALPHA, 1 + threshold, 1 / (1 + threshold)
    slower = (
        bool(sure[0] and found.ratios[number].above(above)),
        bool(sure[1] and found.over_most[number].above(above)),
    )
    faster = (
        bool(sure[2] and found.ratios[number].below(below)),
        bool(sure[3] and found.over_least[number].below(below)),
    )
    if all(slower):
        return "slower"
    if all(faster):
        return "faster"
    return "unclear" if any(slower + faster) else "same"


# ---------------------------------------------------------------------------- the rest


def _slowest(
    before: Iterable[Key], groups: dict[Part, Pairs], threshold: float
) -> dict[Part, float]:
    """Return for each group times the old median from which on a time is slower, controls or not.

    What was dropped has a time or two, too few for a test: it is slower where it is so by more
    than the threshold and than every control became.
    """
    found = {key[:2]: 1 + threshold for key in before}
    for group, pairs in groups.items():
        moved = [new.median / old.median for old, new in pairs if is_control(old)]
        found[group] *= max([1.0, *moved])
    return found


def _where(old: Results, new: Results) -> str:
    devices = dict.fromkeys(_text(run.environment.get("device")) for run in (old, new))
    return f"{' -> '.join(devices)}, {_text(new.settings.get('dtype'))}"


def _differences(old: Results, new: Results) -> list[str]:
    """Return what differs between two runs: software first, then what each of them noted."""
    packages = [run.environment.get("packages") or {} for run in (old, new)]
    facts = [
        {**{name: run.environment.get(name) for name in SOFTWARE}, **versions}
        for run, versions in zip((old, new), packages, strict=True)
    ]
    changed = [
        f"{name} {_text(facts[0].get(name))} -> {_text(facts[1].get(name))}"
        for name in dict.fromkeys([*facts[0], *facts[1]])
        if facts[0].get(name) != facts[1].get(name)
    ]
    devices = [run.environment.get("device") for run in (old, new)]
    if devices[0] != devices[1]:
        changed.insert(0, f"device {_text(devices[0])} -> {_text(devices[1])}")
    changed += [
        f"the {name} run was interrupted: what it had not measured by then is not compared"
        for name, run in (("old", old), ("new", new))
        if run.interrupted
    ]
    said = [f"{name}: {note}" for name, run in (("old", old), ("new", new)) for note in run.notes]
    return changed + said
