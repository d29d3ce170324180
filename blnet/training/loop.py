"""The training loop: one for every task, on one device or many, that goes on after any stop.

Everything that a step does follows from the seed and the step's number: the order of the samples,
their augmentation, dropout and mixing, the learning rate. What the past left behind is weights,
their averages and the optimiser's state, and those are in the checkpoints. So a run that was killed
goes on to the same bits, on a CPU and wherever the device's own arithmetic repeats itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from blnet.training.checkpoints import CheckpointFolder
from blnet.training.config import TrainingConfig
from blnet.training.corrupt import CorruptLog
from blnet.training.devices import by_first, choose_workers, seed_all
from blnet.training.display import Display
from blnet.training.evaluation import Findings, evaluate, look_ahead
from blnet.training.failures import in_words, of_batch
from blnet.training.journal import METRICS, Journal, read_rows
from blnet.training.loading import Layout, Loaded, Loader, mixed_seed
from blnet.training.progress import Means, RunProgress, Sums
from blnet.training.reporting import Reporter, Summary
from blnet.training.state import STEP_SEED, RunState
from blnet.training.stopping import Interrupted, Stopper
from blnet.training.task import Batch, Task, count_of, to_device

# Seconds of training that a failure in an evaluation, or in an epoch without one, may cost.
MOST_LOST = 30.0


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
            {**task.identity(), "steps an epoch": self.steps},
        )
        self._stopper = Stopper(accelerator)
        self._kept_step = self.progress.step  # of the newest checkpoint; 0 where there is none

    def _order_facts(self) -> dict[str, int]:
        """Return what a step depends on beside the configuration.

        Devices share a map-style set's micro-batches, so that their number matters no more than
        how many each takes one after the other.
        """
        facts = {"samples in a micro-batch": self.layout.micro_batch}
        if self._loader.is_stream:
            facts |= {"devices": self.layout.devices, "readers on each": max(1, self.workers)}
        return facts

    @property
    def samples(self) -> int:
        """How many training samples there are."""
        return count_of(self.task.train_data)

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

    @property
    def is_finished(self) -> bool:
        """Whether the last epoch is over."""
        return self.progress.epoch >= self.config.epochs

    def fit(self, journal: Journal) -> Summary:
        """Train to the end.

        Args:
            journal: keeps the record.

        Raises:
            Interrupted: if a signal asked to stop; a checkpoint was written.
            ValueError: if the loss is no longer a number, memory runs out, too much of the data is
                corrupt or a loading process dies. Earlier checkpoints are untouched.
            OSError: if a file cannot be written, or another process of the run has ended.
        """
        self._journal = journal
        self._reporter = Reporter(
            self.task, self.config, self.steps, self.workers, self.display, journal
        )
        self._corrupt = CorruptLog(
            self.task.unit, self.accelerator, self.display.say, self._note, self._known_corrupt()
        )
        self._saved_at = time.monotonic()
        with self._stopper, self._failures_told():
            if not self.progress.step:
                look_ahead(self.task, self._eval_loader, self.accelerator,
                           self.layout.micro_batch, self._corrupt, self._stopper,
                           self.display.say)  # fmt: skip
            while not self.is_finished:
                self._train_epoch()
                self._end_epoch()
                stop = self._stopper.asked()
                if stop and not self.is_finished:
                    if self._kept_step < self.progress.step:  # without an evaluation
                        self._save()
                    raise Interrupted(stop, self.progress.step)
        if self._corrupt.count:
            self.display.say(
                f"{self._corrupt.count:,} {self.task.unit} could not be read and were skipped; "
                f"{METRICS} names them"
            )
        return self.summary()

    def _note(self, name: str, why: str) -> None:
        self._journal.write("corrupt", self.progress.step, name=name, reason=why)

    def _known_corrupt(self) -> list[str]:
        rows = read_rows(self.folder, "corrupt")
        return [row["name"] for row in rows if row["step"] <= self.progress.step]

    def close(self) -> None:
        """End the loading processes."""
        self._loader.close()
        self._eval_loader.close()

    def summary(self) -> Summary:
        """Return what the run has come to so far."""
        return Summary.of(self.progress, self.steps * self.config.batch_size, self.folder)

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            batch = f"a micro-batch of {self.layout.micro_batch} {self.task.unit}"
            told = of_batch(error, batch, self.device.type, self.config) or in_words(error)
            if told is None:
                raise
            raise told from error

    # --- steps ----------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        progress = self.progress
        self.state.model.train()
        self._epoch_sums = self._own_sums(progress.epoch_sums)
        self._window_sums = self._own_sums(progress.window_sums)
        self._epoch_began = time.monotonic() - progress.epoch_seconds
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
            return self._loader.stream(
                self.layout.micro_batch, progress.epoch, had, self.config.seed
            )
        own = self.layout.own(self._order(progress.epoch))
        return self._loader.batches(own[had:], self.config.seed, progress.epoch)

    def _next(self, batches: Iterator[Loaded]) -> Batch:
        start = time.monotonic()
        loaded = next(batches, None)
        self.progress.waited += time.monotonic() - start
        if loaded is None:
            raise ValueError(
                f"the training {self.task.unit} ended in the middle of an epoch of {self.samples}; "
                "give a smaller number of them, or data that begins again at its end"
            )
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
        only where a line or a checkpoint is due by the number of steps.
        """
        progress, config = self.progress, self.config
        tell = last or progress.step % config.log_steps == 0
        keep = bool(config.checkpoint_steps) and progress.step % config.checkpoint_steps == 0
        if not (tell or keep or self._calls_for_a_look()):
            return
        window = self._all(self._window_sums)
        means = Means.of(window)
        self.state.check_loss(means.loss)
        progress.epoch_seconds = time.monotonic() - self._epoch_began
        if tell:
            self._tell(means)
            window = [0.0] * Sums.SIZE
        stop = self._stopper.asked()
        if stop or (self._is_worth_keeping() if last else keep or self._is_late()):
            progress.window_sums, progress.epoch_sums = window, self._all(self._epoch_sums)
            self._save()
        if stop:
            raise Interrupted(stop, progress.step)

    def _is_worth_keeping(self) -> bool:
        """Return whether an epoch is kept before its evaluation too: a long one, or the first.

        The evaluation ends with a checkpoint anyway, and so short ones are not written twice. Of
        the first, so that there is no best network without a checkpoint.
        """
        return not self._kept_step or self._is_late(MOST_LOST)

    def _calls_for_a_look(self) -> bool:
        if self.accelerator.num_processes > 1:
            return False
        return self.device.type == "cpu" or bool(self._stopper.signal) or self._is_late()

    def _all(self, sums: Sums) -> list[float]:
        """Return sums over all devices."""
        values: list[float] = self.accelerator.reduce(sums.values.clone(), "sum").tolist()
        return values

    def _is_late(self, seconds: float | None = None) -> bool:
        """Return whether a checkpoint is due by time; devices ask together.

        Args:
            seconds: after which it is; None for those of the configuration.
        """
        limit = 60 * self.config.checkpoint_minutes if seconds is None else seconds
        late = time.monotonic() - self._saved_at > limit
        if self.accelerator.num_processes == 1:
            return late
        # Clocks differ between devices; the first one's counts.
        mine = torch.tensor([late and self.accelerator.is_main_process], device=self.device)
        return bool(self.accelerator.gather(mine).any())

    def _save(self, best: bool = False) -> None:
        by_first(self._journal.flush, self.accelerator)
        self.state.save(best)
        self._saved_at = time.monotonic()
        self._kept_step = self.progress.step

    def _tell(self, means: Means) -> None:
        progress = self.progress
        lr = self.state.optimizer.param_groups[0]["lr"]
        self._corrupt.share()
        by_first(lambda: self._reporter.step(progress, means, lr), self.accelerator)
        progress.told_seconds, progress.told_waited = progress.epoch_seconds, progress.waited
        self._window_sums = Sums(self.device)

    def _end_epoch(self) -> None:
        progress, task = self.progress, self.task
        trained = Means.of(self._all(self._epoch_sums))
        found = self._evaluate() if self._is_evaluated() else None
        seconds, waited = progress.epoch_seconds, progress.waited
        progress.end_epoch()
        best = found is not None and progress.is_best(found.values[task.monitor], task.maximize)
        by_first(
            lambda: self._reporter.epoch(progress, trained, found, best, seconds, waited),
            self.accelerator,
        )
        if found is not None:
            progress.last = found.values
            self._save(best)

    def _is_evaluated(self) -> bool:
        """Return whether the epoch that has just been trained ends with an evaluation."""
        epoch = self.progress.epoch + 1
        return epoch % self.config.evaluate_epochs == 0 or epoch == self.config.epochs

    def _evaluate(self) -> Findings:
        self.state.agree_on_buffers()
        found = evaluate(
            self.task,
            self.state.result,
            self._eval_loader,
            self.accelerator,
            self.layout.micro_batch,
            before_batch=self._stop_evaluation,
        )
        self._corrupt.add(found.corrupt, "evaluation", found.asked_for)
        self._corrupt.share()
        return found

    def _stop_evaluation(self) -> None:
        """Stop between two batches of an evaluation, which the resumed run begins anew.

        Several devices finish theirs: they have not the same number of batches to ask together at.
        """
        stop, progress = self._stopper.signal, self.progress
        if not stop or self.accelerator.num_processes > 1:
            return
        if self._kept_step < progress.step:
            progress.window_sums = [0.0] * Sums.SIZE
            progress.epoch_sums = self._all(self._epoch_sums)
            self._save()
        raise Interrupted(stop, progress.step)
