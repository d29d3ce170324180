"""``blnet transcribe``: exact texts and times across windows, any file, bounded memory."""

import contextlib
import gc
import gzip
import io
import json
import random
import tracemalloc
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.cli import main
from blnet.speech import transcribe as transcribing
from blnet.speech.audio import AudioError
from blnet.speech.decode import make_decoder
from blnet.speech.inference import load_trained
from blnet.speech.transcribe import SearchStream, transcribe
from helpers import tones
from helpers.recordings import bad_recordings, odd_recordings

TEXT = tones.random_text(7, 60)  # 40 seconds
FRAME = 0.011  # seconds


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return tones.save(tmp_path_factory.mktemp("net") / "net.safetensors", "ctc")


@pytest.fixture(scope="module")
def trained(net):
    return load_trained(net)


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Make a recording of `TEXT`."""
    return tones.write(tmp_path_factory.mktemp("talk") / "talk.wav", tones.spoken(TEXT))


def run(net, *words):
    return main(["transcribe", *map(str, words), "--checkpoint", str(net)])


def refused(capsys, net, *words):
    """Return the last line of what the command is refused with."""
    assert run(net, *words) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "Traceback" not in found.err
    line = found.err.splitlines()[-1]
    assert line.startswith("blnet transcribe: error: ")
    return line.removeprefix("blnet transcribe: error: ")


def check(words, text, tolerance=1.5 * FRAME):
    """Check the words of a spoken text and their times."""
    expected = tones.times(text)
    assert [word.word for word in words] == [word for word, _, _ in expected]
    for found, (_, start, end) in zip(words, expected, strict=True):
        assert found.start == pytest.approx(start, abs=tolerance)
        assert found.end == pytest.approx(end, abs=tolerance)
        assert 0.5 < found.score <= 1


def beam(width=4):
    return make_decoder("beam", tones.ALPHABET, width=width)


# Texts and times ---------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(window=st.floats(1.2, 30), share=st.floats(0.2, 0.6))
def test_windows_change_neither_words_nor_times(trained, talk, window, share):
    check(list(transcribe(trained, str(talk), None, window, max(0.5, share * window))), TEXT)


@pytest.mark.parametrize("reduction", [1, 2])
def test_frames_are_those_of_one_window_in_any_network(tmp_path, monkeypatch, reduction):
    model = tones.untrained("ctc", time_reduction=reduction)
    found = load_trained(tones.save(tmp_path / "net.safetensors", "ctc", model))
    samples = np.random.RandomState(1).standard_normal(4 * tones.RATE + 37) / 9
    tones.write(tmp_path / "noise.wav", samples, subtype="FLOAT")
    seen = []
    monkeypatch.setattr(
        transcribing.WordStream, "push", lambda _, frames: seen.append(frames) or []
    )
    list(transcribe(found, str(tmp_path / "noise.wav"), None, 60, 0))
    (whole,) = seen
    seen.clear()
    list(transcribe(found, str(tmp_path / "noise.wav"), None, 2.5, 1.5))
    assert len(seen) > 2
    torch.testing.assert_close(torch.cat(seen), whole, rtol=1e-3, atol=1e-3)


def test_a_beam_finds_the_same_from_pause_to_pause(trained, tmp_path):
    """A pause of a second stands in it, and after that half a minute and more without any."""
    texts = (tones.random_text(1, 4), tones.random_text(2, 60))
    assert len(texts[1]) * (tones.TONE + tones.GAP) > 35
    pause = np.zeros(tones.RATE)
    samples = np.concatenate([tones.spoken(texts[0]), pause, tones.spoken(texts[1])])
    tones.write(tmp_path / "two.wav", samples)
    words = list(transcribe(trained, str(tmp_path / "two.wav"), beam(), 6, 2))
    later = len(texts[0]) * (tones.TONE + tones.GAP) + 1
    expected = tones.times(texts[0]) + [
        (word, start + later, end + later) for word, start, end in tones.times(texts[1])
    ]
    assert [word.word for word in words] == [word for word, _, _ in expected]
    for found, (_, start, end) in zip(words, expected, strict=True):
        assert (found.start, found.end) == pytest.approx((start, end), abs=2 * FRAME)


@pytest.mark.parametrize("seed", range(3))
def test_a_search_is_cut_where_nothing_is_said(trained, seed):
    """Whatever parts the frames come in, each search sees a stretch that ends in a pause."""
    draw = random.Random(seed)
    labels = []
    for _ in range(12):
        labels += [draw.randrange(1, 4)] * draw.randrange(1, 5) + [0] * draw.choice((3, 20, 70))
    frames = torch.full((len(labels), 5), -9.0)
    frames[range(len(labels)), labels] = 0
    searched = []

    def search(log_probs, lengths):
        searched.append(log_probs[0])
        assert lengths.tolist() == [len(log_probs[0])]
        return make_decoder("greedy", tones.ALPHABET)(log_probs, lengths)

    stream = SearchStream(trained, search)
    place = 0
    while place < len(labels):
        size = draw.randrange(1, 60)
        stream.push(frames[place : place + size])
        place += size
    stream.finish()
    assert torch.cat(searched).equal(frames)
    pauses = sum(part.count("0") >= 50 for part in "".join(map(str, labels)).translate(
        str.maketrans("123", "111")).split("1"))  # fmt: skip
    assert pauses <= len(searched) <= pauses + 1
    for part in searched[:-1]:
        assert (part[-25:].argmax(-1) == 0).all()


@pytest.mark.parametrize(
    ("cell", "border"), [([1, 0, 2, 4], 4), ([1, 1, 0], 0), ([4] + [3] * 9999, None)]
)
def test_a_search_without_pauses_is_cut_at_a_space_or_a_blank(trained, cell, border):
    labels = (cell * 10_000)[:10_000]  # 100 seconds
    frames = torch.full((len(labels), 5), -9.0)
    frames[range(len(labels)), labels] = 0
    searched = []

    def search(log_probs, _):
        searched.append(log_probs[0])
        return make_decoder("greedy", tones.ALPHABET)(log_probs, torch.tensor([len(log_probs[0])]))

    stream = SearchStream(trained, search)
    for part in frames.split(700):
        stream.push(part)
    assert len(searched) == 3
    stream.finish()
    assert torch.cat(searched).equal(frames)
    assert all(2990 <= len(part) <= 3000 for part in searched[:-1])
    if border is not None:
        assert {int(part[0].argmax()) for part in searched[1:]} == {border}


def test_a_word_is_told_as_soon_as_it_has_ended(trained, talk):
    heard = []
    words = transcribe(trained, str(talk), None, 4, 1, heard.append)
    next(words)
    assert heard == []
    list(words)
    assert heard[0] == pytest.approx(4)
    assert heard == sorted(heard)
    assert heard[-1] == soundfile.info(talk).duration


@pytest.mark.parametrize("reduction", [1, 4])
@pytest.mark.parametrize("count", [1, 50, 199, 200, 201, 281, 1000, 9000])
def test_no_time_is_beyond_the_end(tmp_path, count, reduction):
    model = tones.untrained("ctc", time_reduction=reduction)
    torch.nn.init.constant_(model.fc.bias[1:2], 99)  # an a, all the time
    found = load_trained(tones.save(tmp_path / "net.safetensors", "ctc", model))
    file = tones.write(tmp_path / "some.wav", tones.spoken("a" * 6)[:count])
    for decoder in (None, beam()):
        (word,) = transcribe(found, str(file), decoder, 1, 0.2)
        assert 0 <= word.start <= word.end <= count / tones.RATE + 0.0005
        assert word.end > count / tones.RATE - 0.05


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_windows_that_hardly_overlap_overlap_as_far_as_the_network_needs(tmp_path, reduction):
    model = tones.untrained("ctc", time_reduction=reduction)
    found = load_trained(tones.save(tmp_path / "net.safetensors", "ctc", model))
    file = tones.write(tmp_path / "some.wav", tones.spoken("ab" * 10))
    for window, overlap in ((1, 0), (0.5, 0.01)):
        told = []
        list(transcribe(found, str(file), None, window, overlap, told.append))
        assert len(told) >= 4 / window
        assert told[-1] == 4.0


# Output ----------------------------------------------------------------------------------------


def test_text_of_one_and_of_several(net, talk, tmp_path, capsys):
    assert run(net, talk, "--window", 8, "--overlap", 2) == 0
    found = capsys.readouterr()
    assert found.out == f"{TEXT}\n"
    assert found.err == (
        "blnet transcribe: bl_resnet22 (alpha 2, beta 2, width 0.125), "
        "decoder: greedy (the likeliest path)\n"
    )
    other = tones.write(tmp_path / "b.flac", tones.spoken("ab c"))
    assert run(net, talk, other) == 0
    assert capsys.readouterr().out == f"{talk}: {TEXT}\n{other}: ab c\n"
    assert run(net, tmp_path / "gone.wav", other) == 1
    assert capsys.readouterr().out == f"{other}: ab c\n", "the only one left is still named"


def test_json_holds_every_words_time(net, talk, tmp_path, capsys):
    silent = tones.write(tmp_path / "silent.wav", np.zeros(tones.RATE))
    assert run(net, talk, silent, "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [list(row) for row in rows] == [["file", "seconds", "text", "words"]] * 2
    assert rows[0]["file"] == str(talk)
    assert rows[0]["seconds"] == pytest.approx(len(TEXT) * 0.2)
    assert rows[0]["text"] == TEXT
    words = rows[0]["words"]
    assert [list(word) for word in words] == [["word", "start", "end", "score"]] * 60
    check([transcribing.SpokenWord(**word) for word in words], TEXT)
    borders = [time for word in words for time in (word["start"], word["end"])]
    assert borders == sorted(borders)
    assert borders[-1] <= rows[0]["seconds"]
    assert rows[1] == {"file": str(silent), "seconds": 1.0, "text": "", "words": []}


def test_folders_and_members_of_archives(net, tmp_path, capsys):
    folder = tmp_path / "talks"
    (folder / "deep").mkdir(parents=True)
    tones.write(folder / "b.wav", tones.spoken("b"))
    tones.write(folder / "deep" / "a.flac", tones.spoken("a"))
    (folder / "notes.txt").write_text("no recording")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(folder / "b.wav", "in/b.wav")
    assert run(net, folder, f"{tmp_path}/all.zip::in/b.wav") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["b", "a", "b"]
    (tmp_path / "nothing").mkdir()
    assert run(net, folder, tmp_path / "nothing") == 1
    assert "nothing is a folder without recordings" in capsys.readouterr().err


def test_a_bar_shows_how_far_it_is(net, talk, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert run(net, talk, "--window", 4, "--overlap", 1) == 0
    found = capsys.readouterr()
    assert found.out == f"{TEXT}\n"
    assert "%" in found.err


# Decoders ----------------------------------------------------------------------------------------


def test_the_decoder_is_said_aloud(net, talk, capsys):
    assert make_decoder("auto", tones.ALPHABET).is_greedy
    assert not beam().is_greedy
    for flags, said in (
        (("--decoder", "greedy"), "decoder: greedy (the likeliest path)"),
        (("--beam-width", 4), "decoder: beam of 4 ("),
        (("--decoder", "beam"), "decoder: beam of 16 ("),
    ):
        assert run(net, talk, *flags) == 0
        found = capsys.readouterr()
        assert said in found.err
        assert found.out == f"{TEXT}\n"


def test_a_network_of_frame_labels_is_searched_by_its_best_path(tmp_path, capsys):
    """It holds each letter for many frames, at any of which a sum over paths would cut it."""
    model = tones.untrained("frame")
    model.load_state_dict(tones.trained("frame").state_dict())
    for parameter in model.fc.parameters():
        parameter.data *= 0.4  # larger networks on real speech are not as sure as this one
    frame = tones.save(tmp_path / "frame.safetensors", "frame", model)
    file = tones.write(tmp_path / "some.wav", tones.spoken("ab abc ab"))
    assert run(frame, file, "--beam-width", 4) == 0
    assert capsys.readouterr().out == "ab abc ab\n"


ARPA = r"""\data\
ngram 1=5

\1-grams:
-1.0 <s>
-1.0 </s>
-0.2 abc
-3.0 ab
-4.0 <unk>

\end\
"""


@pytest.mark.parametrize("packed", [False, True])
def test_a_language_model_decides_between_likely_words(tmp_path, capsys, packed):
    """The network says "ab" with a "c" that is a little less likely than silence."""
    model = tones.untrained("ctc")
    model.load_state_dict(tones.trained("ctc").state_dict())
    net = tones.save(tmp_path / "net.safetensors", "ctc", model)
    faint = tones.spoken("abc")
    faint[2 * round(0.2 * tones.RATE) :] *= 0.0
    file = tones.write(tmp_path / "faint.wav", faint, subtype="FLOAT")
    path = tmp_path / ("words.arpa.gz" if packed else "words.arpa")
    path.write_bytes(gzip.compress(ARPA.encode()) if packed else ARPA.encode())
    assert run(net, file, "--beam-width", 32) == 0
    assert capsys.readouterr().out == "ab\n"
    assert run(net, file, "--beam-width", 32, "--language-model", path, "--lm-weight", 30) == 0
    found = capsys.readouterr()
    assert found.out == "abc\n"
    assert f"decoder: beam of 32 with language model {path}" in found.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--decoder", "greedy", "--beam-width", 4), "--decoder greedy takes no language model"),
        (("--language-model", "none.arpa"), "none.arpa"),
        (("--window", 4, "--overlap", 4), "windows of 4 s cannot overlap by 4 s"),
        (("--window", -1), "'-1' is not a number of seconds up to 3600"),
        (("--overlap", "nan"), "'nan' is not a number of seconds"),
        (("--beam-width", 0), "'0' is not a whole number of at least 1"),
    ],
)
def test_flags_that_make_no_sense(net, talk, capsys, flags, said):
    with contextlib.suppress(SystemExit):  # of argparse
        assert run(net, talk, *flags) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert said in found.err
    assert len(found.err.splitlines()) == 1


# Files of every kind ----------------------------------------------------------------------------


def test_recordings_of_every_kind_say_the_same(net, tmp_path, capsys):
    files = odd_recordings(tmp_path, tones.spoken("abc ba"))
    assert run(net, *files) == 0
    assert capsys.readouterr().out == "".join(f"{file}: abc ba\n" for file in files)


@pytest.mark.parametrize(
    ("count", "decoder", "most"),
    # Over 900 frames of silence the chances of a letter in one of them add up for a beam.
    [(9 * tones.RATE, "greedy", 0), (9 * tones.RATE, "beam", 1), (1, "greedy", 1), (1, "beam", 1)],
)
def test_silence_and_a_single_sample(net, tmp_path, capsys, count, decoder, most):
    file = tones.write(tmp_path / "silent.wav", np.zeros(count))
    assert run(net, file, "--decoder", decoder) == 0
    assert len(capsys.readouterr().out) <= most + 1


def test_what_cannot_be_read_is_named(net, tmp_path, capsys):
    good = tones.write(tmp_path / "good.wav", tones.spoken("ab"))
    bad = bad_recordings(tmp_path)
    assert run(net, *bad, good) == 1
    found = capsys.readouterr()
    assert found.out == f"{good}: ab\n"
    lines = found.err.splitlines()[1:]
    for line, (file, said) in zip(lines, bad.items(), strict=True):
        assert line.startswith(f"blnet transcribe: {file} cannot be read: ")
        assert said in line
    last = refused(capsys, net, *bad)
    assert last.startswith("not one recording could be read; name recordings (WAV, FLAC,")


def test_a_file_that_breaks_off_in_the_middle_gives_no_text(net, tmp_path, capsys):
    buffer = io.BytesIO()
    soundfile.write(buffer, tones.spoken(TEXT), tones.RATE, format="FLAC")
    (tmp_path / "half.flac").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(AudioError):
        list(transcribe(load_trained(net), str(tmp_path / "half.flac"), None, 4, 1))
    refused(capsys, net, tmp_path / "half.flac", "--output", tmp_path / "out.txt")
    assert not (tmp_path / "out.txt").exists()


def test_the_output_is_whole_or_untouched(net, talk, tmp_path, capsys):
    out = tmp_path / "out.json"
    out.write_text("before")
    (bad, *_) = bad_recordings(tmp_path)
    refused(capsys, net, bad, "--output", out)
    assert out.read_text() == "before"
    assert run(net, talk, bad, "--output", out, "--format", "json") == 1
    assert capsys.readouterr().out == ""
    assert json.loads(out.read_text())[0]["text"] == TEXT
    assert "none" in refused(capsys, net, talk, "--output", tmp_path / "none" / "out.txt")
    assert not list(tmp_path.glob(".blnet*"))


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("searches", [False, True])
def test_memory_does_not_grow_with_the_length(trained, tmp_path, searches):
    def most(minutes):
        """Return the most bytes of tensors, and of all else, that are held at a window's end."""
        file = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(file, "w", tones.RATE, 1) as out:
            for _ in range(minutes):
                out.write(tones.spoken(TEXT[:280]))  # 56 seconds
                out.write(np.zeros(4 * tones.RATE))
        tensors = []

        def look(_):
            found = [one for one in gc.get_objects() if type(one) is torch.Tensor]
            tensors.append(
                sum({t.data_ptr(): t.untyped_storage().nbytes() for t in found}.values())
            )

        gc.collect()
        gc.freeze()  # what is there already is not looked through
        tracemalloc.start()
        for _ in transcribe(trained, str(file), beam(2) if searches else None, 6, 2, look):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.unfreeze()
        return max(tensors), peak

    most(1)  # what is made once
    (few, little), (many, much) = most(2), most(6)
    # The log probabilities of four minutes more are 480 kB, their samples 8 MB.
    assert many - few < 200_000
    assert much - little < 2_000_000
