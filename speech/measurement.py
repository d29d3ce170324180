"""How well a trained network does on recordings: exact counts, and what follows from them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor

from blnet.commands.confusion import Counts, wilson
from blnet.speech.decode import Decoder, error_rates
from blnet.speech.inference import Trained
from blnet.speech.recordings import Recordings, Utterance
from blnet.speech.task import SpeechTask
from blnet.speech.task_spelling import SpellingTask
from blnet.training.corrupt import MOST
from blnet.training.loading import CorruptSample
from blnet.training.task import to_device

_Batch = tuple[list[str], list[tuple[Tensor, Tensor]]]  # names, and (samples, target) of each


@dataclass(frozen=True)
class Line:
    """What a network writes of a recording.

    Attributes:
        name: the recording.
        reference: what is said.
        hypothesis: what the network writes.
    """

    name: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class Measurement:
    """What an evaluation counted.

    Attributes:
        recordings: how many were evaluated.
        audio_seconds: their length together.
        seconds: wall-clock time of the evaluation, reading included.
        corrupt: (name, reason) of the recordings that could not be used.
        confusion: keyword: recordings of class i taken for class j, int64 (classes, classes).
        lines: ctc and frame: what was said and written.
        rates: ctc and frame: "wer" and "cer", errors over all words or characters.
    """

    recordings: int
    audio_seconds: float
    seconds: float
    corrupt: tuple[tuple[str, str], ...]
    confusion: Counts | None = None
    lines: tuple[Line, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """Keyword: share of the recordings whose word has the largest logit; None otherwise."""
        return None if self.confusion is None else int(self.confusion.trace()) / self.recordings

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the accuracy; None of ctc and frame."""
        if self.confusion is None:
            return None
        return wilson(int(self.confusion.trace()), self.recordings)

    @property
    def real_time_factor(self) -> float:
        """Seconds that a second of sound takes, reading and decoding included."""
        return self.seconds / self.audio_seconds


def measure(
    trained: Trained,
    task: SpeechTask,
    batch_size: int,
    decoder: Decoder | None = None,
    tell: Callable[[str], None] | None = None,
) -> Measurement:
    """Return how a network does on the evaluation part of some data.

    Args:
        trained: the network, where it is to compute.
        task: of the network's kind, with the data.
        batch_size: recordings that go through the network at once.
        decoder: of ctc and frame.
        tell: takes a line on each recording that cannot be used; None for standard error.

    Raises:
        ValueError: if no recording can be used, more than 1 % cannot, outputs are not finite
            numbers or memory runs out.
    """
    task.features = trained.features
    task.time_reduction = trained.model.config.time_reduction
    corrupt: list[tuple[str, str]] = []
    counted = _Counts(task, decoder)
    start, heard = time.perf_counter(), 0
    data = task.data.evaluation
    batches = _batches(data, batch_size, corrupt)
    for names, samples in _shown(batches, -(-len(data) // batch_size)):
        batch = task.prepare(to_device(task.collate(samples), trained.device), training=False)
        counted.add(names, trained.answer(batch["inputs"], batch["frames"]), batch)
        heard += sum(len(recording) for recording, _ in samples)
    seconds = time.perf_counter() - start
    check_corrupt(corrupt, len(data), tell or say)
    return counted.measurement(heard / trained.features.sample_rate, seconds, tuple(corrupt))


class _Counts:
    """Counts what a network says against what is said."""

    def __init__(self, task: SpeechTask, decoder: Decoder | None) -> None:
        self.task, self.decoder = task, decoder
        self.recordings = 0
        self.lines: list[Line] = []
        classes = task.classes
        spells = isinstance(task, SpellingTask)
        self.confusion = None if spells else np.zeros((classes, classes), dtype=np.int64)
        self.rates = error_rates()

    def add(self, names: list[str], logits: Tensor, batch: dict[str, Tensor]) -> None:
        self.recordings += len(names)
        task = self.task
        if self.confusion is not None:
            truth = batch["targets"].cpu().numpy()
            np.add.at(self.confusion, (truth, logits.argmax(1).cpu().numpy()), 1)
            return
        assert isinstance(task, SpellingTask)
        if self.decoder is None:
            texts = task.texts(logits, batch)
        else:
            found = self.decoder(logits.log_softmax(-1), task.answered(batch))
            texts = [hypothesis.text for hypothesis in found]
        references = task.references(batch)
        self.rates.update(texts, references)
        self.lines += map(Line, names, references, texts)

    def measurement(
        self, heard: float, seconds: float, corrupt: tuple[tuple[str, str], ...]
    ) -> Measurement:
        if not self.recordings:
            raise ValueError("not one recording of the evaluation data can be used; check its path")
        rates = {} if self.confusion is not None else self.rates.compute()
        return Measurement(
            recordings=self.recordings,
            audio_seconds=heard,
            seconds=seconds,
            corrupt=corrupt,
            confusion=self.confusion,
            lines=tuple(self.lines),
            rates={name: float(value) for name, value in rates.items()},
        )


def usable(
    data: Recordings, corrupt: list[tuple[str, str]]
) -> Iterator[tuple[Utterance, tuple[Tensor, Tensor]]]:
    """Yield each recording that can be used with its (samples, target); note the others.

    Args:
        data: the recordings.
        corrupt: takes (name, reason) of each that cannot be used.
    """
    for index in range(len(data)):
        try:
            yield data.utterances[index], data[index]
        except CorruptSample as error:
            corrupt.append((error.name, error.reason))


def _batches(data: Recordings, size: int, corrupt: list[tuple[str, str]]) -> Iterator[_Batch]:
    names: list[str] = []
    samples: list[tuple[Tensor, Tensor]] = []
    for one, sample in usable(data, corrupt):
        names.append(one.name)
        samples.append(sample)
        if len(names) == size:
            yield names, samples
            names, samples = [], []
    if names:
        yield names, samples


def check_corrupt(
    corrupt: list[tuple[str, str]], samples: int, tell: Callable[[str], None]
) -> None:
    """Tell what could not be used.

    Raises:
        ValueError: if that is more than 1 % of the recordings.
    """
    for name, why in corrupt:
        tell(f"warning: skipped {name}, which cannot be used: {why}")
    if len(corrupt) > MOST * samples:
        name, why = corrupt[0]
        raise ValueError(
            f"{len(corrupt)} of the {samples} recordings cannot be used, more than {MOST:.0%}, "
            f"{name} among them ({why}); mend or replace them, as removing them may change what is "
            "held out"
        )


def say(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)


def _shown(batches: Iterator[_Batch], count: int) -> Iterator[_Batch]:
    console = Console(stderr=True)
    yield from track(
        batches, "evaluating", count, console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
