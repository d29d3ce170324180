"""Limits of time and memory that work may pass, and failures told on one line."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")


_AGAIN = 0.5  # seconds from one alarm to the next


class OutOfTime(BaseException):
    """Work passed its time. Not an Exception, so that no library's handler swallows it."""


class UnavailableError(Exception):
    """Something that cannot run on this machine; the message says what it needs."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop what runs inside after so many seconds, where the system has an alarm to set.

    Raises:
        OutOfTime: if the time is up. Outside the main thread, or on a system without timers, the
            work runs to its end.
    """
    able = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not able:
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTime

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    # Python swallows what is raised in a __del__ or a callback of a weak reference: ring again.
    others, again = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # should it have rung just before the first
        signal.signal(signal.SIGALRM, before)
        if others:
            # Somebody else's alarm (pytest-timeout's) was running: give back what is left of it.
            left = others - (time.monotonic() - start)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), again)


def one_line(failure: BaseException) -> str:
    """Return an exception as one line of at most 300 characters."""
    text = " ".join(str(failure).split())
    line = f"{type(failure).__name__}: {text}" if text else type(failure).__name__
    return line if len(line) <= 300 else f"{line[:297]}..."
