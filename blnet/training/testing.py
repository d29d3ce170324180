"""A small task to try the loop on: points in 4 x 4 pixels, a network with all that has a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from blnet.training.config import EmaConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from blnet.training.loading import CorruptSample
from blnet.training.loop import Summary
from blnet.training.run import run
from blnet.training.task import Batch, Task

CLASSES = 3


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


class TinyTask(Task):
    """Three classes of blobs; the network has batch statistics and draws random numbers."""

    name = "tiny"
    unit = "blobs"
    monitor = "accuracy"

    def __init__(
        self, train: int = 48, evaluation: int = 24, corrupt: tuple[int, ...] = (),
        dropout: float = 0.2,
    ) -> None:  # fmt: skip
        self.train_data = TinyData(train, corrupt)
        self.eval_data = TinyData(evaluation)
        self.dropout = dropout

    def build_model(self) -> nn.Module:
        """Return convolution, BatchNorm, dropout and a classifier."""
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
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
        return batch

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


def train_tiny(folder: str, task: dict[str, Any] | None = None, **changes: Any) -> Summary:
    """Train the small task in a folder, going on with what is there; for processes of their own."""
    torch.set_num_threads(1)
    return run(TinyTask(**(task or {})), tiny_config(folder, **changes), Path(folder))
