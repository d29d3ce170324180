"""The harness: times the implementations of a group against each other, round by round.

How a time is taken. Every implementation is built, runs once, and its result is compared with the
reference; what does not match gets no time. All are warmed up until their times settle. One that
is far slower than the fastest of its family is dropped, so that it does not eat the run. The rest
run in turns, A B C A B C ..., so that a slow second of the machine hits all of them, and every
single time is kept. On a CPU the clock is `time.perf_counter`, right after an untimed call of the
same; on a GPU CUDA events around the call, after a buffer larger than the L2 cache has been
overwritten, for single ops several times: Python launches them meanwhile, and what is timed is the
device's work.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from blnet.bench.results import LATE, LEASHED, Check, Measurement
from blnet.limits import OutOfTime, UnavailableError, one_line, out_of_memory, time_limit
from blnet.optimizing.choosing import with_rounding

Call = Callable[[], Any]
LEASH = 4.0  # times the fastest of the family
# What a slow implementation may cost all the same, seconds: the leash is there to save the run's
# time, and a short call looks slow too easily on a busy machine.
LEASH_SECONDS = 4.0
MAX_WARM_UPS = 10
_SURE = 3  # times that a call has to be slow to be dropped for it: one may be the machine's
SETTLED = 0.05  # relative spread of the last three warm-up calls
LONG_SECONDS = 0.5  # a call that needs no other before it
FLUSH_BYTES = 256 << 20  # larger than any L2 cache
COVERS = 10  # at 4 TB/s overwriting it takes 60 us; Python takes over 100 to launch some ops


class TooLargeError(Exception):
    """A group whose batch could be halved does not fit into memory."""


@dataclass
class Implementation:
    """One way to compute a result.

    Attributes:
        name: see `Measurement`.
        family: see `Measurement`.
        build: makes it ready and returns a call without arguments that gives the result.
        description: one sentence on it.
        facts: what the suite wants to have in the results.
        held_bytes: bytes of the weights and the input, which exist before a call.
        memory: whether to measure peak memory.
        compiles: whether building it compiles, which takes of the run's time for that.
        note: what a reader must know of its times.
    """

    name: str
    family: str
    build: Callable[[], Call]
    description: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    held_bytes: int = 0
    memory: bool = True
    compiles: bool = False
    note: str = ""


@dataclass
class BuildBudget:
    """How long builds may take, so that a quick run stays quick on a slow machine.

    Attributes:
        each: seconds for one build.
        left: seconds for all builds still to come that compile; the others do not count.
        least: seconds that a build gets even when nothing is left: a warm cache needs no more.
    """

    each: float = 90.0
    left: float = math.inf
    least: float = 5.0

    def limit(self, compiles: bool) -> float:
        """Return how many seconds the next build may take."""
        return min(self.each, max(self.left, self.least)) if compiles else self.each


@dataclass
class Group:
    """Implementations that are measured against each other.

    Attributes:
        suite: name of the suite.
        name: name of the group.
        implementations: in the order they take turns.
        references: family -> a call that gives the right result, in higher precision.
        tolerance: largest relative error that passes.
        reference_text: what the references are.
        rounds: how often each one runs.
        halves: whether its batch can be halved where it does not fit into memory.
        max_warm_up: seconds of warming up of one implementation.
        budget: of the builds; the groups of a suite share one.
        leash_seconds: what an implementation far slower than its family's fastest may cost.
        covered: whether a GPU is kept busy until a call is launched, see `covering`.
        plain: family -> a call of PyTorch's own code in the precision of the run, where that has
            16 bits: a result may be off by a multiple of its error, see `with_rounding`.
    """

    suite: str
    name: str
    implementations: list[Implementation]
    references: dict[str, Call]
    tolerance: float
    reference_text: str
    rounds: int
    halves: bool = False
    max_warm_up: float = 2.0
    budget: BuildBudget = field(default_factory=lambda: BuildBudget())
    leash_seconds: float = LEASH_SECONDS
    covered: bool = False
    plain: dict[str, Call] = field(default_factory=dict)


class Clock(Protocol):
    """Times calls."""

    def __call__(self, call: Call) -> float:
        """Return how long one call takes, seconds."""


def wall_clock(call: Call) -> float:
    """Return how long a call takes on this CPU in a loop, seconds.

    A call is timed right after one of its own. Threads of what ran before may still be spinning for
    work, and its own be asleep, which can take milliseconds to end. Next to half a second that is
    nothing, and one call is enough.
    """
    seconds = _wall_time(call)
    return seconds if seconds > LONG_SECONDS else _wall_time(call)


def _wall_time(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class CudaClock:
    """Times calls on the GPU with events, with a cold L2 cache.

    Args:
        flushes: how often the cache is overwritten before a call.
        buffer: what is overwritten; None makes it.
    """

    def __init__(self, flushes: int = 1, buffer: Tensor | None = None) -> None:
        if buffer is None:
            buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.buffer = buffer
        self._flushes = flushes

    def __call__(self, call: Call) -> float:
        """Return the time between the events before and after the call, seconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._flushes):
            self.buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def covering(clock: Clock) -> Clock:
    """Return a clock for calls that a GPU runs faster than Python launches them.

    The device is kept busy meanwhile. On a CPU it is the clock itself.
    """
    return CudaClock(COVERS, clock.buffer) if isinstance(clock, CudaClock) else clock


def make_clock(device: str) -> Clock:
    """Return the clock for a device."""
    return CudaClock() if device == "cuda" else wall_clock


def measure(
    group: Group,
    measurements: list[Measurement],
    clock: Clock = wall_clock,
    peak: Callable[[Call], int] | None = None,
    watch: Callable[[str, float], None] = lambda step, share: None,
) -> None:
    """Measure a group and write what is found into its measurements, as it is found.

    Args:
        group: what to measure.
        measurements: one of each implementation, in the same order (`declare` makes them). They
            hold what was measured so far if the run is interrupted.
        clock: times one call.
        peak: gives the peak memory of a call, bytes; None leaves it out.
        watch: is told what happens next and how much of the work it is, where building and
            timing one implementation count 1 each.

    Raises:
        TooLargeError: if memory ran out and the group's batch can be halved.
    """
    pairs = list(zip(group.implementations, measurements, strict=True))
    calls: list[tuple[Implementation, Measurement, Call]] = []
    references: dict[str, tuple[Any, float]] = {}
    for implementation, measurement in pairs:
        watch(f"building {implementation.family}, {implementation.name}", 1.0)
        call = _prepare(group, implementation, measurement, references)
        if call is not None:
            calls.append((implementation, measurement, call))
    references.clear()
    watch("warming up", 0.0)
    calls = _warm_up(group, calls, clock)
    for number in range(group.rounds):
        watch(f"round {number + 1} of {group.rounds}", len(pairs) / group.rounds)
        for _, measurement, call in list(calls):
            _sample(group, measurement, call, clock)
        calls = [item for item in calls if not item[1].failed]
    for implementation, measurement, call in calls:
        if peak is not None and implementation.memory:
            # It is extra: looking at memory takes some, and a time that is there stays.
            with contextlib.suppress(RuntimeError, MemoryError):
                measurement.peak_memory = implementation.held_bytes + peak(call)


def declare(group: Group) -> list[Measurement]:
    """Return an empty measurement for each implementation of a group."""
    return [
        Measurement(
            group.suite, group.name, i.family, i.name, i.description, dict(i.facts), note=i.note
        )
        for i in group.implementations
    ]


def _prepare(
    group: Group,
    implementation: Implementation,
    measurement: Measurement,
    references: dict[str, tuple[Any, float]],
) -> Call | None:
    """Build an implementation and check its result; return its call if it may be timed."""
    family = implementation.family
    limit = group.budget.limit(implementation.compiles)
    start = time.perf_counter()
    try:
        try:
            with time_limit(limit):
                call = implementation.build()
                result = call()
        finally:
            measurement.build_seconds = time.perf_counter() - start
            if implementation.compiles:
                group.budget.left -= measurement.build_seconds
        # After the build, which says best why a network does not work.
        if family not in references:
            references[family] = _reference(group, family)
        reference, tolerance = references[family]
        error = relative_error(result, reference)
    except OutOfTime:
        cut = " (what was left of the run's time to compile)" if limit < group.budget.each else ""
        if not cut:
            measurement.facts[LATE] = limit
        _settle(measurement, "dropped", f"building took more than {limit:.1f} s{cut}")
        return None
    except UnavailableError as reason:
        _settle(measurement, "skipped", str(reason))
        return None
    except Exception as failure:
        _fail(group, measurement, failure)
        return None
    measurement.check = Check(error, tolerance, group.reference_text)
    if not measurement.check.passed:
        _settle(
            measurement,
            "wrong",
            f"relative error {error:.1e} is above {tolerance:.0e}, so it gets no time",
        )
        return None
    measurement.status = "ok"
    return call


def _reference(group: Group, family: str) -> tuple[Any, float]:
    """Return the right result of a family, and how far another may be from it."""
    reference = group.references[family]()
    if family not in group.plain:
        return reference, group.tolerance
    if not isinstance(reference, Tensor):
        reference = list(reference)  # which may be read once
    own = relative_error(group.plain[family](), reference)
    return reference, with_rounding(group.tolerance, own)


def _warm_up(
    group: Group, calls: list[tuple[Implementation, Measurement, Call]], clock: Clock
) -> list[tuple[Implementation, Measurement, Call]]:
    """Run each until its times settle; drop those that are far behind their family."""
    warm: list[tuple[Implementation, Measurement, Call, list[float]]] = []
    for implementation, measurement, call in calls:
        try:
            times = _warm_times(call, clock, group.max_warm_up)
        except Exception as failure:
            _fail(group, measurement, failure)
        else:
            warm.append((implementation, measurement, call, times))
    fastest: dict[str, float] = {}
    for _, measurement, _, times in warm:
        family = measurement.family
        fastest[family] = min(statistics.median(times), fastest.get(family, float("inf")))
    kept = []
    for implementation, measurement, call, times in warm:
        # Its best against the fastest's median: noise alone must not drop anything.
        best = fastest[measurement.family]
        try:
            seconds = _surely(times, LEASH * best, call, clock)
        except Exception as failure:
            _fail(group, measurement, failure)
            continue
        if seconds > LEASH * best and seconds * group.rounds > group.leash_seconds:
            note = f"{seconds / best:.1f} times slower than the fastest after warming up"
            measurement.facts[LEASHED] = seconds  # by which a comparison knows a slow-down
            _settle(measurement, "dropped", f"{note} ({seconds * 1e3:.1f} ms)")
        else:
            kept.append((implementation, measurement, call))
    return kept


def _surely(times: list[float], limit: float, call: Call, clock: Clock) -> float:
    """Return the best of some times, of three at least where one is above a limit."""
    times = list(times)
    while min(times) > limit and len(times) < _SURE:
        times.append(clock(call))
    return min(times)


def _warm_times(call: Call, clock: Clock, max_seconds: float) -> list[float]:
    """Call until the last three times agree or the time is up; return them."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < MAX_WARM_UPS:
        times.append(clock(call))
        last = times[-3:]
        if len(last) == 3 and max(last) - min(last) <= SETTLED * min(last):
            break
        if len(times) >= 2 and time.perf_counter() - start > max_seconds:
            break
    # The first call may still tune or allocate.
    return times[1:][-3:]


def _sample(group: Group, measurement: Measurement, call: Call, clock: Clock) -> None:
    try:
        measurement.samples.append(clock(call))
    except Exception as failure:
        _fail(group, measurement, failure)


def _fail(group: Group, measurement: Measurement, failure: Exception) -> None:
    if group.halves and out_of_memory(failure):
        raise TooLargeError(one_line(failure)) from failure
    _settle(measurement, "error", one_line(failure))


def _settle(measurement: Measurement, status: Any, note: str) -> None:
    measurement.status = status
    measurement.note = note


def relative_error(result: Any, reference: Any) -> float:
    """Return norm(result - reference) / norm(reference), in float64.

    Args:
        result: a tensor, or a sequence of tensors, which count as one vector.
        reference: of the same shapes.

    Raises:
        ValueError: if the shapes differ.
    """
    results = [result] if isinstance(result, Tensor) else list(result)
    references = [reference] if isinstance(reference, Tensor) else list(reference)
    shapes = [tuple(t.shape) for t in results], [tuple(t.shape) for t in references]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the result has shapes {shapes[0]}, the reference {shapes[1]}")
    difference = total = 0.0
    for ours, right in zip(results, references, strict=True):
        right = right.detach().double()
        difference += float((ours.detach().to(right.device).double() - right).square().sum())
        total += float(right.square().sum())
    if total == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float((difference / total) ** 0.5)
