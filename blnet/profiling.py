"""Parameters, MACs and activations of a network, by layer and in all, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from blnet.meta import check_size, meta_twin, run_on_meta


@dataclass(frozen=True)
class LayerProfile:
    """One layer's share.

    Attributes:
        name: its path in the network; "" for the network itself.
        kind: its class.
        parameters: elements of its own parameters.
        macs: multiply-adds of its matrix products and convolutions.
        activations: elements that those write.
        output_shape: shape of its output; empty if that is not one tensor.
    """

    name: str
    kind: str
    parameters: int
    macs: int
    activations: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """What a network costs.

    Attributes:
        input_size: shape of the input.
        layers: the layers that have parameters or do matrix products, in order of their first run.
    """

    input_size: tuple[int, ...]
    layers: tuple[LayerProfile, ...]

    @property
    def parameters(self) -> int:
        """Elements of all parameters; a parameter that layers share counts once."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds of all matrix products and convolutions, for the whole input."""
        return sum(layer.macs for layer in self.layers)

    @property
    def activations(self) -> int:
        """Elements that all matrix products and convolutions write, for the whole input."""
        return sum(layer.activations for layer in self.layers)

    def __str__(self) -> str:
        """Return a table of the layers with the totals last."""
        total = ("total", "", self.parameters, self.macs, self.activations, ())
        rows = [
            (r.name or "(network)", r.kind, r.parameters, r.macs, r.activations, r.output_shape)
            for r in self.layers
        ]
        width = max(len(row[0]) for row in [*rows, total])
        lines = [
            f"{'layer':<{width}}  {'kind':<16}{'parameters':>12}{'MACs':>16}{'activations':>13}"
            "  output"
        ]
        for name, kind, parameters, macs, activations, shape in [*rows, total]:
            size = "x".join(map(str, shape))
            numbers = f"{parameters:>12,}{macs:>16,}{activations:>13,}"
            lines.append(f"{name:<{width}}  {kind:<16}{numbers}  {size}".rstrip())
        return "\n".join(lines)


def profile(model: nn.Module, input_size: Sequence[int] = (1, 3, 224, 224)) -> Profile:
    """Count a network's parameters, MACs and activations on the meta device.

    MACs and activations are those of convolutions and matrix products, as in the paper and in
    torch's FLOP counter (2 FLOPs a MAC). No arithmetic is done and the network is not changed.
    Hooks that were registered on it run as they always do, on tensors without values: what they do
    may be part of what it computes.

    Args:
        model: any network that takes one tensor.
        input_size: the input's shape, batch included.

    Raises:
        ValueError: if the network cannot be run on an input of that shape.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    size = check_size(input_size)
    twin = meta_twin(model)
    counter = _Counter(twin)
    try:
        with counter:
            run_on_meta(twin, size)
    except Exception as error:  # whatever a network raises
        reason = str(error).split("\n")[0]
        raise ValueError(f"the network does not take an input of size {size}: {reason}") from error
    return Profile(size, counter.layers())


class _Counter(TorchDispatchMode):
    """Adds every matrix product to the layer it runs in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []
        self._order: dict[nn.Module, None] = {}
        self._macs: dict[nn.Module, int] = {}
        self._activations: dict[nn.Module, int] = {}
        self._shapes: dict[nn.Module, tuple[int, ...]] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> _Counter:
        for module in self._names:
            for handle in (
                module.register_forward_pre_hook(self._enter_layer),
                module.register_forward_hook(self._leave_layer, always_call=True),
            ):
                self._hooks.callback(handle.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def _enter_layer(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)
        self._order.setdefault(module)

    def _leave_layer(self, module: nn.Module, _: Any, output: Any) -> None:
        self._running.pop()
        if isinstance(output, Tensor):
            self._shapes[module] = tuple(output.shape)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry and self._running:
            layer = self._running[-1]
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=output)
            self._macs[layer] = self._macs.get(layer, 0) + flops // 2
            if flops:
                written = output.numel()
                self._activations[layer] = self._activations.get(layer, 0) + written
        return output

    def layers(self) -> tuple[LayerProfile, ...]:
        """Return what was counted; layers that were not run but hold parameters come last."""
        seen: set[nn.Parameter] = set()
        rows = []
        for module in [*self._order, *(m for m in self._names if m not in self._order)]:
            own = [p for p in module.parameters(recurse=False) if p not in seen]
            seen.update(own)
            row = LayerProfile(
                self._names[module],
                type(module).__name__,
                sum(p.numel() for p in own),
                self._macs.get(module, 0),
                self._activations.get(module, 0),
                self._shapes.get(module, ()),
            )
            if row.parameters or row.macs:
                rows.append(row)
        return tuple(rows)
