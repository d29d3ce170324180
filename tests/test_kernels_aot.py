"""Every kernel compiles for every architecture without spilling registers; no GPU needed."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from blnet.kernels import aot
from blnet.kernels.launch import Launch, allocate, specialize
from blnet.kernels.merge import forward_launch
from blnet.kernels.triton_shim import tl, triton

# Of the fused blocks and the other ops: a typical size, and what takes most registers.
BLOCKS = ("bottleneck", "stem", "conv3x3")
HEAVY_BLOCKS = ("wide", "unaligned", "I=64 C=256 to 512 x2", "stem C=64 L=32 bfloat16")
HEAVY_OPS = ("stage 1 K=128", "wide K=128 C=256 odd", "unaligned K=37", "K=128 ")
# expand_merge's kernels for small matrices: float64, no products.
SMALL = ("statistics", "variance", "affine", "between", "second")


def chosen_for(target, *, blocks):
    """`blnet kernels compile` builds everything for every target; this leaves out, to save time:

    for sm_90 float16 but what is heavy: it is bfloat16's code, and of 111 pairs there 88 take the
    same registers, the others differ by 8 at most; elsewhere all of float16, and what is not heavy
    but merge's.
    """
    heavy = HEAVY_BLOCKS if blocks else HEAVY_OPS

    def is_chosen(item):
        op, dtype = item.name.split()[0], item.name.rpartition(" ")[2]
        is_heavy = any(part in item.name for part in heavy)
        if target == "sm_90":
            return dtype != "float16" or is_heavy
        return dtype != "float16" and (
            op == "merge" or (is_heavy and (blocks or dtype != "float32"))
        )

    items = aot.specializations()
    return [
        item for item in items if (item.name.split()[0] in BLOCKS) == blocks and is_chosen(item)
    ]


@pytest.mark.parametrize("target", aot.TARGETS)
def test_no_kernel_spills(target):
    reports = list(aot.compile_all([target], chosen_for(target, blocks=False)))
    assert len(reports) > (50 if target == "sm_90" else 25)
    for report in reports:
        assert report.spills == 0, f"{report.name} on {target} spills {report.spills}"
        assert 0 < report.registers <= 255
        assert report.load_bytes, f"no loads found in {report.name}"
        # What a network runs on: aligned maps. Loads must be 16 bytes a thread, all of them.
        if target != "gfx942" and ("channels_last x2" in report.name or "same" in report.name):
            assert report.load_bytes == (16,), f"{report.name}: loads of {report.load_bytes} bytes"
        on_maps = " K=" in report.name and report.name.split()[1] not in SMALL
        if report.name.startswith("expand_merge ") and on_maps and target == "sm_90":
            assert bool(report.matrix) == ("float32" not in report.name), report.name
            if "unaligned" not in report.name:
                assert report.matrix in ("", "wgmma"), f"{report.name}: {report.matrix}"
                assert 16 in report.load_bytes, f"{report.name}: {report.load_bytes}"
                assert min(report.load_bytes) >= 8 or "float32" in report.name, report.name
        if "unaligned" in report.name:
            assert 16 not in report.load_bytes  # 37 channels: the declaration must not lie


@pytest.mark.parametrize("target", aot.TARGETS)
def test_no_fused_block_spills(target):
    chosen = chosen_for(target, blocks=True)
    assert {item.name.split()[0] for item in chosen} == set(BLOCKS)
    for report in aot.compile_all([target], chosen):
        assert report.spills == 0, f"{report.name} on {target} spills {report.spills}"
        assert 0 < report.registers <= 255
        # What sm_80 (with the limit of its smaller kin, which runs its code), sm_90, sm_100 and
        # gfx942 give one program.
        limit = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}[target] * 1024
        assert report.shared <= limit, f"{report.name} on {target}: {report.shared} bytes"
        # NVIDIA multiplies float32 on no matrix unit but in tf32; in 16 bits all must use one.
        if "float32" not in report.name or target != "gfx942":
            assert bool(report.matrix) == ("float32" not in report.name), report.name
        if target == "sm_90" and report.matrix:
            assert "wgmma" in report.assembly, report.name
        assert (16 in report.load_bytes) == ("unaligned" not in report.name), report.name


def test_specializations_cover_blocks_with_every_flag():
    everything = aot.specializations()
    for op, flags in (
        ("bottleneck", ("CHAIN", "HAS_BIG", "RELU", "SAME", "WIDE", "RATIO_H")),
        ("stem", ("CONV_BIG", "CONV_LITTLE", "WIDE")),
        ("conv3x3", ("WIDE",)),
    ):
        found = [item for item in everything if item.name.split()[0] == op]
        for flag in flags:
            assert {bool(item.constants[flag]) for item in found} == {False, True}, (op, flag)
        dtypes = {item.name.rpartition(" ")[2] for item in found}
        assert dtypes >= ({"float32"} if op == "conv3x3" else {"bfloat16", "float16"})


def test_specializations_cover_both_passes_in_every_dtype():
    names = [item.name for item in aot.specializations()]
    assert len(set(names)) == len(names)
    for dtype in ("float32", "float16", "bfloat16"):
        for part in ("forward", "backward"):
            assert sum(f"merge {part}" in name and name.endswith(f" {dtype}") for name in names) > 5
        for part in ("inference", "training", "reduce", "input"):
            found = [n for n in names if n.startswith(f"expand_merge {part} ")]
            assert sum(name.endswith(f" {dtype}") for name in found) > 5
        assert sum(n.startswith("moments K=") and n.endswith(f" {dtype}") for n in names) > 5
    constants = [i.constants for i in aot.specializations() if i.name.startswith("merge ")]
    for flag in ("WIDE", "SAME"):
        assert {bool(constant[flag]) for constant in constants} == {False, True}
    assert {constant["RATIO_H"] for constant in constants} >= {0, 2}


def test_specialization_is_what_the_run_time_would_see():
    launch = forward_launch((32, 55, 55, 64), (28, 28), 2)
    pointers = dict.fromkeys(("p_big", "p_little", "p_out"), torch.bfloat16)
    kernel = aot.specializations()[0].kernel
    item = specialize("x", kernel, launch, pointers)
    assert item.signature["p_big"] == "*bf16"
    assert item.signature["height"] == "i32"
    assert item.signature["WIDE"] == "constexpr"
    assert {"p_big", "inner", "rows"} <= item.divisible
    assert "height" not in item.divisible  # 55
    flat = specialize("x", kernel, forward_launch((8, 4, 4, 1), (2, 2), 2), pointers)
    assert flat.constants["inner"] == 1
    assert flat.signature["inner"] == "constexpr"


@triton.jit
def _hoards(p_in, p_out, n, BLOCK: tl.constexpr):
    # More live values than one warp has registers for.
    o = tl.arange(0, BLOCK)
    a = tl.load(p_in + o)
    b = tl.load(p_in + o + n)
    for _ in tl.range(0, n):
        a, b = b + n, a
    tl.store(p_out + o, a - b)


@triton.jit
def _multiplies(p_in, p_out, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(p_in + o)
    tl.store(p_out + o, tl.dot(a, a).to(tl.float16))


@pytest.mark.parametrize("target", aot.TARGETS)
def test_a_spilling_kernel_is_seen(target):
    plan = Launch((1,), {"n": 47}, {"BLOCK": 16384}, num_warps=1)
    item = specialize("hoards", _hoards, plan, dict.fromkeys(("p_in", "p_out"), torch.float32))
    assert aot.compile_one(item, target).spills > 0


MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_matrix_instructions_are_seen(target):
    plan = Launch((1,), {"n": 48}, {"BLOCK": 64})
    item = specialize("dot", _multiplies, plan, dict.fromkeys(("p_in", "p_out"), torch.float16))
    assert aot.compile_one(item, target).matrix == MATRIX[target]


def test_undeclared_divisibility_would_narrow_the_loads():
    # The reason why specialisations declare it, and a proof that load_bytes measures something.
    item = next(i for i in aot.specializations() if i.name == "merge forward same bfloat16")
    assert aot.compile_one(item, "sm_90").load_bytes == (16,)
    blind = dataclasses.replace(item, divisible=frozenset())
    assert max(aot.compile_one(blind, "sm_90").load_bytes) < 16


TERMINATED = """
import signal, tempfile
from blnet.kernels import aot
def compile_one(*_):
    tempfile.NamedTemporaryFile(delete=False, suffix=".ptx").close()
    signal.raise_signal(signal.SIGTERM)
aot.compile_one = compile_one
list(aot.compile_all(["sm_90"]))
"""


def test_a_termination_leaves_nothing_behind(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ended = subprocess.run([sys.executable, "-c", TERMINATED], env=environment, check=False)
    assert ended.returncode == 143
    assert not list(tmp_path.iterdir())


def test_unknown_target():
    with pytest.raises(ValueError, match=r"no target 'sm_12'; choose from sm_80, sm_90"):
        list(aot.compile_all(["sm_12"]))


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 1, 1, 1), (0, 4, 2, 2), (2, 3, 0, 5)])
def test_outputs_in_channels_last_are_named_by_their_strides(shape):
    like = torch.empty(1, dtype=torch.bfloat16)
    found = allocate(like, shape, torch.channels_last)
    wanted = torch.empty(shape, memory_format=torch.channels_last)
    assert (found.stride(), found.dtype) == (wanted.stride(), torch.bfloat16)
    # Of a memory format Inductor makes a kernel of its own that fills the output with NaN.
    graph = make_fx(lambda x: allocate(x, shape, torch.channels_last))(like).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.empty_strided.default
    ]
