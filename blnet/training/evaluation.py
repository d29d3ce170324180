"""Evaluation: every sample once, over all devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from blnet.training.corrupt import CorruptLog
from blnet.training.loading import Corrupt, Loaded, Loader
from blnet.training.stopping import Stopper
from blnet.training.task import Task, to_device

# What a run opens of its evaluation data before its first step: samples and seconds at most. It
# says so where that takes longer than one waits without a word.
LOOKED_AT, LOOK_SECONDS, SILENT_SECONDS = 5000, 60.0, 3.0


@dataclass(frozen=True)
class Findings:
    """What an evaluation found.

    Attributes:
        values: metric -> number, "loss" among them.
        samples: how many were evaluated, on all devices.
        asked_for: how many were to be, those that could not be read included.
        corrupt: those that this process could not read.
        seconds: how long it took this process.
        waited: how long of that it waited for data.
    """

    values: dict[str, float]
    samples: int
    asked_for: int
    corrupt: list[Corrupt]
    seconds: float
    waited: float

    @property
    def waiting(self) -> float:
        """Share of the time that was spent waiting for data."""
        return self.waited / max(self.seconds, 1e-9)


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    batch_size: int,
    metrics: Any = None,
    before_batch: Callable[[], None] = lambda: None,
) -> Findings:
    """Return what the task's metrics are over its evaluation data.

    Args:
        task: the task.
        model: the network, on the accelerator's device; it is in evaluation mode meanwhile.
        loader: of the evaluation data.
        accelerator: the devices; each evaluates its share.
        batch_size: samples a device takes at once.
        metrics: a metric collection in place of the task's own; it is left filled.
        before_batch: called before each batch; what it raises ends the evaluation.

    Raises:
        ValueError: if nothing could be read, or a loading process dies.
    """
    metrics = (task.metrics() if metrics is None else metrics).to(accelerator.device)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    corrupt: list[Corrupt] = []
    training = model.training
    model.eval()
    waited, start = 0.0, time.monotonic()
    try:
        batches = _batches(task, loader, accelerator, batch_size)
        while True:
            asked = time.monotonic()
            loaded = next(batches, None)
            waited += time.monotonic() - asked
            if loaded is None:
                break
            before_batch()
            corrupt += loaded.corrupt
            if loaded.batch is None:
                continue
            batch = task.prepare(to_device(loaded.batch, accelerator.device), training=False)
            with accelerator.autocast():
                outputs = task.forward(model, batch).float()
            count = task.samples(batch)
            loss = task.loss(outputs, batch, training=False).double()
            sums[:2] += torch.stack([loss * count, torch.full_like(loss, count)])
            task.update(metrics, outputs, batch)
    finally:
        model.train(training)
    sums[2] = len(corrupt)
    loss, samples, unread = accelerator.reduce(sums, "sum").tolist()
    if not samples:
        raise ValueError("the evaluation data has no sample that could be read; check its path")
    values = {name: float(value) for name, value in metrics.compute().items() if value.ndim == 0}
    seconds = time.monotonic() - start
    values = {"loss": loss / samples, **values}
    return Findings(values, int(samples), int(samples + unread), corrupt, seconds, waited)


def look_ahead(
    task: Task,
    loader: Loader,
    accelerator: Accelerator,
    batch_size: int,
    log: CorruptLog,
    stopper: Stopper,
    say: Callable[[str], None],
) -> None:
    """Open what a run will evaluate on, if that is not much, for a minute at most.

    Too many that cannot be read would else end it after an epoch, which may have taken hours.

    Args:
        task: the task.
        loader: of the evaluation data.
        accelerator: the devices; each opens its share.
        batch_size: samples that are opened at once.
        log: takes what cannot be read.
        stopper: knows whether to stop.
        say: tells of it where it takes long.

    Raises:
        ValueError: if more than 1 % cannot be read, or a loading process dies.
    """
    if loader.is_stream or len(task.eval_data) > LOOKED_AT:
        return
    begin, silent = time.monotonic(), True
    for loaded in _batches(task, loader, accelerator, batch_size):
        seconds = time.monotonic() - begin
        if stopper.signal or seconds > LOOK_SECONDS:
            break
        if silent and seconds > SILENT_SECONDS:
            say(f"opening the {len(task.eval_data):,} evaluation {task.unit} before the first step")
            silent = False
        log.add(loaded.corrupt, "evaluation", len(task.eval_data))
    log.share()


def _batches(task: Task, loader: Loader, accelerator: Accelerator, size: int) -> Iterator[Loaded]:
    if loader.is_stream:
        return loader.stream(size, epoch=0)
    own = range(accelerator.process_index, len(task.eval_data), accelerator.num_processes)
    order = [own[start : start + size] for start in range(0, len(own), size)]
    return loader.batches(order, seed=0, epoch=0)
