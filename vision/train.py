"""``blnet train vision``: trains a network on images, and the plain one beside it where asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from blnet.registry import is_big_little
from blnet.training.devices import make_accelerator, shared
from blnet.training.options import parse
from blnet.training.run import default_folder, describe, report_stop, run
from blnet.training.stopping import Interrupted
from blnet.vision.config import ModelConfig, VisionConfig
from blnet.vision.task import ImageTask
from blnet.vision.task import describe as describe_model

PROG = "blnet train vision"
RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "digits"
BASELINE = "baseline"  # the plain network's folder inside the run's


def main(words: Sequence[str]) -> int:
    """Train as the flags say; see ``blnet train vision --help``.

    Returns:
        The exit status: 0 when the run is finished, 130 or 143 when a signal stopped it.
    """
    config, recipe = parse(
        VisionConfig,
        PROG,
        "Train a network on images. Without flags: bL-ResNet-18 on scikit-learn's digits, and "
        "ResNet-18 beside it, in minutes on a CPU.",
        RECIPES,
        DEFAULT_RECIPE,
        words,
    )
    config.check()
    return train(config, recipe)


def train(config: VisionConfig, recipe: str) -> int:
    """Train the network of a configuration, and its plain one if it says so; print both."""
    accelerator = make_accelerator(config)
    folder = Path(shared(config.output or str(default_folder("vision", recipe)), accelerator))
    # On each machine one process first, which downloads where that was asked for.
    with accelerator.local_main_process_first():
        task = ImageTask(config)
    lines = []
    for each, place in _runs(config, folder):
        task = ImageTask(each, task.data)
        try:
            summary = run(task, each, place, accelerator)
        except Interrupted as stop:
            if accelerator.is_main_process:
                report_stop(stop, PROG, folder)
            return stop.status
        lines.append(describe(describe_model(each.model), summary, task))
    if accelerator.is_main_process:
        print("\n".join(lines))
        print(f"the best network: {folder / 'best.safetensors'}; try it: blnet predict vision "
              f"FILE --checkpoint {folder}")  # fmt: skip
    return 0


def _runs(config: VisionConfig, folder: Path) -> list[tuple[VisionConfig, Path]]:
    """Return the runs: the network's and, where it has a plain one, that one's."""
    runs = [(config, folder)]
    plain = plain_of(config.model)
    if config.baseline and plain != config.model:
        runs.append((dataclasses.replace(config, model=plain, baseline=False), folder / BASELINE))
    return runs


def plain_of(model: ModelConfig) -> ModelConfig:
    """Return a Big-Little network's plain one, which has one branch; of any other, itself."""
    return dataclasses.replace(model, branches=1) if is_big_little(model.name) else model
