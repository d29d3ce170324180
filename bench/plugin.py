"""What the suites need of pytest: their cases as tests, and a session that measures them.

`blnet bench` binds its own session; under plain `pytest bench/suites` one is made from the
environment variable BLNET_BENCH, which holds words of `blnet bench`: suites, such as "models", and
flags, such as "--batch 4 --size 96". Without a suite in it all are run but those that train.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from blnet.bench.catalogue import STUDIES, SUITES
from blnet.bench.results import Measurement
from blnet.bench.session import Case, Session
from blnet.limits import one_line

SESSION = pytest.StashKey[Session]()
FLAGS_VARIABLE = "BLNET_BENCH"


class Bind:
    """A plugin that makes a pytest run measure in a given session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        # What a suite's own code raised; an implementation that failed ends its test in words.
        self.crashes: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Put the session where the suites look for it."""
        config.stash[SESSION] = self._session

    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        """Keep what a test raised beyond the failure of what it measures."""
        error = call.excinfo.value if call.excinfo else None
        if error is not None and not isinstance(error, pytest.fail.Exception):
            self.crashes.append(f"{node.name}: {one_line(error)}")


def session_of(config: pytest.Config) -> Session:
    """Return the session of a pytest run; make it if nobody bound one."""
    if SESSION not in config.stash:
        from blnet.bench.flags import parse_settings

        try:
            settings = parse_settings(shlex.split(os.environ.get(FLAGS_VARIABLE, "")))
            config.stash[SESSION] = Session(settings)
        except ValueError as error:
            raise pytest.UsageError(f"{FLAGS_VARIABLE}: {error}") from None
    return config.stash[SESSION]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of every case that a suite declares."""
    if "case" not in metafunc.fixturenames:
        return
    settings = session_of(metafunc.config).settings
    reason = _left_out(metafunc.module.NAME, settings.suites)
    if reason:
        skip = pytest.mark.skip(reason=reason)
        metafunc.parametrize("case", [pytest.param(None, id="left out", marks=skip)])
        return
    cases: list[Case] = metafunc.module.cases(settings)
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def _left_out(suite: str, named: tuple[str, ...]) -> str:
    """Return why a suite is not run; nothing if it is."""
    # A suite that is not ours cannot be named.
    if suite in named or suite not in SUITES or not (named or suite in STUDIES):
        return ""
    if named:
        return f"{FLAGS_VARIABLE} names other suites"
    return f"it trains, for minutes to days; {FLAGS_VARIABLE}={suite} asks for it"


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[Case], Measurement]:
    """Return what gives a case of this suite its measurement."""
    session = session_of(request.config)
    suite: Any = request.module
    return lambda case: session.measured(suite, case)
