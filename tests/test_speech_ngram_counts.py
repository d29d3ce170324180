"""Language models made of texts: probabilities by hand, sums of 1, and what is written."""

from __future__ import annotations

import itertools
import math
import shlex
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.cli import main
from blnet.speech.ngram_counts import count_ngrams
from blnet.speech.ngrams import END, START, UNKNOWN, LanguageModel
from helpers import tones

TEXTS = ("a b", "a a b", "", "b")


def probability(model: LanguageModel, word: str, *history: str) -> float:
    return 10 ** model.score(word, history)


def test_probabilities_are_those_of_the_formula_by_hand() -> None:
    model = count_ngrams(TEXTS, 2)
    # 9 words and ends follow something, a, b and an end 3 times each. With the unknown there are
    # four, of which each is as probable before anything is counted.
    single = dict.fromkeys(("a", "b", END), (3 + Fraction(3, 4)) / (9 + 3))
    single[UNKNOWN] = Fraction(3, 4) / (9 + 3)
    for word, wanted in single.items():
        assert probability(model, word) == pytest.approx(float(wanted))
    # After a: a once, b twice. After <s>: a twice, b once. After b: an end three times.
    assert probability(model, "b", "a") == pytest.approx(float((2 + 2 * single["b"]) / 5))
    assert probability(model, "a", "a") == pytest.approx(float((1 + 2 * single["a"]) / 5))
    assert probability(model, END, "a") == pytest.approx(float(2 * single[END] / 5))
    assert probability(model, "zz", "a") == pytest.approx(float(2 * single[UNKNOWN] / 5))
    assert probability(model, "a", START) == pytest.approx(float((2 + 2 * single["a"]) / 5))
    assert probability(model, END, START) == pytest.approx(float(2 * single[END] / 5))
    assert probability(model, END, "b") == pytest.approx(float((3 + 1 * single[END]) / 4))


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from("abc"), max_size=5).map(" ".join), max_size=6),
    order=st.integers(1, 4),
)
def test_they_add_up_to_one_after_anything(texts: list[str], order: int) -> None:
    texts = [*texts, "a"]
    model = count_ngrams(texts, order)
    assert model.order == order
    words = sorted({*" ".join(texts).split(), END, UNKNOWN})
    for length in range(order + 1):
        for history in itertools.product([START, *"abz"], repeat=length):
            total = math.fsum(probability(model, word, *history) for word in words)
            assert total == pytest.approx(1)


def test_what_was_said_is_likelier_than_what_was_not() -> None:
    model = count_ngrams(["the big dog runs"] * 3 + ["the old cat sleeps"], 3)
    likely = model.sentence(["the", "big", "dog", "runs"])
    assert likely > model.sentence(["the", "old", "dog", "runs"])
    assert likely > model.sentence(["big", "the", "dog", "runs"]) > -20
    assert probability(model, START, "the") < 1e-90  # a sentence does not begin inside one


@pytest.mark.parametrize("name", ["model.arpa", "model.arpa.gz"])
def test_a_written_model_is_read_again(tmp_path: Path, name: str) -> None:
    model = count_ngrams([*TEXTS, "ä 'b"], 3)
    model.save(tmp_path / name)
    again = LanguageModel.load(tmp_path / name)
    assert again.order == 3
    for length in range(3):
        for history in itertools.product([START, "a", "b", "ä"], repeat=length):
            for word in ("a", "b", "ä", "'b", "zz", END):
                assert again.score(word, history) == pytest.approx(
                    model.score(word, history), abs=1e-6
                )
    head = (tmp_path / name).read_bytes()[:6]
    assert (head == b"\\data\\") == (name == "model.arpa")


def test_a_model_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.arpa"
    path.write_text("old")
    monkeypatch.setattr(LanguageModel, "_line", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="is as it was before"):
        count_ngrams(TEXTS, 2).save(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("texts", "order", "message"),
    [
        (TEXTS, 0, "the order of a language model must be 1 to 6, got 0"),
        (TEXTS, 7, "the order of a language model must be 1 to 6, got 7"),
        ((), 2, "a language model needs words, and the texts have none"),
        ((" ", ""), 2, "a language model needs words, and the texts have none"),
        (("a <s> b",), 2, "a text has the word '<s>', a mark of language models"),
    ],
)
def test_what_makes_no_model_is_refused(texts: tuple[str, ...], order: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_ngrams(texts, order)


# The command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tones.save(tmp_path_factory.mktemp("net") / "ctc.safetensors", "ctc")


def run(*arguments: object) -> int:
    return main(["ngrams", *map(str, arguments)])


def test_texts_become_a_model(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, more, out = tmp_path / "text", tmp_path / "more", tmp_path / "abc.arpa"
    text.write_text("Abc cab\n\nabc, CAB!\n", encoding="utf-8-sig")
    more.write_text("bca")
    assert run(net, "--text", text, more, "--order", 2, "--output", out) == 0
    said = capsys.readouterr()
    assert said.out == (
        f"blnet ngrams: wrote 2-grams of 3 sentences; try them: blnet evaluate speech {net} "
        f"--language-model {out}\n"
    )
    assert said.err == (
        "warning: 2 characters, ',' (U+002C) most of all, are not in the alphabet 'abc ' and were "
        "taken for spaces\n"
    )
    model = LanguageModel.load(out)
    assert model.order == 2
    assert model.sentence(["abc", "cab"]) == pytest.approx(
        count_ngrams(["abc cab"] * 2 + ["bca"], 2).sentence(["abc", "cab"]), abs=1e-6
    )


def test_transcripts_of_the_training_recordings_are_the_default(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("train", "abc ab"), ("eval", "cba")):
        tones.write(tmp_path / f"{name}.wav", tones.spoken(text))
        (tmp_path / f"{name}.tsv").write_text(f"audio\ttext\n{name}.wav\t{text}\n")
    out = tmp_path / "abc.arpa"
    flags = ("--data-path", tmp_path / "train.tsv", "--eval-path", tmp_path / "eval.tsv")
    assert run(net, *flags, "--output", out) == 0
    advised = shlex.split(capsys.readouterr().out.partition("try them: ")[2])
    model = LanguageModel.load(out)
    assert model.order == 3
    assert "abc" in model
    assert "cba" not in model
    assert advised == ["blnet", "evaluate", "speech", str(net), *map(str, flags),
                       "--language-model", str(out)]  # fmt: skip
    assert main(advised[1:]) == 0


@pytest.mark.parametrize("kind", ["manifest", "folder"])
def test_only_the_training_part_need_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    for name, text in (("train", "abc"), ("eval", "cba")):
        word = tmp_path / name / text
        word.mkdir(parents=True)
        tones.write(word / "one.wav", tones.spoken(text))
        (tmp_path / f"{name}.tsv").write_text(f"audio\ttext\n{name}/{text}/one.wav\t{text}\n")
    ending = ".tsv" if kind == "manifest" else ""
    data = {
        "name": kind, "sample_rate": tones.RATE, "alphabet": tones.ALPHABET.characters,
        "path": "gone", "eval_path": str(tmp_path / f"eval{ending}"),
    }  # fmt: skip
    net = tones.save(tmp_path / "net.safetensors", "ctc", data=data)
    out = tmp_path / "abc.arpa"
    moved = tmp_path / f"train{ending}"
    assert run(net, "--data-path", moved, "--output", out) == 0
    advised = shlex.split(capsys.readouterr().out.partition("try them: ")[2])
    model = LanguageModel.load(out)
    assert "abc" in model
    assert "cba" not in model
    # The evaluation finds its part where it was, which the training part's place does not say.
    assert advised == ["blnet", "evaluate", "speech", str(net), "--language-model", str(out)]
    assert main(advised[1:]) == 0
    (tmp_path / f"eval{ending}").rename(tmp_path / "elsewhere")
    assert run(net, "--data-path", moved, "--output", out, "--overwrite") == 0
    assert "abc" in LanguageModel.load(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--order", "9"), "the order of a language model must be 1 to 6, got 9"),
        (("--text", "missing.txt"), "missing.txt cannot be read: No such file or directory"),
        (("--text", "empty.txt"), "a language model needs words, and the texts have none"),
        (("--text", "noise.txt"), "noise.txt is not UTF-8 text"),
        (("--text", "text.txt", "--output", "none/x.arpa"), "none/x.arpa cannot be written"),
        (("--text", "text.txt", "--output", "text.txt"), "text.txt is read by this command; name"),
        (("--text", "text.txt", "--output", "./link", "--overwrite"), "./link is read by this"),
        (("--text", "text.txt", "--output", "empty.txt"), "empty.txt exists already; add --overw"),
        (("--text", "text.txt", "--data", "yesno"), "--text takes the place of transcripts"),
        ((), "--data.path"),
    ],
)
def test_what_cannot_be_counted_is_one_sentence(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("abc")
    Path("empty.txt").touch()
    Path("link").symlink_to("text.txt")
    Path("noise.txt").write_bytes(b"\xff\xfe\x00")
    given = (*(("--text", "text.txt") if arguments[:1] == ("--order",) else ()), *arguments)
    assert run(net, "--output", "out.arpa", *given) == 2
    said = capsys.readouterr()
    assert said.err.startswith("blnet ngrams: error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.glob("*.arpa"))
    assert Path("text.txt").read_text() == "abc"


def test_a_model_is_replaced_where_that_is_asked_for(net: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out.arpa"
    text.write_text("abc")
    out.write_text("another")
    assert run(net, "--text", text, "--output", out, "--overwrite") == 0
    assert "abc" in LanguageModel.load(out)


def test_a_network_that_cannot_use_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = tones.save(tmp_path / "keyword.safetensors", "keyword")
    assert run(net, "--output", tmp_path / "x.arpa") == 2
    assert "was trained for --task keyword" in capsys.readouterr().err
