"""A small task to try the loop on: blobs in 4 x 4 pixels, a network with all that has a state."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from blnet.trained import MODEL
from blnet.training import loop
from blnet.training.checkpoints import CheckpointFolder
from blnet.training.config import EmaConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from blnet.training.loading import CorruptSample, mixed_seed
from blnet.training.reporting import Summary
from blnet.training.run import run
from blnet.training.stopping import Interrupted
from blnet.training.task import Batch, Task
from helpers.processes import become

CLASSES = 3
_SIGNALS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}


class TinyData(Dataset[tuple[Tensor, int]]):
    """Blobs (1, 4, 4) around one centre a class, with noise that is drawn at every reading.

    Args:
        count: samples.
        corrupt: indices that cannot be read.
        noise: standard deviation of the noise.
    """

    def __init__(self, count: int, corrupt: tuple[int, ...] = (), noise: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(1)
        self.centres = torch.randn(CLASSES, 1, 4, 4, generator=generator)
        self.count = count
        self.corrupt = corrupt
        self.noise = noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.corrupt:
            raise CorruptSample(f"sample-{index}", "it was spoilt on purpose")
        label = index % CLASSES
        return self.centres[label] + self.noise * torch.randn(1, 4, 4), label


class TinyStream:
    """The same blobs as a stream; a reader's share has no end, unless `ends` is a count of items.

    Args:
        samples: samples in an epoch.
        corrupt: positions in a reader's share that cannot be read.
    """

    def __init__(self, samples: int, corrupt: tuple[int, ...] = ()) -> None:
        self.samples = samples
        self.data = TinyData(3 * samples)
        self.corrupt = corrupt
        self.ends: int | None = None

    def read(self, epoch: int, reader: int, readers: int, skip: int) -> Iterator[Any]:
        """Yield what this reader has after the items it gave earlier."""
        for position in itertools.count(skip) if self.ends is None else range(skip, self.ends):
            if position in self.corrupt:
                yield CorruptSample(f"item-{reader}-{position}", "it was spoilt on purpose")
            else:
                yield self.data[mixed_seed(epoch, reader, readers, position) % len(self.data)]


class TinyTask(Task):
    """Three classes of blobs; the network has batch statistics and draws random numbers.

    Args:
        train: training samples.
        evaluation: samples to evaluate on.
        corrupt: training samples that cannot be read.
        unread: the same of those to evaluate on.
        dropout: probability of dropout.
        norm: whether the network has batch statistics.
        stream: whether the training samples come as a stream.
        trouble: what happens when a step's batch is prepared: "memory" is more than there is,
            "nan" a loss that is no number, "stuck" a step that never ends; "interrupt", "terminate"
            and "kill" are signals, "kill-worker" kills a loading process; none for nothing.
        at: the training batch (of this process) it happens at, counted from 0.
        evaluating: whether it happens at an evaluation's batch instead, counted likewise.
        rank: the process it happens in; None for every one.
    """

    name = "tiny"
    unit = "blobs"
    monitor = "accuracy"

    def __init__(
        self, train: int = 48, evaluation: int = 24, corrupt: tuple[int, ...] = (),
        dropout: float = 0.2, norm: bool = True, stream: bool = False, trouble: str | None = None,
        at: int = 0, rank: int | None = None, evaluating: bool = False,
        unread: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.train_data: Any = TinyStream(train, corrupt) if stream else TinyData(train, corrupt)
        self.eval_data = TinyData(evaluation, unread)
        self.dropout = dropout
        self.norm = norm
        self.trouble = trouble
        self.at = at
        self.rank = rank
        self.evaluating = evaluating
        self.prepared = 0

    def build_model(self) -> nn.Module:
        """Return convolution, BatchNorm, dropout and a classifier."""
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8) if self.norm else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(self.dropout),
            nn.Linear(128, CLASSES),
        )

    def collate(self, samples: list[tuple[Tensor, int]]) -> Batch:
        """Return inputs (N, 1, 4, 4) and targets (N,)."""
        inputs, targets = zip(*samples, strict=True)
        return {"inputs": torch.stack(inputs), "targets": torch.tensor(targets)}

    def prepare(self, batch: Batch, training: bool) -> Batch:
        """Add noise in training, as an augmentation on the device would."""
        if training:
            batch = {**batch, "inputs": batch["inputs"] + 0.1 * torch.rand(())}
        if training is not self.evaluating:
            here = self.rank is None or self.rank == int(os.environ.get("RANK", "0"))
            if self.prepared == self.at and here:
                self._make_trouble()
                if self.trouble == "nan":
                    batch = {**batch, "inputs": batch["inputs"] * math.nan}
            self.prepared += 1
        return batch

    def _make_trouble(self) -> None:
        if self.trouble == "memory":
            torch.empty(2**45)
        elif self.trouble == "stuck":
            while True:
                time.sleep(0.01)
        elif self.trouble in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self.trouble])
        elif self.trouble == "kill-worker":
            multiprocessing.active_children()[0].kill()

    def loss(self, outputs: Tensor, batch: Batch, training: bool) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(outputs.float(), batch["targets"])

    def metrics(self) -> Any:
        """Return the accuracy."""
        return MetricCollection({"accuracy": MulticlassAccuracy(CLASSES, average="micro")})

    def update(self, metrics: Any, outputs: Tensor, batch: Batch) -> None:
        """Add a batch."""
        metrics.update(outputs, batch["targets"])

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return how many are right."""
        right: Tensor = (outputs.argmax(1) == batch["targets"]).sum()
        return right


def tiny_config(folder: str, **changes: Any) -> TrainingConfig:
    """Return a configuration with all that has a state in it, and checkpoints all the time."""
    values: dict[str, Any] = {
        "epochs": 6,
        "batch_size": 12,
        "ema": EmaConfig(decay=0.9),
        "optimizer": OptimizerConfig(lr=0.05, clip_norm=1.0),
        "schedule": ScheduleConfig(warmup_epochs=1),
        "device": "cpu",
        "checkpoint_steps": 3,
        "log_steps": 2,
        "output": folder,
        "resume": "auto",
        "tensorboard": False,
    }
    return TrainingConfig(**{**values, **changes})


def train_tiny(
    folder: str, task: dict[str, Any] | None = None, file_size: int | None = None, **changes: Any
) -> Summary:
    """Train the small task in a folder, going on with what is there; for processes of their own.

    Args:
        folder: the run's folder.
        task: arguments of `TinyTask`.
        file_size: bytes that a file may have, which is how a disk is full for this process alone.
        changes: fields of the configuration.
    """
    torch.set_num_threads(1)
    if file_size is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    return run(TinyTask(**(task or {})), tiny_config(folder, **changes), Path(folder))


def report_tiny(folder: str, *arguments: Any, **changes: Any) -> None:
    """Do as `train_tiny` and exit as the command line would, with what it says in a file."""
    # A process that a forkserver started would start its loading processes the same, slow way.
    multiprocessing.set_start_method("fork", force=True)
    told = Path(f"{folder}.{os.environ.get('RANK', '0')}.txt")
    try:
        train_tiny(folder, *arguments, **changes)
    except Interrupted as stop:
        told.write_text(f"stopped after step {stop.step}")
        sys.exit(128 + stop.signal)
    except (ValueError, OSError) as error:
        told.write_text(str(error))
        sys.exit(2)
    told.write_text("")


def report_eagerly(*arguments: Any, **changes: Any) -> None:
    """Do as `report_tiny`, with every epoch kept before its evaluation too, as long ones are."""
    loop.MOST_LOST = -1.0
    report_tiny(*arguments, **changes)


def lead_group(*arguments: Any, **changes: Any) -> None:
    """Do as `report_tiny`, at the head of a process group: what a terminal's Ctrl-C goes to."""
    os.setpgid(0, 0)
    report_tiny(*arguments, **changes)


def train_together(rank: int, devices: int, port: int, *arguments: Any, **changes: Any) -> None:
    """Do as `report_tiny`, as one of several processes."""
    become(rank, devices, port)
    report_tiny(*arguments, **changes)


def weights(folder: Path, name: str = MODEL) -> dict[str, Tensor]:
    """Return the weights of a run's newest checkpoint, from one of its files."""
    path = CheckpointFolder(folder).latest()
    assert path is not None
    return load_file(path / name)


def check_same_weights(one: Path, other: Path) -> None:
    """Assert that two runs have the same bits in their newest checkpoints, of the same step."""
    names = [path.name for folder in (one, other) if (path := CheckpointFolder(folder).latest())]
    assert len(names) == 2
    assert names[0] == names[1]
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
