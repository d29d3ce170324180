"""Trained networks out of whatever holds them: a run's folder, our checkpoints, published ones."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from torch import nn

from blnet import checkpoint, registry
from blnet.files import StrPath
from blnet.official import load_official

# What training writes: the best network in a run's folder, the network and the average of its
# weights in that of a checkpoint.
BEST = "best.safetensors"
MODEL = "model.safetensors"
EMA = "ema.safetensors"
TRUST_SOURCE = "--trust-source"


def add_trust_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that lets a checkpoint name code to import and call."""
    parser.add_argument(
        TRUST_SOURCE,
        action="store_true",
        help="import and call the code that a checkpoint names, package.module:function, where "
        "its network was made by it",
    )


def checkpoint_file(name: StrPath) -> Path:
    """Return the file that `load_network` reads: of a folder the best network in it.

    Raises:
        ValueError: if it is a folder without any.
    """
    path = Path(name)
    if not path.is_dir():
        return path
    held = [path / file for file in (BEST, EMA, MODEL) if (path / file).is_file()]
    if not held:
        raise ValueError(f"{path} is a folder without {BEST}; name a run's folder, one of its "
                         "checkpoints or a file")  # fmt: skip
    return held[0]


def load_network(
    name: StrPath, trust_source: bool | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a trained network on the CPU, in evaluation mode, and what its checkpoint says of it.

    Args:
        name: a checkpoint of ours (.safetensors), the folder of a run, whose best network it is
            then, that of one of its checkpoints, whose network, averaged where it has an average,
            it is then, or a published checkpoint (.pth).
        trust_source: whether a network that "package.module:function" made may be built again by
            importing and calling that; None where users have no flag to say so.

    Returns:
        The network, and what the run that trained it wrote beside the weights; {} for a published
        checkpoint or a file that no run wrote.

    Raises:
        ValueError: if it is none of these, its network cannot be built again, or the code that
            builds it is not trusted.
        OSError: if the file cannot be read.
    """
    path = checkpoint_file(name)
    if path.suffix != ".safetensors":
        return load_official(path).eval(), {}
    header = checkpoint.read_header(path)
    extra = header.get("extra")
    extra = extra if isinstance(extra, dict) else {}
    _check_trusted(path, header, trust_source)
    twin = _twin(extra) if header["kind"] == "weights" else None
    return checkpoint.load(path, twin, trust_source=bool(trust_source)), extra


def needs_trust(name: StrPath) -> bool:
    """Return whether a trained network is built again by code that its checkpoint names.

    Args:
        name: a checkpoint of ours or the folder of a run; see `load_network`.

    Raises:
        ValueError: if it is neither.
        OSError: if the file cannot be read.
    """
    return registry.is_own_code(_builder_of(checkpoint.read_header(checkpoint_file(name))))


def trained_task(name: StrPath) -> str | None:
    """Return the task that a network was trained for; None where its checkpoint does not say.

    Args:
        name: see `load_network`.

    Raises:
        ValueError: if it is a folder without a network, or no whole checkpoint.
        OSError: if the file cannot be read.
    """
    file = checkpoint_file(name)
    header = checkpoint.read_header(file) if file.suffix == ".safetensors" else {}
    extra = header.get("extra")
    task = extra.get("task") if isinstance(extra, dict) else None
    return task if isinstance(task, str) else None


def check_task(name: StrPath, task: str, flag: str) -> None:
    """Check that a network that a flag names was not trained for another task.

    The networks of another task have no names here, so that they could not even be built.

    Raises:
        ValueError: if it was, or it is no network; see `trained_task`.
        OSError: if its file cannot be read.
    """
    found = trained_task(name)
    if found not in (None, task):
        raise ValueError(f"{flag} {name} holds a {found} network where one for {task} is needed; "
                         f"name a run of 'blnet train {task}'")  # fmt: skip


def is_foreign(
    name: str, path: StrPath, trained_name: str | None, trained_path: StrPath | None
) -> bool:
    """Return whether data are of another kind than a network was trained on, and lie elsewhere.

    Data of the same kind may be the same that were moved, of which only a share was held out.

    Args:
        name: kind of the data.
        path: where they lie.
        trained_name: kind of what it was trained on; None where nobody knows.
        trained_path: where that lay; None where it had no place.
    """
    if name == trained_name:
        return False
    return trained_path is None or os.path.realpath(trained_path) != os.path.realpath(path)


def check_moved(
    path: StrPath, trained_path: StrPath | None, trained_eval_path: StrPath | None
) -> None:
    """Check that data that lie elsewhere now had no part to evaluate on with a place of its own.

    A share of them would be held out else, all of which the network may have been trained on.

    Args:
        path: where the data lie now.
        trained_path: where they lay in training.
        trained_eval_path: where the part to evaluate on lay; None if it was a share of them.

    Raises:
        ValueError: if it had.
    """
    if trained_eval_path is None:
        return
    if trained_path is None or os.path.realpath(trained_path) != os.path.realpath(path):
        raise ValueError(
            f"--data-path {path} says where the data to train on lie now, and in training "
            f"{trained_eval_path} was evaluated on; name where that lies now with --eval-path"
        )


def _check_trusted(path: Path, header: dict[str, Any], trust_source: bool | None) -> None:
    """Check that a checkpoint names no code to import and call, or that it is trusted.

    Raises:
        ValueError: if neither.
    """
    found = _builder_of(header)
    if not trust_source and registry.is_own_code(found):
        advice = f"add {TRUST_SOURCE} if you trust the file"
        raise ValueError(
            f"{path} holds a network that {found} made, and rebuilding it would import and call "
            f"that; {'choose another network' if trust_source is None else advice}"
        )


def _builder_of(header: dict[str, Any]) -> str:
    """Return the name of what builds a checkpoint's network again; "" where it needs none."""
    named = {"converted": ("plan", "source"), "weights": ("extra", "network", "name")}
    found: Any = header
    for key in named.get(header["kind"], ("",)):  # ours need their configuration alone
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else ""


def _twin(extra: dict[str, Any]) -> nn.Module | None:
    """Return a new network of the kind that a checkpoint of weights alone was trained as."""
    network = extra.get("network")
    if not isinstance(network, dict) or not isinstance(network.get("name"), str):
        return None
    name, options = network["name"], network.get("options")
    options = options if isinstance(options, dict) else {}
    return registry.build(name, **{k: v for k, v in options.items() if k not in checkpoint.UNREAD})
