"""What `blnet train vision` and `blnet train speech` share: flags, the runs, and what is said."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from blnet.training.config import TrainingConfig
from blnet.training.devices import make_accelerator, shared
from blnet.training.options import parse
from blnet.training.run import default_folder, describe, report_stop, run
from blnet.training.stopping import Interrupted
from blnet.training.task import Task

BASELINE = "baseline"  # the plain network's folder inside the run's


class TrainCommand(ABC):
    """A command that trains a network and, where its recipe says so, the plain one beside it.

    Attributes:
        kind: what is trained on, "vision" say.
        config: class of the configuration, which has `model` and `baseline`.
        description: for --help.
        recipes: folder of the recipes.
    """

    kind: ClassVar[str]
    config: ClassVar[type[TrainingConfig]]
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

        Raises:
            ValueError: if a value is out of range.
        """
        config, recipe = parse(
            self.config,
            self.prog,
            self.description,
            self.recipes,
            self.default_recipe(words),
            words,
        )
        config.check()
        return config, recipe

    def main(self, words: Sequence[str]) -> int:
        """Train as the flags say.

        Returns:
            The exit status: 0 when the run is finished, 130 or 143 when a signal stopped it.
        """
        config, recipe = self.parse(words)
        accelerator = make_accelerator(config)
        folder = Path(shared(config.output or str(default_folder(self.kind, recipe)), accelerator))
        # On each machine one process first, which downloads where that was asked for.
        with accelerator.local_main_process_first():
            task = self.make_task(config)
        lines = []
        for each, place in self._runs(config, folder):
            task = self.make_task(each, task)
            try:
                summary = run(task, each, place, accelerator)
            except Interrupted as stop:
                if accelerator.is_main_process:
                    report_stop(stop, self.prog, folder)
                return stop.status
            lines.append(describe(self.describe(each.model), summary, task))
        if accelerator.is_main_process:
            print("\n".join(lines))
            print(f"the best network: {folder / 'best.safetensors'}; {self.advice(config, folder)}")
        return 0

    def _runs(self, config: Any, folder: Path) -> list[tuple[Any, Path]]:
        """Return the runs: the network's and, where it has a plain one, that one's."""
        runs = [(config, folder)]
        plain = self.plain_of(config.model)
        if config.baseline and plain != config.model:
            changed = dataclasses.replace(config, model=plain, baseline=False)
            runs.append((changed, folder / BASELINE))
        return runs
