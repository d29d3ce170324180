"""Choosing the engine that is fastest for given inputs, by measuring all that fit in a time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blnet.comparing import finite_parts
from blnet.limits import OutOfTime, UnavailableError, one_line, time_limit
from blnet.optimizing.engines import ENGINES, Engine, Inputs, Run, copies, engine
from blnet.optimizing.graphs import Captured, side_by_side
from blnet.optimizing.report import Trial

BASELINE = "pytorch"
LEASH = 3.0  # times the fastest: what is further behind after two calls is not timed any more
ROUNDS = 15
ROUNDS_SECONDS = 6.0  # for all rounds together, so that slow networks do not take the whole time
# Hooks from there compute a weight (weight_norm, prune) or hide padding, which a graph keeps.
_COMPUTING = ("torch.nn.utils.", "blnet.speech.")
# Largest norm of the difference to the original network's result over that result's norm. An engine
# beyond it computes something else; how exact the engines are is measured in the tests. With 16
# bits rounding is as large as small mistakes; a lost activation is far larger.
TOLERANCES = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
NARROW = (torch.float16, torch.bfloat16)
# Rounding to 16 bits, or to TF32, adds up over layers, the more the less a network was trained:
# PyTorch's own result for bL-ResNet-50 with random weights is 9 % off in bfloat16, torch.compile's
# 12 %.
ROUNDING = 2.0  # times PyTorch's own error that a rounded result may have
MOST = 0.5  # what no rounding excuses: a result that has lost a part is as far off

Say = Callable[[str], None]
Built = dict[tuple[str, bool], Run]  # engine's name, whether on two streams -> its run


@dataclass(frozen=True)
class Candidate:
    """An engine with what is done around it.

    Attributes:
        engine: the engine.
        streams: whether the branches run on streams of their own.
        graph: whether it is captured as a CUDA graph.
    """

    engine: Engine
    streams: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        """What reports call it."""
        extras = [", two streams"] * self.streams + [", CUDA graph"] * self.graph
        return self.engine.name + "".join(extras)

    def why_not_hooked(self, layer: str | None) -> str:
        """Say why it cannot run a network of which somebody watches a layer; else an empty text."""
        if layer is None or not (self.engine.exports or self.graph):
            return ""
        return f"the hooks of {layer or 'the network'} would not be called"

    def build(self, network: nn.Module, inputs: Inputs, built: Built | None = None) -> Run:
        """Build it for inputs like these.

        Args:
            network: a prepared one.
            inputs: examples.
            built: what others ran for the same network and inputs: what differs in the graph only
                is not built, that is compiled, once more. What is built is added.

        Raises:
            UnavailableError: if it cannot run here.
        """
        built = {} if built is None else built
        if self.key not in built:
            built[self.key] = self._uncaptured(network, inputs)
        run = built[self.key]
        return Captured(run, inputs) if self.graph else run

    @property
    def key(self) -> tuple[str, bool]:
        """What it has in common with the one that differs in the graph only."""
        return self.engine.name, self.streams

    def _uncaptured(self, network: nn.Module, inputs: Inputs) -> Run:
        if self.engine.rewrite is not None:
            network = self.engine.rewrite(network, inputs)
        if self.streams:
            split = side_by_side(network)
            if split is None:
                raise UnavailableError("no module of the network has two branches")
            network = split
        return self.engine.build(network, inputs)


def candidates(device: str, name: str, graph: object) -> list[Candidate]:
    """Return what to try on a device.

    Args:
        device: its type, "cpu" or "cuda".
        name: an engine's name, or "auto" for all of the device.
        graph: True for captured engines only, False for none, "auto" for both.
    """
    engines = [e for e in ENGINES if device in e.devices] if name == "auto" else [engine(name)]
    if device != "cuda":
        return [Candidate(e) for e in engines]
    graphs = {True: (True,), False: (False,)}.get(graph, (False, True))  # type: ignore[call-overload]
    return [
        Candidate(e, streams, captured)
        for e in engines
        for streams in ((False, True) if e.streams else (False,))
        for captured in graphs
        # Without a graph two streams cost more launches than they hide.
        if captured or not streams
    ]


@dataclass
class Choice:
    """What was chosen.

    Attributes:
        name: of the engine; empty if none runs.
        run: what runs it; None if none runs.
        trials: all that was tried.
    """

    name: str = ""
    run: Run | None = None
    trials: list[Trial] = field(default_factory=list)


@dataclass
class _Running:
    """A candidate that was built and gave the right result."""

    trial: Trial
    run: Run
    times: list[float]


@torch.no_grad()
def choose(
    tried: Sequence[Candidate],
    network: nn.Module,
    inputs: Inputs,
    reference: Tensor,
    dtype: torch.dtype,
    seconds: float,
    say: Say | None = None,
) -> Choice:
    """Build the candidates, check them, time them in turns, and return the fastest.

    Args:
        tried: in the order of building; what comes when the time is up is not built.
        network: a prepared network (see `engines`).
        inputs: examples in the network's precision, on its device.
        reference: what the original network gives for them.
        dtype: the network's precision.
        seconds: for everything.
        say: is told in a line what begins; None for nobody.
    """
    say = say or (lambda line: None)
    end = time.monotonic() + seconds
    clock = _clock(inputs[0].device.type)
    allowed = _allowed(network, inputs, reference, dtype)
    trials, running = [], []
    hooked = _hooked_layer(network)
    built: Built = {}
    first: dict[tuple[str, bool], Trial] = {}
    for candidate in tried:
        reason = candidate.engine.why_not(inputs, dtype) or candidate.why_not_hooked(hooked)
        left = end - time.monotonic() - min(ROUNDS_SECONDS, seconds / 4)
        late = not reason and left <= 0
        if late:
            reason = f"not tried, the {seconds:.3g} s to measure in were over"
        if reason:
            trials.append(Trial(candidate.name, note=reason, late=late))
            continue
        say(f"building {candidate.name}")
        build = partial(candidate.build, network, copies(inputs), built)
        found = _try(candidate.name, build, copies(inputs), reference, allowed, left, clock)
        if isinstance(found, Trial):
            trials.append(found)
            built.pop(candidate.key, None)  # nor does its graph run then, or it fits no memory
        else:
            trial = found.trial
            found.trial = _captured_apart(trial, first.setdefault(candidate.key, trial))
            running.append(found)
    _time_in_turns(running, copies(inputs), clock, end, say)
    trials += [_settled(one) for one in running]
    best = min(running, key=lambda one: statistics.median(one.times), default=None)
    order = {candidate.name: place for place, candidate in enumerate(tried)}
    trials.sort(key=lambda trial: order[trial.engine])
    baseline = next((t.seconds for t in trials if t.engine == BASELINE), None)
    trials = [_against(trial, baseline) for trial in trials]
    return Choice(best.trial.engine, best.run, trials) if best else Choice(trials=trials)


def _try(
    name: str,
    build: Callable[[], Run],
    inputs: Inputs,
    reference: Tensor,
    allowed: float,
    seconds: float,
    clock: Callable[[Callable[[], Any]], float],
) -> _Running | Trial:
    """Build a candidate and check its result; return the trial of one that failed."""
    start = time.monotonic()
    failed = partial(Trial, name)
    try:
        with time_limit(seconds):
            run = build()
            result = run(*inputs)
            built = time.monotonic() - start
            error = difference(result, reference)  # the next calls may change the result's memory
            first = min(clock(lambda: run(*inputs)) for _ in range(2))
    except OutOfTime:
        note = f"dropped, building it took more than the {seconds:.3g} s left"
        return failed(note=note, late=True)
    except UnavailableError as reason:
        return failed(note=str(reason))
    except Exception as failure:  # an engine may fail in any way; another one runs
        return failed(note=f"dropped, it failed: {one_line(failure)}")
    if not error <= allowed:
        return failed(note=f"dropped, its result is wrong (error {error:.1e})")
    return _Running(Trial(name, error=error, build_seconds=built), run, [first])


def _captured_apart(trial: Trial, first: Trial) -> Trial:
    """Say of a CUDA graph whose engine was ready what that took, beside what the capture took."""
    if trial is first:
        return trial
    built, captured = first.build_seconds, trial.build_seconds
    return replace(trial, build_seconds=built, capture_seconds=captured)


def _allowed(network: nn.Module, inputs: Inputs, reference: Tensor, dtype: torch.dtype) -> float:
    """Return how far an engine's result may be from the original network's."""
    allowed = tolerance(dtype, inputs[0].device)
    if not is_rounded(dtype, inputs[0].device):
        return allowed
    try:
        own = difference(network(*copies(inputs)), reference)
    except Exception:  # PyTorch itself cannot run it here, as its engine's trial will tell
        return allowed
    return with_rounding(allowed, own)


def is_rounded(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether products keep fewer bits than float32 has, as PyTorch is set."""
    return dtype in NARROW or tolerance(dtype, device) > TOLERANCES[torch.float32]


def with_rounding(allowed: float, own: float) -> float:
    """Return how far a rounded result may be off where PyTorch's own is `own` off."""
    return max(allowed, min(ROUNDING * own, MOST)) if math.isfinite(own) else allowed


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return how far a result may be from another way's, as PyTorch is set.

    By default convolutions of float32 run in TF32 on an NVIDIA GPU, which keeps as many bits of a
    factor as float16 does; `torch.set_float32_matmul_precision` allows TF32 and bfloat16 elsewhere.

    Args:
        dtype: of the network.
        device: where it runs.
    """
    if dtype is torch.float32:
        backends: Any = torch.backends  # PyTorch's annotations lack what it makes at run time
        units = (
            (backends.cudnn.conv, backends.cuda.matmul)
            if device.type == "cuda"
            else (backends.mkldnn.conv, backends.mkldnn.matmul)
        )
        factors = {"tf32": torch.float16, "bf16": torch.bfloat16}
        rounded = [factors.get(unit.fp32_precision, dtype) for unit in units]
        return max(TOLERANCES[each] for each in rounded)
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32])


def difference(result: Any, reference: Tensor) -> float:
    """Return norm(result - reference) / norm(reference), in float64; infinite for other shapes.

    Where the reference is infinite or NaN the result must be the same, and counts no further.
    """
    if not isinstance(result, Tensor) or result.shape != reference.shape:
        return float("inf")
    ours, right = finite_parts(result.to(reference.device), reference)
    distance, norm = float((ours - right).norm()), float(right.norm())
    return distance / norm if norm else (0.0 if distance == 0 else float("inf"))


def _hooked_layer(network: nn.Module) -> str | None:
    """Return the name of a layer whose calls somebody watches; None if there is none."""
    for name, module in network.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(not str(getattr(hook, "__module__", "")).startswith(_COMPUTING) for hook in hooks):
            return str(name)
    return None


def _time_in_turns(
    running: list[_Running],
    inputs: Inputs,
    clock: Callable[[Callable[[], Any]], float],
    end: float,
    say: Say,
) -> None:
    """Time all that are within reach of the fastest, in turns, so that noise hits all alike."""
    fastest = min((one.times[0] for one in running), default=0.0)
    near = [one for one in running if one.times[0] <= LEASH * fastest]
    if near:
        say(f"timing {'; '.join(one.trial.engine for one in near)}")
    end = min(end, time.monotonic() + ROUNDS_SECONDS)
    for _ in range(ROUNDS):
        for one in near:
            call = partial(one.run, *inputs)
            call()  # wakes its threads; another engine's may still be spinning
            one.times.append(clock(call))
        if time.monotonic() > end:
            break
    for one in near:
        del one.times[0]  # the first call may still have tuned or allocated


def _settled(one: _Running) -> Trial:
    return replace(one.trial, seconds=statistics.median(one.times))


def _against(trial: Trial, baseline: float | None) -> Trial:
    """Note of a trial that it is slower than eager PyTorch."""
    if trial.seconds is None or baseline is None or trial.seconds <= baseline:
        return trial
    return replace(trial, note=f"dropped, slower than {BASELINE}")


def _clock(device: str) -> Callable[[Callable[[], Any]], float]:
    def clock(call: Callable[[], Any]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return clock


__all__ = [
    "BASELINE",
    "NARROW",
    "TOLERANCES",
    "Candidate",
    "Choice",
    "candidates",
    "choose",
    "difference",
    "is_rounded",
    "tolerance",
    "with_rounding",
]
