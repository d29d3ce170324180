"""Transcripts, learnt by Connectionist Temporal Classification."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blnet.speech.config import SpeechConfig
from blnet.speech.data import SpeechData
from blnet.speech.features import LogMel
from blnet.speech.masking import reduced
from blnet.speech.recordings import Utterance
from blnet.speech.task import TIME_REDUCTION
from blnet.speech.task_spelling import SpellingTask
from blnet.speech.text import Alphabet, required_frames
from blnet.training.task import Batch


class CtcTask(SpellingTask):
    """Transcripts by CTC (Graves et al., 2006).

    Targets are the transcripts' classes (N, S), padded with blanks, and "target_lengths" (N,).
    """

    def __init__(self, config: SpeechConfig, data: SpeechData | None = None) -> None:
        if config.deterministic and config.device != "cpu" and torch.cuda.is_available():
            raise ValueError(
                "--deterministic: PyTorch has no deterministic gradient of CTC's loss on a GPU; "
                "leave it out, or train with --device cpu"
            )
        super().__init__(config, data)

    @classmethod
    def target_of(cls, config: SpeechConfig) -> Callable[[Utterance], Tensor]:
        """Return what spells a recording's transcript."""
        reduction = config.model.time_reduction or TIME_REDUCTION["ctc"]
        features = LogMel(config.features, config.data.sample_rate)
        return Spelling(Alphabet(config.data.alphabet), features, config.augment.speed, reduction)

    def _collated(self, targets: list[Tensor]) -> Batch:
        return {
            "targets": pad_sequence(targets, batch_first=True),
            "target_lengths": torch.tensor([len(target) for target in targets]),
        }

    def loss(self, outputs: Tensor, batch: Batch, training: bool) -> Tensor:
        """Return CTC's loss for each character of a transcript, mean over the transcripts."""
        return F.ctc_loss(
            outputs.float().log_softmax(-1).transpose(0, 1),
            batch["targets"],
            self.answered(batch),
            batch["target_lengths"],
        )

    def correct(self, outputs: Tensor, batch: Batch) -> None:
        """Nothing is counted in training: decoding would cost as much again."""

    def references(self, batch: Batch) -> list[str]:
        """Return the transcripts."""
        lengths = batch["target_lengths"].tolist()
        rows = batch["targets"].tolist()
        return [
            self.alphabet.decode(row[:length]) for row, length in zip(rows, lengths, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Makes a transcript's classes, and refuses one that CTC cannot fit into its recording.

    Attributes:
        alphabet: the characters.
        features: what makes the frames.
        speed: largest change of speed, a share.
        reduction: frames of the features to one of the answer.
    """

    alphabet: Alphabet
    features: LogMel
    speed: float
    reduction: int

    def __call__(self, one: Utterance) -> Tensor:
        """Return the classes (n,) of a recording's transcript.

        Raises:
            ValueError: if a character is not in the alphabet, or the transcript is too long.
        """
        ids = self.alphabet.encode(one.text)
        if one.seconds > 0:  # else it cannot be read, and that is to be told
            needed, there = required_frames(ids), self._frames(one.seconds)
            if needed > there:
                raise ValueError(
                    f"its transcript needs {needed} frames and its {one.seconds:.2f} s give "
                    f"{there}; check the transcript, or train with a lower "
                    f"--model.time-reduction ({self.reduction})"
                )
        return ids

    def _frames(self, seconds: float) -> int:
        """Return the frames of the answer where the recording is played at its fastest."""
        # Less what rounding may have added: a sample more could be a frame more.
        samples = math.ceil(seconds * self.features.sample_rate / (1 + self.speed) - 1e-6)
        return int(reduced(self.features.frames(torch.tensor(samples)), self.reduction))
