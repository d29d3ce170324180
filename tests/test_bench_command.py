"""`blnet bench` as a user meets it: help, bad input, a whole run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from blnet.bench import plugin
from blnet.bench.catalogue import STUDIES, SUITES, op_suites
from blnet.bench.flags import parse_settings
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings, check_writable, resolve
from blnet.cli import main


def test_help_explains_every_flag(capsys) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        *("--device", "--dtype", "--batch", "--size", "--models", "--alpha", "--beta"),
        *("--baseline", "--images", "--quick", "--full", "--output", "--repeat", "--threads"),
        *("--list", "--seed"),
    ):
        assert flag in text
    assert text.count("default") >= 12


def test_list_measures_nothing(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--list", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for name in (*SUITES, "bl_resnet50 a4 b4", "compile, frozen", "compile, tuned *"):
        assert name in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("found", "listed"), [(None, "  openvino -"), (object(), "  openvino  ")])
def test_list_tells_what_is_not_installed(found, listed, capsys, monkeypatch) -> None:
    look = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: found if name == "openvino" else look(name, *rest),
    )
    assert main(["bench", "--list", "--device", "cpu"]) == 0
    assert listed in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nosuch"], "no suite 'nosuch'; choose from models, training, speech_models"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--batch", "x"], "invalid int value"),
        (["--size", "8"], "--size must be at least 32, got 8"),
        (["--repeat", "1"], "--repeat must be at least 2"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--size", "99999999"], "--size must be at most 8192, got 99999999"),
        (["--batch", "99999999999"], "--batch must be at most 65536, got 99999999999"),
        (["--batch", "60000", "--size", "8192"], "choose a smaller batch or size"),
        (["--repeat", "9999999"], "--repeat must be at most 1000000, got 9999999"),
        (["--threads", "99999999999"], "--threads must be at most 1024, got 99999999999"),
        (["--seed", str(2**63)], f"--seed must be at most {2**63 - 1}, got {2**63}"),
        (["--seed", "-1", "--list"], "--seed must be at least 0, got -1"),
        (["--list", "--models", "nosuch"], "no network is named 'nosuch'"),
        (["--list", "--alpha", "7", "--beta", "4"], "7"),
        (["--baseline", "bl_resnet50"], "name a plain one, such as resnet50"),
        (["--models", "sys:exit"], "sys:exit cannot be built: SystemExit"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--models", "resnet9000"], "'resnet9000'"),
        (["--models", "bl_resnet50", "--alpha", "7", "--beta", "4"], "7"),
        (["--alpha", "2", "4", "--beta", "1", "2", "4"], "--alpha has 2 values and --beta 3"),
        (["--images", "nowhere"], "--images nowhere is not a folder"),
        (["--quick", "--full"], "not allowed with"),
        (["--output", "file/deeper"], "is not a folder"),
        (["--output", "used"], "holds a results.json already"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words, said, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "results.json").write_text("{}")
    try:
        status = main(["bench", "--device", "cpu", *words])
    except SystemExit as done:  # how argparse ends
        status = done.code
    captured = capfd.readouterr()
    assert status == 2
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "used"]


def test_a_gpu_that_is_not_there(monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_an_unwritable_folder(tmp_path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written to"):
        check_writable(tmp_path / "out")


def test_a_closed_folder_says_what_to_do(tmp_path, monkeypatch) -> None:
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("blnet.bench.settings.tempfile.mkstemp", refuse)
    with pytest.raises(ValueError, match=r"\(Permission denied\); choose a folder that you may"):
        check_writable(tmp_path / "out")


def test_check_writable_leaves_nothing(tmp_path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_settings_of_flags() -> None:
    settings = resolve(parse_settings(["merge", "--device", "cpu", "--alpha", "2", "4"]))
    assert settings.suites == ("merge",)
    assert settings.branchings == ((2, 4), (4, 4))
    assert (settings.dtype, settings.batches) == ("float32", (1, 8))
    assert settings.rounds(8) >= 8
    assert settings.rounds(1) >= 20
    assert resolve(Settings(device="cpu", batch=1)).batches == (1,)


def test_kernels_stands_for_the_suites_of_the_ops() -> None:
    ops = op_suites()
    assert "merge" in ops
    assert "models" not in ops
    assert parse_settings(["kernels"]).suites == tuple(ops)
    assert parse_settings(["merge", "models", "kernels"]).suites[:2] == ("merge", "models")
    assert len(parse_settings(["merge", "kernels"]).suites) == len(ops)


class WrongSuite:
    """A suite whose second implementation has the sign of one channel flipped."""

    NAME = "wrong"

    def cases(self, settings):
        return []

    def build(self, group, session):
        import torch

        from blnet.bench.measure import Group, Implementation

        right = torch.ones(2, 4)
        flipped = right * torch.tensor([1.0, -1.0, 1.0, 1.0])
        calls = {"right": right, "flipped": flipped}
        return Group(
            self.NAME,
            group,
            [Implementation(n, "f", lambda t=t: lambda: t) for n, t in calls.items()],
            {"f": lambda: right.double()},
            1e-3,
            "exact",
            session.settings.rounds(1),
        )


def test_a_session_measures_a_group_once_and_a_failure_fails_the_run(tmp_path, capsys) -> None:
    from blnet.bench.runner import finish

    steps = []
    settings = Settings(device="cpu", repeat=3)
    session = Session(settings, lambda step, share: steps.append(share))
    suite = WrongSuite()
    right = session.measured(suite, Case("g", "f", "right"))
    assert session.measured(suite, Case("g", "f", "flipped")).status == "wrong"
    assert len(right.samples) == 3
    assert len(session.results.measurements) == 2
    assert sum(steps) == pytest.approx(4)  # two built, two timed
    with pytest.raises(KeyError, match="nosuch"):
        session.measured(suite, Case("g", "f", "nosuch"))
    assert finish(session.results, tmp_path / "out") == 1
    assert "FAILED wrong, g, f, flipped" in capsys.readouterr().out
    session.results.interrupted = True
    assert finish(session.results, tmp_path / "out") == 130
    assert "interrupted" in capsys.readouterr().err


INTERRUPTED = """
import sys
from pathlib import Path
from blnet.bench.runner import finish, run_suites
from blnet.bench.session import Session
from blnet.bench.settings import Settings

def watch(step, share):
    if step.endswith("round 4 of 9"):
        raise KeyboardInterrupt

session = Session(Settings(device="cpu", repeat=9), watch)
run_suites({"tiny": "test_tiny"}, session)
sys.exit(finish(session.results, Path("out")))
"""
TINY_SUITE = """
import pytest, torch
from blnet.bench.measure import Group, Implementation
from blnet.bench.plugin import measured, pytest_generate_tests
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.session import Case

NAME = "tiny"

def cases(settings):
    return [Case("g", "f", "one")]

def build(group, session):
    one = torch.ones(3)
    return Group(NAME, group, [Implementation("one", "f", lambda: lambda: one)],
                 {"f": lambda: one}, 1e-6, "exact", session.settings.rounds(1))

@pytest.mark.benchmark(timer=virtual_clock)
def test_tiny(case, measured, benchmark):
    replay(benchmark, measured(case))
"""


def test_an_interrupted_run_keeps_what_it_has(tmp_path) -> None:
    (tmp_path / "test_tiny.py").write_text(TINY_SUITE)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert values["interrupted"]
    assert len(values["measurements"][0]["samples"]) == 3


def test_plain_pytest_collects_the_suites(tmp_path) -> None:
    import blnet.bench.suites

    folder = os.path.dirname(str(blnet.bench.suites.__file__))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", folder],
        cwd=tmp_path,
        env={**os.environ, "BLNET_BENCH": "--device cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "batch 8 | bl_resnet50 a4 b4 | compile, frozen" in done.stdout
    assert "test_merge" in done.stdout
    for study in STUDIES:  # these train
        assert f"::test_{study}[left out]" in done.stdout
        assert done.stdout.count(f"::test_{study}[") == 1


@pytest.mark.parametrize(
    ("suite", "named", "said"),
    [
        ("accuracy", (), "it trains, for minutes to days; BLNET_BENCH=accuracy asks for it"),
        ("accuracy", ("accuracy",), ""),
        ("models", (), ""),
        ("mine", ("models",), ""),
        ("models", ("models", "merge"), ""),
        ("models", ("accuracy",), "BLNET_BENCH names other suites"),
    ],
)
def test_suites_that_plain_pytest_leaves_out(suite: str, named: tuple[str, ...], said: str) -> None:
    assert plugin._left_out(suite, named) == said


def test_the_suites_need_nothing_of_speech() -> None:
    code = (
        "import sys\n"
        "for name in ('librosa', 'jsonargparse', 'soundfile', 'plotly'): sys.modules[name] = None\n"
        "import blnet.bench\n"
        "assert 'torch' not in sys.modules and 'pytest' not in sys.modules\n"
        "import blnet.bench.suites.test_models, blnet.bench.suites.test_merge, blnet.bench.runner\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_whole_run(tmp_path) -> None:
    """Tiny, without compiling: a compiler that is not there makes those rungs unavailable."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "blnet.cli", "bench", "models", "merge", "--device", "cpu"),
            *("--models", "bl_resnet18", "--alpha", "2", "--size", "64", "--batch", "2"),
            *("--repeat", "3", "--threads", "1", "--output", "out"),
        ],
        cwd=tmp_path,
        env={**os.environ, "CXX": str(tmp_path / "no-compiler"), "PYTEST_ADDOPTS": "--nonsense"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bl_resnet18" in done.stdout
    assert "measuring models, batch 2" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "a run leaves nothing but its output"
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert made == {
        *("results.json", "results.csv", "report.md", "report.html", "models.png", "merge.png")
    }
    assert "realised b1 |" in (tmp_path / "out" / "report.md").read_text()
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [n["label"] for n in values["networks"]] == ["resnet18", "bl_resnet18 a2 b4"]
    by_status: dict[str, set[str]] = {}
    for m in values["measurements"]:
        by_status.setdefault(m["status"], set()).add(m["implementation"])
        if m["status"] == "ok":
            assert len(m["samples"]) == (3 if m["suite"] == "models" else 12)
            assert m["check"]["error"] <= m["check"]["tolerance"]
            if m["implementation"] in ("onnxruntime", "openvino"):  # their memory is their own
                assert m["peak_memory"] is None
            else:
                assert m["peak_memory"] > 0
    assert by_status["ok"] >= {"eager", "folded", "blnet"}
    assert by_status["skipped"] == {"compile, frozen", "compile", "blnet native"}
