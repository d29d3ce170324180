"""Every speech recipe says what its name promises."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import get_args

import pytest
import torch

from blnet import registry
from blnet.speech.config import SpeechConfig, TaskName
from blnet.speech.models import bl_resnet22
from blnet.speech.network import SpeechNet
from blnet.speech.task import TIME_REDUCTION, describe
from blnet.speech.train import COMMAND, DEFAULT_RECIPES

NAMES = sorted(path.stem for path in COMMAND.recipes.glob("*.yaml"))
# Recipe -> (its task, its corpus), by the name that it bears.
PROMISED = {
    "keyword": ("keyword", "synth"),
    "sentences": ("ctc", "synth"),
    "frames": ("frame", "synth"),
    "speech_commands": ("keyword", "speech_commands"),
    "fsdd": ("keyword", "fsdd"),
    "yesno": ("ctc", "yesno"),
    "so762": ("ctc", "manifest"),
    "librispeech": ("ctc", "librispeech"),
}


def recipe(name: str, *flags: str) -> SpeechConfig:
    config, found = COMMAND.parse(["--recipe", name, *flags])
    assert found == name
    assert isinstance(config, SpeechConfig)
    return config


def build(config: SpeechConfig) -> SpeechNet:
    """Return the recipe's network on the meta device, for ten classes."""
    model, features = config.model, config.features
    assert registry.is_big_little(model.name)
    with torch.device("meta"):
        return bl_resnet22(
            model.alpha, model.beta, model.branches, model.pyramid, head=config.task,
            time_reduction=model.time_reduction or TIME_REDUCTION[config.task],
            in_channels=features.channels, bins=features.bins, width=model.width,
        )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_is_valid_builds_its_network_and_says_what_it_gives(name: str) -> None:
    config = recipe(name)
    config.check()
    network = build(config)
    maps = torch.zeros(2, config.features.channels, config.features.bins, 50, device="meta")
    assert network(maps).shape[-1] == 10
    assert describe(config.model).startswith("bl_resnet22 (alpha ")
    text = (COMMAND.recipes / f"{name}.yaml").read_text()
    comment = text.partition("\ntask:")[0]
    assert comment != text, "the task comes first"
    assert all(line.startswith("#") for line in comment.splitlines())
    said = comment.lower()
    assert "\n# run on " in said or "not run" in said, (
        "it says where it was run, or that it was not"
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_does_what_its_name_promises(name: str) -> None:
    config = recipe(name)
    assert (config.task, config.data.name) == PROMISED[name]
    # What a user has to name or to allow is no recipe's choice.
    assert (config.data.path, config.data.labels) == (None, None)
    assert not config.data.download
    assert config.output is None
    if config.task == "frame":
        assert config.augment.shift == 0
        assert not config.baseline
    comment = (COMMAND.recipes / f"{name}.yaml").read_text().partition("\ntask:")[0]
    assert ("--data.path" in comment) == (config.data.name != "synth")
    assert ("--data.labels" in comment) == (config.task == "frame")


@pytest.mark.parametrize("task", get_args(TaskName))
@pytest.mark.parametrize("words", [["--task", "{}"], ["--lr=1", "--task={}"]])
def test_each_task_has_a_recipe_of_its_own(task: TaskName, words: list[str]) -> None:
    words = [word.format(task) for word in words]
    name = COMMAND.default_recipe(words)
    expected = {"keyword": "keyword", "ctc": "sentences", "frame": "frames"}
    assert name == DEFAULT_RECIPES[task] == expected[task]
    assert name in NAMES
    config, found = COMMAND.parse(words)
    assert found == name
    assert config == recipe(name, *words)
    assert config.task == task


def test_without_a_task_it_is_keywords() -> None:
    for words in ([], ["--task"], ["--task=words"], ["--seed", "ctc"]):
        assert COMMAND.default_recipe(words) == "keyword"
    config, found = COMMAND.parse([])
    assert (config.task, found) == ("keyword", "keyword")


def test_flags_count_more_than_the_recipe_wherever_it_stands() -> None:
    config, found = COMMAND.parse(["--lr", "0.3", "--recipe=yesno", "--task", "keyword"])
    assert config.optimizer.lr == 0.3
    assert (config.task, config.data.name) == ("keyword", "yesno")
    assert Path(found).stem == "yesno"


def test_the_plain_network_of_a_recipe_is_its_own_with_one_branch() -> None:
    model = recipe("keyword").model
    plain = COMMAND.plain_of(model)
    assert (plain.branches, plain.pyramid, plain.width) == (1, False, model.width)
    assert describe(plain) == "resnet22 (width 0.25)"
    assert COMMAND.plain_of(plain) == plain


@pytest.mark.parametrize("name", ["keyword", "sentences", "yesno"])
def test_the_commands_that_a_run_ends_with_are_ones_to_paste(name: str) -> None:
    for command in COMMAND.advice(recipe(name), Path("my runs/a b")).split("; "):
        assert "my runs/a b" in shlex.split(command.partition(": ")[2])
