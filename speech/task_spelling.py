"""What CTC and frame labels share: a network that spells, frame by frame."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection

from blnet.speech.decode import error_rates, greedy
from blnet.speech.task import SpeechTask
from blnet.training.task import Batch


class SpellingTask(SpeechTask):
    """What CTC and frame labels share: an answer for every frame, and a text that is read off."""

    monitor = "wer"
    maximize = False

    @property
    def classes(self) -> int:
        """The alphabet's characters and the blank."""
        return self.alphabet.size

    def metrics(self) -> MetricCollection:
        """Return word and character error rate."""
        return error_rates()

    def update(self, metrics: Any, outputs: Tensor, batch: Batch) -> None:
        """Add what a batch's logits spell."""
        metrics.update(self.texts(outputs, batch), self.references(batch))

    def texts(self, outputs: Tensor, batch: Batch) -> list[str]:
        """Return what a batch's logits (N, frames, classes) spell, by the best path."""
        found = greedy(outputs.float().log_softmax(-1), self.answered(batch), self.alphabet)
        return [hypothesis.text for hypothesis in found]

    @abstractmethod
    def references(self, batch: Batch) -> list[str]:
        """Return what is said in a batch's recordings."""

    def distillation_loss(
        self, outputs: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """Return T^2 KL(teacher || outputs) at a temperature T, mean over frames, then samples."""
        own = F.log_softmax(outputs.float() / temperature, -1)
        other = F.log_softmax(teacher.float() / temperature, -1)
        apart = F.kl_div(own, other, log_target=True, reduction="none").sum(-1)
        return temperature**2 * mean_inside(apart, self.answered(batch))


def mean_inside(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean over samples of the mean over each one's frames; values are (N, frames)."""
    frames = torch.arange(values.shape[1], device=values.device)
    inside = frames < lengths[:, None]
    return (values.where(inside, 0).sum(1) / lengths).mean()
