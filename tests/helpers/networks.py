"""A small network to save, networks without weights, and what tests compare of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from blnet import registry
from blnet.network import BigLittleConfig, BigLittleNet

SMALL: dict[str, Any] = {
    "depths": (2, 3, 2), "widths": (32, 64, 64), "stem_width": 16, "num_classes": 10,
}  # fmt: skip


def small(seed: int = 0, **options: Any) -> BigLittleNet:
    """Return a small network whose running statistics have moved.

    Args:
        seed: of its weights.
        options: fields of :class:`BigLittleConfig` that are to be otherwise than in `SMALL`.
    """
    torch.manual_seed(seed)
    model = BigLittleNet(BigLittleConfig(**{**SMALL, **options}))
    model(torch.randn(2, model.config.in_channels, 16, 16))  # moves the running statistics
    return model.eval()


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """Assert that two networks have the same keys, in order, with the same bits."""
    found, wanted = actual.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def on_meta(name: str, **options: Any) -> nn.Module:
    """Return a registered network on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return registry.build(name, **options)
