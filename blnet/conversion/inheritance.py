"""Moving trained weights from a network's blocks into their places in the Big-Little variant."""

from __future__ import annotations

from torch import nn

from blnet.conversion.discovery import trace_block
from blnet.conversion.surgery import NORMS, layers

_KINDS = (nn.Conv2d, nn.Linear, *NORMS)


def copy_block(source: nn.Module, target: nn.Module) -> list[str]:
    """Copy a block's weights and statistics, layer by layer in order.

    The chain of convolutions, the shortcut and the gate are matched each by itself, since a
    shortcut may gain a pool or lose its convolution on the way.

    Returns:
        What could not be moved, in words; empty where everything was.
    """
    if source.state_dict().keys() == target.state_dict().keys():
        same = {k: v.shape for k, v in source.state_dict().items()}
        if same == {k: v.shape for k, v in target.state_dict().items()}:
            target.load_state_dict(source.state_dict())
            return []
    missed = []
    for part in ("main", "shortcut", "gate"):
        given, taken = layers(source, _KINDS, part), layers(target, _KINDS, part)
        if part == "shortcut" and not taken:
            continue  # a block that keeps its width needs no shortcut weights
        if not _copy_layers(given, taken):
            missed.append(part)
    return missed


def _copy_layers(given: list[nn.Module], taken: list[nn.Module]) -> bool:
    # Convolutions and normalisations may be registered in another order, so each kind by itself.
    for kinds in ((nn.Conv2d, nn.Linear), NORMS):
        pairs_from = [m for m in given if isinstance(m, kinds)]
        pairs_to = [m for m in taken if isinstance(m, kinds)]
        if len(pairs_from) != len(pairs_to):
            return False
        for old, new in zip(pairs_from, pairs_to, strict=True):
            if not _copy_layer(old, new):
                return False
    return True


def _copy_layer(old: nn.Module, new: nn.Module) -> bool:
    values = old.state_dict()
    for name, own in new.state_dict().items():
        value = values.get(name)
        if value is None:
            return False
        if value.shape != own.shape:
            if value.numel() != own.numel():
                return False
            value = value.reshape(own.shape)  # a gate's linear layer and 1x1 convolution
        own.copy_(value)
    return True


def reset(module: nn.Module) -> None:
    """Give a network fresh weights: Kaiming normal convolutions, all else as torch does."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        else:
            getattr(part, "reset_parameters", _nothing)()


def _nothing() -> None:
    """What a module without parameters of its own resets."""


def silence(block: nn.Module) -> None:
    """Zero the normalisation that closes a block's chain, so that it starts as its shortcut.

    A block whose chain ends with a convolution (pre-activation) is left alone: zeroing a
    normalisation in front of an activation would stop its gradients for good.
    """
    norm = _closing_norm(block)
    weight = getattr(norm, "weight", None)
    if weight is not None:
        nn.init.zeros_(weight)


def _closing_norm(block: nn.Module) -> nn.Module | None:
    graph = trace_block(block)
    if graph is None:
        return None
    chain = layers(block, (nn.Conv2d, *NORMS), "main")
    run = [
        part
        for node in graph.nodes
        if node.op == "call_module"
        for part in block.get_submodule(str(node.target)).modules()
        if part in chain
    ]
    return run[-1] if run and isinstance(run[-1], NORMS) else None
