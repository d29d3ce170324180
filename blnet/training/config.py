"""The configuration of a training run, whatever it trains. Tasks add their model and data to it.

Each attribute's line below is also the help text of its flag.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from blnet.checks import flag_of

Precision = Literal["fp32", "bf16", "fp16"]

# Fields that change where and how fast a run runs, not what it computes. Any other must be as it
# was when the run is resumed.
FREE = frozenset(
    {
        "accumulate",  # with the number of devices it gives the micro-batch, which is compared
        "baseline",
        "trust_source",
        "recompute",
        "output",
        "resume",
        "device",
        "workers",
        "log_steps",
        "evaluate_epochs",
        "checkpoint_minutes",
        "checkpoint_steps",
        "keep",
        "tensorboard",
        "data.path",
        "data.eval_path",
        "data.download",
    }
)


@dataclass(frozen=True)
class OptimizerConfig:
    """What moves the weights.

    Attributes:
        name: sgd, adamw or lamb, as timm has them.
        lr: learning rate at the top of the schedule, for the whole batch.
        momentum: of sgd (Nesterov's, unless --optimizer.nesterov false).
        nesterov: whether sgd's momentum is Nesterov's.
        weight_decay: weight decay: of sgd part of the gradient, of adamw decoupled from it, of lamb
            part of the update before that is scaled to the length of the weights.
        decay_norms: whether normalisation weights and biases decay as well, as in the paper.
        clip_norm: largest norm of the gradient; it is scaled down to it. 0 for no limit.
    """

    name: Literal["sgd", "adamw", "lamb"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    decay_norms: bool = True
    clip_norm: float = 0.0


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate goes, set anew for every step.

    Attributes:
        name: cosine from lr to min_lr, step (times step_factor at each of step_epochs) or constant.
        warmup_epochs: epochs, or a fraction of one, of linear warm-up from lr / 100 to lr; they
            stand in place of the schedule's own first ones, and the rest of it is as without.
        min_lr: where cosine ends.
        step_epochs: epochs after which step lowers the rate.
        step_factor: what step multiplies the rate with.
    """

    name: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    step_epochs: list[int] = field(default_factory=list)
    step_factor: float = 0.1


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights, which then is what is evaluated and kept.

    Attributes:
        decay: share of the average that stays at a step; 0 for no average.
        warmup: whether the decay grows to its value, as 1 - step^(-2/3), so that a short run
            forgets its start; it is 0.99 after 1,000 steps, 0.999 after 32,000 and 0.9999 after a
            million.
    """

    decay: float = 0.0
    warmup: bool = True


@dataclass(frozen=True)
class DistillationConfig:
    """Learning from a trained network's answers (Hinton et al., arXiv 1503.02531).

    Attributes:
        teacher: a checkpoint of ours, a run's folder or a published checkpoint; none: no teacher.
        weight: share of the teacher's part in the loss, 0 to 1.
        temperature: what both networks' logits are divided by.
    """

    teacher: str | None = None
    weight: float = 0.5
    temperature: float = 2.0


@dataclass(frozen=True)
class TrainingConfig:
    """A training run.

    Attributes:
        epochs: passes over the training data.
        batch_size: samples in a step, over all devices together.
        accumulate: micro-batches a device takes in a step, one after the other; more need less
            memory.
        seed: of the weights, the order and the augmentation.
        optimizer: what moves the weights.
        schedule: how the learning rate goes.
        ema: moving average of the weights.
        distillation: learning from a teacher.
        label_smoothing: share of each label that is spread over all classes.
        precision: fp32, or automatic mixed precision in bf16 or fp16 over float32 weights.
        channels_last: whether weights and inputs lie in channels-last (NHWC) order.
        compile: whether torch.compile compiles the network, and the average of its weights.
        optimize: whether blnet.optimize puts fused training ops in, where the device has them.
        recompute: whether backward computes normalised maps again rather than keep them, for less
            memory.
        sync_bn: whether batch statistics are taken over all devices.
        deterministic: whether a GPU may use deterministic algorithms only, which are slower.
        device: auto (a GPU if there is one), cpu or cuda.
        workers: data loading processes on each device; none chooses for the device.
        output: folder of the run; none for results/<task>-<recipe>-<date-time>, where
            flags name the data with theirs in place of the recipe.
        resume: never starts anew; auto goes on with what is in the output folder, if anything.
        evaluate_epochs: epochs from one evaluation to the next; the last one ends with one as well.
        checkpoint_minutes: minutes between checkpoints; each evaluation ends with one.
        checkpoint_steps: steps between checkpoints inside an epoch; 0 goes by minutes alone.
        keep: checkpoints kept beside the best network.
        log_steps: steps between lines of metrics.jsonl.
        tensorboard: whether to write TensorBoard's event files as well.
        trust_source: whether the code that a checkpoint to start from or a teacher names,
            package.module:function, is imported and called where its network was made by it.
    """

    epochs: int = 30
    batch_size: int = 128
    accumulate: int = 1
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = EmaConfig()
    distillation: DistillationConfig = DistillationConfig()
    label_smoothing: float = 0.0
    precision: Precision = "fp32"
    channels_last: bool = True
    compile: bool = False
    optimize: bool = False
    recompute: bool = False
    sync_bn: bool = False
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int | None = None
    output: str | None = None
    resume: Literal["never", "auto"] = "never"
    evaluate_epochs: int = 1
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int = 0
    keep: int = 2
    log_steps: int = 20
    tensorboard: bool = True
    trust_source: bool = False

    def check(self) -> None:
        """Check every value.

        Raises:
            ValueError: if one is out of range; it names the flag.
        """
        for name, (least, most) in _BOUNDS.items():
            value = get(self, name)
            if value is None:
                continue
            # Written so that NaN fails as well.
            if not least <= value <= most:
                raise ValueError(f"{flag_of(name)} must be from {least} to {most}, got {value}")
        if self.schedule.warmup_epochs > self.epochs:
            raise ValueError(
                f"--schedule.warmup-epochs {self.schedule.warmup_epochs:g} is longer than the run "
                f"of --epochs {self.epochs}; shorten it"
            )
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"--schedule.min-lr {self.schedule.min_lr:g} is above --optimizer.lr "
                f"{self.optimizer.lr:g}; lower it"
            )
        self._check_steps()
        if self.optimizer.nesterov and self.optimizer.name == "sgd" and not self.optimizer.momentum:
            raise ValueError("Nesterov's momentum needs --optimizer.momentum above 0; or give "
                             "--optimizer.nesterov false")  # fmt: skip
        if self.resume == "auto" and self.output is None:
            raise ValueError("--resume auto needs --output, the folder of the run to go on with")

    def _check_steps(self) -> None:
        epochs = self.schedule.step_epochs
        if self.schedule.name == "step" and not epochs:
            raise ValueError("--schedule.name step needs --schedule.step-epochs, [30, 60] say")
        if sorted(set(epochs)) != list(epochs) or any(epoch < 1 for epoch in epochs):
            raise ValueError(
                f"--schedule.step-epochs {epochs} must be epochs from 1 in rising order, "
                "[30, 60] say"
            )
        if self.schedule.name == "step" and epochs[0] < self.schedule.warmup_epochs:
            raise ValueError(
                f"--schedule.step-epochs {epochs} begins inside the warm-up of "
                f"--schedule.warmup-epochs {self.schedule.warmup_epochs:g}, which knows no steps; "
                "shorten the warm-up or begin later"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, fit for JSON and YAML."""
        return dataclasses.asdict(self)


# Field -> the smallest and the largest value that mean anything.
_BOUNDS: dict[str, tuple[float, float]] = {
    "epochs": (1, 100_000),
    "batch_size": (1, 1_000_000),
    "accumulate": (1, 65_536),
    "seed": (0, 2**63 - 1),
    "evaluate_epochs": (1, 100_000),
    "optimizer.lr": (1e-12, 1e6),
    "optimizer.momentum": (0, 0.99999),
    "optimizer.weight_decay": (0, 1e6),
    "optimizer.clip_norm": (0, 1e12),
    "schedule.warmup_epochs": (0, 100_000),
    "schedule.min_lr": (0, 1e6),
    "schedule.step_factor": (0, 1),
    "ema.decay": (0, 0.999999999),
    "distillation.weight": (0, 1),
    "distillation.temperature": (1e-3, 1e3),
    "label_smoothing": (0, 1),
    "workers": (0, 1024),
    "checkpoint_minutes": (0, 1e6),
    "checkpoint_steps": (0, 1_000_000_000),
    "keep": (1, 1000),
    "log_steps": (1, 1_000_000_000),
}


def get(config: Any, name: str) -> Any:
    """Return the value of a field by its dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return which fields differ between two configurations, but for those that `FREE` names."""
    old, new = flat(before), flat(now)
    return [
        f"{flag_of(name)} was {old.get(name)} and is {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if name not in FREE and not _same(old.get(name), new.get(name))
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)
