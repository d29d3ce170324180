"""Keywords: which word a recording is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from blnet.speech.config import SpeechConfig
from blnet.speech.task import SpeechTask
from blnet.training.task import Batch


class KeywordTask(SpeechTask):
    """Which word a recording is. Targets are classes (N,)."""

    monitor = "accuracy"

    @classmethod
    def target_of(cls, config: SpeechConfig) -> None:
        """Return nothing: a target is the number of the recording's class."""

    @property
    def classes(self) -> int:
        """How many words there are."""
        return len(self.data.classes)

    def _collated(self, targets: list[Tensor]) -> Batch:
        return {"targets": torch.stack(targets)}

    def loss(self, outputs: Tensor, batch: Batch, training: bool) -> Tensor:
        """Return the cross-entropy, in training against smoothed labels."""
        smoothing = self.config.label_smoothing if training else 0.0
        return F.cross_entropy(outputs.float(), batch["targets"], label_smoothing=smoothing)

    def metrics(self) -> MetricCollection:
        """Return the accuracy."""
        return MetricCollection({"accuracy": MulticlassAccuracy(self.classes, average="micro")})

    def update(self, metrics: Any, outputs: Tensor, batch: Batch) -> None:
        """Add a batch's logits."""
        metrics.update(outputs, batch["targets"])

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return how many have the right word's logit on top."""
        right: Tensor = (outputs.argmax(1) == batch["targets"]).sum()
        return right
