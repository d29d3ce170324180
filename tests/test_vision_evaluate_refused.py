"""``blnet evaluate vision``: refusals of one line that explain."""

import pytest
import torch
from torch import nn

from blnet import checkpoint
from blnet.cli import main
from blnet.network import BigLittleNet
from blnet.trained import BEST
from blnet.vision import evaluate, inference
from blnet.vision.preprocessing import IMAGENET
from helpers.digits import DIGITS, network


def run(*words):
    return main(["evaluate", "vision", *map(str, words)])


def refused(capsys, *words):
    """Return the one line that a command is refused with."""
    assert run(*words) == 2
    found = capsys.readouterr()
    assert found.out == ""
    (line,) = found.err.splitlines()
    assert line.startswith("blnet evaluate vision: error: ")
    return line.removeprefix("blnet evaluate vision: error: ")


def test_no_such_checkpoint(capsys, tmp_path):
    line = refused(capsys, tmp_path / "no.pth")
    assert "no.pth does not exist; name a .safetensors file, a run's folder" in line
    (tmp_path / "empty").mkdir()
    assert "is a folder without best.safetensors" in refused(capsys, tmp_path / "empty")


def test_a_checkpoint_that_does_not_tell_its_data(saved, capsys):
    line = refused(capsys, saved(data=None))
    assert "does not say what it was trained on; name the data with --data" in line


def test_another_task(saved, capsys):
    line = refused(capsys, saved(task="speech"))
    assert "was trained for the task 'speech', not on images; use 'blnet evaluate speech'" in line


def test_another_task_s_network_need_not_be_known(tmp_path, capsys):
    made = {"name": "bl_resnet22", "options": {}}
    checkpoint.save(nn.Linear(2, 2), tmp_path / BEST, task="speech", network=made)
    for source in (tmp_path, tmp_path / BEST):
        line = refused(capsys, source)
        assert "was trained for the task 'speech', not on images; use 'blnet eval" in line


def test_another_number_of_classes(saved, capsys):
    line = refused(capsys, saved(), "--data", "fake", "--classes", 7, "--eval-images", 8)
    assert "net.safetensors knows 10 classes and fake (8 test images of random pixels" in line
    assert "has 7; evaluate it on data with the classes that it was trained on" in line


def test_other_names_of_classes(saved, capsys):
    names = ["nought", *DIGITS[1:]]
    line = refused(capsys, saved(classes=names))
    assert "knows class 0 as 'nought' and digits (360" in line
    assert "has '0' there" in line


def test_numbers_are_no_names(saved):
    path = saved(classes=["nought", *DIGITS[1:]])
    assert run(path, "--data", "fake", "--classes", 10, "--eval-images", 8) == 0


def test_a_header_that_contradicts_the_network(saved, capsys):
    line = refused(capsys, saved(classes=DIGITS[:9]))
    assert "its header names 9 classes and the network has 10" in line
    line = refused(capsys, saved(preprocessing={"size": 8}))
    assert "preprocessing.crop_ratio is missing" in line
    line = refused(capsys, saved(preprocessing=IMAGENET.as_dict()))
    assert "does not take an input of size (1, 3, 224, 224)" in line
    line = refused(capsys, saved(data={"name": 3}))
    assert "has data settings that make no sense" in line


def test_a_network_that_does_not_classify():
    model = nn.Sequential(network(), nn.Unflatten(1, (2, 5)))
    with pytest.raises(ValueError, match="does not give one logit a class"):
        inference._count_classes(model, (1, 1, 8, 8))


def test_data_that_are_not_there(saved, capsys, tmp_path):
    line = refused(capsys, saved(), "--data", "folder", "--data-path", tmp_path / "none")
    assert line.startswith("--data.path")
    # The errors' flags are known to the command as well.
    line = refused(capsys, saved(), "--data.name", "folder", "--data.path", tmp_path / "none")
    assert line.startswith("--data.path")


def test_outputs_that_are_no_numbers(saved, capsys):
    model = network()
    nn.init.constant_(next(m for m in model.modules() if isinstance(m, nn.Linear)).bias, torch.nan)
    assert "outputs that are not finite numbers" in refused(capsys, saved(model=model))


def test_an_output_that_cannot_be_written(saved, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    # Before any work is done.
    monkeypatch.setattr(evaluate, "measure", None)
    line = refused(capsys, saved(), "--output", tmp_path / "file")
    assert "--output" in line
    assert "is no folder that can be written to" in line


def test_memory_that_runs_out(saved, capsys, monkeypatch):
    def forward(self, images):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    path = saved()
    monkeypatch.setattr(inference, "profile", lambda *_: None)
    monkeypatch.setattr(inference, "_count_classes", lambda *_: 10)
    monkeypatch.setattr(BigLittleNet, "forward", forward)
    assert "memory ran out with 128 images at once; lower --batch" in refused(capsys, path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(saved, capsys):
    assert "--device cuda: PyTorch sees no GPU" in refused(capsys, saved(), "--device", "cuda")
    assert "--precision fp16 needs a GPU" in refused(capsys, saved(), "--precision", "fp16")


@pytest.mark.parametrize(
    "words", [("--batch", "0"), ("--limit", "x"), ("--data", "mnist"), ("--precision", "int8")]
)
def test_flags_that_make_no_sense(saved, capsys, words):
    with pytest.raises(SystemExit) as stop:
        run(saved(), *words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_workers_that_make_no_sense(saved, capsys):
    assert "--workers must be from 0 to 1024" in refused(capsys, saved(), "--workers", "-1")
