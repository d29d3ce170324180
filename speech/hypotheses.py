"""What a decoder found: characters and words, with the frames in which they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blnet.speech.text import BLANK, Alphabet

SPACE = " "


@dataclass(frozen=True)
class Token:
    """A character that was found.

    Attributes:
        character: which.
        start: its first frame.
        end: the frame after its last.
        probability: the highest that any of its frames gives it.
    """

    character: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True)
class Word:
    """A word that was found.

    Attributes:
        text: its characters.
        start_frame: first frame of its first character.
        end_frame: the frame after the last of its last character.
        score: mean probability of its characters, 0 to 1.
    """

    text: str
    start_frame: int
    end_frame: int
    score: float


@dataclass(frozen=True)
class Hypothesis:
    """What a recording is thought to say.

    Attributes:
        score: natural logarithm of its probability: of the best path (greedy), or of all paths
            that were kept (beam), with the language model's share where there is one.
        tokens: the characters in their order.
    """

    score: float
    tokens: tuple[Token, ...]

    @property
    def words(self) -> tuple[Word, ...]:
        """The words; spaces part them."""
        return tuple(words_of(self.tokens))

    @property
    def text(self) -> str:
        """The words with one space in between."""
        return SPACE.join(word.text for word in self.words)


def words_of(tokens: Iterable[Token]) -> list[Word]:
    """Return the words that some characters make."""
    words: list[list[Token]] = [[]]
    for token in tokens:
        if token.character == SPACE:
            words.append([])
        else:
            words[-1].append(token)
    return [_word(found) for found in words if found]


def _word(tokens: Sequence[Token]) -> Word:
    score = math.fsum(token.probability for token in tokens) / len(tokens)
    text = "".join(token.character for token in tokens)
    return Word(text, tokens[0].start, tokens[-1].end, score)


class Collapse:
    """Makes characters of a path of labels that comes in parts, by CTC's rule.

    A run of one label is one character, the blank is none; so a character comes twice in a row only
    where a blank stands between.

    Args:
        alphabet: the labels' characters.
    """

    def __init__(self, alphabet: Alphabet) -> None:
        self._characters = alphabet.characters
        self._frame = 0
        self._label = BLANK
        self._open: Token | None = None

    def push(self, labels: NDArray[Any], probabilities: NDArray[Any]) -> list[Token]:
        """Take the next frames and return the characters that have ended.

        Args:
            labels: label of each frame, integers (T,).
            probabilities: probability of each of those, (T,).
        """
        ended: list[Token] = []
        borders = np.flatnonzero(np.diff(labels, prepend=-1)).tolist()
        for start, end in pairwise([*borders, len(labels)]):
            label, peak = int(labels[start]), float(probabilities[start:end].max())
            until = self._frame + end - start
            if label == self._label:  # the part before ended within this run
                self._prolong(until, peak)
            else:
                ended += self.finish()
                self._begin(label, until, peak)
            self._label, self._frame = label, until
        return ended

    def _begin(self, label: int, end: int, peak: float) -> None:
        if label != BLANK:
            self._open = Token(self._characters[label - 1], self._frame, end, peak)

    def _prolong(self, end: int, peak: float) -> None:
        if self._open is not None:
            peak = max(peak, self._open.probability)
            self._open = dataclasses.replace(self._open, end=end, probability=peak)

    def finish(self) -> list[Token]:
        """Return the character that the path's end ends, if there is one."""
        last, self._open = self._open, None
        return [] if last is None else [last]


def best_path(log_probs: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the likeliest label of each frame and its natural log probability, both (..., T).

    Args:
        log_probs: natural log probabilities (..., T, classes).
    """
    values, labels = log_probs.detach().float().max(dim=-1)
    return labels.cpu().numpy(), values.cpu().numpy()


def spell(labels: Tensor, log_probs: Tensor, alphabet: Alphabet) -> tuple[Token, ...]:
    """Return the characters of a whole path.

    Args:
        labels: label of each frame, int64 (T,).
        log_probs: what the network says of each, natural logarithms (T, classes).
        alphabet: the labels' characters.
    """
    chosen = log_probs.detach().float().gather(1, labels[:, None])[:, 0].exp()
    collapse = Collapse(alphabet)
    ended = collapse.push(labels.cpu().numpy(), chosen.cpu().numpy())
    return (*ended, *collapse.finish())


def check_spaced(alphabet: Alphabet, advice: str = "decode without one") -> None:
    """Check that an alphabet has what parts words.

    Args:
        alphabet: the characters.
        advice: what to do if not.

    Raises:
        ValueError: if not.
    """
    if SPACE not in alphabet.classes:
        raise ValueError(
            "a language model of words needs an alphabet with a space, and "
            f"{alphabet.characters!r} has none; {advice}"
        )


def check_log_probs(log_probs: Tensor, alphabet: Alphabet, lengths: Tensor | None = None) -> None:
    """Raise a ValueError if log probabilities do not fit an alphabet or their lengths.

    Args:
        log_probs: (T, classes), or with lengths (N, T, classes).
        alphabet: the classes' characters.
        lengths: frames of each recording, (N,).
    """
    axes = "(T, classes)" if lengths is None else "(N, T, classes)"
    if log_probs.ndim != axes.count(",") + 1:
        raise ValueError(f"log probabilities must be {axes}, got shape {tuple(log_probs.shape)}")
    if log_probs.shape[-1] != alphabet.size:
        raise ValueError(
            f"the network has {log_probs.shape[-1]} classes and the alphabet {alphabet.size} with "
            "the blank; use the alphabet that the network was trained with"
        )
    if lengths is not None and (
        lengths.shape != log_probs.shape[:1]
        or bool(((lengths < 0) | (lengths > log_probs.shape[1])).any())
    ):
        raise ValueError(
            f"lengths {lengths.tolist()} do not fit log probabilities of shape "
            f"{tuple(log_probs.shape)}; give each recording's frames"
        )
    if bool(log_probs.isnan().any()):
        raise ValueError("the log probabilities hold NaN; use a network whose training converged")
