"""A run's checkpoints: whole folders that appear at once, and everything needed to go on in them.

    <run>/best.safetensors                     the best network so far, ready for blnet.load
    <run>/checkpoints/step-00000400/
        model.safetensors                      the network, ready for blnet.load
        ema.safetensors                        the average of its weights, where there is one
        training.safetensors                   the optimiser's state, the rest in its header

A folder is written under a hidden name, flushed to the disk and renamed, so that whatever has the
name of a checkpoint is whole. There is no random state in it: every step seeds its own.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blnet import checkpoint
from blnet.files import StrPath, reason, written_aside
from blnet.trained import BEST, EMA, MODEL

TRAINING = "training.safetensors"
VERSION = 1
_FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8,})(\.old)?$")
_ENTRY = "blnet-training"
_GROUP = "group "


@dataclass
class Saved:
    """What a checkpoint holds beside networks and optimiser.

    Attributes:
        progress: where the run was: epoch, step, sums; fit for JSON.
        config: the configuration it ran with.
        layout: what the order of the samples depends on, devices and the like, and what tells the
            data from other data.
        scaler: state of the gradient scaler of fp16; empty without one.
    """

    progress: dict[str, Any]
    config: dict[str, Any]
    layout: dict[str, Any]
    scaler: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        run: the run's folder.
        keep: how many are kept.
    """

    def __init__(self, run: StrPath, keep: int = 2) -> None:
        self.run = Path(run)
        self.folder = self.run / _FOLDER
        self.keep = keep

    def all(self) -> list[Path]:
        """Return the checkpoints there are, the oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.match(path.name)]
        return sorted(found, key=_age)

    def latest(self) -> Path | None:
        """Return the newest checkpoint; None where there is none."""
        found = self.all()
        return found[-1] if found else None

    def save(
        self,
        step: int,
        model: nn.Module,
        ema: nn.Module | None,
        optimizer: Optimizer,
        saved: Saved,
        extra: dict[str, Any],
    ) -> Path:
        """Write a checkpoint, then remove those that are too many.

        Args:
            step: steps taken so far; it names the checkpoint.
            model: the network, without wrappers.
            ema: the averaged network, if any.
            optimizer: the optimiser.
            saved: everything else.
            extra: for the header of the networks' files.

        Raises:
            OSError: if it cannot be written; every earlier checkpoint is untouched.
        """
        target = self.folder / f"step-{step:08d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{target.name}-{uuid.uuid4().hex[:8]}.partial"
        try:
            aside.mkdir()
            checkpoint.save(model, aside / MODEL, **extra)
            if ema is not None:
                checkpoint.save(ema, aside / EMA, **extra)
            _write_training(aside / TRAINING, optimizer, saved)
            _sync(aside)
            if target.exists():
                # One of before the epoch's evaluation. At no moment is there neither of the two.
                old = target.with_name(f"{target.name}.old")
                self._remove(old)
                os.replace(target, old)
            os.replace(aside, target)
            _sync(self.folder)
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} "
                f"({_why(error)}); earlier ones are untouched: free some space and go on with "
                "--resume auto"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._prune()
        return target

    def save_best(self, model: nn.Module, extra: dict[str, Any]) -> Path:
        """Write the best network.

        Raises:
            OSError: if it cannot be written; the file from before is untouched.
        """
        path = self.run / BEST
        checkpoint.save(model, path, **extra)
        return path

    def _prune(self) -> None:
        # Of each step the newest: what was replaced counts, and stays, only where a run was killed
        # before its successor had the name.
        newest = {_age(path)[0]: path for path in self.all()}
        for path in set(self.all()) - set(list(newest.values())[-self.keep :]):
            self._remove(path)
        # What runs left behind that were killed.
        for path in self.folder.glob(".*.partial"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.run.glob(".blnet-*.partial"):
            path.unlink(missing_ok=True)

    def _remove(self, path: Path) -> None:
        # Renamed first: half of a checkpoint must not have the name of a whole one.
        doomed = self.folder / f".{path.name}-{uuid.uuid4().hex[:8]}.partial"
        with contextlib.suppress(OSError):
            os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _age(path: Path) -> tuple[int, bool]:
    found = _NAME.match(path.name)
    assert found is not None
    return int(found.group(1)), not found.group(2)


def _why(error: BaseException) -> str:
    """Return what the system said in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "strerror", None) or reason(error)


@contextlib.contextmanager
def _damage_told(folder: Path, file: str) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} of checkpoint {folder} cannot be used ({_why(error)}); remove that folder to "
            "go on from an earlier one, or name another --output if it is of another network"
        ) from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # A file system that cannot flush folders is no reason to stop a run.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_training(path: Path, optimizer: Optimizer, saved: Saved) -> None:
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
            elif value is not None:
                numbers.setdefault(str(index), {})[name] = value
    groups: list[dict[str, Any]] = [{} for _ in state["param_groups"]]
    for index, group in enumerate(state["param_groups"]):
        for name, value in group.items():
            if isinstance(value, Tensor):  # LAMB counts its steps there
                tensors[f"{_GROUP}{index}.{name}"] = value.detach().cpu().clone()
            else:
                groups[index][name] = value
    header = {
        "version": VERSION,
        "numbers": numbers,
        "groups": groups,
        **vars(saved),
    }
    with written_aside(path) as aside:
        aside.write_bytes(safetensors.torch.save(tensors, {_ENTRY: json.dumps(header)}))


def read_training(path: Path) -> tuple[Saved, dict[str, Any]]:
    """Return what the checkpoint in a folder holds beside networks, and its optimiser's state.

    Raises:
        ValueError: if the file is damaged, missing or of another version.
    """
    file = path / TRAINING
    with _damage_told(path, TRAINING):
        with safetensors.safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})[_ENTRY])
        tensors = safetensors.torch.load_file(file)
        version = header["version"]
    if version != VERSION:
        raise ValueError(f"{file} is of version {version}, and {VERSION} is read here; use the "
                         "blnet that wrote it")  # fmt: skip
    with _damage_told(path, TRAINING):
        fields = {name: dict(header[name]) for name in ("progress", "config", "layout", "scaler")}
        state: dict[int, dict[str, Any]] = {
            int(index): dict(values) for index, values in dict(header["numbers"]).items()
        }
        groups = [dict(group) for group in header["groups"]]
        for key, tensor in tensors.items():
            index, _, name = key.removeprefix(_GROUP).partition(".")
            place = (
                groups[int(index)] if key.startswith(_GROUP) else state.setdefault(int(index), {})
            )
            place[name] = tensor
        return Saved(**fields), {"state": state, "param_groups": groups}


def restore_model(path: Path, model: nn.Module) -> None:
    """Copy a checkpoint's weights into a network, in place.

    In place, so that every tensor keeps its memory layout: the same numbers in another order of
    elements can be rounded otherwise by vectorised code.

    Raises:
        ValueError: if the file is damaged or missing, or does not fit.
    """
    # A copy of the network without its weights, for the file's: a GPU need not hold them twice.
    empty: dict[int, Any] = {}
    for parameter in model.parameters():
        twin = torch.empty_like(parameter, device="meta")
        empty[id(parameter)] = nn.Parameter(twin, requires_grad=parameter.requires_grad)
    empty |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    with _damage_told(path.parent, path.name):
        loaded = checkpoint.load(path, copy.deepcopy(model, empty))
    model.load_state_dict(loaded.state_dict())


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser its state back, each tensor laid out in memory as its parameter is.

    Raises:
        ValueError: if it is of another optimiser or network.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        for name, value in values.items():
            like = parameters[index] if index < len(parameters) else None
            if name == "step" or like is None or not isinstance(value, Tensor):
                continue
            if value.shape == like.shape:
                values[name] = torch.empty_like(like, dtype=value.dtype).copy_(value)
    for group in state["param_groups"]:  # JSON has no tuples
        group.update(
            {k: tuple(v) for k, v in group.items() if isinstance(v, list) and k != "params"}
        )
    optimizer.load_state_dict(state)
