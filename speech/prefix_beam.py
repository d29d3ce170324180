"""Prefix beam search: the likeliest text of CTC's output, with a language model of words.

Graves, "Supervised Sequence Labelling with Recurrent Neural Networks" (2012), section 7.5, and
Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional
Recurrent DNNs" (2014), algorithm 1. Probabilities are natural logarithms in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blnet.speech.alignment import write
from blnet.speech.hypotheses import SPACE, Hypothesis, check_log_probs, check_spaced
from blnet.speech.ngrams import END, START, LanguageModel
from blnet.speech.text import BLANK, Alphabet

Floats = NDArray[np.float64]
_LN10 = math.log(10)
_FOREIGN = -10.0  # log10, added for a word that the language model lacks; as in pyctcdecode


def beam(
    log_probs: Tensor,
    lengths: Tensor,
    alphabet: Alphabet,
    width: int = 16,
    language_model: LanguageModel | None = None,
    alpha: float = 0.5,
    beta: float = 1.0,
    viterbi: bool = False,
) -> list[Hypothesis]:
    """Return the likeliest text of each recording, as far as the search goes.

    A text's probability is the sum over all paths that collapse to it. With a language model, what
    counts is log P(text | sound) + alpha log P(words) + beta * number of words (Amodei et al.,
    "Deep Speech 2", ICML 2016). A word counts from the space behind it on. One that the model lacks
    has 10 taken off its decimal logarithm, and that as soon as no word of the model begins so.

    The frames of the characters are those of the likeliest path that writes the text.

    Args:
        log_probs: natural log probabilities (N, T, classes); class 0 is the blank.
        lengths: frames of each recording, int64 (N,).
        alphabet: the classes' characters.
        width: texts that are kept from one frame to the next.
        language_model: of words; None for the network's word alone.
        alpha: weight of the language model.
        beta: bonus of every word, against the language model's liking for few; without such a model
            it plays no part.
        viterbi: whether a text's probability is its likeliest path's instead. A network of frame
            labels says a letter on many frames; in a sum the many places at which such a run could
            be cut in two would make every letter likelier twice than once.

    Returns:
        For each recording its text; `score` is what counts.

    Raises:
        ValueError: if shapes do not fit, width is below 1, or the language model comes with an
            alphabet without a space.
    """
    check_log_probs(log_probs, alphabet, lengths)
    if width < 1:
        raise ValueError(f"the width of a beam must be 1 or more, got {width}")
    words = None
    if language_model is not None:
        check_spaced(alphabet)
        words = _Words(alphabet, language_model, alpha, beta)
    combine = np.maximum if viterbi else np.logaddexp
    outputs = log_probs.detach().cpu()
    found = []
    for place, length in enumerate(lengths.tolist()):
        output = outputs[place, :length]
        labels, score = _search(output.double().numpy(), width, words, combine)
        found.append(write(torch.tensor(labels, dtype=torch.int64), score, output, alphabet))
    return found


@dataclass(eq=False, slots=True)
class _Prefix:
    """The beginning of a text: a node of the tree of all that the search has seen.

    Attributes:
        parent: the prefix without its last label; None for the empty one.
        label: the last label; the blank for the empty one.
        word: the characters after the last space; with a language model only, as all that follows.
        bonus: what the model gives for the whole words before.
        rank: the same, less what the word costs already since the model has none that begins so.
        history: the last of those words, as many as the model looks back on.
        closed: bonus and history once the word is whole; None: not asked for yet.
        children: longer prefixes by their last label. A prefix that comes back into the beam is
            the same object again, so that its paths meet.
    """

    parent: _Prefix | None = None
    label: int = BLANK
    word: str = ""
    bonus: float = 0.0
    rank: float = 0.0
    history: tuple[str, ...] = (START,)
    closed: tuple[float, tuple[str, ...]] | None = None
    children: dict[int, _Prefix] = field(default_factory=dict)

    def labels(self) -> list[int]:
        """Return all labels, the first one first."""
        found, prefix = [], self
        while prefix.parent is not None:
            found.append(prefix.label)
            prefix = prefix.parent
        return found[::-1]


@dataclass(frozen=True)
class _Words:
    """What the language model adds to prefixes."""

    alphabet: Alphabet
    model: LanguageModel
    alpha: float
    beta: float

    @property
    def space(self) -> int:
        return self.alphabet.classes[SPACE]

    def grow(self, parent: _Prefix, label: int) -> _Prefix:
        """Return a prefix with one more character."""
        if label == self.space:
            bonus, history = self.close(parent)
            return _Prefix(parent, label, "", bonus, bonus, history)
        word, rank = parent.word + self.alphabet.characters[label - 1], parent.rank
        if rank == parent.bonus and not self.model.has_beginning(word):
            rank += self.alpha * _LN10 * _FOREIGN
        return _Prefix(parent, label, word, parent.bonus, rank, parent.history)

    def close(self, prefix: _Prefix) -> tuple[float, tuple[str, ...]]:
        """Return bonus and history of a prefix when a space follows it."""
        if prefix.closed is None:
            prefix.closed = prefix.bonus, prefix.history
            if prefix.word:
                score = self.model.score(prefix.word, prefix.history)
                score += 0 if prefix.word in self.model else _FOREIGN
                bonus = prefix.bonus + self.alpha * _LN10 * score + self.beta
                prefix.closed = bonus, self.model.after(prefix.word, prefix.history)
        return prefix.closed

    def end(self, prefix: _Prefix) -> float:
        """Return the bonus of a prefix when nothing follows it."""
        bonus, history = self.close(prefix)
        return bonus + self.alpha * _LN10 * self.model.score(END, history)


@dataclass
class _Beam:
    """The prefixes that are kept at a frame.

    Attributes:
        prefixes: which.
        blank: log probability of each one's paths that end with a blank.
        label: likewise, of those that end with its last label.
        combine: makes one log probability of those of two sets of paths.
    """

    prefixes: list[_Prefix]
    blank: Floats
    label: Floats
    combine: np.ufunc

    @property
    def total(self) -> Floats:
        found: Floats = self.combine(self.blank, self.label)
        return found


def _search(
    frames: Floats, width: int, words: _Words | None, combine: np.ufunc
) -> tuple[list[int], float]:
    """Return the labels of the best text of a recording (T, classes), and its score."""
    kept = _Beam([_Prefix()], np.zeros(1), np.full(1, -np.inf), combine)
    for frame in frames:
        kept = _advance(kept, frame, width, words)
    scores = kept.total
    if words is not None:
        scores = scores + [words.end(prefix) for prefix in kept.prefixes]
    best = int(scores.argmax())
    return kept.prefixes[best].labels(), float(scores[best])


def _advance(kept: _Beam, frame: Floats, width: int, words: _Words | None) -> _Beam:
    """Return the beam after one more frame."""
    last = np.array([prefix.label for prefix in kept.prefixes])
    rows = np.arange(len(last))
    total = kept.total
    blank = total + frame[BLANK]
    label = kept.label + frame[last]
    grown = total[:, None] + frame
    # The last label once more is a character of its own only after a blank.
    grown[rows, last] = kept.blank + frame[last]
    grown[:, BLANK] = -np.inf
    _meet(kept, last, label, grown)
    ranks = np.concatenate([kept.combine(blank, label), grown.ravel()])
    if words is not None:
        ranks += _bonuses(kept.prefixes, grown.shape[1], words)
    best = _largest(ranks, width)
    stay, grow = best[best < len(rows)], best[best >= len(rows)] - len(rows)
    parents, labels = np.divmod(grow, len(frame))
    prefixes = [kept.prefixes[place] for place in stay]
    prefixes += [
        _child(kept.prefixes[parent], int(added), words)
        for parent, added in zip(parents, labels, strict=True)
    ]
    return _Beam(
        prefixes,
        np.concatenate([blank[stay], np.full(len(grow), -np.inf)]),
        np.concatenate([label[stay], grown.ravel()[grow]]),
        kept.combine,
    )


def _meet(kept: _Beam, last: NDArray[np.int64], label: Floats, grown: Floats) -> None:
    """Give what grows into a prefix that is in the beam already to that one."""
    places = {id(prefix): place for place, prefix in enumerate(kept.prefixes)}
    for place, prefix in enumerate(kept.prefixes):
        parent = places.get(id(prefix.parent))
        if parent is not None:
            label[place] = kept.combine(label[place], grown[parent, last[place]])
            grown[parent, last[place]] = -np.inf


def _bonuses(prefixes: list[_Prefix], classes: int, words: _Words) -> Floats:
    """Return the language model's share in the ranks of all that can follow."""
    own = np.array([prefix.rank for prefix in prefixes])
    grown = np.repeat(own[:, None], classes, axis=1)
    grown[:, words.space] = [words.close(prefix)[0] for prefix in prefixes]
    return np.concatenate([own, grown.ravel()])


def _largest(ranks: Floats, width: int) -> NDArray[np.int64]:
    """Return the places of the largest values but minus infinity; of the first if all are that."""
    best = np.argpartition(-ranks, width)[:width] if len(ranks) > width else np.arange(len(ranks))
    possible = best[ranks[best] > -np.inf]
    return possible if len(possible) else np.zeros(1, dtype=np.int64)


def _child(parent: _Prefix, label: int, words: _Words | None) -> _Prefix:
    child = parent.children.get(label)
    if child is None:
        child = _Prefix(parent, label) if words is None else words.grow(parent, label)
        parent.children[label] = child
    return child
