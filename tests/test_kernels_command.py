"""blnet kernels list | check | compile | bench."""

import dataclasses

import pytest
import torch

from blnet.cli import main
from blnet.kernels import aot, check, testing
from blnet.kernels.backend import KERNEL_DTYPES
from blnet.kernels.catalogue import OPS


def test_list(capsys):
    assert main(["kernels", "list"]) == 0
    out = capsys.readouterr().out
    assert "\n  merge               relu(upsample_nearest(big) + little)" in out
    for name in ("moments", "expand_merge", "expand_merge_train", "bottleneck", "stem"):
        assert f"\n  {name} " in out
    for backend in ("triton", "interpret", "torch"):
        assert f"\n  {backend}" in out


def test_check_on_the_cpu(capsys):
    assert main(["kernels", "check", "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    dtypes = len(KERNEL_DTYPES)
    rows = dtypes * len(testing.LAYOUTS) * sum(len(op.shapes) for op in OPS)
    assert out[0].startswith("checking backend 'torch' on device 'cpu'")
    assert "no kernel runs here; set TRITON_INTERPRET=1" in out[1]
    for op in OPS:
        expected = dtypes * len(testing.LAYOUTS) * len(op.shapes)
        assert sum(line.startswith(f"{op.name} ") for line in out) == expected
    assert out[-1] == f"{rows} rows, 0 failed"


def test_check_of_some_ops_in_several_processes(capsys):
    results = []
    for jobs in ("1", "2"):
        command = ["kernels", "check", "--device", "cpu", "--dtype", "float32", "--op", "merge"]
        assert main([*command, "--op", "moments", "--jobs", jobs]) == 0
        results.append(capsys.readouterr().out)
    assert results[0] == results[1]
    assert "expand_merge" not in results[0]


def test_check_refuses_a_device_that_computes_nothing(capsys):
    assert main(["kernels", "check", "--device", "meta"]) == 2
    assert "--device 'meta' cannot be used: it computes nothing" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["0", "257"])
def test_check_needs_a_sane_number_of_processes(jobs, capsys):
    assert main(["kernels", "check", "--device", "cpu", "--jobs", jobs]) == 2
    assert f"--jobs must be from 1 to 256, got {jobs}" in capsys.readouterr().err


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
    report = aot.Report("k", "sm_90", 255, 0, 8, "", (16,), 0.1, "")
    monkeypatch.setattr(aot, "compile_all", lambda targets, chosen: iter([report]))
    assert main(["kernels", "compile", "--target", "sm_90"]) == 1
    assert "1 kernels compiled, 1 with spills" in capsys.readouterr().out


@pytest.mark.parametrize(("target", "status"), [("sm_90", 1), ("sm_100", 0)])
def test_compile_lets_candidates_spill_where_they_were_not_picked_for(target, status, monkeypatch):
    report = aot.Report("merge candidate X", target, 255, 0, 8, "", (16,), 0.1, "")
    monkeypatch.setattr(aot, "compile_all", lambda targets, chosen: iter([report]))
    assert main(["kernels", "compile", "--target", target]) == status


def test_compile_names_the_matrix_instructions(capsys, monkeypatch):
    reports = [aot.Report(name, "sm_90", 9, 0, 0, name, (16,), 0.1, "") for name in ("", "wgmma")]
    monkeypatch.setattr(aot, "compile_all", lambda targets, chosen: iter(reports))
    assert main(["kernels", "compile", "--target", "sm_90"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:3]
    assert [row.split()[4] for row in rows] == ["no", "wgmma"]


def test_compile_chooses_kernels_by_name(capsys, monkeypatch):
    seen = {}

    def compile_all(targets, chosen):
        seen.update({target: [item.name for item in chosen] for target in targets})
        return iter(())

    monkeypatch.setattr(aot, "compile_all", compile_all)
    words = ["kernels", "compile", "--target", "sm_80", "--target", "gfx942"]
    assert main([*words, "--kernel", "moments K=64"]) == 0
    assert set(seen) == {"sm_80", "gfx942"}
    assert len(seen["sm_80"]) == 6  # and that with 64-bit offsets, in three precisions
    assert all(name.startswith("moments K=64") for name in seen["sm_80"])
    assert main(words) == 0
    rules = seen["sm_80"]
    assert main([*words, "--candidates"]) == 0
    assert len(seen["sm_80"]) > len(rules) + 300
    assert len(set(seen["sm_80"])) == len(seen["sm_80"])


def test_bench_is_the_suites_of_the_ops(capsys, monkeypatch):
    from blnet.bench import command

    seen = []
    monkeypatch.setattr(command, "run", lambda arguments: seen.append(arguments) or 0)
    assert main(["kernels", "bench", "--batch", "4"]) == 0
    assert (seen[0].suites, seen[0].batch) == (["kernels"], 4)
    with pytest.raises(SystemExit) as stop:
        main(["kernels", "bench", "--help"])
    assert stop.value.code == 0
    assert "usage: blnet bench" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["kernels", "--help"])
    out = capsys.readouterr().out
    for command_name in ("list", "check", "compile", "tune", "bench"):
        assert f"\n    {command_name} " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["compile", "--kernel", "nothing"], "--kernel 'nothing': no kernel's name contains it"),
        (["bench", "nosuch"], "no suite 'nosuch'; choose from"),
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


def test_an_op_that_cannot_be_launched_fails_its_row_alone(monkeypatch):
    def fail(*_):
        raise RuntimeError("out of resource: shared memory,\nRequired: 240000")

    op = dataclasses.replace(OPS[0], function=fail)
    row = check.check_row(op, torch.bfloat16, "channels_last", testing.SHAPES[0], "cpu")
    assert row.failure == "RuntimeError: out of resource: shared memory, Required: 240000"
    good = check.check_row(OPS[0], torch.bfloat16, "channels_last", testing.SHAPES[0], "cpu")
    assert not good.failure
