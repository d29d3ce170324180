"""Processes that tests start: where they find the helpers, and what they know of each other."""

from __future__ import annotations

import os
import socket
from pathlib import Path

_TESTS = str(Path(__file__).resolve().parents[1])


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a new process that imports helpers.

    Args:
        more: variables to add.
    """
    path = os.pathsep.join(filter(None, [_TESTS, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def free_port() -> int:
    """Return a port at which processes can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def become(rank: int, devices: int, port: int) -> None:
    """Make this process one of several, as a launcher does.

    Args:
        rank: which one.
        devices: how many there are, all on this machine.
        port: where they meet.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(devices),
        LOCAL_WORLD_SIZE=str(devices), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
