"""Speech as a task of the training loop: recordings, features, variations and the network."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import blnet.speech.models  # noqa: F401  (registers the networks by name)
from blnet import registry
from blnet.profiling import Profile, profile
from blnet.speech.augment import Perturb, SpecAugment, WaveAugment
from blnet.speech.batches import bucketed_batches
from blnet.speech.config import AugmentConfig, ModelConfig, SpeechConfig, TaskName
from blnet.speech.data import SpeechData, load_data
from blnet.speech.features import LogMel, Renormalized, global_statistics
from blnet.speech.masking import reduced
from blnet.speech.network import SpeechNet
from blnet.speech.recordings import Recordings, Utterance
from blnet.speech.text import Alphabet
from blnet.trained import load_network
from blnet.training.loading import CorruptSample
from blnet.training.task import Batch, Task

# Words and letters last longer than frame labels, which are as dense as the features.
TIME_REDUCTION: dict[TaskName, int] = {"keyword": 2, "ctc": 2, "frame": 1}
_STATISTICS = 1000  # recordings that global normalisation is measured on


class SpeechTask(Task):
    """What the tasks share: recordings, their features and variations, and the network.

    A batch is {"samples": (N, L) float32, padded with zeros, "lengths": samples of each (N,),
    "targets"}, and after `prepare` has "inputs": maps (N, channels, bands, frames) and "frames":
    frames of each (N,).

    Args:
        config: model, data, features and augmentation.
        data: what `load_data` gave for it; None loads it.
    """

    name = "speech"
    unit = "recordings"

    def __init__(self, config: SpeechConfig, data: SpeechData | None = None) -> None:
        self.config = config
        rate = config.data.sample_rate
        self.features = LogMel(config.features, rate)
        self.alphabet = Alphabet(config.data.alphabet)
        self.time_reduction = _time_reduction(config)
        settled = self._settled()
        self.data = data or load_data(
            config.data,
            config.task,
            self.target_of(settled),
            Perturb(config.augment, rate),
            evaluation_target=self.target_of(dataclasses.replace(settled, augment=AugmentConfig())),
        )
        self.train_data = self.data.train
        self.eval_data = self.data.evaluation
        self._wave = WaveAugment(config.augment)
        normalized = config.features.normalize != "none"
        self._spec = SpecAugment(config.augment, config.features.hop, normalized)
        self._made: dict[str, Any] = {}
        if config.features.normalize == "global" and len(self.train_data):
            with torch.random.fork_rng(devices=()):  # the recordings are varied as they are read
                torch.manual_seed(0)
                chosen = _spread(self.train_data, _STATISTICS)
                self.features.set_statistics(*global_statistics(chosen, self.features))

    def _settled(self) -> SpeechConfig:
        """Return the configuration with the time reduction that the network has."""
        reduction = cast("Literal[1, 2, 4]", self.time_reduction)
        model = dataclasses.replace(self.config.model, time_reduction=reduction)
        return dataclasses.replace(self.config, model=model)

    @classmethod
    @abstractmethod
    def target_of(cls, config: SpeechConfig) -> Callable[[Utterance], Tensor] | None:
        """Return what makes a recording's target; None for its class."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """How many classes the network answers for."""

    def build_model(self) -> nn.Module:
        """Return the network."""
        config = self.config
        if config.model.start is not None:
            network, self._made = self._started(config.model.start)
        else:
            options = self._options()
            network = registry.build(config.model.name, **options)
            self._made = {"name": config.model.name, "options": options}
        return network

    def _options(self) -> dict[str, Any]:
        model = self.config.model
        options: dict[str, Any] = {
            "num_classes": self.classes,
            "head": self.config.task,
            "time_reduction": self.time_reduction,
            "in_channels": self.config.features.channels,
            "bins": self.config.features.bins,
            "width": model.width,
        }
        if registry.is_big_little(model.name):
            options |= {
                "alpha": model.alpha,
                "beta": model.beta,
                "branches": model.branches,
                "pyramid": model.pyramid,
            }
        return options

    def _started(self, source: str) -> tuple[nn.Module, dict[str, Any]]:
        network, extra = load_network(source)
        self._check_fits(network, extra, f"--model.start {source}")
        return network.train(), extra.get("network") or {}

    def _check_fits(self, network: nn.Module, extra: Mapping[str, Any], what: str) -> None:
        """Check that a trained network takes these features and answers for these classes.

        Raises:
            ValueError: if it does not.
        """
        if not isinstance(network, SpeechNet):
            raise ValueError(f"{what} is no network for speech; name a run of 'blnet train speech'")
        mine: dict[str, tuple[object, object]] = {
            "task": (network.config.head, self.config.task),
            "number of classes": (network.config.num_classes, self.classes),
            "channels": (network.config.in_channels, self.config.features.channels),
        }
        theirs = extra.get("features")
        if isinstance(theirs, Mapping):
            own = self.features.as_dict()
            mine |= {
                f"features' {key}": (theirs.get(key), own[key])
                for key in ("bins", "window", "hop", "deltas", "normalize", "sample_rate")
            }
        for name, (found, wanted) in mine.items():
            if found != wanted:
                raise ValueError(f"{what} differs in its {name}, {found} in place of {wanted}; "
                                 "choose a network that was trained alike")  # fmt: skip

    def as_teacher(self, network: nn.Module, extra: Mapping[str, Any]) -> nn.Module:
        """Return a teacher that takes these features and gives as many answers of these classes.

        Classes are held against each other by name as far as the teacher's are known. Maps that are
        normalised with statistics of the whole training set become what the teacher was taught on.

        Raises:
            ValueError: if not.
        """
        name = f"--distillation.teacher {self.config.distillation.teacher}"
        self._check_fits(network, extra, name)
        assert isinstance(network, SpeechNet)
        if self.config.task != "keyword" and network.config.time_reduction != self.time_reduction:
            raise ValueError(
                f"{name} answers for every {network.config.time_reduction} frames and the network "
                f"for every {self.time_reduction}; give both the same --model.time-reduction"
            )
        self._check_same_names(extra, name)
        if self.features.config.normalize == "global" and "features" in extra:
            return Renormalized(network, LogMel.from_dict(extra["features"]), self.features)
        return network

    def _check_same_names(self, extra: Mapping[str, Any], what: str) -> None:
        """Raise a ValueError if a network's answers mean other words or characters, where known."""
        if self.config.task == "keyword":
            key, own = "classes", list(self.data.classes)
        else:
            key, own = "alphabet", list(self.alphabet.characters)
        found = extra.get(key)
        theirs = found if isinstance(found, list | str) else own
        for mine, other in zip(own, theirs, strict=False):
            if mine != other:
                raise ValueError(f"{what} answers {other!r} where {self.config.data.name} has "
                                 f"{mine!r}; choose a teacher of the same {key}")  # fmt: skip

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> Batch:
        """Return the recordings, padded with zeros, their lengths and their targets."""
        recordings, targets = zip(*samples, strict=True)
        return {
            "samples": pad_sequence(list(recordings), batch_first=True),
            "lengths": torch.tensor([len(recording) for recording in recordings]),
            **self._collated(list(targets)),
        }

    @abstractmethod
    def _collated(self, targets: list[Tensor]) -> Batch:
        """Return what the batch says of its targets."""

    def prepare(self, batch: Batch, training: bool) -> Batch:
        """Return the batch with its maps, varied in training."""
        samples, lengths = batch["samples"], batch["lengths"]
        if training:
            samples = self._wave(samples, lengths)
        maps, frames = self.features.to(samples.device)(samples, lengths)
        if training:
            maps = self._spec(maps, frames)
        if self.config.channels_last:
            maps = maps.contiguous(memory_format=torch.channels_last)
        ready = {**batch, "inputs": maps, "frames": frames}
        del ready["samples"]
        return ready

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the network's logits."""
        logits: Tensor = model(batch["inputs"], batch["frames"])
        return logits

    def batches(self, size: int, seed: int, epoch: int) -> Sequence[Sequence[int]]:
        """Return an epoch's micro-batches, of recordings of like length."""
        return bucketed_batches(self.train_data.seconds, size, seed, epoch)

    def answered(self, batch: Batch) -> Tensor:
        """Return how many frames each recording's answer has."""
        return reduced(batch["frames"], self.time_reduction)

    def identity(self) -> dict[str, Any]:
        """Return how many recordings there are, and a checksum of the classes' names."""
        names = hashlib.blake2b("\n".join(self.data.classes).encode(), digest_size=4).hexdigest()
        return {**super().identity(), "as checksum of the classes' names": names}

    def header(self) -> dict[str, Any]:
        """Return what evaluation, prediction and transcription need beside the weights."""
        return {
            "network": self._made,
            "head": self.config.task,
            "classes": list(self.data.classes),
            "alphabet": self.alphabet.characters,
            "features": self.features.as_dict(),
            "data": dataclasses.asdict(self.config.data),
        }

    def cost(self, model: nn.Module) -> Profile:
        """Return parameters, and MACs for a second of speech."""
        config = self.config.features
        return profile(model, (1, config.channels, config.bins, round(1 / config.hop)))

    def facts(self, model: nn.Module) -> dict[str, str]:
        """Return the network with its cost, the data and its features."""
        config, cost = self.config.features, self.cost(model)
        differences = ", first and second differences" if config.deltas else ""
        return {
            "network": f"{describe(self.config.model)}, {cost.parameters:,} parameters, "
            f"{cost.macs / 1e9:.4g} GMACs for a second of speech",
            "data": self.data.name,
            "features": f"{config.bins} log-mel bands, {1000 * config.window:g} ms every "
            f"{1000 * config.hop:g} ms{differences}, normalised: {config.normalize}",
        }


def _time_reduction(config: SpeechConfig) -> int:
    """Return how many frames of the map one of the answer is of."""
    if config.model.start is not None:
        network, _ = load_network(config.model.start)
        if isinstance(network, SpeechNet):  # others are refused when the network is built
            return network.config.time_reduction
    return config.model.time_reduction or TIME_REDUCTION[config.task]


def describe(config: ModelConfig) -> str:
    """Return a network's name with what makes it that: 'bl_resnet22 (alpha 4, beta 2)'."""
    if config.start is not None:
        return config.start
    width = [f"width {config.width:g}"] if config.width != 1 else []
    if not registry.is_big_little(config.name) or config.branches == 1:
        own = ["pyramid"] if config.pyramid and registry.is_big_little(config.name) else []
        parts, name = own + width, config.name.removeprefix("bl_")
    else:
        branches = [f"{config.branches} branches"] if config.branches != 2 else []
        pyramid = ["pyramid"] if config.pyramid else []
        parts = [f"alpha {config.alpha}", f"beta {config.beta}", *branches, *pyramid, *width]
        name = config.name
    return f"{name} ({', '.join(parts)})" if parts else name


def _spread(data: Recordings, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (samples (1, L), length (1,)) of recordings spread over a data set, but bad ones.

    Raises:
        ValueError: if all are bad; it names the first.
    """
    count, chosen = len(data), min(len(data), most)
    bad: list[CorruptSample] = []
    for place in range(chosen):
        try:
            samples, _ = data[place * count // chosen]
        except CorruptSample as error:
            bad.append(error)  # the training counts and tells it
        else:
            yield samples[None], torch.tensor([len(samples)])
    if bad and len(bad) == chosen:
        raise ValueError(
            f"not one of {chosen:,} training recordings can be used, {bad[0].name} among them "
            f"({bad[0].reason}); mend or replace them"
        )
