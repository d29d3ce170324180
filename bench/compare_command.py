"""`blnet bench compare`, and the flags that hold a run of `blnet bench` against an earlier one."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from blnet.bench.catalogue import default_suites
from blnet.bench.results import Results, read_json, write_text
from blnet.bench.settings import RESULTS, Settings

if TYPE_CHECKING:
    from blnet.bench.compare import Comparison

MOST = 1000.0  # per cent
GATE = "--fail-if-slower"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `blnet bench compare`."""
    add = parser.add_argument
    add("old", metavar="OLD", help=f"{RESULTS} of the run that is held to be good, or its folder")
    add("new", metavar="NEW", help="the same of the run to judge")
    _add_common(parser)
    add("--all", action="store_true", help="show what did not change too, however much it is")
    add("--json", metavar="FILE", type=Path, help="write the comparison as JSON")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags by which `blnet bench` compares what it measured with an earlier run."""
    parser.add_argument(
        "--compare",
        metavar="FILE",
        help=f"{RESULTS} of an earlier run, or its folder: compare with it at the end, as "
        "'blnet bench compare' does",
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        GATE,
        type=percent,
        metavar="PERCENT",
        help="exit with 1 if anything is slower by more than this, such as 5%%, and not by chance "
        "(default: fail nothing)",
    )
    parser.add_argument(
        "--across-devices",
        action="store_true",
        help="compare runs of different devices (default: refuse to)",
    )


def percent(text: str) -> float:
    """Return the share that "5%", "5 %" or "5" stands for: 0.05.

    Raises:
        argparse.ArgumentTypeError: if it is nothing of the kind, or above 1000 %.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip(), re.ASCII)
    # 0.05 may well be meant as a share.
    unsure = found is not None and not found[2] and 0 < float(found[1]) < 1
    if found is None or unsure or float(found[1]) > MOST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no per cent from 0 to {MOST:g}; write it as 5% (below 1 with its sign)"
        )
    return float(found[1]) / 100


def run(arguments: argparse.Namespace) -> int:
    """Compare two runs; see `blnet bench compare --help`.

    Returns:
        0; with a gate 1 if anything is slower, fails now, or nothing could be told.

    Raises:
        ValueError: if a file is no results.json, the runs do not compare, or the JSON cannot be
            written.
    """
    from blnet.bench.compare import compare

    old, new = read_json(Path(arguments.old)), read_json(Path(arguments.new))
    gate = arguments.fail_if_slower
    comparison = compare(old, new, gate or 0.0, arguments.across_devices)
    if arguments.json is not None:
        _write(comparison, arguments.json)
    return _judge(comparison, gate, arguments.all)


def planned(arguments: argparse.Namespace, settings: Settings) -> Results | None:
    """Return the earlier run to compare with, checked before anything is measured.

    Args:
        arguments: of `blnet bench`.
        settings: of the run to come, complete.

    Returns:
        The earlier run; None if the run is not to be compared.

    Raises:
        ValueError: if it cannot be read, or the times of the run to come will not compare.
    """
    if arguments.compare is None:
        for flag, given in ((GATE, arguments.fail_if_slower is not None),
                            ("--across-devices", arguments.across_devices)):  # fmt: skip
            if given:
                raise ValueError(f"{flag} needs a run to compare with; name it with --compare FILE")
        return None
    from blnet.bench.compare import check_comparable, timed
    from blnet.bench.intervals import LEAST_ROUNDS
    from blnet.environment import collect

    old = read_json(Path(arguments.compare))
    environment = collect(settings.device)
    environment = replace(environment, threads=settings.threads or environment.threads)
    to_come = Results(environment.as_dict(), settings.as_dict(), command="")
    check_comparable(old, to_come, arguments.across_devices)
    names = settings.suites or default_suites(settings)
    rounds = [len(m.samples) for key, m in timed(old).items() if key[0] in names]
    if not rounds:
        had = list(dict.fromkeys(key[0] for key in timed(old)))
        raise ValueError(
            f"--compare {arguments.compare} has no time of {', '.join(names)}; it has "
            f"{', '.join(had) or 'none at all'}, and studies are not compared"
        )
    if arguments.fail_if_slower is not None and max(rounds) < LEAST_ROUNDS:
        raise ValueError(
            f"--compare {arguments.compare} has {max(rounds)} rounds, too few to tell what is "
            "slower; measure it again with --repeat 8 or more"
        )
    return old


def judge(arguments: argparse.Namespace, old: Results, new: Results, status: int) -> int:
    """Compare a run that ended with an earlier one, print it, and return the exit status.

    Args:
        arguments: of `blnet bench`.
        old: the earlier run.
        new: the run that ended.
        status: its own exit status, which stands if it is not 0.
    """
    from blnet.bench.compare import compare

    try:
        comparison = compare(old, new, arguments.fail_if_slower or 0.0, arguments.across_devices)
    except ValueError as error:
        # The run itself is written by now, and its own failure or interrupt says more.
        print(f"blnet bench: not compared: {error}", file=sys.stderr)
        return status or 1
    verdict = _judge(comparison, arguments.fail_if_slower, everything=False)
    return status or verdict


def _judge(comparison: Comparison, gate: float | None, everything: bool) -> int:
    from rich.console import Console

    from blnet.bench.progress import PLAIN_WIDTH
    from blnet.bench.report.comparison import print_comparison

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    print_comparison(comparison, console, everything)
    return 0 if gate is None or comparison.passed else 1


def _write(comparison: Comparison, path: Path) -> None:
    try:
        write_text(path, json.dumps(comparison.as_dict(), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ValueError(
            f"--json {path} cannot be written ({error.strerror}); name another file"
        ) from None
