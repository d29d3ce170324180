"""The layers of a network: what each must move and multiply, the least time, and what it takes.

The network is the ladder's "folded" rung: eager, channels-last, BN folded. Layers are modules that
multiply, hold weights, or change the size of a map (pools, upsampling). What runs between them
(adds, activations, merges, calling them from Python) is one more row, the whole pass less the
layers: no bytes are counted for it, since a layer can do such work on what it writes anyway.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from blnet.bench.ladder import fold_batch_norm
from blnet.bench.measure import Call
from blnet.bench.memory import tensor_bytes
from blnet.bench.networks import Built
from blnet.bench.results import Layer
from blnet.bench.roofline import least_seconds, measure_ceilings
from blnet.bench.session import Session
from blnet.limits import one_line

PASSES = 8
MIN_PASSES = 3
SECONDS = 2.0  # for the passes of a network
BETWEEN = Layer("between layers", "add, ReLU, upsampling", (), 0, 0, 0.0)
# Modules that read windows of a map, and may leave out what lies between them.
_WINDOWED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MaxPool2d, nn.AvgPool2d)
Around = Callable[[Call], Any]


def record(session: Session, key: str, networks: Built, inputs: Tensor) -> None:
    """Time the layers of networks and put them into a session's results.

    What cannot be timed becomes a note: the layers explain a run and shall not fail it.

    Args:
        session: of the run.
        key: suite and group, such as "models, batch 8".
        networks: on the device and in the precision of the run.
        inputs: the batch, float32.
    """
    settings, results = session.settings, session.results
    around: Around = session.clock if settings.on_gpu else lambda call: call()
    for spec, model in networks.models.items():
        label = spec.label
        session.watch(f"{key}: layers of {label}", 0.0)
        try:
            measure_ceilings(session)
            example = inputs.to(settings.device, settings.torch_dtype)
            found = layers_of(fold_batch_norm(model, example), example, results.ceilings, around)
        except Exception as failure:
            results.notes.append(f"the layers of {label} were not timed: {one_line(failure)}")
        else:
            results.layers.setdefault(key, {})[label] = found


def layers_of(
    model: nn.Module,
    example: Tensor,
    ceilings: Mapping[str, float],
    around: Around = lambda call: call(),
    seconds: float = SECONDS,
) -> list[Layer]:
    """Return the layers of a network in the order they run, and last what runs between them.

    A layer that runs twice is there twice.

    Args:
        model: any network in eval mode.
        example: its input.
        ceilings: rates of the device, see `blnet.bench.roofline`.
        around: makes a pass; on a GPU the session's clock, which empties its L2 cache before.
        seconds: how long passes may take. There are three at least.

    Raises:
        ValueError: if the network does not run the same layers every time.
    """
    if example.ndim == 4:
        example = example.contiguous(memory_format=torch.channels_last)
    costs = _costs(model, example, ceilings)
    modules = dict.fromkeys(module for module, _ in costs)
    passes = _times(model, modules, example, around, seconds)
    if any(len(times) != len(costs) + 1 for times in passes):
        raise ValueError("it does not run the same layers every time")
    found = [*(layer for _, layer in costs), BETWEEN]
    measured = map(statistics.median, zip(*passes, strict=True))
    return [
        Layer(**{**vars(layer), "seconds": taken})
        for layer, taken in zip(found, measured, strict=True)
    ]


@dataclass
class _Call:
    """One call of a module: a counter before and after it, and the calls inside it."""

    module: nn.Module
    before: Any = None
    after: Any = None
    inside: list[_Call] = field(default_factory=list)
    moved: int = 0
    shape: tuple[int, ...] = ()
    resized: bool = False


class _Meter:
    """Reads a counter before and after each call of some modules, while its `with` block lasts."""

    def __init__(self, modules: Iterable[nn.Module], read: Callable[[], Any]) -> None:
        self.calls: list[_Call] = []
        self._modules, self._read = list(modules), read
        self._running: list[_Call] = []
        self._hooks = ExitStack()

    def __enter__(self) -> _Meter:
        for module in self._modules:
            for handle in (
                module.register_forward_pre_hook(self.enter),
                module.register_forward_hook(self.leave, with_kwargs=True),
            ):
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def enter(self, module: nn.Module, args: Any) -> None:
        call = _Call(module)
        if self._running:
            self._running[-1].inside.append(call)
        self.calls.append(call)
        self._running.append(call)
        call.before = self._read()

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        after = self._read()
        self._running.pop().after = after


class _CostMeter(_Meter):
    """Notes what each call reads and writes as well."""

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._running[-1]
        super().leave(module, args, kwargs, output)
        read = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}.values()
        written = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        call.moved = _bytes_moved(call, read, written)
        call.shape = tuple(written[0].shape) if len(written) == 1 else ()
        call.resized = sum(x.numel() for x in read) != sum(x.numel() for x in written)


def _bytes_moved(call: _Call, read: Iterable[Tensor], written: Sequence[Tensor]) -> int:
    """Return the bytes of input, weights and output, each once."""
    # Weights of layers that it calls are theirs; of those that it only holds, its own.
    module, recurse = call.module, not call.inside
    own = [*module.parameters(recurse), *module.buffers(recurse)]
    given = tensor_bytes(*read)
    if isinstance(module, _WINDOWED):
        # A 1x1 window with a stride of 2 reads one position in four.
        steps = zip(_sides(module.kernel_size), _sides(module.stride), strict=True)
        given = round(given * math.prod(min(1.0, kernel / stride) for kernel, stride in steps))
    return given + tensor_bytes(*(x for x in own if x.is_floating_point()), *written)


def _sides(size: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return the sides of a window or stride: a pool may have one number for both of its own."""
    return size if isinstance(size, tuple) else (size, size)


def _own(call: _Call, span: Callable[[Any, Any], Any]) -> Any:
    """Return what a call counted itself, without the calls inside it."""
    return span(call.before, call.after) - sum(span(c.before, c.after) for c in call.inside)


def _difference(before: Any, after: Any) -> Any:
    return after - before


def _costs(
    model: nn.Module, example: Tensor, ceilings: Mapping[str, float]
) -> list[tuple[nn.Module, Layer]]:
    """Run a network once and return its layers, each with its module, not yet timed."""
    counter = FlopCounterMode(display=False)
    # Under inference_mode the counter does not see what a linear layer is made of.
    with torch.no_grad(), counter:
        meter = _CostMeter(model.modules(), counter.get_total_flops)
        with meter:
            model(example)
    flops = [_own(call, _difference) for call in meter.calls]
    layers = {c.module for c, n in zip(meter.calls, flops, strict=True) if n or _is_layer(c)}
    names = {module: name or "(network)" for name, module in model.named_modules()}
    ran: Counter[nn.Module] = Counter()
    found = []
    for call, count in zip(meter.calls, flops, strict=True):
        module = call.module
        if module not in layers:
            continue
        ran[module] += 1
        name = names[module] + (f", call {ran[module]}" if ran[module] > 1 else "")
        bound = least_seconds(call.moved, count, ceilings)
        kind = type(module).__name__
        found.append((module, Layer(name, kind, call.shape, count, call.moved, bound)))
    return found


def _is_layer(call: _Call) -> bool:
    """Return whether a module that multiplies nothing is a layer all the same."""
    weighted = next(call.module.parameters(), None) is not None
    return not call.inside and (weighted or call.resized)


def _times(
    model: nn.Module,
    modules: Iterable[nn.Module],
    example: Tensor,
    around: Around,
    seconds: float,
) -> list[list[float]]:
    """Return for each pass the seconds of each call of the modules, and what is between them."""
    wanted = set(modules)
    read, span = (_event, _elapsed) if example.is_cuda else (time.perf_counter, _difference)
    meter = _Meter(dict.fromkeys([model, *wanted]), read)
    passes: list[list[float]] = []
    end = time.perf_counter() + seconds
    with torch.inference_mode(), meter:
        while len(passes) < PASSES and (len(passes) < MIN_PASSES or time.perf_counter() < end):
            meter.calls.clear()
            around(partial(model, example))
            whole = span(meter.calls[0].before, meter.calls[0].after)
            times = [_own(call, span) for call in meter.calls if call.module in wanted]
            passes.append([*times, whole - sum(times)])
    return passes


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(before: torch.cuda.Event, after: torch.cuda.Event) -> float:
    return float(before.elapsed_time(after)) / 1e3
