"""The flag that says where a command runs a trained network."""

from __future__ import annotations

import argparse

import torch

from blnet.training.config import TrainingConfig
from blnet.training.devices import make_accelerator


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says where a trained network runs, for `device_of`."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto is a GPU if there is one")  # fmt: skip


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device that the flag names, this process's where several were started.

    Raises:
        ValueError: if it is not there.
    """
    device: torch.device = make_accelerator(TrainingConfig(device=args.device)).device
    return device
