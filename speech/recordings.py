"""Recordings with what is known of them, and the data set that makes tensors of them."""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from blnet.files import reason
from blnet.speech.audio import AudioError, audio_seconds, read_audio
from blnet.speech.files import SEPARATOR, split_name
from blnet.training.loading import CorruptSample

_ROUNDING = 0.1  # seconds that durations in manifests may be off


@dataclass(frozen=True)
class Utterance:
    """A recording or a part of one.

    Attributes:
        file: where it is: a path, or "archive.zip::member".
        seconds: its duration; 0 where the file could not be read.
        text: what is said; "" where that is not known.
        label: the class, a word mostly, its accents joined to their letters (Unicode NFC); "" where
            it has none.
        speaker: who speaks; "" where that is not known.
        start: where the part begins in the file, seconds; None for its beginning.
        end: where the part ends, seconds; None for the file's end.
    """

    file: str
    seconds: float
    text: str = ""
    label: str = ""
    speaker: str = ""
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        # One word is one class, however a file system or an archive spells it.
        object.__setattr__(self, "label", unicodedata.normalize("NFC", self.label))

    @property
    def name(self) -> str:
        """What errors and logs call it: the file, with the times of a part."""
        return self.file + self._times

    @property
    def key(self) -> str:
        """What frame labels are found by: the same name, however its path is spelled."""
        path, member = split_name(self.file)
        inner = "" if member is None else SEPARATOR + member
        return os.path.realpath(path) + inner + self._times

    @property
    def _times(self) -> str:
        if self.start is None and self.end is None:
            return ""
        end = "end" if self.end is None else f"{self.end:g} s"
        return f" ({self.start or 0:g} s to {end})"


class Recordings(Dataset[tuple[Tensor, Tensor]]):
    """A data set of (samples float32 (n,), target int64).

    Args:
        utterances: the recordings.
        target: what the network is to answer to one, int64.
        sample_rate: samples a second that all are brought to.
        max_seconds: longest recording.
        longer: whether longer ones are cut at that length, or left out (skip).
        transform: varies the samples; None leaves them.

    Attributes:
        utterances: the recordings that are items.
        skipped: number of recordings that were left out.
        seconds: length of each item, float64 (n,).

    Raises:
        CorruptSample: from an item that cannot be read or has no target.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        target: Callable[[Utterance], Tensor],
        sample_rate: int,
        max_seconds: float,
        longer: Literal["cut", "skip"],
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        kept = [one for one in utterances if longer == "cut" or one.seconds <= max_seconds]
        self.utterances: tuple[Utterance, ...] = tuple(kept)
        self.skipped = len(utterances) - len(kept)
        lengths = np.array([one.seconds for one in kept], dtype=np.float64)
        self.seconds: NDArray[np.float64] = np.minimum(lengths, max_seconds)
        self._target = target
        self._sample_rate = sample_rate
        self._max_seconds = max_seconds
        self._transform = transform

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        one = self.utterances[index]
        try:
            # First, as it costs nothing.
            target = self._target(one)
            samples = read_audio(one.file, self._sample_rate, *self._part(one))
            heard = len(samples) / self._sample_rate
            if heard > self._max_seconds + _ROUNDING:  # such a one must not take all memory
                told = f"it is {heard:g} s long, and is said to be {one.seconds:g} s"
                raise AudioError(one.file, f"{told}: more than --data.max-seconds allows")
            if heard < one.seconds or not one.seconds:  # a manifest may say anything
                target = self._target(dataclasses.replace(one, seconds=heard))
        except AudioError as error:
            raise CorruptSample(one.name, error.reason) from error
        except ValueError as error:
            raise CorruptSample(one.name, reason(error)) from error
        return (samples if self._transform is None else self._transform(samples)), target

    def _part(self, one: Utterance) -> tuple[float | None, float | None, float | None]:
        """Return where a recording begins and ends, and how long it may be at most, seconds."""
        longest = one.seconds if one.start is not None and one.end is None else 0.0
        if one.seconds > self._max_seconds:
            return one.start, one.end, self._max_seconds
        return one.start, one.end, longest or None


def measured(file: str) -> float:
    """Return a recording's duration, seconds; 0 if it cannot be read, which its item will tell."""
    try:
        return audio_seconds(file)
    except AudioError:
        return 0.0
