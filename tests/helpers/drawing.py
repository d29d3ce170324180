"""How tests that draw shapes for an op go about it: in which dtypes, how often, undisturbed."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUIET: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def fresh(few: int) -> int:
    """Return how many examples of each dtype to draw that are others in every run.

    Args:
        few: how many where BLNET_DEEP does not say how many in all.
    """
    return int(os.environ.get("BLNET_DEEP", "0")) // len(DTYPES) or few
