"""Small sets of pictures that tell their numbers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blnet.vision.config import DataConfig, DataName


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
