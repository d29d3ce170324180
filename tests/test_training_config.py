"""A configuration says what is wrong with it, and what of it a run may not change."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from blnet.training import config as module
from blnet.training.config import (
    EmaConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
    changed,
    flat,
    get,
)
from blnet.training.optimization import make_ema, make_optimizer, make_schedule


def with_value(name: str, value: Any) -> TrainingConfig:
    """Return the default configuration with one field, by its dotted name, as given."""
    group, dot, leaf = name.rpartition(".")
    if not dot:
        return replace(TrainingConfig(), **{name: value})
    nested = replace(get(TrainingConfig(), group), **{leaf: value})
    return replace(TrainingConfig(), **{group: nested})


def test_the_defaults_are_right() -> None:
    TrainingConfig().check()


@pytest.mark.parametrize("name", module._BOUNDS)
@pytest.mark.parametrize("where", ["below", "above", "nan"])
def test_a_value_out_of_range_names_its_flag(name: str, where: str) -> None:
    least, most = module._BOUNDS[name]
    value = {"below": least - 1, "above": most * 2 + 1, "nan": math.nan}[where]
    with pytest.raises(ValueError, match=rf"^--{name.replace('_', '-')} must be from .* to .*got"):
        with_value(name, value).check()


def test_a_large_seed_is_named_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"got 9223372036854775808$"):
        TrainingConfig(seed=2**63).check()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 3, "schedule": ScheduleConfig(warmup_epochs=4)}, "--schedule.warmup-epochs 4"),
        ({"schedule": ScheduleConfig(name="step")}, "--schedule.step-epochs"),
        ({"schedule": ScheduleConfig(name="step", step_epochs=[2, 1])}, "rising order"),
        ({"schedule": ScheduleConfig(name="step", step_epochs=[0])}, "from 1"),
        (
            {"schedule": ScheduleConfig(name="step", step_epochs=[4, 9], warmup_epochs=4.5)},
            r"--schedule.step-epochs \[4, 9\] begins inside the warm-up of .*warmup-epochs 4.5",
        ),
        ({"schedule": ScheduleConfig(min_lr=1)}, "--schedule.min-lr 1 is above"),
        ({"optimizer": OptimizerConfig(momentum=0)}, "--optimizer.momentum above 0"),
        ({"resume": "auto"}, "--resume auto needs --output"),
    ],
)
def test_values_that_do_not_go_together_say_so(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        TrainingConfig(**changes).check()
    assert len(str(caught.value).splitlines()) == 1


def test_a_step_may_come_where_the_warm_up_ends() -> None:
    schedule = ScheduleConfig(name="step", step_epochs=[4], warmup_epochs=4)
    TrainingConfig(schedule=schedule).check()


def test_a_resumed_run_may_change_where_it_runs_and_nothing_else() -> None:
    before = TrainingConfig().as_dict()
    free = {"output": "x", "resume": "auto", "device": "cpu", "workers": 3, "log_steps": 1,
            "checkpoint_minutes": 1.0, "checkpoint_steps": 3, "keep": 9, "tensorboard": False,
            "evaluate_epochs": 2,
            "accumulate": 2, "recompute": True, "trust_source": True}  # fmt: skip
    assert changed(before, TrainingConfig(**free).as_dict()) == []
    for name, value in flat(before).items():
        other = (not value) if isinstance(value, bool) else f"not {value}"
        told = changed(before, with_value(name, other).as_dict())
        assert len(told) == (0 if name in free else 1), name
        if told:
            assert told[0] == f"--{name.replace('_', '-')} was {value} and is {other}"


def test_a_configuration_survives_json() -> None:
    config = TrainingConfig(schedule=ScheduleConfig(step_epochs=[3, 4]), epochs=9)
    assert changed(json.loads(json.dumps(config.as_dict())), config.as_dict()) == []


def test_importing_it_imports_nothing_heavy() -> None:
    code = """
import sys, blnet.training.config
print([name for name in ("torch", "accelerate", "timm", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what the configuration makes ---------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def rates(config: ScheduleConfig, epochs: int, steps: int) -> list[float]:
    optimizer = make_optimizer(network(), OptimizerConfig(lr=1.0))
    schedule = make_schedule(optimizer, config, 1.0, epochs, steps)
    found = []
    for step in range(epochs * steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_cosine_goes_from_lr_to_min_lr() -> None:
    found = rates(ScheduleConfig(min_lr=0.1), epochs=4, steps=5)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert found == pytest.approx(expected)


def test_warm_up_is_linear_and_meets_the_cosine() -> None:
    found = rates(ScheduleConfig(warmup_epochs=1.6), epochs=4, steps=5)
    assert found[:8] == pytest.approx([0.01 + 0.99 * step / 8 for step in range(8)])
    assert found[8:] == pytest.approx(rates(ScheduleConfig(), epochs=4, steps=5)[8:])


def test_step_lowers_the_rate_at_the_first_step_of_the_named_epochs() -> None:
    config = ScheduleConfig(name="step", step_epochs=[1, 3], step_factor=0.5, warmup_epochs=0.4)
    found = rates(config, epochs=4, steps=5)
    assert found[2:] == pytest.approx([1.0] * 3 + [0.5] * 10 + [0.25] * 5)
    assert found[:2] == pytest.approx([0.01, 0.505])


def test_constant_stays() -> None:
    assert rates(ScheduleConfig(name="constant"), 2, 3) == pytest.approx([1.0] * 6)


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ({"nesterov": False}, torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        ({"momentum": 0.0, "nesterov": False}, torch.optim.SGD, {"momentum": 0.0}),
        ({"name": "adamw"}, torch.optim.AdamW, {}),
        ({"name": "lamb"}, torch.optim.Optimizer, {"max_grad_norm": None}),
    ],
)
def test_optimizers_are_what_they_are_called(
    options: dict[str, Any], kind: type, expected: dict[str, Any]
) -> None:
    optimizer = make_optimizer(network(), OptimizerConfig(lr=0.3, weight_decay=0.02, **options))
    assert isinstance(optimizer, kind)
    assert type(optimizer).__name__.lower() == options.get("name", "sgd")
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in expected} == expected
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.02)


def test_norms_and_biases_decay_only_where_they_are_to() -> None:
    optimizer = make_optimizer(network(), OptimizerConfig(decay_norms=False))
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups
              for p in group["params"]}  # fmt: skip
    assert decays == {1: 0.0, 4: 1e-4}


def test_an_average_keeps_its_share() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    assert make_ema(model, EmaConfig()) is None
    ema = make_ema(model, EmaConfig(decay=0.75, warmup=False))
    assert ema is not None
    ema.update(model, step=1)  # the first step's weights are the average
    nn.init.ones_(model.weight)
    ema.update(model, step=2)
    assert ema.module.weight.item() == pytest.approx(0.25)


def test_the_decay_s_warm_up_is_as_slow_as_its_help_says() -> None:
    ema = make_ema(nn.Linear(1, 1), EmaConfig(decay=0.99999))
    assert ema is not None
    for steps, decay in ((1_000, 0.99), (31_623, 0.999), (1_000_000, 0.9999)):
        assert ema.get_decay(steps) == pytest.approx(decay, abs=1e-6)
        assert ema.get_decay(steps) == pytest.approx(1 - steps ** (-2 / 3))
