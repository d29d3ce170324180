"""A tiny network for scikit-learn's digits, and what a run on them writes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from blnet.network import BigLittleConfig, BigLittleNet
from blnet.vision.config import DataConfig
from blnet.vision.data import load_data
from blnet.vision.preprocessing import Preprocessing

GREY = Preprocessing(8, 1.0, 1, (0.3,), (0.4,))
DIGITS = list("0123456789")


def network(seed: int = 0, **changes: Any) -> BigLittleNet:
    """Return a tiny untrained network whose answers vary over the digits."""
    settings: dict[str, Any] = {
        "block": "basic", "depths": (2, 2), "widths": (8, 16), "stem": "small", "stem_width": 8,
        "in_channels": 1, "num_classes": 10,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = BigLittleNet(BigLittleConfig(**{**settings, **changes})).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            module.momentum = 1.0  # the batch's statistics as they are
    images: Any = load_data(DataConfig(), parts="evaluation").evaluation
    batch = GREY.normalize(torch.stack([images[i][0] for i in range(40)]))
    with torch.no_grad():
        model(batch)
        model.fc.bias -= model.eval()(batch).mean(0)  # no class is everybody's favourite
    return model.eval()


def header(**changes: Any) -> dict[str, Any]:
    """Return what training on the digits puts into a checkpoint; None removes an entry."""
    found = {
        "task": "vision",
        "network": {"name": "bl_resnet18", "options": {"alpha": 2, "beta": 4, "width": 0.5}},
        "classes": DIGITS,
        "preprocessing": GREY.as_dict(),
        "data": {"name": "digits", "holdout": 0.2, "split_seed": 0},
    }
    return {k: v for k, v in {**found, **changes}.items() if v is not None}
