"""``blnet kernels tune``: measure every kernel's candidates on this device, and write the table.

For each tunable kernel and each site of bL-ResNet-50 it runs the rule's choice and every candidate
through the kernel's op, drops those that do not run or whose results are not the rule's, times the
rest, and keeps the fastest if it beats the rule clearly. The table is written after every site, so
an interrupted run keeps what it has, and the next one goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from blnet.kernels import testing, tuning, tuning_tables
from blnet.kernels.triton_shim import triton
from blnet.kernels.tuning import TUNABLES, Choice, Tunable
from blnet.kernels.tuning_tables import Entry, Table

MARGIN = 0.02  # a candidate must beat the rule by more, or it may be chance
BATCHES = (32, 256)
DTYPES = ("bfloat16",)
_SLICE = 2**24  # elements compared at once: a whole map in float64 may not fit
_WARMUP, _REPEAT = 5, 25  # milliseconds that Triton's benchmark loop aims at

Timer = Callable[[Callable[[], Any]], float]  # a call -> microseconds
Tensors = tuple[torch.Tensor, ...]


@dataclass
class Site:
    """What came out of one kernel at one site.

    Attributes:
        kernel: the kernel's name.
        key: the bucket.
        rule: microseconds of the rule.
        best: microseconds of what was kept.
        choice: the candidate that was kept, or None for the rule.
        measured: how many candidates were timed.
        unfit: how many could not be compiled or run.
        wrong: candidates whose results were not the rule's, each with the reason.
    """

    kernel: str
    key: str
    rule: float = 0.0
    best: float = 0.0
    choice: Choice | None = None
    measured: int = 0
    unfit: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept = "the rule" if self.choice is None else tuning.described(self.choice)
        gain = 1 - self.best / self.rule if self.rule else 0.0
        text = (
            f"{self.kernel:<22} {self.key:<44} {self.rule:>9.1f} {self.best:>9.1f} {gain:>6.1%}  "
            f"{kept}; {self.measured} measured"
        )
        text += f", {self.unfit} did not run" if self.unfit else ""
        return text + "".join(f"\n    wrong and dropped: {reason}" for reason in self.wrong)


# Timing and checking -------------------------------------------------------------------------


def device_timer(call: Callable[[], Any]) -> float:
    """Return the median time of a call on a CUDA device, with a cold L2 cache, in microseconds.

    The call is captured into a CUDA graph first: what Python takes to launch an op is as long as
    a small kernel, and is no matter of block sizes.
    """
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    measure = triton.testing.do_bench
    milliseconds = measure(graph.replay, warmup=_WARMUP, rep=_REPEAT, return_mode="median")
    return 1000.0 * float(milliseconds)


def _slices(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if tensor.numel() <= _SLICE:
        yield tensor
        return
    yield from tensor.split(max(_SLICE * len(tensor) // tensor.numel(), 1))


def disagreement(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str:
    """Say how a result differs from another one, both of a kernel's; empty if they agree.

    Each may be off the truth by the tolerance of ``blnet.kernels.testing``, so they may be twice
    that apart.

    Args:
        got: the result of a candidate.
        expected: that of the rule.
        dtype: in which the op was run.
    """
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if not got.numel():
        return ""
    tolerance = testing.TOLERANCES[dtype]
    norm = torch.linalg.vector_norm(expected, dtype=torch.float64)
    scale = norm / expected.numel() ** 0.5
    worst, square = 0.0, 0.0
    for a, b in zip(_slices(got), _slices(expected), strict=True):
        error = (a.double() - b.double()).abs()
        relative = error / (b.double().abs() + scale).clamp_min(torch.finfo(dtype).tiny)
        if relative.isnan().any():
            return "NaN where the rule has none"
        worst = max(worst, float(relative.max()))
        square += float(error.square().sum())
    if worst > 2 * tolerance.elementwise:
        return f"elements are off by {worst:.2g}"
    whole = square**0.5 / max(float(norm), torch.finfo(dtype).tiny)
    return f"the whole is off by {whole:.2g}" if whole > 2 * tolerance.frobenius else ""


def _run(tunable: Tunable, choice: Choice, call: Callable[[], Tensors]) -> Tensors:
    """Run a choice; outputs hold NaN first, so that what it does not write shows."""
    with tuning.forced(tunable.name, choice), testing.poisoned_outputs():
        results = call()
    if results[0].is_cuda:
        torch.cuda.synchronize(results[0].device)  # what fails shall fail here
    return results


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


# One site ------------------------------------------------------------------------------------


def measure(
    tunable: Tunable, problem: Any, dtype: torch.dtype, device: torch.device, timer: Timer
) -> Site:
    """Measure every candidate for one problem.

    Args:
        tunable: the kernel.
        problem: the sizes.
        dtype: of the maps.
        device: where to run.
        timer: times a call.

    Raises:
        Exception: what the rule's own choice raises, if it cannot run.
    """
    key = tunable.key(problem)
    assert key is not None  # the sites' sizes are plain numbers
    site = Site(tunable.name, key)
    call = tunable.call(problem, dtype, device)
    rule = tuning.effective(tunable, problem, None)
    expected = _run(tunable, rule, call)

    def timed(choice: Choice) -> float:
        with tuning.forced(tunable.name, choice):
            return timer(call)

    site.rule = site.best = timed(rule)
    best: Choice | None = None
    for choice in tuning.candidates(tunable, problem):
        try:
            got = _run(tunable, choice, call)
            reasons = [disagreement(*pair, dtype) for pair in zip(got, expected, strict=True)]
            if any(reasons):
                reason = "; ".join(filter(None, reasons))
                site.wrong.append(f"{tuning.described(choice)}: {reason}")
                continue
            microseconds = timed(choice)
        except Exception:  # too much shared memory, a compiler that gives up: it does not count
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises if nothing can run there any more
            site.unfit += 1
            continue
        site.measured += 1
        if microseconds < site.best:
            site.best, best = microseconds, choice
    _confirm(site, best, rule, timed)
    return site


def _confirm(
    site: Site, best: Choice | None, rule: Choice, timed: Callable[[Choice], float]
) -> None:
    """Keep the fastest if it beats the rule twice: the best of many is partly luck."""
    if best is not None and site.best < (1 - MARGIN) * site.rule:
        again, rule_again = timed(best), timed(rule)
        if again < (1 - MARGIN) * rule_again:
            site.choice, site.best, site.rule = best, again, rule_again
            return
    site.best = site.rule


# All sites -----------------------------------------------------------------------------------


def architecture(device: torch.device) -> str:
    """Return what a CUDA or ROCm device compiles for: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def begin(device: str, target: str, folder: Path, fresh: bool) -> Table:
    """Return the table to go on with: the one in the folder, or an empty one.

    Args:
        device: name of the device.
        target: its architecture.
        folder: where the table lies.
        fresh: start anew whatever is there.

    Raises:
        ValueError: if what is there is no table, or was measured with other versions.
    """
    versions = (torch.__version__, getattr(triton, "__version__", "none"))
    empty = Table(device, target, *versions, date="")
    path = folder / f"{tuning_tables.slug(device)}.json"
    if fresh:
        return empty
    try:
        found = tuning_tables.read(path, device)
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be continued: {error}; add --fresh to replace it"
        ) from None
    if found is None:
        return empty
    if (found.torch, found.triton) != versions:
        raise ValueError(
            f"{path} was measured with PyTorch {found.torch} and Triton {found.triton}, and these "
            f"are {versions[0]} and {versions[1]}; add --fresh to replace it, or give another "
            "--output"
        )
    return found


def chosen_tunables(names: Sequence[str] | None) -> list[Tunable]:
    """Return the kernels whose name begins with one of these; None for all.

    Raises:
        ValueError: for a name that no kernel begins with.
    """
    for name in names or ():
        if not any(known.startswith(name) for known in TUNABLES):
            raise ValueError(f"--op {name!r}: no kernel begins so; choose from {_known()}")
    return [t for t in TUNABLES.values() if not names or t.name.startswith(tuple(names))]


def _known() -> str:
    return ", ".join(repr(name) for name in TUNABLES)


def problems(
    tunables: Iterable[Tunable], dtypes: Sequence[torch.dtype], batches: Sequence[int]
) -> Iterator[tuple[Tunable, torch.dtype, Any, str]]:
    """Yield every (kernel, dtype, problem, key) to measure, each bucket of a kernel once."""
    for tunable in tunables:
        seen = set()
        for dtype in dtypes:
            for batch in batches:
                for problem in tunable.problems(batch, dtype.itemsize).values():
                    key = tunable.key(problem)
                    if key is not None and key not in seen:
                        seen.add(key)
                        yield tunable, dtype, problem, key


def tune(
    table: Table,
    folder: Path,
    work: Sequence[tuple[Tunable, torch.dtype, Any, str]],
    device: torch.device,
    timer: Timer = device_timer,
    budget: float = float("inf"),
    say: Callable[[str], None] = print,
) -> int:
    """Measure what the table lacks, and write it after every site.

    Args:
        table: what is known; it is filled in.
        folder: where to write it.
        work: what to measure, from :func:`problems`.
        device: where to run.
        timer: times a call.
        budget: seconds after which no further site is begun.
        say: prints a line for each site.

    Returns:
        How many sites are left for another run.
    """
    started = time.monotonic()
    left = [item for item in work if item[3] not in table.entries.get(item[0].name, {})]
    for number, (tunable, dtype, problem, key) in enumerate(left):
        if time.monotonic() - started > budget:
            return len(left) - number
        try:
            site = measure(tunable, problem, dtype, device, timer)
        except torch.OutOfMemoryError as error:
            say(f"{tunable.name:<22} {key:<44} left out: {_reason(error)}")
            continue
        entry = Entry(site.choice, round(site.best, 3), round(site.rule, 3))
        table.entries.setdefault(tunable.name, {})[key] = entry
        table.date = datetime.now().astimezone().isoformat(timespec="seconds")
        tuning_tables.write(table, folder)
        say(str(site))
    tuning.forget()
    return 0
