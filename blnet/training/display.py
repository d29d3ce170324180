"""What a run shows: bars on a terminal, lines in a log; nothing in every process but the first."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_WIDTH = 140  # of a log, which has no width of its own
_LINE_SECONDS = 60.0  # between a log's lines inside an epoch


class Display:
    """Shows a run's progress while its `with` block lasts.

    Args:
        unit: what a sample is called, "images" say.
        shows: whether this process shows anything.
        console: where to; None for standard output.
    """

    def __init__(self, unit: str, shows: bool = True, console: Console | None = None) -> None:
        self.unit = unit
        self._shows = shows
        width = None if sys.stdout.isatty() else PLAIN_WIDTH
        self.console = console or Console(width=width, highlight=False)
        self._bar = Progress(
            TextColumn("{task.percentage:>3.0f} %"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
            refresh_per_second=4,
            # Loading processes are forked: none may inherit a stream whose lock a thread holds.
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not (shows and self.console.is_terminal),
        )
        self._task = self._bar.add_task("", total=1)
        self._spoke = time.monotonic()

    def __enter__(self) -> Display:
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

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._shows:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def head(self, facts: dict[str, str]) -> None:
        """Print the head of the log."""
        width = max(map(len, facts))
        for label, text in facts.items():
            self.say(f"{label:<{width}}  {text}")

    def step(
        self,
        done: float,
        epoch: str,
        loss: float,
        accuracy: float | None,
        rate: float,
        seconds_left: float,
    ) -> None:
        """Show where the run is.

        Args:
            done: share of the run's steps that are done, 0 to 1.
            epoch: which epoch of how many.
            loss: mean over the last steps.
            accuracy: likewise, 0 to 1; None where the task counts none.
            rate: samples a second.
            seconds_left: of the whole run.
        """
        parts = [f"epoch {epoch}", f"training: loss {loss:.4f}"]
        if accuracy is not None:
            parts.append(f"accuracy {accuracy:.2%}")
        parts += [f"{rate:,.0f} {self.unit}/s", f"{clock(seconds_left)} left"]
        text = "  ".join(parts)
        self._bar.update(self._task, completed=done, description=text)
        if self._bar.disable and time.monotonic() - self._spoke > _LINE_SECONDS:
            self.spoken()
            self.say(text)

    def spoken(self) -> None:
        """Note that a line was printed just now, so that the next inside an epoch may wait."""
        self._spoke = time.monotonic()


def clock(seconds: float) -> str:
    """Return a duration as 1:02:03 or 2:03."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    start = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{start}:{whole % 60:02d}"


def plain_console() -> Console:
    """Return a console that prints text as it is, in full width where it is no terminal."""
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False)
