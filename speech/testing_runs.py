"""Tiny corpora of letters as tones, and training on them, also in processes of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from blnet.cli import main
from blnet.speech.testing import RATE, spoken, write


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
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(devices),
        LOCAL_WORLD_SIZE=str(devices), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    train(words)
