"""`blnet.optimize`: one call, and the saved arithmetic becomes saved time.

Example::

    fast = blnet.optimize(model, example_input=torch.randn(8, 3, 224, 224))
    fast(images)  # the same call, the same logits
    fast.explain()  # what was replaced by what, which engine runs, what was tried

    student = blnet.optimize(model, mode="train")  # fused training ops, the same parameters
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blnet.checks import check_choice
from blnet.fusing import unfuse
from blnet.kernels.launch import device_guard
from blnet.modes import autocast_switched, evaluating, exact_products
from blnet.optimizing.choosing import (
    BASELINE,
    NARROW,
    TOLERANCES,
    Choice,
    Say,
    candidates,
    choose,
    difference,
    tolerance,
)
from blnet.optimizing.engines import Inputs, copies, engine_names, name_of
from blnet.optimizing.engines import engine as engine_named
from blnet.optimizing.folding import fold_batch_norms
from blnet.optimizing.fused_ops import with_fused_ops
from blnet.optimizing.layout import lay_out, takes_channels_last
from blnet.optimizing.network import OptimizedNetwork, OtherInputs, describe, kind_of
from blnet.optimizing.report import Change, Report
from blnet.tracing import copied

SECONDS = 60.0
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


def optimize(
    model: nn.Module,
    mode: Literal["inference", "train"] = "inference",
    example_input: Tensor | Sequence[Tensor] | None = None,
    precision: str | torch.dtype | None = None,
    graph: bool | Literal["auto"] = "auto",
    *,
    engine: str = "auto",
    other_inputs: OtherInputs = "eager",
    seconds: float = SECONDS,
    recompute: bool = False,
    without: Collection[str] = (),
    say: Say | None = None,
) -> nn.Module:
    """Return a network that computes what this one computes, faster.

    For inference: batch norms are folded, the layout becomes channels-last, and with an example
    input every engine that runs on its device is built, checked against the original and timed
    for inputs of that shape; the fastest one runs from then on. Without an example the prepared
    network runs in PyTorch, on a GPU with the fused ops.

    For training: the ends of bottlenecks and branches run as fused ops; the copy keeps parameters
    and keys of state_dict.

    Args:
        model: any network: ours, converted, torchvision's, timm's or your own. It is left as it
            is.
        mode: "inference" or "train".
        example_input: a tensor, or several for a network that takes several, of the shape and on
            the device that will be used. Inference only, as are the next five.
        precision: "float32", "float16" or "bfloat16"; None keeps the model's. Inputs are cast to
            it and outputs back.
        graph: whether to run as a CUDA graph: True, False, or "auto" where that is faster.
        engine: the name of the only engine to build, or "auto"; see `blnet.optimizing.engines`.
        other_inputs: what happens to inputs unlike the example: "eager" runs them layer by layer,
            "error" refuses them.
        seconds: how long measuring may take.
        recompute: training only: compute normalised maps again in the backward pass rather than
            keep them.
        without: training only: names of ops to leave out, for debugging.
        say: inference only: is told in a line, as work begins, which engines are built and timed,
            `print` say; None for silence.

    Returns:
        For inference an :class:`~blnet.optimizing.network.OptimizedNetwork`, for training a copy
        of the model. Both have `explain()`, which prints what was done.

    Raises:
        ValueError: if an argument is not one of those, if the example does not fit the model, or
            if the engine or the graph that was asked for cannot run it.
    """
    check_choice("mode", mode, ("inference", "train"))
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model is of TorchScript, whose layers cannot be exchanged; give the network that it "
            "was made of"
        )
    if mode == "train":
        kept = example_input is None and precision is None and seconds == SECONDS and say is None
        if not kept or (graph, engine, other_inputs) != ("auto", "auto", "eager"):
            raise ValueError(
                "example_input, precision, graph, engine, other_inputs, seconds and say are for "
                "mode='inference'; leave them out, and use torch.autocast to train in another "
                "precision"
            )
        from blnet.optimizing.training import optimize_training

        return optimize_training(model, recompute=recompute, without=without)
    if recompute or without:
        raise ValueError("recompute and without are for mode='train'; leave them out")
    check_choice("graph", graph, (True, False, "auto"))
    check_choice("engine", engine, ("auto", *engine_names()))
    check_choice("other_inputs", other_inputs, ("eager", "error"))
    if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a number above 0, got {seconds!r}")
    with autocast_switched(False):  # engines are built for one precision, and checked in it
        return _for_inference(
            model,
            _tensors(example_input),
            _dtype(precision),
            graph,
            engine,
            other_inputs,
            seconds,
            say,
        )


def _for_inference(
    model: nn.Module,
    example: Inputs,
    precision: torch.dtype | None,
    graph: bool | Literal["auto"],
    engine: str,
    other_inputs: OtherInputs,
    seconds: float,
    say: Say | None,
) -> OptimizedNetwork:
    device, own = _home(model)
    dtype = precision or own
    _check_devices(example, device, graph, engine)
    reference = _reference(model, example)
    network, changes = prepared(model, precision, example, reference)
    report = Report(type(model).__name__, "inference", str(device), name_of(dtype), "pytorch")
    if reference is None:
        if device.type == "cuda":
            network, more = with_fused_ops(network)
            changes += more
            report.engine = "kernels"
        report.changes = changes
        report.otherwise = "no example_input was given, so no engine was measured"
        return OptimizedNetwork(network, report, dtype=precision)
    inputs = _cast(example, precision)
    tried = candidates(device.type, engine, graph)
    with device_guard(inputs[0]):  # engines are built and timed on the current device
        choice = choose(tried, network, inputs, reference, dtype, seconds, say)
    if choice.run is None:
        _fall_back(choice, network, inputs, engine, graph)
    report.engine, report.trials = choice.name, choice.trials
    report.inputs = describe(kind_of(inputs))
    report.otherwise = {"eager": "layer by layer in PyTorch", "error": "refused"}[other_inputs]
    report.steps = [str(step) for step in getattr(choice.run, "steps", ())]
    if choice.name.startswith("kernels"):
        changes += with_fused_ops(network)[1]
    report.changes = changes
    return OptimizedNetwork(
        network, report, choice.run, inputs, precision, other_inputs, reference.dtype
    )


def _tensors(example: Tensor | Sequence[Tensor] | None) -> Inputs:
    if example is None:
        return ()
    several = example if isinstance(example, Iterable) else ()
    tensors = (example,) if isinstance(example, Tensor) else tuple(several)
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        got = " ".join(repr(example).split())
        raise ValueError(
            f"example_input must be a tensor or several, got {got:.60}; give what the model "
            "is called with, such as torch.randn(8, 3, 224, 224)"
        )
    return tensors


def _cast(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    return tuple(x.to(dtype or x.dtype) if x.is_floating_point() else x for x in inputs)


def _dtype(precision: str | torch.dtype | None) -> torch.dtype | None:
    if precision is None:
        return None
    named = {name_of(dtype): dtype for dtype in PRECISIONS}
    dtype = named.get(precision) if isinstance(precision, str) else precision
    if dtype not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(named)}, got {precision!r}")
    return dtype


def _home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return where a network is and what it computes in."""
    tensors = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    first = next(tensors, None)
    if first is None:
        return torch.device("cpu"), torch.float32
    return first.device, first.dtype


def _check_devices(example: Inputs, device: torch.device, graph: object, engine: str) -> None:
    for x in example:
        if x.device != device:
            raise ValueError(
                f"example_input is on {x.device} and the model on {device}; put both on the device "
                "that will be used"
            )
    if device.type == "meta":
        raise ValueError("the model is on the meta device and has no weights; load them first")
    if not example and (graph is True or engine != "auto"):
        raise ValueError(
            "an engine or a graph is built for one shape of inputs; give example_input"
        )
    if graph is True and device.type != "cuda":
        raise ValueError(f"graph=True needs a CUDA device, and the model is on {device}")


@torch.no_grad()
def _reference(model: nn.Module, example: Inputs) -> Tensor | None:
    """Return what the model gives for the example, None without one."""
    if not example:
        return None
    own = copied(model)  # its code may change what it holds
    with evaluating(own):
        try:
            result: Any = own(*copies(example))
        except Exception as error:  # whatever a network raises for inputs that do not fit it
            raise ValueError(
                f"{type(model).__name__} does not take the example_input of shape "
                f"{', '.join(str(tuple(x.shape)) for x in example)}: "
                f"{' '.join(str(error).split())[:200]}; give what the model is called with"
            ) from error
    if not isinstance(result, Tensor):
        raise ValueError(
            f"{type(model).__name__} returns a {type(result).__name__} and not a tensor; optimise "
            "the part of it that returns one"
        )
    return result


@torch.no_grad()
def prepared(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    example: Inputs = (),
    reference: Tensor | None = None,
) -> tuple[nn.Module, list[Change]]:
    """Return a copy with BN folded, in another precision and channels-last layout if it takes that.

    Args:
        model: any network.
        dtype: the precision; None keeps the model's.
        example: inputs on which the folded network and its layout are checked.
        reference: what the model gives for them; None leaves the check out.
    """
    plain = unfuse(model).eval()
    network, changes = _folded(plain, example, reference)
    network.to(dtype=dtype).requires_grad_(False)
    lay_out(network, last=True)
    if example and not takes_channels_last(network, copies(_cast(example, dtype))):
        lay_out(network, last=False)
    return network, changes


def _folded(
    model: nn.Module, example: Inputs, reference: Tensor | None
) -> tuple[nn.Module, list[Change]]:
    """Return a copy with BN folded: all if the example bears it out, else what is sure.

    Folding changes nothing but rounding, so that it is held to what float32 keeps, wherever PyTorch
    may round further. Where it does, the reference is computed once more. A network in 16 bits is
    folded in float32 and rounded once, where its code runs in that.
    """
    if reference is not None and reference.dtype in NARROW and _is_all(model, reference.dtype):
        with contextlib.suppress(Exception):  # code that names a precision itself
            wide, widened = copy.deepcopy(model).float(), _cast(example, torch.float32)
            found, changes = _folded(wide, widened, wide(*copies(widened)))
            # What float32 takes back stays so: 16 bits would let it pass for rounding.
            return model if found is wide else found.to(reference.dtype), changes
    if reference is None or reference.dtype not in TOLERANCES:
        network = copy.deepcopy(model)
        return network, fold_batch_norms(network)
    allowed = TOLERANCES[reference.dtype]
    with exact_products():
        if tolerance(reference.dtype, reference.device) > allowed:
            reference = model(*copies(example))
        for checked in (True, False):
            network = copy.deepcopy(model)
            changes = fold_batch_norms(network, checked)
            error = difference(network(*copies(example)), reference)
            if error <= allowed:
                return network, changes
    reason = f"folding changed the result (error {error:.1e})"
    return model, [Change(c.layer, c.was, reason=c.reason or reason) for c in changes]


def _is_all(model: nn.Module, dtype: torch.dtype) -> bool:
    tensors = (*model.parameters(), *model.buffers())
    return all(t.dtype is dtype for t in tensors if t.is_floating_point())


def _fall_back(
    choice: Choice, network: nn.Module, inputs: Inputs, engine: str, graph: object
) -> None:
    """Run a network layer by layer where time alone kept engines from running it.

    Raises:
        ValueError: if something else did, or one engine or a graph was asked for.
    """
    late = [trial for trial in choice.trials if trial.engine == BASELINE and trial.late]
    if engine != "auto" or graph is True or not late:
        _refuse(choice, engine, graph)
    told = replace(late[0], note=f"{late[0].note}; it runs all the same, as nothing else was ready")
    choice.trials[choice.trials.index(late[0])] = told
    choice.name, choice.run = BASELINE, engine_named(BASELINE).build(network, inputs)


def _refuse(choice: Choice, engine: str, graph: object) -> None:
    wanted = f"engine {engine!r}" if engine != "auto" else "engine"
    told = "; ".join(map(str, choice.trials))
    captured = " as a CUDA graph" if graph is True else ""
    raise ValueError(f"no {wanted} can run the network{captured} ({told}); choose another")


__all__ = ["optimize", "prepared"]
