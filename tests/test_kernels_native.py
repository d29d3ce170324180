"""The native engine's steps against PyTorch in float64, its library, its threads and its memory."""

from __future__ import annotations

import concurrent.futures
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.kernels.native import Builder, NativeError, packing, pixel_table, status
from blnet.kernels.native import library as libraries
from blnet.kernels.native.library import Step
from blnet.kernels.native.packing import ALONE_BYTES
from blnet.kernels.reference import nearest_index, upsample_nearest

pytestmark = pytest.mark.skipif(not status().works, reason=f"{status().reason}")

TOLERANCE = 2e-5  # of the largest value; Winograd with tiles of 4x4 has the largest error
METHODS = ("direct", "winograd 2x2", "winograd 4x4")


def error(out, expected):
    assert out.shape == expected.shape
    return float((out.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest_table(size_big, size):
    rows, columns = (nearest_index(b, s) for b, s in zip(size_big, size, strict=True))
    return pixel_table(rows, columns, size_big[1])


# Convolutions -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 70),
    out=st.integers(1, 70),
    size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    relu=st.booleans(),
    last=st.booleans(),
)
def test_convolution_of_any_size(images, channels, out, size, kernel, stride, padding, relu, last):
    padding = tuple(
        max(pad, (k - s + 1) // 2) for pad, k, s in zip(padding, kernel, size, strict=True)
    )
    x = drawn(0, images, channels, *size)
    weight, bias = drawn(1, out, channels, *kernel), drawn(2, out)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    builder = Builder(tuple(x.shape))
    y = builder.conv(
        builder.input, weight, bias, stride=stride, padding=padding, relu=relu, method="direct"
    )
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    out = builder.build([y])(x)[0]
    assert out.shape == expected.shape
    # What rounding may do to a sum goes with its terms, which may cancel.
    terms = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), stride, padding)
    wrong = (out - (expected.relu() if relu else expected)).abs() / terms.clamp(min=1e-3)
    assert float(wrong.max()) < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    images=st.integers(1, 4),
    channels=st.integers(5, 50),
    out=st.integers(1, 100),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    padding=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_3x3_convolution_each_way(method, images, channels, out, size, padding):
    x, weight = drawn(0, images, channels, *size), drawn(1, out, channels, 3, 3)
    bias = drawn(2, out)
    builder = Builder(tuple(x.shape))
    y = builder.conv(builder.input, weight, bias, padding=padding, method=method)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), 1, padding)
    assert error(builder.build([y])(x)[0], expected) < TOLERANCE


@settings(max_examples=30, deadline=None)
@given(
    images=st.integers(1, 4),
    channels=st.integers(5, 50),
    out=st.integers(1, 100),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    padding=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_3x3_convolution_with_rows_of_stride_2(images, channels, out, size, padding):
    x, weight = drawn(0, images, channels, *size), drawn(1, out, channels, 3, 3)
    bias, stride = drawn(2, out), (2, 1)
    builder = Builder(tuple(x.shape))
    y = builder.conv(
        builder.input, weight, bias, stride=stride, padding=padding, method="winograd 2x4"
    )
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    assert error(builder.build([y])(x)[0], expected) < TOLERANCE


@pytest.mark.parametrize(
    ("channels", "out", "groups"),
    [(64, 64, 64), (32, 32, 8), (24, 48, 3), (96, 192, 2), (128, 128, 32), (40, 20, 20), (3, 6, 3)],
)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_grouped_convolution(channels, out, groups, stride):
    x, weight = drawn(0, 2, channels, 9, 11), drawn(1, out, channels // groups, 3, 3)
    builder = Builder(tuple(x.shape))
    y = builder.conv(builder.input, weight, stride=stride, padding=(1, 1), groups=groups)
    expected = F.conv2d(x.double(), weight.double(), None, stride, 1, 1, groups)
    assert error(builder.build([y])(x)[0], expected) < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    channels=st.integers(5, 40),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    big=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    relu=st.booleans(),
)
def test_upsampled_residual_of_any_ratio(method, channels, size, big, relu):
    kernel = 1 if method == "direct" else 3
    x, weight = drawn(0, 2, channels, *size), drawn(1, channels, channels, kernel, kernel)
    shift = drawn(2, channels)
    builder = Builder(tuple(x.shape))
    windows = [[(i * s // b, -(-(i + 1) * s // b), 2) for i in range(b)]
               for s, b in zip(size, big, strict=True)]  # fmt: skip
    small = builder.pool(builder.input, *windows, average=False)
    y = builder.conv(
        builder.input, weight, shift, padding=(kernel // 2,) * 2, residual=small,
        table=nearest_table(big, size), relu=relu, method=method,
    )  # fmt: skip
    pooled = F.adaptive_max_pool2d(x.double(), big)
    expected = F.conv2d(x.double(), weight.double(), shift.double(), 1, kernel // 2)
    expected = expected + upsample_nearest(pooled, size)
    out = builder.build([y])(x)[0]
    assert error(out, expected.relu() if relu else expected) < 5 * TOLERANCE


def test_residual_of_the_same_size_at_each_width():
    for width in range(1, 32):
        x, weight = drawn(width, 1, 20, 3, width), drawn(1, 20, 20, 1, 1)
        builder = Builder(tuple(x.shape))
        y = builder.conv(builder.input, weight, residual=builder.input, relu=True)
        expected = (F.conv2d(x.double(), weight.double()) + x).relu()
        assert error(builder.build([y])(x)[0], expected) < 1e-6


# Pools and the rest -------------------------------------------------------------------------------


def test_steps_that_touch_each_value_once():
    x, scale, shift = drawn(0, 2, 20, 6, 5), drawn(1, 20), drawn(2, 20)
    builder = Builder(tuple(x.shape))
    one = builder.affine(builder.input, scale, shift, relu=True)
    gates = builder.sigmoid(builder.pool(one, [(0, 6, 6)], [(0, 5, 5)], average=True))
    gated = builder.combine(one, gates, torch.zeros(30, dtype=torch.int32), multiply=True)
    twice = builder.combine(gated, builder.input, relu=True)
    resized = builder.resize(twice, nearest_table((6, 5), (9, 2)), (9, 2))
    outs = builder.build([one, gates, gated, twice, resized])(x)
    a = (x.double() * scale[:, None, None] + shift[:, None, None]).relu()
    b = a.mean((2, 3), keepdim=True).sigmoid()
    d = (a * b + x).relu()
    for out, expected in zip(outs, [a, b, a * b, d, upsample_nearest(d, (9, 2))], strict=True):
        assert error(out, expected) < 1e-6


def test_cat_of_blocks():
    x = drawn(0, 2, 32, 4, 5)
    builder = Builder(tuple(x.shape))
    narrow = builder.conv(builder.input, drawn(1, 7, 32, 1, 1))
    y = builder.cat([builder.input, builder.combine(builder.input, relu=True), narrow])
    expected = torch.cat([x, x.relu(), F.conv2d(x, drawn(1, 7, 32, 1, 1))], 1).double()
    assert error(builder.build([y])(x)[0], expected) < 1e-6
    with pytest.raises(ValueError, match="multiple of 16 channels"):
        builder.cat([narrow, builder.input])


# What passes through ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_hidden(method, value):
    x, weight = drawn(0, 1, 16, 9, 9), drawn(1, 16, 16, 3, 3)
    x[0, 3, 4, 4] = value
    builder = Builder(tuple(x.shape))
    y = builder.conv(builder.input, weight, padding=(1, 1), relu=True, method=method)
    top = builder.pool(y, [(0, 9, 1)], [(0, 9, 1)], average=False)
    mean = builder.pool(y, [(0, 9, 9)], [(0, 9, 9)], average=True)
    sums = builder.combine(y, y, relu=True)
    out, top_out, mean_out, sums_out = builder.build([y, top, mean, sums])(x)
    assert (~out.isfinite())[0, :, 3:6, 3:6].flatten(1).any(1).all()
    if value != value:
        assert out[0, :, 3:6, 3:6].isnan().all()
        assert top_out.isnan().all()
        assert mean_out.isnan().all()
        assert sums_out[0, :, 3:6, 3:6].isnan().all()
    if method == "direct":
        assert out[0, :, :3].isfinite().all()


# Memory, threads ----------------------------------------------------------------------------------


def deep(images=1, size=24, seed=0):
    """A program with branches, strides and residuals, its input and what it must give."""
    x = drawn(seed, images, 3, size, size)
    weights = [drawn(i, 40, c, k, k) / 10 for i, (c, k) in enumerate([(3, 5), (40, 3), (40, 1)])]
    builder = Builder(tuple(x.shape))
    y = builder.conv(builder.input, weights[0], padding=(2, 2), relu=True)
    expected = F.conv2d(x.double(), weights[0].double(), None, 1, 2).relu()
    for _ in range(3):
        inner = builder.conv(y, weights[1], padding=(1, 1), relu=True)
        y = builder.conv(inner, weights[2], residual=y, relu=True)
        inner = F.conv2d(expected, weights[1].double(), None, 1, 1).relu()
        expected = (F.conv2d(inner, weights[2].double()) + expected).relu()
    return builder.build([y]), x, expected


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("images", [1, 3])
def test_bits_do_not_depend_on_threads(images):
    program, x, expected = deep(images)
    both = program(x)[0]
    torch.set_num_threads(1)
    assert torch.equal(program(x)[0], both)
    assert error(both, expected) < TOLERANCE


def test_large_maps_go_image_by_image():
    program, x, expected = deep(images=3, size=96)
    assert ALONE_BYTES < 4 * 48 * 96 * 96
    assert len(program._steps) == 3 * (len(program.steps) - 1) + 1
    assert error(program(x)[0], expected) < TOLERANCE


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("images", [1, 2, 4, 5])
def test_threads_take_images_of_their_own(images):
    program, x, expected = deep(images, size=96)
    assert program._lanes == min(2, images) * (images > 1)
    results = []
    for threads in (2, 1, 3, 2):  # as many as it was built for, fewer, more
        torch.set_num_threads(threads)
        results.append(program(x)[0])
    assert all(torch.equal(result, results[0]) for result in results)
    assert error(results[0], expected) < TOLERANCE


def test_fewer_threads_than_were_asked_for_do_all_the_work():
    code = (
        "import torch; from blnet.kernels.native import Builder; torch.set_num_threads(2);"
        "b = Builder((2, 64, 8, 8)); p = b.build([b.combine(b.input, relu=True)]);"
        "x = torch.randn(2, 64, 8, 8); assert torch.equal(p(x)[0], torch.where(x > 0, x, 0))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)


@pytest.mark.usefixtures("two_threads")
def test_two_python_threads_at_once():
    program, x, _ = deep()
    inputs = [x * scale for scale in (0.5, 1.0, 2.0, 4.0)]
    alone = [program(part)[0] for part in inputs]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            for out, expected in zip(pool.map(program, inputs), alone, strict=True):
                assert torch.equal(out[0], expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_works_in_one_thread():
    code = (
        "import os, torch; from blnet.kernels.native import Builder; torch.set_num_threads(2);"
        "b = Builder((1, 16, 8, 8)); p = b.build([b.combine(b.input, relu=True)]);"
        "x = torch.randn(1, 16, 8, 8); p(x); pid = os.fork();"
        "ok = torch.equal(p(x)[0], torch.where(x > 0, x, 0));"
        "pid or os._exit(0 if ok else 3); assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
        " == 0 and ok"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_children_have_maps_and_locks_of_their_own():
    code = (
        "import os, signal, torch; from blnet.kernels.native import Builder;"
        "b = Builder((1, 16, 64, 64)); y = b.combine(b.input, relu=True);"
        "p = b.build([b.combine(y, y)]); x = torch.rand(1, 16, 64, 64) + 1; p(x);"
        "p._lock.acquire();"  # as a thread does that calls while this one forks
        "parent = os.fork() and os.fork(); x = x * os.getpid();"
        "p._lock.release() if parent else signal.alarm(20);"
        "ok = all(torch.equal(p(x)[0], 2 * x) for _ in range(300));"
        "ok &= not parent or all([os.wait()[1] == 0 for _ in range(2)]); os._exit(0 if ok else 3)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)


# Errors and the library ---------------------------------------------------------------------------


def test_wrong_inputs_are_refused():
    program, x, _ = deep()
    for wrong in (x[:, :, 1:], x.double(), x.to("meta")):
        with pytest.raises(ValueError, match="takes float32 tensors of shape"):
            program(wrong)
    with pytest.raises(ValueError, match="reads strided tensors"):
        program(x.to_sparse())
    with pytest.raises(ValueError, match="the batch of shape"):
        Builder((0, 16, 4, 4))
    builder = Builder((1, 16, 4, 4))
    with pytest.raises(ValueError, match="does not fit an input"):
        builder.conv(builder.input, drawn(0, 8, 15, 1, 1))
    with pytest.raises(ValueError, match="larger than the padded input"):
        builder.conv(builder.input, drawn(0, 8, 16, 5, 5))
    with pytest.raises(ValueError, match="needs a table"):
        builder.conv(builder.input, drawn(0, 16, 16, 3, 3), residual=builder.input)
    with pytest.raises(ValueError, match="table for shapes"):
        builder.resize(builder.input, torch.tensor([16], dtype=torch.int32), (1, 1))


@pytest.mark.parametrize(
    ("method", "shape", "options"),
    [
        ("winograd 7x7", (16, 16, 3, 3), {}),
        ("winograd 4x4", (16, 16, 3, 3), {"stride": (2, 2)}),
        ("winograd 2x2", (16, 8, 3, 3), {"groups": 2}),
        ("winograd 2x2", (16, 16, 5, 5), {"padding": (2, 2)}),
    ],
)
def test_a_method_that_does_not_fit_is_refused(method, shape, options):
    builder = Builder((1, 16, 9, 9))
    with pytest.raises(ValueError, match=r"method must be|is for kernels of 3x3"):
        builder.conv(builder.input, drawn(0, *shape), method=method, **options)


def test_winograd_of_three_channels():
    x, weight = drawn(0, 2, 3, 9, 9), drawn(1, 16, 3, 3, 3)
    builder = Builder(tuple(x.shape))
    y = builder.conv(builder.input, weight, method="winograd 2x2")
    assert error(builder.build([y])(x)[0], F.conv2d(x.double(), weight.double())) < TOLERANCE


def test_a_view_with_the_negative_bit_is_read_as_what_it_is():
    program, x, expected = deep()
    turned = torch.complex(x, -x).conj().imag
    assert turned.is_neg()
    assert error(program(turned)[0], expected) < TOLERANCE


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
        "ways = ['direct', 'winograd 2x2', 'winograd 4x4'];"
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


# How the work is cut ------------------------------------------------------------------------------


def cut(channels: int, out: int, size: int, kernel: int, stride: int, threads: int) -> Step:
    pad = kernel // 2
    shape, weight = (1, channels, size, size), (out, channels, kernel, kernel)
    conv = packing.Convolution(shape, weight, (stride, stride), (pad, pad), 1, False)
    return packing.pack(libraries.load(), conv, torch.zeros(weight), None, threads).step


def test_weights_larger_than_the_map_are_read_once() -> None:
    step = cut(512, 512, 14, 3, 2, threads=2)
    assert (step.chunks, step.items) == (1, 4)


@pytest.mark.parametrize(
    ("channels", "out", "size", "kernel", "stride"),
    [
        *((256, 64, 56, 1, 1), (64, 64, 112, 3, 2), (128, 512, 28, 1, 1), (512, 128, 28, 1, 1)),
        *((32, 32, 28, 3, 1), (64, 16, 112, 3, 1), (192, 192, 35, 3, 1)),  # Winograd
    ],
)
def test_two_threads_get_as_many_pieces_each(channels, out, size, kernel, stride) -> None:
    assert cut(channels, out, size, kernel, stride, threads=2).items % 2 == 0


def test_small_maps_are_transformed_once() -> None:
    step = cut(128, 128, 24, 3, 1, threads=2)
    assert (step.chunks, step.slices) == (2, 1)
