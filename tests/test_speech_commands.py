"""Speech Commands: its published split, and the 12 words of it."""

import hashlib
import math
import os
from collections import Counter
from pathlib import Path

import pytest

from blnet.speech.commands import TEN_WORDS, part_by_hash
from blnet.speech.config import DataConfig
from blnet.speech.data import load_data
from helpers.recordings import recorded, zipped


def load(**settings):
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}
    return load_data(DataConfig(**settings), "keyword")


def refused(*words, **settings):
    """Check that a configuration is refused in one sentence with some words in it."""
    with pytest.raises(ValueError, match=r"\S") as error:
        load(**settings)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def names(recordings):
    return sorted(os.path.basename(one.file.split("::")[-1]) for one in recordings.utterances)


def test_the_published_hash_rule():
    # The published function (Warden 2018, tensorflow/examples/speech_commands), written out.
    most = 2**27 - 1
    for number in range(300):
        speaker = f"{number:08x}"
        hashed = int(hashlib.sha1(speaker.encode()).hexdigest(), 16)
        percentage = (hashed % (most + 1)) * (100.0 / most)
        part = "validation" if percentage < 10 else "test" if percentage < 20 else "train"
        assert part_by_hash(f"{speaker}_nohash_0.wav") == part
        assert part_by_hash(f"{speaker}_nohash_17.wav") == part


@pytest.fixture
def commands(tmp_path):
    """Give a folder in the layout of Speech Commands: 12 words, 40 speakers, and 2 noises."""
    folder = tmp_path / "speech_commands_v0.02"
    for word in (*TEN_WORDS, "bed", "zero"):
        for number in range(40):
            recorded(folder / word / f"{number:08x}_nohash_{number % 2}.wav", 0.01)
    for noise, seconds in (("pink", 30), ("taps", 20), ("short", 3)):
        recorded(folder / "_background_noise_" / f"{noise}.wav", seconds, 4000)
    return folder


def in_parts(data):
    return [
        {os.path.basename(one.file.split("::")[-1]) for one in part.utterances}
        for part in (data.train, data.evaluation)
    ]


@pytest.mark.parametrize("layout", [lambda f: f, lambda f: f.parent, zipped])
def test_all_words_are_split_by_the_hash(commands, layout):
    data = load(name="speech_commands", path=layout(commands), words=35)
    assert data.classes == tuple(sorted((*TEN_WORDS, "bed", "zero")))
    for found, part in zip(in_parts(data), ("train", "test"), strict=True):
        expected = {f"{n:08x}_nohash_{n % 2}.wav" for n in range(40)}
        assert found == {name for name in expected if part_by_hash(name) == part} != set()
    assert data.train.utterances[0].speaker == data.train.utterances[0].file[-21:-13]


def test_lists_come_before_the_hash(commands):
    (commands / "testing_list.txt").write_text(
        "yes/00000000_nohash_0.wav\nno/00000001_nohash_1.wav"
    )
    (commands / "validation_list.txt").write_text("bed/00000002_nohash_0.wav\n")
    data = load(name="speech_commands", path=commands, words=35)
    assert len(data.train) == 12 * 40 - 3
    assert names(data.evaluation) == ["00000000_nohash_0.wav", "00000001_nohash_1.wav"]
    assert {one.label for one in data.evaluation.utterances} == {"yes", "no"}


def test_unknown_and_silence_are_rounded_up_and_a_short_noise_suffices(tmp_path):
    for word in (*TEN_WORDS, "bed", "zero"):
        for number in range(3):
            recorded(tmp_path / word / f"{number:08x}_nohash_0.wav", 0.01)
    for number in range(3, 5):
        recorded(tmp_path / "yes" / f"{number:08x}_nohash_0.wav", 0.01)
    recorded(tmp_path / "_background_noise_" / "hum.wav", 10)  # of which 1.0 s is for testing
    (tmp_path / "testing_list.txt").write_text("yes/00000003_nohash_0.wav\n")
    (tmp_path / "validation_list.txt").write_text("")
    data = load(name="speech_commands", path=tmp_path)
    for part, known in ((data.train, 31), (data.evaluation, 1)):
        counts = Counter(one.label for one in part.utterances)
        wanted = math.ceil(known / 10)
        assert counts["silence"] == wanted
        assert counts["unknown"] == min(wanted, 6 if known == 31 else 0)


def test_twelve_words_are_ten_and_unknown_and_silence(commands):
    data = load(name="speech_commands", path=commands)
    assert data.classes == (*TEN_WORDS, "unknown", "silence")
    for part in (data.train, data.evaluation):
        counts = Counter(one.label for one in part.utterances)
        assert len(set(counts.values())) == 1, counts
        assert len(counts) == 12
        unknown = {one.text for one in part.utterances if one.label == "unknown"}
        assert unknown <= {"bed", "zero"}
        samples, target = part[[one.label for one in part.utterances].index("silence")]
        assert (len(samples), int(target)) == (16000, 11)
    silence = [
        [one for one in part.utterances if one.label == "silence"]
        for part in (data.train, data.evaluation)
    ]
    for noise, seconds in (("pink", 30), ("taps", 20)):
        ends, starts = ([one for one in part if noise in one.file] for part in silence)
        assert max(one.end for one in ends) <= 0.8 * seconds
        assert min(one.start for one in starts) >= 0.9 * seconds
    again = load(name="speech_commands", path=commands)
    assert again.train.utterances == data.train.utterances
    other = load(name="speech_commands", path=commands, split_seed=1)
    assert other.train.utterances != data.train.utterances


def test_twelve_words_need_all_of_them_and_noise(commands):
    for path in (commands / "_background_noise_").iterdir():
        path.unlink()
    refused("_background_noise_", "--data.words 35", name="speech_commands", path=commands)
    for path in (commands / "go").iterdir():
        path.unlink()
    refused("no recordings of go;", name="speech_commands", path=commands)


def test_the_real_speech_commands(shared):
    path = shared("speech_commands_v001_30x10.zip")
    data = load(name="speech_commands", path=path, words=35)
    assert len(data.classes) == 30
    assert 200 < len(data.train) < 270
    assert 10 < len(data.evaluation) < 60
