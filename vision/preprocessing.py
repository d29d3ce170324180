"""What evaluation and prediction do to a picture before the network sees it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

# Larger ones are nobody's network but a spoilt file that would take all memory.
LARGEST_SIDE = 16384
# Pixels that a picture may have once resized: a strip of 1 x 10,000 pixels with its shorter side
# resized to 256 would have 655 million. It is PIL's own limit for a picture from outside.
LARGEST_RESIZED = 2 * 89_478_485


@functools.lru_cache(maxsize=32)
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as (channels, 1, 1); kept, as a copy to a GPU waits for all it has to do."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a network's input; checkpoints carry it.

    The shorter side is resized to round(size / crop_ratio) pixels, bilinear and antialiased, the
    centre cropped, and each channel normalised: to the byte what torchvision's Resize and
    CenterCrop make of a PIL picture. Where the EXIF data ask for a rotation, they are ignored, as
    torchvision's loaders do, on whose pictures the published networks are trained.

    Attributes:
        size: height and width that the network sees, pixels.
        crop_ratio: share of the resized shorter side that the crop keeps, above 0, at most 1.
        channels: 3 for colour, 1 for grey.
        mean: of each channel, where white is 1.
        std: standard deviation of each channel.
        interpolation: 'bilinear', the only one.

    Raises:
        ValueError: if a value makes no sense.
    """

    size: int
    crop_ratio: float
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        whole = isinstance(self.size, int) and not isinstance(self.size, bool)
        wanted = f"a whole number of pixels from 1 to {LARGEST_SIDE}"
        _expect(whole and 1 <= self.size <= LARGEST_SIDE, "size", self.size, wanted)
        ratio = _is_number(self.crop_ratio) and 0 < self.crop_ratio <= 1
        _expect(ratio, "crop_ratio", self.crop_ratio, "above 0 and at most 1")
        fits = self.size / self.crop_ratio <= LARGEST_SIDE
        _expect(fits, "size", self.size, f"at most {LARGEST_SIDE} once divided by crop_ratio")
        grey_or_colour = type(self.channels) is int and self.channels in (1, 3)
        _expect(grey_or_colour, "channels", self.channels, "1 or 3")
        for name, lowest in (("mean", -math.inf), ("std", 0)):
            values = getattr(self, name)
            fits = isinstance(values, tuple) and len(values) == self.channels
            fits = fits and all(_is_number(value) and value > lowest for value in values)
            wanted = f"{self.channels} numbers{' above 0' if name == 'std' else ''}"
            _expect(fits, name, values, wanted)
        _expect(self.interpolation == "bilinear", "interpolation", self.interpolation, "'bilinear'")

    @property
    def resized(self) -> int:
        """Length of the shorter side before the crop, pixels."""
        return round(self.size / self.crop_ratio)

    def __call__(self, picture: Image.Image) -> Tensor:
        """Return a picture as a uint8 tensor (channels, size, size).

        Raises:
            ValueError: if the picture cannot be converted (see `convert`).
        """
        picture = self.convert(picture)
        bilinear = InterpolationMode.BILINEAR  # of a PIL picture always antialiased
        picture = transforms.resize(picture, [self.resized], interpolation=bilinear)
        cropped = transforms.center_crop(picture, [self.size, self.size])
        tensor: Tensor = transforms.pil_to_tensor(cropped)
        return tensor

    def convert(self, picture: Image.Image) -> Image.Image:
        """Return a picture of any mode as RGB, or as L for a network that sees grey.

        Transparency is dropped, not blended, as torchvision's loader does; of 16-bit grey the upper
        8 bits are kept, where PIL alone would make everything above 255 white.

        Raises:
            ValueError: if it has no pixels, floating-point or 32-bit ones, or is a strip so narrow
                that it would not fit into memory once its shorter side has the size wanted.
            Exception: what PIL raises, nearly anything, if the file behind the picture is spoilt.
        """
        short, long = sorted(picture.size)
        if short < 1:
            raise ValueError("the picture has no pixels")
        if self.resized * self.resized * long / short > LARGEST_RESIZED:
            raise ValueError(f"a strip of {picture.width} x {picture.height} pixels is too narrow")
        if picture.mode == "F":
            raise ValueError("pixels are floating-point numbers, whose range no file tells")
        if picture.mode == "I" and picture.format == "TIFF":  # of unsigned 16-bit it is I;16
            raise ValueError("pixels are signed or 32-bit numbers, whose range no file tells")
        if picture.mode.startswith("I"):
            shifted = np.asarray(picture).clip(0, 65535) >> 8
            picture = Image.fromarray(shifted.astype(np.uint8))
        if picture.mode in ("P", "PA"):  # PIL warns if a palette with transparency goes to RGB
            picture = picture.convert("RGBA")
        mode = "RGB" if self.channels == 3 else "L"
        if picture.mode != mode:
            return picture.convert(mode)
        picture.load()
        return picture

    def normalize(self, images: Tensor) -> Tensor:
        """Return ((images / 255) - mean) / std as float32, on the images' device.

        Args:
            images: uint8 (N, channels, H, W).
        """
        mean, std = (_by_channel(tuple(values), images.device) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON; `from_dict` reads them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Return the settings that a checkpoint holds.

        Raises:
            ValueError: naming the first setting that is missing, unknown or wrong.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"preprocessing must be a table of settings, got {values!r}")
        names = [field.name for field in fields(cls)]
        for name in names:
            if name not in values:
                raise ValueError(f"preprocessing.{name} is missing; take it from the training run")
        for name in values:
            if name not in names:
                raise ValueError(
                    f"preprocessing.{name} is unknown; the settings are {', '.join(names)}"
                )
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _expect(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"preprocessing.{name} must be {wanted}, got {value!r}")


# The evaluation of the paper and of torchvision's first networks: resize 256, centre crop 224.
IMAGENET = Preprocessing(224, 0.875, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
