"""What ends a run from outside, in words: loading processes that die, devices that are lost."""

from __future__ import annotations

import re

from blnet.files import reason

# What PyTorch says when a process that a run needs is no longer there.
_LOADER = "DataLoader worker (pid"
_CAUGHT = re.compile(r"Caught (ValueError|OSError) in DataLoader worker process")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error",
         "remote process exited", "Connection refused")  # fmt: skip


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
