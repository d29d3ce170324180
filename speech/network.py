"""SpeechNet: a residual network of Big-Little modules over log-mel maps.

A map is (N, channels, mel bands, frames). The plan is that of Big-Little Net's acoustic models
(Chen et al., ICLR 2019) as far as it is known: 22 layers, that is a first convolution, ten basic
blocks of two convolutions and one linear layer, over 64 bands. Their widths were not to be had;
ours (`DEPTHS` and `WIDTHS` of `models.py`) come within 5 % of the 3.02 M parameters reported for
the plain network, and are such that beta 1, 2 and 3 all differ, which takes a stage of six blocks.

| layer | channels | blocks | bands | frames (time reduction 1, 2, 4) |
|---|---|---|---|---|
| 3x3 convolution | 64 | | 64 -> 32 | 1, 1/2, 1/2 |
| stage 1 | 64 | 2 | 32 -> 16 | 1, 1/2, 1/4 |
| stage 2 | 128 | 6 | 16 | 1, 1/2, 1/4 |
| stage 3, plain | 192 | 2 | 8 | 1, 1/2, 1/4 |
| linear, over all bands | classes | | 8 -> 1 | |

A Big-Little module's big branch runs at half the bands and half the frames. Frequency and time
stride on their own, so that frame labels may be as dense as the features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blnet.blocks import BasicBlock, conv_norm
from blnet.checks import check_choice, check_count
from blnet.kernels import merge
from blnet.module import BigLittleModule, check_branching, divide_width, make_stages
from blnet.network import initialise
from blnet.speech.masking import FrameMask, reduced

torch.fx.wrap("merge")

HeadName = Literal["keyword", "ctc", "frame"]
TIME_REDUCTIONS = (1, 2, 4)


@dataclass(frozen=True)
class SpeechNetConfig:
    """Everything that decides a network's shape.

    Attributes:
        depths: blocks L of each stage.
        widths: channels C of each stage; the first convolution is as wide as the first.
        alpha: how many times narrower each smaller branch is.
        beta: how many times shorter each smaller branch is.
        branches: number K of branches; 1 is the plain network.
        pyramid: channels of a pyramid of the branches' outputs that the answer also looks at; 0 for
            none.
        time_reduction: frames of the map to one of the answer: 1, 2 or 4.
        in_channels: channels of the map: 3 with first and second differences, else 1.
        bins: mel bands of the map. The last layer sees where along them its features lie.
        head: "keyword" answers once for a recording, from the mean over its frames; "ctc" and
            "frame" answer for every frame.
        num_classes: classes; of ctc and frame with the blank (class 0).

    Raises:
        ValueError: if a value is out of range or alpha does not divide the widths.
    """

    depths: tuple[int, ...] = (2, 6, 2)
    widths: tuple[int, ...] = (64, 128, 192)
    alpha: int = 4
    beta: int = 2
    branches: int = 2
    pyramid: int = 0
    time_reduction: int = 1
    in_channels: int = 1
    bins: int = 64
    head: HeadName = "keyword"
    num_classes: int = 10

    def __post_init__(self) -> None:
        check_branching(self.alpha, self.beta, self.branches)
        check_choice("head", self.head, get_args(HeadName))
        check_choice("time_reduction", self.time_reduction, TIME_REDUCTIONS)
        for name, least in (
            ("in_channels", 1),
            ("bins", 1),
            ("num_classes", 1),
            ("pyramid", 0),
        ):
            check_count(name, getattr(self, name), least)
        if len(self.depths) != len(self.widths) or len(self.depths) < 2:
            raise ValueError(
                f"depths and widths must name the same two or more stages, got {self.depths} and "
                f"{self.widths}"
            )
        for value in (*self.depths, *self.widths):
            check_count("each of depths and widths", value, 1)
        for width in self.widths[:-1]:
            divide_width(width, self.alpha, self.branches - 1)

    @property
    def bands(self) -> int:
        """Mel bands that are left after the last stage."""
        return math.ceil(self.bins / (1 << len(self.depths)))

    @property
    def stem_stride(self) -> int:
        """Stride of the first convolution in time."""
        return 2 if self.time_reduction > 1 else 1

    @property
    def stage_stride(self) -> int:
        """Stride in time between the first stage and the second."""
        return self.time_reduction // self.stem_stride


class SpeechNet(nn.Module):
    """A network from log-mel maps to the logits of words, characters or frame labels.

    In evaluation mode the answer for a recording is the same, but for rounding, whatever it is
    padded with and whichever batch it sits in, where its length is given.

    Args:
        config: the network's shape.
    """

    def __init__(self, config: SpeechNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SpeechNetConfig()
        width, stride = config.widths[0], (2, config.stem_stride)
        self.stem = nn.Sequential(
            *conv_norm(config.in_channels, width, 3, stride), nn.ReLU(inplace=True)
        )
        self.stages = nn.ModuleList(_make_stages(config))
        self.pyramid = (
            Pyramid(config.widths, config.pyramid, config.stage_stride) if config.pyramid else None
        )
        channels = config.widths[-1] + config.pyramid
        self.fc = nn.Linear(channels * config.bands, config.num_classes)
        self.apply(initialise)
        # The first answers are even. The features of all bands are many, and what they would say at
        # random is said so firmly that CTC does not get away from it again.
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self._mask = FrameMask()
        self._mask.watch(self)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the logits of a batch of maps.

        Args:
            x: (N, in_channels, bins, frames); what stands behind a recording's end does not
                matter.
            lengths: frames of each recording (N,), whole numbers from 1 to frames; None where all
                are as long as the map.

        Returns:
            (N, num_classes) of a keyword head, (N, output_lengths(frames), num_classes) of others.

        Raises:
            ValueError: if the map has other channels or bands than the network, or there is not one
                length for each recording.
        """
        expected = (self.config.in_channels, self.config.bins)
        if x.ndim != 4 or x.shape[1:3] != expected:
            raise ValueError(
                f"x must be (N, {expected[0]}, {expected[1]}, frames), got shape {tuple(x.shape)}; "
                "make the maps with the features that the network was trained with"
            )
        if lengths is None:
            return self.forward_head(self.forward_features(x))
        if lengths.shape != x.shape[:1]:
            raise ValueError(
                f"lengths must be one number for each of {x.shape[0]} recordings, got shape "
                f"{tuple(lengths.shape)}"
            )
        halvings = self.config.time_reduction.bit_length() - 1 + self.config.branches - 1
        self._mask.set(lengths, x.shape[-1], halvings)
        try:
            return self.forward_head(self.forward_features(x), self.output_lengths(lengths))
        finally:
            self._mask.clear()

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the frames of the answers to recordings of so many frames."""
        return reduced(lengths, self.config.time_reduction)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return what the last layer looks at (N, channels x bands, frames) of whole maps."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            if self.pyramid is not None and isinstance(stage, BigLittleModule):
                merged = stage.merged(x)
                maps.append(merged)
                assert stage.fusion is not None
                x = stage.fusion(merged)
            else:
                x = stage(x)
                maps.append(x)
        if self.pyramid is not None:
            x = torch.cat([x, self._at_last_bands(self.pyramid(maps))], 1)
        return x.flatten(1, 2)

    def _at_last_bands(self, fine: Tensor) -> Tensor:
        """Return means of the first stage's bands (N, channels, bands, frames), as the last's."""
        finest, bands = math.ceil(self.config.bins / 2), self.config.bands
        if finest % bands:
            return F.adaptive_avg_pool2d(fine, (bands, None))
        # The same means; the gradient of adaptive pools is not deterministic on a GPU.
        return F.avg_pool2d(fine, (finest // bands, 1))

    def forward_head(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the logits of features; lengths are those of the answers."""
        if self.config.head == "keyword":
            logits: Tensor = self.fc(mean_over_frames(features, lengths))
        else:
            logits = self.fc(features.transpose(1, 2))
        return logits


class Pyramid(nn.Module):
    """A feature pyramid over the stages' maps, from the coarsest to the finest.

    Each map goes through a 1x1 convolution and is added to what comes from the coarser ones,
    enlarged; a 3x3 convolution looks at the sum. (After Lin et al., "Feature Pyramid Networks",
    2017; the paper's own pyramid was not described.)

    Args:
        widths: channels of the maps, the finest first.
        channels: of the pyramid.
        time_stride: stride of the last convolution in time, which brings the finest map to the
            frames of the coarsest.
    """

    def __init__(self, widths: tuple[int, ...], channels: int, time_stride: int = 1) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(*conv_norm(width, channels, 1)) for width in widths
        )
        self.smooth = nn.Sequential(
            *conv_norm(channels, channels, 3, (1, time_stride)), nn.ReLU(inplace=True)
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return the pyramid (N, channels, bands of the finest map, frames of the coarsest)."""
        out: Tensor = torch.relu(self.laterals[-1](maps[-1]))
        for lateral, finer in zip(reversed(self.laterals[:-1]), reversed(maps[:-1]), strict=True):
            out = merge(out, lateral(finer))
        smooth: Tensor = self.smooth(out)
        return smooth


def mean_over_frames(features: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the mean (N, channels) of features (N, channels, frames) over each one's frames."""
    if lengths is None:
        return features.mean(2)
    frames = torch.arange(features.shape[2], device=features.device)
    inside = (frames < lengths[:, None])[:, None]
    total = features.where(inside, 0).sum(2)
    return total / lengths[:, None].to(total.dtype)


def _make_stages(config: SpeechNetConfig) -> list[nn.Module]:
    # From each stage to the next the bands are halved; the time only after the first stage.
    strides = [(1, 1), (2, config.stage_stride), *[(2, 1)] * (len(config.depths) - 2)]
    return make_stages(
        partial(BasicBlock, pooled_shortcut=config.branches > 1),
        config.widths[0],
        config.depths,
        config.widths,
        strides,
        alpha=config.alpha,
        beta=config.beta,
        branches=config.branches,
    )
