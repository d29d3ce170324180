"""`blnet doctor`."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from blnet.cli import main
from blnet.commands import doctor


def test_it_says_what_works_and_what_to_do(capsys) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "backend torch: works" in text
    for line, after in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if "does not work" in line:
            assert after.startswith("    to get it: ")
    extras = (f"extra {name}" for name in ("train", "vision", "speech", "export", "bench"))
    for word in ("device:", "packages:", "torch 2", *extras):
        assert word in text


def test_json_has_the_same(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["packages"]["torch"]
    names = {(f["kind"], f["name"]): f for f in found["findings"]}
    assert names["backend", "torch"]["works"]
    assert {"triton", "interpret", "torch"} <= {n for kind, n in names if kind == "backend"}
    assert all(bool(f["advice"]) != f["works"] for f in found["findings"])


def test_a_missing_package_is_named(monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "librosa" else real(name)
    )
    finding = next(f for f in doctor.examine() if f.name == "speech")
    assert not finding.works
    assert finding.detail == "missing: librosa"
    assert finding.advice == "pip install 'blnet[speech]'"


def test_a_package_that_cannot_be_imported_is_named(monkeypatch, tmp_path) -> None:
    broken = tmp_path / "librosa.py"
    broken.write_text("print('hello')\nraise OSError('libsndfile.so.1:\\n no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "librosa", raising=False)
    finding = next(f for f in doctor.examine() if f.name == "speech")
    assert not finding.works
    told = "librosa cannot be imported (OSError: libsndfile.so.1: no such file)"
    assert finding.detail == told
    assert finding.advice == "pip install --force-reinstall librosa"


def native() -> doctor.Finding:
    return next(f for f in doctor.examine() if f.name == "native")


def test_the_native_engine_is_named(monkeypatch) -> None:
    from blnet.kernels.native import library

    finding = native()
    assert finding.works
    assert f"compiled by {library.compiler()[0]}" in finding.detail
    assert f"vectors of {library.load().vector_bits} bits" in finding.detail
    monkeypatch.setenv("CXX", "no-such-compiler")
    library.load.cache_clear()
    finding = native()
    library.load.cache_clear()
    assert not finding.works
    assert "there is no no-such-compiler on PATH" in finding.detail
    assert finding.advice.startswith("install g++ or clang")


def test_a_compiler_may_be_given_with_flags(monkeypatch) -> None:
    monkeypatch.setenv("CXX", f"'{sys.executable}' -O2")
    finding = next(f for f in doctor.examine() if f.kind == "tool")
    assert finding.works


@pytest.mark.parametrize("variable", ["", "no-such-compiler"])
def test_a_missing_compiler_is_named(variable, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", variable)
    finding = next(f for f in doctor.examine() if f.kind == "tool")
    assert not finding.works
    assert (variable or "g++") in finding.detail
    assert "install g++" in finding.advice
