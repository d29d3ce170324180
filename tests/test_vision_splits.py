"""Splits of a set of pictures: what is held out, and a limit that is fair to every class."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.vision.sources import Part, Pixels
from blnet.vision.splits import balanced, hold_out


def labelled(labels):
    return Part.whole(Pixels(np.zeros((len(labels), 1, 1), np.uint8), labels, "test"))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda c: max(c) > 3),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_class_gives_its_share(counts, share, seed):
    part = labelled(np.repeat(np.arange(len(counts)), counts)[::-1])
    train, held = hold_out(part, share, seed)
    together = np.sort(np.concatenate([train.indices, held.indices]))
    assert np.array_equal(together, part.indices)
    for label, count in enumerate(counts):
        left = int((train.labels == label).sum())
        assert left >= min(count, 1)
        assert abs(count - left - share * count) <= 1


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    limit=st.integers(1, 60),
)
def test_a_limit_is_balanced_as_far_as_the_classes_go(counts, limit):
    part = labelled(np.repeat(np.arange(len(counts)), counts))
    taken = balanced(part, limit, 0)
    found = np.bincount(taken.labels, minlength=len(counts))
    assert found.sum() == min(limit, sum(counts))
    assert len(set(taken.indices.tolist())) == len(taken.indices)
    largest = found.max()
    assert all(f >= min(c, largest - 1) for f, c in zip(found, counts, strict=True))


def test_a_share_that_divides_evenly_is_not_rounded_up():
    _, held = hold_out(labelled([0] * 50 + [1] * 50), 0.07, 0)  # 0.07 * 100 = 7.000000000000001
    assert len(held.indices) == 7


def test_nothing_to_hold_out_is_refused():
    with pytest.raises(ValueError, match=r"--data.holdout 0\.2 of 3 images in 3 classes"):
        hold_out(labelled([0, 1, 2]), 0.2, 0)
