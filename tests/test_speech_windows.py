"""Windows over recordings of any length, and words told while they come."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.speech.decode import greedy
from blnet.speech.text import Alphabet
from blnet.speech.windows import Window, WordStream, plan, windows

ABC = Alphabet("abc ")


def means(samples, step):
    """A network: the mean of each step-long slice, the last of which may be shorter."""
    return torch.stack([part.mean() for part in samples.split(step)])


def cut(samples, sizes):
    """The samples in blocks of these sizes, over and over."""
    blocks, place = [], 0
    while len(samples):
        size = sizes[place % len(sizes)]
        blocks.append(samples[:size])
        samples, place = samples[size:], place + 1
    return blocks


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(0, 300),
    steps=st.integers(1, 12),
    overlap=st.integers(0, 11),
    step=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 80), min_size=1, max_size=4),
)
def test_joined_frames_are_those_of_the_whole(length, steps, overlap, step, sizes):
    overlap = min(overlap, steps - 1)
    samples = torch.arange(length, dtype=torch.float64) ** 1.5
    found = list(windows(iter(cut(samples, sizes)), steps * step, overlap * step, step))
    joined = [window.kept(means(window.samples, step)) for window in found]
    if length == 0:
        assert not found
        return
    assert torch.cat(joined).equal(means(samples, step))
    place = 0
    for window, frames in zip(found, joined, strict=True):
        assert window.first_frame + window.keep_from == place
        place += len(frames)
        assert len(window.samples) == steps * step or window is found[-1]
    assert all(window.keep_to is not None for window in found[:-1])
    assert found[-1].keep_to is None


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 400), steps=st.integers(2, 12), overlap=st.integers(1, 11))
def test_every_frame_has_half_an_overlap_around_it(length, steps, overlap):
    overlap = min(overlap, steps - 1)
    for window in windows([torch.zeros(length)], steps, overlap, 1):
        if window.first_frame:
            assert window.keep_from == overlap // 2
        if window.keep_to is not None:
            assert len(window.samples) - window.keep_to == overlap - overlap // 2


def test_a_recording_of_one_window_is_one_window():
    for length in (1, 7, 8):
        (only,) = windows([torch.zeros(length)], 8, 4, 2)
        assert (len(only.samples), only.first_frame, only.keep_from) == (length, 0, 0)
    assert len(list(windows([torch.zeros(9)], 8, 4, 2))) == 2


def test_windows_come_while_the_blocks_do():
    drawn = []

    def blocks():
        for number in range(1000):
            drawn.append(number)
            yield torch.full((4,), float(number))

    stream = windows(blocks(), 8, 4, 2)
    assert next(stream).samples.tolist() == [0.0] * 4 + [1.0] * 4
    assert len(drawn) == 3
    next(stream)
    assert len(drawn) == 4


def test_an_answer_that_is_too_short_is_told():
    window = Window(torch.zeros(8), 0, 0, 5)
    assert window.kept(torch.arange(6)).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="has 4 frames, of which 5 were to be used; make the over"):
        window.kept(torch.arange(4))


@pytest.mark.parametrize(
    ("size", "overlap", "step"), [(9, 4, 2), (8, 3, 2), (8, 8, 2), (8, -2, 2), (8, 4, 0), (0, 0, 1)]
)
def test_sizes_that_do_not_fit_are_told(size, overlap, step):
    with pytest.raises(ValueError, match=r"do not fit steps of"):
        next(windows([torch.zeros(20)], size, overlap, step))


@pytest.mark.parametrize(
    ("window", "overlap", "wanted"),
    [
        (20, 2, (320_000, 32_000)),
        (1, 0, (16_000, 0)),
        (1, 0.01, (16_000, 320)),  # up to a whole step
        (0.03, 0.02, (640, 320)),
        (0.001, 0.0005, (640, 320)),
    ],
)
def test_plans_are_whole_steps(window, overlap, wanted):
    assert plan(window, overlap, 16_000, 320) == wanted


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 400),
    window=st.floats(0.5, 20),
    overlap=st.floats(0, 19),
    lacking=st.integers(0, 5),
)
def test_a_small_overlap_makes_up_for_what_answers_lack(length, window, overlap, lacking):
    overlap = min(overlap, 0.9 * window)
    size, shared = plan(window, overlap, 1, 1, lacking)
    assert shared == max(round(overlap), 2 * lacking - 1)
    samples = torch.arange(length)
    joined = [
        part.kept(part.samples[: max(0, len(part.samples) - lacking)])
        for part in windows([samples], size, shared, 1)
    ]
    assert torch.cat(joined).equal(samples[: max(0, length - lacking)])


@pytest.mark.parametrize(
    ("window", "overlap"), [(1, 1), (1, 2), (0, 0), (1, -1), (float("nan"), 0)]
)
def test_plans_that_make_no_sense_are_told(window, overlap):
    with pytest.raises(ValueError, match="cannot overlap by"):
        plan(window, overlap, 16_000, 320)


# WordStream ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 4]), max_size=60),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    seed=st.integers(0, 99),
)
def test_words_are_those_of_greedy(labels, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(len(labels), 5, generator=generator)
    output[range(len(labels)), labels] += 3
    output = output.log_softmax(-1)
    stream, words, place = WordStream(ABC), [], 0
    for number in range(10 * len(labels)):
        size = sizes[number % len(sizes)]
        words += stream.push(output[place : place + size])
        place += size
    words += stream.finish()
    (whole,) = greedy(output[None], torch.tensor([len(labels)]), ABC)
    assert tuple(words) == whole.words


def test_words_come_when_they_end():
    stream, labels = WordStream(ABC), [0, 1, 1, 0, 4, 0, 2, 2, 3]
    output = torch.nn.functional.one_hot(torch.tensor(labels), 5).float().clamp(min=1e-5).log()
    told = [[word.text for word in stream.push(frame[None])] for frame in output]
    assert told == [[], [], [], [], [], ["a"], [], [], []]
    (last,) = stream.finish()
    assert (last.text, last.start_frame, last.end_frame) == ("bc", 6, 9)
    assert last.score == pytest.approx(1)


def test_silence_is_not_held():
    stream = WordStream(ABC)
    quiet = torch.log(torch.tensor([[0.96, 0.01, 0.01, 0.01, 0.01]])).expand(1000, 5)
    for _ in range(20):
        assert stream.push(quiet) == []
    assert stream._pending == []
    assert stream.finish() == []


def test_frames_of_another_alphabet_are_told():
    with pytest.raises(ValueError, match="the network has 7 classes and the alphabet 5"):
        WordStream(ABC).push(torch.from_numpy(np.zeros((2, 7), np.float32)))
