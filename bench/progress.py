"""Says what runs: a bar on a terminal, a line for each group in a log."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

PLAIN_WIDTH = 140  # of a log, which has no width of its own
REFRESH = 0.2  # seconds between redraws: drawing must not take part in what is measured


def error_console() -> Console:
    """Return a console on a copy of standard error, which pytest's capturing cannot reach."""
    file = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace")
    return Console(file=file, width=None if file.isatty() else PLAIN_WIDTH)


class Progress:
    """Shows the progress of a run on standard error while its `with` block lasts.

    Args:
        console: where to; None for standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or error_console()
        # Without a thread of its own: it would take turns with what is measured.
        self._bar = Bar(
            TextColumn("{task.percentage:>3.0f} %"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            auto_refresh=False,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._drawn = 0.0
        self._group = ""

    def __enter__(self) -> Progress:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        self._bar.stop()

    def start(self, total: float) -> None:
        """Say how much work there is, in the unit of `watch`."""
        self._bar.update(self._task, total=total)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def watch(self, step: str, share: float) -> None:
        """Show what runs next, "GROUP: STEP", and count its share of the work as done."""
        if self._bar.disable:
            group = step.split(": ")[0]
            if group != self._group:
                self._group = group
                self.say(f"measuring {group}")
            return
        self._bar.update(self._task, description=step, advance=share)
        now = time.monotonic()
        if share >= 1 or share == 0 or now - self._drawn > REFRESH:
            self._drawn = now
            self._bar.refresh()
