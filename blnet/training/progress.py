"""Where a run is: counts, sums and times, in a form that checkpoints hold."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Sums:
    """Running sums over training samples, on the device: nothing waits for them.

    Loss (weighted by samples), samples, samples whose answers were counted, and those right.
    """

    SIZE = 4

    def __init__(self, device: torch.device, values: list[float] | None = None) -> None:
        self.values = torch.zeros(self.SIZE, dtype=torch.float64, device=device)
        if values is not None:
            self.values += torch.tensor(values, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, samples: int, correct: Tensor | None) -> None:
        """Add a micro-batch: its mean loss, its size, and how many were right."""
        loss = loss.detach().double()
        right = loss.new_zeros(()) if correct is None else correct.detach().double()
        # Filled on the device: a number copied there would wait for all that it has to do.
        seen = torch.full_like(loss, samples)
        counted = torch.zeros_like(loss) if correct is None else seen
        self.values += torch.stack([loss * samples, seen, counted, right])


@dataclass(frozen=True)
class Means:
    """Means over training samples.

    Attributes:
        loss: mean loss; NaN where there was no sample.
        accuracy: share that was right; None where the task counts none.
        samples: how many there were.
    """

    loss: float
    accuracy: float | None
    samples: int

    @classmethod
    def of(cls, sums: list[float]) -> Means:
        """Return the means of `Sums`' values."""
        loss, samples, counted, right = sums
        mean = loss / samples if samples else math.nan
        return cls(mean, right / counted if counted else None, int(samples))


@dataclass
class RunProgress:
    """Where a run is. Sums are over all devices.

    Attributes:
        epoch: epochs that are finished.
        epoch_step: steps taken in the epoch that runs.
        step: steps taken in all.
        best: best value of the monitored metric; None before the first evaluation.
        best_epoch: the epoch that it was found after.
        last: what the last evaluation found.
        epoch_sums: `Sums` of the epoch that runs.
        window_sums: `Sums` since the last line of the journal.
        seconds: time that training, evaluating and writing took, in all sessions.
        epoch_seconds: of the epoch that runs, training alone.
        waited: seconds of those spent waiting for data.
        told_seconds: `epoch_seconds` at the last line of the journal.
        told_waited: `waited` then.
        train_seconds: training alone, of all epochs.
        train_waited: waiting alone, of all epochs.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int = 0
    last: dict[str, float] = field(default_factory=dict)
    epoch_sums: list[float] = field(default_factory=lambda: [0.0] * Sums.SIZE)
    window_sums: list[float] = field(default_factory=lambda: [0.0] * Sums.SIZE)
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    waited: float = 0.0
    told_seconds: float = 0.0
    told_waited: float = 0.0
    train_seconds: float = 0.0
    train_waited: float = 0.0

    def end_epoch(self) -> None:
        """Begin the next epoch's account."""
        self.epoch += 1
        self.epoch_step = 0
        self.train_seconds += self.epoch_seconds
        self.train_waited += self.waited
        self.epoch_seconds = self.waited = self.told_seconds = self.told_waited = 0.0
        self.epoch_sums, self.window_sums = [0.0] * Sums.SIZE, [0.0] * Sums.SIZE

    def is_best(self, value: float, maximize: bool) -> bool:
        """Return whether a value of the monitored metric, of the last epoch, is the best; note it.

        No number (NaN) is the best only as long as there is no other.
        """
        if self.best is not None and not math.isnan(self.best):
            better = value > self.best if maximize else value < self.best
        else:
            better = self.best is None or not math.isnan(value)
        if better:
            self.best, self.best_epoch = value, self.epoch
        return better

    def as_dict(self) -> dict[str, Any]:
        """Return the values, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunProgress:
        """Return the progress that `as_dict` gave.

        Raises:
            ValueError: if a value is missing.
        """
        names = {entry.name for entry in dataclasses.fields(cls)}
        if names - values.keys():
            raise ValueError(f"the progress lacks {', '.join(sorted(names - values.keys()))}")
        return cls(**{name: values[name] for name in names})
