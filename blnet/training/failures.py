"""What ends a run from outside, in words: loading processes that die, devices that are lost."""

from __future__ import annotations

import re

from blnet.files import reason
from blnet.limits import out_of_memory
from blnet.training.config import TrainingConfig

# What PyTorch says when a process that a run needs is no longer there.
_LOADER = "DataLoader worker (pid"
_CAUGHT = re.compile(r"Caught (ValueError|OSError) in DataLoader worker process")
# What it says where batch normalisation gets a single sample, of one pixel by then.
_ONE_VALUE = "Expected more than 1 value per channel"
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error",
         "remote process exited", "Connection refused")  # fmt: skip


def of_batch(
    error: Exception, batch: str, device: str, config: TrainingConfig
) -> ValueError | None:
    """Return an error that says what is wrong with a batch's size; None for one of another kind.

    Args:
        error: what a step raised.
        batch: what goes through the network at once, "a micro-batch of 12 images" say.
        device: "cpu" or "cuda".
        config: of the run.
    """
    size, parts = f"--batch-size ({config.batch_size})", f"--accumulate ({config.accumulate})"
    if out_of_memory(error):
        return ValueError(
            f"{batch} does not fit into the memory of the {device} device; lower {size} or raise "
            f"{parts}"
        )
    if isinstance(error, ValueError) and _ONE_VALUE in str(error):
        return ValueError(
            f"{batch} is too little for the network's batch normalisation, which needs two at "
            f"least; raise {size} or lower {parts}"
        )
    return None


def in_words(error: BaseException) -> Exception | None:
    """Return an error that says in a sentence what happened; None for one of another kind.

    PyTorch raises the death of a loading process anywhere in the program, and wraps the errors of
    one, with the traceback, into the message.
    """
    text = str(error)
    if _CAUGHT.match(text):
        kind, _, told = text.strip().splitlines()[-1].partition(": ")
        return OSError(told or kind) if isinstance(error, OSError) else ValueError(told or kind)
    if not isinstance(error, RuntimeError):
        return None
    if _LOADER in text:
        return ValueError(
            f"a data loading process died ({reason(error)}); main memory or shared memory "
            "(/dev/shm) may be too small: lower --workers and go on with --resume auto"
        )
    if any(sign in text for sign in _LOST):
        return OSError(
            f"another process of this run has ended ({reason(error)}); its own message says why: "
            "mend that and go on with --resume auto"
        )
    return None
