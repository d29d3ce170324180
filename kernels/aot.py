"""Ahead-of-time compilation: build every kernel for a GPU that is not there, and look at the code.

    from blnet.kernels import aot
    for report in aot.compile_all(["sm_90"]):
        print(report.name, report.registers, report.spills)

Triton compiles to machine code without a device. For NVIDIA the registers, shared memory and
local memory come from ``cuobjdump --dump-resource-usage`` (shipped inside Triton), for AMD from
the metadata in the assembly. A kernel that spills registers, or keeps anything in local memory,
is a bug of its launch configuration: ``blnet kernels compile`` and a test refuse it.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blnet.kernels.catalogue import OPS
from blnet.kernels.launch import Specialization
from blnet.kernels.triton_shim import INTERPRETED, TRITON_INSTALLED, triton

# Target -> Triton's (backend, architecture, threads in a warp).
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

_MATRIX_INSTRUCTIONS = re.compile(r"\b(wgmma|mma|tcgen05\.mma|v_mfma)[._]")


@dataclass(frozen=True)
class Report:
    """What came out of compiling one specialisation for one target.

    Attributes:
        name: the specialisation's name.
        target: a key of :data:`TARGETS`.
        registers: vector registers per thread.
        shared: bytes of shared memory per program.
        spills: bytes of stack and local memory per thread (NVIDIA), or registers spilled plus
            bytes of private memory (AMD); 0 is the only good answer.
        matrix: whether matrix instructions (mma, wgmma, tcgen05, mfma) are used.
        load_bytes: the distinct widths of loads from global memory by one thread, ascending.
        seconds: time to compile.
        assembly: PTX or AMD assembly.
    """

    name: str
    target: str
    registers: int
    shared: int
    spills: int
    matrix: bool
    load_bytes: tuple[int, ...]
    seconds: float
    assembly: str


def specializations() -> list[Specialization]:
    """List every specialisation of every op."""
    return [item for op in OPS for item in op.specializations()]


def check_ready(targets: Iterable[str]) -> None:
    """Check that this process can compile for these targets.

    Raises:
        ValueError: naming the unknown target, or saying why nothing can be compiled here.
    """
    if not TRITON_INSTALLED:
        raise ValueError("compiling needs Triton; install it with: pip install triton")
    if INTERPRETED:
        raise ValueError(
            "compiling is not possible with TRITON_INTERPRET=1, which replaces the compiler; "
            "unset it and start Python again"
        )
    for target in targets:
        if target not in TARGETS:
            known = ", ".join(TARGETS)
            raise ValueError(f"no target {target!r}; choose from {known}")


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    # A gate must not pass on what an earlier version of a kernel left in the user's cache.
    with tempfile.TemporaryDirectory(prefix="blnet-aot-") as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield


def compile_all(
    targets: Iterable[str] = tuple(TARGETS), chosen: Iterable[Specialization] | None = None
) -> Iterator[Report]:
    """Compile specialisations for targets, one after the other.

    Args:
        targets: keys of :data:`TARGETS`.
        chosen: what to compile; None for all of every op.

    Yields:
        A report for each pair, as soon as it is compiled.

    Raises:
        ValueError: for an unknown target, or where Triton cannot compile here.
    """
    targets = tuple(targets)
    check_ready(targets)
    chosen = specializations() if chosen is None else tuple(chosen)
    with _fresh_cache():
        for target in targets:
            for specialization in chosen:
                yield compile_one(specialization, target)


def compile_one(specialization: Specialization, target: str) -> Report:
    """Compile one specialisation for one target; see :func:`compile_all`."""
    check_ready([target])
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = specialization.kernel
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(specialization.signature),
        constexprs=dict(specialization.constants),
        attrs={(position[n],): [["tt.divisibility", 16]] for n in specialization.divisible},
    )
    options = {"num_warps": specialization.num_warps, "num_stages": specialization.num_stages}
    started = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    seconds = time.perf_counter() - started
    measure = _amd if TARGETS[target][0] == "hip" else _nvidia
    return Report(
        name=specialization.name,
        target=target,
        shared=compiled.metadata.shared,
        seconds=seconds,
        **measure(compiled.asm),
    )


def _nvidia(assembly: dict[str, Any]) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise OSError(f"cuobjdump printed no resource usage; it said: {text.strip()!r}")
    ptx = assembly["ptx"]
    widths = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    ]
    # Pipelined loops copy straight to shared memory.
    copies = r"\bcp\.async\.c[ag]\.shared\.global\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)"
    widths += [int(size, 0) for size in re.findall(copies, ptx)]
    return {
        "registers": usage["REG"],
        "spills": usage["STACK"] + usage["LOCAL"],
        "matrix": bool(_MATRIX_INSTRUCTIONS.search(ptx)),
        "load_bytes": tuple(sorted(set(widths))),
        "assembly": ptx,
    }


def _amd(assembly: dict[str, Any]) -> dict[str, Any]:
    text = assembly["amdgcn"]
    keys = r"vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    usage = {key: int(value) for key, value in re.findall(rf"\.({keys}):\s+(\d+)", text)}
    if len(usage) != 4:
        raise OSError(f"the AMD assembly states no resource usage; found only {sorted(usage)}")
    words = re.findall(r"\b(?:global|buffer)_load_(dwordx?\d?|[us]?(?:short|byte)\w*)", text)
    sizes = [int(w[6:] or 1) * 4 if w.startswith("dword") else 2 - ("byte" in w) for w in words]
    return {
        "registers": usage.pop("vgpr_count"),
        "spills": sum(usage.values()),
        "matrix": bool(_MATRIX_INSTRUCTIONS.search(text)),
        "load_bytes": tuple(sorted(set(sizes))),
        "assembly": text,
    }
