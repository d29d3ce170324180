"""What the suites need of pytest: their cases as tests, and a session that measures them.

`blnet bench` binds its own session; under plain `pytest bench/suites` one is made from the
environment variable BLNET_BENCH, which holds flags of `blnet bench`, such as "--batch 4 --size 96".
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from blnet.bench.results import Measurement
from blnet.bench.session import Case, Session

SESSION = pytest.StashKey[Session]()
FLAGS_VARIABLE = "BLNET_BENCH"


class Bind:
    """A plugin that makes a pytest run measure in a given session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Put the session where the suites look for it."""
        config.stash[SESSION] = self._session


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
    cases: list[Case] = metafunc.module.cases(settings)
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[Case], Measurement]:
    """Return what gives a case of this suite its measurement."""
    session = session_of(request.config)
    suite: Any = request.module
    return lambda case: session.measured(suite, case)
