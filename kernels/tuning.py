"""Which block sizes a kernel runs with: the user's table, then the repository's, then the rule.

A :data:`Choice` holds a kernel's block sizes, warps and stages. A plan function takes one,
``forward_launch(problem, choice=None, **flags)``; None means the rule in its op file, which is
computed from the sizes alone. A launcher asks :func:`choose`, which looks into tables that
``blnet kernels tune`` has measured (``tuning_tables.py``) and measures nothing itself: a first
step waits for no search.

Sizes fall into buckets, named by a readable key such as ``2 bytes, K=64, C=256, x2, rows 2^17``:

- bytes of an element: float16 and bfloat16 load, multiply and spill alike.
- channels exactly: they decide which tiles fit and how long the inner loop is, and a network has
  few. Whether rows are aligned to 16 bytes follows from them.
- the upsampling: ``same`` sizes, small whole ratios, or ``odd``. Each is different machine code,
  and so is ``wide``, offsets of 64 bits.
- rows (pixels in all) by powers of two, from 2^17 to below 2^18: how many programs there are and
  so how full the device is changes with their order of magnitude. Height and width by themselves
  do not count, the kernels see rows x channels. Neither do a kernel's flags (ReLU, a scale,
  gradients not wanted): it is measured with those that training needs.

Sizes that are symbolic while torch.compile or torch.export traces have no bucket: the rule, which
is right for every size. A compiled network keeps the choices it was compiled with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from blnet.kernels import tuning_tables
from blnet.kernels.launch import Launch

Choice = Mapping[str, int]

# Like the forced backend a plain name that all threads share: autograd runs backward on another.
_forced: dict[str, Choice] = {}
_found: dict[tuple[str, str, torch.device], Choice | None] = {}


@dataclass(frozen=True)
class Tunable:
    """What ``blnet kernels tune`` and ``compile`` must know of a kernel.

    A problem is whatever the plan function takes for one; problems that differ only in size are
    of one type. Functions of a problem are given concrete sizes.

    Attributes:
        name: what tables and :func:`choose` call the kernel.
        blocks: each block size a choice must hold, with the smallest and the largest value.
        kernel: the ``@triton.jit`` function.
        plan: (problem, choice) -> Launch, with the flags that take most registers.
        pointers: dtype of the maps -> dtype of each tensor argument by name.
        key: problem -> bucket.
        problems: (batch, bytes of an element) -> name of a site of bL-ResNet-50 -> problem.
        candidates: problem -> the choices to measure beside the rule's.
        call: (problem, dtype, device) -> a call that runs the kernel through its op and returns
            all of the op's outputs; its inputs are drawn once, the same every time.
    """

    name: str
    blocks: Mapping[str, tuple[int, int]]
    kernel: Any
    plan: Callable[[Any, Choice | None], Launch]
    pointers: Callable[[torch.dtype], Mapping[str, torch.dtype]]
    key: Callable[[Any], str | None]
    problems: Callable[[int, int], Mapping[str, Any]]
    candidates: Callable[[Any], list[Choice]]
    call: Callable[[Any, torch.dtype, torch.device], Callable[[], tuple[torch.Tensor, ...]]]


TUNABLES: dict[str, Tunable] = {}


def register(tunable: Tunable) -> None:
    """Make a kernel known; an op file calls this at its end."""
    TUNABLES[tunable.name] = tunable
    tuning_tables.BLOCKS[tunable.name] = tunable.blocks


# Choices and keys ----------------------------------------------------------------------------


def choices(names: str, *rows: tuple[int, ...]) -> list[Choice]:
    """Return one choice a row; a row is the values of ``names``, then warps and stages.

    Args:
        names: names of block sizes, separated by spaces.
        *rows: the values.
    """
    columns = (*names.split(), "num_warps", "num_stages")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def effective(tunable: Tunable, problem: Any, choice: Choice | None) -> Choice:
    """Return the choice that a plan makes of one: blocks are cut to the sizes of the problem."""
    launch = tunable.plan(problem, choice)
    blocks = {name: int(launch.constants[name]) for name in tunable.blocks}
    return {**blocks, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def candidates(tunable: Tunable, problem: Any) -> list[Choice]:
    """Return what is worth measuring for a problem beside the rule, each choice once."""
    seen = [effective(tunable, problem, None)]
    for choice in tunable.candidates(problem):
        cut = effective(tunable, problem, choice)
        if cut not in seen:
            seen.append(cut)
    return seen[1:]


def described(choice: Choice) -> str:
    """Return a choice as text, ``BLOCK_ROWS=128 BLOCK_C=64 warps=8 stages=3``."""
    return " ".join(f"{name.removeprefix('num_')}={value}" for name, value in choice.items())


def concrete(*sizes: object) -> bool:
    """Return whether no size is symbolic; asking adds no guard."""
    return not any(isinstance(size, torch.SymInt) for size in sizes)


def ratio_text(same: bool, ratios: tuple[int, int]) -> str:
    """Return what a key says of the upsampling."""
    height, width = ratios
    if same:
        return "same"
    if not (height and width):
        return "odd"
    return f"x{height}" if height == width else f"x{height}x{width}"


def bucket(itemsize: int, *parts: str, rows: int, wide: bool, unit: str = "rows") -> str:
    """Return the key of concrete sizes; see the top of the file.

    Args:
        itemsize: bytes of an element.
        *parts: what else decides, such as "K=64".
        rows: pixels in all.
        wide: whether offsets take 64 bits.
        unit: what rows counts, if not rows.
    """
    power = f"{unit} 2^{max(rows.bit_length() - 1, 0)}"
    return ", ".join([f"{itemsize} bytes", *parts, power, *(["wide"] if wide else [])])


# The lookup ----------------------------------------------------------------------------------


def choose(kernel: str, key: str | None, device: torch.device) -> Choice | None:
    """Return the choice that a kernel runs with on a device; None is the rule.

    Each question goes to the tables once and is then remembered. Nothing here runs on a device.

    Args:
        kernel: the name of a :class:`Tunable`.
        key: the bucket of the sizes; None where they are symbolic.
        device: of the tensors. On a CPU, in the interpreter, the rule runs unless a choice is
            forced.
    """
    if _forced and kernel in _forced:
        return _forced[kernel]
    if key is None or device.type != "cuda":
        return None
    question = (kernel, key, device)
    if question not in _found:
        _found[question] = tuning_tables.look_up(kernel, key, device)
    return _found[question]


@contextlib.contextmanager
def forced(kernel: str, choice: Choice) -> Iterator[None]:
    """Run a kernel with one choice, whatever the tables say: for tuning and for tests.

    Args:
        kernel: the name of a :class:`Tunable`.
        choice: a value for each of its block sizes, ``num_warps`` and ``num_stages``.

    Raises:
        ValueError: if there is no such kernel, or the choice is none for it.
    """
    if kernel not in TUNABLES:
        raise ValueError(f"forced: no kernel {kernel!r}; choose from {', '.join(TUNABLES)}")
    problem = tuning_tables.wrong_choice(kernel, choice)
    if problem:
        raise ValueError(f"forced: {kernel} cannot take this choice: {problem}")
    previous = _forced.get(kernel)
    _forced[kernel] = dict(choice)
    try:
        yield
    finally:
        if previous is None:
            del _forced[kernel]
        else:
            _forced[kernel] = previous


def forget() -> None:
    """Read the tables anew at the next launch: after one was written, and in tests."""
    _found.clear()
    tuning_tables.forget()
