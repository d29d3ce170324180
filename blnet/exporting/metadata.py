"""What an exported file says of its network: texts, of which all but the plain ones are JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

import blnet

ENTRY = "blnet.json"  # the extra file of PyTorch's two formats
LEAST_SIZES = "least_sizes"  # of the free axes that are not free from 1 on


def describe(model: nn.Module, extra: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return what a file says of a network.

    Args:
        model: the network.
        extra: more to say, anything JSON can hold: preprocessing and classes, say.

    Returns:
        blnet_version; class; config if it is JSON, or plan of a converted network, as JSON; and
        `extra`, texts as they are and all else as JSON.

    Raises:
        ValueError: if `extra` is not JSON.
    """
    found: dict[str, Any] = {"blnet_version": blnet.__version__, "class": type(model).__name__}
    config, plan = getattr(model, "config", None), getattr(model, "plan", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        with contextlib.suppress(Exception):  # of one's own it may hold anything
            found["config"] = _text(dataclasses.asdict(config))
    elif plan is not None and hasattr(plan, "to_dict"):
        found["plan"] = plan.to_dict()
    found |= extra or {}
    try:
        return {key: _text(value) for key, value in found.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata must be JSON ({error}); give plain numbers, strings, lists and dicts"
        ) from error


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
