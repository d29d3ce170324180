"""`blnet bench`: runs suites, prints the table and writes the results."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from datetime import datetime
from pathlib import Path

from blnet.bench import compare_command
from blnet.bench.catalogue import STUDIES, SUITES, default_suites
from blnet.bench.continuing import read_unfinished
from blnet.bench.flags import add_settings, settings_of
from blnet.bench.results import Results
from blnet.bench.settings import Settings, check_writable, resolve
from blnet.bench.studies import SCALES, goes_on

MARKS = {"*": "only with --full", "+": "at batch 1 only with --full", "-": "not installed"}
NEEDED = ("pytest", "pytest_benchmark", "rich", "sklearn", "torchvision", "PIL")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `blnet bench`."""
    add_settings(parser)
    compare_command.add_flags(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for results.json, results.csv, report.md, report.html and a PNG of each suite "
        "(default: results/<date-time>-<device>)",
    )
    parser.add_argument(
        "--continue",
        dest="goes_on",
        metavar="DIR",
        help="go on with the run in this folder, which was interrupted, with its settings",
    )
    parser.add_argument(
        "--list", action="store_true", help="print suites, networks and rungs, and measure nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the suites; see `blnet bench --help`.

    Returns:
        0, 1 if a check failed or the gate of --fail-if-slower, 130 if stopped.
    """
    _check_extra()
    before = _unfinished(arguments)
    settings = Settings.from_dict(before.settings) if before else resolve(settings_of(arguments))
    from blnet.bench import networks, studies

    networks.check(settings)
    for suite in set(settings.suites) & set(STUDIES) if not arguments.list else ():
        studies.check(settings, studies.KINDS[suite])
    if arguments.list:
        print(_listing(settings))
        return 0
    earlier = compare_command.planned(arguments, settings)
    from blnet.bench.progress import Progress
    from blnet.bench.runner import finish, run_suites, steps
    from blnet.bench.session import Session

    folder = Path(arguments.goes_on or arguments.output or _default_folder(settings))
    check_writable(folder, before is not None or goes_on(settings, folder, STUDIES))
    with Progress() as progress:
        session = Session(settings, progress.watch, folder, before)
        for note in session.results.notes:
            progress.say(f"blnet bench: {note}")
        names = settings.suites or default_suites(session.settings)
        suites = {name: SUITES[name][0] for name in names}
        progress.start(steps(suites, session))
        whole = run_suites(suites, session)
    status = finish(session.results, folder, whole)
    if earlier is not None:
        status = compare_command.judge(arguments, earlier, session.results, status)
    if session.results.interrupted:
        print(f"go on with: blnet bench --continue {shlex.quote(str(folder))}", file=sys.stderr)
    return status


def _unfinished(arguments: argparse.Namespace) -> Results | None:
    """Return what the run that --continue names has so far; None for a new run.

    Raises:
        ValueError: if there is no such run, or another flag says what to measure.
    """
    if arguments.goes_on is None:
        return None
    plain = argparse.ArgumentParser()
    configure(plain)
    own = {"goes_on", "compare", "fail_if_slower", "across_devices"}
    for name, value in vars(plain.parse_args([])).items():
        if name not in own and getattr(arguments, name) != value:
            flag = f"SUITE {' '.join(arguments.suites)}" if name == "suites" else f"--{name}"
            raise ValueError(
                f"--continue takes what to measure from {arguments.goes_on}; leave out {flag}"
            )
    return read_unfinished(Path(arguments.goes_on))


def _check_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"blnet bench needs {', '.join(missing)}; install with: pip install 'blnet[bench]'"
        )


def _default_folder(settings: Settings) -> Path:
    return Path("results") / f"{datetime.now():%Y%m%d-%H%M%S}-{settings.device}"


def _listing(settings: Settings) -> str:
    from blnet.bench import networks
    from blnet.bench.ladder import rungs

    lines = ["scales of the studies:"]
    lines += [f"  {name:<24}{scale.about}" for name, scale in SCALES.items()]
    lines.append("suites:")
    lines += [f"  {name:<24}{text}" for name, (_, text) in SUITES.items()]
    lines.append("networks of this run:")
    lines += [f"  {s.label:<24}compared with {s.baseline}" for s in networks.specs(settings)]
    legend = ", ".join(f"{mark} {text}" for mark, text in MARKS.items())
    lines.append(f"rungs on {settings.device} ({legend}):")
    dtype = settings.dtype or "float32"
    quick = {rung.name for rung in rungs(settings.device, dtype=dtype)}
    always = {rung.name for rung in rungs(settings.device, dtype=dtype, batch=1)}
    for rung in rungs(settings.device, full=True):
        mark = "" if rung.name in always else "+" if rung.name in quick else "*"
        mark = mark if rung.is_installed() else "-"
        lines.append(f"  {f'{rung.name} {mark}':<24}{rung.description}")
    return "\n".join(lines)
