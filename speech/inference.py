"""Trained speech networks with what their checkpoints say of them."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import blnet.speech.models  # noqa: F401  (registers the networks by name)
from blnet.files import StrPath, reason
from blnet.limits import out_of_memory
from blnet.profiling import Profile, profile
from blnet.speech.config import DataConfig, FeatureConfig, ModelConfig, SpeechConfig
from blnet.speech.features import LogMel
from blnet.speech.network import SpeechNet
from blnet.speech.task import describe
from blnet.speech.text import Alphabet
from blnet.trained import load_network, trained_task

TASK = "speech"
_MAKES_ONE = "'blnet train speech' makes one"


@dataclass(frozen=True)
class Trained:
    """A trained network and what is known of it.

    Attributes:
        source: its checkpoint, as the user named it.
        model: the network, float32, in evaluation mode.
        features: what makes its maps of recordings.
        classes: the words that it tells apart (keyword); () otherwise.
        alphabet: the characters that it writes with (ctc and frame).
        data: what it was trained on.
        extra: all that the run which trained it wrote beside the weights.
    """

    source: str
    model: SpeechNet
    features: LogMel
    classes: tuple[str, ...]
    alphabet: Alphabet
    data: DataConfig
    extra: dict[str, Any]

    @property
    def head(self) -> str:
        """What it was trained for: keyword, ctc or frame."""
        return self.model.config.head

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.fc.weight.device

    @property
    def title(self) -> str:
        """The network's name with its settings."""
        options = self.extra["network"].get("options") or {}
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        chosen = {name: value for name, value in options.items() if name in known}
        return describe(ModelConfig(**{**chosen, "name": self.extra["network"]["name"]}))

    @property
    def step(self) -> int:
        """Samples to one frame of the answer."""
        return self.features.hop_samples * self.model.config.time_reduction

    @property
    def lacking(self) -> int:
        """Frames by which the answer to so many whole steps is shorter than they are."""
        steps = self.features.window_samples  # more of them than a window of sound has
        frames = self.features.frames(torch.tensor(steps * self.step))
        return steps - int(self.model.output_lengths(frames))

    def to(self, device: torch.device) -> Trained:
        """Move the network and its features to a device, and return this."""
        self.model.to(device)
        self.features.to(device)
        return self

    def cost(self) -> Profile:
        """Return parameters, and MACs for a second of speech."""
        config = self.features.config
        frames = round(1 / config.hop)
        return profile(self.model, (1, config.channels, config.bins, frames))

    def __call__(self, recordings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits of some recordings, and how many frames each one's answer has.

        Args:
            recordings: float32 (n,) each, on any device.

        Returns:
            Logits (N, classes) of keywords, (N, frames, classes) of others, and (N,).

        Raises:
            ValueError: if the logits are not finite numbers, or memory runs out.
        """
        lengths = torch.tensor([len(one) for one in recordings], device=self.device)
        samples = pad_sequence([one.to(self.device) for one in recordings], batch_first=True)
        maps, frames = self.features(samples, lengths)
        return self.answer(maps, frames), self.model.output_lengths(frames)

    @torch.inference_mode()
    def answer(self, maps: Tensor, frames: Tensor) -> Tensor:
        """Return the logits of some maps.

        Args:
            maps: (N, channels, bands, frames), where the network is.
            frames: of each recording (N,).

        Raises:
            ValueError: if the logits are not finite numbers, or memory runs out.
        """
        try:
            logits: Tensor = self.model(maps, frames).float()
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                seconds = maps.shape[0] * maps.shape[-1] * self.features.hop_seconds
                raise ValueError(f"memory ran out with {seconds:.0f} s of sound at once; take less "
                                 "at a time: a smaller --batch or --window") from error  # fmt: skip
            raise
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"checkpoint {self.source} gives outputs that are not finite numbers; "
                             "train it anew")  # fmt: skip
        return logits


def load_trained(
    source: StrPath | None, heads: Sequence[str] = ("keyword", "ctc", "frame")
) -> Trained:
    """Return the trained speech network of a checkpoint, on the CPU.

    Args:
        source: a .safetensors file of ours or the folder of a run, whose best network it is then.
        heads: what it may have been trained for.

    Raises:
        ValueError: if it is neither, is of another task, or contradicts itself.
        OSError: if it is not there or cannot be read.
    """
    if source is None:
        raise ValueError(f"--checkpoint is missing; name a trained network: {_MAKES_ONE}")
    if not Path(source).exists():
        raise FileNotFoundError(f"checkpoint {source} does not exist; name a .safetensors file or "
                                f"a run's folder ({_MAKES_ONE})")  # fmt: skip
    try:
        task = trained_task(source) or TASK
        model, extra = load_network(source) if task == TASK else (None, {})
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"checkpoint {source} cannot be used: {error}") from error
    if not isinstance(model, SpeechNet):
        other = task if task != TASK else "vision"
        raise ValueError(f"checkpoint {source} was not trained on speech; use 'blnet evaluate "
                         f"{other}' or 'blnet predict {other}'")  # fmt: skip
    try:
        trained = Trained(str(source), model.float().eval(), *_described(model, extra), extra)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"checkpoint {source} cannot be used: its header is damaged ({reason(error)}); train "
            "it anew"
        ) from error
    if trained.head not in heads:
        raise ValueError(f"checkpoint {source} was trained for --task {trained.head}, and this "
                         f"takes {' or '.join(heads)}; {_USE[trained.head]}")  # fmt: skip
    return trained


_USE = {
    "keyword": "use 'blnet predict speech'",
    "ctc": "use 'blnet transcribe'",
    "frame": "use 'blnet transcribe'",
}


def _described(
    model: SpeechNet, extra: Mapping[str, Any]
) -> tuple[LogMel, tuple[str, ...], Alphabet, DataConfig]:
    """Return what a header says of a network: features, words, alphabet and data.

    Raises:
        ValueError: if that is missing, is not what it should be, or contradicts the network. (Of
            values of a wrong type also what they cause.)
    """
    lacking = [name for name in ("features", "classes", "alphabet", "data") if name not in extra]
    if lacking:
        raise ValueError(f"it lacks {' and '.join(lacking)}")
    features = LogMel.from_dict(extra["features"])
    classes = tuple(unicodedata.normalize("NFC", str(name)) for name in extra["classes"])
    alphabet = Alphabet(extra["alphabet"])
    known = {field.name for field in dataclasses.fields(DataConfig)}
    data = DataConfig(**{name: value for name, value in extra["data"].items() if name in known})
    data.check()
    config = model.config
    spelled = len(classes) if config.head == "keyword" else alphabet.size
    for what, said, there in (
        ("classes", spelled, config.num_classes),
        ("channels", features.config.channels, config.in_channels),
        ("bands", features.config.bins, config.bins),
        ("Hz", data.sample_rate, features.sample_rate),
    ):
        if said != there:
            raise ValueError(f"it tells of {said} {what} in one place and of {there} in another")
    return features, classes, alphabet, data


def configuration(trained: Trained, data: DataConfig, **changes: Any) -> SpeechConfig:
    """Return a configuration in which a trained network meets some data.

    Args:
        trained: the network.
        data: the data.
        changes: other fields: batch_size, or task where that is not what it was trained for.
    """
    found = trained.features.config
    features = FeatureConfig(**{f.name: getattr(found, f.name) for f in dataclasses.fields(found)})
    reduction = cast("Literal[1, 2, 4]", trained.model.config.time_reduction)
    model = ModelConfig(time_reduction=reduction)
    settings = {"task": trained.model.config.head, **changes}
    return SpeechConfig(data=data, features=features, model=model, **settings)
