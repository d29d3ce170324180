"""``blnet train speech``: trains a network on speech, and the plain one beside it where asked."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

from blnet.registry import is_big_little
from blnet.speech.config import ModelConfig, SpeechConfig, TaskName
from blnet.speech.task import SpeechTask, describe
from blnet.speech.tasks import make_task
from blnet.training.command import TrainCommand

DEFAULT_RECIPES: dict[str, str] = {"keyword": "keyword", "ctc": "sentences", "frame": "frames"}


class TrainSpeech(TrainCommand):
    """Training on speech."""

    kind = "speech"
    config = SpeechConfig
    own_data = ("folder", "manifest")
    description = (
        "Train a network on speech: to tell words (--task keyword), to write down what is said "
        "(ctc), or to label every frame (frame). Without flags: bL-ResNet-22 on ten words that "
        "eSpeak NG speaks, in minutes on a CPU."
    )
    recipes = Path(__file__).parent / "recipes"

    def default_recipe(self, words: Sequence[str]) -> str:
        """Return the recipe of a command line that names none; it goes by --task."""
        return DEFAULT_RECIPES[_task_of(words)]

    def make_task(self, config: SpeechConfig, earlier: SpeechTask | None = None) -> SpeechTask:
        """Return the task of a configuration."""
        return make_task(config, None if earlier is None else earlier.data)

    def plain_of(self, model: ModelConfig) -> ModelConfig:
        """Return a Big-Little network's plain one, which has one branch; of any other, itself."""
        if not is_big_little(model.name):
            return model
        return dataclasses.replace(model, branches=1, pyramid=False)

    def describe(self, model: ModelConfig) -> str:
        """Return what a network is called."""
        return describe(model)

    def advice(self, config: SpeechConfig, folder: Path) -> str:
        """Return what to do with the trained network."""
        name = shlex.quote(str(folder))
        if config.task == "keyword":
            return f"try it: blnet predict speech FILE --checkpoint {name}"
        text = f"try it: blnet transcribe FILE --checkpoint {name}"
        if not config.ngrams:
            return text
        words = f"blnet ngrams {name} --output words.arpa --order {config.ngrams}"
        return f"{text}; a --language-model for it: {words}"


def _task_of(words: Sequence[str]) -> TaskName:
    """Return the task that a command line names, keyword if it names none that there is."""
    given = [word.partition("=")[2] for word in words if word.startswith("--task=")]
    given += [after for word, after in pairwise(words) if word == "--task"]
    known: tuple[TaskName, ...] = get_args(TaskName)
    return next((name for name in known if name in given), "keyword")


COMMAND = TrainSpeech()
main = COMMAND.main
