"""Big-Little networks for images."""

from blnet.vision.models import (
    bl_resnet18,
    bl_resnet34,
    bl_resnet50,
    bl_resnet101,
    bl_resnet152,
    bl_resnext50_32x4d,
    bl_resnext101_32x4d,
    bl_resnext101_64x4d,
    bl_seresnext50_32x4d,
    bl_seresnext101_32x4d,
)

__all__ = [
    "bl_resnet18",
    "bl_resnet34",
    "bl_resnet50",
    "bl_resnet101",
    "bl_resnet152",
    "bl_resnext50_32x4d",
    "bl_resnext101_32x4d",
    "bl_resnext101_64x4d",
    "bl_seresnext50_32x4d",
    "bl_seresnext101_32x4d",
]
