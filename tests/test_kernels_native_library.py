"""The native engine's library: what compiles it, where it is kept, what is said without one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blnet.kernels.native import Builder, NativeError, status
from blnet.kernels.native import library as libraries

pytestmark = pytest.mark.skipif(not status().works, reason=f"{status().reason}")


def test_a_compiler_may_be_several_words(monkeypatch):
    path = libraries.compiler()[0]
    monkeypatch.setenv("CXX", f"{path} '-D A=1'")
    assert libraries.compiler() == (path, "-D A=1")
    monkeypatch.setenv("CXX", f"{path} '")
    with pytest.raises(NativeError, match="CXX cannot be read"):
        libraries.compiler()


def test_no_home_is_said(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(libraries.Path, "home", nowhere)
    libraries.load.cache_clear()
    try:
        found = status()
    finally:
        libraries.load.cache_clear()
    assert not found.works
    assert "finds no folder" in found.reason


def test_flags_for_another_cpu_give_another_library_that_is_right():
    """Built for CPUs with AVX2 and no AVX-512, as most are."""
    flags = "-march=x86-64-v3"
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:
        known = ""
    if platform.machine() != "x86_64" or " avx2 " not in known or " fma " not in known:
        pytest.skip("this CPU does not run code for x86-64-v3")
    command = [*libraries.compiler(), flags, "-E", "-x", "c++", os.devnull, "-o", os.devnull]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this compiler does not know x86-64-v3")
    code = (
        "import torch; from torch.nn.functional import conv2d;"
        "from blnet.kernels.native import Builder, library as l;"
        "x = torch.randn(2, 20, 19, 23); w = torch.randn(40, 20, 3, 3);"
        "b = Builder((2, 20, 19, 23));"
        "ways = ['direct', *(f'winograd {tile}' for tile in ('2x2', '4x4', '5x5', '4x6'))];"
        "p = b.build([b.conv(b.input, w, padding=(1, 1), method=way) for way in ways]);"
        "right = conv2d(x.double(), w.double(), padding=1);"
        "assert all((y - right).abs().max() < 2e-5 * right.abs().max() for y in p(x));"
        "print(l.load().path.stem)"
    )
    environment = {**os.environ, libraries.MACHINE_VARIABLE: flags, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          timeout=240, env=environment)  # fmt: skip
    assert done.stdout.strip() != libraries.load().path.stem


def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    libraries.load.cache_clear()
    try:
        found = status()
        assert not found.works
        assert "there is no no-such-compiler on PATH" in found.reason
        assert "install g++ or clang" in found.advice
        with pytest.raises(NativeError, match="needs a C\\+\\+ compiler"):
            Builder((1, 1, 1, 1))
    finally:
        libraries.load.cache_clear()


def test_a_compiler_that_fails_is_said_and_leaves_nothing(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: nothing works' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    libraries.load.cache_clear()
    try:
        with pytest.raises(NativeError, match="error: nothing works"):
            libraries.load()
    finally:
        libraries.load.cache_clear()
    assert list((tmp_path / "cache").rglob("*.so")) == []


def test_the_key_follows_sources_and_flags(monkeypatch):
    compiling = libraries.compiler()
    before = libraries._key(compiling)
    monkeypatch.setattr(libraries, "FLAGS", (*libraries.FLAGS, "-g"))
    assert libraries._key(compiling) != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_of_the_process_do_not_matter(dtype):
    code = (
        "import torch; from torch.nn.functional import conv2d;"
        "from blnet.kernels.native.builder import Builder;"
        "x, w = torch.randn(1, 16, 9, 9), torch.randn(24, 16, 3, 3);"
        "right = conv2d(x.double(), w.double(), padding=1);"
        "b = Builder(x.shape); early = b.build([b.conv(b.input, w, padding=(1, 1))]);"
        f"torch.set_default_dtype({dtype});"
        "b = Builder(x.shape); late = b.build([b.conv(b.input, w, padding=(1, 1))]);"
        "torch.set_default_device('meta');"
        "found = [y for p in (early, late) for y in p(x)];"
        "assert all(y.dtype == torch.float32 and y.device.type == 'cpu' for y in found);"
        "assert all((y - right).abs().max() < 2e-5 * right.abs().max() for y in found)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


@pytest.mark.parametrize("left", [0, 1000, -1])
def test_a_damaged_library_is_made_again(left, monkeypatch, tmp_path):
    whole = libraries.load().path.read_bytes()
    path = tmp_path / "blnet" / "native" / libraries.load().path.name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path.parent.mkdir(parents=True)
    path.write_bytes(whole[:left])
    monkeypatch.setattr(libraries, "_compile", lambda _, partial: partial.write_bytes(whole))
    assert libraries._cached() == path
    assert path.read_bytes() == whole
    monkeypatch.setattr(libraries, "_compile", lambda *_: pytest.fail("it is whole"))
    assert libraries._cached() == path
