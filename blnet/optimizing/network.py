"""The module that `blnet.optimize` returns for inference."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from blnet.optimizing.engines import Inputs, Run, channels_last, name_of
from blnet.optimizing.report import Report

OtherInputs = Literal["eager", "error"]
_Kind = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]


class OptimizedNetwork(nn.Module):
    """A network prepared for inference, with the call of the original.

    Inputs like the example run on the chosen engine; others run layer by layer through the prepared
    network, or are refused. The engine holds the weights as they were: to change, move or train
    anything, go back to the original and optimise that again.

    Args:
        network: prepared: BN folded, channels-last, in its precision.
        report: what was done to it.
        run: the engine; None for the prepared network itself.
        example: the inputs that `run` was built for.
        dtype: what floating-point inputs are cast to; None leaves them.
        other_inputs: "eager" or "error".
    """

    def __init__(
        self,
        network: nn.Module,
        report: Report,
        run: Run | None = None,
        example: Inputs = (),
        dtype: torch.dtype | None = None,
        other_inputs: OtherInputs = "eager",
    ) -> None:
        super().__init__()
        self.network = network
        self.report = report
        self.other_inputs = other_inputs
        self._run = run
        self._kind = kind_of(example)
        self._dtype = dtype
        self._threads = torch.get_num_threads()
        self._lock = threading.Lock()
        super().train(False)

    def forward(self, *inputs: Tensor, **named: Any) -> Any:
        """Return what the original returns for these inputs, in the inputs' precision.

        Raises:
            ValueError: if the inputs differ from the example and `other_inputs` is "error".
        """
        tensors = all(isinstance(x, Tensor) for x in inputs)
        given = tuple(map(self._cast, inputs)) if tensors else inputs
        wanted = inputs[0].dtype if inputs and tensors and inputs[0].is_floating_point() else None
        if self._run is not None and tensors and not named and self._fits(given):
            with torch.no_grad():
                return _as(self._run(*given), wanted)
        if self._run is not None and self.other_inputs == "error":
            raise ValueError(
                f"the optimised network takes {describe(self._kind)}, got "
                f"{describe(kind_of(given)) if tensors else 'something else'}; give inputs like "
                "the example, or optimise with other_inputs='eager'"
            )
        if tensors:
            given = tuple(map(channels_last, given))
        return _as(self.network(*given, **named), wanted)

    def _fits(self, inputs: Inputs) -> bool:
        """Return whether the engine was built for such inputs; it gives no gradients."""
        wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return kind_of(inputs) == self._kind and not wants_gradient

    def _cast(self, value: Tensor) -> Tensor:
        if self._dtype is None or not value.is_floating_point():
            return value
        return value.to(self._dtype)

    def explain(self) -> None:
        """Print what was replaced by what, which engine runs, and what was tried."""
        print(self.report)

    def train(self, mode: bool = True) -> OptimizedNetwork:
        """Stay in evaluation mode.

        Raises:
            ValueError: if mode is True.
        """
        if mode:
            _refuse("trained", "train the original, or blnet.optimize(model, mode='train')")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:
        _refuse("moved or cast", "move or cast the original and optimise that again")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: engines cannot be copied."""
        _refuse("copied", "optimise the original once more")

    def __reduce__(self) -> NoReturn:
        """Refuse: engines cannot be written."""
        _refuse("pickled", "save the original and optimise it where it is loaded")


def _refuse(what: str, advice: str) -> NoReturn:
    raise ValueError(f"an optimised network cannot be {what}; {advice}")


def _as(result: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(result, Tensor) and dtype is not None and result.is_floating_point():
        return result.to(dtype)
    return result


def kind_of(inputs: Inputs) -> _Kind:
    """Return what an engine is built for: shapes, dtypes and devices."""
    return tuple((tuple(x.shape), x.dtype, x.device) for x in inputs)


def describe(kind: _Kind) -> str:
    """Return "(8, 3, 224, 224) float32 on cpu"."""
    return ", ".join(f"{shape} {name_of(dtype)} on {device}" for shape, dtype, device in kind)
