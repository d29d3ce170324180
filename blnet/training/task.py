"""What is trained: a model, its data, a loss and metrics. Vision and speech each give tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blnet.profiling import Profile
from blnet.training.loading import Stream, shuffled_batches

Batch = dict[str, Any]


class Task(ABC):
    """A task for `blnet.training.Trainer`.

    A batch is a dict of tensors with the samples in their first dimension. Data sets raise
    `CorruptSample` for what they cannot read and draw from torch's global random state only, which
    is seeded for every sample; `prepare` and the network may draw from Python's and NumPy's too,
    which are seeded for every micro-batch.

    Attributes:
        name: one word, "vision" say.
        unit: what a sample is called, "images" say.
        monitor: the metric by which the best network is chosen, a key of `metrics`' results.
        maximize: whether more of it is better.
        one_shape: whether all batches but the last of an epoch have one shape.
        told: further metrics, of which the last values are told at a run's end.
        train_data: map-style data set, or a `blnet.training.loading.Stream`.
        eval_data: likewise.
    """

    name: str
    unit: str
    monitor: str
    maximize: bool = True
    one_shape: bool = False
    told: tuple[str, ...] = ()
    train_data: Any
    eval_data: Any

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the network to train; torch's random state is seeded before."""

    @abstractmethod
    def collate(self, samples: list[Any]) -> Batch:
        """Return the batch of some samples; called in the loading processes."""

    @abstractmethod
    def prepare(self, batch: Batch, training: bool) -> Batch:
        """Return the batch as the network takes it; called on the device."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch, training: bool) -> Tensor:
        """Return the mean loss of a batch's samples, a scalar."""

    @abstractmethod
    def metrics(self) -> Any:
        """Return a new torchmetrics.MetricCollection for the evaluation."""

    @abstractmethod
    def update(self, metrics: Any, outputs: Tensor, batch: Batch) -> None:
        """Add a batch's results to the metrics."""

    @abstractmethod
    def correct(self, outputs: Tensor, batch: Batch) -> Tensor | None:
        """Return how many of a training batch are right, a scalar; None: nothing is counted."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the network's outputs for a prepared batch."""
        outputs: Tensor = model(batch["inputs"])
        return outputs

    def samples(self, batch: Batch) -> int:
        """Return how many samples a batch has."""
        return len(batch["inputs"])

    def batches(self, size: int, seed: int, epoch: int) -> Sequence[Sequence[int]]:
        """Return an epoch's micro-batches as lists of indices, for a map-style data set."""
        return shuffled_batches(len(self.train_data), size, seed, epoch)

    def distillation_loss(
        self, outputs: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """Return T^2 KL(teacher || outputs) at a temperature T, mean over the samples.

        Args:
            outputs: logits (N, classes).
            teacher: the teacher's logits, likewise.
            batch: the batch, for lengths and masks.
            temperature: what both are divided by.
        """
        own = F.log_softmax(outputs.float() / temperature, dim=1)
        other = F.log_softmax(teacher.float() / temperature, dim=1)
        return temperature**2 * F.kl_div(own, other, log_target=True, reduction="batchmean")

    def as_teacher(self, network: nn.Module, extra: Mapping[str, Any]) -> nn.Module:
        """Return what `forward` asks to learn from a network, of a checkpoint that says this.

        Raises:
            ValueError: if the network cannot teach.
        """
        return network

    def identity(self) -> dict[str, Any]:
        """Return what tells the data from other data: what a fact counts -> its value.

        A run goes on only with data of the same facts; what goes unnamed may change. Values are
        plain, fit for JSON.
        """
        parts = {"training": self.train_data, "evaluation": self.eval_data}
        counts = {name: count_of(data) for name, data in parts.items()}
        return {f"{name} {self.unit}": count for name, count in counts.items() if count}

    def cost(self, model: nn.Module) -> Profile:
        """Return parameters, and MACs for one sample; of speech for a second of it.

        Raises:
            NotImplementedError: of a task that does not say.
        """
        raise NotImplementedError(f"the task {self.name} does not say what a sample is")

    def header(self) -> dict[str, Any]:
        """Return what a checkpoint must carry for evaluation and prediction, fit for JSON."""
        return {}

    def facts(self, model: nn.Module) -> dict[str, str]:
        """Return what the head of the log tells of the network and the data, label -> text."""
        return {}


def count_of(data: Any) -> int:
    """Return how many samples a data set has; 0 for a stream that does not know."""
    return int(data.samples if isinstance(data, Stream) else len(data))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on a device; from page-locked memory without waiting."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
