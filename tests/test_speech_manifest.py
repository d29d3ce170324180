"""Manifests: what a line may say, where its recording is looked for, and what is refused."""

import json
import zipfile

import numpy as np
import pytest
import soundfile
import torch

from blnet.speech.manifest import read_manifest
from blnet.speech.recordings import Recordings, Utterance


@pytest.fixture
def folder(tmp_path):
    """Give a folder with recordings of 1 and 2 s."""
    for name, seconds in (("one.wav", 1), ("train/two.flac", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, np.zeros(8000 * seconds), 8000)
    return tmp_path


def table(folder, *lines, name="train.tsv"):
    path = folder / name
    path.write_text("".join(line.replace("|", "\t") + "\n" for line in lines))
    return path


def jsonl(folder, *rows):
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(path, *words):
    """Check that a manifest is refused in one sentence that names it."""
    with pytest.raises(ValueError, match=r"\S") as error:
        read_manifest(path)
    text = str(error.value)
    assert "\n" not in text
    for word in (str(path), *words):
        assert word in text, text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", "\u2028\u0085\v\f\x1e")
def test_lines_end_at_line_feeds_alone(folder, end, mark):
    path = folder / "train.tsv"
    path.write_bytes(f"audio\ttext{end}one.wav\ta{mark}b{end}one.wav\tc{end}".encode())
    assert [one.text for one in read_manifest(path)] == [f"a{mark}b", "c"]
    path = folder / "train.jsonl"
    row = json.dumps({"audio": "one.wav", "text": "a\u2028b"}, ensure_ascii=False)
    path.write_bytes(f"{row}{end}{row}".encode())
    assert [one.text for one in read_manifest(path)] == ["a\u2028b"] * 2


def test_json_lines_say_all_that_an_utterance_holds(folder):
    path = jsonl(
        folder,
        {"audio": "one.wav"},
        {"audio": "one.wav", "text": " a b ", "label": "x", "speaker": 7, "age": [1], "seconds": 3},
        {"audio": str(folder / "train" / "two.flac"), "start": 0.5, "end": 1.25},
        {"audio": "train/two.flac", "start": 0.5, "seconds": None},
        {"audio": "one.wav", "end": 0.75},
        {"audio": "train/two.flac", "start": 0.5, "seconds": 1},
    )
    one, two = str(folder / "one.wav"), str(folder / "train" / "two.flac")
    assert read_manifest(path) == [
        Utterance(one, 1.0),
        Utterance(one, 3.0, "a b", "x", "7"),
        Utterance(two, 0.75, start=0.5, end=1.25),
        Utterance(two, 1.5, start=0.5),
        Utterance(one, 0.75, end=0.75),
        Utterance(two, 1.0, start=0.5),
    ]


def test_tables_say_the_same(folder):
    path = table(
        folder, "Path|text|label|start|end", 'one.wav|"say" it|x||', "", "train/two.flac|||0.5|1"
    )
    one, two = str(folder / "one.wav"), str(folder / "train" / "two.flac")
    assert read_manifest(path) == [
        Utterance(one, 1.0, '"say" it', "x"),
        Utterance(two, 0.5, start=0.5, end=1.0),
    ]


def test_utterances_are_looked_for_in_the_manifests_own_folder_first(folder):
    soundfile.write(folder / "two.wav", np.zeros(8), 8000)
    found = read_manifest(table(folder, "utt", "two", "one"))
    assert [one.file for one in found] == [
        str(folder / "train" / "two.flac"),
        str(folder / "one.wav"),
    ]


@pytest.mark.parametrize("inner", ["", "deep/er/"])
def test_a_manifest_in_an_archive_names_what_is_in_it(folder, inner):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(folder / "one.wav", f"{inner}one.wav")
        archive.write(folder / "train" / "two.flac", f"{inner}train/two.flac")
        archive.writestr(f"{inner}train.tsv", "\ufeffutt\ttext\ntwo\tb\n")
        archive.writestr(f"{inner}all.jsonl", '{"audio": "one.wav"}\n{"audio": "./one.wav"}')
    archive = folder / "a.zip"
    two = Utterance(f"{archive}::{inner}train/two.flac", 2.0, "b")
    assert read_manifest(f"{archive}::{inner}train.tsv") == [two]
    one = Utterance(f"{archive}::{inner}one.wav", 1.0)
    assert read_manifest(f"{archive}::{inner}all.jsonl") == [one, one]


def test_a_manifest_may_name_members_of_archives(folder):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(folder / "one.wav", "x.wav")
    found = read_manifest(jsonl(folder, {"audio": "a.zip::x.wav"}))
    assert found == [Utterance(str(folder / "a.zip::x.wav"), 1.0)]


def test_an_unreadable_recording_has_no_length_but_is_listed(folder):
    (folder / "bad.wav").write_text("no recording")
    found = read_manifest(jsonl(folder, {"audio": "bad.wav"}, {"audio": "bad.wav", "start": 1}))
    assert [one.seconds for one in found] == [0, 0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "names no audio"),
        ({"audio": "three.wav"}, "recording three.wav is not there"),
        ({"utt": "three"}, "three"),
        ({"audio": ["one.wav"]}, "audio is ['one.wav'], not text"),
        ({"audio": "one.wav", "text": {}}, "text is {}"),
        ({"audio": "one.wav", "text": True}, "text is True"),
        ({"audio": "one.wav", "start": "x"}, "start is 'x'"),
        ({"audio": "one.wav", "end": float("nan")}, "end is nan"),
        ({"audio": "one.wav", "seconds": -1}, "seconds is -1"),
        ({"audio": "one.wav", "seconds": True}, "seconds is True"),
        ({"audio": "one.wav", "start": 1, "end": 1}, "end 1 is not after start 1"),
        ([], "not a JSON object"),
    ],
)
def test_a_bad_line_is_named(folder, row, words):
    refused(jsonl(folder, {"audio": "one.wav"}, row), "line 2", words)


def test_bad_files_are_refused(folder):
    refused(folder / "none.tsv", "No such file")
    refused(table(folder, "one.wav|text"), "audio, path or utt")
    refused(table(folder, "audio|audio"), "twice")
    refused(table(folder, "audio|text", "", "one.wav|a|b"), "line 3: 3 columns", "has 2")
    refused(table(folder, "audio|text"), "lists no recordings")
    refused(table(folder), "lists no recordings")
    refused(table(folder, '{"audio": "one.wav"}', "{"), "line 2: not JSON")
    (folder / "train.tsv").write_bytes(b"audio\n\xff\xfe.wav\n")
    refused(folder / "train.tsv", "not UTF-8")


def test_a_start_with_a_duration_is_read_so_far_or_to_the_end(folder):
    rows = [
        {"audio": "train/two.flac", "start": 0.5, "seconds": s, "label": "x"} for s in (1, 9, 0)
    ]
    found = Recordings(
        read_manifest(jsonl(folder, *rows)), lambda _: torch.tensor(0), 8000, 20, "cut"
    )
    assert [len(samples) for samples, _ in found] == [8000, 12000, 12000]
    short = Recordings(found.utterances[:2], lambda _: torch.tensor(0), 8000, 0.25, "cut")
    assert [len(samples) for samples, _ in short] == [2000, 2000]
