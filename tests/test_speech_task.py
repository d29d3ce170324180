"""The speech tasks: batches, losses and metrics against hand counts."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blnet.speech.config import (
    AugmentConfig,
    TaskName,
)
from blnet.speech.task import SpeechTask
from blnet.speech.task_frame import FrameTask
from blnet.speech.task_spelling import mean_inside
from blnet.speech.tasks import TASKS, make_target, make_task
from blnet.training.task import Batch
from helpers.tone_runs import FEATURES, MODEL, TEXTS, write_labelled
from helpers.tone_runs import labelled_config as config

NAMES: tuple[TaskName, ...] = ("keyword", "ctc", "frame")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("corpus"))


def prepared(task: SpeechTask, training: bool = False, count: int = 5) -> Batch:
    batch = task.collate([task.eval_data[place] for place in range(count)])
    return task.prepare(batch, training)


def answers(batch: Batch, task: SpeechTask, seed: int = 0) -> Tensor:
    """Return random logits for a batch, padding included."""
    generator = torch.Generator().manual_seed(seed)
    count, classes = task.samples(batch), task.classes
    if task.config.task == "keyword":
        return torch.randn(count, classes, generator=generator)
    return torch.randn(count, int(task.answered(batch).max()), classes, generator=generator)


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_padded_and_becomes_maps(name: TaskName, corpus: Path) -> None:
    task = make_task(config(corpus, name, model=dataclasses.replace(MODEL, time_reduction=2)))
    samples = [task.train_data[place] for place in (0, 2, 1)]  # a, aab, ab
    batch = task.collate(samples)
    assert batch["lengths"].tolist() == [1600, 4800, 3200]
    assert batch["samples"].shape == (3, 4800)
    assert not batch["samples"][0, 1600:].any()
    for row, (recording, _) in zip(batch["samples"], samples, strict=True):
        assert torch.equal(row[: len(recording)], recording)
    if name == "keyword":
        assert [task.data.classes[i] for i in batch["targets"]] == ["a", "aab", "ab"]
    elif name == "ctc":
        assert batch["targets"].tolist() == [[1, 0, 0], [1, 1, 2], [1, 2, 0]]
        assert batch["target_lengths"].tolist() == [1, 3, 2]
    else:
        assert batch["target_lengths"].tolist() == [20, 60, 40]
        assert batch["targets"][0, 20:].unique().tolist() == [-100]
    ready = task.prepare(batch, training=False)
    assert ready["frames"].tolist() == [18, 58, 38]  # windows of 200 samples, every 80
    assert ready["inputs"].shape == (3, 1, 16, 58)
    assert "samples" not in ready
    assert task.answered(ready).tolist() == [9, 29, 19]
    logits = task.forward(task.build_model(), ready)
    assert logits.shape == ((3, 3) if name == "keyword" else (3, 29, 3))
    assert task.loss(logits, ready, training=True).isfinite()


def test_classes_are_words_or_characters_and_the_blank(corpus: Path) -> None:
    assert make_task(config(corpus, "keyword")).classes == len(TEXTS)
    assert make_task(config(corpus, "ctc")).classes == 3
    assert {name: type(make_task(config(corpus, name))) for name in NAMES} == TASKS
    assert make_target(config(corpus, "keyword")) is None


def test_only_training_is_varied(corpus: Path) -> None:
    wild = AugmentConfig(gain=6, noise=1, freq_masks=1, time_masks=1)
    task = make_task(config(corpus, "ctc", augment=wild))
    plain = make_task(config(corpus, "ctc"))
    expected = prepared(plain)["inputs"]
    assert torch.equal(prepared(task)["inputs"], expected)
    assert not torch.equal(prepared(task, training=True)["inputs"], expected)
    assert torch.equal(prepared(plain, training=True)["inputs"], expected)


@pytest.mark.parametrize(
    ("normalize", "mean"), [("none", False), ("utterance", True), ("global", True)]
)
def test_masks_are_0_where_that_is_the_mean(normalize: Any, mean: bool, corpus: Path) -> None:
    masks = AugmentConfig(time_masks=4, time_width=1)
    features = dataclasses.replace(FEATURES, normalize=normalize)
    task = make_task(config(corpus, "ctc", features=features, augment=masks))
    plain = prepared(task)["inputs"]
    torch.manual_seed(0)
    masked = prepared(task, training=True)["inputs"]
    assert (masked != plain).any()
    assert (masked[masked != plain] == 0).all() == mean


def test_batches_hold_recordings_of_like_length(corpus: Path) -> None:
    task = make_task(config(corpus, "ctc"))
    batches = task.batches(2, seed=1, epoch=0)
    assert sorted(place for batch in batches for place in batch) == list(range(6))
    assert all(len({TEXTS[place % 3] for place in batch}) == 1 for batch in batches)


# Losses and metrics -------------------------------------------------------------------------------


def smoothed(logits: Tensor, target: int, share: float) -> float:
    """Return the cross-entropy of one answer against a target that has 1 - share of its weight."""
    logs = [float(value) for value in logits.log_softmax(0)]
    spread = share / len(logs)
    weights = [spread + (1 - share) * (place == target) for place in range(len(logs))]
    return -sum(weight * log for weight, log in zip(weights, logs, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_keywords_loss_by_hand(training: bool, corpus: Path) -> None:
    task = make_task(config(corpus, "keyword", label_smoothing=0.2))
    batch = prepared(task)
    logits = answers(batch, task)
    share = 0.2 if training else 0.0
    rows = zip(logits, batch["targets"].tolist(), strict=True)
    expected = sum(smoothed(row, target, share) for row, target in rows) / 5
    assert float(task.loss(logits, batch, training)) == pytest.approx(expected, rel=1e-5)
    right = sum(int(row.argmax()) == int(t) for row, t in zip(logits, batch["targets"]))  # noqa: B905
    assert task.correct(logits, batch) == right
    metrics = task.metrics()
    task.update(metrics, logits, batch)
    assert float(metrics.compute()["accuracy"]) == pytest.approx(right / 5)


def test_ctc_s_loss_is_that_of_each_recording_alone(corpus: Path) -> None:
    task = make_task(config(corpus, "ctc"))
    batch = prepared(task)
    logits = answers(batch, task)
    losses = []
    for place in range(5):
        frames, length = int(task.answered(batch)[place]), int(batch["target_lengths"][place])
        logs = logits[place, :frames, None].log_softmax(-1)
        target = batch["targets"][place, :length]
        sizes = torch.tensor([frames]), torch.tensor([length])
        losses.append(float(F.ctc_loss(logs, target[None], *sizes, reduction="sum")) / length)
    found = task.loss(logits, batch, training=True)
    assert float(found) == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert task.correct(logits, batch) is None
    assert task.loss(logits.bfloat16(), batch, True).dtype == torch.float32


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_frame_labels_loss_by_hand(reduction: Any, training: bool, corpus: Path) -> None:
    model = dataclasses.replace(MODEL, time_reduction=reduction)
    task = make_task(config(corpus, "frame", label_smoothing=0.2, model=model))
    batch = prepared(task)
    logits = answers(batch, task)
    losses, shares = [], []
    for place in range(5):
        length, given = int(task.answered(batch)[place]), int(batch["target_lengths"][place])
        wanted = [nearest(batch["targets"][place], t, given, length) for t in range(length)]
        frames = zip(logits[place], wanted, strict=False)
        share = 0.2 if training else 0.0
        losses.append(sum(smoothed(row, label, share) for row, label in frames) / length)
        right = sum(
            int(r.argmax()) == label for r, label in zip(logits[place], wanted, strict=False)
        )
        shares.append(right / length)
    assert float(task.loss(logits, batch, training)) == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert float(task.correct(logits, batch)) == pytest.approx(sum(shares), rel=1e-5)


def nearest(labels: Tensor, frame: int, given: int, answered: int) -> int:
    """Return the label in whose share of the recording the middle of a frame lies."""
    middle = Fraction(2 * frame + 1, 2 * answered)
    place = next(n for n in range(given) if Fraction(n, given) <= middle < Fraction(n + 1, given))
    return int(labels[place])


def labelled(task: FrameTask, labels: list[Tensor], frames: list[int], width: int) -> Tensor:
    batch = task._collated(labels)
    batch |= {"inputs": torch.zeros(len(frames), 1, 16, width), "frames": torch.tensor(frames)}
    return task._labels(batch)


def test_at_full_rate_and_its_own_speed_every_frame_has_its_own_label(corpus: Path) -> None:
    task = make_task(config(corpus, "frame"))
    assert isinstance(task, FrameTask)
    labels = [torch.arange(7), torch.arange(4)]
    found = labelled(task, labels, [7, 4], 7)
    assert found.tolist() == [list(range(7)), [0, 1, 2, 3, -100, -100, -100]]
    task.time_reduction = 2
    assert labelled(task, labels, [7, 4], 7).tolist() == [[0, 2, 4, 6], [1, 3, -100, -100]]


@settings(max_examples=30, deadline=None)
@given(given_=st.integers(1, 400), answered=st.integers(1, 400), more=st.integers(0, 5))
def test_at_another_speed_a_frame_has_the_label_at_its_share(
    given_: int, answered: int, more: int
) -> None:
    task = FrameTask.__new__(FrameTask)
    task.time_reduction = 1
    labels = torch.arange(given_)
    (found,) = labelled(task, [labels], [answered], answered + more)
    expected = [nearest(labels, t, given_, answered) for t in range(answered)]
    assert found.tolist() == expected + [-100] * more


def test_labels_of_long_recordings_are_as_exact() -> None:
    task = FrameTask.__new__(FrameTask)
    task.time_reduction = 1
    (found,) = labelled(task, [torch.arange(100_001)], [99_991], 99_991)
    expected = [(2 * t + 1) * 100_001 // (2 * 99_991) for t in range(99_991)]
    assert found.tolist() == expected


def path(text: str, frames: int) -> list[int]:
    """Return the classes of a best path: every letter once and a blank behind it."""
    marks = [mark for letter in text for mark in ("-ab".index(letter), 0)]
    return marks + [0] * (frames - len(marks))


def test_recordings_that_are_all_bad_are_named_before_their_mean_is_taken(
    corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.wav").write_text("no recording")
    row = json.dumps({"audio": str(tmp_path / "bad.wav"), "text": "a"}) + "\n"
    (tmp_path / "bad.jsonl").write_text(row * 3)
    bad = config(corpus, "ctc", features=dataclasses.replace(FEATURES, normalize="global"))
    data = dataclasses.replace(bad.data, path=str(tmp_path / "bad.jsonl"))
    said = r"not one of 3 training recordings can be used, .*bad\.wav among them \(it cannot be dec"
    with pytest.raises(ValueError, match=said):
        make_task(dataclasses.replace(bad, data=data))


@pytest.mark.parametrize("name", ["ctc", "frame"])
def test_error_rates_by_hand(name: TaskName, corpus: Path) -> None:
    task = make_task(config(corpus, name, model=dataclasses.replace(MODEL, time_reduction=1)))
    batch = prepared(task)
    references = ["aab", "ab", "ab", "a", "a"]
    assert task.references(batch) == references
    said = ["ab", "ab", "bb", "a", ""]  # one left out, right, one wrong, right, one left out
    logits = torch.full((5, 58, 3), -5.0)
    for row, text, frames in zip(logits, said, batch["frames"].tolist(), strict=True):
        row[range(frames), path(text, frames)] = 5
        row[frames:, 1] = 5  # padding would say a
    assert task.texts(logits, batch) == said
    metrics = task.metrics()
    task.update(metrics, logits, batch)
    found = metrics.compute()
    assert float(found["wer"]) == pytest.approx(3 / 5)
    assert float(found["cer"]) == pytest.approx(3 / 9)
    assert (task.monitor, task.maximize) == ("wer", False)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_neither_loss_nor_metrics(name: TaskName, corpus: Path) -> None:
    task = make_task(config(corpus, name))
    torch.manual_seed(3)
    model = task.build_model()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.eval()
    samples = [task.eval_data[place] for place in range(5)]
    together = task.collate(samples)
    for row, length in zip(together["samples"], together["lengths"], strict=True):
        row[length:] = 0.5  # rubbish behind the ends
    found = []
    for batches in ([together], [task.collate([sample]) for sample in samples]):
        metrics, losses = task.metrics(), []
        for batch in batches:
            ready = task.prepare(batch, training=False)
            with torch.no_grad():
                logits = task.forward(model, ready)
            losses.append(float(task.loss(logits, ready, training=False)))
            task.update(metrics, logits, ready)
        values = {key: float(value) for key, value in metrics.compute().items()}
        found.append({"loss": sum(losses) / len(losses), **values})
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_distillation_by_hand_and_without_padding(name: TaskName, corpus: Path) -> None:
    task = make_task(config(corpus, name))
    batch = prepared(task)
    own, teacher = answers(batch, task), answers(batch, task, seed=1)
    rows = []
    for place in range(5):
        length = 1 if name == "keyword" else int(task.answered(batch)[place])
        q, p = (
            (logits[place].reshape(-1, task.classes)[:length].double() / 3).softmax(-1)
            for logits in (own, teacher)
        )
        rows.append(float((p * (p / q).log()).sum(-1).mean()))
    expected = 9 * sum(rows) / 5
    found = float(task.distillation_loss(own, teacher, batch, 3.0))
    assert found == pytest.approx(expected, rel=1e-4)
    assert float(task.distillation_loss(own, own, batch, 3.0)) == pytest.approx(0, abs=1e-6)
    if name != "keyword":
        length = int(task.answered(batch)[4])
        own[4, length:], teacher[4, length:] = math.inf, math.nan
        assert float(task.distillation_loss(own, teacher, batch, 3.0)) == found


def test_the_mean_is_over_frames_and_then_over_samples() -> None:
    values = torch.tensor([[1.0, 3.0, math.nan], [6.0, 7.0, 8.0]])
    assert mean_inside(values, torch.tensor([2, 3])) == (2 + 7) / 2


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_ctc_is_deterministic_on_a_cpu_alone(
    device: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    wanted = {"device": device, "deterministic": True}
    make_task(config(corpus, "frame", **wanted))
    make_task(config(corpus, "ctc", device=device))
    if device == "cpu":
        make_task(config(corpus, "ctc", **wanted))
        return
    with pytest.raises(ValueError, match=r"--deterministic: .* CTC's loss on a GPU; leave it out"):
        make_task(config(corpus, "ctc", **wanted))
