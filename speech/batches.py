"""Batches of recordings of similar length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from blnet.training.loading import mixed_seed

_POOL = 32  # batches; more waste less on padding, fewer mix the lengths better


def bucketed_batches(seconds: Sequence[float], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches of indices, each of recordings of similar length.

    The indices are shuffled, pools of 32 batches are sorted by length and cut into batches, and the
    batches are shuffled. What fills no batch is left out, other recordings in every epoch. All of
    that depends on the arguments alone.

    Args:
        seconds: length of each recording, (n,).
        size: recordings in a batch, at least 1.
        seed: of the run.
        epoch: counted from 0; each has an order of its own.

    Returns:
        n // size batches of exactly `size` indices; no index comes twice.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    lengths = np.asarray(seconds, dtype=np.float64)
    order = torch.randperm(len(lengths), generator=generator).numpy()
    order = order[: len(order) // size * size]
    batches = []
    for start in range(0, len(order), size * _POOL):
        pool = order[start : start + size * _POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[place : place + size].tolist() for place in range(0, len(pool), size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
