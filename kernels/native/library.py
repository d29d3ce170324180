"""The compiled library: made at its first use, kept in the user's cache, loaded by ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import secrets
import shlex
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "program.cpp"  # includes the others
# Results must not depend on errno or on trapped exceptions, which nothing here reads; NaN,
# infinity and the order of sums stay as written, so no -ffast-math.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# What fits the machine best comes first; some compilers know only one of the ways to name it.
MACHINES = (("-march=native",), ("-mcpu=native",), ())
MACHINE_VARIABLE = "BLNET_NATIVE_FLAGS"  # its flags take the place of these
OPENMP = ("-fopenmp",)
COMPILE_SECONDS = 120
MAXIMUM_OUTPUTS = 8
COUNTERS = 8  # kLine of step.h: 64-bit numbers for one counter, so that no two share a cache line


class NativeError(ValueError):
    """The native library cannot be had on this machine."""


_POINTERS = (
    "source",
    "target",
    "residual",
    "weight",
    "bias",
    "segments",
    "table",
    "rows",
    "columns",
    "starts",
)
_NUMBERS = (
    *("first_image", "batch", "channels", "blocks", "height", "width"),
    *("out_channels", "out_blocks", "out_height", "out_width"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w"),
    *("source_image", "target_image", "residual_image", "residual_block"),
    *("relu", "multiply", "chunk", "chunks", "slice", "slices"),
    *("segment_count", "planar", "tile_h", "tile_w", "output", "channels_last"),
)


class Step(ctypes.Structure):
    """One step of a program, as step.h declares it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "items")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
    ]


class Call(ctypes.Structure):
    """What changes from call to call, as step.h declares it."""

    _fields_ = [
        ("input", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("outputs", ctypes.c_void_p * MAXIMUM_OUTPUTS),
        ("scratch", ctypes.c_void_p),
        ("scratch_floats", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("taken", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Attributes:
        handle: what ctypes loaded.
        group: output channels that the innermost kernel computes at once.
        pixels: pixels that it computes at once.
        threaded: whether it was compiled with OpenMP; without, it works in one thread.
        vector_bits: bits of the vectors that it computes with.
        path: the file.
    """

    handle: ctypes.CDLL
    group: int
    pixels: int
    threaded: bool
    vector_bits: int
    path: Path


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native engine works here.

    Attributes:
        works: whether it does.
        reason: what it runs on, or why it does not.
        advice: what to do to get it; empty where it works.
    """

    works: bool
    reason: str
    advice: str = ""


def status() -> NativeStatus:
    """Return whether the library can be compiled and loaded here, compiling it if need be."""
    try:
        library = load()
    except NativeError as error:
        reason, _, advice = str(error).partition("; ")
        return NativeStatus(False, reason, advice)
    lanes = "threads by OpenMP" if library.threaded else "one thread: no OpenMP here"
    vectors = f"vectors of {library.vector_bits} bits"
    return NativeStatus(True, f"compiled by {shlex.join(compiler())}, {vectors}, {lanes}")


def compiler() -> tuple[str, ...]:
    """Return the command of the C++ compiler: $CXX, or the first of c++, g++ and clang++.

    Raises:
        NativeError: if there is none.
    """
    own = _flags("CXX")
    wanted = [own] if own else [("c++",), ("g++",), ("clang++",)]
    for name, *options in wanted:
        if path := shutil.which(name):
            return path, *options
    names = " or ".join(name for name, *_ in wanted)
    raise NativeError(
        f"the native engine needs a C++ compiler and there is no {names} on PATH; "
        "install g++ or clang (Debian, Ubuntu: apt-get install g++)"
    )


@functools.cache
def load() -> Library:
    """Return the library, compiled if the cache does not have it for these sources and this CPU.

    Raises:
        NativeError: if there is no compiler, or it cannot compile the sources, or what it made
            cannot be loaded.
    """
    path = _cached()
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"{path} cannot be loaded ({error}); remove the file") from error
    facts = (ctypes.c_int64 * 5)()
    handle.blnet_native_facts(facts)
    group, pixels, size, threaded, vector_bits = facts
    if size != ctypes.sizeof(Step):
        raise NativeError(f"{path} is not made from these sources; remove the file")
    handle.blnet_native_run.restype = None
    handle.blnet_native_run.argtypes = [
        ctypes.POINTER(Step),
        *[ctypes.c_int64] * 3,
        ctypes.POINTER(Call),
        ctypes.c_int64,
    ]
    return Library(handle, group, pixels, bool(threaded), vector_bits, path)


def cache_folder() -> Path:
    """Return where compiled libraries are kept: $XDG_CACHE_HOME or ~/.cache, blnet/native.

    Raises:
        NativeError: if there is no home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "blnet" / "native"
    except RuntimeError as error:
        raise NativeError(
            f"the native engine finds no folder to be kept in ({error}); set XDG_CACHE_HOME to "
            "one that you may write to"
        ) from error


def machines() -> tuple[tuple[str, ...], ...]:
    """Return the sets of flags to try that name the CPU to compile for."""
    own = _flags(MACHINE_VARIABLE)
    return (own,) if own else MACHINES


def _flags(variable: str) -> tuple[str, ...]:
    """Return the words of an environment variable, quoted as in a shell."""
    try:
        return tuple(shlex.split(os.environ.get(variable, "")))
    except ValueError as error:
        raise NativeError(f"{variable} cannot be read ({error}); close its quotes") from error


def _cached() -> Path:
    """Return the library's file, made if it is not there."""
    compiling = compiler()
    path = cache_folder() / f"{_key(compiling)}.so"
    try:
        if path.exists() and _is_whole(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _aside(path) as partial:
            _compile(compiling, partial)
    except OSError as error:
        raise NativeError(
            f"the native engine cannot be kept in {path.parent} ({error.strerror or error}); "
            "set XDG_CACHE_HOME to a folder that you may write to"
        ) from error
    return path


def _is_whole(path: Path) -> bool:
    """Return whether a library ends where it says; loading one that was cut kills the process.

    The table at the end of an ELF file begins at the eight bytes from 40 on, and the two from 58
    and from 60 on say how large and how many its entries are (ELF-64 Object File Format 1.5).
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head.startswith(b"\x7fELF\x02\x01"):  # another system's
        return any(head)
    begin, size, count = struct.unpack_from("<Q10xHH", head.ljust(64, b"\0"), 40)
    return bool(begin) and path.stat().st_size >= int(begin + size * count)


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Give a file to write and rename: two processes may compile at once, and one wins."""
    partial = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.so")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _key(compiling: tuple[str, ...]) -> str:
    """Return what names a library: a hash of its sources, the compiler, the flags and the CPU."""
    digest = hashlib.sha256()
    for source in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = _output([*compiling, "--version"])
    for part in (
        version,
        repr((compiling[1:], FLAGS, machines(), OPENMP)),
        platform.machine(),
        _cpu_flags(),
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _cpu_flags() -> str:
    """Return what the CPU can do, where the system says so: a home may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(
            f"{command[0]} cannot be run ({error}); install g++ or clang, or set CXX to one"
        ) from error
    return done.stdout if done.returncode == 0 else ""


def _compile(compiling: tuple[str, ...], target: Path) -> None:
    """Compile with the first set of options that the compiler takes: the best one comes first."""
    why = ""
    for openmp in (OPENMP, ()):
        for machine in machines():
            command = [*compiling, *FLAGS, *machine, *openmp, str(SOURCE), "-o", str(target)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NativeError(
                    f"{shlex.join(compiling)} cannot compile the native engine ({error}); "
                    "install g++ or clang, or set CXX to one"
                ) from error
            if done.returncode == 0:
                return
            why = why or next((line for line in done.stderr.splitlines() if "error" in line), "")
    why = why.strip()[:160] or "no message"
    raise NativeError(
        f"{shlex.join(compiling)} cannot compile the native engine ({why}); "
        "install a g++ or clang that knows C++17, or set CXX to one"
    )
