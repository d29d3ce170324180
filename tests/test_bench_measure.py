"""The harness: order, checks before times, leash, errors, budgets."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from blnet.bench.measure import (
    COVERS,
    BuildBudget,
    CudaClock,
    Group,
    Implementation,
    _surely,
    covering,
    declare,
    measure,
    relative_error,
    wall_clock,
)
from blnet.bench.memory import peak_bytes, tensor_bytes
from blnet.bench.results import Measurement
from blnet.limits import UnavailableError, time_limit

RIGHT = torch.arange(1.0, 9.0)


def implementation(name: str, call: Callable[[], torch.Tensor], family: str = "f"):
    return Implementation(name, family, lambda: call)


def measured(*implementations: Implementation, **options) -> dict[str, Measurement]:
    settings = {"rounds": 4, "tolerance": 1e-6, "reference_text": "exact", "leash_seconds": 0.0}
    clock = options.pop("clock", wall_clock)
    group = Group(
        "suite",
        "group",
        list(implementations),
        {i.family: lambda: RIGHT.double() for i in implementations},
        **{**settings, **options},
    )
    found = declare(group)
    measure(group, found, clock)
    return {m.implementation: m for m in found}


def scripted_clock(seconds: dict[str, float], order: list[str]):
    """A clock that knows how long each call takes, and notes who ran."""

    def clock(call):
        call()
        order.append(call.who)
        return seconds[call.who]

    return clock


def named(who: str) -> Implementation:
    def call() -> torch.Tensor:
        return RIGHT

    call.who = who  # type: ignore[attr-defined]
    return implementation(who, call)


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    clock = scripted_clock({"a": 1.0, "b": 1.1, "c": 1.2}, order)
    found = measured(named("a"), named("b"), named("c"), clock=clock)
    assert order[-12:] == ["a", "b", "c"] * 4
    assert found["b"].samples == [1.1] * 4
    assert found["b"].median == 1.1


def test_a_wrong_result_gets_no_time() -> None:
    flipped = RIGHT.clone()
    flipped[3] *= -1
    found = measured(
        implementation("right", lambda: RIGHT), implementation("wrong", lambda: flipped)
    )
    wrong = found["wrong"]
    assert (wrong.status, wrong.samples, wrong.timed) == ("wrong", [], False)
    assert wrong.check is not None
    assert wrong.check.error > 0.1
    assert "no time" in wrong.note
    with pytest.raises(ValueError, match="no time"):
        _ = wrong.median
    assert len(found["right"].samples) == 4


@pytest.mark.parametrize(("own", "off", "status"), [(0.1, 0.15, "ok"), (0.1, 0.25, "wrong"),
                                                    (0.4, 0.45, "ok"), (0.4, 0.55, "wrong"),
                                                    (math.nan, 0.1, "wrong"),
                                                    (math.inf, 0.1, "wrong")])  # fmt: skip
def test_in_16_bits_pytorchs_own_error_counts(own: float, off: float, status: str) -> None:
    plain = {"f": lambda: RIGHT * (1 + own)}
    one = measured(implementation("one", lambda: RIGHT * (1 + off)), plain=plain)["one"]
    assert one.status == status
    assert one.check is not None
    assert one.check.tolerance == (pytest.approx(min(2 * own, 0.5)) if math.isfinite(own) else 1e-6)


def test_nan_is_wrong() -> None:
    broken = RIGHT.clone()
    broken[0] = math.nan
    assert measured(implementation("nan", lambda: broken))["nan"].status == "wrong"


def test_what_cannot_be_built_is_noted_and_the_rest_goes_on() -> None:
    def raising():
        raise RuntimeError("no such\nkernel")

    def lacking():
        raise UnavailableError("needs a compiler")

    found = measured(
        Implementation("raises", "f", raising),
        Implementation("lacks", "f", lacking),
        implementation("fine", lambda: RIGHT),
    )
    assert (found["raises"].status, found["raises"].note) == (
        "error",
        "RuntimeError: no such kernel",
    )
    assert (found["lacks"].status, found["lacks"].note) == ("skipped", "needs a compiler")
    assert not found["lacks"].failed
    assert found["fine"].timed


def test_what_raises_later_loses_its_time() -> None:
    count = itertools.count()

    def breaks() -> torch.Tensor:
        if next(count) > 8:
            raise RuntimeError("out of memory")
        return RIGHT

    found = measured(
        implementation("breaks", breaks), implementation("fine", lambda: RIGHT), rounds=20
    )
    assert found["breaks"].status == "error"
    assert not found["breaks"].timed
    assert len(found["fine"].samples) == 20


def test_the_leash_drops_what_is_far_slower() -> None:
    order: list[str] = []
    clock = scripted_clock({"fast": 1.0, "near": 3.9, "far": 4.1}, order)
    found = measured(named("fast"), named("near"), named("far"), clock=clock)
    assert found["near"].timed
    assert (found["far"].status, found["far"].samples) == ("dropped", [])
    assert "4.1 times slower" in found["far"].note


def test_the_leash_leaves_what_costs_little() -> None:
    clock = scripted_clock({"fast": 1e-4, "far": 1e-2}, [])
    found = measured(named("fast"), named("far"), clock=clock, leash_seconds=1.0)
    assert found["far"].timed


def test_the_leash_is_of_the_family() -> None:
    clock = scripted_clock({"small": 1.0, "large": 9.0}, [])
    small, large = named("small"), named("large")
    large.family = "g"
    assert measured(small, large, clock=clock)["large"].timed


def test_a_sleep_is_seen() -> None:
    def slowed() -> torch.Tensor:
        time.sleep(0.01)
        return RIGHT

    found = measured(
        implementation("plain", lambda: RIGHT),
        implementation("slowed", slowed),
        leash_seconds=60.0,
    )
    assert found["slowed"].median > found["plain"].median + 0.008


def test_a_build_that_takes_too_long_is_dropped() -> None:
    def forever():
        time.sleep(5)
        return lambda: RIGHT

    start = time.monotonic()
    budget = BuildBudget(each=0.2)
    found = measured(Implementation("slow", "f", forever), budget=budget)
    assert time.monotonic() - start < 3
    assert found["slow"].status == "dropped"
    assert found["slow"].note == "building took more than 0.2 s"


def test_builds_share_the_time_that_is_left() -> None:
    def half_a_second():
        time.sleep(0.5)
        return lambda: RIGHT

    budget = BuildBudget(each=9.0, left=0.7, least=0.1)
    compiled = [Implementation(name, "f", half_a_second, compiles=True) for name in ("one", "two")]
    found = measured(*compiled, Implementation("eager", "f", half_a_second), budget=budget)
    assert found["one"].timed
    assert found["two"].status == "dropped"
    assert "what was left of the run's time" in found["two"].note
    assert found["eager"].timed  # does not compile: the shared time is not its own


def test_time_limit_gives_back_the_alarm_of_others() -> None:
    import signal

    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    others = signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with time_limit(10):
            pass
        time.sleep(0.1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, before)
    assert rang == [1]


def test_an_interrupt_keeps_what_was_measured() -> None:
    count = itertools.count()

    def stopped() -> torch.Tensor:
        # One call for the check, three to warm up, then two rounds.
        if next(count) == 6:
            raise KeyboardInterrupt
        return RIGHT

    clock = lambda call: (call(), 1.0)[1]  # noqa: E731
    group = Group(
        "s",
        "g",
        [implementation("a", lambda: RIGHT), implementation("b", stopped)],
        {"f": lambda: RIGHT},
        1e-6,
        "exact",
        9,
    )
    found = declare(group)
    with pytest.raises(KeyboardInterrupt):
        measure(group, found, clock)
    assert [len(m.samples) for m in found] == [3, 2]
    assert all(m.timed for m in found)


def test_relative_error() -> None:
    assert relative_error(RIGHT, RIGHT.double()) == 0
    assert relative_error(RIGHT * 1.01, RIGHT) == pytest.approx(0.01, rel=1e-3)
    assert relative_error([RIGHT, RIGHT * 2], [RIGHT, RIGHT]) == pytest.approx(2**-0.5)
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    with pytest.raises(ValueError, match="shapes"):
        relative_error(torch.ones(2), torch.ones(1, 2))


def test_peak_memory_counts_what_lives_at_once() -> None:
    def call() -> torch.Tensor:
        one = torch.ones(250_000)  # 1 MB
        two = one + one  # 2 MB live
        del one
        return two * 2  # 2 MB live again

    assert peak_bytes(call, "cpu") == pytest.approx(2e6, rel=0.01)
    assert tensor_bytes(torch.nn.BatchNorm1d(10), torch.ones(3)) == 4 * 4 * 10 + 8 + 12


def test_one_slow_call_drops_nothing() -> None:
    times = iter([9.0, 1.0, 9.0])
    assert _surely([9.0], 4.0, lambda: RIGHT, lambda _: next(times)) == 1.0
    calls: list[int] = []
    assert _surely([9.0], 4.0, lambda: RIGHT, lambda _: float(calls.append(1) or 9)) == 9.0
    assert len(calls) == 2
    assert _surely([1.0], 4.0, lambda: RIGHT, lambda _: pytest.fail("fast enough")) == 1.0


def test_single_ops_are_timed_behind_more_work(monkeypatch) -> None:
    """On a GPU that is not there: what happens between two events, and what before."""
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            happened.append("event")

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Any) -> float:
            return 2.0

    class Buffer:
        def zero_(self) -> None:
            happened.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = CudaClock(buffer=Buffer())
    assert clock(lambda: happened.append("call")) == 0.002
    assert happened == ["flush", "event", "call", "event"]
    happened.clear()
    covering(clock)(lambda: happened.append("call"))
    assert happened == ["flush"] * COVERS + ["event", "call", "event"]
    assert covering(wall_clock) is wall_clock
