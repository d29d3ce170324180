"""Big-Little networks for images, and the plain networks they are held against, by name.

Stage plans, widths and settings: Chen et al., "Big-Little Net", ICLR 2019, and its published
networks. With branches=1 each builder gives the plain network of the same name, with that
network's own stage plan.
"""

from __future__ import annotations

from collections.abc import Callable

import torchvision
from torch import nn

from blnet.network import BigLittleConfig, BigLittleNet, StemName
from blnet.registry import register

# Blocks a stage: of the Big-Little networks, and of the plain ones.
DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (4, 8, 18, 3),
    152: (5, 12, 30, 3),
}
PLAIN_DEPTHS = {**DEPTHS, 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BASIC_WIDTHS = (64, 128, 256, 512)
BOTTLENECK_WIDTHS = (256, 512, 1024, 2048)
STEM_WIDTH = 64
SE_REDUCTION = 16

PLAIN_MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


def _scaled(channels: int, width: float) -> int:
    """Return channels times a width.

    Raises:
        ValueError: if that is no whole number of at least 1.
    """
    product = channels * width
    if not (product >= 1 and product == int(product)):
        raise ValueError(
            f"width {width:g} makes {product:g} channels of {channels}; take one that gives whole "
            "numbers, 0.5 say"
        )
    return int(product)


def _bl_net(
    depth: int,
    alpha: int,
    beta: int,
    branches: int,
    num_classes: int,
    in_channels: int,
    stem: StemName,
    cardinality: int = 1,
    base_width: int = 64,
    se_reduction: int = 0,
    width: float = 1.0,
) -> BigLittleNet:
    basic = depth < 50
    return BigLittleNet(
        BigLittleConfig(
            block="basic" if basic else "bottleneck",
            depths=(DEPTHS if branches > 1 else PLAIN_DEPTHS)[depth],
            widths=tuple(_scaled(w, width) for w in (BASIC_WIDTHS if basic else BOTTLENECK_WIDTHS)),
            alpha=alpha,
            beta=beta,
            branches=branches,
            cardinality=cardinality,
            base_width=base_width,
            se_reduction=se_reduction,
            stem=stem,
            stem_width=_scaled(STEM_WIDTH, width),
            in_channels=in_channels,
            num_classes=num_classes,
        )
    )


def _builder(
    name: str, text: str, depth: int, cardinality: int = 1, base_width: int = 64, se: bool = False
) -> Callable[..., BigLittleNet]:
    def build(
        alpha: int = 2,
        beta: int = 4,
        branches: int = 2,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: StemName = "imagenet",
        width: float = 1.0,
    ) -> BigLittleNet:
        return _bl_net(
            depth,
            alpha,
            beta,
            branches,
            num_classes,
            in_channels,
            stem,
            cardinality,
            base_width,
            SE_REDUCTION if se else 0,
            width,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Return {text}.

    Args:
        alpha: how many times narrower each smaller branch is.
        beta: how many times shorter each smaller branch is.
        branches: number of branches; 1 gives the plain network.
        num_classes: classes; 0 leaves the classifier out.
        in_channels: channels of the image.
        stem: "imagenet" shrinks the image to a quarter, "small" (8 to 64 pixels a side) keeps it.
        width: all widths times this.

    Returns:
        A network from images (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        ValueError: if a value is out of range or does not divide the widths.
    """
    register(name, build, big_little=True)
    return build


bl_resnet18 = _builder("bl_resnet18", "bL-ResNet-18", 18)
bl_resnet34 = _builder("bl_resnet34", "bL-ResNet-34", 34)
bl_resnet50 = _builder("bl_resnet50", "bL-ResNet-50", 50)
bl_resnet101 = _builder("bl_resnet101", "bL-ResNet-101", 101)
bl_resnet152 = _builder("bl_resnet152", "bL-ResNet-152", 152)
bl_resnext50_32x4d = _builder("bl_resnext50_32x4d", "bL-ResNeXt-50 (32x4d)", 50, 32, 4)
bl_resnext101_32x4d = _builder("bl_resnext101_32x4d", "bL-ResNeXt-101 (32x4d)", 101, 32, 4)
bl_resnext101_64x4d = _builder("bl_resnext101_64x4d", "bL-ResNeXt-101 (64x4d)", 101, 64, 4)
bl_seresnext50_32x4d = _builder(
    "bl_seresnext50_32x4d", "bL-SEResNeXt-50 (32x4d)", 50, 32, 4, se=True
)
bl_seresnext101_32x4d = _builder(
    "bl_seresnext101_32x4d", "bL-SEResNeXt-101 (32x4d)", 101, 32, 4, se=True
)


def plain(
    name: str,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem: StemName = "imagenet",
    width: float = 1.0,
) -> nn.Module:
    """Return one of torchvision's networks, untrained, with the options that ours have.

    The last BN weight of each residual branch is 0, as in the paper and in our networks.

    Args:
        name: one of `PLAIN_MODELS`.
        num_classes: classes; 0 leaves the classifier out.
        in_channels: channels of the image.
        stem: "small" puts a 3x3 convolution in place of the 7x7 one and leaves the pool out.
        width: all widths times this; other than 1, which torchvision's do not know, the network is
            ours with one branch, and only for ResNets.

    Raises:
        ValueError: if a value is out of range.
    """
    for option, value, least in (("num_classes", num_classes, 0), ("in_channels", in_channels, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{option} must be a whole number of at least {least}, got {value!r}")
    if stem not in ("imagenet", "small"):
        raise ValueError(f"stem must be one of imagenet, small, got {stem!r}")
    if width != 1:
        depth = name.removeprefix("resnet")
        if not depth.isdecimal():
            raise ValueError(f"width must be 1 for {name}, got {width:g}; ResNets take any")
        return _bl_net(int(depth), 2, 4, 1, num_classes, in_channels, stem, width=width)
    # Residual branches start silent, as ours do: then both train with the same recipe.
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=max(num_classes, 1), zero_init_residual=True
    )
    if num_classes == 0:
        model.fc = nn.Identity()
    if stem == "small":
        model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def _register_plain(name: str) -> None:
    def build(
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: StemName = "imagenet",
        width: float = 1.0,
    ) -> nn.Module:
        return plain(name, num_classes, in_channels, stem, width)

    register(name, build, big_little=False)


for _name in PLAIN_MODELS:
    _register_plain(_name)
