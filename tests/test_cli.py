"""The command line: lazily imported commands, one-line errors, exit statuses."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import blnet
from blnet import registry
from blnet.cli import COMMANDS, main
from blnet.network import BigLittleConfig, BigLittleNet
from blnet.official import official_key

MANY = "9" * 5000
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
    (["convert", "--official", "missing.pth", "--output", "x.safetensors"], "pth does not exist;"),
    (["convert", "missing.module:make"], "cannot be imported"),
    (["convert", "torchvision:resnet18", "--input", "3x224x99999999"], "write it as 3x224x224"),
    (["convert", "torchvision:resnet18", "--input", f"3x224x{MANY}"], "write it as 3x224x224"),
    (["convert", "torchvision:resnet18", "--branches", "999999999"], "--branches must be at most"),
    (["convert", "torchvision:resnet18", "--alpha", "999999999"], "--alpha must be at most"),
    (["convert", "torchvision:resnet18", "--overwrite"], "--overwrite needs --output"),
    (["convert", "sys:exit"], "sys:exit cannot be built: SystemExit"),
    *(
        (["convert", name, "--num-classes", classes], "give a whole number from 1 to 1000000;")
        for name in ("torchvision:resnet50", "resnet50")
        for classes in ("0", "-5", "1.5", "1000001", "99999999999999", MANY)
    ),
    *(
        (["convert", "--official", "x.pth", "--output", "x.safetensors", *flags], f"out {flags[0]}")
        for flags in (
            *(["--alpha", "2"], ["--beta", "4"], ["--branches", "2"], ["--num-classes", "1000"]),
            *(["--weights", "w.pth"], ["--inherit-weights"]),
        )
    ),
    (["kernels"], "blnet kernels: error: the following arguments are required: COMMAND;"),
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


MODULE = """
import sys

def runtime(): raise RuntimeError("boom\\nand more")
def key(): raise KeyError("lost")
def leave(): sys.exit("enough")
def deep(): return deep()
def interrupted(): raise KeyboardInterrupt
"""


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("own_nets:runtime", 2, "own_nets:runtime cannot be built: RuntimeError: boom and more"),
        ("own_nets:key", 2, "own_nets:key cannot be built: KeyError: 'lost'"),
        ("own_nets:leave", 2, "own_nets:leave cannot be built: SystemExit: enough"),
        ("own_nets:deep", 2, "own_nets:deep cannot be built: RecursionError: maximum"),
        ("own_nets:interrupted", 130, "interrupted"),
        ("typo_nets:make", 2, "module 'typo_nets' cannot be imported: SyntaxError"),
        ("exit_nets:make", 2, "module 'exit_nets' cannot be imported: SystemExit: 3"),
        ("zero_nets:make", 2, "module 'zero_nets' cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_the_users_code_raises_is_one_line(
    name: str,
    status: int,
    text: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = {"own": MODULE, "typo": "def", "exit": "import sys; sys.exit(3)", "zero": "1 / 0"}
    for module, code in modules.items():
        (tmp_path / f"{module}_nets.py").write_text(code)
        monkeypatch.delitem(sys.modules, f"{module}_nets", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["convert", name]) == status
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.count("\n") == 1
    assert main(["convert", name, "--debug"]) == status
    if status == 2:
        traced = capsys.readouterr().err
        assert "The above exception was the direct cause" in traced
        assert traced.endswith(printed)


def test_without_torchvision_the_image_networks_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(registry, "_ENTRIES", {})
    assert main(["convert", "bl_resnet50"]) == 2
    printed = capsys.readouterr().err
    assert "no network is named 'bl_resnet50'; the image networks need torchvision: " in printed
    assert "pip install 'blnet[vision]'" in printed
    assert printed.count("\n") == 1


def official_file(folder: Path) -> Path:
    model = BigLittleNet(BigLittleConfig(widths=(64, 64, 128, 128), num_classes=10))
    path = folder / "official.pth"
    torch.save({official_key(key): value for key, value in model.state_dict().items()}, path)
    return path


def test_a_file_that_exists_is_replaced_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "net.safetensors"
    output.write_text("precious")
    words = ["convert", "--official", str(official_file(tmp_path)), "--output", str(output)]
    assert main(words) == 2
    assert "exists already; add --overwrite to replace it" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert main([*words, "--overwrite"]) == 0
    assert isinstance(blnet.load(output), BigLittleNet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.safetensors", "official.pth"]


def loaded_weights(
    weights: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """What `--weights` has put into the plain network by the time it is converted."""
    path = folder / "weights.pth"
    torch.save(weights, path)
    found = {}

    def convert(model: torch.nn.Module, *_: object) -> torch.nn.Module:
        found.update(model.state_dict())
        raise ValueError("seen")

    monkeypatch.setattr("blnet.commands.convert.convert", convert)
    words = ["convert", "torchvision:resnet18", "--inherit-weights", "--weights", str(path)]
    assert main(words) == 2
    return found


@pytest.mark.parametrize("outer", [True, False])
def test_weights_may_carry_the_prefix_of_data_parallel(
    outer: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = torchvision.models.resnet18().state_dict()
    counters = [key for key in own if key.endswith("num_batches_tracked")]
    weights = {f"module.{key}": value for key, value in own.items() if key not in counters}
    found = loaded_weights({"state_dict": weights} if outer else weights, tmp_path, monkeypatch)
    assert "seen" in capsys.readouterr().err
    assert all(torch.equal(found[key], value) for key, value in own.items())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fc.bias": None, "odd\n": torch.zeros(1)}, "missing keys: fc.bias; extra keys: 'odd\\n'"),
        ({"fc.bias": torch.zeros(3)}, "wrong shapes: fc.bias (3,) for (1000,)"),
        ({"fc.bias": torch.zeros(1000, dtype=torch.complex64)}, "torch.complex64 for torch.float"),
        ({"fc.bias": torch.zeros(1000, dtype=torch.int32)}, "torch.int32 for torch.float32"),
        ({"fc.bias": torch.zeros(1000).to_sparse()}, "must be dense tensors with values"),
        ({"fc.bias": 3}, "no tensors: fc.bias"),
        ({"module.fc.bias": torch.zeros(1000)}, "fc.bias twice"),
        ({f"extra{n:02}": torch.zeros(1) for n in range(20)}, "extra11 and 8 more"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_weights_that_do_not_fit_are_told_on_one_line(
    change: dict[str, object],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = {**torchvision.models.resnet18().state_dict(), **change}
    kept = {key: value for key, value in weights.items() if value is not None}
    assert not loaded_weights(kept, tmp_path, monkeypatch)
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.count("\n") == 1
    assert "extra12" not in printed


@pytest.mark.parametrize(
    ("words", "status", "lines"),
    [("kernels list >&-", 0, 0), ("nothing 2>&-", 2, 0), ("kernels list 1</dev/null", 2, 1)],
)
def test_an_output_that_cannot_be_written_to(words: str, status: int, lines: int) -> None:
    command = f'"{sys.executable}" -m blnet.cli {words}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.count("\n") == lines, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "iso8859-1"])
def test_an_output_that_cannot_spell_the_answer_says_so(
    encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("blnet.vision.table.run", lambda _: sys.stdout.write("sch\u0151n"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert main(["table"]) == 2
    said = f"the standard output takes {encoding} and not '\\u0151'; set PYTHONUTF8=1, or write to"
    assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    monkeypatch.setattr("blnet.vision.table.run", lambda _: "caf\udce9".encode())
    assert main(["table"]) == 2
    assert "standard output" not in capsys.readouterr().err


def test_what_nobody_foresaw_is_one_line_and_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise RuntimeError("a tensor\nis gone")

    monkeypatch.setattr("blnet.vision.table.run", fail)
    assert main(["table"]) == 1
    assert capsys.readouterr().err == (
        "blnet table: internal error: RuntimeError: a tensor is gone; "
        "run it with --debug and report the traceback\n"
    )
    assert main(["table", "--debug"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):\n")
    assert printed.endswith("RuntimeError: a tensor is gone; report the traceback\n")


def test_debug_shows_the_traceback_and_keeps_the_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["convert", "resnet5000", "--debug"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):\n")
    assert "\nblnet convert: error: no network is named 'resnet5000'" in printed


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


def test_a_missing_package_is_told_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: object) -> int:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr("blnet.vision.table.run", missing)
    assert main(["table"]) == 2
    assert "install it with: pip install 'blnet[vision]'" in capsys.readouterr().err


def test_debug_may_stand_before_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug"]) == 2
    assert "usage" in capsys.readouterr().out.lower()
    assert main(["--debug", "--version"]) == 0
    assert capsys.readouterr().out.count(".") >= 2


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_the_overview_to_a_full_disk_is_one_line(flag: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "blnet.cli", flag], stdout=full, text=True,
                              stderr=subprocess.PIPE, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("blnet: error: ")
    assert done.stderr.count("\n") == 1
