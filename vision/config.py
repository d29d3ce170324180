"""Settings of the image data: which pictures, and how they are varied in training."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from blnet.checks import check_flag_choice, check_flag_count, flag_of
from blnet.training.config import TrainingConfig
from blnet.vision.preprocessing import LARGEST_SIDE

DataName = Literal[
    "digits", "cifar10", "cifar100", "folder", "imagenet", "npz", "webdataset", "fake"
]
Crop = Literal["none", "padded", "resized"]

# Settings that say which pictures, and the sets that read each.
_READ_BY: dict[str, tuple[DataName, ...]] = {
    "path": ("cifar10", "cifar100", "folder", "imagenet", "npz", "webdataset"),
    "eval_path": ("cifar10", "cifar100", "folder", "imagenet", "npz", "webdataset"),
    "download": ("cifar10", "cifar100"),
    "train_images": ("webdataset", "fake"),
    "eval_images": ("webdataset", "fake"),
    "classes": ("webdataset", "fake"),
}


@dataclass(frozen=True)
class DataConfig:
    """Which pictures to train and evaluate on.

    Attributes:
        name: the set: digits (scikit-learn's, embedded), cifar10, cifar100, folder (a folder for
            each class), imagenet (folders train and val), npz (JPEGs in one archive), webdataset
            (shards of tar files) or fake (random pictures, to measure speed).
        path: folder or .npz file; for webdataset the training shards, as 'train-{000..099}.tar'
            (URLs and 'pipe:COMMAND' too).
        eval_path: the evaluation part, where path does not hold it: a folder of class folders, an
            .npz file, or shards.
        download: fetch cifar10 or cifar100 into path if it is not there.
        size: height and width that the network sees, pixels; default: 8 for digits, 32 for cifar,
            else 224.
        crop_ratio: in evaluation the shorter side is resized to size / crop_ratio and the centre
            cropped; default: 1 for digits, cifar and fake, else 0.875.
        holdout: share of the training images kept for evaluation, where the set has no split.
        split_seed: seed of that split, of limit and of fake; not the training's seed, so that all
            runs are measured on the same images.
        limit: at most so many training and so many evaluation images, balanced over the classes.
        train_images: webdataset: images in an epoch (a stream has no length of its own);
            fake: training images.
        eval_images: fake: evaluation images (of webdataset all in the shards are).
        classes: webdataset and fake: number of classes.
    """

    name: DataName = "digits"
    path: str | None = None
    eval_path: str | None = None
    download: bool = False
    size: int | None = None
    crop_ratio: float | None = None
    holdout: float = 0.2
    split_seed: int = 0
    limit: int | None = None
    train_images: int | None = None
    eval_images: int | None = None
    classes: int | None = None

    @property
    def eval_flag(self) -> str:
        """The setting that named `eval_path`, for errors; where it is path's, that one."""
        return "--data.path" if self.eval_path == self.path else "--data.eval-path"

    def check(self) -> None:
        """Raise a ValueError that names the first setting that makes no sense."""
        check_flag_choice("--data.name", self.name, get_args(DataName))
        for field in ("size", "limit", "train_images", "eval_images", "classes"):
            check_flag_count(flag_of(f"data.{field}"), getattr(self, field))
        if self.size is not None and self.size > LARGEST_SIDE:
            raise ValueError(
                f"--data.size must be at most {LARGEST_SIDE} pixels, got {self.size}; take 224"
            )
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ValueError(
                f"--data.crop-ratio must be above 0 and at most 1, got {self.crop_ratio}; "
                "1 keeps the whole shorter side"
            )
        if not 0 < self.holdout < 1:
            raise ValueError(
                f"--data.holdout must lie between 0 and 1, got {self.holdout}; "
                "it is the share of the images to evaluate on"
            )
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(
                f"--data.split-seed must be from 0 to 2^32 - 1, got {self.split_seed}; take 0"
            )

    def check_read(self, given: Collection[str] = tuple(_READ_BY)) -> None:
        """Raise a ValueError that names the first setting that the set does not read.

        What was measured would otherwise not be what was asked for.

        Args:
            given: the settings to look at; others may be left from another set.
        """
        for field, sets in _READ_BY.items():
            if field in given and getattr(self, field) and self.name not in sets:
                raise ValueError(
                    f"{flag_of(f'data.{field}')} is not read with --data.name {self.name}, only "
                    f"with {', '.join(sets)}; leave it out, or name one of those"
                )
        official = self.name in ("cifar10", "cifar100") and not str(self.path).endswith(".npz")
        if "eval_path" in given and self.eval_path and official:
            raise ValueError(
                f"--data.eval-path is not read with the official files of {self.name}, which have "
                "a test part; leave it out, or name an .npz archive with --data.path"
            )


@dataclass(frozen=True)
class AugmentConfig:
    """How pictures are varied in training; evaluation never is.

    Attributes:
        crop: none (as in evaluation), padded (a random crop of the picture with a black edge of an
            eighth of its size) or resized (a random part of the picture, resized).
        scale_min: crop resized: smallest share of the picture's area that a crop takes.
        flip: probability of a left-right flip.
        rotation: largest rotation, degrees to either side.
        color_jitter: largest change of brightness, contrast and saturation, each a share.
        randaugment_ops: RandAugment: operations on each picture; 0: off.
        randaugment_magnitude: RandAugment: their strength, 0 to 30.
        erasing: probability that a random rectangle is erased.
        mixup: mixup's alpha, the parameter of a Beta distribution; 0: off.
        cutmix: CutMix's alpha; 0: off. With mixup also on, each batch gets one of the two.
        mix_probability: probability that a batch is mixed.
    """

    crop: Crop = "none"
    scale_min: float = 0.08
    flip: float = 0.0
    rotation: float = 0.0
    color_jitter: float = 0.0
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0

    def check(self) -> None:
        """Raise a ValueError that names the first setting that makes no sense."""
        check_flag_choice("--augment.crop", self.crop, get_args(Crop))
        if not 0 < self.scale_min <= 1:
            raise ValueError(
                f"--augment.scale-min must be above 0 and at most 1, got {self.scale_min}; "
                "the paper takes 0.08"
            )
        ranges = {
            "flip": (0, 1),
            "rotation": (0, 180),
            "color_jitter": (0, math.inf),
            "randaugment_ops": (0, math.inf),
            "randaugment_magnitude": (0, 30),
            "erasing": (0, 1),
            "mixup": (0, math.inf),
            "cutmix": (0, math.inf),
            "mix_probability": (0, 1),
        }
        for field, (low, high) in ranges.items():
            value = getattr(self, field)
            if not (low <= value <= high and math.isfinite(value)):
                wanted = f"from {low} to {high}" if math.isfinite(high) else f"{low} or more"
                raise ValueError(f"{flag_of(f'augment.{field}')} must be {wanted}, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        name: one of ours (bl_resnet18 and so on, or the plain resnet18), torchvision:NAME,
            timm:NAME or package.module:function.
        alpha: how many times narrower each smaller branch is.
        beta: how many times shorter each smaller branch is.
        branches: number of branches; 1 is the plain network.
        stem: imagenet shrinks the picture to a quarter, small (8 to 64 pixels a side) keeps it.
        width: all widths times this; below 1 for networks that a CPU can train.
        start: checkpoint or run to start from, in place of a new network; all else of model is
            its own then.
        inherit: likewise, but a plain network that is converted with alpha, beta and branches; its
            weights move along.
    """

    name: str = "bl_resnet18"
    alpha: int = 2
    beta: int = 4
    branches: int = 2
    stem: Literal["imagenet", "small"] = "imagenet"
    width: float = 1.0
    start: str | None = None
    inherit: str | None = None


@dataclass(frozen=True)
class VisionConfig(TrainingConfig):
    """A training run on images: `TrainingConfig`, and the following.

    Attributes:
        model: which network.
        data: which pictures.
        augment: how they are varied in training.
        baseline: whether the plain network is trained as well afterwards, the same way, so that
            its figures stand beside.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    baseline: bool = False

    def check(self) -> None:
        """Check every value.

        Raises:
            ValueError: if one is out of range; it names the flag.
        """
        super().check()
        self.data.check()
        self.augment.check()
        if not self.model.width > 0:
            raise ValueError(f"--model.width must be above 0, got {self.model.width}; take 1")
        given = [name for name in ("start", "inherit") if getattr(self.model, name) is not None]
        if len(given) == 2:
            raise ValueError("give --model.start or --model.inherit, not both")
        if self.baseline and given:
            raise ValueError(
                "--baseline trains a plain network beside one that is built anew; with "
                f"--model.{given[0]} leave it out"
            )
