"""What a run writes about itself: run.json, metrics.jsonl, TensorBoard's events, summary.png."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blnet.files import written_aside

RUN = "run.json"
METRICS = "metrics.jsonl"
PLOT = "summary.png"
_EVENTS = "tensorboard"


class Journal:
    """Keeps the record of a run; silent in every process but the first.

    A line of metrics.jsonl is {"kind": "train" | "epoch" | "start", "step": n, ...}: means over the
    steps since the last such line, what the evaluation after an epoch found, and the head of the
    log, again for each time the run was resumed. {"kind": "corrupt"} names what could not be read.
    A number that is none (NaN, infinite) is null, which JSON has no other word for.

    Args:
        folder: the run's folder.
        writes: whether this process writes.
        tensorboard: whether to write event files as well.
    """

    def __init__(self, folder: Path, writes: bool, tensorboard: bool) -> None:
        self.folder = folder
        self._writes = writes
        self._tensorboard = tensorboard
        self._file: Any = None
        self._events: Any = None

    def begin(self, step: int = 0, epoch: int = 0) -> None:
        """Open the files.

        Args:
            step: the step from which the run goes on; lines on later steps, of a run that was
                killed, go.
            epoch: epochs that were over then. A run that goes on from an epoch's last step finds
                anew what its evaluation finds.

        Raises:
            OSError: if the files cannot be written.
        """
        if not self._writes:
            return
        rows = read_rows(self.folder) if step else ()
        kept = [
            row
            for row in rows
            if row["step"] <= step and not (row["kind"] == "epoch" and row["epoch"] > epoch)
        ]
        path = self.folder / METRICS
        with written_aside(path) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        if self._tensorboard:
            from blnet.training.events import Events

            self._events = Events(self.folder / _EVENTS, step)

    def head(self, values: dict[str, Any]) -> None:
        """Write run.json: versions, device, seed, command and configuration of the run."""
        if self._file is not None:
            with written_aside(self.folder / RUN) as aside:
                aside.write_text(json.dumps(values, indent=2) + "\n")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a line, and its numbers to TensorBoard.

        Raises:
            OSError: if the disk refuses.
        """
        if self._file is None:
            return
        row = {"kind": kind, "step": step, **{name: _plain(v) for name, v in values.items()}}
        numbers = {f"{kind}/{n}": v for n, v in values.items() if isinstance(v, int | float)}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            if self._events is not None and numbers:
                self._events.write(numbers, step)
        except OSError as error:
            raise OSError(
                f"{self.folder / METRICS} or the files of {_EVENTS} beside it cannot be written "
                f"({error.strerror}); free some space and go on with --resume auto"
            ) from error

    def flush(self) -> None:
        """Have everything on the disk, before a checkpoint that counts on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files; what a full disk did not take, `write` has told already."""
        for file in (self._file, self._events):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(folder: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's metrics.jsonl, or those of one kind; none where there is no file.

    A last line that a killed run left half written is passed over.
    """
    path = folder / METRICS
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and kind in (None, row.get("kind")):
            yield row


def plot(folder: Path, monitor: str, title: str) -> Path | None:
    """Draw loss and the monitored metric over the epochs as summary.png.

    Args:
        folder: the run's folder.
        monitor: the metric, a name in the epochs' lines.
        title: what stands above.

    Returns:
        The file; None where no epoch has ended yet.
    """
    rows = list(read_rows(folder, "epoch"))
    if not rows:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, metric = figure.subplots(1, 2)
    for axes, names, label in (
        (loss, ("train_loss", "loss"), "loss"),
        (metric, (f"train_{monitor}", monitor), monitor),
    ):
        for name, style in zip(names, ("--", "-"), strict=True):
            # Without those that were not evaluated, so that the line has no gaps there.
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            values = [math.nan if value is None else value for _, value in points]
            if not all(map(math.isnan, values)):
                text = "training" if name.startswith("train_") else "evaluation"
                axes.plot([epoch for epoch, _ in points], values, style, marker=".", label=text)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    if all(row.get(name, 1) is None or row.get(name, 1) > 0 for row in rows
           for name in ("train_loss", "loss")):  # fmt: skip
        loss.set_yscale("log")
    figure.suptitle(title, parse_math=False)
    path = folder / PLOT
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    return path
