"""What a comparison of two runs cannot pair: times that one of them lacks, and whole groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from blnet.bench.catalogue import OF_ANY_NETWORK
from blnet.bench.continuing import group_key
from blnet.bench.results import FAILED, LATE, LEASHED, REPLAYS, Measurement, Results
from blnet.bench.settings import Settings

Key = tuple[str, str, str, str]
Part = tuple[str, str]  # suite and group
Asked = Callable[[Key], bool]
Kind = Literal["lost", "left out", "gone", "only old", "only new"]
NETWORKS = ("models", "model", "branchings", "baseline")  # settings that choose networks


@dataclass(frozen=True)
class Missing:
    """An implementation that has a time in one run only.

    Attributes:
        suite: name of the suite.
        group: name of the group.
        family: what it computes.
        implementation: its name.
        kind: "lost" if the new run has it without a time, "left out" if it says that it lacks it on
            purpose, "gone" if it lacks it although it was asked for it, else the run that has it.
        status: what the new run says of a lost one; "" for the others.
        note: why it has no time, or was left out.
        slower: whether it is ours and was dropped for a time that is slower than the old one by
            more than the threshold, and than its controls became, or for a build that took more
            than twice as long.
        elsewhere: whether the new run was on another device, which may not run it at all.
    """

    suite: str
    group: str
    family: str
    implementation: str
    kind: Kind
    status: str = ""
    note: str = ""
    slower: bool = False
    elsewhere: bool = False

    @property
    def failed(self) -> bool:
        """Whether it raised, is wrong, is too slow to time, or was not tried without need.

        What the old run timed the new one could have, on the same device: a package that is gone
        would else hide that an implementation, or the baseline of all others, is slower.
        """
        untried = self.kind == "gone" or self.status == "skipped"
        return self.slower or self.status in FAILED or (untried and not self.elsewhere)


def key_of(measurement: Measurement) -> Key:
    """Return what names a measurement in a run."""
    return (
        measurement.suite,
        measurement.group,
        measurement.family,
        measurement.implementation,
    )


def asked(old: Results, new: Results) -> Asked:
    """Return what tells whether the new run was asked for something that the old one has.

    It was if it has that case (suite, group and family), or took the suite and its networks as the
    old run did. A quick run is not asked for all that a full one takes, nor a GPU for what a CPU
    runs, and an interrupted run says itself that cases are missing.
    """
    then, now = (Settings.from_dict(run.settings) for run in (old, new))
    if then.device != now.device or (then.full and not now.full):
        return lambda key: False
    cases = {key_of(m)[:3] for m in new.measurements}
    suites = {*now.suites, *(m.suite for m in new.measurements)}
    if (set(then.suites), then.model) == (set(now.suites), now.model):
        suites |= {m.suite for m in old.measurements}
    if any(getattr(then, name) != getattr(now, name) for name in NETWORKS):
        suites -= set(OF_ANY_NETWORK)
    if new.interrupted:
        suites.clear()
    return lambda key: key[:3] in cases or key[0] in suites


def missing(
    before: Mapping[Key, Measurement],
    after: Mapping[Key, Measurement],
    new: Results,
    wanted: Asked,
    slowest: Mapping[Part, float],
    controls: Collection[Key] = (),
    elsewhere: bool = False,
) -> list[Missing]:
    """Return what has a time in one run only.

    Args:
        before: what has a time in the old run.
        after: what has one in the new run.
        new: the new run.
        wanted: what `asked` returns.
        slowest: group of the old run -> times the old median from which on a time is slower.
        controls: which of the old run are not ours.
        elsewhere: whether the new run was on another device.
    """
    untimed = {key_of(m): m for m in new.measurements if not m.timed}
    found = []
    for key, measurement in before.items():
        if key in untimed:
            lost = untimed[key]
            # Its best time while warming up: what is dropped for it has no other.
            limit = measurement.median * slowest[key[:2]]
            # A build that took less than half of the time allowed, and then more than all of it.
            # A graph of what another has compiled is not judged by that: its own build is no more
            # than a capture where that was in time, and all of it where it was not.
            taken = math.inf if REPLAYS in lost.facts else measurement.build_seconds or math.inf
            late = lost.facts.get(LATE, 0.0) > 2 * taken
            slower = lost.facts.get(LEASHED, 0.0) > limit or late
            slower = lost.status == "dropped" and key not in controls and slower
            found.append(Missing(*key, "lost", lost.status, lost.note, slower, elsewhere))
        elif key not in after:
            reason = _left_out(new, key)
            kind: Kind = "left out" if reason else "gone" if wanted(key) else "only old"
            found.append(Missing(*key, kind, note=reason, elsewhere=elsewhere))
    return found + [Missing(*key, "only new") for key in after if key not in before]


def _left_out(new: Results, key: Key) -> str:
    """Return why the new run left something out on purpose; "" if it says nothing of it."""
    suite, group, _, implementation = key
    return new.left_out.get(group_key(suite, group), {}).get(implementation, "")


def lost_groups(
    before: Mapping[Key, Measurement],
    after: Mapping[Key, Measurement],
    new: Results,
    wanted: Asked,
) -> list[Part]:
    """Return the old run's groups of which no pair is left, of those that the new run took."""
    there = {(m.suite, m.group) for m in new.measurements}
    left = {key[:2] for key in before.keys() & after.keys()}
    missed = [key for key in before if not _left_out(new, key)]
    groups = dict.fromkeys(key[:2] for key in missed if key[:2] in there or wanted(key))
    return [group for group in groups if group not in left]
