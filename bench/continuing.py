"""Going on with a run that was interrupted: what it measured is kept, the rest is measured now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blnet.bench.catalogue import SUITES
from blnet.bench.results import Results, read_json
from blnet.bench.settings import RESULTS, Settings
from blnet.wording import counted

# What must be as it was, or the two halves of the run could not be compared.
SAME = (
    "device",
    "gpus",
    "driver",
    "cuda",
    "cpu",
    "cores",
    "threads",
    "python",
    "packages",
    "commit",
)


def read_unfinished(folder: Path) -> Results:
    """Return the results of a run that was interrupted.

    Raises:
        ValueError: if the folder holds no results that can be read, those of a run that was
            finished, or of suites that this version of blnet does not have.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(
            f"--continue {folder}: there is no {RESULTS} in it; name the folder of a run that was "
            "interrupted"
        )
    before = read_json(path)
    if not before.interrupted:
        raise ValueError(f"--continue {folder}: that run is finished; start another one")
    unknown = [name for name in Settings.from_dict(before.settings).suites if name not in SUITES]
    if unknown:
        raise ValueError(
            f"--continue {folder}: that run has the suite {unknown[0]!r}, which this blnet lacks; "
            "go on with the blnet that began it"
        )
    return before


def check_same(before: Results, environment: dict[str, Any]) -> None:
    """Check that a run goes on where it began.

    Args:
        before: what the run has so far.
        environment: of now.

    Raises:
        ValueError: if the machine, the software or the code is another.
    """
    then = differences(before.environment, environment)
    now = differences(environment, before.environment)
    if then:
        name = next(iter(then))
        raise ValueError(
            f"--continue: the run began with {name} {then[name]} and here it is {now[name]}, so "
            "its halves could not be compared; start another run"
        )


def differences(environment: dict[str, Any], other: dict[str, Any]) -> dict[str, str]:
    """Return what of `SAME` an environment has unlike another one, of packages only those."""
    return {
        name: _shown(environment.get(name), other.get(name))
        for name in SAME
        if environment.get(name) != other.get(name)
    }


def _shown(value: Any, other: Any) -> str:
    """Return a fact, of several only what differs from the other."""
    if isinstance(value, dict) and isinstance(other, dict):
        items = [f"{key} {item}" for key, item in value.items() if other.get(key) != item]
        return ", ".join(items) or "less"
    return str(value)


def take_over(results: Results, before: Results) -> None:
    """Put into the results of a run what it measured before it was interrupted.

    A group that was not measured to its end is left out, since its rounds must be one series.

    Args:
        results: of the run that goes on, still empty; changed in place.
        before: what the run has so far.
    """
    finished = set(before.finished)
    results.measurements += [m for m in before.measurements if _group(m) in finished]
    results.finished += before.finished
    results.networks += before.networks
    results.ceilings |= before.ceilings
    results.layers |= {key: found for key, found in before.layers.items() if key in finished}
    results.left_out |= {key: found for key, found in before.left_out.items() if key in finished}
    results.seconds = before.seconds
    results.command = before.command
    date = results.environment["date"]
    results.environment = dict(before.environment)
    results.notes[:0] = [
        *before.notes,
        f"the run was interrupted and went on {date}, with {counted(len(finished), 'group')} "
        "measured before",
    ]


def _group(measurement: Any) -> str:
    return group_key(measurement.suite, measurement.group)


def group_key(suite: str, group: str) -> str:
    """Return what `Results.finished` calls a group."""
    return f"{suite}, {group}"
