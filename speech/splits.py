"""Splits of recordings that are the same on every machine and in every run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from blnet.speech.recordings import Utterance

Pair = tuple[list[Utterance], list[Utterance]]
_NAMED = 12  # speakers that an error lists


def hold_out(utterances: Sequence[Utterance], share: float, seed: int) -> Pair:
    """Split off a share: of the speakers, where all are known, else of each label's recordings.

    What is listed twice counts once and is in one part, or what was trained on would be evaluated
    on.

    Args:
        utterances: the recordings.
        share: of the speakers or recordings to hold out, between 0 and 1, rounded up; at least one
            speaker and one recording of each label stay to train on.
        seed: of the choice.

    Returns:
        The recordings to train on and those held out, each in the order they had.

    Raises:
        ValueError: if one of the two would be empty.
    """
    speakers = sorted({one.speaker for one in utterances})
    if len(speakers) > 1 and all(speakers):
        held = _share_of(speakers, share, seed)
        chosen = [one.speaker in held for one in utterances]
    else:
        once = {_listed(one): one for one in utterances}
        places = _share_of_each_label(list(once.values()), share, seed)
        names = {name for place, name in enumerate(once) if place in places}
        chosen = [_listed(one) in names for one in utterances]
    train, evaluation = _parted(utterances, chosen)
    if not train or not evaluation:
        raise ValueError(
            f"--data.holdout {share:g} of {len(utterances)} recordings leaves none to "
            f"{'evaluate' if train else 'train'} on; add recordings"
        )
    return train, evaluation


def hold_out_speaker(utterances: Sequence[Utterance], speaker: str, corpus: str) -> Pair:
    """Split off the recordings of one speaker.

    Raises:
        ValueError: if the corpus names no speakers, not this one, or no other.
    """
    speakers = sorted({one.speaker for one in utterances} - {""})
    if speaker not in speakers:
        more = ", ..." if len(speakers) > _NAMED else ""
        known = f"choose one of {', '.join(speakers[:_NAMED])}{more}"
        raise ValueError(
            f"--data.holdout-speaker {speaker!r} is not in {corpus}; "
            + (known if speakers else "it does not say who speaks: leave the flag out")
        )
    train, evaluation = _parted(utterances, [one.speaker == speaker for one in utterances])
    if not train:
        raise ValueError(
            f"--data.holdout-speaker {speaker!r} is the only speaker of {corpus}, which leaves "
            "nothing to train on; leave the flag out"
        )
    return train, evaluation


def balanced(utterances: Sequence[Utterance], limit: int | None, seed: int) -> list[Utterance]:
    """Return at most `limit` recordings, as many of each label as can be, in their order."""
    if limit is None or limit >= len(utterances):
        return list(utterances)
    ranks = _ranks(utterances, lambda one: one.label, seed)
    by_turns = sorted(range(len(ranks)), key=lambda place: (ranks[place], utterances[place].label))
    return [utterances[place] for place in sorted(by_turns[:limit])]


def _parted(utterances: Sequence[Utterance], chosen: Sequence[bool]) -> Pair:
    paired = list(zip(utterances, chosen, strict=True))
    return [one for one, held in paired if not held], [one for one, held in paired if held]


def _listed(one: Utterance) -> tuple[str, str]:
    """Return what tells whether a recording is listed twice."""
    return one.key, one.label


def _share_of(names: Sequence[str], share: float, seed: int) -> set[str]:
    # Rounded first, or 0.07 * 100 = 7.000000000000001 would become 8.
    count = min(math.ceil(round(share * len(names), 6)), len(names) - 1)
    order = np.random.RandomState(seed).permutation(len(names))
    return {names[place] for place in order[:count]}


def _share_of_each_label(utterances: Sequence[Utterance], share: float, seed: int) -> set[int]:
    ranks = _ranks(utterances, lambda one: one.label, seed)
    counts: dict[str, int] = defaultdict(int)
    for one in utterances:
        counts[one.label] += 1
    held = {
        label: min(math.ceil(round(share * count, 6)), count - 1) for label, count in counts.items()
    }
    return {place for place, one in enumerate(utterances) if ranks[place] < held[one.label]}


def _ranks(
    utterances: Sequence[Utterance], group: Callable[[Utterance], str], seed: int
) -> list[int]:
    """Return the place of each recording in a random order of its group, from 0."""
    ranks = [0] * len(utterances)
    seen: dict[str, int] = defaultdict(int)
    # RandomState's draws are the same in every version of NumPy; its successor's may change.
    for place in np.random.RandomState(seed).permutation(len(utterances)):
        name = group(utterances[place])
        ranks[place] = seen[name]
        seen[name] += 1
    return ranks
