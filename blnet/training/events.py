"""TensorBoard's event files, written at once and in this thread.

PyTorch's SummaryWriter writes in a thread of its own, where a full disk is nobody's error, and
which processes that are forked for loading data must not inherit.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Events:
    """An event file.

    Args:
        folder: where; it is made.
        step: the step from which a run goes on: what earlier files say of later steps is void.

    Raises:
        OSError: if the file cannot be made or written to, now or later.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(exist_ok=True)
        # TensorBoard knows the files by "tfevents" and reads them in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def write(self, values: dict[str, float], step: int) -> None:
        """Add numbers of a step."""
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=entries)))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
