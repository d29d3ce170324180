"""Alignment: the likeliest path, labels spread over frames, and text from frame labels."""

import itertools
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blnet.speech.alignment import (
    LABELS_FILE,
    FrameLabels,
    align,
    align_batch,
    collapse,
    expand,
    fill_blanks,
)
from blnet.speech.text import Alphabet, required_frames

ABC = Alphabet("abc ")
labels_of = st.lists(st.integers(0, 4), max_size=30).map(torch.tensor).map(torch.Tensor.long)
ids_of = st.lists(st.integers(1, 4), max_size=6).map(lambda ids: torch.tensor(ids).long())


def random_output(frames, seed, classes=5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(frames, classes, generator=generator) * 3).log_softmax(-1)


def certain(labels):
    """Log probabilities of a network that has no doubt."""
    return torch.nn.functional.one_hot(labels, 5).float().clamp(min=1e-4).log()


def characters(labels):
    """CTC's rule, written as plainly as can be."""
    return [label for label, _ in itertools.groupby(labels.tolist()) if label]


# align --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(ids=ids_of, spare=st.integers(0, 3), seed=st.integers(0, 99))
def test_a_path_writes_its_text_and_none_is_likelier(ids, spare, seed):
    frames = required_frames(ids) + spare
    assume(frames <= 6)
    output = random_output(frames, seed)
    labels = align(output, ids)
    assert labels.dtype == torch.int64
    assert labels.shape == (frames,)
    assert characters(labels) == ids.tolist()
    found = sum(float(output[t, label]) for t, label in enumerate(labels.tolist()))
    # All paths that write the text: over its own labels and the blank.
    options = sorted({0, *ids.tolist()})
    for path in itertools.product(options, repeat=frames):
        if characters(torch.tensor(path).long()) == ids.tolist():
            score = sum(float(output[t, label]) for t, label in enumerate(path))
            assert score <= found + 1e-4


def test_nothing_said_is_blank_throughout():
    assert align(random_output(4, 0), torch.zeros(0).long()).tolist() == [0] * 4
    assert align(random_output(0, 0), torch.zeros(0).long()).tolist() == []


@pytest.mark.parametrize(("text", "frames", "needed"), [("abc", 2, 3), ("aabb", 5, 6), ("a", 0, 1)])
def test_too_few_frames_are_told(text, frames, needed):
    ids = ABC.encode(text)
    with pytest.raises(ValueError, match=rf"^{frames} frames are too few .* needs {needed};"):
        align(random_output(frames, 0), ids)
    assert characters(align(random_output(needed, 0), ids)) == ids.tolist()


def test_bad_input_is_told():
    output = random_output(5, 0)
    for wrong in ([1, 5], [0, 1], [-1]):
        with pytest.raises(ValueError, match=r"the network 1 to 4, beside the blank"):
            align(output, torch.tensor(wrong))
    with pytest.raises(ValueError, match="hold NaN"):
        align(output * float("nan"), torch.tensor([1]))


def test_impossible_frames_are_no_obstacle():
    output = torch.full((3, 5), -torch.inf)
    output[[0, 1, 2], [1, 0, 2]] = 0
    assert align(output, torch.tensor([1, 2])).tolist() == [1, 0, 2]


@settings(max_examples=60, deadline=None)
@given(ids=ids_of, spare=st.integers(0, 3), seed=st.integers(0, 99))
def test_an_impossible_text_is_written_all_the_same(ids, spare, seed):
    output = random_output(required_frames(ids) + spare, seed)
    output[output < output.median() if output.numel() else output > 0] = -torch.inf
    assert characters(align(output, ids)) == ids.tolist()


def test_a_batch_is_its_recordings():
    output = torch.stack([random_output(9, seed) for seed in range(3)])
    targets = [ABC.encode("ab"), ABC.encode(""), ABC.encode("a cab")]
    lengths = torch.tensor([4, 3, 9])
    found = align_batch(output, lengths, targets)
    for place, labels in enumerate(found):
        assert labels.equal(align(output[place, : lengths[place]], targets[place]))
    with pytest.raises(ValueError, match="recording 3 of the batch: 4 frames are too few"):
        align_batch(output, torch.tensor([4, 3, 4]), targets)


# fill_blanks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "silence", "wanted"),
    [
        ("1002", 4, "1122"),
        ("10002", 4, "11122"),  # the middle is as near to both
        ("1000002", 4, "1110222"),  # longer: the middle stays
        ("1000002", 0, "1000002"),
        ("1000002", 1, "1100002"),
        ("10002", 3, "11122"),
        ("100002", 3, "111022"),
        ("100001", 3, "111011"),
        ("0001000", 3, "0011110"),
        ("001000", 2, "011100"),
        ("101", 4, "101"),  # or "aa" would become "a"
        ("1001", 4, "1101"),
        ("10001", 4, "11011"),
        ("1000001", 4, "1110111"),
        ("000", 4, "000"),
        ("", 4, ""),
        ("1122", 4, "1122"),
    ],
)
def test_the_rule_of_blanks(labels, silence, wanted):
    found = fill_blanks(torch.tensor([int(c) for c in labels]).long(), silence)
    assert "".join(map(str, found.tolist())) == wanted


@settings(max_examples=200, deadline=None)
@given(labels=labels_of, silence=st.integers(0, 12))
def test_filling_keeps_the_text_and_every_mark(labels, silence):
    filled = fill_blanks(labels, silence)
    assert characters(filled) == characters(labels)
    assert filled[labels != 0].equal(labels[labels != 0])


@settings(max_examples=200, deadline=None)
@given(labels=labels_of, silence=st.integers(0, 12))
def test_as_many_blanks_stay_as_the_rule_says(labels, silence):
    filled = fill_blanks(labels, silence)
    marked = labels.nonzero()[:, 0].tolist()
    for left, right in itertools.pairwise(marked):
        gap = right - left - 1
        least = 1 if gap and labels[left] == labels[right] else 0
        assert int((filled[left + 1 : right] == 0).sum()) == max(gap - silence, least)
        changes = filled[left : right + 1].unique_consecutive().tolist()
        assert len(changes) <= 3  # left, perhaps blank, right


def test_silence_may_not_be_negative():
    with pytest.raises(ValueError, match="got -1"):
        fill_blanks(torch.tensor([1]), -1)


# expand -------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(labels=labels_of, factor=st.integers(1, 4), data=st.data())
def test_every_frame_has_the_label_of_its_moment(labels, factor, data):
    assume(len(labels))
    frames = data.draw(st.integers((len(labels) - 1) * factor + 1, (len(labels) + 1) * factor))
    found = expand(labels, factor, frames).tolist()
    assert len(found) == frames
    assert found[: len(labels) * factor] == labels.repeat_interleave(factor).tolist()[:frames]
    assert set(found[len(labels) * factor :]) <= {int(labels[-1])}
    assert characters(torch.tensor(found)) == characters(labels)


@pytest.mark.parametrize("frames", [4, 9, 100])
def test_frames_of_another_rate_are_told(frames):
    with pytest.raises(ValueError, match=f"3 labels of 2 frames each cannot label {frames} frames"):
        expand(torch.tensor([1, 2, 3]), 2, frames)


# collapse -----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="abc ", max_size=12),
    spare=st.integers(0, 20),
    silence=st.integers(0, 10),
    factor=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_frame_labels_give_the_text_back(text, spare, silence, factor, seed):
    ids = ABC.encode(text)
    frames = required_frames(ids) + spare
    labels = align(random_output(frames, seed), ids)
    dense = fill_blanks(expand(labels, factor, frames * factor), silence)
    assert collapse(certain(dense), ABC).text == ABC.normalise(text)


@pytest.mark.parametrize(
    ("labels", "minimum", "text"),
    [
        ("111222", 3, "ab"),
        ("1112111", 2, "a"),  # a slip within a character
        ("1112333", 2, "ac"),
        ("2111", 2, "a"),
        ("1112", 2, "a"),
        ("1110111", 3, "aa"),  # a blank always counts
        ("1212", 2, ""),
        ("", 2, ""),
    ],
)
def test_short_runs_are_slips(labels, minimum, text):
    output = certain(torch.tensor([int(c) for c in labels]).long())
    found = collapse(output, ABC, minimum)
    assert found.text == text
    assert found.score == pytest.approx(0, abs=1e-3)


def test_collapse_tells_frames_and_probabilities():
    output = torch.full((5, 5), 0.05).log()
    best = [0.5, 0.8, 0.85, 0.6, 0.9]
    output[range(5), [1, 1, 2, 0, 3]] = torch.tensor(best).log()
    first, second, third = collapse(output, ABC).tokens
    assert (first.character, first.start, first.end) == ("a", 0, 2)
    assert first.probability == pytest.approx(0.8)
    assert (second.start, second.end, third.start, third.end) == (2, 3, 4, 5)
    assert collapse(output, ABC).score == pytest.approx(np.log(best).sum(), abs=1e-5)
    # Of a slip neither the label nor the probability is left.
    (only,) = collapse(output, ABC, minimum=2).tokens
    assert (only.end, only.probability) == (3, pytest.approx(0.8))


# FrameLabels --------------------------------------------------------------------------------------


def some_labels():
    entries = [("a.wav", torch.tensor([1, 1, 0])), ("b.wav@1.5", torch.zeros(0).long())]
    entries.append(("über.flac", torch.tensor([4, 0, 3, 3])))
    return dict(entries), FrameLabels.of(entries, ABC, 0.02, "a network")


def test_labels_come_back_from_their_folder(tmp_path):
    entries, written = some_labels()
    written.save(tmp_path / "new" / "folder")
    found = FrameLabels.load(tmp_path / "new" / "folder")
    assert (found.alphabet, found.hop_seconds, found.model) == (ABC, 0.02, "a network")
    assert found.names == tuple(entries)
    assert len(found) == 3
    for name, labels in entries.items():
        assert name in found
        assert found.labels(name).dtype == torch.int64
        assert found.labels(name).equal(labels)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [LABELS_FILE]


def test_no_recording_at_all(tmp_path):
    FrameLabels.of([], ABC, 0.01, "").save(tmp_path)
    assert len(FrameLabels.load(tmp_path)) == 0


def test_an_unknown_recording_is_named(tmp_path):
    some_labels()[1].save(tmp_path)
    with pytest.raises(ValueError, match=rf"{LABELS_FILE} has no labels of c\.wav; run"):
        FrameLabels.load(tmp_path).labels("c.wav")


def test_a_folder_without_labels_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no frame labels .* 'blnet align'"):
        FrameLabels.load(tmp_path / "nowhere")


def test_labels_beyond_the_alphabet_and_twins_are_told():
    for wrong in (5, -1):
        with pytest.raises(ValueError, match="go beyond the alphabet's classes"):
            FrameLabels.of([("a", torch.tensor([wrong]))], ABC, 0.01, "")
    with pytest.raises(ValueError, match="two recordings have one name"):
        FrameLabels.of([("a", torch.tensor([1]))] * 2, ABC, 0.01, "")
    with pytest.raises(ValueError, match="no time between labels"):
        FrameLabels.of([], ABC, float("nan"), "")


def test_every_cut_of_the_file_is_told(tmp_path):
    some_labels()[1].save(tmp_path)
    path = tmp_path / LABELS_FILE
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is not a whole file of frame labels \(.*anew"):
            FrameLabels.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "tensors"),
    [
        ({"names": ["a", "b"]}, {}),
        ({"names": 3}, {}),
        ({"alphabet": "aa"}, {}),
        ({"alphabet": "a"}, {}),
        ({"hop_seconds": "often"}, {}),
        ({"hop_seconds": 0}, {}),
        ({}, {"ends": torch.tensor([4])}),
        ({}, {"ends": torch.tensor([-2])}),
        ({"names": ["a", "b"]}, {"ends": torch.tensor([4, 3])}),
        ({"names": ["a", "b"]}, {"ends": torch.tensor([-1, 3])}),
        ({}, {"values": torch.tensor([1, -1, 0], dtype=torch.int16)}),
    ],
)
def test_a_file_that_contradicts_itself_is_told(tmp_path, changes, tensors):
    header = {"names": ["a"], "alphabet": "ab", "hop_seconds": 0.01, "model": "m"}
    values = torch.tensor([1, 2, 0], dtype=torch.int16)
    whole = {"values": values, "ends": torch.tensor([3])}

    def load(header, tensors):
        metadata = {"blnet": json.dumps(header)}
        safetensors.torch.save_file(tensors, tmp_path / LABELS_FILE, metadata)
        return FrameLabels.load(tmp_path)

    assert load(header, whole).labels("a").tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="is not a whole file of frame labels"):
        load({**header, **changes}, {**whole, **tensors})
