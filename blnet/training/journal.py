"""What a run writes about itself: run.json, metrics.jsonl, TensorBoard's events, summary.png."""

from __future__ import annotations

import json
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
    log, again for each time the run was resumed.

    Args:
        folder: the run's folder.
        writes: whether this process writes.
        tensorboard: whether to write event files as well.
        step: the step from which the run goes on; later lines, of a run that was killed, go.

    Raises:
        OSError: if the files cannot be written.
    """

    def __init__(self, folder: Path, writes: bool, tensorboard: bool, step: int = 0) -> None:
        self.folder = folder
        self._file: Any = None
        self._events: Any = None
        if not writes:
            return
        kept = [row for row in read_rows(folder) if row.get("step", 0) <= step]
        if not step:
            kept = []
        path = folder / METRICS
        with written_aside(path) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._events = SummaryWriter(str(folder / _EVENTS), purge_step=step + 1)

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
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{self.folder / METRICS} cannot be written ({error.strerror}); free some space "
                "and go on with --resume auto"
            ) from error
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Have everything on the disk, before a checkpoint that counts on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


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
    epochs = [row["epoch"] for row in rows]
    for axes, names, label in (
        (loss, ("train_loss", "loss"), "loss"),
        (metric, (f"train_{monitor}", monitor), monitor),
    ):
        for name, style in zip(names, ("--", "-"), strict=True):
            values = [row.get(name) for row in rows]
            if any(value is not None for value in values):
                text = "training" if name.startswith("train_") else "evaluation"
                axes.plot(epochs, [float("nan") if v is None else v for v in values],
                          style, marker=".", label=text)  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_yscale("log")
    figure.suptitle(title)
    path = folder / PLOT
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    return path
