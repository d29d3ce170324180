"""Corpora: their layouts, their splits, and what is said where they are not there or not whole."""

import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch

from blnet.speech.config import DataConfig
from blnet.speech.data import load_data
from helpers.recordings import recorded, zipped


def length(one):
    return torch.tensor([len(one.text)])


def load(task="keyword", parts="both", **settings):
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}
    target = None if task == "keyword" else length
    return load_data(DataConfig(**settings), task, target, parts=parts)


def refused(*words, task="keyword", **settings):
    """Check that a configuration is refused in one sentence with some words in it."""
    with pytest.raises(ValueError, match=r"\S") as error:
        load(task, **settings)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def names(recordings):
    return sorted(os.path.basename(one.file.split("::")[-1]) for one in recordings.utterances)


# Free Spoken Digits ------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path):
    """Give a folder in FSDD's layout: digits 0 and 7, speakers ann and bob, takes 3 to 6."""
    for digit in (0, 7):
        for speaker in ("ann", "bob"):
            for take in range(3, 7):
                recorded(tmp_path / "fsdd" / "recordings" / f"{digit}_{speaker}_{take}.wav")
    (tmp_path / "fsdd" / "README.md").write_text("text")
    return tmp_path / "fsdd"


@pytest.mark.parametrize("layout", [lambda f: f, lambda f: f / "recordings", zipped])
def test_fsdd_has_its_own_split(digits, layout):
    data = load(name="fsdd", path=layout(digits), sample_rate=8000)
    assert names(data.evaluation) == sorted(
        f"{d}_{s}_{t}.wav" for d in (0, 7) for s in ("ann", "bob") for t in (3, 4)
    )
    assert len(data.train) == 8
    assert data.classes[7] == "seven"
    for part in (data.train, data.evaluation):
        for (_, target), one in zip(part, part.utterances, strict=True):
            digit, speaker, _ = os.path.basename(one.file.split("::")[-1]).split("_")
            assert (int(target), one.speaker) == (int(digit), speaker)
            assert one.text == one.label == data.classes[int(digit)]


def test_one_speaker_is_held_out_whole(digits):
    data = load(name="fsdd", path=digits, holdout_speaker="bob")
    assert {one.speaker for one in data.train.utterances} == {"ann"}
    assert Counter(one.speaker for one in data.evaluation.utterances) == {"bob": 8}
    alone = load(name="fsdd", path=digits, holdout_speaker="bob", parts="evaluation")
    assert names(alone.evaluation) == names(data.evaluation)
    refused("'eve'", "fsdd", "choose one of ann, bob", name="fsdd", path=digits,
            holdout_speaker="eve")  # fmt: skip


def test_the_real_fsdd(shared):
    data = load(name="fsdd", path=shared("fsdd.zip"), sample_rate=8000)
    expected = "fsdd (2,700 training and 300 test recordings, 19.7 and 2.2 minutes, of 6 speakers, "
    assert data.name == expected + "at 8 kHz)"
    assert Counter(one.label for one in data.evaluation.utterances) == dict.fromkeys(
        data.classes, 30
    )


# yesno -------------------------------------------------------------------------------------------


def test_yesno_says_its_names(tmp_path):
    for name in ("0_1", "1_1", "0_0", "1_0"):
        recorded(tmp_path / "waves_yesno" / f"{name}.wav")
    (tmp_path / "waves_yesno" / "README").write_text("")
    data = load("ctc", name="yesno", path=tmp_path, holdout=0.25)
    texts = {
        os.path.basename(one.file): one.text
        for one in (*data.train.utterances, *data.evaluation.utterances)
    }
    assert texts == {"0_1.wav": "no yes", "1_1.wav": "yes yes", "0_0.wav": "no no",
                     "1_0.wav": "yes no"}  # fmt: skip
    assert len(data.evaluation) == 1
    refused("--task keyword needs a label for every recording", "yesno", name="yesno",
            path=tmp_path)  # fmt: skip
    refused("does not say who speaks", task="ctc", name="yesno", path=tmp_path,
            holdout_speaker="a")  # fmt: skip


def test_the_real_yesno_is_held_out_by_its_seed(shared):
    path = shared("yesno.zip")
    data, other = (load("ctc", name="yesno", path=path, split_seed=seed) for seed in (0, 1))
    assert (len(data.train), len(data.evaluation)) == (54, 6)
    assert names(data.evaluation) != names(other.evaluation)
    samples, target = data.evaluation[0]
    assert samples.abs().max() > 0.05
    assert int(target) >= len("no " * 7 + "no")


# LibriSpeech -------------------------------------------------------------------------------------


@pytest.fixture
def books(tmp_path):
    """Give a folder in LibriSpeech's layout: two parts to train on, two to evaluate on."""
    for place, part in enumerate(("train-clean-100", "train-clean-360", "test-clean", "dev-clean")):
        chapter = tmp_path / "LibriSpeech" / part / str(place) / "5"
        for number in range(2):
            recorded(chapter / f"{place}-5-000{number}.flac")
        lines = (f"{place}-5-000{number} SAID {number}\n" for number in range(2))
        (chapter / f"{place}-5.trans.txt").write_text("".join(lines))
    return tmp_path


def test_librispeech_takes_its_parts(books):
    data = load("ctc", name="librispeech", path=books)
    assert names(data.train) == ["0-5-0000.flac", "0-5-0001.flac"]
    assert names(data.evaluation) == ["2-5-0000.flac", "2-5-0001.flac"]
    assert [one.text for one in data.train.utterances] == ["SAID 0", "SAID 1"]
    assert {one.speaker for one in data.train.utterances} == {"0"}
    assert len(data.train[0][0]) == 1600
    both = load("ctc", name="librispeech", path=books / "LibriSpeech", eval_path="dev-clean",
                subset="train-clean-100+train-clean-360")  # fmt: skip
    assert len(both.train) == 4
    assert names(both.evaluation) == ["3-5-0000.flac", "3-5-0001.flac"]


def test_librispeech_needs_no_part_that_is_not_asked_for(books):
    options = {"task": "ctc", "name": "librispeech", "path": books}
    whole = load(**options)
    shutil.rmtree(next(books.rglob("test-clean")))
    data = load(parts="training", **options)
    assert (names(data.train), len(data.evaluation)) == (names(whole.train), 0)


def test_librispeech_that_is_not_whole_is_refused(books):
    options = {"task": "ctc", "name": "librispeech", "path": books}
    refused("--data.subset 'train'", "dev-clean", subset="train", **options)
    refused("--data.eval-path", "dev-other", "--data.download", eval_path="dev-other", **options)
    next(books.rglob("2-5.trans.txt")).write_text("nonsense\n")
    refused("test-clean", "not whole", **options)


# Folders -----------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path):
    """Give a folder of folders for words: 10 recordings of cat, 20 of stop_it."""
    for word, count in (("cat", 10), ("stop_it", 20)):
        for number in range(count):
            recorded(tmp_path / "words" / word / "deep" / f"{word}{number}.wav")
    (tmp_path / "words" / "cat" / "notes.txt").write_text("")
    return tmp_path / "words"


@pytest.mark.parametrize("layout", [lambda f: f, lambda f: f.parent, zipped])
def test_a_folder_gives_a_share_of_each_word(words, layout):
    data = load(name="folder", path=layout(words), holdout=0.2)
    assert data.classes == ("cat", "stop_it")
    assert Counter(one.label for one in data.evaluation.utterances) == {"cat": 2, "stop_it": 4}
    assert Counter(one.label for one in data.train.utterances) == {"cat": 8, "stop_it": 16}
    assert not set(names(data.train)) & set(names(data.evaluation))
    assert {one.text for one in data.train.utterances} == {"cat", "stop it"}


def test_a_folder_may_have_its_evaluation_elsewhere(words, tmp_path):
    for word in ("cat", "stop_it"):
        recorded(tmp_path / "held" / word / "x.wav")
    data = load(name="folder", path=words, eval_path=tmp_path / "held")
    assert (len(data.train), names(data.evaluation)) == (30, ["x.wav", "x.wav"])
    alone = load(name="folder", eval_path=tmp_path / "held", parts="evaluation")
    assert (len(alone.train), len(alone.evaluation)) == (0, 2)
    both = tmp_path / "both"
    both.mkdir()
    words.rename(both / "train")
    (tmp_path / "held").rename(both / "val")
    data = load(name="folder", path=both)
    assert (len(data.train), names(data.evaluation)) == (30, ["x.wav", "x.wav"])
    given = load(name="folder", path=tmp_path, eval_path=both, parts="evaluation")
    assert names(given.evaluation) == ["x.wav", "x.wav"]
    for number in range(2):  # words, not parts
        recorded(tmp_path / "odd" / "test" / f"{number}.wav")
        recorded(tmp_path / "odd" / "val" / f"{number}.wav")
    assert load(name="folder", path=tmp_path / "odd", holdout=0.5).classes == ("test", "val")
    recorded(both / "val" / "dog" / "y.wav")
    refused("a class 'dog'", "not trained on", name="folder", path=both)


@pytest.mark.parametrize("layout", [lambda f: f, lambda f: f.parent, zipped])
@pytest.mark.parametrize("held", ["val", "validation", "dev"])
def test_parts_are_found_inside_a_folder_and_beside_a_stray_file(tmp_path, layout, held):
    folder = tmp_path / "set" / "words"
    for number in range(3):
        recorded(folder / "train" / "cat" / f"{number}.wav")
        recorded(folder / "train" / "dog" / f"{number}.wav")
    for word in ("cat", "dog"):
        recorded(folder / held / word / f"{word}.wav")
    data = load(name="folder", path=layout(folder))
    assert (data.classes, len(data.train)) == (("cat", "dog"), 6)
    assert names(data.evaluation) == ["cat.wav", "dog.wav"]
    given = load(name="folder", path=layout(folder), eval_path=layout(folder))
    assert (given.classes, len(given.train)) == (("cat", "dog"), 6)
    assert names(given.evaluation) == names(data.evaluation)
    for part in ("train", held):
        (folder / part).rename(tmp_path / part)
        (folder / part).mkdir()
        (tmp_path / part).rename(folder / part / "audio")
    deeper = load(name="folder", path=folder)
    assert (deeper.classes, len(deeper.train)) == (("cat", "dog"), 6)
    assert names(deeper.evaluation) == names(data.evaluation)
    recorded(folder / "stray.wav")
    assert load(name="folder", path=folder).classes == ("cat", "dog")


def test_parts_by_other_names_are_no_words(tmp_path):
    for part in ("Training", "testing"):
        for word in ("cat", "dog"):
            recorded(tmp_path / part / word / "x.wav")
    refused("Training and testing", "call them train and val", name="folder", path=tmp_path)
    recorded(tmp_path / "stray.wav")
    refused("Training and testing", name="folder", path=tmp_path)
    recorded(tmp_path / "flat" / "train" / "x.wav")
    recorded(tmp_path / "flat" / "val" / "x.wav")
    refused("flat/train holds no folders with recordings", name="folder", path=tmp_path / "flat")


def test_a_word_is_one_class_however_it_is_spelled(tmp_path):
    for form in ("NFC", "NFD"):
        recorded(tmp_path / unicodedata.normalize(form, "n\xf6") / f"{form}.wav")
        recorded(tmp_path / "ja" / f"{form}.wav")
    assert load(name="folder", path=tmp_path, holdout=0.5).classes == ("ja", "n\xf6")


# Manifests ---------------------------------------------------------------------------------------


def test_a_manifest_is_held_out_by_speaker_where_those_are_known(tmp_path):
    recorded(tmp_path / "a.wav")
    lines = ["audio\ttext\tspeaker", *(f"a.wav\tx\t{n % 5}" for n in range(20))]
    (tmp_path / "all.tsv").write_text("\n".join(lines))
    data = load("ctc", name="manifest", path=tmp_path / "all.tsv", holdout=0.4)
    speakers = [{one.speaker for one in part.utterances} for part in (data.train, data.evaluation)]
    assert [len(found) for found in speakers] == [3, 2]
    assert not speakers[0] & speakers[1]
    refused("needs a label", name="manifest", path=tmp_path / "all.tsv")


def test_the_real_manifests_in_an_archive(shared):
    path = shared("so762_flac_480_160.zip")
    data = load("ctc", name="manifest", path=f"{path}::train.tsv", eval_path=f"{path}::test.tsv")
    assert data.name == (
        "manifest (480 training and 160 test recordings, 25.6 and 8.7 minutes, of 233 speakers, "
        "at 16 kHz)"
    )
    assert data.train.utterances[0].text == "WE CALL IT BEAR"
    samples, _ = data.train[0]
    assert len(samples) == pytest.approx(16000 * 2.58, abs=16000 * 0.01)


# Downloads and refusals --------------------------------------------------------------------------


def test_nothing_is_fetched_unasked_or_twice(words, tmp_path, monkeypatch):
    import torchaudio.datasets

    fetched = []

    def fetch(root, download):
        assert download
        fetched.append(root)
        for name in ("0_1", "1_0"):
            recorded(Path(root) / "waves_yesno" / f"{name}.wav")

    monkeypatch.setattr(torchaudio.datasets, "YESNO", fetch)
    path = tmp_path / "new" / "folder"
    refused("does not exist", task="ctc", name="yesno", path=path)
    for _ in range(2):
        load("ctc", name="yesno", path=path, download=True, holdout=0.5)
    assert fetched == [str(path)]


def test_a_download_that_fails_is_told(tmp_path, monkeypatch):
    import torchaudio.datasets

    def fail(root, download):
        raise RuntimeError("no network\nat all")

    for kind in ("YESNO", "SPEECHCOMMANDS"):
        monkeypatch.setattr(torchaudio.datasets, kind, fail)
    refused("could not be fetched", "no network at all", task="ctc", name="yesno",
            path=tmp_path, download=True)  # fmt: skip
    refused("could not be fetched", name="speech_commands", path=tmp_path, download=True)
    assert tmp_path.exists()
    monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", lambda root, *_, **named: fail(root, 1))
    for task, name in (("ctc", "yesno"), ("keyword", "speech_commands"), ("ctc", "librispeech")):
        refused("could not be fetched", task=task, name=name, path=tmp_path / "a" / "b",
                download=True)  # fmt: skip
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["fsdd", "speech_commands", "yesno", "folder", "librispeech"])
def test_what_is_not_there_is_named(tmp_path, name):
    refused("--data.path is missing", name=name)
    refused("does not exist", name=name, path=tmp_path / "none")
    if name != "librispeech":
        (tmp_path / "text").write_text("no archive")
        refused("not a whole .zip archive", name=name, path=tmp_path / "text")
        refused(f"--data.path{':' if name == 'folder' else ''} {tmp_path}", "holds no", name=name,
                path=tmp_path)  # fmt: skip
