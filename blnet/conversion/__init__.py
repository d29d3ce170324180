"""Turning any ResNet-like network into its Big-Little variant."""

from blnet.conversion.converter import convert
from blnet.conversion.plan import BranchPlan, ConversionPlan, StagePlan

__all__ = ["BranchPlan", "ConversionPlan", "StagePlan", "convert"]
