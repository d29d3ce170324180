"""Tiny corpora of letters as tones, and training on them, also in processes of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from blnet.cli import main
from blnet.speech.alignment import FrameLabels
from blnet.speech.config import DataConfig, FeatureConfig, ModelConfig, SpeechConfig, TaskName
from blnet.speech.text import Alphabet
from helpers.processes import become
from helpers.tones import RATE, spoken, write

TEXTS = ("a", "ab", "aab")
AB = Alphabet("ab")
FEATURES = FeatureConfig(bins=16)
MODEL = ModelConfig(width=0.125)


def write_corpus(folder: Path, texts: Sequence[str], count: int, name: str) -> Path:
    """Write recordings of some texts in turn, and return their manifest.

    Args:
        folder: where to, which exists.
        texts: what is said; each text is a class too.
        count: recordings.
        name: of the manifest, without its ending; recordings are named after it: train-0.wav.
    """
    rows = []
    for number in range(count):
        text = texts[number % len(texts)]
        file = write(folder / f"{name}-{number}.wav", spoken(text))
        rows.append({"audio": file.name, "text": text, "label": text})
    manifest = folder / f"{name}.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def write_labelled(folder: Path) -> Path:
    """Write recordings of `TEXTS`, manifests train.jsonl and eval.jsonl and labels of all frames.

    Args:
        folder: where to, which exists and is returned.
    """
    entries = []
    for name, count in (("train", 6), ("eval", 5)):
        write_corpus(folder, TEXTS, count, name)
        for number in range(count):
            text = TEXTS[number % len(TEXTS)]
            # A letter is 10 frames of sound, 10 ms each, and 10 of silence.
            labels = torch.tensor([label for c in text for label in [AB.classes[c], 0]])
            entries.append((str(folder / f"{name}-{number}.wav"), labels.repeat_interleave(10)))
    FrameLabels.of(entries, AB, 0.01, "by hand").save(folder / "labels")
    return folder


def labelled_config(folder: Path, task: TaskName, **changes: Any) -> SpeechConfig:
    """Return the configuration of a tiny network for what `write_labelled` wrote.

    Args:
        folder: of the recordings.
        task: keyword, ctc or frame.
        changes: fields that are to be otherwise; data: a mapping of more of its fields.
    """
    data = DataConfig(
        "manifest", str(folder / "train.jsonl"), str(folder / "eval.jsonl"), sample_rate=RATE,
        alphabet="ab", labels=str(folder / "labels"), **changes.pop("data", {}),
    )  # fmt: skip
    return SpeechConfig(**{"task": task, "model": MODEL, "data": data, "features": FEATURES,
                           "channels_last": False, **changes})  # fmt: skip


def tiny_flags(folder: Path, task: str, *flags: str) -> list[str]:
    """Return the words of a command that trains a tiny network on the corpus of a folder.

    Args:
        folder: of the manifests train.jsonl and eval.jsonl.
        task: keyword, ctc or frame.
        flags: what is to be otherwise.
    """
    return [
        "train", "speech", "--recipe=keyword", f"--task={task}", "--baseline=false",
        "--data.name=manifest", f"--data.path={folder / 'train.jsonl'}",
        f"--data.eval-path={folder / 'eval.jsonl'}", f"--data.sample-rate={RATE}",
        "--data.alphabet=ab", "--features.bins=16", "--features.normalize=utterance",
        "--model.width=0.125",
        "--model.time-reduction=null", "--augment.shift=0", "--batch-size=8", "--device=cpu",
        "--workers=0", "--tensorboard=false", *flags,
    ]  # fmt: skip


def train(words: Sequence[str]) -> None:
    """Run `blnet` with one thread and exit with its status; for a process of its own."""
    torch.set_num_threads(1)
    sys.exit(main(words))


def train_together(rank: int, devices: int, port: int, words: Sequence[str]) -> None:
    """Do as `train`, as one of several processes."""
    become(rank, devices, port)
    train(words)
