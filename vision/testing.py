"""Small sets of pictures that tell their numbers, and a tiny network for the digits."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from blnet.network import BigLittleConfig, BigLittleNet
from blnet.vision.config import DataConfig, DataName
from blnet.vision.data import load_data
from blnet.vision.preprocessing import Preprocessing

GREY = Preprocessing(8, 1.0, 1, (0.3,), (0.4,))
DIGITS = list("0123456789")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return a picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def red(number: int) -> Image.Image:
    """Return a picture that tells its number by its red."""
    return Image.new("RGB", (24, 20), (number, 50, 100))


def archive_of(
    path: Path,
    labels: Sequence[int],
    classes: Sequence[str] = ("a", "b"),
    changes: dict[str, Any] | None = None,
    split: Any = None,
) -> str:
    """Write an archive in which the red of each picture tells its number.

    Args:
        path: where to.
        labels: one for each picture.
        classes: their names.
        changes: arrays to write in place of the right ones; None leaves one out.
        split: the array of that name; None for an archive without it.

    Returns:
        The path.
    """
    files = [encoded(red(number)) for number in range(len(labels))]
    arrays = {
        "blob": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array(labels, np.int16),
        "names": np.array([f"n{number}.png" for number in range(len(labels))], dtype=np.str_),
        "classes": np.array(classes),
        "split": split,
        **(changes or {}),
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def folder_of(root: Path, **classes: Iterable[int]) -> Path:
    """Make class folders of PNGs whose red tells their number."""
    for name, found in classes.items():
        (root / name).mkdir(parents=True)
        for number in found:
            (root / name / f"{number:03}.png").write_bytes(encoded(red(number)))
    return root


def small(path: str | Path, name: DataName = "npz", **options: Any) -> DataConfig:
    """Return the settings of a set of small images."""
    return DataConfig(name=name, path=str(path), size=16, **options)


def network(seed: int = 0, **changes: Any) -> BigLittleNet:
    """Return a tiny untrained network whose answers vary over the digits."""
    settings: dict[str, Any] = {
        "block": "basic", "depths": (2, 2), "widths": (8, 16), "stem": "small", "stem_width": 8,
        "in_channels": 1, "num_classes": 10,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = BigLittleNet(BigLittleConfig(**{**settings, **changes})).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            module.momentum = 1.0  # the batch's statistics as they are
    images: Any = load_data(DataConfig(), parts="evaluation").evaluation
    batch = GREY.normalize(torch.stack([images[i][0] for i in range(40)]))
    with torch.no_grad():
        model(batch)
        model.fc.bias -= model.eval()(batch).mean(0)  # no class is everybody's favourite
    return model.eval()


def header(**changes: Any) -> dict[str, Any]:
    """Return what training on the digits puts into a checkpoint; None removes an entry."""
    found = {
        "task": "vision",
        "network": {"name": "bl_resnet18", "options": {"alpha": 2, "beta": 4, "width": 0.5}},
        "classes": DIGITS,
        "preprocessing": GREY.as_dict(),
        "data": {"name": "digits", "holdout": 0.2, "split_seed": 0},
    }
    return {k: v for k, v in {**found, **changes}.items() if v is not None}
