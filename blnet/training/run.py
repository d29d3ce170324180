"""A run from its folder to its summary: what `blnet train` does once it has a task."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console

from blnet.environment import collect, command_line
from blnet.training.checkpoints import CheckpointFolder
from blnet.training.config import TrainingConfig
from blnet.training.devices import make_accelerator, shared
from blnet.training.display import Display, clock
from blnet.training.journal import Journal, plot
from blnet.training.loop import Summary, Trainer
from blnet.training.stopping import Interrupted
from blnet.training.task import Task

_PACKAGES = ("torch", "torchvision", "torchaudio", "timm", "accelerate", "numpy")


def default_folder(task: str, recipe: str) -> Path:
    """Return the folder of a run that was given none."""
    return Path("results") / f"{task}-{recipe}-{datetime.now():%Y%m%d-%H%M%S}"


def run(
    task: Task,
    config: TrainingConfig,
    folder: Path,
    accelerator: Accelerator | None = None,
    console: Console | None = None,
) -> Summary:
    """Train a task's network in a folder, and write the record of it.

    Args:
        task: what to train.
        config: how; its `check` was called.
        folder: the run's folder; it is made.
        accelerator: the devices; None for those that the configuration asks for.
        console: where the progress is shown; None for standard output.

    Returns:
        What the run came to; at once if it was finished before.

    Raises:
        Interrupted: if a signal asked to stop; a checkpoint was written before.
        ValueError: if the configuration, the data or the folder is not right, the loss is no
            longer a number or memory runs out.
        OSError: if the folder or a file cannot be written.
    """
    accelerator = accelerator or make_accelerator(config)
    main = accelerator.is_main_process
    open_folder(folder, config, accelerator)
    with Display(task.unit, main, console) as display:
        trainer = Trainer(task, config, folder, accelerator, display)
        step = trainer.progress.step
        journal = Journal(folder, main, config.tensorboard, step)
        try:
            head(trainer, journal, display)
            summary = trainer.fit(journal)
        finally:
            journal.close()
            if main:
                plot(folder, task.monitor, f"{task.name}: {folder.name}")
    return summary


def open_folder(folder: Path, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Make a run's folder, and check that it is empty or to be gone on with.

    Raises:
        ValueError: if it holds a run and the configuration does not say to go on with it.
        OSError: if it cannot be made or written to.
    """
    problem: Exception | None = None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            problem = OSError(f"--output {folder} cannot be written to ({error.strerror}); choose "
                              "a folder that you may write to")  # fmt: skip
        else:
            if config.resume == "never" and CheckpointFolder(folder).latest() is not None:
                problem = ValueError(f"--output {folder} holds a run already; go on with it with "
                                     "--resume auto, or name another folder")  # fmt: skip
    problem = shared(problem, accelerator)
    if problem is not None:
        raise problem


def head(trainer: Trainer, journal: Journal, display: Display) -> None:
    """Show and write the head of the log: command, versions, device, seed, network and data."""
    config, layout = trainer.config, trainer.layout
    found = collect("cpu" if trainer.device.type == "cpu" else None)
    versions = ", ".join(f"{n} {found.packages[n]}" for n in _PACKAGES if n in found.packages)
    devices = f"{layout.devices} x " if layout.devices > 1 else ""
    parts = [f"batch {config.batch_size}"]
    if layout.devices > 1 or layout.accumulate > 1:
        parts.append(
            f"{layout.devices} x {layout.accumulate} micro-batches of {layout.micro_batch}"
        )
    parts += [f"{config.epochs} epochs of {trainer.steps} steps", f"seed {config.seed}"]
    facts = {
        "command": command_line(),
        "device": f"{devices}{found.device} ({found.threads} threads), {config.precision}",
        "versions": f"Python {found.python}, {versions}",
        **trainer.task.facts(trainer.state.network),
        "run": ", ".join(parts),
        "output": str(trainer.folder),
    }
    if trainer.progress.step:
        facts["resumed"] = f"after step {trainer.progress.step} (epoch {trainer.progress.epoch})"
    display.head(facts)
    journal.head({"facts": facts, "config": config.as_dict(), "environment": found.as_dict()})
    journal.write("start", trainer.progress.step, **facts)


def describe(name: str, summary: Summary, task: Task) -> str:
    """Return one line on what a run came to."""
    unit, monitor = task.unit, task.monitor
    return (
        f"{name}: best {monitor} {summary.best:.2%} after epoch {summary.best_epoch}, in "
        f"{clock(summary.seconds)} ({summary.samples_per_second:,.0f} {unit}/s in training, "
        f"{summary.waiting:.0%} of it waiting for data)"
    )


def report_stop(stop: Interrupted, prog: str, folder: Path) -> int:
    """Say how to go on after a stop, and return the exit status that a shell expects."""
    print(
        f"{prog}: stopped after step {stop.step}; a checkpoint was written: go on with the same "
        f"command and --output {folder} --resume auto",
        file=sys.stderr,
    )
    return 128 + stop.signal
