"""The image data of a run: what to train and evaluate on, by the name of the set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from blnet.files import folders_taken_back, reason
from blnet.vision.augment import training_transform
from blnet.vision.classes import class_names
from blnet.vision.config import AugmentConfig, DataConfig
from blnet.vision.folders import load_folder
from blnet.vision.npz import load_archive
from blnet.vision.preprocessing import IMAGENET, Preprocessing
from blnet.vision.shards import ShardStream, check_stream
from blnet.vision.sources import Fake, Images, Part, Parts, Pixels
from blnet.vision.splits import balanced, hold_out

__all__ = ["ImageData", "class_names", "load_data"]

# Mean and standard deviation of the 50,000 training images' pixels, where white is 1; those in
# common use, to four digits.
_CIFAR = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_CIFAR_SIZE = 32
_DIGITS_SIZE = 8


@dataclass(frozen=True)
class ImageData:
    """What a run trains and is evaluated on.

    Attributes:
        train: data set of (uint8 tensor (channels, height, width), label), varied as augment says;
            of length 0 where only the evaluation was asked for. An item that cannot be read raises
            `CorruptSample`; a `ShardStream` (webdataset) yields the error instead.
        evaluation: likewise, not varied.
        classes: name of each class.
        preprocessing: what evaluation does to a picture; its `normalize` is still to be applied.
        name: what to call the set in the log.
        counts: number of training and of evaluation images, of shards None: all that they hold.
    """

    train: Dataset[Any] | ShardStream
    evaluation: Dataset[Any] | ShardStream
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    name: str
    counts: tuple[int, int | None]


def load_data(
    data: DataConfig,
    augment: AugmentConfig | None = None,
    *,
    parts: Literal["both", "evaluation"] = "both",
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> ImageData:
    """Return the images that a configuration names.

    What is split, and how, depends on `data.split_seed` alone, so that all runs are measured on the
    same images.

    Args:
        data: which images.
        augment: how those for training are varied; default: not at all.
        parts: evaluation leaves the training images out, which then need not be there.
        seed: of the order of a stream (webdataset). What is varied is drawn from torch's global
            random state.
        preprocessing: what a trained network expects of pictures; None for what suits the set.

    Raises:
        ValueError: of one sentence that names the setting, if one makes no sense or the images are
            not there, cannot be read or do not fit together.
        ImportError: if a package is missing that the set needs.
    """
    augment = augment or AugmentConfig()
    data.check()
    augment.check()
    evaluation_only = parts == "evaluation"
    if not evaluation_only:  # else some may be left from a run that passed them over
        data.check_read()
    if data.name == "webdataset":
        return _load_streams(data, augment, preprocessing or _preprocessing(data),
                             evaluation_only, seed)  # fmt: skip
    found = _LOADERS[data.name](data, evaluation_only)
    if not evaluation_only:  # else the network's classes are what counts
        _check_classes(len(found.classes), f"{data.name} of {found.origin}")
    preprocessing = preprocessing or _preprocessing(data, found)
    train, evaluation = (
        balanced(part, data.limit, data.split_seed) for part in (found.train, found.evaluation)
    )
    if evaluation_only:
        train = train.take(slice(0))
    counts = len(train.indices), len(evaluation.indices)
    convert = preprocessing.convert
    return ImageData(
        train=Images(train, convert, training_transform(augment, preprocessing)),
        evaluation=Images(evaluation, convert, preprocessing),
        classes=found.classes,
        preprocessing=preprocessing,
        name=_title(data, counts, found.origin, preprocessing.size),
        counts=counts,
    )


def _check_classes(count: int, what: str) -> None:
    if count < 2:
        raise ValueError(
            f"{what} has {count} class, and there is nothing to tell apart below two; name data of "
            "two classes at least"
        )


def _title(data: DataConfig, counts: tuple[int, int | None], origin: str, size: int) -> str:
    train = f"{counts[0]:,} training and " if counts[0] else ""
    test = "all" if counts[1] is None else f"{counts[1]:,}"
    return f"{data.name} ({train}{test} test images of {origin}, {size}x{size})"


def _preprocessing(data: DataConfig, found: Parts | None = None) -> Preprocessing:
    channels, mean, std = 3, IMAGENET.mean, IMAGENET.std
    if data.name == "digits":
        assert found is not None
        channels, (mean, std) = 1, _grey_statistics(found)
    elif data.name in _CIFAR:
        mean, std = _CIFAR[data.name]
    own = {"digits": _DIGITS_SIZE, "cifar10": _CIFAR_SIZE, "cifar100": _CIFAR_SIZE}
    # Pictures this small have no margin to cut off.
    ratio = 1.0 if data.name in own or data.name == "fake" else IMAGENET.crop_ratio
    size = data.size or own.get(data.name, IMAGENET.size)
    return Preprocessing(size, data.crop_ratio or ratio, channels, mean, std)


# Sets: functions of the configuration and of whether only the evaluation part is wanted -----------


def _load_digits(data: DataConfig, evaluation_only: bool) -> Parts:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0 to 16 in the original
    source = Pixels(images, digits.target, "digits")
    train, evaluation = hold_out(Part.whole(source), data.holdout, data.split_seed)
    return Parts(train, evaluation, tuple("0123456789"), "scikit-learn")


def _grey_statistics(found: Parts) -> tuple[tuple[float], tuple[float]]:
    """Return the mean and standard deviation of the training images' pixels, to four digits."""
    source = found.train.source
    assert isinstance(source, Pixels)
    pixels = source.images[found.train.indices] / 255
    return (round(float(pixels.mean()), 4),), (round(float(pixels.std()), 4),)


def _load_cifar(data: DataConfig, evaluation_only: bool) -> Parts:
    if data.path is not None and Path(data.path).suffix == ".npz":
        parts = load_archive(data, evaluation_only)
        wanted = int(data.name.removeprefix("cifar"))
        if len(parts.classes) != wanted:
            raise ValueError(
                f"--data.path {data.path} has {len(parts.classes)} classes, and {data.name} has "
                f"{wanted}; name another archive, or read it as --data.name npz"
            )
        return parts
    from torchvision import datasets

    root = "data" if data.path is None else data.path
    kind = datasets.CIFAR10 if data.name == "cifar10" else datasets.CIFAR100
    try:
        # Their batches are pickles; torchvision opens none whose MD5 is not the original's.
        with folders_taken_back(root):
            test = kind(root, train=False, download=data.download)
        train = test if evaluation_only else kind(root, train=True)
    except (RuntimeError, OSError) as error:
        if data.download:
            raise ValueError(
                f"{data.name} could not be fetched into folder {root} ({reason(error)}); try "
                "again, or name an .npz archive with --data.path"
            ) from error
        raise ValueError(
            f"{data.name} is not in folder {root}, or not whole; fetch it with --data.download, "
            "or name its folder or an .npz archive with --data.path"
        ) from error
    training, evaluation = (
        Part.whole(Pixels(found.data, found.targets, f"{data.name} {title}"))
        for found, title in ((train, "training"), (test, "test"))
    )
    return Parts(training, evaluation, tuple(test.classes), root)


def _load_fake(data: DataConfig, evaluation_only: bool) -> Parts:
    size, classes = data.size or IMAGENET.size, data.classes or 1000
    counts = data.train_images or 10_000, data.eval_images or 1_000
    train, evaluation = (
        Part.whole(Fake(count, classes, size, (data.split_seed, place)))
        for place, count in enumerate(counts)
    )
    names = tuple(map(str, range(classes)))
    return Parts(train, evaluation, names, "random pixels")


_LOADERS: dict[str, Callable[[DataConfig, bool], Parts]] = {
    "digits": _load_digits,
    "cifar10": _load_cifar,
    "cifar100": _load_cifar,
    "folder": load_folder,
    "imagenet": load_folder,
    "npz": load_archive,
    "fake": _load_fake,
}


def _load_streams(
    data: DataConfig,
    augment: AugmentConfig,
    preprocessing: Preprocessing,
    evaluation_only: bool,
    seed: int,
) -> ImageData:
    check_stream(data, evaluation_only)
    classes = int(data.classes or 0)
    if not evaluation_only:
        _check_classes(classes, f"--data.classes {classes}: webdataset")
    counts = 0 if evaluation_only else int(data.train_images or 0), None
    evaluation = ShardStream(
        str(data.eval_path), 0, classes, preprocessing.convert, preprocessing,
        training=False, flag="--data.eval-path",
    )  # fmt: skip
    train: Dataset[Any] | ShardStream
    if evaluation_only:
        nothing = Part(Fake(0, classes, 1), np.empty(0, dtype=np.int64))
        train = Images(nothing, preprocessing.convert, preprocessing)
    else:
        train = ShardStream(
            str(data.path), counts[0], classes, preprocessing.convert,
            training_transform(augment, preprocessing), training=True, seed=seed,
        )  # fmt: skip
    names = tuple(map(str, range(classes)))
    origin = str(data.eval_path if evaluation_only else data.path)
    name = _title(data, counts, origin, preprocessing.size)
    return ImageData(train, evaluation, names, preprocessing, name, counts)
