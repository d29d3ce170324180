"""What every test shares."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep to one thread: tensors are small, and the workers of a parallel run share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Give the folders of the user's tuning tables and the repository's, both empty.

    The machine has a device named "NVIDIA Test 9000", as far as the tables can tell.
    """
    from blnet.kernels import tuning, tuning_tables

    user, shipped = tmp_path / "user", tmp_path / "shipped"
    name = functools.cache(lambda device: "NVIDIA Test 9000")
    monkeypatch.setenv("BLNET_TABLES", str(user))
    monkeypatch.setattr(tuning_tables, "SHIPPED", shipped)
    monkeypatch.setattr(tuning_tables, "_device_name", name)
    tuning.forget()
    yield user, shipped
    monkeypatch.undo()
    tuning.forget()


class NoDriver:
    """Stands for a GPU driver while tracing: only the architecture is asked for."""

    def get_current_target(self) -> Any:
        """Return what an H100 would say."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver() -> Iterator[None]:
    """Let kernels be traced for a GPU that is not there."""
    import triton

    config = triton.runtime.driver
    before = config._active
    config.set_active(NoDriver())
    yield
    config._active = before
