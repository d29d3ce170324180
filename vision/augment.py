"""How pictures are varied in training: one by one, and mixed within a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from blnet.vision.config import AugmentConfig
from blnet.vision.preprocessing import Preprocessing

_BILINEAR = InterpolationMode.BILINEAR


class TrainingTransform:
    """What training does to a picture: converts it, varies it, and makes it a tensor.

    The order is that of the paper's code: rotation (of the whole picture, so that the crop cuts off
    most of the black corners), crop, flip, colours; then RandAugment and erasing. Draws come from
    torch's global random state only. Rotation is bilinear, where that code takes the nearest pixel.

    Args:
        augment: what is varied, and how much.
        preprocessing: size, channels and mean of the network's input.

    Raises:
        ValueError: naming the first setting that makes no sense.
    """

    def __init__(self, augment: AugmentConfig, preprocessing: Preprocessing) -> None:
        augment.check()
        self._convert = preprocessing.convert
        self._geometry = _geometry(augment, preprocessing)
        self._colours = _colours(augment)
        # Erased pixels are the mean, as normalised zeros are, not black.
        mean = [round(255 * value) for value in preprocessing.mean]
        self._erase = v2.RandomErasing(augment.erasing, value=mean) if augment.erasing else None

    def __call__(self, picture: Image.Image) -> Tensor:
        """Return a picture of any mode, varied, as a uint8 tensor (channels, size, size).

        Raises:
            ValueError: if the picture cannot be converted (see `Preprocessing.convert`).
        """
        varied = self._convert(picture)
        for step in (*self._geometry, *self._colours):
            varied = step(varied)
        tensor: Tensor = v2.functional.pil_to_tensor(varied)
        return tensor if self._erase is None else self._erase(tensor)


def training_transform(
    augment: AugmentConfig, preprocessing: Preprocessing
) -> Callable[[Image.Image], Tensor]:
    """Return what training does to a picture; see `TrainingTransform`."""
    return TrainingTransform(augment, preprocessing)


def _geometry(augment: AugmentConfig, preprocessing: Preprocessing) -> list[Any]:
    size = preprocessing.size
    steps: list[Any] = []
    if augment.rotation:
        steps.append(v2.RandomRotation(augment.rotation, interpolation=_BILINEAR))
    if augment.crop == "resized":
        scale = (augment.scale_min, 1.0)
        steps.append(v2.RandomResizedCrop(size, scale=scale, interpolation=_BILINEAR))
    elif augment.crop == "padded":
        # 4 pixels around CIFAR's 32, as He et al. do (Deep Residual Learning, 4.2).
        steps.append(v2.Resize(size, interpolation=_BILINEAR))
        steps.append(v2.RandomCrop(size, padding=max(1, size // 8)))
    else:
        steps.append(v2.Resize(preprocessing.resized, interpolation=_BILINEAR))
        steps.append(v2.CenterCrop(size))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    return steps


def _colours(augment: AugmentConfig) -> list[Any]:
    steps: list[Any] = []
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*(augment.color_jitter,) * 3))
    if augment.randaugment_ops:
        options = {"interpolation": _BILINEAR}
        magnitude = augment.randaugment_magnitude
        steps.append(v2.RandAugment(augment.randaugment_ops, magnitude, **options))
    return steps


class Mix:
    """Mixes each image of a batch with its neighbour: mixup, CutMix, or one of the two at random.

    Draws come from torch's CPU generator only, so that a CPU and a GPU mix alike. mixup: Zhang et
    al., arXiv 1710.09412; CutMix: Yun et al., arXiv 1905.04899.

    Args:
        augment: mixup, cutmix and mix_probability of it; with both at 0 nothing is mixed.
        classes: number of classes.
    """

    def __init__(self, augment: AugmentConfig, classes: int) -> None:
        self.classes = classes
        self.probability = augment.mix_probability
        kinds = ((v2.MixUp, augment.mixup), (v2.CutMix, augment.cutmix))
        mixers = [kind(alpha=float(alpha), num_classes=classes) for kind, alpha in kinds if alpha]
        self._mix = v2.RandomChoice(mixers) if mixers else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed images and, for each, how much of which class is in it.

        Args:
            images: floating-point (N, C, H, W), normalised.
            labels: int64 (N,).

        Returns:
            The images (N, C, H, W), and float32 shares (N, classes), each row with the sum 1.
        """
        if self._mix is None or torch.rand(()).item() >= self.probability:
            return images, F.one_hot(labels, self.classes).float()
        mixed: tuple[Tensor, Tensor] = self._mix(images, labels)
        return mixed
