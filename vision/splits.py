"""Splits of labelled images that are the same on every machine and in every run."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from blnet.vision.sources import Integers, Part


def hold_out(part: Part, share: float, seed: int) -> tuple[Part, Part]:
    """Split off a share of the images, the same share of every class as nearly as can be.

    The share is rounded up to whole images; those that do not divide evenly go to the classes with
    the largest remainders. Every class keeps an image to train on.

    Args:
        part: the images.
        share: of the images to hold out, between 0 and 1.
        seed: of the choice.

    Returns:
        The images to train on and those held out, each in the order they had.

    Raises:
        ValueError: if nothing would be held out.
    """
    labels = part.labels
    counts = np.bincount(labels)
    exact = share * counts
    held = np.floor(exact).astype(np.int64)
    # Rounded first, or 0.07 * 100 = 7.000000000000001 would become 8.
    missing = math.ceil(round(share * len(labels), 6)) - int(held.sum())
    held[np.argsort(held - exact, kind="stable")[:missing]] += 1
    held = np.minimum(held, np.maximum(counts - 1, 0))
    if not held.sum():
        raise ValueError(
            f"--data.holdout {share} of {len(labels)} images in {np.count_nonzero(counts)} classes "
            "leaves none to evaluate on; add images or choose a larger share"
        )
    chosen: NDArray[np.bool_] = _ranks(labels, seed) < held[labels]
    return part.take(~chosen), part.take(chosen)


def balanced(part: Part, limit: int | None, seed: int) -> Part:
    """Return at most `limit` images, as many of each class as can be, in the order they had."""
    if limit is None or limit >= len(part.indices):
        return part
    labels = part.labels
    by_turns = np.lexsort((labels, _ranks(labels, seed)))
    return part.take(np.sort(by_turns[:limit]))


def _ranks(labels: Integers, seed: int) -> Integers:
    """Return the place of each image in a random order of its class, from 0."""
    # RandomState's draws are the same in every version of NumPy; its successor's may change.
    order = np.random.RandomState(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    first = np.cumsum(np.bincount(labels)) - np.bincount(labels)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - first[labels[order]]
    return ranks
