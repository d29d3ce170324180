"""Pictures that can be taken by their number, and the data set that makes tensors of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from blnet.files import reason
from blnet.training.loading import CorruptSample

# Of the files that count as pictures in a folder, in small letters: torchvision's, and what else
# cameras, telephones and browsers write, as far as this Pillow reads it.
_OTHER_ENDINGS = {".gif", ".jfif", ".jp2", ".avif"}
PICTURE_ENDINGS = (*IMG_EXTENSIONS, *sorted(_OTHER_ENDINGS & Image.registered_extensions().keys()))
Integers = NDArray[np.int64]
Transform = Callable[[Image.Image], Tensor]
Convert = Callable[[Image.Image], Image.Image]


class Source(Protocol):
    """Pictures with labels, taken by their number; fit for pickling.

    Attributes:
        labels: the class of each, int64 (n,).
    """

    labels: Integers

    def name(self, index: int) -> str:
        """Return what to call picture `index` in a message: its file or entry."""

    def open(self, index: int) -> Image.Image:
        """Return picture `index`; what it raises if it cannot is PIL's affair."""


class Pixels:
    """Pictures that lie in memory as an array.

    Args:
        images: uint8 (n, height, width), grey, or (n, height, width, 3).
        labels: the class of each, (n,).
        title: what their names begin with.
    """

    def __init__(self, images: NDArray[np.uint8], labels: Any, title: str) -> None:
        self.images = images
        self.labels: Integers = np.asarray(labels, dtype=np.int64)
        self.title = title

    def name(self, index: int) -> str:
        """Return the set's name and the picture's number."""
        return f"{self.title}, image {index}"

    def open(self, index: int) -> Image.Image:
        """Return a picture as RGB or grey."""
        return Image.fromarray(self.images[index])


class Fake:
    """Random pictures, each from a generator of its own, to measure speed on.

    Args:
        count: number of pictures; they take the classes in turn.
        classes: number of classes.
        size: height and width, pixels.
        seed: of all of them, some whole numbers.
    """

    def __init__(self, count: int, classes: int, size: int, seed: tuple[int, ...] = (0,)) -> None:
        self.labels: Integers = np.arange(count, dtype=np.int64) % classes
        self.size = size
        self.seed = seed

    def name(self, index: int) -> str:
        """Return the picture's number."""
        return f"fake, image {index}"

    def open(self, index: int) -> Image.Image:
        """Return a picture as RGB."""
        pixels = np.random.RandomState([*self.seed, index]).bytes(3 * self.size * self.size)
        return Image.frombytes("RGB", (self.size, self.size), pixels)


@dataclass(frozen=True)
class Part:
    """Some of a source's pictures.

    Attributes:
        source: the pictures.
        indices: which of them, int64 (n,).
    """

    source: Source
    indices: Integers

    @property
    def labels(self) -> Integers:
        """The class of each, int64 (n,)."""
        return self.source.labels[self.indices]

    @classmethod
    def whole(cls, source: Source) -> Part:
        """Return all of a source."""
        return cls(source, np.arange(len(source.labels), dtype=np.int64))

    def take(self, positions: Any) -> Part:
        """Return those at some positions, or where a mask is true."""
        return Part(self.source, self.indices[positions])


@dataclass(frozen=True)
class Parts:
    """What a set consists of.

    Attributes:
        train: the pictures to train on; any, if only the evaluation was asked for.
        evaluation: those to evaluate on.
        classes: name of each class.
        origin: where they come from, for the log.
    """

    train: Part
    evaluation: Part
    classes: tuple[str, ...]
    origin: str


class Images(Dataset[tuple[Tensor, int]]):
    """A data set of (uint8 tensor (channels, height, width), label).

    Args:
        part: the pictures.
        convert: gives any picture the mode that the network takes.
        transform: makes the tensor.

    Raises:
        CorruptSample: from an item whose picture cannot be read.
    """

    def __init__(self, part: Part, convert: Convert, transform: Transform) -> None:
        self.part = part
        self.convert = convert
        self.transform = transform

    def __len__(self) -> int:
        return len(self.part.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, place = self.part.source, int(self.part.indices[index])
        picture = read(source.name(place), lambda: source.open(place), self.convert)
        return self.transform(picture), int(source.labels[place])


def decode(encoded: bytes) -> Image.Image:
    """Return the picture that a file of these bytes holds.

    Raises:
        Exception: if it holds none; PIL raises nearly anything.
    """
    if not encoded:
        raise ValueError("the file is empty")
    return Image.open(io.BytesIO(encoded))


def read(name: str, opened: Callable[[], Image.Image], convert: Convert) -> Image.Image:
    """Return a picture, decoded and converted.

    Args:
        name: what to call it in an error.
        opened: opens it.
        convert: gives it its mode.

    Raises:
        CorruptSample: if it cannot be read; of spoilt bytes PIL raises nearly anything.
    """
    try:
        return convert(opened())
    except UnidentifiedImageError as error:  # its text has the address of a buffer
        raise CorruptSample(name, "not a picture of a format that PIL knows") from error
    except Exception as error:
        raise CorruptSample(name, reason(error)) from error
