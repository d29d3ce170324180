"""Where a run computes: Accelerate's processes and precision, and the seeds of every step."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
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
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif not cpu:
        torch.backends.cudnn.benchmark = True
    return Accelerator(
        cpu=cpu,
        mixed_precision=_PRECISIONS[config.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
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


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("not enough memory", "can't allocate memory", "out of memory")
    )


def shared(value: Any, accelerator: Accelerator) -> Any:
    """Return the first process's value in every process."""
    if accelerator.num_processes == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
