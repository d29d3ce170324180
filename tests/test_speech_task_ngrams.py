"""`--ngrams`: evaluations that are decoded with n-grams of the training transcripts as well."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from blnet.speech.config import DataConfig, FeatureConfig, ModelConfig, SpeechConfig, TaskName
from blnet.speech.task_spelling import SpellingTask
from blnet.speech.tasks import make_task
from helpers.tone_runs import write_corpus
from helpers.tones import RATE


@pytest.fixture(scope="module")
def phrases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recordings of one and of two words, and their manifests."""
    folder = tmp_path_factory.mktemp("phrases")
    for name in ("train", "eval"):
        write_corpus(folder, ("ab ab", "ab"), 4, name)
    return folder


def make(folder: Path, ngrams: int, alphabet: str = "ab ") -> SpellingTask:
    data = DataConfig(
        "manifest", str(folder / "train.jsonl"), str(folder / "eval.jsonl"), sample_rate=RATE,
        alphabet=alphabet,
    )  # fmt: skip
    config = SpeechConfig(
        task="ctc", model=ModelConfig(width=0.125), data=data, features=FeatureConfig(bins=16),
        ngrams=ngrams, channels_last=False,
    )  # fmt: skip
    return cast("SpellingTask", make_task(config))


def test_both_ways_of_decoding_are_counted(phrases: Path) -> None:
    task = make(phrases, 2)
    batch = task.collate([task.eval_data[place] for place in range(2)])  # the longest first
    batch = task.prepare(batch, training=False)
    assert task.references(batch) == ["ab ab", "ab ab"]
    frames = int(task.answered(batch).max())
    logits = torch.full((2, frames, task.classes), -9.0)
    logits[..., 0] = 0.0
    # "ab aa" and "ab b" by a hair, in place of "ab ab": words that the training does not have.
    for place, path in enumerate(([1, 2, 3, 1, 1], [1, 2, 3, 3, 2])):
        for step, label in enumerate(path):
            logits[place, 2 * step] = -9.0
            logits[place, 2 * step, label] = 0.0
    logits[0, 8, 2] = -0.1
    logits[1, 6, 1] = -0.1
    assert task.texts(logits, batch) == ["ab aa", "ab b"]
    assert task.searched(logits, batch) == ["ab ab", "ab ab"]
    metrics = task.metrics()
    task.update(metrics, logits, batch)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found == {
        "wer": 2 / 4, "cer": pytest.approx(2 / 10), "ngram_wer": 0, "ngram_cer": 0,
    }  # fmt: skip


def test_without_ngrams_nothing_is_searched(phrases: Path) -> None:
    task = make(phrases, 0)
    assert task.language_model is None
    assert set(task.metrics().keys()) == {"wer", "cer"}


def test_the_model_is_of_the_training_transcripts(phrases: Path) -> None:
    model = make(phrases, 2).language_model
    assert model is not None
    assert model.order == 2
    # Every sentence begins with it, and half go on with it.
    assert model.score("ab", ("ab",)) < model.score("ab", ("<s>",)) < 0


def test_an_alphabet_without_a_space_has_no_words(tmp_path: Path) -> None:
    for name in ("train", "eval"):
        write_corpus(tmp_path, ("ab", "b"), 2, name)
    with pytest.raises(ValueError, match=r"alphabet with a space, and 'ab' has none; .*--ngrams 0"):
        make(tmp_path, 1, alphabet="ab")


@pytest.mark.parametrize(("task", "ngrams"), [("ctc", -1), ("frame", 7)])
def test_ngrams_out_of_range_are_refused(task: TaskName, ngrams: int) -> None:
    with pytest.raises(ValueError, match=f"--ngrams must be from 0 to 6, got {ngrams}"):
        SpeechConfig(task=task, ngrams=ngrams).check()
