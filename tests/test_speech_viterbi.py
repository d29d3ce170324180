"""Beam search by the likeliest path of each text, for networks that hold letters."""

import itertools
import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.speech.decode import LanguageModel, beam, greedy, make_decoder
from blnet.speech.text import Alphabet

WORDS = Alphabet("ab ")
ARPA = r"""
\data\
ngram 1=5

\1-grams:
-0.8 </s>
-99 <s>
-0.2 ab
-1.5 ba
-3.0 <unk>

\end\
"""


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.arpa"
    path.write_text(ARPA)
    return path


def random_output(frames, seed, classes=4):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(frames, classes, generator=generator, dtype=torch.float64)
    return (2 * output).log_softmax(-1)


def held(text, frames=20, doubt=0.1):
    """What a network of frame labels says: each label on many frames, the others a little."""
    labels = [label for c in text for label in [WORDS.classes.get(c, 0)] * frames]
    output = torch.full((len(labels), WORDS.size), doubt / (WORDS.size - 1))
    output[range(len(labels)), labels] = 1 - doubt
    return output.log()


def one(decoder, output):
    (found,) = decoder(output[None], torch.tensor([len(output)]))
    return found


def spelled(hypothesis):
    return "".join(token.character for token in hypothesis.tokens)


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(1, 20), width=st.integers(1, 6), seed=st.integers(0, 9999))
def test_without_a_language_model_it_is_the_greedy_path(frames, width, seed):
    output = random_output(frames, seed)
    lengths = torch.tensor([frames])
    (found,) = beam(output[None], lengths, WORDS, width, viterbi=True)
    (path,) = greedy(output[None], lengths, WORDS)
    assert spelled(found) == spelled(path)
    assert found.score == pytest.approx(path.score, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 5), seed=st.integers(0, 9999), beta=st.sampled_from([-1.0, 2.0]))
def test_words_are_weighed_against_the_best_path(arpa, frames, seed, beta):
    model, output = LanguageModel.load(arpa), random_output(frames, seed)
    best = {}
    for path in itertools.product(range(WORDS.size), repeat=frames):
        score = sum(float(output[place, label]) for place, label in enumerate(path))
        text = WORDS.decode([label for label, _ in itertools.groupby(path) if label])
        best[text] = max(best.get(text, -math.inf), score)
    for text in best:
        words = text.split()
        foreign = sum(word not in model for word in words)
        best[text] += 0.5 * math.log(10) * (model.sentence(words) - 10 * foreign)
        best[text] += beta * len(words)
    lengths = torch.tensor([frames])
    (found,) = beam(output[None], lengths, WORDS, len(best), model, 0.5, beta, viterbi=True)
    assert found.score == pytest.approx(max(best.values()), abs=1e-9)
    assert best[spelled(found)] == pytest.approx(found.score, abs=1e-9)


def test_letters_that_are_held_are_letters_once(monkeypatch, arpa):
    for module in ("kenlm", "pyctcdecode", "torchaudio.models.decoder"):
        monkeypatch.setitem(sys.modules, module, None)
    output = held("ab_ba ab")
    for width in (4, 16):
        found = one(make_decoder("beam", WORDS, width=width, viterbi=True), output)
        assert found.text == "abba ab"
        assert one(make_decoder("beam", WORDS, width=width), output).text != "abba ab"
    with_words = make_decoder("beam", WORDS, arpa, viterbi=True)
    assert one(with_words, held("ab ba ab")).text == "ab ba ab"


def test_a_language_model_decides_where_the_network_is_in_doubt(arpa):
    output = held("ab ab")
    output[-20:] = torch.tensor([0.1, 0.48, 0.37, 0.05]).log()  # a rather than b, held all the same
    assert one(make_decoder("beam", WORDS, width=8, viterbi=True), output).text == "ab a"
    with_words = make_decoder("beam", WORDS, arpa, width=8, alpha=1.0, viterbi=True)
    assert one(with_words, output).text == "ab ab"


def test_other_packages_take_the_best_path_or_are_not_taken(monkeypatch, arpa, tmp_path):
    built = {}
    fake = types.SimpleNamespace(ctc_decoder=lambda **named: built.update(named))
    monkeypatch.setitem(sys.modules, "torchaudio.models.decoder", fake)
    assert make_decoder("beam", WORDS, viterbi=True).title == "beam of 16 (torchaudio)"
    assert built["log_add"] is False
    monkeypatch.setattr(
        "blnet.speech.decode.pyctcdecode_beam", lambda *_: pytest.fail("it adds up paths")
    )
    assert make_decoder("beam", WORDS, arpa, viterbi=True).title.endswith("(1-grams, our own)")
    binary = tmp_path / "model.klm"
    binary.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    with pytest.raises(ValueError, match=r"model.klm is in KenLM's binary format.* the .arpa file"):
        make_decoder("beam", WORDS, binary, viterbi=True)
