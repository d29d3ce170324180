"""What CTC and frame labels share: a network that spells, frame by frame."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection

from blnet.speech.config import SpeechConfig
from blnet.speech.data import SpeechData
from blnet.speech.decode import beam, error_rates, greedy
from blnet.speech.hypotheses import Hypothesis, check_spaced
from blnet.speech.ngram_counts import count_ngrams
from blnet.speech.ngrams import LanguageModel
from blnet.speech.task import SpeechTask
from blnet.training.task import Batch

NGRAM = "ngram_"  # what the names of a beam search's error rates begin with


class SpellingTask(SpeechTask):
    """What CTC and frame labels share: an answer for every frame, and a text that is read off.

    Attributes:
        language_model: of the training transcripts, where the configuration asks for n-grams.
    """

    monitor = "wer"
    maximize = False

    def __init__(self, config: SpeechConfig, data: SpeechData | None = None) -> None:
        super().__init__(config, data)
        self.language_model: LanguageModel | None = None
        if config.ngrams:
            check_spaced(self.alphabet, "train with --ngrams 0")
            texts = (self.alphabet.normalise(one.text) for one in self.train_data.utterances)
            self.language_model = count_ngrams(texts, config.ngrams)
            self.told = (f"{NGRAM}{self.monitor}",)

    @property
    def classes(self) -> int:
        """The alphabet's characters and the blank."""
        return self.alphabet.size

    def metrics(self) -> MetricCollection:
        """Return word and character error rate; those of the beam search begin with "ngram_"."""
        rates = error_rates()
        if self.language_model is not None:
            rates.add_metrics({f"{NGRAM}{name}": rate for name, rate in error_rates().items()})
        return rates

    def update(self, metrics: Any, outputs: Tensor, batch: Batch) -> None:
        """Add what a batch's logits spell."""
        references, texts = self.references(batch), self.texts(outputs, batch)
        searched = [] if self.language_model is None else self.searched(outputs, batch)
        for name, rate in metrics.items():
            rate.update(searched if name.startswith(NGRAM) else texts, references)

    def texts(self, outputs: Tensor, batch: Batch) -> list[str]:
        """Return what a batch's logits (N, frames, classes) spell, by the best path."""
        found = greedy(outputs.float().log_softmax(-1), self.answered(batch), self.alphabet)
        return _written(found)

    def searched(self, outputs: Tensor, batch: Batch) -> list[str]:
        """Return what a beam search with the language model finds in a batch's logits."""
        log_probs = outputs.float().log_softmax(-1)
        viterbi = self.config.task == "frame"
        found = beam(
            log_probs,
            self.answered(batch),
            self.alphabet,
            language_model=self.language_model,
            viterbi=viterbi,
        )
        return _written(found)

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


def _written(found: Sequence[Hypothesis]) -> list[str]:
    return [hypothesis.text for hypothesis in found]


def mean_inside(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean over samples of the mean over each one's frames; values are (N, frames)."""
    frames = torch.arange(values.shape[1], device=values.device)
    inside = frames < lengths[:, None]
    return (values.where(inside, 0).sum(1) / lengths).mean()
