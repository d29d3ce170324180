"""``blnet predict speech``: right words for every kind of recording, clean output."""

import csv
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from blnet.cli import main
from blnet.speech import predict as predicting
from blnet.speech.audio import read_audio
from blnet.speech.features import LogMel
from blnet.speech.inference import load_trained
from blnet.speech.predict import predict
from helpers import tones
from helpers.recordings import bad_recordings, odd_recordings


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return tones.save(tmp_path_factory.mktemp("net") / "net.safetensors", "keyword")


@pytest.fixture
def folder(tmp_path):
    """Make recordings of different words and lengths, in folders of two depths."""
    folder = tmp_path / "words"
    (folder / "a" / "deep").mkdir(parents=True)
    for number, (place, word) in enumerate(
        (("c.wav", "high"), ("a/b.flac", "low"), ("a/deep/a.WAV", "middle"), ("b.ogg", "low"))
    ):
        tones.write(folder / place, tones.keyword(word, number, 0.3 + 0.1 * number))
    (folder / "notes.txt").write_text("no recording")
    (folder / ".hidden.wav").write_text("passed over")
    return folder


def run(net, *words):
    return main(["predict", "speech", *map(str, words), "--checkpoint", str(net)])


def refused(capsys, net, *words):
    """Return the last line of what the command is refused with."""
    assert run(net, *words) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "Traceback" not in found.err
    line = found.err.splitlines()[-1]
    assert line.startswith("blnet predict speech: error: ")
    return line.removeprefix("blnet predict speech: error: ")


def expected(file):
    """Return the probability of each word, of one recording by itself."""
    samples = read_audio(file, tones.RATE)
    maps, frames = LogMel(tones.FEATURES, tones.RATE)(samples[None], torch.tensor([len(samples)]))
    with torch.no_grad():
        return torch.softmax(tones.trained("keyword")(maps, frames)[0].double(), 0).tolist()


# What is predicted --------------------------------------------------------------------------------


def test_json_on_a_clean_standard_output(net, folder, capsys):
    assert run(net, folder, "--format", "json", "--top", 2) == 0
    found = capsys.readouterr()
    assert found.err == ""
    rows = json.loads(found.out)
    files = [folder / name for name in ("a/b.flac", "a/deep/a.WAV", "b.ogg", "c.wav")]
    assert [row["file"] for row in rows] == list(map(str, files))
    said = [row["predictions"][0]["label"] for row in rows]
    assert said == ["low", "middle", "low", "high"]
    for row, file in zip(rows, files, strict=True):
        shares = expected(file)
        order = sorted(range(3), key=lambda k: -shares[k])[:2]
        assert [p["class"] for p in row["predictions"]] == order
        assert [p["label"] for p in row["predictions"]] == [tones.WORDS[k] for k in order]
        found = [p["probability"] for p in row["predictions"]]
        assert found == pytest.approx([shares[k] for k in order], abs=1e-4)


def test_csv_and_table(net, folder, capsys):
    assert run(net, folder / "c.wav", "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["label"] == "high"
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-5)
    assert run(net, folder / "c.wav", "--top", 1) == 0
    assert f"{100 * float(rows[0]['probability']):.2f} %" in capsys.readouterr().out


def test_batches_do_not_change_answers_or_order(net, folder, capsys):
    (folder / "b.ogg").write_text("spoilt in the middle of a batch")
    answers = []
    for batch in (1, 2, 3, 16):
        assert run(net, folder, folder / "c.wav", "--batch", batch, "--format", "json") == 1
        answers.append(json.loads(capsys.readouterr().out))
    assert [Path(row["file"]).name for row in answers[0]] == ["b.flac", "a.WAV", "c.wav", "c.wav"]
    for other in answers[1:]:
        assert [row["file"] for row in other] == [row["file"] for row in answers[0]]
        for one, two in zip(answers[0], other, strict=True):
            mine, theirs = (
                {p["label"]: p["probability"] for p in row["predictions"]} for row in (one, two)
            )
            assert mine == pytest.approx(theirs, abs=1e-5)


def test_no_more_than_a_batch_is_read_ahead(net, folder, monkeypatch):
    read = []
    real = predicting.read_audio
    monkeypatch.setattr(predicting, "read_audio", lambda *a: (read.append(1), real(*a))[1])
    answers = predict(load_trained(net), iter([str(folder / "c.wav")] * 7), 1, 3)
    next(answers)
    assert len(read) == 3
    assert len(list(answers)) == 6
    assert len(read) == 7


def test_members_of_archives(net, folder, capsys):
    packed = folder / "all.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(folder / "c.wav", "in/c.wav")
    assert run(net, f"{packed}::in/c.wav", "--format", "json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["file"] == f"{packed}::in/c.wav"
    assert row["predictions"][0]["label"] == "high"
    assert run(net, f"{packed}::in/d.wav", folder / "c.wav", "--top", 1) == 1
    assert (
        f"{packed}::in/d.wav cannot be read: the archive holds no such file\n"
        in capsys.readouterr().err
    )


def test_recordings_of_every_kind_say_the_same(net, tmp_path, capsys):
    files = odd_recordings(tmp_path, tones.keyword("middle"))
    assert run(net, *files, "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["predictions"][0]["label"] for row in rows] == ["middle"] * len(files)
    shares = [row["predictions"][0]["probability"] for row in rows]
    assert shares == pytest.approx([shares[1]] * len(files), abs=0.15)


@pytest.mark.parametrize("samples", [np.zeros(1), np.ones(1), np.zeros(tones.RATE)])
def test_silence_and_a_single_sample_have_an_answer(net, tmp_path, capsys, samples):
    file = tones.write(tmp_path / "little.wav", samples)
    assert run(net, file, "--format", "json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    shares = {p["class"]: p["probability"] for p in row["predictions"]}
    assert [shares[k] for k in range(3)] == pytest.approx(expected(file), abs=1e-4)


def test_real_recordings_of_an_archive(net, capsys, shared):
    """The network knows nothing of digits; that each has an answer of its own is the point."""
    packed = shared("fsdd.zip")
    with zipfile.ZipFile(packed) as archive:
        names = [name for name in archive.namelist() if name.endswith("_0.wav")][:5]
    files = [f"{packed}::{name}" for name in names]
    assert run(net, *files, "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    for row, file in zip(rows, files, strict=True):
        shares = {p["class"]: p["probability"] for p in row["predictions"]}
        assert [shares[k] for k in range(3)] == pytest.approx(expected(file), abs=1e-4)


# What is refused ---------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named(net, folder, tmp_path, capsys):
    bad = bad_recordings(tmp_path)
    assert run(net, *bad, folder / "c.wav", "--format", "json") == 1
    found = capsys.readouterr()
    assert [row["file"] for row in json.loads(found.out)] == [str(folder / "c.wav")]
    for line, (file, said) in zip(found.err.splitlines(), bad.items(), strict=True):
        assert line.startswith(f"blnet predict speech: {file} cannot be read: ")
        assert said in line
    last = refused(capsys, net, *bad)
    assert last.startswith("not one recording could be read; name recordings (WAV, FLAC,")


def test_long_recordings_are_refused_not_cut(tmp_path, capsys):
    data = {"name": "folder", "sample_rate": tones.RATE, "max_seconds": 0.5}
    net = tones.save(tmp_path / "net.safetensors", "keyword", data=data)
    long = tones.write(tmp_path / "long.wav", tones.keyword("low", 0, 0.6))
    short = tones.write(tmp_path / "short.wav", tones.keyword("low", 0, 0.5))
    assert run(net, long, short, "--top", 1, "--format", "csv") == 1
    found = capsys.readouterr()
    assert "short.wav,1,0,low" in found.out
    assert "long.wav cannot be read: it is 0.6 s long" in found.err
    assert found.err.endswith("recordings of one word, up to 0.5 s; cut it into words\n")


def test_long_recordings_are_cut_as_in_training(tmp_path, capsys):
    data = {"name": "folder", "sample_rate": tones.RATE, "max_seconds": 0.5, "longer": "cut"}
    net = tones.save(tmp_path / "net.safetensors", "keyword", data=data)
    sound = tones.keyword("low", 0, 0.6)
    long = tones.write(tmp_path / "long.wav", sound)
    cut = tones.write(tmp_path / "cut.wav", sound[: tones.RATE // 2])
    assert run(net, long, cut, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [r["probability"] for r in rows[:3]] == [r["probability"] for r in rows[3:]]


def test_a_folder_without_recordings_is_named(net, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(net, tmp_path / "empty", folder) == 1
    assert capsys.readouterr().err == (
        f"blnet predict speech: {tmp_path / 'empty'} is a folder without recordings\n"
    )
    refused(capsys, net, tmp_path / "empty")


def test_the_output_is_whole_or_untouched(net, folder, tmp_path, capsys):
    out = tmp_path / "out.csv"
    out.write_text("before")
    (bad, *_) = bad_recordings(tmp_path)
    refused(capsys, net, bad, "--output", out)
    assert out.read_text() == "before"
    assert run(net, folder, bad, "--output", out, "--format", "csv") == 1
    assert capsys.readouterr().out == ""
    assert len(out.read_text().splitlines()) == 1 + 3 * 4
    assert "none" in refused(capsys, net, folder, "--output", tmp_path / "none" / "out.csv")
    assert not list(tmp_path.glob(".blnet*"))


def test_links_to_folders_are_followed_but_not_in_circles(net, folder, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "set").symlink_to(folder)
    (folder / "round").symlink_to(tmp_path / "links")
    (folder / "self").symlink_to(folder)
    (folder / "loop").symlink_to("loop")
    found, failed = predicting.RECORDINGS.expand([tmp_path / "links"])
    assert not failed
    assert len(found) == len({os.path.realpath(file) for file in found}) > 0
