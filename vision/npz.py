"""Encoded pictures in one NumPy archive: arrays blob, offsets, labels, names, classes, split."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blnet.files import reason
from blnet.vision.config import DataConfig
from blnet.vision.sources import Integers, Part, Parts, decode
from blnet.vision.splits import hold_out

_INTEGERS = "bBhHiIlLqQ"
# Array -> (NumPy's letters for the dtypes it may have, what it is).
_ARRAYS = {
    "blob": ("B", "the files' bytes, one after the other, uint8"),
    "offsets": (_INTEGERS, "where each file begins in blob, and the end of the last"),
    "labels": (_INTEGERS, "the class of each"),
    "names": ("U", "the name of each"),
    "classes": ("U", "the classes' names"),
    "split": (_INTEGERS, "0 for each image to train on, 1 for each to evaluate on"),
}


class Archive:
    """A source of pictures that lie encoded in memory; each is decoded when it is asked for.

    Args:
        path: the .npz file.
        flag: the setting that named it, for errors.

    Attributes:
        labels: the class of each picture, int64 (n,).
        classes: name of each class.
        split: 0 to train, 1 to evaluate, (n,); None if the archive says nothing of it.

    Raises:
        ValueError: if it is no such archive; nothing in it is unpickled.
    """

    def __init__(self, path: str | Path, flag: str = "--data.path") -> None:
        self.path = str(path)
        arrays = _read_arrays(Path(path), f"{flag} {path}")
        _check(arrays, f"{flag} {path}")
        self.blob: NDArray[np.uint8] = arrays["blob"]
        self.offsets: Integers = arrays["offsets"].astype(np.int64)
        self.labels: Integers = arrays["labels"].astype(np.int64)
        self.names: NDArray[np.str_] = arrays["names"]
        self.classes = tuple(map(str, arrays["classes"]))
        self.split: NDArray[Any] | None = arrays.get("split")

    @functools.cached_property
    def _has_names(self) -> bool:
        return len(np.unique(self.names)) == len(self.names)

    def name(self, index: int) -> str:
        """Return the archive and the entry, with its number where others have its name."""
        number = "" if self._has_names else f" ({index})"
        return f"{self.path}/{self.names[index]}{number}"

    def open(self, index: int) -> Image.Image:
        """Return a picture, not yet decoded."""
        return decode(self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes())


def load_archive(data: DataConfig, evaluation_only: bool) -> Parts:
    """Return the parts of an archive, or of two: `data.path` and `data.eval_path`.

    One archive is split as its array split says, and a share of each class is held out where it
    has none or all of it is 0. Of two, the first gives the images of split 0, the second those of
    split 1, or all where it has no such split.

    Raises:
        ValueError: if a file is missing or not such an archive, the classes of two differ, or a
            class has no image to train on.
    """
    if data.path is None and (data.eval_path is None or not evaluation_only):
        raise ValueError("--data.path is missing; name the .npz file of the images")
    if data.eval_path is None:
        train, evaluation, classes = _one_archive(Archive(str(data.path)), data)
    else:
        other = Archive(data.eval_path, data.eval_flag)
        evaluation, classes = _of_split(other, 1), other.classes
        train = evaluation if evaluation_only else _training_archive(str(data.path), other)
    if not evaluation_only:
        _check_classes(train, classes, str(data.path))
    shown = data.eval_path if evaluation_only and data.eval_path else data.path
    return Parts(train, evaluation, classes, str(shown))


def _one_archive(archive: Archive, data: DataConfig) -> tuple[Part, Part, tuple[str, ...]]:
    whole = Part.whole(archive)
    if archive.split is None or not archive.split.any():
        return *hold_out(whole, data.holdout, data.split_seed), archive.classes
    return whole.take(archive.split == 0), whole.take(archive.split == 1), archive.classes


def _training_archive(path: str, other: Archive) -> Part:
    archive = Archive(path)
    if archive.classes != other.classes:
        raise ValueError(
            f"--data.eval-path {other.path} has other classes than --data.path {path}; use two "
            "archives with the same array classes"
        )
    return _of_split(archive, 0)


def _of_split(archive: Archive, split: int) -> Part:
    """Return the images of one split; all of them where none is of it."""
    whole = Part.whole(archive)
    if archive.split is None or not np.any(archive.split == split):
        return whole
    return whole.take(archive.split == split)


def _check_classes(train: Part, classes: tuple[str, ...], path: str) -> None:
    counts = np.bincount(train.labels, minlength=len(classes))
    if not counts.all():
        raise ValueError(
            f"--data.path {path} holds no image of class {classes[int(counts.argmin())]!r} to "
            "train on; add some, or take the class out of the array classes"
        )


def _read_arrays(path: Path, title: str) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise ValueError(f"{title} is not a file; name an .npz archive of images")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in _ARRAYS if name in archive.files}
    except Exception as error:  # of spoilt bytes zipfile, zlib and NumPy raise nearly anything
        # What is no archive NumPy takes for a pickle, and advises to load it without care.
        why = "" if "unsafely" in str(error) else f" ({reason(error)})"
        raise ValueError(
            f"{title} cannot be read as an .npz archive of plain arrays{why}; fetch or write it "
            "again"
        ) from error


def _check(arrays: dict[str, NDArray[Any]], title: str) -> None:
    """Raise ValueError unless the arrays fit together."""
    for name, (dtypes, meaning) in _ARRAYS.items():
        if name not in arrays and name != "split":
            raise ValueError(f"{title} has no array {name!r} ({meaning}); add it")
        array = arrays.get(name)
        if array is not None and (array.ndim != 1 or array.dtype.char not in dtypes):
            raise ValueError(
                f"{title} has an array {name!r} of {array.dtype} {array.shape}; it must have one "
                f"dimension: {meaning}"
            )
    blob, offsets, labels = arrays["blob"], arrays["offsets"], arrays["labels"]
    count = len(labels)
    wanted = {"offsets": count + 1, "names": count, "split": count}
    for name, length in wanted.items():
        if name in arrays and len(arrays[name]) != length:
            raise ValueError(
                f"{title} has {count} labels, so array {name!r} must have {length} elements, "
                f"not {len(arrays[name])}"
            )
    if offsets.max() > len(blob) or offsets.min() < 0:
        raise ValueError(f"{title} has offsets outside of its blob of bytes; write it again")
    if np.any(offsets[1:] < offsets[:-1]):
        raise ValueError(f"{title} has offsets that go backwards; write it again")
    classes = len(arrays["classes"])
    if not count or labels.min() < 0 or labels.max() >= classes:
        found = f"labels from {labels.min()} to {labels.max()}" if count else "no labels"
        raise ValueError(f"{title} has {found} and {classes} classes; labels count from 0")
    if "split" in arrays and not np.isin(arrays["split"], (0, 1)).all():
        unknown = arrays["split"][~np.isin(arrays["split"], (0, 1))][0]
        raise ValueError(
            f"{title} has images of an unknown split {unknown}; only 0 and 1 are known"
        )
