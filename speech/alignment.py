"""Frame labels: a transcript laid over a recording's frames, and transcripts from such labels."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from blnet.files import StrPath, reason, written_aside
from blnet.speech.hypotheses import Collapse, Hypothesis, best_path, check_log_probs, spell
from blnet.speech.text import BLANK, Alphabet, required_frames

LABELS_FILE = "labels.safetensors"
_ENTRY = "blnet"
_NEVER = -1e6  # in place of minus infinity: where all paths are impossible, the search goes astray


def align(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return the likeliest way in which CTC writes some classes, a label for each frame.

    Computed by `torchaudio.functional.forced_align` (Viterbi's algorithm; Kürzinger et al.,
    "CTC-Segmentation of Large Corpora", SPECOM 2020, describe its use).

    Args:
        log_probs: natural log probabilities (T, classes); class 0 is the blank.
        ids: classes to write, without blanks, int64 (n,).

    Returns:
        Labels int64 (T,), on the device of log_probs; 0 is the blank.

    Raises:
        ValueError: if there are too few frames, a class is unknown or the blank, or log_probs holds
            NaN.
    """
    frames, classes = log_probs.shape
    if len(ids) == 0:
        return torch.full((frames,), BLANK, device=log_probs.device)
    needed = required_frames(ids)
    if frames < needed:
        raise ValueError(
            f"{frames} frames are too few for a transcript of {len(ids)} characters, which needs "
            f"{needed}; leave the recording out, correct its transcript or train "
            "with a lower --model.time-reduction"
        )
    if not 0 < int(ids.min()) <= int(ids.max()) < classes:
        raise ValueError(
            f"the transcript has classes {int(ids.min())} to {int(ids.max())} and the network 1 to "
            f"{classes - 1}, beside the blank; use the alphabet that the network was trained with"
        )
    from torchaudio.functional import forced_align

    values = log_probs.detach().float().clamp(min=_NEVER)
    if bool(values.isnan().any()):
        raise ValueError("the log probabilities hold NaN; use a network whose training converged")
    labels, _ = forced_align(values[None], ids[None].to(values.device), blank=BLANK)
    found: Tensor = labels[0].long()
    return found


def align_batch(log_probs: Tensor, lengths: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
    """Return `align` of each recording of a padded batch.

    Args:
        log_probs: natural log probabilities (N, T, classes).
        lengths: frames of each recording, int64 (N,).
        targets: classes to write, int64 (n,), for each recording.

    Returns:
        Labels int64 (length,) for each recording.

    Raises:
        ValueError: as `align`; it tells which recording of the batch, counted from 1.
    """
    found = []
    for place, (ids, length) in enumerate(zip(targets, lengths.tolist(), strict=True)):
        try:
            found.append(align(log_probs[place, :length], ids))
        except ValueError as error:
            raise ValueError(f"recording {place + 1} of the batch: {error}") from error
    return found


def write(ids: Tensor, score: float, log_probs: Tensor, alphabet: Alphabet) -> Hypothesis:
    """Return a text that a decoder found, with the frames of the likeliest path that writes it.

    Args:
        ids: the text's classes, int64 (n,).
        score: what the decoder gives it.
        log_probs: natural log probabilities (T, classes).
        alphabet: the classes' characters.

    Raises:
        ValueError: as `align`.
    """
    return Hypothesis(score, spell(align(log_probs, ids), log_probs, alphabet))


def fill_blanks(labels: Tensor, silence: int) -> Tensor:
    """Spread the labels of an alignment over the frames around them.

    A network trained with CTC marks a character with a spike and says blank between; one that is
    trained frame by frame needs a label on every frame. The rule:

    - A stretch of up to `silence` blanks between two marked frames is divided between them: its
      frames take the label of the nearer one, of the earlier one if both are as near.
    - Of a longer one as much is divided, and its middle stays blank: there nothing is said. At
      either end of the recording the one neighbour takes its half of `silence`.
    - Where a stretch between two equal labels would vanish, its middle frame stays blank, since
      the two would become one character otherwise.

    So the labels keep their text: `collapse` gives the same before and after.

    Args:
        labels: label of each frame, 0 for blanks, int64 (T,).
        silence: longest stretch of blanks that is divided between its neighbours, in frames.

    Returns:
        Labels int64 (T,).

    Raises:
        ValueError: if silence is negative.
    """
    if silence < 0:
        raise ValueError(f"the longest stretch to fill must be 0 frames or more, got {silence}")
    values: NDArray[np.int64] = labels.cpu().numpy()
    marked = np.flatnonzero(values != BLANK)
    if len(marked) == 0:
        return labels.clone()
    frames = np.arange(len(values))
    after = np.searchsorted(marked, frames)  # place of the first mark at or after each frame
    left, right = marked[np.maximum(after - 1, 0)], marked[np.minimum(after, len(marked) - 1)]
    to_left = np.where(after > 0, frames - left, len(values))
    to_right = np.where(after < len(marked), right - frames, len(values))
    filled = np.where(
        to_left <= to_right,
        np.where(to_left <= (silence + 1) // 2, values[left], BLANK),
        np.where(to_right <= silence // 2, values[right], BLANK),
    )
    filled[_needed_blanks(values, marked)] = BLANK
    return torch.from_numpy(filled).to(labels.device)


def _needed_blanks(values: NDArray[np.int64], marked: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the middle frame of every stretch of blanks between equal labels."""
    left, right = marked[:-1], marked[1:]
    repeated = (values[left] == values[right]) & (right > left + 1)
    middles: NDArray[np.int64] = ((left + right + 1) // 2)[repeated]
    return middles


def expand(labels: Tensor, factor: int, frames: int) -> Tensor:
    """Bring labels to a higher rate: each of them stands for `factor` frames.

    Args:
        labels: label of each frame, int64 (t,), of a network that shortens time.
        factor: by how much it does.
        frames: how many there are at the higher rate. Where these are more, by up to `factor`, the
            last label goes on; where they are fewer, part of its frames are left out.

    Returns:
        Labels int64 (frames,).

    Raises:
        ValueError: if that many frames do not fit that many labels.
    """
    surplus = frames - len(labels) * factor
    if factor < 1 or not -factor < surplus <= factor:
        raise ValueError(
            f"{len(labels)} labels of {factor} frames each cannot label {frames} frames; "
            "use the features that the aligning network was trained with"
        )
    places = torch.arange(frames, device=labels.device) // factor
    return labels[places.clamp(max=len(labels) - 1)] if len(labels) else labels.new_zeros(frames)


def collapse(log_probs: Tensor, alphabet: Alphabet, minimum: int = 1) -> Hypothesis:
    """Return what the best path of one recording says.

    Args:
        log_probs: natural log probabilities (T, classes), of a network trained frame by frame
            or with CTC.
        alphabet: the classes' characters.
        minimum: shortest run of a label that counts as a character, in frames. A shorter one is
            taken for a slip of its surroundings. Blanks always count, since a single one parts
            repeated characters.

    Returns:
        The characters, and the path's log probability.

    Raises:
        ValueError: if the classes are not those of the alphabet.
    """
    check_log_probs(log_probs, alphabet)
    labels, values = best_path(log_probs)
    kept = _long_enough(labels, minimum)
    # A slip takes the label before it; those at the beginning, having none, become blanks.
    source = np.maximum.accumulate(np.where(kept, np.arange(len(labels)), -1))
    cleaned = np.where(source >= 0, labels[source], BLANK)
    path = Collapse(alphabet)
    tokens = path.push(cleaned, np.where(kept, np.exp(values), 0)) + path.finish()
    return Hypothesis(float(values.sum(dtype=np.float64)), tuple(tokens))


def _long_enough(labels: NDArray[Any], minimum: int) -> NDArray[np.bool_]:
    """Return which frames are blank or lie in a run of at least so many frames."""
    borders = np.flatnonzero(np.diff(labels, prepend=-1, append=-1))
    lengths = np.diff(borders)
    kept: NDArray[np.bool_] = (np.repeat(lengths, lengths) >= minimum) | (labels == BLANK)
    return kept


@dataclass(frozen=True, eq=False)
class FrameLabels:
    """The frame labels of many recordings, in memory and in a folder.

    The folder holds one safetensors file: the labels one after the other, where each recording's
    end, and as JSON in the header all else.

    Attributes:
        alphabet: what the labels stand for.
        hop_seconds: time from one label to the next.
        model: which network they come from, in words.
        names: name of each recording.
        values: the labels of all, one after the other, int16.
        ends: where those of each recording end, int64.
        source: where they come from, for errors.

    Raises:
        ValueError: if these do not fit together.
    """

    alphabet: Alphabet
    hop_seconds: float
    model: str
    names: tuple[str, ...]
    values: Tensor
    ends: Tensor
    source: str = "the frame labels"

    def __post_init__(self) -> None:
        if not (self.hop_seconds > 0 and math.isfinite(self.hop_seconds)):
            raise ValueError(f"{self.source}: {self.hop_seconds} s is no time between labels")
        if len(self._places) != len(self.names):
            raise ValueError(f"{self.source}: two recordings have one name; give each its own")
        starts = torch.cat([self.ends.new_zeros(1), self.ends])
        whole = len(starts) == len(self.names) + 1 and int(starts[-1]) == len(self.values)
        if not whole or bool((starts.diff() < 0).any()):
            raise ValueError(f"{self.source} and the recordings' names do not fit; align anew")
        if len(self.values) and not (
            int(self.values.min()) >= 0 and int(self.values.max()) < self.alphabet.size
        ):
            raise ValueError(f"{self.source} go beyond the alphabet's classes; align anew")

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    @classmethod
    def of(
        cls,
        entries: Iterable[tuple[str, Tensor]],
        alphabet: Alphabet,
        hop_seconds: float,
        model: str,
    ) -> FrameLabels:
        """Return the labels of some recordings: (name, labels (T,)) of each.

        Raises:
            ValueError: if two have one name, or a label is no class of the alphabet.
        """
        names, parts = [], [torch.zeros(0, dtype=torch.int16)]
        for name, labels in entries:
            names.append(name)
            parts.append(labels.to("cpu", torch.int16))
        ends = torch.tensor([len(part) for part in parts[1:]], dtype=torch.int64).cumsum(0)
        return cls(alphabet, hop_seconds, model, tuple(names), torch.cat(parts), ends)

    @classmethod
    def load(cls, folder: StrPath) -> FrameLabels:
        """Return the labels that `save` wrote into a folder.

        Raises:
            ValueError: if its file is damaged.
            OSError: if there is none, or it cannot be read.
        """
        path = Path(folder) / LABELS_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no frame labels ({LABELS_FILE}); name a folder that 'blnet align' "
                "wrote"
            )
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_ENTRY])
                values, ends = file.get_tensor("values"), file.get_tensor("ends")
            names = tuple(map(str, header["names"]))
            alphabet, hop = Alphabet(str(header["alphabet"])), float(header["hop_seconds"])
            return cls(alphabet, hop, str(header["model"]), names, values, ends, str(path))
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a whole file of frame labels ({reason(error)}); make it anew with "
                "'blnet align'"
            ) from error

    def save(self, folder: StrPath) -> None:
        """Write the labels into a folder, which is made if need be; see `load`.

        Raises:
            OSError: if it cannot be written; what was there is as it was then.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        header = {
            "alphabet": self.alphabet.characters,
            "hop_seconds": self.hop_seconds,
            "model": self.model,
            "names": self.names,
        }
        tensors = {"values": self.values, "ends": self.ends}
        with written_aside(Path(folder) / LABELS_FILE) as aside:
            safetensors.torch.save_file(tensors, aside, {_ENTRY: json.dumps(header)})

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def labels(self, name: str) -> Tensor:
        """Return the label of each frame of a recording, int64 (T,); 0 is the blank.

        Raises:
            ValueError: if there are none of that name.
        """
        if name not in self._places:
            raise ValueError(
                f"{self.source} has no labels of {name}; run 'blnet align' over it as well"
            )
        place = self._places[name]
        start = int(self.ends[place - 1]) if place else 0
        return self.values[start : int(self.ends[place])].long()
