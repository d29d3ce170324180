"""Speech synthesis and the embedded corpus: voices, the same bytes again, and the cache."""

import functools
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from blnet.speech import grammar, spoken, synth
from blnet.speech.audio import read_audio
from blnet.speech.config import LETTERS, DataConfig
from blnet.speech.data import load_data
from blnet.speech.features import LogMel
from blnet.speech.manifest import read_manifest
from blnet.speech.spoken import PARTS, Recipe, voices_of_parts, write_corpus
from blnet.speech.synthesis import Synthesizer, languages, variants
from blnet.speech.task_ctc import Spelling
from blnet.speech.text import Alphabet
from blnet.speech.train import COMMAND

pytest.importorskip("espeakng_loader")
WORDS = Recipe("words", 30, 20, 16000, 0)
SENTENCES = Recipe("sentences", 12, 6, 8000, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give an empty folder for corpora, which every test here writes to."""
    monkeypatch.setenv("BLNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@functools.cache
def synthesizer():
    return Synthesizer()


def synthesize(*arguments, **named):
    one = synthesizer()
    return one.speak(*arguments, **named), one.sample_rate


def seconds(*arguments, **named):
    samples, rate = synthesize(*arguments, **named)
    return len(samples) / rate


def pitch_of(samples, rate):
    """Return the frequency of the strongest repetition between 60 and 400 Hz."""
    spectrum = np.abs(np.fft.rfft(samples, 1 << 18)) ** 2
    repetition = np.fft.irfft(spectrum)
    low, high = rate // 400, rate // 60
    return rate / (low + np.argmax(repetition[low:high]))


# Synthesis ---------------------------------------------------------------------------------------


def test_a_text_is_spoken():
    samples, rate = synthesize("seven green birds")
    assert (samples.dtype, samples.ndim, rate) == (np.float32, 1, 22050)
    assert 0.7 < len(samples) / rate < 2
    assert 0.2 < np.abs(samples).max() <= 1


def test_rate_and_pitch_and_voice_count():
    text = "every morning the old house"
    assert seconds(text, rate=100) > 1.4 * seconds(text, rate=200)
    low, high = (pitch_of(*synthesize(text, pitch=pitch)) for pitch in (10, 90))
    assert high > 1.3 * low
    one, two = (synthesize(text, voice)[0] for voice in ("en-us", "en-us+f2"))
    assert pitch_of(two, 22050) > 1.2 * pitch_of(one, 22050)
    accents = {
        synthesize("bath", voice)[0].tobytes() for voice in ("en-us", "en", "en-gb-scotland")
    }
    assert len(accents) == 3


def test_every_new_synthesizer_says_the_same_in_the_same_order():
    order = [("one", "en-us"), ("two", "en-gb-scotland+f2"), ("three", "en-us+whisper")]
    first, second = ([s.speak(*one).tobytes() for one in order] for s in map(_new, range(2)))
    assert first == second


def _new(_):
    return Synthesizer()


def test_voices_are_known():
    assert {"en-us", "en", "en-gb-scotland", "en-029", "de"} <= set(languages())
    assert {"f2", "m3", "klatt4", "whisper"} <= set(variants())
    used = {voice for part in voices_of_parts(0) for voice in part}
    assert {voice.split("+")[0] for voice in used} <= set(languages())
    assert {voice.split("+")[1] for voice in used} <= set(variants())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a", "xx"), "voice 'xx' is unknown; its language"),
        (("a", "en-us+nobody"), "its variant"),
        (("a", "en-us", 20), "rate must be from 80 to 450"),
        (("a", "en-us", 100, 100), "pitch must be from 0 to 99"),
    ],
)
def test_what_cannot_be_said_is_refused(arguments, words):
    with pytest.raises(ValueError, match=r"\S") as error:
        synthesize(*arguments)
    assert words in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install 'blnet\[speech\]'"):
        Synthesizer()


# The grammar -------------------------------------------------------------------------------------


def test_sentences_are_of_about_a_hundred_words_of_the_alphabet():
    known = grammar.vocabulary()
    assert 80 <= len(known) <= 130
    found = grammar.sentences(2000, np.random.RandomState(0))
    assert {word for sentence in found for word in sentence.split()} == known
    assert set("".join(found)) <= set(LETTERS)
    assert len(set(found)) > 1900


def test_sentences_fit_the_frames_that_their_recipe_gives_them(tmp_path):
    """CTC needs a frame a character at least: whoever speaks too fast cannot be trained on."""
    config, _ = COMMAND.parse(["--task", "ctc"])
    made = Recipe("sentences", 150, 50, config.data.sample_rate, 0)
    write_corpus(made, tmp_path / "made.zip")
    spelling = Spelling(
        Alphabet(config.data.alphabet),
        LogMel(config.features, config.data.sample_rate),
        config.augment.speed,
        config.model.time_reduction,
    )
    for part in PARTS:
        for one in read_manifest(f"{tmp_path}/made.zip::{part}.jsonl"):
            assert len(spelling(one)) == len(one.text)


def test_sentences_avoid_others():
    held = grammar.sentences(50, np.random.RandomState(1))
    assert held[0] in grammar.sentences(50, np.random.RandomState(1))
    rest = grammar.sentences(50, np.random.RandomState(1), other_than=frozenset(held))
    assert len(rest) == 50
    assert not set(rest) & set(held)


# The corpus --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [WORDS, SENTENCES])
def test_the_same_recipe_gives_the_same_bytes(tmp_path, recipe):
    from dataclasses import replace

    for name in ("a", "b"):
        write_corpus(recipe, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_corpus(replace(recipe, seed=1), tmp_path / "c")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_the_evaluation_does_not_depend_on_how_much_is_trained_on(tmp_path):
    contents = []
    for train in (3, 10):
        path = tmp_path / str(train)
        write_corpus(Recipe("sentences", train, 4, 8000, 0), path)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.startswith("evaluation")]
            contents.append([archive.read(name) for name in names])
    assert contents[0] == contents[1]


def test_keywords_are_short_loud_and_by_other_voices(cache):
    data = load_data(DataConfig(train_items=60, eval_items=20), "keyword")
    assert data.classes == ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
    assert (len(data.train), len(data.evaluation)) == (60, 20)
    assert np.bincount([int(target) for _, target in data.train]).tolist() == [6] * 10
    for samples, target in (*data.train, *data.evaluation):
        assert 0.15 < len(samples) / 16000 < 1.3
        assert abs(samples.abs().max() - 0.9) < 1e-3
        assert 0 <= target < 10
    trained, held = (
        {one.speaker.split("+")[1] for one in part.utterances}
        for part in (data.train, data.evaluation)
    )
    assert not trained & held
    assert "synth (60 training and 20 test recordings" in data.name


def test_all_voices_are_in_one_part_only():
    for seed in range(5):
        held, kept = ({voice.split("+")[1] for voice in part} for part in voices_of_parts(seed))
        assert not held & kept
        assert held | kept == set(spoken._VARIANTS)
        assert len(held) > 8
    assert voices_of_parts(0) != voices_of_parts(1)


def test_sentences_come_with_transcripts_that_were_not_trained_on():
    config = DataConfig(train_items=40, eval_items=20, sample_rate=8000)
    data = load_data(config, "ctc", lambda one: torch.tensor([LETTERS.index(c) for c in one.text]))
    samples, target = data.train[0]
    assert len(target) == len(data.train.utterances[0].text)
    assert len(samples) == round(8000 * data.train.seconds[0])
    assert 0.8 < data.train.seconds.min() < data.train.seconds.max() < 6
    trained, held = (
        {one.text for one in part.utterances} for part in (data.train, data.evaluation)
    )
    assert not trained & held
    assert data.classes == ()


def test_no_sentence_is_in_both_parts_even_of_a_poor_grammar(monkeypatch):
    monkeypatch.setattr(grammar, "_PATTERNS", ("{number} {colour}",))
    held, kept = spoken._texts(Recipe("sentences", 300, 30, 8000, 0))
    assert (len(held), len(kept)) == (30, 300)
    assert not set(held) & set(kept)


# The cache ---------------------------------------------------------------------------------------


def made(monkeypatch):
    """Return a list that grows by one whenever a corpus is made."""
    calls, write = [], synth.write_corpus
    monkeypatch.setattr(synth, "write_corpus", lambda *a: (calls.append(a), write(*a)))
    return calls


def test_a_corpus_is_made_once(cache, monkeypatch):
    calls = made(monkeypatch)
    path = synth.corpus_archive(SENTENCES)
    assert path == synth.corpus_archive(SENTENCES)
    assert (len(calls), path.parent, [path]) == (1, cache, list(cache.iterdir()))
    assert synth.corpus_archive(WORDS) != path
    monkeypatch.setattr(synth, "_espeak_version", lambda: "9.9")
    assert synth.corpus_archive(SENTENCES) != path
    assert len(calls) == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:5000] + b"x" + b[5001:]])
def test_a_damaged_corpus_is_made_anew(monkeypatch, damage):
    path = synth.corpus_archive(SENTENCES)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert synth.corpus_archive(SENTENCES) == path
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said_and_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLNET_CACHE", str(tmp_path / "file" / "cache"))
    calls = made(monkeypatch)
    recipe = Recipe("words", 4, 4, 8000, 5)
    with pytest.warns(UserWarning, match="BLNET_CACHE") as told:
        path = synth.corpus_archive(recipe)
    assert "\n" not in str(told[0].message)
    assert len(read_audio(f"{path}::train/000000.flac", 8000))
    assert synth.corpus_archive(recipe) == path
    assert len(calls) == 1


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("BLNET_CACHE", "/a")
    assert synth.cache_folder() == Path("/a")
    monkeypatch.delenv("BLNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert synth.cache_folder() == Path("/b/blnet")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert synth.cache_folder() == Path(os.path.expanduser("~"), ".cache", "blnet")


@pytest.mark.parametrize("text", ["", " \n", "one\0two"])
def test_what_is_no_text_is_not_said(text) -> None:
    with pytest.raises(ValueError, match=r"cannot say .*; give it words"):
        synthesize(text)
