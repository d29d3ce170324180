"""Settings of speech: the task, the network, the recordings, their features and variations.

Each attribute's line below is also the help text of its flag.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from blnet.checks import check_flag_choice, check_flag_count, flag_of
from blnet.training.config import TrainingConfig

TaskName = Literal["keyword", "ctc", "frame"]
DataName = Literal["synth", "speech_commands", "fsdd", "yesno", "librispeech", "folder", "manifest"]
Normalize = Literal["utterance", "global", "none"]
SPEED_DENOMINATOR = 100  # speeds are fractions of at most this: what resampling holds grows with it
LONGEST = 6  # words of an n-gram; KenLM's own limit
LETTERS = "abcdefghijklmnopqrstuvwxyz '"


@dataclass(frozen=True)
class DataConfig:
    """Which recordings to train and evaluate on.

    Attributes:
        name: the corpus: synth (spoken by eSpeak NG, embedded), speech_commands, fsdd (Free Spoken
            Digits), yesno, librispeech, folder (a folder for each word) or manifest (JSONL or TSV).
        path: folder or .zip archive of the corpus; for manifest the training manifest.
        eval_path: the evaluation part, where path does not hold it: a folder, an archive or a
            manifest.
        download: fetch speech_commands, yesno or librispeech into path if it is not there.
        sample_rate: samples a second that everything is brought to.
        words: speech_commands: 12 (ten words, unknown, silence) or 35 (all, of version 1: 30).
        subset: librispeech: training parts, 'train-clean-100+train-clean-360' say.
        holdout: share kept for evaluation where the corpus has no split: of the speakers, where
            those are known, else of the recordings of each word.
        holdout_speaker: this speaker alone is kept for evaluation, all others are trained on.
        split_seed: seed of that split, of limit and of synth; not the training's seed, so that all
            runs are measured on the same recordings.
        limit: at most so many training and so many evaluation recordings.
        train_items: synth: recordings to train on.
        eval_items: synth: recordings of other voices to evaluate on.
        max_seconds: longest recording.
        longer: what becomes of longer ones: cut (to that length; not with transcripts) or skip.
        alphabet: ctc and frame: characters of transcripts, without the blank; capitals are made
            small unless the alphabet has some.
        labels: frame: folder of frame labels that `blnet align` wrote.
    """

    name: DataName = "synth"
    path: str | None = None
    eval_path: str | None = None
    download: bool = False
    sample_rate: int = 16000
    words: Literal[12, 35] = 12
    subset: str = "train-clean-100"
    holdout: float = 0.1
    holdout_speaker: str | None = None
    split_seed: int = 0
    limit: int | None = None
    train_items: int | None = None
    eval_items: int | None = None
    max_seconds: float = 20.0
    longer: Literal["cut", "skip"] = "skip"
    alphabet: str = LETTERS
    labels: str | None = None

    @property
    def eval_flag(self) -> str:
        """The setting that named `eval_path`, for errors; where it is path's, that one."""
        return "--data.path" if self.eval_path == self.path else "--data.eval-path"

    def check(self) -> None:
        """Raise a ValueError that names the first setting that makes no sense."""
        check_flag_choice("--data.name", self.name, get_args(DataName))
        _check_range("--data.sample-rate", self.sample_rate, 4000, 192_000)
        for field in ("limit", "train_items", "eval_items"):
            check_flag_count(flag_of(f"data.{field}"), getattr(self, field))
        if not 0 < self.holdout < 1:
            raise ValueError(
                f"--data.holdout must lie between 0 and 1, got {self.holdout}; "
                "it is the share of the recordings to evaluate on"
            )
        _check_range("--data.split-seed", self.split_seed, 0, 2**32 - 1)
        _check_range("--data.max-seconds", self.max_seconds, 0.1, 3600)
        if not self.alphabet or len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError(
                f"--data.alphabet {self.alphabet!r} must name characters, each of them once"
            )


@dataclass(frozen=True)
class FeatureConfig:
    """How a recording becomes a map: log-mel bands over time.

    Attributes:
        bins: mel bands.
        window: length of a frame, seconds.
        hop: time from one frame to the next, seconds.
        deltas: whether first and second differences come along, as the map's second and third
            channel.
        normalize: mean and variance: utterance (each recording's own, for every band), global
            (the training set's, for every band, kept in the checkpoint) or none.
    """

    bins: int = 64
    window: float = 0.025
    hop: float = 0.01
    deltas: bool = False
    normalize: Normalize = "utterance"

    @property
    def channels(self) -> int:
        """Channels of the map."""
        return 3 if self.deltas else 1

    def check(self) -> None:
        """Raise a ValueError that names the first setting that makes no sense."""
        _check_range("--features.bins", self.bins, 8, 512)
        _check_range("--features.window", self.window, 0.002, 1)
        _check_range("--features.hop", self.hop, 0.001, 1)
        check_flag_choice("--features.normalize", self.normalize, get_args(Normalize))
        if self.hop > self.window:
            raise ValueError(
                f"--features.hop {self.hop:g} is longer than --features.window {self.window:g}, "
                "which would leave out sound between frames; shorten it"
            )


@dataclass(frozen=True)
class AugmentConfig:
    """How recordings are varied in training; evaluation never is.

    Attributes:
        speed: largest change of speed (and pitch), a share: 0.1 plays at 0.9, 1 or 1.1 of it.
        gain: largest change of loudness to either side, dB.
        shift: largest shift of a recording to either side, seconds; silence moves in.
        noise: probability that noise (white to brown) is added.
        noise_snr: lowest signal-to-noise ratio, dB; the highest is 30 dB above.
        freq_masks: SpecAugment: masks over bands of each map (Park et al., 2019).
        freq_width: widest of them, bands.
        time_masks: SpecAugment: masks over time of each map.
        time_width: widest of them, seconds; and at most a fifth of the recording.
    """

    speed: float = 0.0
    gain: float = 0.0
    shift: float = 0.0
    noise: float = 0.0
    noise_snr: float = 5.0
    freq_masks: int = 0
    freq_width: int = 12
    time_masks: int = 0
    time_width: float = 0.2

    def check(self) -> None:
        """Raise a ValueError that names the first setting that makes no sense."""
        bounds = {
            "speed": (0, 0.5),
            "gain": (0, 60),
            "shift": (0, 10),
            "noise": (0, 1),
            "noise_snr": (-30, 100),
            "freq_masks": (0, 100),
            "freq_width": (1, 512),
            "time_masks": (0, 100),
            "time_width": (0.001, 60),
        }
        for field, (low, high) in bounds.items():
            _check_range(flag_of(f"augment.{field}"), getattr(self, field), low, high)
        if self.speed and not Fraction(self.speed).limit_denominator(SPEED_DENOMINATOR):
            raise ValueError(
                f"--augment.speed {self.speed:g} changes nothing; give 0, or "
                f"{1 / SPEED_DENOMINATOR:g} and more"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        name: bl_resnet22 or resnet22.
        alpha: how many times narrower each smaller branch is.
        beta: how many times shorter each smaller branch is.
        branches: number of branches; 1 is the plain network.
        pyramid: whether the answer also looks at a pyramid of the branches' outputs.
        time_reduction: frames of the map to one of the answer: 1, 2 or 4; none for what suits the
            task: keyword 2, ctc 2, frame 1.
        width: all widths times this; below 1 for networks that a CPU can train.
        start: checkpoint or run to start from, in place of a new network; all else of model is
            its own then.
    """

    name: Literal["bl_resnet22", "resnet22"] = "bl_resnet22"
    alpha: int = 4
    beta: int = 2
    branches: int = 2
    pyramid: bool = False
    time_reduction: Literal[1, 2, 4] | None = None
    width: float = 1.0
    start: str | None = None


@dataclass(frozen=True)
class SpeechConfig(TrainingConfig):
    """A training run on speech: `TrainingConfig`, and the following.

    Attributes:
        task: keyword (which word a recording is), ctc (what is said, from transcripts) or frame
            (likewise, from frame labels of `blnet align`).
        model: which network.
        data: which recordings.
        features: how they become maps.
        augment: how they are varied in training.
        ngrams: ctc and frame: words of the longest n-gram of a language model that is made of the
            training transcripts; evaluations then give the error rates of a beam search with it as
            well, beside those of the likeliest path. 0 for none.
        baseline: whether the plain network is trained as well afterwards, the same way, so that
            its figures stand beside.
    """

    task: TaskName = "keyword"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    features: FeatureConfig = FeatureConfig()
    augment: AugmentConfig = AugmentConfig()
    ngrams: int = 0
    baseline: bool = False

    def check(self) -> None:
        """Check every value.

        Raises:
            ValueError: if one is out of range; it names the flag.
        """
        super().check()
        check_flag_choice("--task", self.task, get_args(TaskName))
        self.data.check()
        self.features.check()
        self.augment.check()
        _check_range("--ngrams", self.ngrams, 0, LONGEST)
        if not self.model.width > 0:
            raise ValueError(f"--model.width must be above 0, got {self.model.width}; take 1")
        if self.baseline and self.model.start is not None:
            raise ValueError(
                "--baseline trains a plain network beside one that is built anew; with "
                "--model.start leave it out"
            )


def _check_range(flag: str, value: float, low: float, high: float) -> None:
    # Written so that NaN fails as well.
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{flag} must be from {low:g} to {high:g}, got {value}")
