"""What `blnet train vision` and `blnet train speech` share: flags, the runs, and what is said."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from blnet.environment import command_line
from blnet.trained import check_task
from blnet.training.config import TrainingConfig
from blnet.training.devices import make_accelerator, shared
from blnet.training.options import given, parse
from blnet.training.run import default_folder, describe, report_stop, run
from blnet.training.stopping import Interrupted
from blnet.training.task import Task

BASELINE = "baseline"  # the plain network's folder inside the run's


class TrainCommand(ABC):
    """A command that trains a network and, where its recipe says so, the plain one beside it.

    Attributes:
        kind: what is trained on, "vision" say.
        config: class of the configuration, which has `model`, `data` and `baseline`.
        own_data: data sets of the user's, which go by the name of their path.
        description: for --help.
        recipes: folder of the recipes.
    """

    kind: ClassVar[str]
    config: ClassVar[type[TrainingConfig]]
    own_data: ClassVar[tuple[str, ...]]
    description: ClassVar[str]
    recipes: ClassVar[Path]

    @property
    def prog(self) -> str:
        """The command's name."""
        return f"blnet train {self.kind}"

    @abstractmethod
    def default_recipe(self, words: Sequence[str]) -> str:
        """Return the recipe of a command line that names none."""

    @abstractmethod
    def make_task(self, config: Any, earlier: Any = None) -> Task:
        """Return the task of a configuration.

        Args:
            config: of the class `config`.
            earlier: a task of this class over the same data, which need not be loaded again.
        """

    @abstractmethod
    def plain_of(self, model: Any) -> Any:
        """Return the plain network's `config.model`; a plain one's is itself."""

    @abstractmethod
    def describe(self, model: Any) -> str:
        """Return what a network is called."""

    @abstractmethod
    def advice(self, config: Any, folder: Path) -> str:
        """Return what to do with the trained network."""

    def parse(self, words: Sequence[str]) -> tuple[Any, str]:
        """Return the configuration that flags stand for, and the name of its recipe.

        A plain network that only the recipe asks for is left out beside a trained one.

        Raises:
            ValueError: if a value is out of range.
        """
        return self._parsed(words)[:2]

    def _parsed(self, words: Sequence[str]) -> tuple[Any, str, str]:
        """Return what `parse` returns, and what to say of a plain network that is left out."""
        config: Any
        config, recipe = parse(
            self.config,
            self.prog,
            self.description,
            self.recipes,
            self.default_recipe(words),
            words,
        )
        note = ""
        started = _started(config)
        if started and config.baseline and BASELINE not in given(self.config, words):
            config = dataclasses.replace(config, baseline=False)
            note = (f"--model.{started[0]} takes a trained network, so that the plain one which "
                    f"recipe {recipe} trains beside a new one is left out")  # fmt: skip
        config.check()
        return config, recipe, note

    def main(self, words: Sequence[str]) -> int:
        """Train as the flags say.

        Returns:
            The exit status: 0 when the run is finished, 130 or 143 when a signal stopped it.
        """
        config, recipe, note = self._parsed(words)
        for flag, source in _sources(config).items():
            check_task(source, self.kind, flag)
        accelerator = make_accelerator(config)
        if note and accelerator.is_main_process:
            print(f"{self.prog}: {note}", file=sys.stderr)
        own = default_folder(self.kind, self._called(config, recipe, words))
        folder = Path(shared(config.output or str(own), accelerator))
        # On each machine one process first, which downloads where that was asked for.
        with accelerator.local_main_process_first():
            task = self.make_task(config)
        lines = []
        for each, place, command in self._runs(config, folder):
            task = self.make_task(each, task)
            try:
                summary = run(task, each, place, accelerator, command=command)
            except Interrupted as stop:
                if accelerator.is_main_process:
                    report_stop(stop, self.prog, folder)
                return stop.status
            lines.append(describe(self.describe(each.model), summary, task))
        if accelerator.is_main_process:
            print("\n".join(lines))
            print(f"the best network: {folder / 'best.safetensors'}; {self.advice(config, folder)}")
        return 0

    def _called(self, config: Any, recipe: str, words: Sequence[str]) -> str:
        """Return what a run's folder is called after: its recipe, or data that flags name."""
        data = config.data
        if "data.name" not in given(self.config, words):
            return recipe
        if data.name not in self.own_data or data.path is None:
            return str(data.name)
        path = Path(os.path.abspath(data.path))
        return (path.stem if path.is_file() else path.name) or str(data.name)

    def _runs(self, config: Any, folder: Path) -> list[tuple[Any, Path, str]]:
        """Return the runs, the network's and, where it has a plain one, that one's.

        Each is (configuration, folder, the command that trains this network alone).
        """
        runs = [(config, folder, command_line())]
        plain = self.plain_of(config.model)
        if config.baseline and plain != config.model:
            changed = dataclasses.replace(config, model=plain, baseline=False)
            place = folder / BASELINE
            flags = [f"--model.{name}={str(value).lower()}"
                     for name, value in dataclasses.asdict(plain).items()
                     if value != getattr(config.model, name)]  # fmt: skip
            flags += ["--baseline=false", f"--output={place}"]
            runs.append((changed, place, f"{command_line()} {shlex.join(flags)}"))
        return runs


def _started(config: Any) -> list[str]:
    """Return the fields of `config.model` that name a trained network to begin with."""
    return [name for name in ("start", "inherit") if getattr(config.model, name, None)]


def _sources(config: Any) -> dict[str, str]:
    """Return the trained networks that a configuration names, by their flags."""
    found = {f"--model.{name}": getattr(config.model, name) for name in _started(config)}
    teacher = config.distillation.teacher
    return found if teacher is None else {**found, "--distillation.teacher": teacher}
