"""Tasks on a GPU that is not there: tensors with a device and no numbers, which mix no devices.

PyTorch's fake tensors refuse an operation on a GPU's and the CPU's tensors, as a GPU would; what
asks for numbers fails on them too, where a GPU would have to be waited for. Gradients are left out,
as the engine of autograd asks for the device itself.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from blnet.speech.config import AugmentConfig, TaskName
from blnet.speech.tasks import make_task
from blnet.training.task import Batch, Task
from blnet.vision.config import DataConfig, ModelConfig, VisionConfig
from blnet.vision.task import ImageTask
from helpers.tone_runs import FEATURES, labelled_config, write_labelled

GPU = torch.device("cuda", 0)
VARIED = AugmentConfig(noise=0.5, gain=3.0, freq_masks=2, time_masks=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def ctc_of_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the one operation that fake tensors do not know; it copies lengths itself."""

    def loss(logs: Tensor, targets: Tensor, *lengths: Tensor, **_: Any) -> Tensor:
        assert {x.device for x in (targets, *lengths)} == {GPU}
        return logs.sum()

    monkeypatch.setattr(F, "ctc_loss", loss)


def step(task: Task, training: bool) -> dict[str, Tensor]:
    """Return what a step on the fake GPU makes."""
    batch = task.collate([task.train_data[place] for place in range(3)])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with GPU:
            model = task.build_model().train(training)
        placed = {name: torch.empty_like(x, device=GPU) for name, x in batch.items()}
        ready = task.prepare(placed, training)
        outputs = task.forward(model, ready)
        made = {"outputs": outputs, "loss": task.loss(outputs, ready, training)}
        right = task.correct(outputs, ready)
        if right is not None:
            made["right"] = right
        made["distillation"] = task.distillation_loss(outputs, outputs, ready, 2.0)
    return made | ready


@pytest.mark.parametrize("training", [True, False])
def test_pictures_stay_on_the_gpu(training: bool) -> None:
    config = VisionConfig(
        model=ModelConfig(stem="small", width=0.125), data=DataConfig(limit=40), channels_last=True
    )
    made = step(ImageTask(config), training)
    assert {x.device for x in made.values()} == {GPU}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalize", ["none", "global", "utterance"])
@pytest.mark.parametrize("name", ["keyword", "ctc", "frame"])
def test_recordings_stay_on_the_gpu(
    name: TaskName, normalize: Any, training: bool, corpus: Path
) -> None:
    features = dataclasses.replace(FEATURES, normalize=normalize, deltas=True)
    task = make_task(labelled_config(corpus, name, features=features, augment=VARIED))
    made = step(task, training)
    assert {x.device for x in made.values()} == {GPU}


def test_a_tensor_left_behind_shows(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    def correct(outputs: Tensor, batch: Batch) -> Tensor:
        return outputs + torch.ones(3, 1)

    task = make_task(labelled_config(corpus, "keyword"))
    monkeypatch.setattr(task, "correct", correct)
    with pytest.raises(RuntimeError, match=r"devices,? cuda:0(,| and) cpu"):
        step(task, training=True)
