"""Tiny shards of WebDataset whose pictures tell their numbers, and streams that read them."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blnet.vision.preprocessing import Preprocessing
from blnet.vision.shards import ShardStream
from helpers.pictures import encoded

SMALL = Preprocessing(8, 1.0, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLASSES = 7


def green(number: int, kind: str = "PNG") -> bytes:
    """Return a picture whose green tells its number and whose left half is brighter."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[..., 1] = number
    pixels[:, :4, 0] = 200
    return encoded(Image.fromarray(pixels), kind)


def number_of(sample: Any) -> int:
    """Return the number that a sample's picture tells; its label must be that number's."""
    image, label = sample
    found = int(image[1, 0, 0])
    assert label == found % CLASSES
    return found


def pairs(numbers: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of the files of samples with these numbers."""
    for number in numbers:
        yield f"{number:06}.png", green(number)
        yield f"{number:06}.cls", str(number % CLASSES).encode()


def write_shard(path: Path, files: Iterable[tuple[str, bytes]], mode: Any = "w") -> Path:
    """Write a shard of files by name, in a mode of `tarfile`; return its path."""
    with tarfile.open(path, mode) as shard:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: Sequence[int]) -> str:
    """Write shards of so many images each, numbered through; return the pattern of them all."""
    done = 0
    for place, count in enumerate(counts):
        write_shard(folder / f"part-{place}.tar", pairs(range(done, done + count)))
        done += count
    return str(folder / f"part-{{0..{len(counts) - 1}}}.tar")


def stream(
    pattern: str, training: bool = True, transform: Any = SMALL, **options: Any
) -> ShardStream:
    """Return a stream of shards with a small buffer and a seed, unless options say otherwise."""
    options = {"seed": 3, "buffer": 5, **options}
    return ShardStream(
        pattern, 100, CLASSES, SMALL.convert, transform, training=training, **options
    )


def first(
    part: ShardStream, count: int, epoch: int = 0, reader: int = 0, readers: int = 1, skip: int = 0
) -> list[Any]:
    """Return the first samples that a reader gives."""
    return list(itertools.islice(part.read(epoch, reader, readers, skip), count))


def all_of(part: ShardStream) -> list[Any]:
    """Return all samples of a pass."""
    return list(part.read(0, 0, 1, 0))


def collate(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Return a batch of samples."""
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.tensor(labels)}
