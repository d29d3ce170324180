"""The training loop: one for every task, on one device or many, that goes on after any stop.

Everything that a step does follows from the seed and the step's number: the order of the samples,
their augmentation, dropout and mixing, the learning rate. What the past left behind is weights,
their averages and the optimiser's state, and those are in the checkpoints. So a run that was killed
goes on to the same bits, on a CPU and wherever the device's own arithmetic repeats itself.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from blnet.training.checkpoints import CheckpointFolder
from blnet.training.config import TrainingConfig
from blnet.training.corrupt import CorruptLog
from blnet.training.devices import choose_workers, out_of_memory, seed_all
from blnet.training.display import Display
from blnet.training.evaluation import Findings, evaluate
from blnet.training.journal import Journal
from blnet.training.loading import Layout, Loaded, Loader, Stream, mixed_seed
from blnet.training.progress import Means, RunProgress, Sums
from blnet.training.state import STEP_SEED, RunState
from blnet.training.stopping import Interrupted, Stopper
from blnet.training.task import Batch, Task, to_device

# Above this share of an epoch's time, if that is a second at least, data is the bottleneck.
WAITING_TOLD = 0.1


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        best: best value of the task's monitored metric.
        best_epoch: the epoch after which it was found, counted from 1.
        last: what the last evaluation found, metric -> number.
        seconds: time in all, of every session.
        train_seconds: time spent in training steps.
        samples_per_second: samples trained on a second, evaluation left out.
        waiting: share of the training time that was spent waiting for data.
        folder: the run's folder.
    """

    best: float
    best_epoch: int
    last: dict[str, float]
    seconds: float
    train_seconds: float
    samples_per_second: float
    waiting: float
    folder: Path


class Trainer:
    """Trains a task's network, from the start or from where the newest checkpoint is.

    Args:
        task: model, data, loss and metrics.
        config: how to train; checked by the caller.
        folder: the run's folder, which exists.
        accelerator: the devices, of `make_accelerator`.
        display: shows the progress.

    Raises:
        ValueError: if the configuration does not fit the data or a checkpoint in the folder.
    """

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        folder: Path,
        accelerator: Accelerator,
        display: Display,
    ) -> None:
        self.task = task
        self.config = config
        self.accelerator = accelerator
        self.display = display
        self.device = accelerator.device
        self.folder = folder
        self.layout = Layout(
            config.batch_size,
            config.accumulate,
            accelerator.num_processes,
            accelerator.process_index,
        )
        local = torch.cuda.device_count() if self.device.type == "cuda" else 1
        self.workers = choose_workers(config, self.device, local)
        pin = self.device.type == "cuda"
        self._loader = Loader(task.train_data, task.collate, self.workers, replace=True, pin=pin)
        self._eval_loader = Loader(task.eval_data, task.collate, self.workers, pin=pin)
        self.steps = self._steps_an_epoch()
        self.state = RunState(
            task,
            config,
            accelerator,
            CheckpointFolder(folder, config.keep),
            self.steps,
            self._order_facts(),
        )
        self._stopper = Stopper(accelerator)

    def _order_facts(self) -> dict[str, int]:
        """Return what the order of the samples depends on beside the configuration.

        That of a map-style set depends on nothing else: devices share the same batches.
        """
        if not self._loader.is_stream:
            return {}
        return {"devices": self.layout.devices, "workers": self.workers}

    @property
    def samples(self) -> int:
        """How many training samples there are."""
        data = self.task.train_data
        return int(data.samples if isinstance(data, Stream) else len(data))

    def _steps_an_epoch(self) -> int:
        micro = self.layout.micro_batch
        count = self.samples // micro if self._loader.is_stream else len(self._order(0))
        steps = self.layout.steps(count)
        if not steps:
            raise ValueError(
                f"--batch-size {self.config.batch_size} is more than the {self.samples} training "
                f"{self.task.unit}; choose a smaller one"
            )
        return steps

    def _order(self, epoch: int) -> Any:
        return self.task.batches(self.layout.micro_batch, self.config.seed, epoch)

    @property
    def progress(self) -> RunProgress:
        """Where the run is."""
        return self.state.progress

    def fit(self, journal: Journal) -> Summary:
        """Train to the end.

        Args:
            journal: keeps the record.

        Raises:
            Interrupted: if a signal asked to stop; a checkpoint was written.
            ValueError: if the loss is no longer a number, memory runs out, or too much of the data
                is corrupt. Earlier checkpoints are untouched.
            OSError: if a file cannot be written.
        """
        self._journal = journal
        self._corrupt = CorruptLog(self.task.unit, self.accelerator, self.display.say, self._note)
        with self._stopper, self._memory_told():
            while self.progress.epoch < self.config.epochs:
                self._train_epoch()
                self._end_epoch()
                stop = self._stopper.asked()
                if stop and self.progress.epoch < self.config.epochs:
                    raise Interrupted(stop, self.progress.step)
        return self.summary()

    def _note(self, name: str, why: str) -> None:
        self._journal.write("corrupt", self.progress.step, name=name, reason=why)

    def summary(self) -> Summary:
        """Return what the run has come to so far."""
        progress = self.progress
        spent = max(progress.train_seconds, 1e-9)
        return Summary(
            best=math.nan if progress.best is None else progress.best,
            best_epoch=progress.best_epoch,
            last=progress.last,
            seconds=progress.seconds,
            train_seconds=progress.train_seconds,
            samples_per_second=progress.epoch * self.steps * self.config.batch_size / spent,
            waiting=progress.train_waited / spent,
            folder=self.folder,
        )

    @contextlib.contextmanager
    def _memory_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise ValueError(
                f"a micro-batch of {self.layout.micro_batch} {self.task.unit} does not fit into "
                f"the memory of the {self.device.type} device; lower --batch-size "
                f"({self.config.batch_size}) or raise --accumulate ({self.config.accumulate})"
            ) from error

    # --- steps ----------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        progress = self.progress
        self.state.model.train()
        self._epoch_sums = self._own_sums(progress.epoch_sums)
        self._window_sums = self._own_sums(progress.window_sums)
        now = time.monotonic()
        self._epoch_began = now - progress.epoch_seconds
        self._saved_at = now
        self._window_began = (now, progress.waited)
        batches = self._batches()
        while progress.epoch_step < self.steps:
            self._step(batches)
            progress.epoch_step += 1
            progress.step += 1
            self._look(progress.epoch_step == self.steps)

    def _own_sums(self, values: list[float]) -> Sums:
        """Return sums over all devices as this device's part: all of it in the first."""
        return Sums(self.device, values if self.accelerator.is_main_process else None)

    def _batches(self) -> Iterator[Loaded]:
        progress = self.progress
        had = progress.epoch_step * self.config.accumulate
        if self._loader.is_stream:
            return self._loader.stream(self.layout.micro_batch, progress.epoch, had)
        own = self.layout.own(self._order(progress.epoch))
        return self._loader.batches(own[had:], self.config.seed, progress.epoch)

    def _next(self, batches: Iterator[Loaded]) -> Batch:
        start = time.monotonic()
        loaded = next(batches)
        self.progress.waited += time.monotonic() - start
        if loaded.corrupt:
            self._corrupt.add(loaded.corrupt, "training", self.samples)
        if loaded.batch is None:
            raise ValueError(f"not one of a batch's {self.task.unit} could be read; check the data")
        return to_device(loaded.batch, self.device)

    def _step(self, batches: Iterator[Loaded]) -> None:
        config, layout, state = self.config, self.layout, self.state
        step = self.progress.step
        state.schedule.step_update(step)
        for part in range(config.accumulate):
            batch = self._next(batches)
            seed_all(mixed_seed(config.seed, STEP_SEED, step, part * layout.devices + layout.rank))
            with self._gradients_kept(part):
                self._backward(self.task.prepare(batch, training=True))
        if config.optimizer.clip_norm:
            self.accelerator.clip_grad_norm_(state.model.parameters(), config.optimizer.clip_norm)
        state.stepper.step()
        state.stepper.zero_grad()
        if state.ema is not None:
            state.ema.update(state.network, step=step + 1)

    def _gradients_kept(self, part: int) -> Any:
        """Share gradients between devices only after the last micro-batch of a step."""
        if part == self.config.accumulate - 1:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.state.model)

    def _backward(self, batch: Batch) -> None:
        with self.accelerator.autocast():
            outputs = self.task.forward(self.state.model, batch)
        loss = self._distilled(self.task.loss(outputs, batch, training=True), outputs, batch)
        self.accelerator.backward(loss / self.config.accumulate)
        correct = self.task.correct(outputs, batch)
        samples = self.task.samples(batch)
        for sums in (self._epoch_sums, self._window_sums):
            sums.add(loss, samples, correct)

    def _distilled(self, loss: Tensor, outputs: Tensor, batch: Batch) -> Tensor:
        config, teacher = self.config.distillation, self.state.teacher
        if teacher is None:
            return loss
        with torch.no_grad(), self.accelerator.autocast():
            answers = self.task.forward(teacher, batch)
        taught = self.task.distillation_loss(outputs, answers, batch, config.temperature)
        return (1 - config.weight) * loss + config.weight * taught

    # --- looking at the run, and keeping it -----------------------------------------------------

    def _look(self, last: bool) -> None:
        """After a step: stop at a loss that is none, tell and keep what is due.

        Reading a sum waits for a GPU, and several devices must read it together, so those do it
        every log_steps only.
        """
        progress, config = self.progress, self.config
        due = last or progress.step % config.log_steps == 0
        alone = self.accelerator.num_processes == 1
        if not due and not (alone and self.device.type == "cpu"):
            return
        window = self._all(self._window_sums)
        means = Means.of(window)
        self.state.check_loss(means.loss)
        now = time.monotonic()
        progress.epoch_seconds = now - self._epoch_began
        if due:
            self._tell(means, now)
            self._window_sums = Sums(self.device)
            window = [0.0] * Sums.SIZE
        if last:
            return  # the epoch's end writes a checkpoint
        stop = self._stopper.asked()
        if stop or self._checkpoint_due(now):
            progress.window_sums, progress.epoch_sums = window, self._all(self._epoch_sums)
            self._save()
        if stop:
            raise Interrupted(stop, progress.step)

    def _all(self, sums: Sums) -> list[float]:
        """Return sums over all devices."""
        values: list[float] = self.accelerator.reduce(sums.values.clone(), "sum").tolist()
        return values

    def _checkpoint_due(self, now: float) -> bool:
        config = self.config
        if config.checkpoint_steps and self.progress.step % config.checkpoint_steps == 0:
            return True
        late = now - self._saved_at > 60 * config.checkpoint_minutes
        if self.accelerator.num_processes == 1:
            return late
        # Clocks differ between devices; the first one's counts.
        mine = torch.tensor([late and self.accelerator.is_main_process], device=self.device)
        return bool(self.accelerator.gather(mine).any())

    def _save(self, best: bool = False) -> None:
        self._journal.flush()
        self.state.save(best)
        self._saved_at = time.monotonic()

    def _tell(self, means: Means, now: float) -> None:
        progress = self.progress
        began, waited = self._window_began
        self._window_began = (now, progress.waited)
        spent = max(now - began, 1e-9)
        rate = means.samples / spent
        total = self.config.epochs * self.steps
        done = progress.train_seconds + progress.epoch_seconds
        self.display.step(
            progress.step / total,
            f"{progress.epoch + 1}/{self.config.epochs}",
            means.loss,
            means.accuracy,
            rate,
            done / progress.step * (total - progress.step),
        )
        self._journal.write(
            "train",
            progress.step,
            epoch=progress.epoch + 1,
            loss=means.loss,
            accuracy=means.accuracy,
            lr=self.state.optimizer.param_groups[0]["lr"],
            samples_per_second=rate,
            waiting=(progress.waited - waited) / spent,
        )

    def _end_epoch(self) -> None:
        progress = self.progress
        trained = Means.of(self._all(self._epoch_sums))
        found = self._evaluate()
        progress.epoch += 1
        progress.epoch_step = 0
        progress.last = found.values
        best = self._is_best(found.values[self.task.monitor])
        self._tell_epoch(trained, found, best)
        progress.train_seconds += progress.epoch_seconds
        progress.train_waited += progress.waited
        progress.epoch_seconds = progress.waited = 0.0
        progress.epoch_sums, progress.window_sums = [0.0] * Sums.SIZE, [0.0] * Sums.SIZE
        self._save(best)

    def _evaluate(self) -> Findings:
        self.state.agree_on_buffers()
        found = evaluate(
            self.task,
            self.state.result,
            self._eval_loader,
            self.accelerator,
            self.layout.micro_batch,
        )
        self._corrupt.add(found.corrupt, "evaluation", found.samples + len(found.corrupt))
        self._corrupt.share()
        return found

    def _is_best(self, value: float) -> bool:
        progress = self.progress
        sign = 1 if self.task.maximize else -1
        if progress.best is not None and sign * value <= sign * progress.best:
            return False
        progress.best, progress.best_epoch = value, progress.epoch
        return True

    def _tell_epoch(self, trained: Means, found: Findings, best: bool) -> None:
        progress, monitor = self.progress, self.task.monitor
        spent = max(progress.epoch_seconds, 1e-9)
        waiting = progress.waited / spent
        rate = self.steps * self.config.batch_size / spent
        accuracy = {} if trained.accuracy is None else {f"train_{monitor}": trained.accuracy}
        self._journal.write(
            "epoch",
            progress.step,
            epoch=progress.epoch,
            train_loss=trained.loss,
            **accuracy,
            **found.values,
            best=progress.best,
            seconds=spent,
            samples_per_second=rate,
            waiting=waiting,
        )
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.values.items())
        self.display.spoken()
        self.display.say(
            f"epoch {progress.epoch}/{self.config.epochs}  training loss {trained.loss:.4f}  "
            f"evaluation: {shown}{' (best)' if best else ''}  "
            f"{rate:,.0f} {self.task.unit}/s, {waiting:.0%} of the time waiting for data"
        )
        if waiting > WAITING_TOLD and progress.waited > 1:
            self.display.say(
                f"warning: data is the bottleneck: {waiting:.0%} of the training time went into "
                f"waiting for it; raise --workers (now {self.workers})"
            )
