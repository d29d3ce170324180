"""blnet kernels tune on a fake clock, and ahead-of-time compilation of what it measures."""

import dataclasses

import pytest
import torch

from blnet.cli import main
from blnet.kernels import aot, tune, tuning, tuning_tables
from blnet.kernels.expand_merge_sizes import Problem
from blnet.kernels.triton_shim import triton
from blnet.kernels.tuning import TUNABLES
from blnet.kernels.tuning_tables import Entry, Table

GPU = torch.device("cuda", 0)
DEVICE = "NVIDIA Test 9000"  # of the folders fixture
FILE = "nvidia-test-9000.json"
KERNEL = "expand_merge forward"
KEY = "2 bytes, K=64, C=256, x2, rows 2^16"
CHOICE = {"BLOCK_ROWS": 64, "BLOCK_C": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
OTHER = {**CHOICE, "BLOCK_ROWS": 32}


def table(choice=CHOICE):
    entries = {KERNEL: {KEY: Entry(choice, 10.0, 12.0)}}
    return Table(DEVICE, "sm_90", "2.11", "3.6", "2025-01-01", entries)


# Measuring, on a fake clock ----------------------------------------------------------------------

SLOW, FAST, FASTEST, WRONG, UNFIT, POISONED = (
    {**CHOICE, "BLOCK_ROWS": rows, "BLOCK_K": 16} for rows in (16, 32, 64, 128, 256, 256)
)
POISONED = {**POISONED, "num_warps": 8}
SITE = Problem(1, 16, 128, 8, 8, 4, 4, 2)


def fake_call(problem, dtype, device):
    truth = torch.linspace(-1, 1, 1000).to(dtype)

    def call():
        choice = tuning._forced[KERNEL]
        if choice == UNFIT:
            raise RuntimeError("out of resource: shared memory")
        if choice == WRONG:
            return (truth.flip(0),)
        return (torch.full_like(truth, torch.nan) if choice == POISONED else truth.clone(),)

    return call


def fake_tunable(*chosen):
    return dataclasses.replace(
        TUNABLES[KERNEL],
        problems=lambda batch, itemsize: {
            f"site {k}": dataclasses.replace(SITE, n=batch, channels_in=k) for k in (16, 32)
        },
        candidates=lambda problem: list(chosen),
        call=fake_call,
    )


def fake_timer(times, log=None):
    def timer(call):
        call()
        choice = tuning._forced[KERNEL]
        if log is not None:
            log.append(choice)
        return next((t for c, t in times if c == choice), 100.0)

    return timer


TIMES = [(SLOW, 200.0), (FAST, 90.0), (FASTEST, 50.0), (WRONG, 1.0), (POISONED, 1.0)]
CPU = torch.device("cpu")
ALL = (SLOW, WRONG, FAST, UNFIT, FASTEST, POISONED)


def measured(*chosen, times=TIMES):
    timer = fake_timer(times)
    return tune.measure(fake_tunable(*chosen), SITE, torch.bfloat16, CPU, timer)


def test_the_fastest_right_candidate_is_kept():
    site = measured(*ALL)
    assert (site.choice, site.best, site.rule) == (FASTEST, 50.0, 100.0)
    assert (site.measured, site.unfit) == (3, 1)
    assert [reason.split(": ")[0] for reason in site.wrong] == [
        tuning.described(WRONG), tuning.described(POISONED),
    ]  # fmt: skip
    assert "elements are off by" in site.wrong[0]
    assert "NaN where the rule has none" in site.wrong[1]
    line, *wrong = str(site).splitlines()
    assert line.startswith(f"{KERNEL}   2 bytes, K=16, C=128, x2, rows 2^6")
    assert line.endswith("50.0%  BLOCK_ROWS=64 BLOCK_C=128 BLOCK_K=16 warps=4 stages=2; 3 "
                         "measured, 1 did not run")  # fmt: skip
    assert len(wrong) == 2


@pytest.mark.parametrize(("microseconds", "kept"), [(98.5, None), (97.5, FAST), (100.0, None)])
def test_a_candidate_must_beat_the_rule_by_more_than_two_percent(microseconds, kept):
    site = measured(FAST, times=[(FAST, microseconds)])
    assert site.choice == kept
    assert site.best == (microseconds if kept else 100.0)


def test_a_candidate_that_was_fast_only_once_is_not_kept():
    times = iter([100.0, 50.0, 120.0, 100.0])  # rule, candidate; candidate, rule
    site = tune.measure(fake_tunable(FAST), SITE, torch.bfloat16, CPU, lambda call: next(times))
    assert site.choice is None
    assert site.best == site.rule == 100.0


def test_results_within_the_tolerance_agree():
    truth = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert tune.disagreement(truth, truth.clone(), torch.float32) == ""
    assert tune.disagreement(truth * (1 + 5e-6), truth, torch.float32) == ""
    assert "elements are off" in tune.disagreement(truth * (1 + 5e-5), truth, torch.float32)
    assert "the whole is off" in tune.disagreement(truth * 1.024, truth, torch.bfloat16)
    assert tune.disagreement(truth[:3], truth, torch.float32).startswith("shape (3, 32)")
    assert tune.disagreement(truth[:0], truth[:0], torch.float32) == ""


def test_large_results_are_compared_slice_by_slice(monkeypatch):
    monkeypatch.setattr(tune, "_SLICE", 100)
    truth = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    wrong = truth.clone()
    wrong[-1, -1] += 1
    assert tune.disagreement(truth.clone(), truth, torch.float32) == ""
    assert "elements are off" in tune.disagreement(wrong, truth, torch.float32)


def run(folder, known, *chosen, batches=(1,), **options):
    work = list(tune.problems([fake_tunable(*chosen)], [torch.bfloat16], batches))
    lines = []
    timer = options.pop("timer", fake_timer(TIMES))
    left = tune.tune(known, folder, work, CPU, timer, say=lines.append, **options)
    return left, lines


def test_a_run_writes_what_the_kernels_then_use(folders):
    user, _ = folders
    known = tune.begin(DEVICE, "sm_90", user, False)
    left, lines = run(user, known, *ALL)
    assert left == 0
    assert sum(line.startswith(KERNEL) for line in lines) == 2
    found = tuning_tables.read(user / FILE, DEVICE)
    assert found == known
    assert found.torch == torch.__version__
    assert found.triton == triton.__version__
    assert found.date
    for k in (16, 32):
        key = f"2 bytes, K={k}, C=128, x2, rows 2^6"
        assert found.entries[KERNEL][key] == Entry(FASTEST, 50.0, 100.0)
        assert tuning.choose(KERNEL, key, GPU) == FASTEST


def test_another_run_goes_on_and_keeps_what_is_there(folders):
    user, _ = folders
    first = tune.begin(DEVICE, "sm_90", user, False)
    first.entries["merge forward"] = {"k": Entry(None, 1.0, 1.0)}
    run(user, first, FAST)
    second = tune.begin(DEVICE, "sm_90", user, False)
    assert second == first
    log = []
    left, lines = run(user, second, FAST, batches=(1, 4), timer=fake_timer(TIMES, log))
    assert (left, len(lines)) == (0, 2)  # batch 4 alone
    found = tuning_tables.read(user / FILE, DEVICE)
    assert len(found.entries[KERNEL]) == 4
    assert "merge forward" in found.entries


def test_an_interrupted_run_keeps_what_it_has(folders):
    user, _ = folders
    known = tune.begin(DEVICE, "sm_90", user, False)
    inner, calls = fake_timer(TIMES), []

    def timer(call):
        calls.append(call)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return inner(call)

    with pytest.raises(KeyboardInterrupt):
        run(user, known, FAST, timer=timer)
    assert len(tuning_tables.read(user / FILE, DEVICE).entries[KERNEL]) == 1


def test_the_budget_ends_a_run_between_sites(folders, monkeypatch):
    user, _ = folders
    clock = iter([0.0, 5.0, 11.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    known = tune.begin(DEVICE, "sm_90", user, False)
    left, lines = run(user, known, FAST, budget=10.0)
    assert (left, len(lines)) == (1, 1)


def test_a_table_of_other_versions_or_none_at_all_is_not_continued(folders):
    user, _ = folders
    tuning_tables.write(table(), user)
    with pytest.raises(ValueError, match=r"measured with PyTorch 2\.11 and Triton 3\.6, and these"):
        tune.begin(DEVICE, "sm_90", user, False)
    assert tune.begin(DEVICE, "sm_90", user, True).entries == {}
    (user / FILE).write_text("{")
    with pytest.raises(ValueError, match=r"cannot be continued: it is no JSON .*add --fresh"):
        tune.begin(DEVICE, "sm_90", user, False)


def test_a_site_that_does_not_fit_into_memory_is_left_out(folders):
    user, _ = folders

    def full(problem, dtype, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    tunable = dataclasses.replace(fake_tunable(FAST), call=full)
    work = list(tune.problems([tunable], [torch.bfloat16], (1,)))
    lines = []
    known = tune.begin(DEVICE, "sm_90", user, False)
    assert tune.tune(known, user, work, CPU, fake_timer(TIMES), say=lines.append) == 0
    assert all("left out: CUDA out of memory" in line for line in lines)
    assert not known.entries


def test_each_bucket_is_measured_once():
    tunables = tune.chosen_tunables(["merge"])
    assert [t.name for t in tunables] == ["merge forward", "merge backward"]
    work = list(tune.problems(tunables, [torch.bfloat16, torch.float16], (32, 33, 256)))
    keys = [(tunable.name, key) for tunable, _, _, key in work]
    assert len(keys) == len(set(keys))
    assert {dtype for _, dtype, _, _ in work} == {torch.bfloat16}


# The command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "tune needs a GPU, and PyTorch sees no CUDA or ROCm device; run on a machine with"),
        (["--op", "nothing"], "--op 'nothing': no kernel begins so; choose from 'expand_merge in"),
        (["--batch", "0"], "--batch must be from 1 to 65536, got [0]"),
        (["--budget", "-1"], "--budget must be above 0 seconds, got -1"),
        (["--budget", "nan"], "--budget must be above 0 seconds, got nan"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_tune_that_cannot_run_is_one_line_and_status_2(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        status = main(["kernels", "tune", *words])
    except SystemExit as stop:  # argparse's own errors
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_command_from_its_flags_to_the_table(folders, tmp_path, capsys, monkeypatch):
    from blnet.kernels import command

    monkeypatch.setattr(command, "_cuda_device", lambda text: CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "chosen_tunables", lambda names: [fake_tunable(FAST)])
    monkeypatch.setattr(tune.tune, "__defaults__", (fake_timer(TIMES), float("inf"), print))
    words = ["kernels", "tune", "--batch", "1", "--output", str(tmp_path / "out" / "deep")]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    path = tmp_path / "out" / "deep" / FILE
    assert out[0] == (
        f"tuning for {DEVICE} with PyTorch {torch.__version__}, Triton {triton.__version__}, "
        f"into {path}"
    )
    assert out[1].split()[0] == "kernel"
    assert len(out) == 5
    assert out[-1] == f"2 of 2 sites are in {path}"
    assert len(tuning_tables.read(path, DEVICE).entries[KERNEL]) == 2


# Ahead of time -----------------------------------------------------------------------------------


def test_compile_builds_what_the_tables_hold(folders, capsys, monkeypatch):
    user, shipped = folders
    tuning_tables.write(table(), shipped)
    tuning_tables.write(dataclasses.replace(table(OTHER), architecture="sm_80"), user)
    assert [item.name for item in aot.of_tables("sm_90")] == [
        f"{KERNEL} {KEY}: BLOCK_ROWS=64 BLOCK_C=128 BLOCK_K=32 warps=4 stages=2 ({DEVICE})"
    ]
    assert main(["kernels", "compile", "--target", "sm_90", "--kernel", DEVICE]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert out[1].split()[:5:4] == ["sm_90", "wgmma"]
    assert out[-1] == "1 kernels compiled, 0 with spills"


@pytest.mark.parametrize("batch", [1, 5, 32, 48, 256, 1000])
def test_sizes_are_found_for_every_key_that_tune_writes(batch):
    for tunable in TUNABLES.values():
        for problem in tunable.problems(batch, 2).values():
            key = tunable.key(problem)
            assert aot._problem_of(tunable, key) is not None, key


def test_a_broken_table_stops_compile(folders, capsys):
    folders[1].mkdir()
    (folders[1] / FILE).write_text("[]")
    assert main(["kernels", "compile", "--target", "sm_90"]) == 2
    error = capsys.readouterr().err
    assert f"{folders[1] / FILE} is no tuning table: " in error
    assert error.count("\n") == 1


def test_a_sample_of_the_candidates_compiles_without_spills():
    # Of each kernel and precision the largest tile; `compile --candidates` builds all of them.
    largest = {}
    for item in aot.of_candidates():
        words = item.name.split()
        group = (words[0], words[1], item.name.rsplit(" ", 1)[1])
        blocks = [v for n, v in item.constants.items() if n.startswith("BLOCK")]
        size = (torch.tensor(blocks).prod().item() / item.num_warps, item.name)
        largest[group] = max(largest.get(group, ((0, ""), None)), (size, item), key=lambda x: x[0])
    sizes = [(t, bytes_) for t in TUNABLES.values() for bytes_ in (2, 4) if t.problems(32, bytes_)]
    assert len(largest) == len(sizes) >= 2 * len(TUNABLES) - 3  # three kernels are of 16 bits only
    for report in aot.compile_all(["sm_90"], [item for _, item in largest.values()]):
        assert report.spills == 0, report.name
