"""Recordings of any length: overlapping windows, their frames joined, words as they end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blnet.speech.hypotheses import (
    SPACE,
    Collapse,
    Token,
    Word,
    best_path,
    check_log_probs,
    words_of,
)
from blnet.speech.text import Alphabet


@dataclass(frozen=True)
class Window:
    """A stretch of a recording, and which frames of its answer count.

    Attributes:
        samples: float32 (n,).
        first_frame: frame of the whole recording that the window's answer begins with.
        keep_from: first frame of the answer that counts.
        keep_to: the frame after the last that counts; None for all to the end, in the last window.
    """

    samples: Tensor
    first_frame: int
    keep_from: int
    keep_to: int | None

    def kept(self, frames: Tensor) -> Tensor:
        """Return the frames of the window's answer that count.

        Those of all windows, one after the other, are the recording's.

        Args:
            frames: the answer, (T, ...).

        Raises:
            ValueError: if it is too short, since the overlap does not cover what the network lacks
                at a window's end.
        """
        if self.keep_to is not None and len(frames) < self.keep_to:
            raise ValueError(
                f"a window's answer has {len(frames)} frames, of which {self.keep_to} were to be "
                "used; make the overlap longer"
            )
        return frames[self.keep_from : self.keep_to]


def plan(
    window: float, overlap: float, sample_rate: int, step: int, lacking: int = 0
) -> tuple[int, int]:
    """Return length and overlap of windows in samples, both whole steps.

    A smaller overlap than makes up for what answers lack is raised to that.

    Args:
        window: length, seconds.
        overlap: what each window shares with the one before it, seconds, and with the one after it.
        sample_rate: samples a second.
        step: samples from one frame of the network's answer to the next.
        lacking: frames by which the answer to so many whole steps is shorter than they are.

    Raises:
        ValueError: if windows would not get on.
    """
    if not 0 <= overlap < window:
        raise ValueError(
            f"windows of {window:g} s cannot overlap by {overlap:g} s; take an overlap of 0 s or "
            "more and less than the window"
        )
    # An answer counts but for the later half of the overlap, rounded up: so much it may lack.
    shared = max(-(-round(overlap * sample_rate) // step), 2 * lacking - 1)
    size = max(round(window * sample_rate / step), shared + 1)
    return size * step, shared * step


def windows(blocks: Iterable[Tensor], size: int, overlap: int, step: int) -> Iterator[Window]:
    """Cut a recording that comes in blocks into overlapping windows.

    Each begins size - overlap samples after the one before it. In each overlap the earlier window's
    frames count in the first half and the later one's in the second, so that every frame comes once
    and with half an overlap or more around it, but for the recording's ends. No more than a block
    and a window are held at a time.

    Args:
        blocks: the samples one after the other, each (n,) of any length.
        size: samples of a window; only the last one may be shorter.
        overlap: samples that a window shares with the next.
        step: samples from one frame of the network's answer to the next; size and overlap are
            multiples of it (see `plan`).

    Raises:
        ValueError: if the sizes do not fit each other.
    """
    if step < 1 or not 0 <= overlap < size or size % step or overlap % step:
        raise ValueError(
            f"windows of {size} samples with an overlap of {overlap} do not fit steps of {step}; "
            "take multiples of the step, the overlap smaller than the window"
        )
    advance, half = size - overlap, overlap // step // 2
    held: list[Tensor] = []
    count = start = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        if count <= size:
            continue
        rest = torch.cat(held)
        while len(rest) > size:  # something follows, so this is not the last
            keep_from = half if start else 0
            yield Window(rest[:size], start // step, keep_from, advance // step + half)
            rest, start = rest[advance:], start + advance
        held, count = [rest], len(rest)
    if count:
        yield Window(torch.cat(held), start // step, half if start else 0, None)


class WordStream:
    """Greedy decoding of frames that come in parts: each word is told once it has ended.

    Together the words are those of `blnet.speech.decode.greedy` over all frames. Only the word that
    has not ended is held.

    Args:
        alphabet: the classes' characters.
    """

    def __init__(self, alphabet: Alphabet) -> None:
        self._alphabet = alphabet
        self._collapse = Collapse(alphabet)
        self._pending: list[Token] = []

    def push(self, log_probs: Tensor) -> list[Word]:
        """Take the next frames and return the words that ended.

        Args:
            log_probs: natural log probabilities (T, classes).

        Raises:
            ValueError: if they do not fit the alphabet.
        """
        check_log_probs(log_probs, self._alphabet)
        labels, values = best_path(log_probs)
        self._pending += self._collapse.push(labels, np.exp(values))
        spaces = [i for i, token in enumerate(self._pending) if token.character == SPACE]
        if not spaces:
            return []
        ended, self._pending = self._pending[: spaces[-1]], self._pending[spaces[-1] + 1 :]
        return words_of(ended)

    def finish(self) -> list[Word]:
        """Return the word that the end of the recording ends, if there is one."""
        ended, self._pending = self._pending + self._collapse.finish(), []
        return words_of(ended)
