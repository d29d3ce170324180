"""Sentences to say: a small grammar over about a hundred common words."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

# What a place in a pattern may be filled with; "|" stands for a blank in it.
_SLOTS = {
    "number": "two three four five six seven eight nine ten twelve",
    "name": "anna ben clara david emma frank grace henry laura peter",
    "colour": "black blue brown green grey red white yellow",
    "kind": "big happy little old quiet slow strong young",
    "animals": "birds cats cows dogs ducks foxes horses mice sheep wolves",
    "move": "fly jump play rest run sleep sing swim wait walk",
    "where": "across behind beside near over under",
    "place": "bridge city door field garden hill house lake river road school tree",
    "wants": "brings buys finds keeps likes loses needs paints sees wants",
    "things": "apples balls books boxes chairs coats cups flowers letters shoes",
    "when": "today tonight again every|morning before|winter",
}
_PATTERNS = (
    "{number} {colour} {animals} {move} {where} the {kind} {place}",
    "{name} {wants} {number} {colour} {things} {when}",
    "{name} and {name} {move} {where} the {place} {when}",
    "the {kind} {animals} {move} {where} {number} {things}",
    "{when} {name} {wants} the {kind} {animals}",
)


def vocabulary() -> frozenset[str]:
    """Return every word that a sentence may have."""
    fixed = {word for pattern in _PATTERNS for word in pattern.split() if "{" not in word}
    return frozenset(" ".join(_SLOTS.values()).replace("|", " ").split()) | fixed


def sentences(
    count: int, random: np.random.RandomState, other_than: Container[str] = ()
) -> list[str]:
    """Draw sentences, in small letters without punctuation.

    Args:
        count: how many; one may come twice.
        random: what they are drawn with.
        other_than: sentences not to be drawn.
    """
    found: list[str] = []
    while len(found) < count:
        pattern = _PATTERNS[random.randint(len(_PATTERNS))]
        drawn = " ".join(_word(slot, random) for slot in pattern.split())
        if drawn not in other_than:
            found.append(drawn)
    return found


def _word(slot: str, random: np.random.RandomState) -> str:
    if not slot.startswith("{"):
        return slot
    words = _SLOTS[slot.strip("{}")].split()
    return words[random.randint(len(words))].replace("|", " ")
