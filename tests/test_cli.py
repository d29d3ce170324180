"""The command line: lazily imported commands, one-line errors, exit statuses."""

from __future__ import annotations

import pytest

from blnet.cli import COMMANDS, main

BAD_INPUTS = [
    (["nothing"], "no command 'nothing'"),
    (["table", "--format", "pdf"], "invalid choice: 'pdf'"),
    (["table", "--unknown"], "unrecognized arguments: --unknown"),
    (["convert"], "give either a NETWORK or --official FILE"),
    (["convert", "resnet5000"], "no network is named 'resnet5000'"),
    (["convert", "torchvision:resnet5000"], "torchvision has no classification model"),
    (["convert", "torchvision:resnet18", "--alpha", "3"], "choose an alpha that divides"),
    (["convert", "torchvision:resnet18", "--alpha", "two"], "invalid int value: 'two'"),
    (["convert", "torchvision:resnet18", "--beta", "0"], "beta must be a whole number"),
    (["convert", "torchvision:vgg11"], "no stage was recognised in VGG"),
    (["convert", "torchvision:resnet18", "--input", "3x224"], "write it as 3x224x224"),
    (["convert", "torchvision:resnet18", "--inherit-weights"], "needs --weights FILE"),
    (["convert", "torchvision:resnet18", "--output", "net.pth"], "must end with .safetensors"),
    (["convert", "torchvision:resnet18", "--output", "no/folder/x.safetensors"], "create the fold"),
    (["convert", "--official", "missing.pth"], "--official needs --output"),
    (["convert", "--official", "missing.pth", "--output", "x.safetensors"], "missing.pth"),
    (["convert", "missing.module:make"], "cannot be imported"),
    (["kernels"], "error"),
    (["doctor", "extra"], "unrecognized arguments: extra"),
]


@pytest.mark.parametrize(("words", "text"), BAD_INPUTS, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_line_and_exit_status_2(
    words: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # type: ignore[arg-type]
    try:
        status: object = main(words)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2
    assert text in printed.err
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir()), "something was left behind"  # type: ignore[attr-defined]


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="no network is named"):
        main(["convert", "resnet5000", "--debug"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: blnet {name}" in capsys.readouterr().out


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_an_interrupt_has_its_own_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("blnet.vision.table.run", interrupt)
    assert main(["table"]) == 130
    assert "interrupted" in capsys.readouterr().err
