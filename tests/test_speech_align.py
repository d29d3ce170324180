"""``blnet align``: labels that spell the transcripts, and a run that is trained on them."""

import argparse
import csv
import json
import os
import shlex

import numpy as np
import pytest
import torch

from blnet.cli import main
from blnet.speech import align
from blnet.speech.alignment import FrameLabels
from blnet.speech.audio import read_audio
from blnet.speech.features import LogMel
from blnet.speech.recordings import Utterance
from blnet.speech.task_frame import Labelling
from blnet.speech.train import COMMAND
from helpers import tones
from helpers.recordings import bad_recordings

COUNT = 12
FEATURES = LogMel(tones.FEATURES, tones.RATE)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return tones.save(tmp_path_factory.mktemp("net") / "net.safetensors", "ctc")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Make a manifest of spoken texts, one of them in two halves of a file."""
    folder = tmp_path_factory.mktemp("texts")
    rows = ["audio\ttext\tstart\tend"]
    for number in range(COUNT):
        text = tones.random_text(number, 1 + number % 4)
        tones.write(folder / f"{number}.wav", tones.spoken(text))
        rows.append(f"{number}.wav\t{text}\t\t")
    tones.write(folder / "two.wav", tones.spoken("abca"))
    rows += ["two.wav\tab\t0\t0.4", "two.wav\tca\t0.4\t0.8"]
    (folder / "list.tsv").write_text("\n".join(rows) + "\n")
    return folder / "list.tsv"


def run(*arguments):
    return main(["align", *map(str, arguments)])


def refused(capsys, *arguments):
    """Return the last line of what the command is refused with."""
    assert run(*arguments) == 2
    found = capsys.readouterr()
    assert found.out == ""
    line = found.err.splitlines()[-1]
    assert line.startswith("blnet align: error: ")
    return line.removeprefix("blnet align: error: ")


def spelled(labels):
    """Return what frame labels say."""
    kept = labels.unique_consecutive()
    return tones.ALPHABET.decode(kept[kept != 0].tolist())


def names(texts):
    """Return name -> text of the recordings of a manifest."""
    found = {}
    for row in csv.DictReader(texts.open(), delimiter="\t"):
        part = f" ({float(row['start']):g} s to {float(row['end']):g} s)" if row["end"] else ""
        found[f"{texts.parent / row['audio']}{part}"] = row["text"]
    return found


# What is written ----------------------------------------------------------------------------------


def test_every_recording_is_labelled_with_its_text(net, texts, tmp_path, capsys):
    out = tmp_path / "labels"
    assert run(net, "--data-path", texts, "--output", out) == 0
    found = FrameLabels.load(out)
    assert capsys.readouterr().out.startswith(f"blnet align: labelled {COUNT + 2} recordings of ")
    assert found.alphabet == tones.ALPHABET
    assert found.hop_seconds == 0.01
    assert found.model == f"bl_resnet22 (alpha 2, beta 2, width 0.125), {net}"
    assert set(found.names) == set(names(texts))
    for name, text in names(texts).items():
        labels = found.labels(name)
        assert spelled(labels) == text
        if "(" not in name:
            samples = read_audio(name, tones.RATE)
            assert len(labels) == int(FEATURES.frames(torch.tensor(len(samples))))


def test_labels_lie_where_the_letters_are(net, texts, tmp_path):
    assert run(net, "--data-path", texts, "--output", tmp_path, "--silence", 0) == 0
    found = FrameLabels.load(tmp_path)
    for name, text in list(names(texts).items())[:COUNT]:
        labels = found.labels(name)
        for place, letter in enumerate(text):
            middle = place * (tones.TONE + tones.GAP) + tones.TONE / 2
            frame = round((middle - 0.0125) / 0.01)
            assert labels[frame] == tones.ALPHABET.classes[letter]


def test_silence_is_what_lies_between(net, texts, tmp_path):
    blanks = []
    for silence in (0, 0.04, 0.3):
        assert run(net, "--data-path", texts, "--output", tmp_path, "--silence", silence) == 0
        found = FrameLabels.load(tmp_path)
        blanks.append(sum(int((found.labels(name) == 0).sum()) for name in found.names))
    assert blanks[0] > blanks[1] > blanks[2]
    assert blanks[2] < blanks[0] / 4


def test_a_network_that_shortens_time_labels_every_frame(texts, tmp_path):
    net = tones.save(tmp_path / "net.safetensors", "ctc", tones.untrained("ctc", time_reduction=2))
    assert run(net, "--data-path", texts, "--output", tmp_path) == 0
    found = FrameLabels.load(tmp_path)
    for name, text in list(names(texts).items())[:COUNT]:
        samples = read_audio(name, tones.RATE)
        assert len(found.labels(name)) == int(FEATURES.frames(torch.tensor(len(samples))))
        assert spelled(found.labels(name)) == text


# What cannot be labelled --------------------------------------------------------------------------


def test_what_does_not_fit_is_counted(net, tmp_path, capsys):
    good = tones.write(tmp_path / "good.wav", tones.spoken("ab"))
    rows = [f"{good}\tab\t{n / 1000}\t0.4" for n in range(199)]
    short = tones.write(tmp_path / "short.wav", np.zeros(900))
    text = "audio\ttext\tstart\tend\n" + "\n".join([*rows, f"{short}\t{'ab' * 20}\t\t"]) + "\n"
    (tmp_path / "list.tsv").write_text(text)
    flags = (net, "--data-path", tmp_path / "list.tsv", "--output", tmp_path / "labels")
    assert run(*flags) == 0
    found = capsys.readouterr()
    assert f"warning: skipped {short}, which cannot be used: its transcript needs 40" in found.err
    assert found.out.startswith("blnet align: labelled 199 recordings of ")
    assert ", left out 1; train on them: " in found.out
    labels = FrameLabels.load(tmp_path / "labels")
    assert len(labels) == 199
    assert str(short) not in labels
    # Where they are many, nothing is written, and what was there stays.
    before = (tmp_path / "labels" / "labels.safetensors").read_bytes()
    *bad, _ = bad_recordings(tmp_path)
    (tmp_path / "list.tsv").write_text(text + "".join(f"{file}\tab\t\t\n" for file in bad))
    line = refused(capsys, *flags)
    assert line.startswith("9 of the 208 recordings cannot be used, more than 1%")
    assert (tmp_path / "labels" / "labels.safetensors").read_bytes() == before


@pytest.mark.parametrize("silence", ["-1", "nan", "61"])
def test_silence_that_makes_no_sense(net, texts, tmp_path, capsys, silence):
    line = refused(capsys, net, "--data-path", texts, "--output", tmp_path, f"--silence={silence}")
    assert line.startswith("--silence must be from 0 to 60 seconds, got ")


def test_a_recording_that_comes_twice_shows_first(net, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("blnet.speech.align.align", lambda *_: pytest.fail("aligned"))
    data = ("--data-path", texts, "--eval-path", texts)
    line = refused(capsys, net, *data, "--output", tmp_path / "labels")
    assert "is in the data 2 times, and labels are found by their recording's name" in line


def test_data_without_transcripts(net, tmp_path, capsys):
    for name in "ab":
        tones.write(tmp_path / f"{name}.wav", tones.spoken("a"))
    (tmp_path / "list.tsv").write_text("audio\tlabel\na.wav\tx\nb.wav\tx\n")
    line = refused(capsys, net, "--data-path", tmp_path / "list.tsv", "--output", tmp_path / "l")
    assert "needs a transcript for every recording" in line


def test_a_folder_that_cannot_be_written_shows_first(net, texts, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "--output" in refused(capsys, net, "--data-path", texts, "--output", tmp_path / "file")


def test_labels_are_found_however_a_path_is_spelled(net, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(texts.parent)
    assert run(net, "--data-path", "list.tsv", "--output", tmp_path) == 0
    found = FrameLabels.load(tmp_path)
    assert set(found.names) == set(names(texts))
    (tmp_path / "link").symlink_to(texts.parent)
    for file in (f"{tmp_path}/link/two.wav", "two.wav", f"../{texts.parent.name}/two.wav"):
        labels = Labelling(found)(Utterance(file, 0.4, start=0, end=0.4))
        assert torch.equal(labels, found.labels(f"{texts.parent}/two.wav (0 s to 0.4 s)"))
    entries = [("two.wav", torch.ones(3))]  # as they were once written
    before = FrameLabels.of(entries, tones.ALPHABET, 0.01, "by hand")
    assert Labelling(before)(Utterance("two.wav", 0.8)).tolist() == [1, 1, 1]
    assert Utterance("a.zip::in/b.wav", 1.0).key == f"{os.getcwd()}/a.zip::in/b.wav"


# What is done with them --------------------------------------------------------------------------


def test_a_network_is_trained_on_the_labels(net, texts, tmp_path, capsys):
    labels, out = tmp_path / "the labels", tmp_path / "run"
    assert run(net, "--data-path", texts, "--output", labels) == 0
    advice = capsys.readouterr().out.partition("train on them: ")[2]
    command = shlex.split(advice)
    assert command[:5] == ["blnet", "train", "speech", "--task", "frame"]
    flags = (*command[3:], "--features.bins", 16, "--features.normalize", "none",
             "--augment.freq-masks", 0, "--augment.time-masks", 0, "--model.width", 0.125,
             "--model.alpha", 2, "--epochs", 25, "--batch-size", 4, "--optimizer.lr", 0.01,
             "--device", "cpu", "--tensorboard", "false", "--workers", 0,
             "--output", out)  # fmt: skip
    assert main(["train", "speech", *map(str, flags)]) == 0
    words = ("evaluate", "speech", out, "--eval-path", texts, "--output", out / "evaluation")
    assert main([*map(str, words)]) == 0
    (network,) = json.loads((out / "evaluation" / "results.json").read_text())["networks"]
    assert network["recordings"] == COUNT + 2
    assert network["metrics"]["cer"] < 0.2
    capsys.readouterr()
    file = tones.write(tmp_path / "new.wav", tones.spoken("cab ac"))
    assert main(["transcribe", str(file), "--checkpoint", str(out)]) == 0
    assert set(capsys.readouterr().out) <= set("abc \n")


def test_the_example_of_a_training_run_has_flags_that_there_are():
    parser = argparse.ArgumentParser()
    align.configure(parser)
    words = shlex.split(parser.epilog.splitlines()[-1])
    assert words[:3] == ["blnet", "train", "speech"]
    config, _ = COMMAND.parse(words[3:])
    assert (config.task, config.data.name) == ("frame", "manifest")
