"""The data of a run: splits, limits, batches, long recordings, and what cannot be read."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from blnet.speech.batches import bucketed_batches
from blnet.speech.config import DataConfig
from blnet.speech.data import load_data
from blnet.speech.recordings import Recordings, Utterance
from blnet.speech.splits import balanced, hold_out, hold_out_speaker
from blnet.training.loading import CorruptSample, Loader

RATE = 8000


def said(label="", speaker="", number=0):
    return Utterance(f"{number}.wav", 1.0, label=label, speaker=speaker)


def one(_):
    return torch.tensor(1)


@pytest.fixture
def folder(tmp_path):
    """Give a folder with recordings of 0.5, 1, 1.5 and 2 s, 0.wav to 3.wav, and a broken one."""
    for number in range(4):
        time = np.arange(RATE * (number + 1) // 2)
        soundfile.write(tmp_path / f"{number}.wav", time / 100_000, RATE, subtype="FLOAT")
    (tmp_path / "bad.wav").write_text("no recording")
    return tmp_path


def listed(folder, name="all.jsonl", **more):
    """Write a manifest of the four recordings; labels a and b in turn."""
    rows = [
        {"audio": f"{n}.wav", "text": "x" * (n + 1), "label": "ab"[n % 2], **more} for n in range(4)
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def refused(data, *words, task="keyword", **options):
    with pytest.raises(ValueError, match=r"\S") as error:
        load_data(data, task, one, **options)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


# Batches -----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    seconds=st.lists(st.floats(0, 20), max_size=400),
    size=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 100),
)
def test_every_batch_is_whole_and_no_index_comes_twice(seconds, size, seed, epoch):
    batches = bucketed_batches(seconds, size, seed, epoch)
    assert len(batches) == len(seconds) // size
    assert {len(batch) for batch in batches} <= {size}
    indices = [index for batch in batches for index in batch]
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(len(seconds)))
    assert batches == bucketed_batches(np.array(seconds), size, seed, epoch)


def test_batches_hold_similar_lengths_and_come_in_any_order():
    seconds = np.random.RandomState(0).uniform(1, 20, 1000)
    batches = bucketed_batches(seconds, 16, 0, 0)
    spreads = [np.ptp(seconds[batch]) for batch in batches]
    assert np.mean(spreads) < 19 / 16
    means = np.array([seconds[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5


def test_epochs_and_seeds_differ_in_order_and_in_what_is_left_out():
    seconds = np.linspace(1, 5, 103)
    found = [bucketed_batches(seconds, 10, *key) for key in ((0, 0), (0, 1), (1, 0))]
    assert found[0] != found[1] != found[2] != found[0]
    rests = [set(range(103)) - {i for batch in batches for i in batch} for batches in found]
    assert all(len(rest) == 3 for rest in rests)
    assert rests[0] != rests[1]
    # Not the same neighbours either: more than one pool mixes them.
    seconds = np.arange(2000.0)
    first, second = (
        {frozenset(batch) for batch in bucketed_batches(seconds, 10, 0, epoch)} for epoch in (0, 1)
    )
    assert len(first & second) < 20


# Splits ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6).filter(lambda c: max(c) > 1),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_label_gives_its_share(counts, share, seed):
    utterances = [said(str(label), number=n) for label, c in enumerate(counts) for n in range(c)]
    train, held = hold_out(utterances, share, seed)
    assert sorted(train + held, key=utterances.index) == utterances
    for label, count in enumerate(counts):
        found = sum(u.label == str(label) for u in held)
        assert abs(found - share * count) <= 1
        assert count - found >= 1


@settings(max_examples=60, deadline=None)
@given(
    speakers=st.lists(st.sampled_from("abcdefgh"), min_size=2).filter(lambda s: len(set(s)) > 1),
    share=st.floats(0.05, 0.9),
)
def test_speakers_are_in_one_part(speakers, share):
    train, held = hold_out([said(speaker=s, number=n) for n, s in enumerate(speakers)], share, 0)
    assert len(train) + len(held) == len(speakers)
    parts = [{u.speaker for u in part} for part in (train, held)]
    assert not parts[0] & parts[1]
    assert abs(len(parts[1]) - share * len(set(speakers))) <= 1


def test_splits_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="none to evaluate on"):
        hold_out([said("a")], 0.5, 0)
    with pytest.raises(ValueError, match="only speaker"):
        hold_out_speaker([said(speaker="a")], "a", "x")


@settings(max_examples=30, deadline=None)
@given(copies=st.lists(st.integers(1, 3), min_size=2, max_size=9), seed=st.integers(0, 99))
def test_what_is_listed_twice_is_in_one_part(copies, seed):
    listed = [said("a", number=n) for n, count in enumerate(copies) for _ in range(count)]
    train, held = hold_out(listed, 0.3, seed)
    assert not set(train) & set(held)
    assert sorted(train + held, key=listed.index) == listed
    once = [said("a", number=n) for n in range(len(copies))]
    assert (set(train), set(held)) == tuple(map(set, hold_out(once, 0.3, seed)))


def test_a_path_may_be_spelled_in_two_ways(tmp_path):
    said_twice = [
        Utterance(f"{tmp_path}{between}{number}.wav", 1.0, label="a")
        for number in range(4)
        for between in ("/", "/./")
    ]
    train, held = hold_out(said_twice, 0.5, 0)
    assert not {one.key for one in train} & {one.key for one in held}


def test_a_share_that_divides_evenly_is_not_rounded_up():
    assert len(hold_out([said("a", number=n) for n in range(100)], 0.07, 0)[1]) == 7


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 20), max_size=6), limit=st.integers(1, 60))
def test_a_limit_is_balanced_as_far_as_the_labels_go(counts, limit):
    utterances = [said(str(label), number=n) for label, c in enumerate(counts) for n in range(c)]
    taken = balanced(utterances, limit, 0)
    assert len(taken) == min(limit, len(utterances))
    assert taken == sorted(taken, key=utterances.index)
    found = [sum(u.label == str(label) for u in taken) for label in range(len(counts))]
    most = max(found, default=0)
    assert all(f >= min(c, most - 1) for f, c in zip(found, counts, strict=True))


# Recordings --------------------------------------------------------------------------------------


def recordings(folder, longer="skip", max_seconds=20.0, **more):
    utterances = [Utterance(str(folder / f"{n}.wav"), (n + 1) / 2) for n in range(4)]
    return Recordings(utterances, one, RATE, max_seconds, longer, **more)


def test_an_item_is_samples_and_target(folder):
    data = recordings(folder, transform=lambda samples: samples * 2)
    samples, target = data[1]
    assert (samples.dtype, samples.shape, int(target)) == (torch.float32, (RATE,), 1)
    assert torch.allclose(samples, torch.arange(RATE) / 50_000)
    assert data.seconds.tolist() == [0.5, 1, 1.5, 2]
    assert len(pickle.loads(pickle.dumps(recordings(folder)))[0][0]) == RATE // 2


def test_longer_ones_are_cut_or_skipped(folder):
    cut = recordings(folder, "cut", 1.25)
    assert cut.seconds.tolist() == [0.5, 1, 1.25, 1.25]
    assert [len(samples) for samples, _ in cut] == [4000, 8000, 10000, 10000]
    skipped = recordings(folder, "skip", 1.5)
    assert (len(skipped), skipped.skipped, skipped.seconds.tolist()) == (3, 1, [0.5, 1, 1.5])
    part = Utterance(str(folder / "3.wav"), 1.25, start=0.75)
    samples, _ = Recordings([part], one, RATE, 0.5, "cut")[0]
    assert torch.allclose(samples, torch.arange(6000, 10000) / 100_000)


def test_an_item_that_cannot_be_read_is_named(folder):
    def fail(_):
        raise ValueError("letter 'é' is not in the\nalphabet")

    part = Utterance(str(folder / "bad.wav"), 0.0, start=0.5)
    with pytest.raises(CorruptSample) as error:
        Recordings([part], one, RATE, 20, "skip")[0]
    assert error.value.name == f"{folder / 'bad.wav'} (0.5 s to end)"
    assert error.value.reason.startswith("it cannot be decoded")
    with pytest.raises(CorruptSample) as error:
        Recordings([Utterance(str(folder / "0.wav"), 0.5)], fail, RATE, 20, "skip")[0]
    assert (error.value.name, error.value.reason) == (
        str(folder / "0.wav"),
        "letter 'é' is not in the alphabet",
    )


def test_a_recording_longer_than_a_manifest_says_is_told(folder):
    said = Utterance(str(folder / "3.wav"), 0.5)
    assert len(Recordings([said], one, RATE, 20, "skip")[0][0]) == 2 * RATE
    for longer in ("skip", "cut"):
        with pytest.raises(CorruptSample, match=r"it is 2 s long, and is said to be 0.5 s"):
            Recordings([said], one, RATE, 1.5, longer)[0]


def test_the_training_loader_reads_past_what_is_broken(folder):
    utterances = [Utterance(str(folder / name), 0.5) for name in ("bad.wav", "0.wav")]
    loader = Loader(
        Recordings(utterances, one, RATE, 20, "skip"),
        lambda items: {"lengths": torch.tensor([len(samples) for samples, _ in items])},
    )
    (loaded,) = loader.batches([[0, 1]], 0, 0)
    assert loaded.batch["lengths"].tolist() == [4000]
    assert [one.name for one in loaded.corrupt] == [str(folder / "bad.wav")]


# Loading -----------------------------------------------------------------------------------------


def test_keywords_have_the_number_of_their_class(folder):
    path = listed(folder)
    data = load_data(DataConfig("manifest", path, path, sample_rate=RATE), "keyword")
    assert data.classes == ("a", "b")
    assert [int(target) for _, target in data.train] == [0, 1, 0, 1]
    assert data.train[0][1].dtype == torch.int64
    assert data.train[0][1].shape == ()
    known = load_data(DataConfig("manifest", path, path), "keyword", classes=("c", "b", "a"))
    assert known.classes == ("c", "b", "a")
    assert [int(target) for _, target in known.train] == [2, 1, 2, 1]
    refused(DataConfig("manifest", path, path), "a class 'b'", classes=("a", "c"))


def test_the_longest_are_evaluated_first_and_not_varied(folder):
    path = listed(folder)
    data = load_data(
        DataConfig("manifest", path, path, sample_rate=RATE),
        "ctc",
        lambda u: torch.tensor([len(u.text)]),
        lambda samples: samples[:10],
    )
    assert [len(samples) for samples, _ in data.train] == [10] * 4
    assert [len(samples) for samples, _ in data.evaluation] == [16000, 12000, 8000, 4000]
    assert [int(target) for _, target in data.evaluation] == [4, 3, 2, 1]
    assert data.evaluation.seconds.tolist() == [2, 1.5, 1, 0.5]


def test_evaluation_alone_needs_no_training_data(folder):
    path = listed(folder)
    data = load_data(DataConfig("manifest", None, path), "keyword", parts="evaluation")
    assert (len(data.train), len(data.evaluation), data.classes) == (0, 4, ("a", "b"))
    assert data.name == "manifest (4 test recordings, 0.1 minutes, at 16 kHz)"
    refused(DataConfig("manifest", None, path), "--data.path is missing")


def test_one_speaker_is_evaluated_on_wherever_the_recordings_are(folder):
    paths = [listed(folder, f"{name}.jsonl", speaker=name) for name in ("ann", "bob")]
    config = DataConfig("manifest", *paths, holdout_speaker="ann")
    for parts, count in (("both", 4), ("evaluation", 0)):
        data = load_data(config, "keyword", parts=parts)
        assert {u.speaker for u in data.evaluation.utterances} == {"ann"}
        assert (len(data.train), len(data.evaluation)) == (count, 4)


def test_a_limit_counts_for_each_part_and_label(folder):
    path = listed(folder)
    data = load_data(DataConfig("manifest", path, path, limit=2), "keyword")
    for part in (data.train, data.evaluation):
        assert sorted(u.label for u in part.utterances) == ["a", "b"]


def test_long_recordings_are_told(folder):
    path = listed(folder)
    config = DataConfig("manifest", path, path, max_seconds=1.2, sample_rate=RATE)
    assert load_data(config, "keyword").name == (
        "manifest (2 training and 2 test recordings, 0.0 and 0.0 minutes, 4 longer than 1.2 s left "
        "out, at 8 kHz)"
    )
    refused(DataConfig("manifest", path, path, max_seconds=0.2), "--data.max-seconds 0.2")
    config = DataConfig("manifest", path, path, longer="cut", max_seconds=1.0, sample_rate=RATE)
    assert load_data(config, "keyword").train.seconds.tolist() == [0.5, 1, 1, 1]
    refused(config, "--data.longer cut", "skip", task="ctc")


def test_a_recording_without_what_the_task_needs_is_named(folder):
    path, bare = listed(folder), listed(folder, "bare.jsonl", label="", text="")
    refused(DataConfig("manifest", bare, bare), "--task keyword needs a label", "4 of manifest")
    refused(DataConfig("manifest", path, bare), "--task ctc", "a transcript", "0.wav", task="ctc")
    lines = (folder / "all.jsonl").read_text() + '{"audio": "bad.wav", "label": "a"}\n'
    (folder / "mixed.jsonl").write_text(lines)
    mixed = str(folder / "mixed.jsonl")
    refused(
        DataConfig("manifest", mixed, mixed), "1 of manifest have none", "bad.wav", task="frame"
    )


def test_a_single_word_is_refused(folder):
    (folder / "lone.jsonl").write_text('{"audio": "0.wav", "label": "a"}\n' * 2)
    lone = str(folder / "lone.jsonl")
    refused(DataConfig("manifest", lone, lone), "manifest has 1 word", "below two")


def test_an_archive_in_place_of_a_manifest_is_told(folder):
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("train.tsv", "audio\ttext\n")
        archive.writestr("noise", np.random.RandomState(0).bytes(5000))
    path = str(folder / "all.zip")
    refused(DataConfig("manifest", path, path), f"as in {path}::train.tsv", task="ctc")


def test_unknown_settings_are_refused(folder):
    refused(DataConfig("nothing"), "--data.name 'nothing'")  # type: ignore[arg-type]
    refused(DataConfig("manifest"), "--data.path is missing")


@pytest.mark.parametrize("parts", ["both", "evaluation"])
def test_paths_that_a_corpus_does_not_look_at_are_refused(folder, parts):
    place = str(folder)
    for name in ("synth", "fsdd", "yesno", "speech_commands"):
        path = None if name == "synth" else place
        words = (f"--data.eval-path {place}", f"the corpus {name}", "leave it out")
        refused(DataConfig(name, path, place), *words, parts=parts)
    words = (f"--data.path {place}", "the corpus synth", "with --data.name")
    refused(DataConfig("synth", place), *words, parts=parts)


def test_loading_processes_read_the_same(folder):
    path = listed(folder)
    data = load_data(DataConfig("manifest", path, path), "keyword")
    alone, helped = (
        [samples.sum().item() for samples, _ in DataLoader(data.train, None, num_workers=workers)]
        for workers in (0, 2)
    )
    assert alone == helped
