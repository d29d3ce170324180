"""Runs the suites through pytest, in this process, and finishes a run: files and table."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from blnet.bench.clocks import read_clocks
from blnet.bench.continuing import group_key
from blnet.bench.plugin import Bind
from blnet.bench.results import Results
from blnet.bench.roofline import measure_ceilings_again
from blnet.bench.session import Session

INTERRUPTED = 130  # as a shell reports a command that Ctrl-C ended


def steps(suites: Mapping[str, str], session: Session) -> float:
    """Return how much work is left of the suites: each case is built once and timed once."""
    finished = session.results.finished
    return float(
        sum(
            2
            for suite, module in suites.items()
            for case in importlib.import_module(module).cases(session.settings)
            if group_key(suite, case.group) not in finished
        )
    )


def run_suites(suites: Mapping[str, str], session: Session) -> bool:
    """Run suites into a session.

    Args:
        suites: name -> module.
        session: keeps what is found; `interrupted` in its results tells whether Ctrl-C ended it.

    Returns:
        Whether the suites' own code ran to its end; where it did not, a note says what it raised.

    Raises:
        RuntimeError: if pytest itself failed; the message ends with what it said.
    """
    paths = [_path(module) for module in suites.values()]
    said, bind = io.StringIO(), Bind(session)
    start = time.monotonic()
    # pytest-benchmark makes its folder in the working directory, whether it stores anything or not.
    with (
        _own_pytest(),
        tempfile.TemporaryDirectory(prefix="blnet-bench-") as storage,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        status = pytest.main(_arguments(paths, Path(storage)), plugins=[bind])
    if status != pytest.ExitCode.INTERRUPTED:
        measure_ceilings_again(session)
    session.results.seconds += time.monotonic() - start
    session.results.environment["clocks_after"] = read_clocks(session.settings.device)
    session.results.interrupted = status == pytest.ExitCode.INTERRUPTED
    fine = (
        pytest.ExitCode.OK,
        pytest.ExitCode.TESTS_FAILED,
        pytest.ExitCode.INTERRUPTED,
    )
    # A collection error also counts as interrupted: then there is nothing at all.
    if status not in fine or (session.results.interrupted and "errors during" in said.getvalue()):
        raise RuntimeError(f"pytest could not run the suites:\n{said.getvalue()[-4000:]}")
    if bind.crashes:
        many = f"{len(bind.crashes)} tests, the first in " if len(bind.crashes) > 1 else ""
        session.note(f"a suite's own code failed in {many}{bind.crashes[0]}")
        print(said.getvalue()[-4000:], file=sys.stderr)
    return not bind.crashes


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{module} is not installed as a file")
    return Path(spec.origin)


def _arguments(paths: list[Path], storage: Path) -> list[str]:
    return [
        *map(str, paths),
        f"--rootdir={paths[0].parent}",
        f"--config-file={os.devnull}",  # the settings of the user's project are not ours
        "--import-mode=importlib",
        f"--benchmark-storage={storage.as_uri()}",
        "-p",
        "no:cacheprovider",
        "-q",
    ]


@contextlib.contextmanager
def _own_pytest() -> Iterator[None]:
    """Keep the settings of the user's own pytest out of the run.

    PYTEST_XDIST_WORKER is set where pytest-xdist runs this as a test, and pytest-benchmark would
    switch itself off.
    """
    names = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_XDIST_WORKER")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def finish(results: Results, folder: Path, whole: bool = True) -> int:
    """Write the results, print the table, and return the exit status.

    Args:
        results: of the run.
        folder: where they go.
        whole: what `run_suites` returned: False makes the status 1.
    """
    from rich.console import Console

    from blnet.bench.progress import PLAIN_WIDTH
    from blnet.bench.report import print_tables, write_all

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    print_tables(results, console)
    try:
        written = write_all(results, folder)
    except OSError as error:
        reason = error.strerror or error
        print(f"blnet bench: {folder} could not be written ({reason})", file=sys.stderr)
        whole = False
    else:
        for note in written.notes:
            console.print(note, soft_wrap=True, markup=False, highlight=False)
        console.print(f"written: {folder}/{', '.join(written.files)}", soft_wrap=True)
    if results.interrupted:
        print("blnet bench: interrupted; what was measured until then is kept", file=sys.stderr)
        return INTERRUPTED
    return 1 if results.failures or not whole else 0
