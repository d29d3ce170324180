"""Pictures in folders, one for each class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import ImageFolder

from blnet.files import reason
from blnet.vision.classes import class_names
from blnet.vision.config import DataConfig
from blnet.vision.sources import PICTURE_ENDINGS, Integers, Part, Parts
from blnet.vision.splits import hold_out

EVALUATION_FOLDERS = ("val", "valid", "validation", "test")
_PART_NAMES = {"train", "training", "dev", "eval", "evaluation", "testing", *EVALUATION_FOLDERS}


class _ClassFolders(ImageFolder):
    """torchvision's ImageFolder, without hidden folders and with errors of one sentence."""

    def __init__(self, root: Path, flag: str) -> None:
        self.flag = flag
        super().__init__(str(root), is_valid_file=_is_picture, allow_empty=True)
        empty = set(range(len(self.classes))) - set(self.targets)
        if empty:
            raise ValueError(
                f"{flag}: folder {root / self.classes[min(empty)]} holds no pictures "
                f"({', '.join(PICTURE_ENDINGS[:3])}, ...); put some there or remove it"
            )

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = _folders(Path(directory), self.flag)
        if not classes:
            raise ValueError(
                f"{self.flag}: folder {directory} holds no folders; put the pictures of each class "
                "into a folder of its own there"
            )
        for name in classes:
            if not _is_text(name):
                raise ValueError(
                    f"{self.flag}: the name of folder {os.path.join(directory, name)!r} is not "
                    "UTF-8, and it is to name a class; rename it"
                )
            self._check_open(os.path.join(directory, name))
        return classes, {name: index for index, name in enumerate(classes)}

    def _check_open(self, folder: str) -> None:
        """Raise ValueError if a folder or one below it, which are read later, cannot be opened.

        ImageFolder passes over those, and follows links, so that this does too.
        """
        for _ in os.walk(folder, onerror=lambda error: _refuse(error, self.flag), followlinks=True):
            pass


class Folder:
    """A source of pictures in folders named by their classes, at any depth below them.

    Hidden files and folders are passed over.

    Args:
        root: the folder that holds the class folders.
        flag: the setting that named it, for errors.

    Attributes:
        labels: the class of each picture, int64 (n,).
        classes: the folders' names, sorted.

    Raises:
        ValueError: if a folder cannot be read, there is none for a class, or one has no picture.
    """

    def __init__(self, root: Path, flag: str) -> None:
        found = _ClassFolders(root, flag)
        self.root = str(root)
        self.classes = tuple(found.classes)
        self.labels: Integers = np.array(found.targets, dtype=np.int64)
        # One array: a million Python strings would be copied into every loading process, little by
        # little, as their reference counts change.
        start = len(os.path.join(self.root, ""))
        self.paths: NDArray[np.bytes_] = np.array(
            [os.fsencode(path)[start:] for path, _ in found.samples]
        )

    def name(self, index: int) -> str:
        """Return the file's path."""
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[index])))

    def open(self, index: int) -> Image.Image:
        """Return a picture, decoded, and the file closed again."""
        path = self.name(index)
        if not os.path.getsize(path):
            raise ValueError("the file is empty")
        with Image.open(path) as picture:
            picture.load()
            return picture


def load_folder(data: DataConfig, evaluation_only: bool) -> Parts:
    """Return the parts of a folder of class folders, or of folders train and val that hold them.

    The evaluation part is `data.eval_path`; else path/val, valid, validation or test; else a share
    of each class that is held out. For data.name imagenet, path/val must be there.

    Raises:
        ValueError: if a folder is missing, cannot be read or is empty, or the classes of the two
            parts differ.
    """
    train_root, eval_root, flag = _roots(data, evaluation_only)
    if eval_root is None:
        source = Folder(train_root, "--data.path")
        train, evaluation = hold_out(Part.whole(source), data.holdout, data.split_seed)
    else:
        source = Folder(eval_root, flag)
        evaluation = Part.whole(source)
        train = evaluation
        if not evaluation_only:
            training = Folder(train_root, "--data.path")
            _check_same(training, source)
            train = Part.whole(training)
    classes = class_names(source.classes) if data.name == "imagenet" else source.classes
    shown = eval_root if evaluation_only and eval_root else data.path
    return Parts(train, evaluation, classes, str(shown))


def _roots(data: DataConfig, evaluation_only: bool) -> tuple[Path, Path | None, str]:
    """Return the folders of both parts, None for one to hold out, and the setting of the second."""
    given = None if data.eval_path is None else Path(data.eval_path)
    if given is not None and evaluation_only:
        flag = data.eval_flag
        _folders(given, flag)
        beside_train = _is_part(given / "train", flag)
        whole = beside_train or data.eval_path == data.path
        found = _evaluation_folder(given, beside_train, flag) if whole else None
        return given, found or given, flag
    if data.path is None:
        raise ValueError("--data.path is missing; name a folder with a folder of images a class")
    path = Path(data.path)
    _folders(path, "--data.path")
    train = path / "train"
    if given is not None:
        return (train if _is_part(train) else path), given, data.eval_flag
    found = _evaluation_folder(path, beside_train=_is_part(train))
    if found is None and data.name == "imagenet":
        raise ValueError(
            f"--data.path {path} has no folder val with ImageNet's class folders; put the "
            "validation images there, or take --data.name folder to hold training images out"
        )
    if found is None:
        _check_parts(path, train)
    if found is not None and not (_is_part(train) or evaluation_only):
        raise ValueError(f"--data.path {path} has a folder {found.name} but no train; add it")
    return (train if _is_part(train) else path), found, "--data.path"


def _check_parts(path: Path, train: Path) -> None:
    """Raise ValueError if a folder has parts that go by other names than they should."""
    names = _folders(path, "--data.path")
    called = [name for name in names if name.casefold() in _PART_NAMES and _is_part(path / name)]
    if _is_part(train):
        own = set(_folders(train, "--data.path"))
        others = [
            name
            for name in called
            if name.casefold() != "train" and own & set(_folders(path / name, "--data.path"))
        ]
        if others:
            raise ValueError(
                f"--data.path {path} has a folder train and beside it {others[0]}, with classes of "
                f"the same names; call it val to evaluate on it, or name {train} alone"
            )
    elif len(names) > 1 and called == names:
        raise ValueError(
            f"--data.path {path} has folders {' and '.join(names)}, which are called like parts "
            "and not like classes; call them train and val"
        )


def _evaluation_folder(path: Path, beside_train: bool, flag: str = "--data.path") -> Path | None:
    """Return the folder of the evaluation part, the first of the names it may have.

    Raises:
        ValueError: if the first there is, beside a part to train on, holds pictures of no class.
    """
    for place in (path / name for name in EVALUATION_FOLDERS):
        if _is_part(place, flag):
            return place
        if beside_train and place.is_dir() and any(map(_is_picture, os.listdir(place))):
            raise ValueError(
                f"{flag}: folder {place} holds pictures but no class folders; sort them into "
                "a folder a class, or move it away to hold training images out"
            )
    return None


def _is_part(folder: Path, flag: str = "--data.path") -> bool:
    """Tell a part, which holds folders, from a class that happens to be called train or test."""
    return folder.is_dir() and bool(_folders(folder, flag))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folders(folder: Path, flag: str) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    if not folder.is_dir():
        raise ValueError(f"{flag}: {folder} is not a folder; name one that exists")
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        _refuse(error, flag)


def _refuse(error: OSError, flag: str) -> NoReturn:
    raise ValueError(
        f"{flag}: folder {error.filename} cannot be read ({error.strerror or reason(error)}); see "
        "to its permissions"
    ) from error


def _is_picture(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(PICTURE_ENDINGS) and not name.startswith(".")


def _check_same(train: Folder, evaluation: Folder) -> None:
    """Raise ValueError, naming the first class, unless both parts have the same classes."""
    for one, other in ((train, evaluation), (evaluation, train)):
        lone = sorted(set(one.classes) - set(other.classes))
        if lone:
            more = f" and {len(lone) - 1} more" if len(lone) > 1 else ""
            raise ValueError(
                f"{one.root} has a class {lone[0]!r}{more} that {other.root} has not; "
                "give both parts the same class folders"
            )
