"""What a run consists of and a checkpoint keeps: network, average, optimiser, and where it is."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from blnet.optimizing.training import OPS, optimize_training
from blnet.trained import EMA, MODEL, load_network
from blnet.training.checkpoints import (
    CheckpointFolder,
    Saved,
    read_training,
    restore_model,
    restore_optimizer,
)
from blnet.training.config import TrainingConfig, changed
from blnet.training.devices import by_first, seed_all
from blnet.training.loading import mixed_seed
from blnet.training.optimization import make_ema, make_optimizer, make_schedule
from blnet.training.progress import RunProgress
from blnet.training.task import Task

INIT_SEED, STEP_SEED = 1, 2  # what a seed is drawn for


class RunState:
    """A run's network and all that trains it, new or as the newest checkpoint has it.

    Args:
        task: what is trained.
        config: how.
        accelerator: the devices.
        checkpoints: the run's checkpoints.
        steps: steps an epoch.
        order: what the order of the samples depends on beside configuration and data.
        data: what tells the data from other data, of `Task.identity`.

    Attributes:
        network: the network, without wrappers.
        model: the same as the loop calls it, with precision and shared gradients.
        ema: the average of its weights; None without one.
        optimizer: the optimiser, which `stepper` wraps for the precision.
        schedule: its `step_update` sets the learning rate.
        teacher: the network to learn from; None without one.
        progress: where the run is.

    Raises:
        ValueError: if a checkpoint is of another network, configuration, order or data.
    """

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        accelerator: Accelerator,
        checkpoints: CheckpointFolder,
        steps: int,
        order: dict[str, Any],
        data: dict[str, Any],
    ) -> None:
        self.task = task
        self.config = config
        self.accelerator = accelerator
        self.checkpoints = checkpoints
        self.order = order
        self.data = data
        self.progress = RunProgress()
        self.network = self._make_network()
        self.ema = make_ema(self.network, config.ema)
        self.optimizer = make_optimizer(self.network, config.optimizer)
        self.schedule = make_schedule(
            self.optimizer, config.schedule, config.optimizer.lr, config.epochs, steps
        )
        self.teacher = self._make_teacher()
        scaler = self._resume()
        # Seconds of earlier sessions count as well.
        self._began = time.monotonic() - self.progress.seconds
        if config.compile:
            # What earlier runs of this process compiled counts towards the number of versions after
            # which Dynamo runs networks of the same class as they are.
            torch.compiler.reset()
            # The average, where there is one, is a copy with a compiled call of its own.
            for network in {self.network, self.result}:
                network.compile()
        self.model, self.stepper = accelerator.prepare(self.network, self.optimizer)
        if accelerator.scaler is not None:
            # One run's scale is not the next one's, where they share the accelerator.
            accelerator.scaler.load_state_dict(scaler or type(accelerator.scaler)().state_dict())

    def _make_network(self) -> nn.Module:
        config = self.config
        seed_all(mixed_seed(config.seed, INIT_SEED))
        network = self.task.build_model()
        if config.optimize or config.recompute:
            without = () if config.optimize else OPS
            network = optimize_training(network, recompute=config.recompute, without=without)
        if config.sync_bn and self.accelerator.num_processes > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return self._placed(network)

    def _placed(self, network: nn.Module) -> nn.Module:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        placed: nn.Module = network.to(  # type: ignore[call-overload]
            self.accelerator.device, memory_format=layout
        )
        return placed

    def _make_teacher(self) -> nn.Module | None:
        name = self.config.distillation.teacher
        if name is None:
            return None
        teacher = self.task.as_teacher(*load_network(name, self.config.trust_source))
        return self._placed(teacher.requires_grad_(False)).eval()

    def _resume(self) -> dict[str, Any]:
        """Take over the newest checkpoint, if there is one; return the gradient scaler's state."""
        path = self._agreed(self.checkpoints.latest())
        if path is None:
            return {}
        saved, state = read_training(path)
        told = changed(saved.config, self.config.as_dict())
        if told:
            raise ValueError(
                f"{path} is of another run: {'; '.join(told)}; give the same settings, or another "
                "--output"
            )
        self._check_same(path, saved.layout)
        restore_model(path / MODEL, self.network)
        if self.ema is not None:
            restore_model(path / EMA, self.ema.module)
        restore_optimizer(self.optimizer, state)
        self.progress = RunProgress.from_dict(saved.progress)
        return saved.scaler

    def _check_same(self, path: Path, before: dict[str, Any]) -> None:
        """Check that samples come in the order of a checkpoint's run, and are those of its data.

        Checkpoints of earlier versions lack some facts, of which nothing is known then.
        """
        order, data = (_differing(before, facts) for facts in (self.order, self.data))
        if order:
            then, now = (", ".join(f"{name} {pair[i]}" for name, pair in order.items())
                         for i in (0, 1))  # fmt: skip
            raise ValueError(
                f"{path} was written with {then} and here are {now}, which changes what a step "
                "sees; choose --accumulate, --workers and the number of devices to match, or "
                "another --output"
            )
        if data:
            told = ", ".join(f"had {then} {n} and has {now}" for n, (then, now) in data.items())
            raise ValueError(
                f"{path} is of another run: the data {told}; give the same data, or another "
                "--output"
            )

    def _agreed(self, path: Path | None) -> Path | None:
        """Check that every process found the same checkpoint, which it is, or all raise."""
        found = {str(path)}
        if self.accelerator.num_processes > 1:
            found = set(gather_object([str(path)]))
        if len(found) > 1:
            raise ValueError(
                f"the processes found different checkpoints ({', '.join(sorted(found))}); --output "
                "must be in a folder that all machines share"
            )
        return path

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated and kept: the average, where there is one."""
        averaged: nn.Module | None = None if self.ema is None else self.ema.module
        return self.network if averaged is None else averaged

    def agree_on_buffers(self) -> None:
        """Give every device the first one's batch statistics: that is what is saved."""
        if self.accelerator.num_processes > 1:
            for buffer in self.result.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def check_loss(self, loss: float) -> None:
        """Check that a loss is a number.

        Raises:
            ValueError: if it is not; the message names the last good checkpoint.
        """
        if math.isfinite(loss):
            return
        latest = self.checkpoints.latest()
        kept = f"the last good checkpoint is {latest}" if latest else "no checkpoint was written"
        raise ValueError(
            f"the loss became {loss} by step {self.progress.step} and {kept}; start again with a "
            f"lower --optimizer.lr (now {self.config.optimizer.lr:g}), a warm-up or "
            "--optimizer.clip-norm"
        )

    def save(self, best: bool = False) -> None:
        """Write a checkpoint, and the best network if it is that.

        Raises:
            ValueError: if a weight is no longer a number; nothing is written then.
            OSError: if the files cannot be written.
        """
        self.progress.seconds = time.monotonic() - self._began
        by_first(lambda: self._write(best), self.accelerator)

    def _write(self, best: bool) -> None:
        if not _is_finite(self.network):
            self.check_loss(math.nan)
        extra = {
            **self.task.header(),
            "task": self.task.name,
            "epoch": self.progress.epoch,
            "step": self.progress.step,
            "metrics": self.progress.last,
        }
        if best:
            # Before the checkpoint: a run killed in between comes here again.
            self.checkpoints.save_best(self.result, extra)
        scaler = self.accelerator.scaler
        saved = Saved(
            self.progress.as_dict(),
            self.config.as_dict(),
            self.order | self.data,
            {} if scaler is None else scaler.state_dict(),
        )
        averaged = None if self.ema is None else self.ema.module
        self.checkpoints.save(
            self.progress.step, self.network, averaged, self.optimizer, saved, extra
        )


def _differing(before: dict[str, Any], facts: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the facts that were known before and were others: name -> (then, now)."""
    return {
        name: (before[name], now) for name, now in facts.items() if before.get(name, now) != now
    }


def _is_finite(model: nn.Module) -> bool:
    values = [t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point()]
    return bool(torch.stack(values).all()) if values else True
