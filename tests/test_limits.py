"""Limits of time hold wherever the alarm falls."""

from __future__ import annotations

import time

import pytest

from blnet.limits import OutOfTime, time_limit


class Slow:
    """Takes its time to go, and loses whatever is raised meanwhile, as Python has it."""

    def __del__(self) -> None:
        time.sleep(0.1)


def busy(seconds: float) -> None:
    """Work after an alarm was lost."""
    thing = Slow()
    del thing
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_alarm_that_is_lost_rings_again() -> None:
    with pytest.raises(OutOfTime), time_limit(0.05):
        busy(5)


def test_no_alarm_is_left_behind() -> None:
    with pytest.raises(OutOfTime), time_limit(0.01):
        time.sleep(1)
    time.sleep(0.6)
