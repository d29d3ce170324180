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
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blnet.kernels import tuning_tables
from blnet.kernels.catalogue import OPS
from blnet.kernels.launch import Specialization, specialize
from blnet.kernels.triton_shim import INTERPRETED, TRITON_INSTALLED, triton
from blnet.kernels.tuning import TUNABLES, Choice, Tunable, candidates, described

# Target -> Triton's (backend, architecture, threads in a warp).
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

# The lists of candidates hold nothing that spills there; elsewhere measuring must find it out.
CANDIDATES_FIT = "sm_90"
_CANDIDATE = " candidate "  # in the name of a specialisation
# As in the assembly -> as in a report; where there are several the first tells most.
_MATRIX_INSTRUCTIONS = {
    "tcgen05.mma": "tcgen05",
    "wgmma": "wgmma",
    "mma": "mma",
    "v_mfma": "mfma",
}


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
        matrix: the matrix instructions that are used: "mma", "wgmma", "tcgen05", "mfma" or "".
        load_bytes: the distinct widths of loads from global memory by one thread, ascending.
        seconds: time to compile.
        assembly: PTX or AMD assembly.
    """

    name: str
    target: str
    registers: int
    shared: int
    spills: int
    matrix: str
    load_bytes: tuple[int, ...]
    seconds: float
    assembly: str

    @property
    def fails(self) -> bool:
        """Whether it spills where it must not: candidates must not where they were picked."""
        picked = _CANDIDATE not in self.name or self.target == CANDIDATES_FIT
        return self.spills > 0 and picked


def specializations() -> list[Specialization]:
    """List every specialisation of every op."""
    return [item for op in OPS for item in op.specializations()]


def _of_choice(
    tunable: Tunable, problem: Any, dtype: torch.dtype, choice: Choice, name: str
) -> Specialization:
    launch, pointers = tunable.plan(problem, choice), tunable.pointers(dtype)
    return specialize(name, tunable.kernel, launch, pointers)


def _problem_of(tunable: Tunable, key: str) -> tuple[Any, torch.dtype] | None:
    """Find sizes in a bucket; the batches that are tried visit every bucket of every site."""
    for dtype in (torch.bfloat16, torch.float32):
        for power in range(16):
            for batch in (2**power, 3 * 2**power):  # the second may be wide where the first is not
                for problem in tunable.problems(batch, dtype.itemsize).values():
                    if tunable.key(problem) == key:
                        return problem, dtype
    return None


def of_tables(target: str) -> list[Specialization]:
    """List the choices that the repository's tables and the user's hold for an architecture.

    16-bit ones are built in bfloat16. Entries of kernels or sizes that this version does not tune
    are left out: it does not use them.

    Raises:
        ValueError: naming the file, if one is no table.
    """
    found = []
    for folder in (tuning_tables.SHIPPED, tuning_tables.user_folder()):
        tables = [] if folder is None else tuning_tables.tables_in(folder)
        for table in (table for table in tables if table.architecture == target):
            for kernel, of_kernel in table.entries.items():
                tunable = TUNABLES.get(kernel)
                for key, entry in of_kernel.items() if tunable else ():
                    sizes = _problem_of(tunable, key) if tunable and entry.choice else None
                    if tunable and entry.choice and sizes:
                        name = f"{kernel} {key}: {described(entry.choice)} ({table.device})"
                        found.append(_of_choice(tunable, *sizes, entry.choice, name))
    return found


def of_candidates() -> list[Specialization]:
    """List every candidate that ``blnet kernels tune`` measures at batch 32, each code once."""
    found: dict[tuple[object, ...], Specialization] = {}
    for tunable in TUNABLES.values():
        for dtype in (torch.bfloat16, torch.float32):
            short = str(dtype).removeprefix("torch.")
            for site, problem in tunable.problems(32, dtype.itemsize).items():
                for choice in candidates(tunable, problem):
                    name = f"{tunable.name}{_CANDIDATE}{described(choice)} {site} {short}"
                    item = _of_choice(tunable, problem, dtype, choice, name)
                    code = (tunable.name, short, item.divisible, *sorted(choice.items()),
                            *sorted(item.constants.items()))  # fmt: skip
                    found.setdefault(code, item)
    return list(found.values())


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
def _fresh_cache() -> Iterator[str]:
    """Give Triton a cache of its own, which also goes where the process is terminated."""
    # A gate must not pass on what an earlier version of a kernel left in the user's cache.
    with (
        _terminated_by_exception(),
        tempfile.TemporaryDirectory(prefix="blnet-aot-") as folder,
        triton.knobs.cache.scope(),
    ):
        triton.knobs.cache.dir = folder
        yield folder


@contextlib.contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Have SIGTERM raise SystemExit, so that what is to be cleaned up is; unless it is handled."""
    only_main = threading.current_thread() is threading.main_thread()  # may take a signal over
    if not only_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Have temporary files made in a folder: Triton leaves its own where it is interrupted."""
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


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
    with _fresh_cache() as folder:
        for target in targets:
            for specialization in chosen:
                with _temporary_files_in(folder):
                    report = compile_one(specialization, target)
                yield report


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


def _matrix_instructions(assembly: str) -> str:
    for instruction, name in _MATRIX_INSTRUCTIONS.items():
        if re.search(rf"\b{re.escape(instruction)}[._]", assembly):
            return name
    return ""


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
        "matrix": _matrix_instructions(ptx),
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
        "matrix": _matrix_instructions(text),
        "load_bytes": tuple(sorted(set(sizes))),
        "assembly": text,
    }
