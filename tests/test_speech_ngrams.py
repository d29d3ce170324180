"""Language models: what ARPA files say, by hand, and which files are refused."""

import gzip
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.speech.ngrams import LanguageModel
from blnet.speech.text import Alphabet

ARPA = r"""
made by hand

\data\
ngram 1=6
ngram 2=4
ngram  3 = 1

\1-grams:
-1.0	<unk>
-99	<s>	-0.5
-0.8	</s>
-0.6	a	-0.3
-0.9	b	-0.2
-1.1	ab

\2-grams:
-0.2	<s> a	-0.4
-0.7	a b
-0.3	b </s>
-0.4	a ab	-0.1

\3-grams:
-0.1	<s> a b

\end\
anything may follow
"""


def load(tmp_path, text=ARPA, name="model.arpa", **named):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return LanguageModel.load(path, **named)


@pytest.mark.parametrize(
    ("history", "word", "wanted"),
    [
        (["<s>"], "a", -0.2),
        (["<s>", "a"], "b", -0.1),
        (["b", "a"], "b", -0.7),  # "b a" has no weight
        (["<s>", "a"], "ab", -0.4 - 0.4),  # weight of "<s> a", then "a ab"
        (["<s>", "a"], "a", -0.4 - 0.3 - 0.6),
        (["a", "ab"], "b", -0.1 - 0.9),  # "ab" alone has no weight
        ([], "b", -0.9),
        (["zz"], "b", -0.9),
        (["a"], "zz", -0.3 - 1.0),  # unknown
        (["b"], "</s>", -0.3),
        (["b", "b", "<s>", "a"], "b", -0.1),  # only two words are looked at
    ],
)
def test_probabilities_back_off(tmp_path, history, word, wanted):
    model = load(tmp_path)
    assert model.order == 3
    assert model.score(word, tuple(history)) == pytest.approx(wanted)


def test_a_sentence_is_its_words_and_its_end(tmp_path):
    model = load(tmp_path)
    assert model.sentence(["a", "b"]) == pytest.approx(-0.2 - 0.1 - 0.3)
    assert model.sentence([]) == pytest.approx(-0.5 - 0.8)


def test_history_is_as_long_as_it_plays_a_part(tmp_path):
    model = load(tmp_path)
    assert model.after("b", ("<s>", "a")) == ("a", "b")
    assert model.after("a", ("<s>",)) == ("<s>", "a")
    single = load(tmp_path, "\\data\\\nngram 1=1\n\\1-grams:\n-0.5 a\n\\end\\\n")
    assert single.after("a", ("<s>",)) == ()
    assert single.score("a", ("a", "a")) == -0.5
    assert single.score("b", ("a",)) == -100  # it has no <unk>


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.text("abc", min_size=1, max_size=4), max_size=8), probe=st.text("abc"))
def test_beginnings_are_those_of_its_words(words, probe):
    model = LanguageModel({**dict.fromkeys(words, (-1.0, 0.0)), "ab cc": (-1.0, 0.0)}, 2)
    assert model.has_beginning(probe) == any(word.startswith(probe) for word in words)


def test_a_packed_file_is_the_same(tmp_path):
    path = tmp_path / "model.arpa.gz"
    path.write_bytes(gzip.compress(ARPA.encode()))
    assert LanguageModel.load(path).sentence(["a", "b"]) == load(tmp_path).sentence(["a", "b"])


def test_capitals_become_small_if_asked(tmp_path):
    text = ARPA.replace("a", "A").replace("b", "É").replace("dÁta", "data")
    text = text.replace("\\dAtA\\", "\\data\\").replace("ngrAm", "ngram").replace("grAms", "grams")
    text = text.replace("<unk>", "<UNK>")
    assert "A" in load(tmp_path, text)
    assert "a" not in load(tmp_path, text)
    assert load(tmp_path, text).score("zz", ()) == -1.0  # of <UNK>
    spelled = unicodedata.normalize("NFD", text)  # the accent a character of its own
    assert "É" not in load(tmp_path, spelled)
    for written in (text, spelled):
        model = load(tmp_path, written, normalise=Alphabet("aé ").normalise)
        assert model.sentence(["a", "é"]) == pytest.approx(-0.6)
    assert model.score("zz", ()) == -1.0
    curly = load(tmp_path, ARPA.replace("ab", "n\u2019b"), normalise=Alphabet("abn '").normalise)
    assert "n'b" in curly


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\", "data", r"it ends without the line \\end\\"),
        ("ngram 1=6", "ngram 2=6", "line 5: ngram 2=6 where the number of 1-grams was to come"),
        ("ngram 1=6\nngram 2=4\nngram  3 = 1\n", "", "it names no number of 1-grams"),
        ("ngram 2=4", "ngram 2=5", "it has 4 2-grams and promised 5"),
        ("ngram 2=4", "ngram 2=3", "it has 4 2-grams and promised 3"),
        ("\\2-grams:", "\\3-grams:", r"line 17: '\\3-grams:' where \\2-grams: was to come"),
        ("\\end\\", "\\4-grams:", r"'\\4-grams:' where \\end\\ was to come"),
        ("\\3-grams:\n-0.1\t<s> a b\n", "", r"'\\end\\' where \\3-grams: was to come"),
        ("-0.6\ta", "-0.6 a a", "line 13: '-0.6 a a"),
        ("-0.6\ta", "minus\ta", "is no 1-gram, which has the logarithm of a probability, 1 words"),
        ("-0.6\ta\t-0.3", "0.6\ta", "'0.6.ta' is no 1-gram"),
        ("-0.6\ta", "nan\ta", "is no 1-gram"),
        ("-0.6\ta\t-0.3", "-0.6\ta\tinf", "is no 1-gram"),
        ("-0.7\ta b", "-0.7\ta", "'-0.7.ta' is no 2-gram"),
    ],
)
def test_damaged_files_are_told(tmp_path, old, new, message):
    assert old in ARPA
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, ARPA.replace(old, new))
    assert str(caught.value).startswith(f"language model {tmp_path / 'model.arpa'}, line ")
    assert "\n" not in str(caught.value)


def test_every_cut_is_told(tmp_path):
    end = ARPA.index("\\end\\")
    packed = gzip.compress(ARPA.encode())
    path = tmp_path / "model.arpa.gz"
    for length in range(0, end + 4, 5):
        with pytest.raises(ValueError, match="give"):
            load(tmp_path, ARPA[:length])
    for length in range(0, len(packed), 7):
        path.write_bytes(packed[:length])
        with pytest.raises(ValueError, match="give"):
            LanguageModel.load(path)


def test_noise_is_no_language_model(tmp_path):
    path = tmp_path / "model.arpa"
    path.write_bytes(random.Random(0).randbytes(500))
    with pytest.raises(ValueError, match="is not a whole ARPA file"):
        LanguageModel.load(path)
    with pytest.raises(FileNotFoundError, match="does not exist or is no file"):
        LanguageModel.load(tmp_path)
