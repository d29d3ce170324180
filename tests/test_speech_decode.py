"""Decoding: greedy, our beam search against brute force, those of other packages, error rates."""

import itertools
import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blnet.speech.decode import LanguageModel, Token, beam, error_rates, greedy, make_decoder
from blnet.speech.text import Alphabet

ABC = Alphabet("abc ")
WORDS = Alphabet("ab ")
ARPA = r"""
\data\
ngram 1=6
ngram 2=4
ngram 3=1

\1-grams:
-1.0 <unk>
-99 <s> -0.5
-0.8 </s>
-0.6 a -0.3
-0.9 b -0.2
-1.1 ab

\2-grams:
-0.2 <s> a -0.4
-0.7 a b
-0.3 b </s>
-0.4 a ab -0.1

\3-grams:
-0.1 <s> a b

\end\
"""


@pytest.fixture
def arpa(tmp_path):
    path = tmp_path / "model.arpa"
    path.write_text(ARPA)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.arpa"
    path.write_text(ARPA)
    return LanguageModel.load(path)


@pytest.fixture
def nothing_else(monkeypatch):
    """Let no other package's decoder be installed."""
    for module in ("kenlm", "pyctcdecode", "torchaudio.models.decoder"):
        monkeypatch.setitem(sys.modules, module, None)


def random_output(frames, seed, classes, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(frames, classes, generator=generator, dtype=torch.float64)
    return (output * sharpness).log_softmax(-1)


def all_texts(output):
    """Every labelling of (T, classes) with the logarithm of its probability: the sum over paths."""
    paths = np.array(list(itertools.product(range(output.shape[1]), repeat=len(output))), int)
    scores = np.zeros(len(paths))
    for frame, labels in zip(output.numpy(), paths.T, strict=True):
        scores += frame[labels]
    totals = {}
    for path, score in zip(paths.tolist(), scores, strict=True):
        text = tuple(label for label, _ in itertools.groupby(path) if label)
        totals[text] = np.logaddexp(totals.get(text, -np.inf), score)
    return totals


def one(decoder, output, alphabet, *settings, **named):
    (found,) = decoder(output[None], torch.tensor([len(output)]), alphabet, *settings, **named)
    return found


def spelled(hypothesis):
    return "".join(token.character for token in hypothesis.tokens)


# greedy -------------------------------------------------------------------------------------------


def test_greedy_collapses_the_likeliest_path():
    best = [4, 1, 1, 0, 1, 4, 4, 0, 4, 2, 3, 3, 4]
    probabilities = [0.5, 0.6, 0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9]
    output = torch.full((13, 5), 0.01)
    output[range(13), best] = torch.tensor(probabilities)
    found = one(greedy, output.log(), ABC)
    assert found.text == "aa bc"
    assert spelled(found) == " aa  bc "
    assert found.score == pytest.approx(np.log(probabilities).sum(), rel=1e-6)
    assert found.tokens[1] == Token("a", 1, 3, pytest.approx(0.9))
    first, second = found.words
    assert (first.text, first.start_frame, first.end_frame) == ("aa", 1, 5)
    assert (second.text, second.start_frame, second.end_frame) == ("bc", 9, 12)
    assert first.score == pytest.approx((0.9 + 0.7) / 2)


@pytest.mark.parametrize("decoder", [greedy, beam])
def test_padding_plays_no_part(decoder):
    output = torch.stack([random_output(9, seed, 5) for seed in range(4)])
    lengths = torch.tensor([9, 4, 0, 1])
    together = decoder(output, lengths, ABC)
    for place, length in enumerate(lengths.tolist()):
        assert together[place] == one(decoder, output[place, :length], ABC)
    assert together[2].text == ""
    assert together[2].score == 0
    assert decoder(output[:0], lengths[:0], ABC) == []


@pytest.mark.parametrize("decoder", [greedy, beam])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_kind_of_number_will_do(decoder, dtype):
    output = random_output(12, 0, 5, sharpness=30)
    found = one(decoder, output.to(dtype).requires_grad_(), ABC)
    assert found.text == one(decoder, output, ABC).text


@pytest.mark.parametrize("decoder", [greedy, beam])
def test_what_does_not_fit_is_told(decoder):
    output, lengths = torch.zeros(2, 6, 5), torch.tensor([6, 6])
    for wrong in (torch.tensor([6]), torch.tensor([6, 7]), torch.tensor([-1, 6])):
        with pytest.raises(ValueError, match=r"lengths .* do not fit .*\(2, 6, 5\)"):
            decoder(output, wrong, ABC)
    with pytest.raises(ValueError, match="the network has 5 classes and the alphabet 4"):
        decoder(output, lengths, WORDS)
    with pytest.raises(ValueError, match=r"must be \(N, T, classes\), got shape \(6, 5\)"):
        decoder(output[0], lengths, ABC)
    output[1, 3] = torch.nan
    with pytest.raises(ValueError, match="hold NaN"):
        decoder(output, lengths, ABC)


# beam ---------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(frames=st.integers(1, 6), classes=st.integers(2, 4), seed=st.integers(0, 9999))
def test_a_wide_beam_finds_the_likeliest_text(frames, classes, seed):
    output = random_output(frames, seed, classes)
    totals = all_texts(output)
    best = max(totals, key=totals.get)
    alphabet = Alphabet("abc"[: classes - 1])
    found = one(beam, output, alphabet, width=len(totals))
    assert spelled(found) == alphabet.decode(best)
    assert found.score == pytest.approx(totals[best], abs=1e-9)
    loss = torch.nn.functional.ctc_loss(
        output[:, None], torch.tensor([best]).long(), [frames], [len(best)], reduction="sum"
    )
    assert -found.score == pytest.approx(float(loss), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 8), seed=st.integers(0, 9999))
def test_a_narrow_beam_counts_no_path_twice(width, seed):
    output = random_output(6, seed, 4)
    found = one(beam, output, Alphabet("abc"), width=width)
    text = tuple(Alphabet("abc").encode(spelled(found)).tolist())
    assert found.score <= all_texts(output)[text] + 1e-9


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(1, 6), seed=st.integers(0, 9999), beta=st.sampled_from([-1.0, 0.0, 2.0]))
def test_a_wide_beam_weighs_words_as_the_formula_says(model, frames, seed, beta):
    output = random_output(frames, seed, 4)
    totals = {WORDS.decode(text): total for text, total in all_texts(output).items()}
    for text in totals:
        words = text.split()
        foreign = sum(word not in model for word in words)
        logarithm = model.sentence(words) - 10 * foreign
        totals[text] += 0.5 * math.log(10) * logarithm + beta * len(words)
    found = one(beam, output, WORDS, len(totals), model, alpha=0.5, beta=beta)
    assert found.score == pytest.approx(max(totals.values()), abs=1e-9)
    assert totals[spelled(found)] == pytest.approx(found.score, abs=1e-9)


def plain_search(output, width, model, alpha, beta):
    """Prefix beam search as the papers write it, text by text: the best one's score."""

    def bonus(text, spaced=False):
        words = (text + " " * spaced).split(" ")
        whole, last = [word for word in words[:-1] if word], words[-1]
        history, total = ("<s>",), 0.0
        for word in whole:
            score = model.score(word, history) - 10 * (word not in model)
            total, history = total + alpha * math.log(10) * score + beta, model.after(word, history)
        lost = bool(last) and not model.has_beginning(last)
        return total, total - 10 * alpha * math.log(10) * lost, history

    kept = {"": (0.0, -np.inf)}  # text -> log probability of its paths with a blank last, without
    for frame in output.numpy():
        after, ranks = {}, {}
        for text, (blank, label) in kept.items():
            both, last = np.logaddexp(blank, label), WORDS.classes[text[-1]] if text else 0
            found = [(text, both + frame[0], label + frame[last] if text else -np.inf)]
            for place, character in enumerate(WORDS.characters, start=1):
                before = blank if place == last else both
                found.append((text + character, -np.inf, before + frame[place]))
            for longer, *scores in found:
                after[longer] = tuple(np.logaddexp(after.get(longer, (-np.inf, -np.inf)), scores))
                closed = bonus(text, spaced=True)[0] if longer == text + " " else bonus(text)[1]
                ranks[longer] = bonus(longer)[1] if longer in kept else closed
        ranks = {text: np.logaddexp(*after[text]) + ranks[text] for text in after}
        kept = {text: after[text] for text in sorted(ranks, key=ranks.get)[-width:]}
    ends = []
    for text, scores in kept.items():
        total, _, history = bonus(text, spaced=True)
        ends.append(
            np.logaddexp(*scores) + total + alpha * math.log(10) * model.score("</s>", history)
        )
    return max(ends)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 12),
    width=st.integers(1, 6),
    seed=st.integers(0, 9999),
    weights=st.sampled_from([(0.5, 1.0), (0.0, 0.0)]),
)
@example(frames=12, width=4, seed=231, weights=(0.0, 0.0))  # a text leaves the beam and returns
@example(frames=12, width=4, seed=399, weights=(0.0, 0.0))
def test_a_narrow_beam_prunes_as_the_papers_do(model, frames, width, seed, weights):
    output = random_output(frames, seed, 4)
    found = one(beam, output, WORDS, width, model, *weights)
    assert found.score == pytest.approx(plain_search(output, width, model, *weights), abs=1e-9)


def test_the_best_path_may_be_another_text():
    # Graves' example: blank is likeliest in both frames, "a" is likelier on the whole.
    output = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    assert one(greedy, output, Alphabet("a")).text == ""
    found = one(beam, output, Alphabet("a"), width=2)
    assert found.text == "a"
    assert math.exp(found.score) == pytest.approx(0.64)
    assert found.tokens[0].end - found.tokens[0].start == 1


def test_frames_are_those_of_the_likeliest_path():
    output = random_output(30, 5, 5, sharpness=30)
    found, path = one(beam, output, ABC), one(greedy, output, ABC)
    assert spelled(found) == spelled(path)  # hardly a doubt, so the same
    assert [(t.start, t.end) for t in found.tokens] == [(t.start, t.end) for t in path.tokens]


def test_impossible_characters_are_no_obstacle():
    output = torch.full((3, 4), -torch.inf)
    output[[0, 1, 2], [1, 0, 1]] = 0
    found = one(beam, output, WORDS)
    assert (found.text, found.score) == ("aa", 0)
    output[:] = -torch.inf
    found = one(beam, output, WORDS, 1)
    assert (found.text, found.score) == ("", -math.inf)


def test_a_beam_needs_a_width_and_words_a_space(model):
    with pytest.raises(ValueError, match="width of a beam must be 1 or more, got 0"):
        one(beam, torch.zeros(1, 4), WORDS, width=0)
    with pytest.raises(ValueError, match="needs an alphabet with a space, and 'ab' has none"):
        one(beam, torch.zeros(1, 3), Alphabet("ab"), language_model=model)


# Decoders by name ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "title"),
    [
        ("auto", None, "greedy (the likeliest path)"),
        ("greedy", None, "greedy (the likeliest path)"),
        ("auto", 4, "beam of 4 (our own)"),
        ("beam", None, "beam of 16 (our own)"),
    ],
)
@pytest.mark.usefixtures("nothing_else")
def test_a_decoder_says_which_it_is(name, width, title):
    decoder = make_decoder(name, ABC, width=width)
    assert decoder.title == title
    output = random_output(8, 0, 5)
    expected = (
        one(greedy, output, ABC) if "greedy" in title else one(beam, output, ABC, width or 16)
    )
    assert decoder(output[None], torch.tensor([8])) == [expected]


@pytest.mark.parametrize("name", ["auto", "beam"])
@pytest.mark.usefixtures("nothing_else")
def test_our_own_beam_reads_a_language_model(arpa, model, name):
    decoder = make_decoder(name, WORDS, arpa, width=3, alpha=0.7, beta=0.1)
    assert decoder.title == f"beam of 3 with language model {arpa} (3-grams, our own)"
    output = random_output(8, 1, 4)
    assert decoder(output[None], torch.tensor([8])) == [
        one(beam, output, WORDS, 3, model, 0.7, 0.1)
    ]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"name": "best"}, "--decoder 'best' is unknown; choose one of auto, greedy, beam"),
        ({"name": "greedy", "width": 4}, "--decoder greedy takes no language model and no beam"),
        ({"name": "greedy", "language_model": "x"}, "--decoder greedy takes no language model"),
        ({"name": "beam", "width": 0}, "--beam-width must be 1 or more, got 0"),
    ],
)
def test_settings_that_contradict_each_other_are_told(named, message):
    with pytest.raises(ValueError, match=message):
        make_decoder(alphabet=ABC, **named)


@pytest.mark.usefixtures("nothing_else")
def test_a_binary_model_needs_kenlm(tmp_path):
    path = tmp_path / "model.klm"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(99))
    with pytest.raises(ValueError, match=r"binary format, .* kenlm and pyctcdecode; install"):
        make_decoder("auto", WORDS, path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.arpa does not exist"):
        make_decoder("auto", WORDS, tmp_path / "nowhere.arpa")


@pytest.fixture
def fake_kenlm(monkeypatch):
    """Stand-ins for pyctcdecode and kenlm that note how they are used; return the notes."""
    notes = {"vocabulary": set(), "text": "a b"}

    class Model:
        def __init__(self, path):
            if "broken" in path:
                raise OSError("Cannot read\n model")

        def __contains__(self, word):
            return word in notes["vocabulary"]

    class Search:
        def decode_beams(self, output, beam_width):
            notes["asked"] = output, beam_width
            return [(notes["text"], None, [], -1.5, -2.5), ("b", None, [], -9.0, -9.0)]

    def build(labels, kenlm_model_path, alpha, beta):
        notes["built"] = labels, kenlm_model_path, alpha, beta
        return Search()

    monkeypatch.setitem(sys.modules, "kenlm", types.SimpleNamespace(Model=Model))
    fake = types.SimpleNamespace(build_ctcdecoder=build)
    monkeypatch.setitem(sys.modules, "pyctcdecode", fake)
    return notes


def test_pyctcdecode_is_taken_where_it_is(arpa, fake_kenlm):
    decoder = make_decoder("auto", WORDS, arpa, width=5, alpha=0.3, beta=0.2)
    assert decoder.title == f"beam of 5 with language model {arpa} (pyctcdecode)"
    assert fake_kenlm["built"] == (["", "a", "b", " "], str(arpa), 0.3, 0.2)
    output = random_output(7, 3, 4)
    found, empty = decoder(torch.stack([output, output]), torch.tensor([5, 0]))
    assert (found.text, found.score) == ("a b", -2.5)
    assert [word.text for word in found.words] == ["a", "b"]
    assert found.words[-1].end_frame <= 5
    asked, width = fake_kenlm["asked"]
    assert (asked.shape, asked.dtype, width) == ((5, 4), np.float32, 5)
    assert (empty.text, empty.score) == ("", 0)


def test_a_model_in_capitals_meets_small_letters(arpa, fake_kenlm):
    fake_kenlm.update(vocabulary={"A", "AB"}, text="AB")
    decoder = make_decoder("auto", WORDS, arpa)
    assert fake_kenlm["built"][0] == ["", "A", "B", " "]
    assert decoder(torch.zeros(1, 4, 4), torch.tensor([4]))[0].text == "ab"
    fake_kenlm["vocabulary"].add("a")
    make_decoder("auto", WORDS, arpa)
    assert fake_kenlm["built"][0] == ["", "a", "b", " "]


@pytest.mark.usefixtures("fake_kenlm")
def test_a_model_that_kenlm_refuses_is_told(tmp_path):
    path = tmp_path / "broken.arpa"
    path.write_text(ARPA)
    with pytest.raises(ValueError, match=r"cannot be read by KenLM \(Cannot read model\)"):
        make_decoder("auto", WORDS, path)


def test_torchaudio_is_taken_where_flashlight_is(monkeypatch):
    built = {}

    def ctc_decoder(**named):
        built.update(named)
        best = types.SimpleNamespace(tokens=torch.tensor([3, 1, 3, 2, 3]), score=-4.0)
        return lambda output: [[best]]

    fake = types.SimpleNamespace(ctc_decoder=ctc_decoder)
    monkeypatch.setitem(sys.modules, "torchaudio.models.decoder", fake)
    decoder = make_decoder("beam", WORDS, width=9)
    assert decoder.title == "beam of 9 (torchaudio)"
    assert built["tokens"] == ["<blank>", "a", "b", " "]
    assert (built["beam_size"], built["lexicon"], built["log_add"]) == (9, None, True)
    assert (built["blank_token"], built["sil_token"]) == ("<blank>", " ")
    (found,) = decoder(random_output(6, 0, 4)[None], torch.tensor([6]))
    assert (found.text, found.score) == ("a b", -4.0)
    make_decoder("beam", Alphabet("ab"))
    assert built["sil_token"] == "<blank>"


# Error rates --------------------------------------------------------------------------------------


def test_error_rates_count_words_and_characters():
    metrics = error_rates()
    metrics.update(["the cat"], ["the cat"])
    metrics.update(["a mad hat", ""], ["a mat", "two words"])
    found = metrics.compute()
    assert set(found) == {"wer", "cer"}
    assert all(value.ndim == 0 for value in found.values())
    assert float(found["wer"]) == pytest.approx((0 + 2 + 2) / (2 + 2 + 2))
    assert float(found["cer"]) == pytest.approx((0 + 4 + 9) / (7 + 5 + 9))


def test_words_and_characters_keep_counts_of_their_own():
    metrics = error_rates()
    metrics.update(["a"], ["a"])  # both count no error in one
    metrics.update(["abc"], ["abd"])
    found = metrics.compute()
    assert (float(found["wer"]), float(found["cer"])) == (0.5, 0.25)


def test_nothing_said_and_nothing_found():
    metrics = error_rates()
    metrics.update([], [])
    metrics.update([""], [""])
    assert all(math.isnan(value) for value in metrics.compute().values())
    metrics.update(["oh no"], [""])
    metrics.update([""], ["well"])
    assert float(metrics.compute()["wer"]) == 3
