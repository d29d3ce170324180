"""Real pictures as input: photographs cropped, flipped, resized and normalised into a batch."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Mean and standard deviation of ImageNet's pixels, as torchvision's networks expect them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Shares of a picture's shorter side that a crop may take.
CROP_RANGE = (0.5, 1.0)
MOST_PICTURES = 64  # of a folder: a batch may use each more than once


def sample_pictures() -> list[Image.Image]:
    """Return scikit-learn's two photographs, a temple and a flower, 427 x 640 pixels each."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(array) for array in load_sample_images().images]


def folder_pictures(folder: str | Path) -> list[Image.Image]:
    """Return the first pictures of a folder, by name, as RGB.

    Args:
        folder: a folder with .jpg, .png and other pictures; its sub-folders are read as well.

    Raises:
        ValueError: if it is no folder, holds no picture, or none of its pictures can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is not a folder; name a folder of pictures")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(
            f"--images {folder} holds no pictures; put some ({', '.join(SUFFIXES[:4])}, ...) there"
        )
    pictures, unreadable = [], []
    for path in paths[:MOST_PICTURES]:
        try:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
            unreadable.append(path.name)
    if unreadable:
        text = f"{len(unreadable)} of {len(pictures) + len(unreadable)} pictures in {folder} "
        text += f"cannot be read: {', '.join(unreadable[:5])}{', ...' * (len(unreadable) > 5)}"
        if not pictures:
            raise ValueError(f"--images: {text}; put readable pictures there")
        warnings.warn(text, stacklevel=2)
    return pictures


def load_pictures(folder: str | Path | None) -> list[Image.Image]:
    """Return the pictures of a folder, or scikit-learn's two photographs if it is None.

    Raises:
        ValueError: if the folder has no readable picture.
    """
    return sample_pictures() if folder is None else folder_pictures(folder)


def make_batch(
    pictures: Sequence[Image.Image], batch: int, size: int | tuple[int, int] = 224, seed: int = 0
) -> Tensor:
    """Return a batch of crops of pictures, as a network sees them.

    Image i is a random crop (half to the whole of the largest that fits, in the shape of the
    images, every other time flipped) of picture i modulo their number, so that no two images of a
    batch are the same. The crop of image i depends on the seed and i alone, not on the batch.

    Args:
        pictures: RGB pictures, one at least.
        batch: number of images.
        size: height and width, pixels; one number for both where they are the same.
        seed: of the crops.

    Returns:
        A float32 tensor (batch, 3, height, width), contiguous, normalised with ImageNet's mean and
        standard deviation.

    Raises:
        ValueError: if there is no picture, or batch or size is below 1.
    """
    if not pictures:
        raise ValueError("a batch needs one picture at least")
    sides = (size, size) if isinstance(size, int) else size
    if batch < 1 or min(sides) < 1:
        raise ValueError(f"batch and size must be at least 1, got {batch} and {size}")
    crops = [_crop(pictures[i % len(pictures)], sides, seed, i) for i in range(batch)]
    pixels = torch.stack(crops).float() / 255
    batched: Tensor = transforms.normalize(pixels, list(MEAN), list(STD))
    return batched


def make_images(
    pictures: Sequence[Image.Image], batch: int, shape: tuple[int, int, int], seed: int = 0
) -> Tensor:
    """Return a batch of crops of pictures; of another number of channels than 3, of noise.

    Args:
        pictures: RGB pictures, one at least.
        batch: number of images.
        shape: channels, height and width.
        seed: of the crops or the noise.

    Returns:
        A float32 tensor (batch, channels, height, width), contiguous, normalised.

    Raises:
        ValueError: see `make_batch`.
    """
    channels, height, width = shape
    if channels == 3:
        return make_batch(pictures, batch, (height, width), seed)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def _crop(picture: Image.Image, sides: tuple[int, int], seed: int, index: int) -> Tensor:
    draw = random.Random(f"{seed}/{index}")
    rows, columns = sides
    scale = min(picture.height / rows, picture.width / columns) * draw.uniform(*CROP_RANGE)
    height, width = max(1, round(scale * rows)), max(1, round(scale * columns))
    left = draw.randint(0, picture.width - width)
    top = draw.randint(0, picture.height - height)
    box = (left, top, left + width, top + height)
    crop = picture.resize((columns, rows), Image.Resampling.BILINEAR, box=box)
    tensor: Tensor = transforms.pil_to_tensor(crop)
    return tensor.flip(-1) if draw.random() < 0.5 else tensor
