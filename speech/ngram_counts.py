"""Makes a language model of words out of texts: counts of n-grams, smoothed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable

from blnet.speech.config import LONGEST
from blnet.speech.ngrams import END, START, UNKNOWN, LanguageModel

_IMPOSSIBLE = -99.0  # log10, of the beginning of a sentence, which follows nothing
_Words = tuple[str, ...]


def count_ngrams(texts: Iterable[str], order: int) -> LanguageModel:
    """Return the n-gram model of some texts, smoothed after Witten and Bell.

    After a history h that was followed c(h) times, by T(h) different words, a word w has

        P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h)),

    h' being h without its first word, and before the first there is the same for every word, for
    the end of a sentence and for any word that the texts lack (Witten and Bell, "The Zero-Frequency
    Problem", IEEE Trans. Information Theory, 1991; interpolated as in Chen and Goodman, "An
    Empirical Study of Smoothing Techniques for Language Modeling", 1999, section 2.5). It needs no
    counts of counts, which a few hundred sentences do not have.

    Args:
        texts: sentences; white space parts their words, and one without words is left out. They
            are read once; the counts are held in memory.
        order: words of the longest n-gram, 1 to 6.

    Raises:
        ValueError: if the order is out of range, there are no words, or one is a mark of ARPA
            files.
    """
    if not 1 <= order <= LONGEST:
        raise ValueError(f"the order of a language model must be 1 to {LONGEST}, got {order}")
    followers = _followers(texts, order)
    if not followers:
        raise ValueError("a language model needs words, and the texts have none; give others")
    uniform = 1 / (len(followers[()]) + 1)  # the words, the end, and the unknown
    chances: dict[_Words, float] = {}
    weights: dict[_Words, float] = {}
    for history in sorted(followers, key=len):
        counts = followers[history]
        total, kinds = counts.total(), len(counts)
        weights[history] = kinds / (total + kinds)
        for word, count in counts.items():
            shorter = chances[(*history[1:], word)] if history else uniform
            chances[(*history, word)] = (count + kinds * shorter) / (total + kinds)
    chances[(UNKNOWN,)] = weights.pop(()) * uniform
    grams = {
        " ".join(gram): (math.log10(chance), math.log10(weights.get(gram, 1.0)))
        for gram, chance in chances.items()
    }
    grams[START] = (_IMPOSSIBLE, math.log10(weights.get((START,), 1.0)))
    return LanguageModel(grams, order)


def _followers(texts: Iterable[str], order: int) -> dict[_Words, Counter[str]]:
    """Return how often each word, or the end, follows each history of up to order - 1 words."""
    followers: dict[_Words, Counter[str]] = defaultdict(Counter)
    for text in texts:
        words = text.split()
        for word in words:
            if word in (START, END, UNKNOWN):
                raise ValueError(
                    f"a text has the word {word!r}, a mark of language models; leave it out"
                )
        sentence = [START, *words, END] if words else []
        for place in range(1, len(sentence)):
            for length in range(min(order, place + 1)):
                history = tuple(sentence[place - length : place])
                followers[history][sentence[place]] += 1
    return followers
