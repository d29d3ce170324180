"""Alphabets: which texts become which classes, and which are refused."""

import csv
import io
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.speech.config import LETTERS
from blnet.speech.text import Alphabet, required_frames

ENGLISH = Alphabet(LETTERS)


def test_class_0_is_the_blank():
    assert ENGLISH.size == 29
    assert ENGLISH.encode("ab '").tolist() == [1, 2, 27, 28]
    assert ENGLISH.decode([3, 1, 20]) == "cat"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Hello  World", "hello world"),
        ("\tone\n two\u00a0three ", "one two three"),
        ("don\u2019t \u2018em o\u02bcclock rock \uff07n", "don't 'em o'clock rock 'n"),
        ("", ""),
        (" \n", ""),
        ("café", "café"),
        ("cafe\u0301", "caf\u00e9"),
        ("J\u030c", "\u01f0"),  # only the small j has a form with this accent
        ("İ", "i\u0307"),  # its small form is two characters, which no other one stands for
    ],
)
def test_normalise(text, wanted):
    assert ENGLISH.normalise(text) == wanted


def test_capitals_are_kept_if_the_alphabet_has_some():
    shouting = Alphabet("ABC ")
    assert shouting.normalise("Ab C") == "Ab C"
    assert shouting.encode("A C").tolist() == [1, 4, 3]
    with pytest.raises(ValueError, match=r"'b' \(U\+0062\)"):
        shouting.encode("Ab C")


def test_an_apostrophe_of_the_alphabet_stays():
    assert Alphabet("a\u2019").normalise("a\u2019a'") == "a\u2019a'"
    assert Alphabet("a").normalise("a\u2019") == "a\u2019"  # for an error to name what is there
    both = Alphabet("a'\u2019")
    assert both.encode("'\u2019\u02bc").tolist() == [2, 3, 2]


@settings(max_examples=200, deadline=None)
@given(text=st.text(), characters=st.sampled_from([LETTERS, "ABC ", "ab\u2019", "é"]))
def test_normalising_twice_changes_nothing(text, characters):
    once = Alphabet(characters).normalise(text)
    assert Alphabet(characters).normalise(once) == once
    assert once == once.strip()
    assert "  " not in once


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=LETTERS))
def test_a_text_comes_back(text):
    ids = ENGLISH.encode(text)
    assert ids.dtype == torch.int64
    assert ENGLISH.decode(ids.tolist()) == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "named"),
    [("room 101", r"'1' \(U\+0031\)"), ("naïve\u20ac", r"'ï' \(U\+00EF\)"), ("a\0", r"U\+0000")],
)
def test_the_first_foreign_character_is_named(text, named):
    with pytest.raises(ValueError, match=rf"the text has .*{named}.*--data\.alphabet") as caught:
        ENGLISH.encode(text)
    assert "\n" not in str(caught.value)


def test_a_space_may_be_foreign():
    with pytest.raises(ValueError, match=r"' ' \(U\+0020\)"):
        Alphabet("ab").encode("a b")


@pytest.mark.parametrize("ids", [[0], [1, 29], [-1]])
def test_decode_refuses_what_is_no_character(ids):
    with pytest.raises(ValueError, match=f"class {ids[-1]} stands for no character"):
        ENGLISH.decode(ids)


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        ("", "each of them once"),
        ("abca", "each of them once"),
        ("ab\t", r"U\+0009"),
        ("a\u212b", r"U\+212B"),  # the sign for angstrom, which NFC makes a letter
    ],
)
def test_alphabets_that_make_no_sense(characters, message):
    with pytest.raises(ValueError, match=message):
        Alphabet(characters)


def test_an_alphabet_compares_and_travels():
    assert Alphabet("ab") == Alphabet("ab") != Alphabet("ba")
    ENGLISH.encode("a")  # fills its caches
    assert pickle.loads(pickle.dumps(ENGLISH)) == ENGLISH


@pytest.mark.parametrize(
    ("text", "frames"), [("", 0), ("a", 1), ("ab", 2), ("aa", 3), ("aaa", 5), ("hello all", 11)]
)
def test_required_frames(text, frames):
    assert required_frames(ENGLISH.encode(text)) == frames
    log_probs = torch.randn(max(frames, 1), 1, 29, dtype=torch.float64).log_softmax(-1)
    for length, possible in ((frames, True), (frames - 1, False)):
        if length < 1:
            continue
        loss = torch.nn.functional.ctc_loss(
            log_probs, ENGLISH.encode(text)[None], [length], [len(text)], reduction="sum"
        )
        assert bool(loss.isfinite()) == possible


def test_real_transcripts_are_written_with_the_default_alphabet(shared):
    path = shared("so762_flac_480_160.zip")
    with zipfile.ZipFile(path) as archive:
        lines = io.StringIO(archive.read("train.tsv").decode())
    texts = [row["text"] for row in csv.DictReader(lines, delimiter="\t")]
    assert len(texts) == 480
    for text in texts:
        ids = ENGLISH.encode(text)
        assert ENGLISH.decode(ids.tolist()).upper() == text
        assert required_frames(ids) >= len(ids) > 0
