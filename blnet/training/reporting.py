"""What is told of a run while it runs, on the screen and in the journal, and what it came to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from blnet.training.config import TrainingConfig
from blnet.training.display import Display
from blnet.training.evaluation import Findings
from blnet.training.journal import Journal
from blnet.training.progress import Means, RunProgress
from blnet.training.task import Task

# Above this share of an epoch's time, if that is a second at least, data is the bottleneck.
WAITING_TOLD = 0.1


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        best: best value of the task's monitored metric.
        best_epoch: the epoch after which it was found, counted from 1.
        last: what the last evaluation found, metric -> number.
        seconds: time in all, of every session.
        train_seconds: time spent in training steps.
        samples_per_second: samples trained on a second, evaluation left out.
        waiting: share of the training time that was spent waiting for data.
        folder: the run's folder.
    """

    best: float
    best_epoch: int
    last: dict[str, float]
    seconds: float
    train_seconds: float
    samples_per_second: float
    waiting: float
    folder: Path

    @classmethod
    def of(cls, progress: RunProgress, samples: int, folder: Path) -> Summary:
        """Return what a run has come to that trains on so many samples an epoch."""
        spent = max(progress.train_seconds, 1e-9)
        return cls(
            best=math.nan if progress.best is None else progress.best,
            best_epoch=progress.best_epoch,
            last=progress.last,
            seconds=progress.seconds,
            train_seconds=progress.train_seconds,
            samples_per_second=progress.epoch * samples / spent,
            waiting=progress.train_waited / spent,
            folder=folder,
        )


@dataclass
class Reporter:
    """Tells how a run goes.

    Attributes:
        task: what is trained.
        config: how.
        steps: steps an epoch.
        workers: loading processes on each device.
        display: the screen.
        journal: the record.
    """

    task: Task
    config: TrainingConfig
    steps: int
    workers: int
    display: Display
    journal: Journal

    def step(self, progress: RunProgress, means: Means, lr: float) -> None:
        """Tell of the steps since the last line.

        Raises:
            OSError: if the journal cannot be written.
        """
        spent = max(progress.epoch_seconds - progress.told_seconds, 1e-9)
        rate = means.samples / spent
        total = self.config.epochs * self.steps
        done = progress.train_seconds + progress.epoch_seconds
        self.display.step(
            progress.step / total,
            f"{progress.epoch + 1}/{self.config.epochs}",
            means.loss,
            means.accuracy,
            rate,
            done / progress.step * (total - progress.step),
        )
        self.journal.write(
            "train",
            progress.step,
            epoch=progress.epoch + 1,
            loss=means.loss,
            accuracy=means.accuracy,
            lr=lr,
            samples_per_second=rate,
            waiting=(progress.waited - progress.told_waited) / spent,
        )

    def epoch(
        self, progress: RunProgress, trained: Means, found: Findings | None, best: bool,
        seconds: float, waited: float,
    ) -> None:  # fmt: skip
        """Tell of an epoch.

        Args:
            progress: where the run is after it.
            trained: means over its training.
            found: what the evaluation found; None without one.
            best: whether that is the best so far.
            seconds: how long it trained.
            waited: how long of that it waited for data.

        Raises:
            OSError: if the journal cannot be written.
        """
        spent = max(seconds, 1e-9)
        waiting = waited / spent
        rate = self.steps * self.config.batch_size / spent
        accuracy = {} if trained.accuracy is None else {"train_accuracy": trained.accuracy}
        self.journal.write(
            "epoch",
            progress.step,
            epoch=progress.epoch,
            train_loss=trained.loss,
            **accuracy,
            **({} if found is None else found.values),
            best=progress.best,
            seconds=spent,
            samples_per_second=rate,
            waiting=waiting,
            **({} if found is None else _account(found)),
        )
        self.display.spoken()
        self.display.say(
            f"epoch {progress.epoch}/{self.config.epochs}  training: loss {trained.loss:.4f}  "
            f"{'' if found is None else _shown(found, best)}"
            f"{rate:,.0f} {self.task.unit}/s, {waiting:.0%} of the time waiting for data"
        )
        self._warn("training", waiting, waited)
        if found is not None:
            self._warn("evaluation", found.waiting, found.waited)

    def _warn(self, part: str, waiting: float, waited: float) -> None:
        if waiting > WAITING_TOLD and waited > 1:
            self.display.say(
                f"warning: data is the bottleneck: {waiting:.0%} of the {part} time went into "
                f"waiting for it; raise --workers (now {self.workers})"
            )


def _account(found: Findings) -> dict[str, float]:
    """Return where an evaluation's time went, for the journal."""
    return {"evaluation_seconds": found.seconds, "evaluation_waiting": found.waiting}


def _shown(found: Findings, best: bool) -> str:
    """Return what an evaluation found, for an epoch's line; all but the loss are shares."""
    values = "  ".join(
        f"{name} {value:.4f}" if name == "loss" else f"{name} {value:.2%}"
        for name, value in found.values.items()
    )
    return f"evaluation: {values}{' (best)' if best else ''}  "
