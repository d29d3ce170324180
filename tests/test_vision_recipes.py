"""Every recipe says what its name promises."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from blnet.training.optimization import make_ema
from blnet.vision.config import VisionConfig
from blnet.vision.preprocessing import IMAGENET
from blnet.vision.task import build_network
from blnet.vision.train import COMMAND

NAMES = sorted(path.stem for path in COMMAND.recipes.glob("*.yaml"))
EXPECTED = {"cifar10", "cifar10_cpu", "digits", "imagenet_modern", "imagenet_paper", "imagenette"}


def recipe(name: str, *flags: str) -> VisionConfig:
    config, found = COMMAND.parse(["--recipe", name, *flags])
    assert found == Path(name).stem
    return config


def test_all_are_there() -> None:
    assert set(NAMES) == EXPECTED


@pytest.mark.parametrize("name", NAMES)
def test_each_is_valid_builds_its_network_and_says_what_it_gives(name: str) -> None:
    config = recipe(name)
    config.check()
    with torch.device("meta"):
        build_network(config.model, 10, IMAGENET)
    comment = (COMMAND.recipes / f"{name}.yaml").read_text().split("epochs:")[0].lower()
    assert comment.startswith("#")
    assert " run" in comment, "a recipe says where it was run, or that it was not"


def test_the_paper_s_recipe_is_the_paper_s() -> None:
    # Chen et al., ICLR 2019, and the published code.
    config = recipe("imagenet_paper")
    assert (config.epochs, config.batch_size, config.accumulate) == (110, 256, 1)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("sgd", 0.1, 0.9)
    assert optimizer.nesterov
    assert (optimizer.weight_decay, optimizer.decay_norms, optimizer.clip_norm) == (1e-4, True, 0)
    schedule = config.schedule
    assert (schedule.name, schedule.warmup_epochs, schedule.min_lr) == ("cosine", 0, 0)
    assert (config.label_smoothing, config.ema.decay, config.precision) == (0, 0, "fp32")
    augment = config.augment
    assert (augment.crop, augment.scale_min, augment.flip) == ("resized", 0.08, 0.5)
    assert (augment.color_jitter, augment.rotation) == (0.4, 0)
    assert (augment.randaugment_ops, augment.erasing, augment.mixup, augment.cutmix) == (0,) * 4
    assert (config.data.name, config.data.size, config.data.crop_ratio) == ("imagenet", 224, 0.875)
    model = config.model
    assert (model.name, model.alpha, model.beta) == ("bl_resnet50", 2, 4)
    assert (model.branches, model.stem, model.width) == (2, "imagenet", 1)


@pytest.mark.parametrize(("name", "images"), [("cifar10", 50_000), ("imagenet_modern", 1_281_167)])
def test_an_average_comes_to_its_decay_and_forgets_the_start(name: str, images: int) -> None:
    config = recipe(name)
    steps = config.epochs * (images // config.batch_size)
    ema = make_ema(nn.Linear(1, 1), config.ema)
    assert ema is not None
    assert ema.get_decay(steps) == config.ema.decay
    assert config.ema.decay**steps < 1e-6


def test_flags_count_more_than_the_recipe_wherever_it_stands() -> None:
    config, _ = COMMAND.parse(["--lr", "0.3", "--recipe=cifar10"])
    assert config.optimizer.lr == 0.3
    assert config.data.name == "cifar10"


def test_the_command_that_a_run_ends_with_is_one_to_paste() -> None:
    command = COMMAND.advice(recipe("digits"), Path("my runs/a b")).partition(": ")[2]
    assert shlex.split(command)[-1] == "my runs/a b"
