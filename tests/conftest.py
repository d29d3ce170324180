"""What every test shares."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.processes import environment, free_port


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep to one thread: tensors are small, and the workers of a parallel run share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared() -> Callable[[str], str]:
    """Give files of the real data sets: shared("fsdd.zip") -> path; without it skip the test."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BLNET_SHARED_DATA", default))

    def path_of(name: str) -> str:
        if not (folder / name).is_file():
            pytest.skip(
                f"{folder / name} is missing; BLNET_SHARED_DATA names the folder that holds it"
            )
        return str(folder / name)

    return path_of


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


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save networks for the digits: saved("name", model, **header changes) -> path."""
    import blnet
    from helpers.digits import header, network

    def save(name: str = "net", model: torch.nn.Module | None = None, **changes: Any) -> Path:
        path = tmp_path / f"{name}.safetensors"
        blnet.save(network() if model is None else model, path, **header(**changes))
        return path

    return save


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


@pytest.fixture(scope="session")
def forkserver() -> Any:
    """Give processes that begin with the training loop imported and nothing computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["helpers.blobs", "matplotlib.figure", "matplotlib.backends.backend_agg"]
    )
    with pytest.MonkeyPatch.context() as patch:
        # The server looks for what it imports on a path of its own, unlike the processes it starts.
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        first = context.Process(target=time.sleep, args=(0,))  # waits for the imports
        first.start()
        first.join()
    return context


@pytest.fixture
def launch(forkserver: Any) -> Iterator[Callable[..., Any]]:
    """Give a function that starts a process with a function in it; none outlives the test."""
    started = []

    def start(target: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        process = forkserver.Process(target=target, args=arguments, kwargs=named)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture
def launch_together(launch: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Give a function that trains the small task in several processes, and returns those."""
    from helpers.blobs import train_together

    def start(folder: Path, devices: int = 2, **changes: Any) -> list[Any]:
        port = free_port()
        return [
            launch(train_together, rank, devices, port, str(folder), **changes)
            for rank in range(devices)
        ]

    return start
