"""Where a run computes: Accelerate's processes and precision, and the seeds of every step."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs

from blnet.environment import core_count
from blnet.training.config import TrainingConfig

_MOST_WORKERS = 16
_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Return the accelerator: this process's device, and its part in a run of several.

    Alone, or started by torchrun or accelerate launch, on one machine or many: the environment
    that those set tells.

    Raises:
        ValueError: if the device or the precision is not there.
    """
    here = torch.cuda.is_available()
    if config.device == "cuda" and not here:
        raise ValueError("--device cuda: PyTorch sees no GPU here; 'blnet doctor' says why")
    cpu = config.device == "cpu" or not here
    if cpu and config.precision == "fp16":
        raise ValueError("--precision fp16 needs a GPU; choose bf16 or fp32 on a CPU")
    # Before the processes connect: one that failed right after would break the others' connection.
    if config.sync_bn and cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--sync-bn needs GPUs: PyTorch takes batch statistics over several "
                         "processes on those alone; leave it out")  # fmt: skip
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = False  # see let_cudnn_search
    # Accelerate keeps the settings of a process's first run for all later ones; only the
    # connection between processes has to stay.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=_PRECISIONS[config.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if (accelerator.device.type == "cpu") != cpu:
        raise ValueError(
            f"--device {config.device}: the processes of this run are connected for "
            f"{accelerator.device.type}; start the run in processes of its own"
        )
    return accelerator


def let_cudnn_search(config: TrainingConfig, device: torch.device, one_shape: bool) -> None:
    """Let cuDNN time its algorithms for each shape of a convolution, where few shapes come.

    Args:
        config: of the run.
        device: where it runs.
        one_shape: whether batches have one shape; where each has its own, a search for every layer
            of every batch takes far longer than the best algorithm saves.
    """
    torch.backends.cudnn.benchmark = (
        one_shape and device.type == "cuda" and not config.deterministic
    )


def choose_workers(config: TrainingConfig, device: torch.device, local_devices: int) -> int:
    """Return how many loading processes a device gets.

    On a CPU none: they would take the cores that the network computes on.
    """
    if config.workers is not None:
        return config.workers
    if device.type == "cpu":
        return 0
    return min(_MOST_WORKERS, max(1, core_count() // max(1, local_devices) - 1))


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random states, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def shared(value: Any, accelerator: Accelerator) -> Any:
    """Return the first process's value in every process."""
    if accelerator.num_processes == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def by_first(action: Callable[[], object], accelerator: Accelerator) -> None:
    """Call a function in the first process; if it fails there, every process fails with its words.

    Otherwise the others would wait for the first one.

    Raises:
        ValueError: if the function raised one.
        OSError: likewise.
    """
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            action()
        except (ValueError, OSError) as error:
            failure = error
    kind = OSError if isinstance(failure, OSError) else ValueError
    told = shared(None if failure is None else (kind, str(failure)), accelerator)
    if failure is not None:
        raise failure
    if told is not None:
        raise told[0](told[1])
