"""blnet kernels list | check | compile."""

import dataclasses

import pytest
import torch

from blnet.cli import main
from blnet.kernels import aot, check, testing
from blnet.kernels.catalogue import OPS


def test_list(capsys):
    assert main(["kernels", "list"]) == 0
    out = capsys.readouterr().out
    assert "\n  merge               relu(upsample_nearest(big) + little)" in out
    for name in ("moments", "expand_merge", "expand_merge_train"):
        assert f"\n  {name} " in out
    for backend in ("triton", "interpret", "torch"):
        assert f"\n  {backend}" in out


def test_check_on_the_cpu(capsys):
    assert main(["kernels", "check", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = len(testing.LAYOUTS) * (len(testing.SHAPES) + 3 * len(testing.EXPAND_SHAPES))
    assert out[0].startswith("checking backend 'torch' on device 'cpu'")
    assert "no kernel runs here; set TRITON_INTERPRET=1" in out[1]
    for op in OPS:
        expected = len(testing.LAYOUTS) * len(op.shapes)
        assert sum(line.startswith(f"{op.name} ") for line in out) == expected
    assert out[-1] == f"{rows} rows, 0 failed"


def test_check_fails_where_a_row_fails(capsys, monkeypatch):
    wrong = dataclasses.replace(OPS[0], function=lambda big, little: OPS[0].reference(big, -little))
    monkeypatch.setattr(check, "OPS", (wrong,))
    assert main(["kernels", "check", "--device", "cpu", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "output: " in out
    assert not out.endswith(" 0 failed\n")


def test_row_holds_both_errors():
    row = check.check_row(OPS[0], torch.bfloat16, "channels_last", testing.SHAPES[0], "cpu")
    assert row.failure == ""
    assert 0 < row.error == row.eager_error < 1e-2
    assert row.max_error > 0


def test_compile(capsys, monkeypatch):
    chosen = aot.specializations()[:2]
    monkeypatch.setattr(aot, "specializations", lambda: chosen)
    assert main(["kernels", "compile", "--target", "sm_90", "--target", "gfx942"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == [
        "target", "registers", "shared", "spills", "matrix", "loads", "kernel",
    ]  # fmt: skip
    assert out.endswith("4 kernels compiled, 0 with spills\n")


def test_compile_fails_on_spills(capsys, monkeypatch):
    report = aot.Report("k", "sm_90", 255, 0, 8, False, (16,), 0.1, "")
    monkeypatch.setattr(aot, "compile_all", lambda targets: iter([report]))
    assert main(["kernels", "compile", "--target", "sm_90"]) == 1
    assert "1 kernels compiled, 1 with spills" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["compile", "--target", "sm_12"], "invalid choice: 'sm_12'"),
        (["check", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["check", "--device", "nonsense"], "--device 'nonsense' cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, message, capsys):
    try:
        status = main(["kernels", *words])
    except SystemExit as stop:  # argparse's own errors
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
