"""A Big-Little network under torchvision's detectors: its four stages and a feature pyramid.

    backbone = fpn_backbone(bl_resnet50())
    detector = torchvision.models.detection.FasterRCNN(backbone, num_classes=21)

The maps are those of `blnet.vision.features`, whose docstring says which tensor is which stage's.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from blnet.checks import check_count
from blnet.network import BigLittleNet
from blnet.vision.features import feature_info, feature_maps

_LEVELS = 4  # beside the pyramid's "pool", torchvision's own anchors are of five sizes


class StageMaps(nn.Module):
    """The stem and the stages of a network, which they share with it; no classifier.

    Args:
        model: the network.
    """

    def __init__(self, model: BigLittleNet) -> None:
        super().__init__()
        self.stem = model.stem
        self.stages = model.stages

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (N, in_channels, H, W) to a map (N, C, H / s, W / s) for each stage.

        s is 4, 8, 16, 32, and sizes are rounded up.
        """
        return feature_maps(self.stem, self.stages, x)[1:]


class FpnBackbone(nn.Module):
    """Feature maps and torchvision's feature pyramid on top, as its detectors want them.

    Args:
        body: gives a list of maps of images.
        channels: channels of each of them.
        out_channels: channels of every map of the pyramid.
    """

    def __init__(self, body: nn.Module, channels: Sequence[int], out_channels: int = 256) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(channels), out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (N, in_channels, H, W) to maps (N, out_channels, H / s, W / s).

        They go by "0", "1", "2" and "3" with s = 4, 8, 16 and 32, and "pool" with s = 64: the
        names that torchvision's `FasterRCNN` looks for. Sizes are rounded up.
        """
        maps = OrderedDict((str(index), m) for index, m in enumerate(self.body(x)))
        return cast("dict[str, Tensor]", self.fpn(maps))


def fpn_backbone(model: nn.Module, out_channels: int = 256) -> FpnBackbone:
    """Return a backbone for torchvision's detectors.

    Args:
        model: a `BigLittleNet`, from blnet or from timm, whose stem and stages are shared with it;
            or what `timm.create_model(..., features_only=True)` gave of any network. Of more than
            four levels a warning tells: torchvision's detectors as they come look for "0" to "3".
        out_channels: channels of every map of the pyramid.

    Raises:
        ValueError: if the network is neither, or `out_channels` is no whole number of at least 1.
    """
    check_count("out_channels", out_channels, 1)
    if isinstance(model, BigLittleNet):
        channels = [level["num_chs"] for level in feature_info(model.config)[1:]]
        return FpnBackbone(StageMaps(model), channels, out_channels)
    channels_of = getattr(getattr(model, "feature_info", None), "channels", None)
    if not callable(channels_of):
        raise ValueError(
            f"model must be a BigLittleNet or a network of timm's with features_only=True, got "
            f"{type(model).__name__}; build one with blnet.vision.bl_resnet50()"
        )
    channels = channels_of()
    if len(channels) > _LEVELS:
        last = tuple(range(len(channels)))[-_LEVELS:]
        warnings.warn(
            f"model gives {len(channels)} maps, and torchvision's detectors as they come take "
            f"{_LEVELS}: build it with out_indices={last}, or give the detector anchors for all",
            stacklevel=2,
        )
    return FpnBackbone(model, channels, out_channels)
