"""The native engine's programs: how work is cut, where maps lie, which thread does what."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from blnet.kernels.native import Builder, packing, status
from blnet.kernels.native import library as libraries
from blnet.kernels.native.arena import Draft, for_image
from blnet.kernels.native.convolution import Convolution
from blnet.kernels.native.cutting import ALONE_BYTES
from blnet.kernels.native.library import Step

pytestmark = pytest.mark.skipif(not status().works, reason=f"{status().reason}")

TOLERANCE = 2e-5  # of the largest value, as in test_kernels_native.py


def error(out, expected):
    assert out.shape == expected.shape
    return float((out.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Memory, threads ----------------------------------------------------------------------------------


def deep(images=1, size=24):
    """A program with branches, strides and residuals, its input and what it must give."""
    x = drawn(0, images, 3, size, size)
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


def test_a_view_with_the_negative_bit_is_read_as_what_it_is():
    program, x, expected = deep()
    turned = torch.complex(x, -x).conj().imag
    assert turned.is_neg()
    assert error(program(turned)[0], expected) < TOLERANCE


# Where maps lie -----------------------------------------------------------------------------------


def test_a_sum_takes_the_place_of_a_residual_that_is_read_no_more():
    x, square = drawn(0, 1, 32, 6, 6), drawn(2, 32, 32, 3, 3) / 10
    reverse = torch.arange(36, dtype=torch.int32).flip(0)
    builder = Builder(tuple(x.shape))
    one = builder.combine(builder.input, relu=True)
    two = builder.combine(builder.conv(one, square, padding=(1, 1)), one)  # one is read again
    three = builder.conv(two, square, padding=(1, 1), residual=one)
    four = builder.conv(three, square, padding=(1, 1), residual=three)  # its own source
    five = builder.combine(four, two, reverse)  # other pixels than it writes
    program = builder.build([five])
    steps = [step for step in program._steps if step.residual]
    assert [step.residual == step.target for step in steps] == [False, True, False, False]

    def conv(x):
        return F.conv2d(x, square.double(), None, 1, 1)

    a = x.double().relu()
    b = conv(a) + a
    c = conv(b) + a
    assert error(program(x)[0], conv(c) + c + b.flip(2, 3)) < TOLERANCE


# How the work is cut ------------------------------------------------------------------------------


def cut(channels: int, out: int, size: int, kernel: int, stride: int, threads: int) -> Step:
    pad = kernel // 2
    shape, weight = (1, channels, size, size), (out, channels, kernel, kernel)
    conv = Convolution(shape, weight, (stride, stride), (pad, pad), 1, False)
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


def test_threads_keep_to_their_pixels_where_maps_are_larger_than_weights() -> None:
    step = cut(64, 64, 24, 1, 1, threads=2)
    assert (step.chunks, step.chunk) == (2, 288)
    step = cut(64, 64, 24, 5, 2, threads=2)
    assert (step.chunks, step.chunk) == (1, 12)


def test_no_more_pieces_than_pixels() -> None:
    assert cut(1, 1, 1, 1, 1, threads=8).chunks == 1
    assert cut(1, 1, 2, 3, 2, threads=8).chunks == 1


def test_small_maps_are_transformed_once() -> None:
    step = cut(128, 128, 24, 3, 1, threads=2)
    assert (step.chunks, step.slices) == (2, 1)


def test_an_image_of_its_own_has_the_chunks_of_its_tiles() -> None:
    shape, weight = (2, 64, 64, 90), (64, 64, 3, 3)
    conv = Convolution(shape, weight, (1, 1), (1, 1), 1, False)
    packed = packing.pack(
        libraries.load(), conv, torch.zeros(weight), None, 2, method="winograd 4x6"
    )
    own = for_image(Draft(packed.step, "conv", None, None), packed.step, 1, set())
    assert (own.batch, own.items) == (1, own.chunks)
    assert own.chunks == -(-16 * 15 // own.chunk)


def test_weights_much_larger_than_the_map_are_shared() -> None:
    step = cut(128, 128, 14, 3, 1, threads=2)
    assert (step.kind, step.chunks, step.slices) == (3, 1, 2)
