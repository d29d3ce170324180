"""Training on a GPU: mixed precision, gradient scaling and compilation, stopped and resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blnet.training.checkpoints import CheckpointFolder
from blnet.training.progress import Sums
from blnet.training.run import run
from blnet.training.stopping import Interrupted
from blnet.training.task import Batch
from blnet.vision.preprocessing import IMAGENET
from helpers.blobs import TinyTask, tiny_config

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA or ROCm device here", allow_module_level=True)

# cuBLAS reads it once; without it PyTorch refuses to repeat its sums.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
    "fp16, scaled": {"precision": "fp16"},
    "fp16, accumulated": {"precision": "fp16", "accumulate": 2, "channels_last": True},
}


@pytest.fixture(autouse=True)
def left_as_found() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def train(folder: Path, task: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Train the small task; return the last checkpoint's weights, average and training state."""
    config = tiny_config(str(folder), device="cuda", deterministic=True, workers=0, **changes)
    run(TinyTask(**(task or {})), config, folder)
    latest = CheckpointFolder(folder).latest()
    assert latest is not None
    return {
        f"{path.name} {key}": value
        for path in sorted(latest.glob("*.safetensors"))
        for key, value in load_file(path).items()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stopped_run_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", **SETTINGS[name])
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", {"trouble": "terminate", "at": 9}, **SETTINGS[name])
    resumed = train(tmp_path / "stopped", **SETTINGS[name])
    assert whole.keys() == resumed.keys()
    assert whole
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.parametrize("name", SETTINGS)
def test_it_learns(name: str, tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path / "run"), device="cuda", workers=0, **SETTINGS[name])
    summary = run(TinyTask(), config, tmp_path / "run")
    assert summary.best == 1.0


class Greedy(TinyTask):
    """Asks for more memory than any GPU has."""

    def prepare(self, batch: Batch, training: bool) -> Batch:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return batch


def test_memory_that_runs_out_is_told_in_a_sentence(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path / "run"), device="cuda", workers=0)
    with pytest.raises(ValueError, match="memory of the cuda device") as caught:
        run(Greedy(), config, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_steps_account_and_its_pictures_wait_for_nothing() -> None:
    sums = Sums(torch.device("cuda"))
    loss, right = torch.rand((), device="cuda"), torch.tensor(3, device="cuda")
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8, device="cuda")
    IMAGENET.normalize(images)  # the first call copies mean and deviation
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums.add(loss, 8, right)
        sums.add(loss, 8, None)
        IMAGENET.normalize(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.values.tolist()[1:] == [16.0, 8.0, 3.0]
