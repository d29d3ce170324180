"""Networks that a user's own function makes, in every command that takes a trained one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import blnet
from blnet.cli import main
from blnet.trained import load_network

MODULE = """
import torchvision
from torch import nn

def make(num_classes=10, in_channels=1):
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    return net
"""
TRAIN = ["train", "vision", "--epochs=1", "--limit=40", "--batch-size=20", "--baseline=false",
         "--device=cpu", "--workers=0", "--tensorboard=false"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module of the user's own lies, with a converted network and a run of it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "their_nets.py").write_text(MODULE)
    picture = torch.randint(256, (8, 8), dtype=torch.uint8).numpy()
    Image.fromarray(picture).save(folder / "a.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = "convert their_nets:make --output net.safetensors --input 1x32x32"
        assert main(words.split()) == 0
        assert main([*TRAIN, "--model.name=their_nets:make", "--output=run"]) == 0
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, worked in, whose module nobody has imported yet."""
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "their_nets", raising=False)
    return folder


OPTIMIZE = ["optimize", "--size=1x32x32", "--engine=pytorch"]
EXPORT = ["export", "--size=1x32x32", "--format=torch", "--no-check", "--overwrite"]
COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "optimize": lambda source: [*OPTIMIZE, source],
    "export": lambda source: [*EXPORT, source, "--output=net.pt"],
    "start": lambda source: [*TRAIN, f"--model.start={source}", "--resume=auto", "--output=start"],
    "inherit": lambda source: [*TRAIN, f"--model.inherit={source}", "--resume=auto",
                               "--output=inherit"],
    "teacher": lambda source: [*TRAIN, f"--distillation.teacher={source}", "--width=0.125",
                               "--resume=auto", "--output=taught"],
    "evaluate": lambda source: ["evaluate", "vision", source],
    "predict": lambda source: ["predict", "vision", "a.png", "--checkpoint", source],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_its_code_is_called_only_where_a_flag_says_so(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = COMMANDS[command]("run")
    assert main(words) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert "run/best.safetensors holds a network that their_nets:make made, and" in printed
    assert printed.endswith("; add --trust-source if you trust the file")
    assert "their_nets" not in sys.modules
    assert main([*words, "--trust-source"]) == 0
    assert "their_nets" in sys.modules


@pytest.mark.parametrize("command", ["optimize", "export"])
def test_a_converted_one_is_rebuilt_only_where_a_flag_says_so(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = COMMANDS[command]("net.safetensors")
    assert main(words) == 2
    assert "; add --trust-source if you trust the file\n" in capsys.readouterr().err
    assert "their_nets" not in sys.modules
    assert main([*words, "--trust-source"]) == 0
    with pytest.raises(ValueError, match="pass trust_source=True if you trust the file"):
        blnet.load("net.safetensors")


def test_a_run_is_built_as_training_did_and_filled(here: Path) -> None:
    network, extra = load_network("run", trust_source=True)
    assert extra["network"]["options"] == {"num_classes": 10, "in_channels": 1}
    with pytest.raises(ValueError, match="import and call that; choose another network"):
        load_network("run")  # of a command without the flag
    made = sys.modules["their_nets"].make(10, 1)  # type: ignore[attr-defined]
    filled = blnet.load("run/best.safetensors", made)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(network(images), filled(images))


def test_training_ends_with_a_command_that_works(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, "--model.name=their_nets:make", "--output=run", "--resume=auto"]) == 0
    told = capsys.readouterr().out
    assert told.endswith("blnet predict vision FILE --checkpoint run --trust-source\n")


def test_a_teacher_s_code_is_not_the_trained_network_s(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMANDS["teacher"]("run"), "--trust-source"]) == 0
    assert capsys.readouterr().out.endswith("blnet predict vision FILE --checkpoint taught\n")
    assert main(["predict", "vision", "a.png", "--checkpoint", "taught"]) == 0
    for command in ("start", "inherit"):
        assert main([*COMMANDS[command]("run"), "--trust-source"]) == 0
        told = capsys.readouterr().out
        assert told.endswith(f"blnet predict vision FILE --checkpoint {command} --trust-source\n")
