"""Image classification as a task of the training loop: network, pictures, loss and accuracy."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import blnet.vision.models  # noqa: F401  (registers the networks by name)
from blnet import registry
from blnet.conversion import convert
from blnet.files import reason
from blnet.meta import meta_twin
from blnet.profiling import Profile, profile
from blnet.trained import load_network
from blnet.training.task import Batch, Task
from blnet.vision.augment import Mix
from blnet.vision.classes import check_same_names, class_names_of
from blnet.vision.config import ModelConfig, VisionConfig
from blnet.vision.data import ImageData, load_data
from blnet.vision.preprocessing import Preprocessing

TOP = 5


def accuracies(classes: int) -> MetricCollection:
    """Return an evaluation's metrics: top-1 and, of more than five classes, top-5 accuracy."""
    options: dict[str, Any] = {"num_classes": classes, "average": "micro", "validate_args": False}
    found = {"accuracy": MulticlassAccuracy(**options)}
    if classes > TOP:
        found["top5"] = MulticlassAccuracy(**options, top_k=TOP)
    return MetricCollection(found)


def model_options(config: ModelConfig, classes: int, channels: int) -> dict[str, Any]:
    """Return the options that the network of a configuration is built with, by its name.

    Raises:
        ValueError: if another library's network is to have a width.
    """
    library, colon, _ = config.name.partition(":")
    if colon:
        if config.width != 1:
            raise ValueError(
                f"--model.width {config.width:g} is for networks of this project, and "
                f"{config.name} has a width of its own; leave it out"
            )
        names = {
            "num_classes": classes,
            "in_chans" if library == "timm" else "in_channels": channels,
        }
        if library != "timm" and channels == 3:
            del names["in_channels"]  # what most networks cannot choose
        return names
    options: dict[str, Any] = {
        "num_classes": classes,
        "in_channels": channels,
        "stem": config.stem,
        "width": config.width,
    }
    if registry.is_big_little(config.name):
        options |= {"alpha": config.alpha, "beta": config.beta, "branches": config.branches}
    return options


def build_network(
    config: ModelConfig, classes: int, preprocessing: Preprocessing, trust_source: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a configuration: new, trained before, or converted from a plain one.

    Args:
        config: which network.
        classes: how many classes it answers for.
        preprocessing: of the pictures that it takes.
        trust_source: whether code that the checkpoint of one trained before names may be called.

    Returns:
        The network, and {"name", "options"} that `blnet.registry.build` makes one like it with;
        {} where the network itself tells.

    Raises:
        ValueError: if nothing goes by its name, an option is wrong, or the network to start from
            does not fit the data.
    """
    source = config.start or config.inherit
    if source is None:
        options = model_options(config, classes, preprocessing.channels)
        built = _built(config.name, options)
        _check_output(built, config.name, preprocessing)
        return built, {"name": config.name, "options": options}
    flag = "--model.start" if config.start else "--model.inherit"
    found, extra = load_network(source, trust_source)
    check_classes(found, extra, classes, preprocessing, f"{flag} {source}")
    _check_output(found, f"{flag} {source}", preprocessing)
    made = extra.get("network") or {}
    if config.inherit is None:
        return found.train(), made
    size = (1, preprocessing.channels, preprocessing.size, preprocessing.size)
    converted: Any = convert(
        found, config.alpha, config.beta, config.branches, inherit_weights=True, input_size=size
    )
    if made:
        # What rebuilds the network when its checkpoint is read.
        converted.plan = dataclasses.replace(
            converted.plan, source=made["name"], source_options=made["options"]
        )
    return converted, {}


def _built(name: str, options: dict[str, Any]) -> nn.Module:
    """Return the new network of a name.

    Raises:
        ValueError: if there is none, or it is a function of the user's that takes no such options.
    """
    try:
        return registry.build(name, **options)
    except ValueError as error:
        cause = error.__cause__
        if not (registry.is_own_code(name) and isinstance(cause, TypeError)):
            raise
        given = ", ".join(f"{option}={value}" for option, value in options.items())
        raise ValueError(
            f"--model.name {name} fails when it is called as training does it, with {given} "
            f"({reason(cause)}); have the function take these arguments"
        ) from cause


def _check_output(model: nn.Module, what: str, preprocessing: Preprocessing) -> None:
    """Check that a network gives logits, and nothing beside them, in training as well.

    Raises:
        ValueError: if it gives anything else, as Inception does, which answers several times, or
            does not take such pictures.
    """
    shape = (2, preprocessing.channels, preprocessing.size, preprocessing.size)
    try:
        found = _trained_output(model, torch.empty(shape, device="meta"))
    except Exception:  # not every network runs without numbers
        try:
            found = _trained_output(model, torch.zeros(shape))
        except Exception as error:  # a network of the user's raises nearly anything
            raise ValueError(
                f"{what} does not train on pictures of {shape[1]} channels and {shape[2]} x "
                f"{shape[3]} pixels ({reason(error)}); choose another network or size"
            ) from error
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{what} returns {type(found).__name__} in training, and one tensor of logits is "
            "trained here; choose a network with a single output"
        )


def _trained_output(model: nn.Module, images: Tensor) -> Any:
    """Return what a copy of a network, on the images' device, gives for them in training."""
    twin = meta_twin(model) if images.is_meta else copy.deepcopy(model)
    with torch.no_grad():
        return twin.train()(images)


def check_classes(
    model: nn.Module,
    extra: Mapping[str, Any],
    classes: int,
    preprocessing: Preprocessing,
    what: str,
) -> None:
    """Check that a trained network answers for pictures and classes like the data's.

    Raises:
        ValueError: if it does not.
    """
    shape = (1, preprocessing.channels, preprocessing.size, preprocessing.size)
    try:
        with torch.no_grad():
            found = model.eval()(torch.zeros(shape)).shape[-1]
    except RuntimeError as error:
        raise ValueError(
            f"{what} does not take pictures of {shape[1]} channels and {shape[2]} x {shape[3]} "
            "pixels, as the data has; choose data like those it was trained on"
        ) from error
    if found != classes:
        raise ValueError(f"{what} knows {found} classes and the data has {classes}; choose data "
                         "with the classes that it was trained on")  # fmt: skip
    theirs = extra.get("preprocessing")
    mine = preprocessing.as_dict()
    if isinstance(theirs, Mapping) and any(
        list(_listed(theirs.get(name))) != list(_listed(mine[name])) for name in ("mean", "std")
    ):
        raise ValueError(f"{what} was trained on pictures that are normalised otherwise; choose "
                         "the data that it was trained on")  # fmt: skip


def _listed(values: Any) -> list[float]:
    return [float(value) for value in values] if isinstance(values, list | tuple) else []


def _load(config: VisionConfig) -> ImageData:
    return load_data(config.data, config.augment, seed=config.seed)


class ImageTask(Task):
    """Image classification.

    Batches are {"inputs": images (N, C, H, W), "targets": labels (N,), "shares": (N, classes)};
    images are bytes until they are on the device, and shares are there where pictures are mixed.

    Args:
        config: model, data and augmentation.
        data: what `load_data` gave for it; None loads it.
    """

    name = "vision"
    unit = "images"
    monitor = "accuracy"
    one_shape = True

    def __init__(self, config: VisionConfig, data: ImageData | None = None) -> None:
        self.config = config
        self.data = _load(config) if data is None else data
        self.train_data = self.data.train
        self.eval_data = self.data.evaluation
        self.classes = len(self.data.classes)
        mixes = config.augment.mixup or config.augment.cutmix
        self._made: dict[str, Any] = {}
        self._mix = Mix(config.augment, self.classes) if mixes else None

    def build_model(self) -> nn.Module:
        """Return the network."""
        config = self.config
        network, self._made = build_network(
            config.model, self.classes, self.data.preprocessing, config.trust_source
        )
        return network

    def collate(self, samples: list[tuple[Tensor, int]]) -> Batch:
        """Return images (N, C, H, W) of bytes and labels (N,)."""
        images, labels = zip(*samples, strict=True)
        return {"inputs": torch.stack(images), "targets": torch.tensor(labels)}

    def prepare(self, batch: Batch, training: bool) -> Batch:
        """Return the images normalised, in the layout of the network, and mixed in training."""
        images = self.data.preprocessing.normalize(batch["inputs"])
        ready = {**batch, "inputs": images}
        if training and self._mix is not None:
            ready["inputs"], ready["shares"] = self._mix(images, batch["targets"])
        if self.config.channels_last:
            ready["inputs"] = ready["inputs"].contiguous(memory_format=torch.channels_last)
        return ready

    def loss(self, outputs: Tensor, batch: Batch, training: bool) -> Tensor:
        """Return the cross-entropy, in training against smoothed and mixed labels."""
        targets: Tensor = batch["shares"] if "shares" in batch else batch["targets"]
        smoothing = self.config.label_smoothing if training else 0.0
        return F.cross_entropy(outputs.float(), targets, label_smoothing=smoothing)

    def metrics(self) -> MetricCollection:
        """Return top-1 and top-5 accuracy."""
        return accuracies(self.classes)

    def update(self, metrics: Any, outputs: Tensor, batch: Batch) -> None:
        """Add a batch's logits."""
        metrics.update(outputs, batch["targets"])

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return how many have the label's logit on top; of mixed pictures, the larger label's."""
        targets = batch["shares"].argmax(1) if "shares" in batch else batch["targets"]
        right: Tensor = (outputs.argmax(1) == targets).sum()
        return right

    def as_teacher(self, network: nn.Module, extra: Mapping[str, Any]) -> nn.Module:
        """Return a teacher that knows these classes, in this order, and takes these pictures.

        Raises:
            ValueError: if not.
        """
        name = f"--distillation.teacher {self.config.distillation.teacher}"
        check_classes(network, extra, self.classes, self.data.preprocessing, name)
        try:
            known = class_names_of(extra, self.classes)
        except ValueError as error:
            raise ValueError(f"{name} cannot be used: {reason(error)}") from error
        told = (name, self.data.name, "choose a teacher of the same classes")
        check_same_names(known, extra, self.data.classes, self.config.data.name, told)
        return network

    def identity(self) -> dict[str, Any]:
        """Return how many images and classes there are, and a checksum of the classes' names."""
        names = hashlib.blake2b("\n".join(self.data.classes).encode(), digest_size=4).hexdigest()
        return {
            **super().identity(),
            "classes": self.classes,
            "as checksum of the classes' names": names,
        }

    def header(self) -> dict[str, Any]:
        """Return what `blnet evaluate` and `blnet predict` need beside the weights."""
        return {
            "network": self._made,
            "classes": list(self.data.classes),
            "preprocessing": self.data.preprocessing.as_dict(),
            "data": dataclasses.asdict(self.config.data),
        }

    def cost(self, model: nn.Module) -> Profile:
        """Return parameters, and MACs for one picture."""
        preprocessing = self.data.preprocessing
        return profile(model, (1, preprocessing.channels, preprocessing.size, preprocessing.size))

    def facts(self, model: nn.Module) -> dict[str, str]:
        """Return the network with its cost, and the data."""
        cost = self.cost(model)
        return {
            "network": f"{describe(self.config.model)}, {cost.parameters:,} parameters, "
            f"{cost.macs / 1e9:.4g} GMACs at {'x'.join(map(str, cost.input_size[1:]))}",
            "data": f"{self.data.name}, {self.classes} classes",
        }


def describe(config: ModelConfig) -> str:
    """Return a network's name with what makes it that: 'bl_resnet50 (alpha 2, beta 4)'."""
    if config.start is not None:
        return config.start
    if config.inherit is not None:
        return f"{config.inherit}, converted (alpha {config.alpha}, beta {config.beta})"
    width = f", width {config.width:g}" if config.width != 1 else ""
    if not registry.is_big_little(config.name) or config.branches == 1:
        return f"{config.name.removeprefix('bl_')}{f' ({width[2:]})' if width else ''}"
    branches = f", {config.branches} branches" if config.branches != 2 else ""
    return f"{config.name} (alpha {config.alpha}, beta {config.beta}{branches}{width})"
