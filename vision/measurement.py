"""The accuracy of a trained network on images: exact counts, and what follows from them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from blnet.commands.confusion import Counts, wilson
from blnet.limits import out_of_memory
from blnet.training.corrupt import CorruptLog
from blnet.training.devices import choose_workers, let_cudnn_search, make_accelerator
from blnet.training.evaluation import Findings, evaluate
from blnet.training.loading import Loaded, Loader
from blnet.vision.config import VisionConfig
from blnet.vision.data import ImageData
from blnet.vision.inference import check_finite
from blnet.vision.task import TOP, ImageTask

_CONFUSION, _TOP5 = "confusion", "top5"


@dataclass(frozen=True)
class Measurement:
    """What an evaluation counted.

    Attributes:
        confusion: images of class i taken for class j, int64 (classes, classes).
        top5_hits: images of each class with the class among the first five, int64 (classes,); None
            of five classes or fewer.
        loss: mean cross-entropy, nats.
        corrupt: (name, reason) of the images that could not be read; in a run of several processes
            the first has them all, the others none.
        seconds: wall-clock time of the evaluation, loading included.
        waiting: share of it that the first process spent waiting for images.
    """

    confusion: Counts
    top5_hits: Counts | None
    loss: float
    corrupt: tuple[tuple[str, str], ...]
    seconds: float
    waiting: float

    @property
    def images(self) -> int:
        """Images that were evaluated."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Images whose class has the largest logit."""
        return int(self.confusion.trace())

    @property
    def correct_top5(self) -> int | None:
        """Images whose class is among the five largest logits; None of five classes or fewer."""
        return None if self.top5_hits is None else int(self.top5_hits.sum())

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, correct / images."""
        return self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the top-1 accuracy."""
        return wilson(self.correct, self.images)

    @property
    def top5(self) -> float | None:
        """Top-5 accuracy; None of five classes or fewer."""
        return None if self.correct_top5 is None else self.correct_top5 / self.images

    @property
    def images_per_second(self) -> float:
        """Images a second, over all devices, loading included."""
        return self.images / self.seconds


def measure(
    model: nn.Module,
    data: ImageData,
    config: VisionConfig | None = None,
    accelerator: Accelerator | None = None,
    tell: Callable[[str], None] | None = None,
) -> Measurement:
    """Return how a network does on the evaluation part of some data.

    In a run of several processes all call this together, and each evaluates its share.

    Args:
        model: a network from images (N, channels, size, size), as `data.preprocessing` makes them,
            to logits (N, classes); it is moved to the device.
        data: the images; only the evaluation part is read.
        config: batch_size (images that a device takes at once), workers, precision and
            channels_last count; None for the defaults.
        accelerator: the devices; None for those that the configuration asks for.
        tell: takes a line on each image that cannot be read; None for standard error.

    Raises:
        ValueError: if no image can be read, more than 1 % cannot, outputs are not finite numbers
            or memory runs out.
    """
    config = config or VisionConfig()
    accelerator = accelerator or make_accelerator(config)
    task = ImageTask(config, data)
    let_cudnn_search(config, accelerator.device, task.one_shape)
    loader = _loader(task, config, accelerator)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    placed = model.to(accelerator.device, memory_format=layout)  # type: ignore[call-overload]
    metrics = _metrics(task.classes)
    start = time.perf_counter()
    try:
        found = evaluate(task, placed, loader, accelerator, config.batch_size, metrics)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise ValueError(
                f"memory ran out with {config.batch_size} images at once; lower --batch to half"
            ) from error
        raise
    finally:
        loader.close()
    seconds = time.perf_counter() - start
    corrupt = _account(found, accelerator, tell or _tell)
    loss = found.values["loss"]
    check_finite(torch.tensor(loss))
    confusion = metrics[_CONFUSION].compute().cpu().numpy().astype(np.int64)
    hits = None
    if task.classes > TOP:
        # torchmetrics gives shares in float32, of which counts below 2^23 come back exactly.
        shares = metrics[_TOP5].compute().cpu().numpy().astype(np.float64)
        hits = np.rint(shares * confusion.sum(axis=1)).astype(np.int64)
    return Measurement(confusion, hits, loss, corrupt, seconds, found.waiting)


def _metrics(classes: int) -> MetricCollection:
    options: dict[str, Any] = {"num_classes": classes, "validate_args": False}
    found: dict[str, Any] = {_CONFUSION: MulticlassConfusionMatrix(**options)}
    if classes > TOP:
        found[_TOP5] = MulticlassAccuracy(**options, average=None, top_k=TOP)
    return MetricCollection(found, compute_groups=False)


def _account(
    found: Findings, accelerator: Accelerator, tell: Callable[[str], None]
) -> tuple[tuple[str, str], ...]:
    """Name the images that could not be read, of all processes, and return them.

    Raises:
        ValueError: if they are more than 1 %.
    """
    corrupt: list[tuple[str, str]] = []
    log = CorruptLog("images", accelerator, tell, lambda name, why: corrupt.append((name, why)))
    log.add(found.corrupt, "evaluation", found.asked_for)
    log.share()
    return tuple(corrupt)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _loader(task: ImageTask, config: VisionConfig, accelerator: Accelerator) -> Loader:
    device = accelerator.device
    local = torch.cuda.device_count() if device.type == "cuda" else 1
    workers = choose_workers(config, device, local)
    kind = _ShownLoader if accelerator.is_main_process and sys.stderr.isatty() else Loader
    return kind(task.eval_data, task.collate, workers, pin=device.type == "cuda")


class _ShownLoader(Loader):
    """A loader that shows on the terminal how far its batches have come."""

    def batches(
        self, order: Sequence[Sequence[int]], *args: Any, **kwargs: Any
    ) -> Iterator[Loaded]:
        return _shown(super().batches(order, *args, **kwargs), len(order))

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Loaded]:
        return _shown(super().stream(*args, **kwargs), None)


def _shown(batches: Iterator[Loaded], total: int | None) -> Iterator[Loaded]:
    console = Console(stderr=True)
    yield from track(batches, "evaluating", total, console=console, transient=True)
