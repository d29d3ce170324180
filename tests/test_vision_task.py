"""The image task, and the command that trains it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset

from blnet import checkpoint
from blnet.checkpoint import read_header
from blnet.cli import main
from blnet.trained import load_network
from blnet.training.config import DistillationConfig
from blnet.training.journal import read_rows
from blnet.training.run import run as run_task
from blnet.vision.config import AugmentConfig, DataConfig, ModelConfig, VisionConfig
from blnet.vision.data import ImageData, load_data
from blnet.vision.preprocessing import IMAGENET
from blnet.vision.task import ImageTask, accuracies, build_network, describe
from blnet.vision.train import COMMAND

SMALL = ["--width=0.125", "--limit=120", "--batch-size=32", "--tensorboard=false", "--device=cpu"]
MODEL = ModelConfig(stem="small", width=0.125)
DATA = DataConfig(limit=40)


def train(*words: str) -> int:
    return main(["train", "vision", *SMALL, *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with its plain network beside it."""
    folder = tmp_path_factory.mktemp("run") / "out"
    assert train("--epochs=2", f"--output={folder}") == 0
    return folder


def test_a_run_leaves_networks_figures_and_a_plot(run: Path, capsys) -> None:
    for folder in (run, run / "baseline"):
        rows = list(read_rows(folder, "epoch"))
        assert [row["epoch"] for row in rows] == [1, 2]
        assert {"loss", "accuracy", "top5", "train_loss", "waiting", "seconds"} <= rows[0].keys()
        assert (folder / "summary.png").read_bytes()[:4] == b"\x89PNG"
        head = json.loads((folder / "run.json").read_text())
        assert head["config"]["model"]["width"] == 0.125
        assert "torch" in head["facts"]["versions"]
        extra = read_header(folder / "best.safetensors")["extra"]
        assert extra["classes"] == [str(digit) for digit in range(10)]
        assert extra["preprocessing"]["size"] == 8
    big_little, _ = load_network(run)
    plain, _ = load_network(run / "baseline")
    assert big_little.config.branches == 2
    assert plain.config.branches == 1


def test_the_plain_network_s_figure_stands_beside(run: Path, capsys) -> None:
    # A finished run says what it came to, and trains nothing.
    began = (run / "best.safetensors").stat().st_mtime
    assert train("--epochs=2", f"--output={run}", "--resume=auto") == 0
    out = capsys.readouterr().out
    assert "bl_resnet18 (alpha 2, beta 4, width 0.125): best accuracy" in out
    assert "\nresnet18 (width 0.125): best accuracy" in out
    assert (run / "best.safetensors").stat().st_mtime == began


@pytest.mark.parametrize(
    ("name", "flag"),
    [("bl_resnet18", ""), ("timm:resnet18", ""), ("own.nets:make", " --trust-source")],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_a_network_of_ones_own_module_is_said_to_be_trusted(
    name: str, flag: str, trusted: bool, tmp_path: Path
) -> None:
    made = {"name": name, "options": {}}
    checkpoint.save(nn.Linear(2, 2), tmp_path / "best.safetensors", network=made)
    config = VisionConfig(trust_source=trusted)  # of a teacher, which may be another's code
    said = f"try it: blnet predict vision FILE --checkpoint {tmp_path}{flag}"
    assert said == COMMAND.advice(config, tmp_path)


def test_a_run_whose_network_was_moved_away_has_advice(tmp_path: Path) -> None:
    said = f"try it: blnet predict vision FILE --checkpoint {tmp_path}"
    assert said == COMMAND.advice(VisionConfig(), tmp_path)


def test_a_plain_network_has_no_baseline(tmp_path: Path) -> None:
    assert train("--epochs=1", "--model.name=resnet18", f"--output={tmp_path / 'out'}") == 0
    assert (tmp_path / "out" / "best.safetensors").is_file()
    assert not (tmp_path / "out" / "baseline").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epochs=3", "--output={run}"], "holds a run already"),
        (["--epochs=3", "--output={run}", "--resume=auto"], "--epochs was 2 and is 3"),
        (["--resume=auto"], "--output"),
        (["--batch-size=500"], "more than the 120 training images"),
        (["--model.name=bl_resnet19"], "near it are"),
        (["--model.start={run}", "--model.inherit={run}"], "not both"),
        (["--model.start={run}", "--baseline"], "with --model.start leave it out"),
        (["--model.inherit={run}", "--baseline=true"], "with --model.inherit leave it out"),
        (["--model.name=timeit:timeit", "--width=1", "--baseline=false"], "with num_classes=10, "
         "in_channels=1 (timeit() got an unexpected keyword argument 'num_classes'); have the"),
        (["--model.start=/nonexistent.safetensors", "--baseline=false"], "does not exist"),
        (["--model.start={run}", "--baseline=false", "--data.name=fake", "--data.classes=7",
          "--train-images=64", "--eval-images=8", "--data.size=8"], "pictures of 3 channels"),
        (["--width=0.3"], "whole numbers"),
        (["--model.name=torchvision:resnet18", "--baseline=false"], "has a width of its own"),
        (["--data.name=cifar10"], "cifar"),
        (["--lr=1e6", "--baseline=false", "--output={new}"], "loss became"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(words, said, run, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.format(run=run, new=tmp_path / "new") for word in words]
    assert train(*words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert told.startswith("blnet train vision: error: ")


@pytest.mark.parametrize("flag", ["model.start", "model.inherit", "distillation.teacher"])
def test_a_network_of_another_task_is_refused(flag: str, tmp_path: Path, capsys) -> None:
    made = {"name": "bl_resnet22", "options": {}}
    checkpoint.save(nn.Linear(2, 2), tmp_path / "best.safetensors", task="speech", network=made)
    assert train("--baseline=false", f"--{flag}={tmp_path}", f"--output={tmp_path / 'new'}") == 2
    assert capsys.readouterr().err == (
        f"blnet train vision: error: --{flag} {tmp_path} holds a speech network where one for "
        "vision is needed; name a run of 'blnet train vision'\n"
    )


def test_a_network_goes_on_from_another_s_weights(run: Path, tmp_path: Path) -> None:
    words = ["--epochs=1", "--lr=1e-12", "--weight-decay=0", "--baseline=false"]
    assert train(f"--model.start={run}", f"--output={tmp_path / 'on'}", *words) == 0
    first, _ = load_network(run)
    second, extra = load_network(tmp_path / "on")
    own = dict(second.named_parameters())
    for name, value in first.named_parameters():
        torch.testing.assert_close(own[name], value, msg=name)
    assert extra["network"]["name"] == "bl_resnet18"


def test_a_recipe_s_baseline_gives_way_to_a_trained_network(run, tmp_path, capsys) -> None:
    assert train(f"--model.start={run}", "--epochs=1", f"--output={tmp_path / 'on'}") == 0
    assert not (tmp_path / "on" / "baseline").exists()
    told = "blnet train vision: --model.start takes a trained network, so that the plain one"
    assert told in capsys.readouterr().err


def test_a_baseline_s_command_trains_the_same_network_alone(run, tmp_path, monkeypatch) -> None:
    own = ["train", "vision", *SMALL, "--epochs=2", f"--output={run}"]
    monkeypatch.setattr("blnet.training.command.command_line", lambda: shlex.join(["blnet", *own]))
    config, _ = COMMAND.parse(own[2:])
    (_, place, command), (changed, inner, alone) = COMMAND._runs(config, run)
    assert (place, inner) == (run, run / "baseline")
    assert command == shlex.join(["blnet", *own])
    assert COMMAND.parse(shlex.split(alone)[3:])[0] == dataclasses.replace(
        changed, output=str(inner)
    )
    head = json.loads((inner / "run.json").read_text())
    assert head["facts"]["command"].endswith(
        f" --model.branches=1 --baseline=false --output={inner}"
    )


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "digits"),
        (["--recipe=cifar10"], "cifar10"),
        (["--recipe=imagenette", "--data.path=here"], "imagenette"),
        (["--data.name=folder", "--data.path=../pets/"], "pets"),
        (["--data.name=npz", "--data.path", __file__], Path(__file__).stem),
        (["--data.name=cifar10", "--data.path=data"], "cifar10"),
        (["--data.name=folder", "--data.path=/"], "folder"),
    ],
)
def test_a_run_is_called_after_its_recipe_or_the_data_that_flags_name(words, name) -> None:
    assert COMMAND._called(*COMMAND.parse(words), words) == name


def test_a_plain_network_is_converted_and_taught_by_itself(run: Path, tmp_path: Path) -> None:
    plain = run / "baseline"
    words = [f"--model.inherit={plain}", f"--distillation.teacher={plain}", "--baseline=false"]
    assert train("--epochs=1", f"--output={tmp_path / 'bl'}", *words) == 0
    found, _ = load_network(tmp_path / "bl")  # a checkpoint that rebuilds itself
    assert found.plan.alpha == 2
    assert found(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_teacher_of_other_pictures_is_refused(run: Path) -> None:
    config = VisionConfig(
        model=MODEL,
        data=DataConfig("fake", size=8, classes=10, train_images=32, eval_images=8),
        distillation=DistillationConfig(teacher=str(run)),
    )
    task = ImageTask(config)
    with pytest.raises(ValueError, match=r"--distillation.teacher .* 3 channels"):
        task.as_teacher(*load_network(run))


def renamed(data: ImageData, names: str) -> ImageData:
    return dataclasses.replace(data, classes=tuple(names))


def test_a_teacher_of_other_classes_is_refused(run: Path, tmp_path: Path) -> None:
    config = VisionConfig(
        model=MODEL, data=DATA, distillation=DistillationConfig(teacher=str(run)), batch_size=20
    )
    data = load_data(DATA)
    ImageTask(config, data).as_teacher(*load_network(run))
    other = renamed(data, "0123456798")
    told = r"--distillation.teacher .* knows class 8 as '8' and digits .* has '9' there; choose a"
    with pytest.raises(ValueError, match=told) as caught:
        run_task(ImageTask(config, other), config, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
    # To go on from it is another matter: other classes are what fine-tuning is for.
    start = dataclasses.replace(MODEL, start=str(run))
    ImageTask(dataclasses.replace(config, model=start), other).build_model()


def test_a_run_goes_on_with_the_same_classes_only(tmp_path: Path) -> None:
    config = VisionConfig(model=MODEL, data=DATA, batch_size=20, epochs=1, device="cpu",
                          resume="auto", output=str(tmp_path), tensorboard=False)  # fmt: skip
    data = load_data(DATA)
    run_task(ImageTask(config, data), config, tmp_path)
    run_task(ImageTask(config, data), config, tmp_path)
    with pytest.raises(ValueError, match=r"the data had \w+ as checksum .* and has \w+; give"):
        run_task(ImageTask(config, renamed(data, "0123456798")), config, tmp_path)
    fewer = dataclasses.replace(data, evaluation=Subset(data.evaluation, range(39)))
    with pytest.raises(ValueError, match="the data had 40 evaluation images and has 39; give"):
        run_task(ImageTask(config, fewer), config, tmp_path)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_a_network_with_several_outputs_is_refused(name: str) -> None:
    model = ModelConfig(name=f"torchvision:{name}")
    told = rf"torchvision:{name} returns \w+Outputs in training, and one tensor of logits"
    size = dataclasses.replace(IMAGENET, size=299)
    with torch.device("meta"), pytest.raises(ValueError, match=told):
        build_network(model, 10, size)


class Undecided(nn.Module):
    """Looks at numbers in training, so that it does not run without any."""

    def __init__(self, several: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 10)
        self.several = several
        self.broken = broken

    def forward(self, x: torch.Tensor) -> object:
        if self.training and bool((x > 1).any()):
            raise AssertionError("zeros are asked for")
        if self.training and self.broken:
            raise RuntimeError("output size is too small")
        answer = self.fc(x.flatten(1))
        return (answer, answer) if self.training and self.several else answer


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, None),
        ({"several": True}, "returns tuple in training"),
        ({"broken": True}, r"does not train on pictures of 3 .* 8 x 8 pixels \(output size is too"),
    ],
)
def test_a_network_is_tried_for_what_it_gives(options, told, monkeypatch) -> None:
    monkeypatch.setattr("blnet.registry.build", lambda name, **unused: Undecided(**options))
    model, size = ModelConfig(name="torchvision:alexnet"), dataclasses.replace(IMAGENET, size=8)
    refusal = pytest.raises(ValueError, match=told) if told else contextlib.nullcontext()
    with refusal:
        assert build_network(model, 10, size)[0].training


def test_loss_is_smoothed_in_training_only() -> None:
    task = ImageTask(VisionConfig(model=MODEL, data=DATA, label_smoothing=0.2))
    logits, targets = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    batch = {"inputs": logits, "targets": targets}
    exact = F.cross_entropy(logits, targets)
    torch.testing.assert_close(task.loss(logits, batch, training=False), exact)
    shares = torch.full((4, 10), 0.02).scatter_(1, targets[:, None], 0.82)
    by_hand = -(shares * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task.loss(logits, batch, training=True), by_hand)


def test_pictures_are_mixed_in_training_only_and_normalised_always() -> None:
    task = ImageTask(VisionConfig(model=MODEL, data=DATA, augment=AugmentConfig(mixup=1.0)))
    batch = task.collate([task.train_data[i] for i in range(8)])
    assert batch["inputs"].dtype == torch.uint8
    still = task.prepare(batch, training=False)
    assert "shares" not in still
    assert still["inputs"].dtype == torch.float32
    assert still["inputs"].is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(3)
    mixed = task.prepare(batch, training=True)
    assert mixed["shares"].shape == (8, 10)
    assert not torch.equal(mixed["inputs"], still["inputs"])
    logits = F.one_hot(mixed["shares"].argmax(1), 10).float()
    assert task.correct(logits, mixed) == 8


def test_top5_is_measured_where_there_are_more_classes_than_five() -> None:
    assert set(accuracies(10)) == {"accuracy", "top5"}
    assert set(accuracies(5)) == {"accuracy"}
    metrics = accuracies(10)
    logits = torch.eye(10)[[0, 1, 2]] + torch.arange(10) / 100
    metrics.update(logits, torch.tensor([0, 9, 4]))
    found = metrics.compute()
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["top5"] == pytest.approx(2 / 3)


def test_names_of_networks() -> None:
    assert describe(ModelConfig("bl_resnet50", 4, 2)) == "bl_resnet50 (alpha 4, beta 2)"
    assert describe(ModelConfig("bl_resnet50", branches=1)) == "resnet50"
    assert describe(ModelConfig("resnet18", width=0.5)) == "resnet18 (width 0.5)"
    assert "3 branches" in describe(ModelConfig("bl_resnet50", branches=3))


def test_the_default_recipe_learns_digits(tmp_path: Path, capsys) -> None:
    # At half the width and without the plain network, to be quick; whole it does better.
    words = ["--width=0.5", "--baseline=false", "--tensorboard=false", "--device=cpu"]
    assert main(["train", "vision", *words, f"--output={tmp_path / 'out'}"]) == 0
    last = list(read_rows(tmp_path / "out", "epoch"))[-1]
    assert last["accuracy"] >= 0.97
    assert "GMACs at 1x8x8" in capsys.readouterr().out
