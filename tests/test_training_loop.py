"""The loop against plain PyTorch, with every option, and its evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from blnet.trained import BEST, EMA, MODEL
from blnet.training import state as state_module
from blnet.training.config import (
    DistillationConfig,
    EmaConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from blnet.training.devices import make_accelerator, seed_all
from blnet.training.evaluation import evaluate
from blnet.training.journal import read_rows
from blnet.training.loading import Loader, mixed_seed, shuffled_batches
from blnet.training.optimization import make_schedule
from blnet.training.run import run
from blnet.training.state import INIT_SEED, STEP_SEED
from blnet.training.task import Batch
from helpers.blobs import TinyTask, check_same_weights, tiny_config, train_tiny, weights

# --- what it computes ---------------------------------------------------------------------------


def by_hand(
    epochs: int, accumulate: int, clip: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train as `TinyTask` and `tiny_config` say, without anything of the loop but its seeds."""
    task, size, lr, decay = TinyTask(), 12 // accumulate, 0.05, 0.9
    seed_all(mixed_seed(0, INIT_SEED))
    model = task.build_model().to(memory_format=torch.channels_last)
    averaged = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    step, steps = 0, 48 // 12
    for epoch in range(epochs):
        order = iter(shuffled_batches(48, size, 0, epoch))
        for _ in range(steps):
            rate = lr * (1 + math.cos(math.pi * step / (epochs * steps))) / 2
            if step < steps:
                rate = lr * (0.01 + 0.99 * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            for part in range(accumulate):
                samples = []
                for index in next(order):
                    torch.manual_seed(mixed_seed(0, epoch, index))
                    samples.append(task.train_data[index])
                batch = task.collate(samples)
                seed_all(mixed_seed(0, STEP_SEED, step, part))
                batch = task.prepare(batch, training=True)
                loss = task.loss(model(batch["inputs"]), batch, training=True)
                (loss / accumulate).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            step += 1
            share = min(decay, 1 - (1 + max(0, step - 1)) ** (-2 / 3)) if step > 1 else 0.0
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    averaged[key].lerp_(value, 1 - share)
                else:
                    averaged[key].copy_(value)
    return model.state_dict(), averaged


@pytest.mark.parametrize(("accumulate", "clip"), [(1, 1.0), (3, 0.0)])
def test_it_is_what_plain_pytorch_computes(accumulate: int, clip: float, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=0.05, clip_norm=clip)
    summary = train_tiny(
        str(tmp_path / "run"), epochs=3, accumulate=accumulate, optimizer=optimizer
    )
    model, averaged = by_hand(3, accumulate, clip)
    for name, expected in ((MODEL, model), (EMA, averaged)):
        found = weights(tmp_path / "run", name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, atol=1e-6), (name, key)
    # The average is what is evaluated and kept.
    best = load_file(tmp_path / "run" / BEST)
    rows = list(read_rows(tmp_path / "run", "epoch"))
    values = [row["accuracy"] for row in rows]
    assert summary.best == max(values)
    assert summary.best_epoch == 1 + values.index(max(values))
    if summary.best_epoch == 3:
        assert all(torch.equal(best[key], found[key]) for key in best)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": OptimizerConfig(name="adamw", lr=0.01), "precision": "bf16"},
        {"optimizer": OptimizerConfig(name="lamb", lr=0.01), "channels_last": False},
        {"optimizer": OptimizerConfig(nesterov=False, decay_norms=False), "workers": 1},
        {"schedule": ScheduleConfig(name="step", step_epochs=[1]), "ema": EmaConfig()},
        {"optimize": True, "deterministic": True, "sync_bn": True},
        {"optimize": True, "recompute": True},
        {"recompute": True, "precision": "bf16"},
    ],
)
def test_options_train_and_repeat(changes: dict[str, Any], tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        summary = train_tiny(str(folder), epochs=2, **changes)
        assert summary.last["loss"] < 1.2
    check_same_weights(one, other)


def test_a_run_of_one_step_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.SGD(TinyTask().build_model().parameters(), lr=0.1)
    make_schedule(optimizer, ScheduleConfig(), 0.1, epochs=1, steps=1).step_update(0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not caplog.records


def test_precision_is_the_runs_own_in_a_process_of_many(tmp_path: Path) -> None:
    for name, precision in (("a", "fp32"), ("b", "bf16"), ("c", "fp32")):
        train_tiny(str(tmp_path / name), epochs=1, precision=precision)
    check_same_weights(tmp_path / "a", tmp_path / "c")
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_runs_may_share_an_accelerator_that_keeps_nothing(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), epochs=1)
    accelerator = make_accelerator(config)
    for name in ("a", "b"):
        run(TinyTask(), config, tmp_path / name, accelerator)
        assert (accelerator._models, accelerator._optimizers) == ([], [])
    check_same_weights(tmp_path / "a", tmp_path / "b")


def test_settings_of_one_run_do_not_stay(tmp_path: Path) -> None:
    make_accelerator(TrainingConfig(device="cpu", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    make_accelerator(TrainingConfig(device="cpu"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_devices_that_are_not_there_say_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="--device cuda: PyTorch sees no GPU"):
        make_accelerator(TrainingConfig(device="cuda"))
    with pytest.raises(ValueError, match="--precision fp16 needs a GPU"):
        make_accelerator(TrainingConfig(precision="fp16"))


def test_compile_compiles_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self)))
    monkeypatch.setattr(torch.compiler, "reset", lambda: compiled.append("reset"))
    train_tiny(str(tmp_path / "run"), epochs=1, compile=True, ema=EmaConfig())
    assert compiled == ["reset", nn.Sequential], "earlier runs count towards no limit of this one's"


def test_compile_compiles_the_average_that_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    evaluated: list[nn.Module] = []

    class Watched(TinyTask):
        def forward(self, model: nn.Module, batch: Batch) -> Tensor:
            if not model.training:
                evaluated.append(model)
            return super().forward(model, batch)

    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    config = tiny_config(str(tmp_path), epochs=1, compile=True, ema=EmaConfig(0.9))
    run(Watched(), config, tmp_path / "run")
    assert len(compiled) == 2
    assert {id(model) for model in evaluated} < {id(model) for model in compiled}


class Taught(TinyTask):
    """Notes what it learnt from."""

    checked: Any = None

    def as_teacher(self, network: nn.Module, extra: Any) -> nn.Module:
        self.checked = (network, extra)
        return network


def test_a_teacher_takes_its_share_of_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = TinyTask(dropout=0.5).build_model()
    monkeypatch.setattr(state_module, "load_network", lambda name, _: (teacher, {"name": name}))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    losses = {}
    task = Taught(train=12)
    for weight in (0.0, 0.25, 1.0):
        config = tiny_config(
            str(tmp_path), epochs=1, log_steps=1,
            distillation=DistillationConfig("t", weight, temperature=3.0),
        )  # fmt: skip
        run(task, config, tmp_path / f"{weight}")
        (row,) = read_rows(tmp_path / f"{weight}", "train")
        losses[weight] = row["loss"]
    assert task.checked == (teacher, {"name": "t"})
    assert not teacher.training
    for key, value in teacher.state_dict().items():
        assert torch.equal(before[key], value)
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-5)
    assert losses[1.0] != pytest.approx(losses[0.0], rel=0.01)


def test_the_distillation_loss_is_the_papers() -> None:
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    found = TinyTask().distillation_loss(student, teacher, {}, 4.0)
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    assert torch.allclose(found, 16 * (p * (p / q).log()).sum(1).mean())
    assert TinyTask().distillation_loss(teacher, teacher, {}, 2.0).item() == pytest.approx(0)


# --- evaluation ---------------------------------------------------------------------------------


def test_an_evaluation_weighs_every_sample_once() -> None:
    task = TinyTask(evaluation=7)
    model = task.build_model().train()
    accelerator = make_accelerator(TrainingConfig(device="cpu"))
    metrics = task.metrics()
    loader = Loader(task.eval_data, task.collate)
    found = evaluate(task, model, loader, accelerator, 3, metrics)
    batch = next(iter(loader.batches([range(7)], 0, 0))).batch
    assert batch is not None
    with torch.no_grad():
        outputs = model.eval()(batch["inputs"])
    assert found.samples == 7
    assert found.values["loss"] == pytest.approx(F.cross_entropy(outputs, batch["targets"]).item())
    right = (outputs.argmax(1) == batch["targets"]).float().mean().item()
    assert found.values["accuracy"] == pytest.approx(right)
    assert metrics.compute()["accuracy"].item() == pytest.approx(right)


def test_an_evaluation_leaves_the_mode_as_it_was_and_names_what_is_corrupt() -> None:
    task = TinyTask(evaluation=7)
    task.eval_data.corrupt = (2, 3)
    model = task.build_model().train()
    accelerator = make_accelerator(TrainingConfig(device="cpu"))
    found = evaluate(task, model, Loader(task.eval_data, task.collate), accelerator, 3)
    assert model.training
    assert found.samples == 5
    assert [one.name for one in found.corrupt] == ["sample-2", "sample-3"]
    task.eval_data.corrupt = tuple(range(7))
    with pytest.raises(ValueError, match="no sample that could be read"):
        evaluate(task, model, Loader(task.eval_data, task.collate), accelerator, 3)
