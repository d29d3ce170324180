"""Frame labels, as in the paper: `blnet align` makes them from a CTC network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blnet.speech.alignment import FrameLabels
from blnet.speech.config import SpeechConfig
from blnet.speech.data import SpeechData
from blnet.speech.recordings import Utterance
from blnet.speech.task_spelling import SpellingTask, mean_inside
from blnet.training.task import Batch

_PADDING = -100  # a label that counts for nothing; torch's own choice


class FrameTask(SpellingTask):
    """Frame labels, as in the paper: cross-entropy on every frame.

    Targets are classes (N, frames of the longest), padded with -100, and "target_lengths" (N,).
    """

    def __init__(self, config: SpeechConfig, data: SpeechData | None = None) -> None:
        if config.augment.shift:
            raise ValueError(
                "--augment.shift moves a recording against its frame labels; set it to 0"
            )
        super().__init__(config, data)

    @classmethod
    def target_of(cls, config: SpeechConfig) -> Callable[[Utterance], Tensor]:
        """Return what finds a recording's frame labels.

        Raises:
            ValueError: if the configuration names none, or others than its alphabet's.
            OSError: if they are not there.
        """
        if config.data.labels is None:
            raise ValueError(
                "--task frame needs --data.labels, a folder of frame labels: 'blnet align' writes "
                "one from a CTC run"
            )
        labels = FrameLabels.load(config.data.labels)
        if labels.alphabet.characters != config.data.alphabet:
            raise ValueError(
                f"--data.labels {config.data.labels} is spelled with "
                f"{labels.alphabet.characters!r}; give --data.alphabet the same characters"
            )
        return Labelling(labels)

    def _collated(self, targets: list[Tensor]) -> Batch:
        return {
            "targets": pad_sequence(targets, batch_first=True, padding_value=_PADDING),
            "target_lengths": torch.tensor([len(target) for target in targets]),
        }

    def _labels(self, batch: Batch) -> Tensor:
        """Return the label (N, frames) of each frame of the answer, -100 behind the ends.

        Labels were made for recordings at their own speed and for every frame of the features; a
        frame gets the one at the same share of its recording.
        """
        answered, given = self.answered(batch), batch["target_lengths"]
        width = -(-batch["inputs"].shape[-1] // self.time_reduction)
        frames = torch.arange(width, device=answered.device)
        index = (2 * frames + 1) * given[:, None] // (2 * answered[:, None])
        labels: Tensor = batch["targets"].gather(1, index.clamp(max=batch["targets"].shape[1] - 1))
        return labels.masked_fill(frames >= answered[:, None], _PADDING)

    def loss(self, outputs: Tensor, batch: Batch, training: bool) -> Tensor:
        """Return the cross-entropy, mean over a recording's frames, then over the recordings."""
        smoothing = self.config.label_smoothing if training else 0.0
        losses = F.cross_entropy(
            outputs.float().transpose(1, 2),
            self._labels(batch),
            reduction="none",
            ignore_index=_PADDING,
            label_smoothing=smoothing,
        )
        return mean_inside(losses, self.answered(batch))

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the sum, over the recordings, of the share of their frames that are right."""
        right = (outputs.argmax(-1) == self._labels(batch)).float()
        return (right.sum(1) / self.answered(batch)).sum()

    def references(self, batch: Batch) -> list[str]:
        """Return what the labels spell: the transcripts that they were aligned to."""
        lengths = batch["target_lengths"].tolist()
        texts = []
        for row, length in zip(batch["targets"], lengths, strict=True):
            labels = row[:length].unique_consecutive()
            texts.append(self.alphabet.decode(labels[labels != 0].tolist()))
        return texts


@dataclasses.dataclass(frozen=True)
class Labelling:
    """Finds a recording's frame labels.

    Attributes:
        labels: what `blnet align` wrote.
    """

    labels: FrameLabels

    def __call__(self, one: Utterance) -> Tensor:
        """Return the labels (frames,) of a recording.

        Raises:
            ValueError: if there are none.
        """
        # Labels of before have paths as they were spelled.
        return self.labels.labels(one.key if one.key in self.labels else one.name)
