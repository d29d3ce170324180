"""Trained image networks with what their checkpoints say of them, for evaluation and prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import blnet.vision.models  # noqa: F401  (registers the networks by name)
from blnet.files import StrPath, reason
from blnet.meta import meta_twin, run_on_meta
from blnet.network import BigLittleNet
from blnet.profiling import Profile, profile
from blnet.trained import load_network, trained_task
from blnet.vision.classes import IMAGENET_CLASSES, class_names_of, imagenet_names
from blnet.vision.config import ModelConfig
from blnet.vision.preprocessing import IMAGENET, Preprocessing
from blnet.vision.reproduction import matching
from blnet.vision.task import describe

TASK = "vision"
_MAKES_ONE = "'blnet train vision' makes one"


@dataclass(frozen=True)
class Trained:
    """A trained network and what is known of it.

    Attributes:
        source: its checkpoint, as the user named it.
        model: the network, float32, on the CPU, in evaluation mode.
        extra: what the run that trained it wrote beside the weights; {} for a published one.
        preprocessing: what is done to pictures; ImageNet's where the checkpoint does not say.
        classes: number of classes.
        names: name of each class; None where they are not known.
        cost: parameters and MACs for one picture.
    """

    source: str
    model: nn.Module
    extra: dict[str, Any]
    preprocessing: Preprocessing
    classes: int
    names: tuple[str, ...] | None
    cost: Profile

    @property
    def title(self) -> str:
        """The network's name with what makes it that: 'bl_resnet50 (alpha 2, beta 4)'."""
        return _title(self.model, self.extra)


def load_trained(source: StrPath, trust_source: bool = False) -> Trained:
    """Return the trained image network of a checkpoint.

    Args:
        source: a .safetensors file of ours, the folder of a run, whose best network it is then, of
            one of its checkpoints, or a published .pth file.
        trust_source: whether code that it names may be imported and called to build it.

    Raises:
        ValueError: if it is none of these, is of another task, or contradicts itself.
        OSError: if it is not there or cannot be read.
    """
    if not Path(source).exists():
        raise FileNotFoundError(
            f"checkpoint {source} does not exist; name a .safetensors file, a run's folder or a "
            f"published .pth file ({_MAKES_ONE})"
        )
    _check_task(Path(source))
    model, extra = load_network(source, trust_source)
    try:
        preprocessing = preprocessing_of(extra)
        shape = (1, preprocessing.channels, preprocessing.size, preprocessing.size)
        cost = profile(model, shape)
        classes = _count_classes(model, shape)
        names = class_names_of(extra, classes)
    except ValueError as error:
        raise ValueError(f"checkpoint {source} cannot be used: {reason(error, 400)}") from error
    published = Path(source).is_file() and Path(source).suffix != ".safetensors"
    if published and names is None and classes == IMAGENET_CLASSES:
        names = imagenet_names()
    return Trained(str(source), model.float(), extra, preprocessing, classes, names, cost)


def _check_task(source: Path) -> None:
    """Check that a checkpoint is not of another task, whose networks have no names here.

    Raises:
        ValueError: if it is, or is damaged.
    """
    task = trained_task(source)
    if task not in (None, TASK):
        raise ValueError(f"checkpoint {source} was trained for the task {task!r}, not on images; "
                         f"use 'blnet evaluate {task}' or 'blnet predict {task}'")  # fmt: skip


def preprocessing_of(extra: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing that a checkpoint's header holds; ImageNet's where it holds none.

    Raises:
        ValueError: if a setting is missing, unknown or wrong.
    """
    found = extra.get("preprocessing")
    return IMAGENET if found is None else Preprocessing.from_dict(found)


def network_facts(trained: Trained) -> dict[str, Any]:
    """Return what rebuilds a network, as far as it is known, fit for JSON."""
    model = trained.model
    config = model.config if type(model) is BigLittleNet else None
    return {
        "title": trained.title,
        "class": type(model).__name__,
        "header": trained.extra.get("network") or None,
        "config": {f.name: getattr(config, f.name) for f in fields(config)} if config else None,
    }


def check_finite(outputs: Tensor) -> None:
    """Check that a network's outputs, or a mean of them, are numbers.

    Raises:
        ValueError: if one is infinite or not a number.
    """
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError("the network gives outputs that are not finite numbers; train it anew, or "
                         "compute in fp32 if this was fp16")  # fmt: skip


def _count_classes(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Return how many classes a network gives logits for."""
    outputs = run_on_meta(meta_twin(model), shape)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 1:
        raise ValueError("it does not give one logit a class; give a network that classifies")
    return int(outputs.shape[1])


def _title(model: nn.Module, extra: Mapping[str, Any]) -> str:
    network = extra.get("network")
    if isinstance(network, dict) and isinstance(network.get("name"), str):
        options = network.get("options")
        options = options if isinstance(options, dict) else {}
        known = {name: options[name] for name in ("alpha", "beta", "branches", "width")
                 if isinstance(options.get(name), int | float)}  # fmt: skip
        return describe(ModelConfig(name=network["name"], **known))
    plan: Any = getattr(model, "plan", None)
    if plan is not None and not isinstance(plan, nn.Module):
        source = getattr(plan, "source", None) or type(model).__name__
        return f"{source}, converted (alpha {plan.alpha}, beta {plan.beta})"
    if type(model) is BigLittleNet:
        rows = matching(model)
        name = rows[0].network if rows else type(model).__name__
        return f"{name} (alpha {model.config.alpha}, beta {model.config.beta})"
    return type(model).__name__
