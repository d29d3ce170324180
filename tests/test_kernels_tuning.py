"""Which block sizes a kernel runs with: keys, tables and their faults."""

import json
import os
import warnings

import pytest
import torch

from blnet.kernels import tuning, tuning_tables
from blnet.kernels.bottleneck_close import CloseProblem, close_launch
from blnet.kernels.expand_merge_sizes import Problem
from blnet.kernels.merge_sizes import key as merge_key
from blnet.kernels.moments import moments_key
from blnet.kernels.stem_close import StemProblem, stem_launch
from blnet.kernels.tuning import TUNABLES
from blnet.kernels.tuning_tables import Entry, Table

GPU = torch.device("cuda", 0)
DEVICE = "NVIDIA Test 9000"
FILE = "nvidia-test-9000.json"
KERNEL = "expand_merge forward"
KEY = "2 bytes, K=64, C=256, x2, rows 2^16"
CHOICE = {"BLOCK_ROWS": 64, "BLOCK_C": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
OTHER = {**CHOICE, "BLOCK_ROWS": 32}


def table(choice=CHOICE, kernel=KERNEL, key=KEY):
    entry = Entry(choice, 10.0, 12.0)
    return Table(DEVICE, "sm_90", "2.11", "3.6", "2025-01-01", {kernel: {key: entry}})


# Keys --------------------------------------------------------------------------------------------


def test_a_key_is_readable():
    assert Problem(32, 64, 256, 56, 56, 28, 28, 2).key() == KEY
    assert Problem(32, 64, 256, 56, 56, 28, 28, 2).key(upsampling=False) == KEY.replace(" x2,", "")
    assert Problem(32, 64, 256, 56, 56, 56, 56, 4).key() == (
        "4 bytes, K=64, C=256, same, rows 2^16"
    )
    assert Problem(3, 37, 75, 55, 55, 28, 28, 2).key() == "2 bytes, K=37, C=75, odd, rows 2^13"
    assert Problem(1, 8, 8, 12, 4, 4, 4, 2).key() == "2 bytes, K=8, C=8, x3x1, rows 2^5"
    assert Problem(2048, 128, 256, 112, 112, 56, 56, 2).key().endswith(", x2, rows 2^24, wide")
    assert moments_key(2**20, 64, 4) == "4 bytes, K=64, rows 2^20"
    assert merge_key((32, 56, 56, 256), (28, 28), 2, False) == "2 bytes, C=256, x2, rows 2^16"
    assert merge_key((2, 8, 8, 16), (8, 8), 2, True) == "2 bytes, same, elements 2^11"
    tail = Problem(32, 256, 512, 28, 28, 14, 14, 2)
    assert CloseProblem(64, tail, True).key() == "2 bytes, I=64, C=256 to 512, x2, rows 2^14"
    alone = Problem(2048, 256, 256, 112, 112, 112, 112, 2)
    assert CloseProblem(64, alone, False).key() == "2 bytes, I=64, C=256, rows 2^24, wide"
    sizes = (32, 64, 32, 16, 64, 80, 56, 56, (112, 112), (112, 112))
    key = "2 bytes, L=16, C=64 to 80, C_x=64, C_l=32, rows 2^16"
    assert StemProblem(*sizes).key() == key
    assert StemProblem(*sizes, (False, True)).key() == key.replace("C_x=64, ", "")
    assert StemProblem(*sizes, (False, False)).key() == "2 bytes, L=16, C=64 to 80, rows 2^16"


def test_a_bucket_is_a_power_of_two_of_rows():
    keys = [moments_key(rows, 64, 2) for rows in (2**17 - 1, 2**17, 2**18 - 1, 2**18)]
    assert keys[0] != keys[1] == keys[2] != keys[3]
    same_rows = [Problem(n, 64, 256, h, h, h, h, 2).key() for n, h in ((32, 56), (128, 28))]
    assert same_rows[0] == same_rows[1]


# What is registered ------------------------------------------------------------------------------


SIXTEEN_BITS = ("bottleneck alone", "bottleneck chained", "stem")  # float32 runs other kernels


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("name", TUNABLES)
def test_candidates_are_valid_few_and_not_the_rule(name, itemsize):
    tunable = TUNABLES[name]
    sites = tunable.problems(32, itemsize)
    if itemsize == 4 and name in SIXTEEN_BITS:
        assert not sites
        return
    assert len(sites) >= 5
    for problem in sites.values():
        found = tuning.candidates(tunable, problem)
        rule = tuning.effective(tunable, problem, None)
        assert 4 <= len(found) <= 24
        assert rule not in found
        for choice in [rule, *found]:
            assert tuning_tables.wrong_choice(name, choice) == ""
            assert found.count(choice) <= 1
            # What a table holds runs as it stands there.
            assert tuning.effective(tunable, problem, choice) == choice


def test_every_kernel_of_an_op_with_tiles_is_tunable():
    assert {
        "expand_merge forward", "expand_merge reduce", "expand_merge input", "moments",
        "merge forward", "merge backward", *SIXTEEN_BITS,
    } <= set(TUNABLES)  # fmt: skip


def test_no_choice_narrows_a_tile_that_must_span_its_channels():
    tail = Problem(2, 96, 70, 8, 8, 4, 4, 2)
    least = {**dict.fromkeys(("BLOCK_ROWS", "BLOCK_K", "BLOCK_C", "BLOCK_OUT"), 16),
             "num_warps": 4, "num_stages": 1}  # fmt: skip
    assert close_launch(CloseProblem(48, tail, True), least).constants["BLOCK_C"] == 128
    assert close_launch(CloseProblem(48, tail, False), least).constants["BLOCK_C"] == 16
    wrong = tuning_tables.wrong_choice("bottleneck chained", least)
    assert wrong.startswith("it must hold BLOCK_ROWS, BLOCK_K, BLOCK_OUT, num_warps")
    constants = stem_launch(
        StemProblem(1, 64, 32, 48, 96, 64, 8, 8, (16, 16), (16, 16)),
        {**least, "BLOCK_L": 16, "BLOCK_X": 16, "BLOCK_LITTLE": 16},
    ).constants
    assert [constants[name] for name in ("BLOCK_L", "BLOCK_C", "TILES_X", "TILES_LITTLE")] == [
        64, 128, 4, 2,
    ]  # fmt: skip


# The lookup --------------------------------------------------------------------------------------


def test_without_tables_the_rule_runs(folders):
    assert tuning.choose(KERNEL, KEY, GPU) is None


def test_the_users_table_goes_before_the_repositorys(folders):
    user, shipped = folders
    tuning_tables.write(table(OTHER), shipped)
    tuning.forget()
    assert tuning.choose(KERNEL, KEY, GPU) == OTHER
    tuning_tables.write(table(), user)
    assert tuning.choose(KERNEL, KEY, GPU) == OTHER  # remembered: no file is read at a launch
    tuning.forget()
    assert tuning.choose(KERNEL, KEY, GPU) == CHOICE
    assert tuning.choose(KERNEL, KEY + "0", GPU) is None
    assert tuning.choose("expand_merge reduce", KEY, GPU) is None


def test_a_bucket_that_the_users_table_leaves_to_the_rule_stays_there(folders):
    user, shipped = folders
    tuning_tables.write(table(), shipped)
    tuning_tables.write(table(None), user)
    assert tuning.choose(KERNEL, KEY, GPU) is None


def test_buckets_that_the_users_table_lacks_come_from_the_repositorys(folders):
    user, shipped = folders
    tuning_tables.write(table(), shipped)
    tuning_tables.write(table(key="2 bytes, another"), user)
    assert tuning.choose(KERNEL, KEY, GPU) == CHOICE


def test_a_question_is_asked_once(folders, monkeypatch):
    asked = []
    monkeypatch.setattr(tuning_tables, "look_up", lambda *question: asked.append(question))
    for _ in range(3):
        assert tuning.choose(KERNEL, KEY, GPU) is None
    assert asked == [(KERNEL, KEY, GPU)]


def test_a_cpu_and_symbolic_sizes_ask_no_table(folders, monkeypatch):
    monkeypatch.setattr(tuning_tables, "look_up", lambda *question: pytest.fail("asked"))
    assert tuning.choose(KERNEL, KEY, torch.device("cpu")) is None
    assert tuning.choose(KERNEL, None, GPU) is None


def test_forced_choices_go_before_all_and_end_with_the_block(folders):
    tuning_tables.write(table(), folders[0])
    with tuning.forced(KERNEL, OTHER):
        assert tuning.choose(KERNEL, KEY, GPU) == OTHER
        assert tuning.choose(KERNEL, None, torch.device("cpu")) == OTHER
        with tuning.forced(KERNEL, CHOICE):
            assert tuning.choose(KERNEL, None, GPU) == CHOICE
        assert tuning.choose(KERNEL, None, GPU) == OTHER
    assert tuning.choose(KERNEL, KEY, GPU) == CHOICE
    assert tuning.choose(KERNEL, None, GPU) is None


@pytest.mark.parametrize(
    ("kernel", "choice", "message"),
    [
        ("nothing", CHOICE, "no kernel 'nothing'; choose from expand_merge input"),
        (KERNEL, {**CHOICE, "BLOCK_C": 48}, "BLOCK_C must be a power of two from 16 to 256, got"),
        (KERNEL, {"BLOCK_C": 48}, "it must hold BLOCK_ROWS, BLOCK_C, BLOCK_K, num_warps"),
    ],
)
def test_a_wrong_choice_is_not_forced(kernel, choice, message):
    with pytest.raises(ValueError, match=message), tuning.forced(kernel, choice):
        pass


def test_where_the_users_tables_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("BLNET_TABLES", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert tuning_tables.user_folder() == tmp_path / "a"
    monkeypatch.delenv("BLNET_TABLES")
    assert tuning_tables.user_folder() == tmp_path / "b" / "blnet" / "tables"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning_tables.user_folder() == tmp_path / ".cache" / "blnet" / "tables"
    monkeypatch.setattr(tuning_tables.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert tuning_tables.user_folder() is None


def test_no_device_is_asked_for_its_name_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("asked"))
    tuning.forget()
    assert tuning.choose(KERNEL, KEY, GPU) is None
    tuning.forget()


# Broken tables -----------------------------------------------------------------------------------


def changed(**changes):
    values = {"schema": 1, "device": DEVICE, "architecture": "sm_90", "torch": "2", "triton": "3"}
    entry = {"choice": CHOICE, "microseconds": 1.0, "rule_microseconds": 2.0}
    return json.dumps({**values, "date": "", "entries": {KERNEL: {KEY: entry}}, **changes})


def with_entry(**changes):
    entry = {"choice": CHOICE, "microseconds": 1.0, "rule_microseconds": 2.0, **changes}
    return changed(entries={KERNEL: {KEY: entry}})


BROKEN = {
    "empty": ("", "it is no JSON"),
    "cut": (changed()[:-20], "it is no JSON"),
    "nested": ("[" * 100_000, "it is no JSON"),
    "a list": ("[]", "it has schema None and this version of blnet reads 1"),
    "schema": (changed(schema=2), "it has schema 2 and this version of blnet reads 1"),
    "device": (changed(device="NVIDIA H200"), "it was measured on 'NVIDIA H200', and this is"),
    "facts": (changed(torch=None), "it lacks one of device, architecture, torch, triton, date"),
    "entries": (changed(entries=[]), "it lacks one of"),
    "kernel": (changed(entries={KERNEL: 3}), "the entries of expand_merge forward must be a dict"),
    "entry": (changed(entries={KERNEL: {KEY: {}}}), f"the entry of {KERNEL}, {KEY} must hold"),
    "time": (with_entry(microseconds=-1), "must be numbers above 0"),
    "endless time": (with_entry(microseconds=10**400), "must be numbers above 0 and below 1e+12"),
    "time as text": (with_entry(rule_microseconds="1"), "must be numbers above 0"),
    "choice": (with_entry(choice=[1]), "a choice is a dict of numbers, got list"),
    "unknown block": (with_entry(choice={**CHOICE, "BLOCK_X": 16}), "it must hold BLOCK_ROWS"),
    "missing block": (with_entry(choice={"num_warps": 4, "num_stages": 2}), "it must hold BLOCK_"),
    "no power": (with_entry(choice={**CHOICE, "BLOCK_C": 96}), "BLOCK_C must be a power of two"),
    "large": (with_entry(choice={**CHOICE, "BLOCK_K": 4096}), "from 16 to 128, got 4096"),
    "zero": (with_entry(choice={**CHOICE, "num_warps": 0}), "num_warps must be a power of two"),
    "true": (with_entry(choice={**CHOICE, "num_stages": True}), "num_stages must be a whole numb"),
    "fraction": (with_entry(choice={**CHOICE, "num_stages": 1.5}), "num_stages must be a whole"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_table_is_told_once_and_the_rule_runs(case, folders):
    text, message = BROKEN[case]
    folders[0].mkdir()
    (folders[0] / FILE).write_text(text)
    with warnings.catch_warnings(record=True, action="always") as caught:
        assert tuning.choose(KERNEL, KEY, GPU) is None
        assert tuning.choose(KERNEL, "another", GPU) is None
    (warning,) = caught
    told = str(warning.message)
    assert told.startswith(f"the kernels' tuning table {folders[0] / FILE} is not used: ")
    assert message in told
    assert told.endswith("delete it, or measure it anew by 'blnet kernels tune --fresh'")
    assert "\n" not in told


def test_a_broken_users_table_leaves_the_repositorys(folders):
    folders[0].mkdir()
    (folders[0] / FILE).write_text("{")
    tuning_tables.write(table(), folders[1])
    with pytest.warns(UserWarning, match="no JSON"):
        assert tuning.choose(KERNEL, KEY, GPU) == CHOICE


def test_a_table_that_cannot_be_read(folders):
    (folders[0] / FILE).mkdir(parents=True)
    with pytest.warns(UserWarning, match="is not used: Is a directory; delete it"):
        assert tuning.choose(KERNEL, KEY, GPU) is None


def test_bytes_that_are_no_text(folders):
    folders[0].mkdir()
    (folders[0] / FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="is not used: "):
        assert tuning.choose(KERNEL, KEY, GPU) is None


def test_entries_of_kernels_of_another_version_do_no_harm(folders):
    other = table({"TILE": 8, "num_warps": 4, "num_stages": 1}, kernel="a kernel to come")
    other.entries |= table().entries
    tuning_tables.write(other, folders[0])
    with warnings.catch_warnings(action="error"):
        assert tuning.choose(KERNEL, KEY, GPU) == CHOICE


# Writing -----------------------------------------------------------------------------------------


def test_a_table_comes_back_as_it_was_written(folders):
    path = tuning_tables.write(table(), folders[0])
    assert path == folders[0] / FILE
    assert tuning_tables.read(path, DEVICE) == table()
    assert [p.name for p in folders[0].iterdir()] == [FILE]
    assert tuning_tables.tables_in(folders[0]) == [table()]
    assert tuning_tables.tables_in(folders[1]) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_table(step, folders, monkeypatch):
    path = tuning_tables.write(table(), folders[0])

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        tuning_tables.write(table(OTHER), folders[0])
    assert tuning_tables.read(path, DEVICE) == table()
    assert [p.name for p in folders[0].iterdir()] == [FILE]


def test_a_link_to_a_table_stays_a_link(folders):
    user, shipped = folders
    path = tuning_tables.write(table(), shipped)
    user.mkdir()
    (user / FILE).symlink_to(path)
    tuning_tables.write(table(OTHER), user)
    assert (user / FILE).is_symlink()
    assert tuning_tables.read(path, DEVICE) == table(OTHER)


def test_a_folder_that_cannot_hold_a_table_is_told_before_measuring(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/x cannot hold a table \(.*\); choose another --out"):
        tuning_tables.prepare(tmp_path / "file" / "x")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"table \(Permission denied\); choose"):
        tuning_tables.prepare(tmp_path / "new")


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "nvidia-h200"), ("AMD Instinct MI300X", "amd-instinct-mi300x"),
     ("../../etc/x", "etc-x"), ("///", "unnamed")],
)  # fmt: skip
def test_the_name_of_a_file(device, name):
    assert tuning_tables.slug(device) == name
