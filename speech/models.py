"""Speech networks by name: bL-ResNet-22 and the plain ResNet-22 it is held against."""

from __future__ import annotations

from blnet.registry import register
from blnet.speech.network import HeadName, SpeechNet, SpeechNetConfig

DEPTHS = (2, 6, 2)
WIDTHS = (64, 128, 192)
PYRAMID = 128  # channels of the pyramid
_WIDTH_STEP = 8  # widths are whole multiples, which every alpha in use divides


def scaled(channels: int, width: float) -> int:
    """Return channels times a width, to the nearest multiple of 8, and at least 8."""
    return max(_WIDTH_STEP, round(channels * width / _WIDTH_STEP) * _WIDTH_STEP)


def bl_resnet22(
    alpha: int = 4,
    beta: int = 2,
    branches: int = 2,
    pyramid: bool = False,
    *,
    num_classes: int = 10,
    head: HeadName = "keyword",
    time_reduction: int = 1,
    in_channels: int = 1,
    bins: int = 64,
    width: float = 1.0,
) -> SpeechNet:
    """Return bL-ResNet-22.

    Args:
        alpha: how many times narrower each smaller branch is.
        beta: how many times shorter each smaller branch is.
        branches: number of branches; 1 gives the plain network.
        pyramid: whether the answer also looks at a pyramid of the branches' outputs
            (bL-PYR-ResNet-22).
        num_classes: classes; of ctc and frame with the blank (class 0).
        head: "keyword" answers once for a recording, "ctc" and "frame" for every frame.
        time_reduction: frames of the map to one of the answer: 1, 2 or 4.
        in_channels: channels of the map: 3 with first and second differences, else 1.
        bins: mel bands of the map.
        width: all widths times this, to the nearest multiple of 8.

    Returns:
        A network from log-mel maps (N, in_channels, bins, frames) and their lengths (N,) to
        logits; see `SpeechNet.forward`.

    Raises:
        ValueError: if a value is out of range or alpha does not divide the widths.
    """
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width}; 1 is the full network")
    return SpeechNet(
        SpeechNetConfig(
            depths=DEPTHS,
            widths=tuple(scaled(channels, width) for channels in WIDTHS),
            alpha=alpha,
            beta=beta,
            branches=branches,
            pyramid=scaled(PYRAMID, width) if pyramid else 0,
            time_reduction=time_reduction,
            in_channels=in_channels,
            bins=bins,
            head=head,
            num_classes=num_classes,
        )
    )


def resnet22(
    *,
    num_classes: int = 10,
    head: HeadName = "keyword",
    time_reduction: int = 1,
    in_channels: int = 1,
    bins: int = 64,
    width: float = 1.0,
) -> SpeechNet:
    """Return plain ResNet-22; the arguments are those of :func:`bl_resnet22`."""
    return bl_resnet22(
        branches=1,
        num_classes=num_classes,
        head=head,
        time_reduction=time_reduction,
        in_channels=in_channels,
        bins=bins,
        width=width,
    )


register("bl_resnet22", bl_resnet22, big_little=True)
register("resnet22", resnet22, big_little=False)
