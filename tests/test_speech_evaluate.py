"""``blnet evaluate speech``: counts that are right, readable files, refusals that explain."""

import argparse
import csv
import json
import os
import random

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from scipy.stats import binomtest

from blnet.cli import main
from blnet.speech.audio import read_audio
from blnet.speech.decode import Decoder, Hypothesis, Token, make_decoder
from blnet.speech.evaluate import configure, evaluate
from blnet.speech.inference import load_trained
from helpers import tones
from helpers.recordings import bad_recordings, odd_recordings

COUNT = 17


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    return {head: tones.save(folder / f"{head}.safetensors", head)
            for head in ("keyword", "ctc", "frame")}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Make folders of recordings, every fourth in that of another word; none are named right."""
    folder = tmp_path_factory.mktemp("words")
    for number in range(COUNT):
        word = tones.WORDS[number % 3]
        said = tones.WORDS[(number + 1) % 3] if number % 4 == 0 else word
        (folder / said).mkdir(exist_ok=True)
        sound = tones.keyword(word, number, 0.2 + 0.02 * number)
        tones.write(folder / said / f"{number}.wav", sound)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Make a manifest of spoken texts, of which every third is noted down wrongly."""
    folder = tmp_path_factory.mktemp("texts")
    rows = ["audio\ttext\tlabel"]
    for number in range(COUNT):
        text = tones.random_text(number, 1 + number % 4)
        tones.write(folder / f"{number}.wav", tones.spoken(text))
        noted = text if number % 3 else f"{text[1:]} cab".strip()
        rows.append(f"{number}.wav\t{noted}\tlow")
    (folder / "list.tsv").write_text("\n".join(rows) + "\n")
    return folder / "list.tsv"


def run(*arguments):
    return main(["evaluate", "speech", *map(str, arguments)])


def on(data, *more):
    """Return the flags that name some data, of which all is evaluated."""
    kind = "folder" if data.is_dir() else "manifest"
    return ("--data", kind, "--eval-path", data, *more)


def refused(capsys, *arguments):
    """Return the last line of what the command is refused with."""
    assert run(*arguments) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "Traceback" not in found.err
    line = found.err.splitlines()[-1]
    assert line.startswith("blnet evaluate speech: error: ")
    return line.removeprefix("blnet evaluate speech: error: ")


def measured(net, *flags):
    parser = argparse.ArgumentParser()
    configure(parser)
    return evaluate(load_trained(net), parser.parse_args([str(net), *map(str, flags)]))


def answer(net, file):
    """Return the log probabilities of one recording by itself."""
    trained = load_trained(net)
    samples = read_audio(file, tones.RATE)
    maps, frames = trained.features(samples[None], torch.tensor([len(samples)]))
    with torch.no_grad():
        return trained.model(maps, frames)[0].log_softmax(-1)


def distance(found, said):
    """Return the edit distance of two sequences."""
    row = list(range(len(said) + 1))
    for i, one in enumerate(found, 1):
        row, before = [i], row
        for j, other in enumerate(said, 1):
            row.append(min(row[-1] + 1, before[j] + 1, before[j - 1] + (one != other)))
    return row[-1]


# What is counted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_words_are_counted_as_by_hand(nets, words, batch):
    confusion, seconds = np.zeros((3, 3), int), 0.0
    for truth, name in enumerate(tones.WORDS):
        for file in (words / name).iterdir():
            confusion[truth, int(answer(nets["keyword"], file).argmax())] += 1
            seconds += soundfile.info(file).duration
    found = measured(nets["keyword"], *on(words, "--batch", batch)).measured
    assert found.confusion.tolist() == confusion.tolist()
    assert found.recordings == COUNT
    assert found.accuracy == confusion.trace() / COUNT
    assert 0 < confusion.trace() < COUNT
    low, high = binomtest(int(confusion.trace()), COUNT).proportion_ci(0.95, "wilson")
    assert found.interval == pytest.approx((low, high))
    assert found.audio_seconds == pytest.approx(seconds)
    assert found.real_time_factor == found.seconds / found.audio_seconds
    assert (found.lines, found.rates, found.corrupt) == ((), {}, ())


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("flags", [(), ("--beam-width", 3)])
def test_errors_of_texts_are_counted_as_by_hand(nets, texts, batch, flags):
    decoder = make_decoder("auto", tones.ALPHABET, width=flags[1] if flags else None)
    errors, lengths, lines = np.zeros(2), np.zeros(2), {}
    for row in csv.DictReader(texts.open(), delimiter="\t"):
        file = texts.parent / row["audio"]
        frames = answer(nets["ctc"], file)
        (hypothesis,) = decoder(frames[None], torch.tensor([len(frames)]))
        lines[str(file)] = row["text"], hypothesis.text
        for k, split in enumerate((str.split, list)):
            errors[k] += distance(split(hypothesis.text), split(row["text"]))
            lengths[k] += len(split(row["text"]))
    found = measured(nets["ctc"], *on(texts, "--batch", batch), *flags)
    assert found.decoder == decoder.title
    rates = found.measured.rates
    assert (rates["wer"], rates["cer"]) == pytest.approx(tuple(errors / lengths), rel=1e-6)
    assert 0.1 < rates["cer"] < rates["wer"] < 1
    assert {a.name: (a.reference, a.hypothesis) for a in found.measured.lines} == lines
    assert found.measured.recordings == COUNT
    assert found.measured.accuracy is None
    assert found.measured.interval is None


def test_what_is_counted_is_what_the_decoder_writes(nets, texts, monkeypatch):
    said = Hypothesis(0.0, (Token("b", 0, 1, 1.0),))
    stub = Decoder("a stub", lambda _, lengths: [said] * len(lengths))
    monkeypatch.setattr("blnet.speech.evaluate.decoder_of", lambda *_: stub)
    found = measured(nets["ctc"], *on(texts))
    assert found.decoder == "a stub"
    assert {line.hypothesis for line in found.measured.lines} == {"b"}


def test_a_network_of_frame_labels_is_measured_by_transcripts(nets, texts):
    """Data that it never saw have no frame labels."""
    frame, ctc = (measured(nets[head], *on(texts)).measured for head in ("frame", "ctc"))
    assert frame.lines == ctc.lines
    assert frame.rates == ctc.rates


FLAGS = ("--data.sample-rate", tones.RATE, "--features.bins", 16, "--model.width", 0.125,
         "--model.alpha", 2, "--epochs", 3, "--batch-size", 4, "--baseline", "false",
         "--device", "cpu", "--tensorboard", "false", "--workers", 0)  # fmt: skip


@pytest.mark.parametrize("task", ["keyword", "ctc"])
def test_the_figures_are_those_of_training(nets, words, texts, tmp_path, capsys, task):
    data = words if task == "keyword" else texts
    kind = "folder" if task == "keyword" else "manifest"
    flags = ("--task", task, "--data.name", kind, "--data.path", data, "--data.eval-path", data,
             "--data.alphabet", "abc ", *FLAGS, "--output", tmp_path / "run")  # fmt: skip
    if task == "ctc":  # a network that spells already
        flags += ("--model.start", nets["ctc"], "--features.normalize", "none", "--lr", 1e-4,
                  "--ngrams", 2)  # fmt: skip
    assert main(["train", "speech", *map(str, flags)]) == 0
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    epochs = [row for row in rows if row["kind"] == "epoch"]
    name, choose = ("accuracy", max) if task == "keyword" else ("wer", min)
    best = choose(epochs, key=lambda row: row[name])
    said = capsys.readouterr().out
    assert run(tmp_path / "run", "--output", tmp_path / "out", "--batch", 5) == 0  # its own data
    (network,) = json.loads((tmp_path / "out" / "results.json").read_text())["networks"]
    for key in {"keyword": ("accuracy",), "ctc": ("wer", "cer")}[task]:
        assert network["metrics"][key] == pytest.approx(best[key], rel=1e-5)
    if task == "keyword":
        assert "ngram_wer" not in best
        assert "ngram" not in said.partition("\n")[2]  # the command above it is pytest's
        return
    assert f", ngram_wer {epochs[-1]['ngram_wer']:.2%} after the last, in " in said
    assert f"blnet ngrams {tmp_path / 'run'} --output words.arpa --order 2" in said
    model = tmp_path / "words.arpa"
    assert main(["ngrams", str(tmp_path / "run"), "--order", "2", "--output", str(model)]) == 0
    out = tmp_path / "searched"
    assert run(tmp_path / "run", "--output", out, "--language-model", model) == 0
    (network,) = json.loads((out / "results.json").read_text())["networks"]
    for key in ("wer", "cer"):
        assert network["metrics"][key] == pytest.approx(best[f"ngram_{key}"], rel=1e-5)
    assert best["ngram_cer"] not in (0, 1, best["cer"])  # else nothing was compared


# What is told -----------------------------------------------------------------------------------


def test_files_of_words(nets, words, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(nets["keyword"], *on(words), "--output", out) == 0
    table = capsys.readouterr().out
    found = measured(nets["keyword"], *on(words)).measured
    low, high = found.interval
    figures = (found.accuracy, 1 - found.accuracy, low, high)
    for part in (*(f"{100 * share:.2f}" for share in figures), f"{COUNT}", "bl_resnet22 (alpha 2,"):
        assert part in table
    assert {path.name for path in out.iterdir()} == {
        "results.json", "per_class.csv", "confusion.csv", "confusion.png"}  # fmt: skip
    with Image.open(out / "confusion.png") as picture:
        assert min(picture.size) > 100
    rows = list(csv.DictReader((out / "per_class.csv").open()))
    assert [row["class"] for row in rows] == list(tones.WORDS)
    assert [int(row["recordings"]) for row in rows] == found.confusion.sum(1).tolist()
    shares = (found.confusion.diagonal() / found.confusion.sum(1)).tolist()
    assert [float(row["top-1"]) for row in rows] == pytest.approx(shares, abs=1e-6)
    results = json.loads((out / "results.json").read_text())
    (network,) = results["networks"]
    assert network["metrics"] == {"accuracy": found.accuracy, "accuracy_interval_95": [low, high]}
    assert network["recordings"] == COUNT
    assert network["data"]["settings"]["eval_path"] == str(words)
    assert results["environment"]


def test_files_of_texts(nets, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(nets["ctc"], *on(texts), "--decoder", "beam", "--output", out) == 0
    table = capsys.readouterr().out
    found = measured(nets["ctc"], *on(texts), "--decoder", "beam").measured
    assert "decoder: beam of 16" in table
    for name in ("wer", "cer"):
        assert f"{100 * found.rates[name]:.2f}" in table
    assert {path.name for path in out.iterdir()} == {"results.json", "transcripts.csv"}
    rows = list(csv.DictReader((out / "transcripts.csv").open()))
    assert [(r["recording"], r["reference"], r["hypothesis"]) for r in rows] == [
        (line.name, line.reference, line.hypothesis) for line in found.lines
    ]
    (network,) = json.loads((out / "results.json").read_text())["networks"]
    assert network["metrics"] == found.rates
    assert network["decoder"].startswith("beam of 16")


def test_several_networks_have_a_folder_each(nets, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(nets["keyword"], nets["ctc"], nets["frame"], *on(texts), "--output", out) == 0
    table = capsys.readouterr().out
    assert table.count("WER %") == table.count("accuracy %") == 1
    assert table.index("WER %") > table.index("accuracy %")
    assert (out / "1" / "per_class.csv").is_file()
    assert (out / "2" / "transcripts.csv").read_text() == (out / "3/transcripts.csv").read_text()
    networks = json.loads((out / "results.json").read_text())["networks"]
    assert [one["files"] for one in networks] == ["1", "2", "3"]
    assert [one["checkpoint"] for one in networks] == [str(path) for path in nets.values()]


# Files of every kind -----------------------------------------------------------------------------


def manifest(folder, files, text):
    rows = "".join(f"{file}\t{text}\n" for file in files)
    (folder / "list.tsv").write_text(f"audio\ttext\n{rows}")
    return folder / "list.tsv"


def test_recordings_of_every_kind_say_the_same(nets, tmp_path):
    short = (np.zeros(1), np.zeros(tones.RATE))
    little = [tones.write(tmp_path / f"{n}.wav", one) for n, one in enumerate(short)]
    files = odd_recordings(tmp_path, tones.spoken("abc ba"))
    found = measured(nets["ctc"], *on(manifest(tmp_path, [*files, *little], "b")))
    said = {line.name: line.hypothesis for line in found.measured.lines}
    assert [said[str(file)] for file in files] == ["abc ba"] * len(files)
    assert said[str(little[1])] == ""
    assert found.measured.recordings == len(files) + 2


def test_names_that_are_not_utf_8_are_written_as_far_as_they_go(nets, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    tones.write(tmp_path / "a.wav", tones.spoken("ab")).rename(folder / "a.wav")
    data = manifest(folder, ["a.wav"], "ab")
    assert run(nets["ctc"], *on(data), "--output", tmp_path / "out") == 0
    (row,) = csv.DictReader((tmp_path / "out" / "transcripts.csv").open(encoding="utf-8"))
    assert row["recording"] == f"{tmp_path}/caf\ufffd/a.wav"
    assert row["hypothesis"] == "ab"


@pytest.mark.parametrize("place", range(8))
def test_a_recording_in_a_hundred_may_be_spoilt(nets, tmp_path, capsys, place):
    good = tones.write(tmp_path / "good.wav", tones.spoken("ab"))
    bad, said = list(bad_recordings(tmp_path).items())[place]
    files = random.Random(place).sample([good] * 99 + [bad], 100)
    out = tmp_path / "out"
    assert run(nets["ctc"], *on(manifest(tmp_path, files, "ab")), "--output", out) == 0
    found = capsys.readouterr()
    assert found.err.startswith(f"warning: skipped {bad}, which cannot be used: ")
    assert said in found.err
    assert len(found.err.splitlines()) == 1
    (network,) = json.loads((out / "results.json").read_text())["networks"]
    assert network["recordings"] == 99
    assert network["metrics"] == {"wer": 0, "cer": 0}
    (corrupt,) = network["corrupt"]
    assert corrupt["name"] == str(bad)
    assert said in corrupt["reason"]
    line = refused(capsys, nets["ctc"], *on(manifest(tmp_path, files[1:], "ab")))
    assert line.startswith("1 of the 99 recordings cannot be used, more than 1%, ")
    assert str(bad) in line


def test_nothing_that_can_be_used(nets, tmp_path, capsys):
    *bad, missing = bad_recordings(tmp_path)
    out = tmp_path / "out"
    line = refused(capsys, nets["ctc"], *on(manifest(tmp_path, bad, "ab")), "--output", out)
    assert line.startswith("8 of the 8 recordings cannot be used, more than 1%, ")
    line = refused(capsys, nets["ctc"], *on(manifest(tmp_path, [missing], "ab")), "--output", out)
    assert f"line 2: recording {missing} is not there; correct its name or add it" in line
    assert not list(out.iterdir())


def test_transcripts_that_do_not_fit_are_named(nets, texts, tmp_path, capsys):
    file = tones.write(tmp_path / "some.wav", tones.spoken("a"))
    for text, said in (("xyz", "'x' (U+0078)"), ("abc" * 30, "its transcript needs 90 frames")):
        line = refused(capsys, nets["ctc"], *on(manifest(tmp_path, [file], text)))
        assert said in line
        assert str(file) in line


# What is refused ----------------------------------------------------------------------------------


def test_data_that_are_not_there_or_do_not_fit(nets, words, texts, tmp_path, capsys):
    missing = tmp_path / "none.tsv"
    assert str(missing) in refused(capsys, nets["ctc"], "--data-path", missing)
    assert "--data.path is missing" in refused(capsys, nets["ctc"])
    (tmp_path / "w" / "other").mkdir(parents=True)
    tones.write(tmp_path / "w" / "other" / "a.wav", tones.keyword("low"))
    line = refused(capsys, nets["keyword"], *on(tmp_path / "w"))
    assert "has a class 'other' to evaluate on that is not trained on" in line
    line = refused(
        capsys, nets["ctc"], "--data", "yesno", "--data-path", words, "--eval-path", texts
    )
    assert line.startswith(f"--data.eval-path {texts} is not looked at by the corpus yesno")
    line = refused(capsys, nets["ctc"], *on(texts), "--max-seconds", "nan")
    assert "--data.max-seconds" in line
    line = refused(capsys, nets["ctc"], *on(texts), "--decoder", "greedy", "--beam-width", 3)
    assert "--decoder greedy takes no language model" in line
    for flag, value in (
        ("--language-model", "none.arpa"),
        ("--beam-width", 4),
        ("--decoder", "beam"),
    ):
        line = refused(capsys, nets["keyword"], *on(words), flag, value)
        assert line.startswith(f"{flag} is for networks that spell")


@pytest.mark.parametrize("flag", ["--lm-weight", "--word-bonus"])
@pytest.mark.parametrize("value", ["nan", "inf", "much"])
def test_weights_are_finite_numbers(nets, texts, capsys, flag, value):
    with pytest.raises(SystemExit):
        run(nets["ctc"], *on(texts), flag, value)
    assert f"'{value}' is not a finite number" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_shows_first(nets, texts, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("blnet.speech.evaluate.measure", lambda *_: pytest.fail("measured"))
    assert "--output" in refused(capsys, nets["ctc"], *on(texts), "--output", tmp_path / "file")
