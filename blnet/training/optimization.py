"""Optimisers, schedules and weight averages from timm, as the configuration names them."""

from __future__ import annotations

from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from blnet.training.config import EmaConfig, OptimizerConfig, ScheduleConfig

_WARMUP_START = 0.01  # share of the learning rate that warm-up begins with


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Return the optimiser of a network's parameters."""
    options: dict[str, Any] = {}
    name: str = config.name
    if name == "sgd":
        # timm calls SGD with Nesterov's momentum "sgd" and SGD without it "momentum".
        name = "sgd" if config.nesterov and config.momentum else "momentum"
        options["momentum"] = config.momentum
    if name == "lamb":
        options["max_grad_norm"] = None  # clip_norm says whether to clip, and by how much
    optimizer: Optimizer = create_optimizer_v2(
        model,
        opt=name,
        lr=config.lr,
        weight_decay=config.weight_decay,
        filter_bias_and_bn=not config.decay_norms,
        **options,
    )
    return optimizer


def make_schedule(
    optimizer: Optimizer, config: ScheduleConfig, lr: float, epochs: int, steps: int
) -> Scheduler:
    """Return a schedule whose `step_update(n)` sets the learning rate of step n, counted from 0.

    Args:
        optimizer: the optimiser.
        config: which schedule.
        lr: learning rate at its top.
        epochs: epochs of the run.
        steps: steps an epoch.
    """
    warmup = {
        "warmup_t": round(config.warmup_epochs * steps),
        "warmup_lr_init": lr * _WARMUP_START,
        "warmup_prefix": False,
        "t_in_epochs": False,
    }
    if config.name == "cosine":
        # Of a single step, which nothing comes after, timm warns.
        length = max(2, epochs * steps)
        return CosineLRScheduler(optimizer, length, lr_min=config.min_lr, **warmup)
    # timm lowers the rate one step before the one that is named.
    drops = [epoch * steps + 1 for epoch in config.step_epochs] if config.name == "step" else []
    return MultiStepLRScheduler(optimizer, decay_t=drops, decay_rate=config.step_factor, **warmup)


def make_ema(model: nn.Module, config: EmaConfig) -> ModelEmaV3 | None:
    """Return the moving average of a network's weights and buffers; None where none is wanted."""
    if not config.decay:
        return None
    return ModelEmaV3(model, decay=config.decay, use_warmup=config.warmup)
