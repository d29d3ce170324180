"""Stopping a run: by Ctrl-C, or by the signal that clusters send before they take a machine."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A terminal signals every process at once, and a launcher hands it on to those it started.
_SAME_SECONDS = 1.0


class Interrupted(Exception):  # noqa: N818 - no fault, but a stop that was asked for
    """A run that was asked to stop, and wrote a checkpoint before it did.

    Attributes:
        signal: number of the signal that asked.
        step: the step after which it stopped.
    """

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(signal, step)
        self.signal = signal
        self.step = step

    @property
    def status(self) -> int:
        """The exit status that a shell expects of it."""
        return 128 + self.signal


class Stopper:
    """Notes a first SIGINT or SIGTERM while its `with` block lasts; a second one stops at once.

    What comes within a second of the first is the same request.

    Args:
        accelerator: the devices, which must all stop after the same step.

    Attributes:
        signal: what this process was asked with; 0 without.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal = 0
        self._when = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopper:
        """Take over the signals; only a process's main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._when = number, now
        elif now - self._when > _SAME_SECONDS:
            self._give_back()
            signal.raise_signal(number)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def asked(self) -> int:
        """Return the signal that any process got, 0 without one; all processes ask together."""
        if self.accelerator.num_processes == 1:
            return self.signal
        mine = torch.tensor([self.signal], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())


def endure(worker: int) -> None:
    """Have a loading process outlive a request to stop, which means the run; `worker` is its index.

    Ctrl-C, and many a cluster, signal every process of a group at once, and the step that the run
    finishes before it stops needs its data. Whoever starts such a process must see to its end.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
