"""``blnet train vision``: trains a network on images, and the plain one beside it where asked."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from blnet.registry import is_big_little
from blnet.trained import TRUST_SOURCE, needs_trust
from blnet.training.command import TrainCommand
from blnet.vision.config import ModelConfig, VisionConfig
from blnet.vision.task import ImageTask, describe


class TrainVision(TrainCommand):
    """Training on images."""

    kind = "vision"
    config = VisionConfig
    own_data = ("folder", "npz")
    description = (
        "Train a network on images. Without flags: bL-ResNet-18 on scikit-learn's digits, and "
        "ResNet-18 beside it, in minutes on a CPU."
    )
    recipes = Path(__file__).parent / "recipes"

    def default_recipe(self, words: Sequence[str]) -> str:
        """Return the recipe of a command line that names none."""
        return "digits"

    def make_task(self, config: VisionConfig, earlier: ImageTask | None = None) -> ImageTask:
        """Return the task of a configuration."""
        return ImageTask(config, None if earlier is None else earlier.data)

    def plain_of(self, model: ModelConfig) -> ModelConfig:
        """Return a Big-Little network's plain one, which has one branch; of any other, itself."""
        return dataclasses.replace(model, branches=1) if is_big_little(model.name) else model

    def describe(self, model: ModelConfig) -> str:
        """Return what a network is called."""
        return describe(model)

    def advice(self, config: VisionConfig, folder: Path) -> str:
        """Return what to do with the trained network."""
        # Code that the flag was given for may have been a teacher's alone.
        try:
            flag = f" {TRUST_SOURCE}" if needs_trust(folder) else ""
        except (OSError, ValueError):  # of a run that ended before, moved away since
            flag = ""
        return f"try it: blnet predict vision FILE --checkpoint {shlex.quote(str(folder))}{flag}"


COMMAND = TrainVision()
main = COMMAND.main
