"""The module that `blnet.optimize` returns for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from blnet.modes import autocast_is_on, autocast_switched
from blnet.optimizing.engines import Inputs, Run, name_of
from blnet.optimizing.layout import channels_last, is_transformed, layout_of
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
        dtype: what floating-point inputs are cast to, and results back; None leaves both.
        other_inputs: "eager" or "error".
        returned: dtype of the original's result for the example; None without one.
    """

    def __init__(
        self,
        network: nn.Module,
        report: Report,
        run: Run | None = None,
        example: Inputs = (),
        dtype: torch.dtype | None = None,
        other_inputs: OtherInputs = "eager",
        returned: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.report = report
        self.other_inputs = other_inputs
        self._run = run
        self._lay = layout_of(network)
        self._kind = kind_of(example)
        self._dtype = dtype
        self._returned = returned
        super().train(False)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the original returns for these inputs.

        Raises:
            ValueError: if the inputs differ from the example and `other_inputs` is "error".
        """
        tensors = all(isinstance(x, Tensor) for x in inputs)
        if self._run is not None and tensors and not named:
            own = tuple(map(self._cast, inputs))
            if self._fits(own):
                return self._run_engine(self._run, own)
        given, known = tree_map(self._cast, (inputs, named))
        if self._run is not None and self.other_inputs == "error":
            raise ValueError(
                f"the optimised network takes {describe(self._kind)}, got "
                f"{_told(given, named)}; give inputs like the example, or optimise with "
                "other_inputs='eager'"
            )
        result = self._layer_by_layer(given, known)
        return result if self._dtype is None else self._cast_back(result, (inputs, named))

    def _layer_by_layer(self, given: tuple[Any, ...], known: dict[str, Any]) -> Any:
        laid = (self._lay(x) if isinstance(x, Tensor) else x for x in given)
        try:
            return self.network(*laid, **known)
        except RuntimeError as error:
            if self._lay is not channels_last or "view size" not in str(error):
                raise
            raise RuntimeError(
                f"{type(self.network).__name__} takes maps for rows by `view`, which channels-last "
                "layout does not allow; give blnet.optimize an example_input, on which it tries "
                "the layout, or call reshape there"
            ) from error

    def _run_engine(self, run: Run, inputs: Inputs) -> Any:
        """Return the engine's result in the dtype of the original's."""
        if torch.is_grad_enabled() or autocast_is_on():
            # An engine computes in the precision that it was built for.
            with torch.no_grad(), autocast_switched(False):
                result = run(*inputs)
        else:  # as inference mostly is: the two contexts would cost a native engine's call 1 %
            result = run(*inputs)
        # An engine may give another dtype for the same numbers, of indices say.
        other = self._returned is not None and result.dtype != self._returned
        return result.to(self._returned) if other else result

    def _cast_back(self, result: Any, given: Any) -> Any:
        """Cast a result to the dtype that the original gives, as far as that is known."""
        dtype = self._returned or next((x.dtype for x in tree_leaves(given) if _is_float(x)), None)
        return tree_map(lambda x: x.to(dtype) if _is_float(x) else x, result)

    def _fits(self, inputs: Inputs) -> bool:
        """Return whether the engine was built for such inputs; it gives no gradients."""
        if len(inputs) != len(self._kind):
            return False
        gradients = torch.is_grad_enabled()
        for x, (shape, dtype, device) in zip(inputs, self._kind, strict=True):
            same = x.shape == shape and x.dtype == dtype and x.device == device
            if not same or x.layout != torch.strided or (gradients and x.requires_grad):
                return False
            if is_transformed(x):
                return False
        return True

    def _cast(self, value: Any) -> Any:
        wanted = self._dtype
        if wanted is None or not _is_float(value) or value.dtype == wanted:
            return value
        return value.to(wanted)

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

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("given other weights", "load into the original and optimise that again")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: engines cannot be copied."""
        _refuse("copied", "optimise the original once more")

    def __reduce__(self) -> NoReturn:
        """Refuse: engines cannot be written."""
        _refuse("pickled", "save the original and optimise it where it is loaded")


def _refuse(what: str, advice: str) -> NoReturn:
    raise ValueError(f"an optimised network cannot be {what}; {advice}")


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _told(inputs: tuple[Any, ...], named: dict[str, Any]) -> str:
    """Say what was given: tensors by their kind, anything else by its type, the rest by name."""
    parts = [describe(kind_of((x,))) if isinstance(x, Tensor) else f"a {type(x).__name__}"
             for x in inputs]  # fmt: skip
    return ", ".join([*parts, *(f"{name} by name" for name in named)]) or "nothing"


def kind_of(inputs: Inputs) -> _Kind:
    """Return what an engine is built for: shapes, dtypes and devices."""
    return tuple((tuple(x.shape), x.dtype, x.device) for x in inputs)


def describe(kind: _Kind) -> str:
    """Return "(8, 3, 224, 224) float32 on cpu"."""
    return ", ".join(f"{shape} {name_of(dtype)} on {device}" for shape, dtype, device in kind)
