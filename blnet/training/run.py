"""A run from its folder to its summary: what `blnet train` does once it has a task."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from rich.console import Console

from blnet.environment import collect, command_line
from blnet.files import reason
from blnet.limits import out_of_memory
from blnet.trained import BEST
from blnet.training.checkpoints import CheckpointFolder
from blnet.training.config import TrainingConfig
from blnet.training.devices import by_first, let_cudnn_search, make_accelerator
from blnet.training.display import Display, clock
from blnet.training.journal import PLOT, Journal, plot, read_rows
from blnet.training.loop import Trainer
from blnet.training.reporting import Summary
from blnet.training.stopping import Interrupted
from blnet.training.task import Task
from blnet.wording import counted

LOCK = ".lock"  # in the folder of a run; whoever trains there holds it
_LONGEST_NAME = 100  # bytes; file systems take some 255 in all
_PACKAGES = ("torch", "torchvision", "torchaudio", "timm", "accelerate", "numpy")


def default_folder(task: str, name: str) -> Path:
    """Return the folder of a run that was given none; its recipe or its data give the name."""
    short = os.fsencode(name)[:_LONGEST_NAME].decode(errors="ignore")
    return Path("results") / f"{task}-{short}-{datetime.now():%Y%m%d-%H%M%S}"


def run(
    task: Task,
    config: TrainingConfig,
    folder: Path,
    accelerator: Accelerator | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> Summary:
    """Train a task's network in a folder, and write the record of it.

    Args:
        task: what to train.
        config: how; its `check` was called.
        folder: the run's folder; it is made.
        accelerator: the devices; None for those that the configuration asks for.
        console: where the progress is shown; None for standard output.
        command: what trains this network, for the record; None for this process's own command.

    Returns:
        What the run came to; at once if it was finished before.

    Raises:
        Interrupted: if a signal asked to stop; a checkpoint was written before.
        ValueError: if the configuration, the data or the folder is not right, the loss is no
            longer a number or memory runs out.
        OSError: if the folder or a file cannot be written.
    """
    accelerator = accelerator or make_accelerator(config)
    let_cudnn_search(config, accelerator.device, task.one_shape)
    with (
        _opened(folder, config, accelerator),
        Display(task.unit, accelerator.is_main_process, console) as display,
    ):
        trainer = _make_trainer(task, config, folder, accelerator, display)
        try:
            if trainer.is_finished:
                return trainer.summary()
            try:
                summary = _recorded(trainer, command)
            except Exception as error:  # stopped or failed: what there is, is drawn
                if not _is_disk_full(error):
                    _draw(trainer)
                raise
            _draw(trainer)
            return summary
        finally:
            trainer.close()
            # Accelerate keeps what it prepared, and another run may share the accelerator.
            accelerator.free_memory()


def _make_trainer(
    task: Task, config: TrainingConfig, folder: Path, accelerator: Accelerator, display: Display
) -> Trainer:
    try:
        return Trainer(task, config, folder, accelerator, display)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ValueError(
            f"the network does not fit into the memory of the {accelerator.device.type} device; "
            "choose a smaller one"
        ) from error


def _recorded(trainer: Trainer, command: str | None) -> Summary:
    """Train to the end, with a journal."""
    accelerator, config, progress = trainer.accelerator, trainer.config, trainer.progress
    journal = Journal(trainer.folder, accelerator.is_main_process, config.tensorboard)
    facts = head(trainer, command)
    try:
        by_first(lambda: journal.begin(progress.step, progress.epoch), accelerator)
        by_first(lambda: _write_head(trainer, journal, facts), accelerator)
        return trainer.fit(journal)
    finally:
        journal.close()


def _write_head(trainer: Trainer, journal: Journal, facts: dict[str, str]) -> None:
    trainer.display.head(facts)
    found = collect("cpu" if trainer.device.type == "cpu" else None)
    journal.head(
        {"facts": facts, "config": trainer.config.as_dict(), "environment": found.as_dict()}
    )
    journal.write("start", trainer.progress.step, **facts)


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__
    return False


def _draw(trainer: Trainer) -> None:
    """Draw the run's curves. A picture that fails is told of, and no reason for a run to fail."""
    if not trainer.accelerator.is_main_process:
        return
    try:
        plot(trainer.folder, trainer.task.monitor, f"{trainer.task.name}: {trainer.folder.name}")
    except Exception as error:  # matplotlib, its fonts, its folder for caches, the disk
        trainer.display.say(f"warning: {PLOT} could not be drawn ({reason(error)})")


@contextlib.contextmanager
def _opened(folder: Path, config: TrainingConfig, accelerator: Accelerator) -> Iterator[None]:
    """Make a run's folder and hold it; remove it again where the run fails before it is used.

    Raises:
        ValueError: if it holds a run and the configuration does not say to go on with it, nothing
            is left to go on from, or another process holds it.
        OSError: if it cannot be made or written to.
    """
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    held: list[IO[str]] = []

    def begin() -> None:
        held.append(_hold(folder))
        _check_resumable(folder, config)

    try:
        by_first(begin, accelerator)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # raised by the first that holds anything
            if held and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
            for place in made if accelerator.is_main_process else ():
                place.rmdir()
        raise
    finally:
        for lock in held:
            lock.close()


def _hold(folder: Path) -> IO[str]:
    """Make a folder and return its file whose lock this process has until it closes it.

    The lock ends with the process, however it ends, and its loading processes, which may live a
    little longer, do not have it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        lock = _opened_lock(folder / LOCK)
    except OSError as error:
        raise _closed(folder, error) from error
    try:
        import fcntl

        kind = fcntl.LOCK_EX if lock.writable() else fcntl.LOCK_SH
        fcntl.lockf(lock, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.close()
        raise ValueError(f"--output {folder} is in use by another run, and each would damage the "
                         "other's files; wait for its end, or name another folder") from error  # fmt: skip # noqa: E501
    except (ImportError, OSError):  # a system or a file system without locks
        pass
    return lock


def _opened_lock(path: Path) -> IO[str]:
    try:
        return path.open("a")
    except PermissionError:  # of another user, in a folder that is open to all
        return path.open("r")


def _closed(folder: Path, error: OSError) -> OSError:
    return OSError(f"--output {folder} cannot be written to ({error.strerror}); choose a folder "
                   "that you may write to")  # fmt: skip


def _check_resumable(folder: Path, config: TrainingConfig) -> None:
    try:
        latest = CheckpointFolder(folder).latest()
    except OSError as error:
        raise _closed(folder, error) from error
    if latest is None and _has_ended_epoch(folder):
        raise ValueError(f"--output {folder} holds a run whose checkpoints are gone, so that it "
                         "cannot be gone on with; name another folder")  # fmt: skip
    if config.resume == "never" and latest is not None:
        raise ValueError(f"--output {folder} holds a run already; go on with it with "
                         "--resume auto, or name another folder")  # fmt: skip


def _has_ended_epoch(folder: Path) -> bool:
    """Return whether there is what a run leaves of an epoch, before which it wrote a checkpoint."""
    return (folder / BEST).exists() or any(read_rows(folder, "epoch"))


def head(trainer: Trainer, command: str | None = None) -> dict[str, str]:
    """Return the head of the log: command, versions, device, seed, network and data."""
    config, layout = trainer.config, trainer.layout
    found = collect("cpu" if trainer.device.type == "cpu" else None)
    versions = ", ".join(f"{n} {found.packages[n]}" for n in _PACKAGES if n in found.packages)
    devices = f"{layout.devices} x " if layout.devices > 1 else ""
    threads = counted(found.threads, "thread")
    parts = [f"batch {config.batch_size}"]
    if layout.devices > 1 or layout.accumulate > 1:
        parts.append(
            f"{layout.devices} x {layout.accumulate} micro-batches of {layout.micro_batch}"
        )
    parts.append(f"{counted(config.epochs, 'epoch')} of {counted(trainer.steps, 'step')}")
    parts.append(f"seed {config.seed}")
    facts = {
        "command": command or command_line(),
        "device": f"{devices}{found.device} ({threads}), {config.precision}",
        "versions": f"Python {found.python}, {versions}",
        **trainer.task.facts(trainer.state.network),
        "run": ", ".join(parts),
        "output": str(trainer.folder),
    }
    if trainer.progress.step:
        facts["resumed"] = f"after step {trainer.progress.step} (epoch {trainer.progress.epoch})"
    return facts


def describe(name: str, summary: Summary, task: Task) -> str:
    """Return one line on what a run came to."""
    unit, monitor = task.unit, task.monitor
    last = "".join(
        f", {other} {summary.last[other]:.2%} after the last"
        for other in task.told
        if other in summary.last
    )
    return (
        f"{name}: best {monitor} {summary.best:.2%} after epoch {summary.best_epoch}{last}, in "
        f"{clock(summary.seconds)} ({summary.samples_per_second:,.0f} {unit}/s in training, "
        f"{summary.waiting:.0%} of it waiting for data)"
    )


def report_stop(stop: Interrupted, prog: str, folder: Path) -> None:
    """Say how to go on after a stop."""
    print(
        f"{prog}: stopped after step {stop.step}; a checkpoint was written: go on with the same "
        f"command and --output {folder} --resume auto",
        file=sys.stderr,
    )
