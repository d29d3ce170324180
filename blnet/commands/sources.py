"""What a command's SOURCE names: a network by name, a trained one, or a published checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blnet import registry
from blnet.checks import flag_of, positive
from blnet.conversion import convert
from blnet.trained import add_trust_flag, load_network

_BRANCHING = ("alpha", "beta", "branches")
_MOST_CLASSES = 1_000_000
_MOST_PIXELS = 65536  # channels, height or width of a sample input
_CARRIED = ("task", "network", "preprocessing", "features", "classes", "alphabet", "data")


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add SOURCE and what a name's network can be made with."""
    parser.add_argument(
        "source", metavar="SOURCE",
        help="a .safetensors file, a run's folder, a published .pth file, or a network's name",
    )  # fmt: skip
    parser.add_argument("--size", type=parse_input, metavar="SIZE",
                        help="of the example: 224 or 3x224x224; recordings: 1x64x300 "
                        "(the checkpoint's, else those)")  # fmt: skip
    parser.add_argument("--alpha", type=positive, help="of a name: little branch times narrower")
    parser.add_argument("--beta", type=positive, help="of a name: little branch times shorter")
    parser.add_argument("--branches", type=positive, help="of a name: number of branches")
    parser.add_argument("--num-classes", type=parse_classes, metavar="N", help="of a name: classes")
    add_trust_flag(parser)


def parse_input(text: str) -> tuple[int, ...]:
    """Return the sizes of 224 or 3x224x224; of the first the channels are the network's."""
    if text.isdecimal():
        return parse_size(f"1x{text}x{text}")[1:]
    return parse_size(text)


def parse_size(text: str) -> tuple[int, int, int]:
    """Return the sizes of text such as 3x224x224.

    Raises:
        argparse.ArgumentTypeError: if it is not three whole numbers of at least 1.
    """
    parts = text.lower().split("x")
    sizes = [_whole(part) for part in parts]
    if len(parts) != 3 or not all(0 < size <= _MOST_PIXELS for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no size; write it as 3x224x224, each number at most {_MOST_PIXELS}"
        )
    channels, height, width = sizes
    return channels, height, width


def parse_classes(text: str) -> int:
    """Return a number of classes.

    Raises:
        argparse.ArgumentTypeError: if it is no whole number from 1 to a million.
    """
    classes = _whole(text)
    if not 1 <= classes <= _MOST_CLASSES:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no number of classes; give a whole number from 1 to {_MOST_CLASSES}"
        )
    return classes


def _whole(text: str) -> int:
    """Return the number that a few digits are; -1 for any other text."""
    return int(text) if text.isdecimal() and len(text) < 20 else -1


def load_source(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that SOURCE names and what its checkpoint says of it.

    Raises:
        ValueError: if it is no such thing, or flags do not fit it.
        OSError: if its file cannot be read.
    """
    source = args.source
    given = {name: getattr(args, name) for name in (*_BRANCHING, "num_classes")}
    given = {name: value for name, value in given.items() if value is not None}
    if source not in registry.names() and (Path(source).exists() or _is_path(source)):
        if given:
            flags = ", ".join(map(flag_of, given))
            raise ValueError(f"{source} is a trained network, which is what it is; leave out "
                             f"{flags}")  # fmt: skip
        if not Path(source).exists():
            raise FileNotFoundError(f"{source} does not exist; name a .safetensors file, a run's "
                                    "folder, a published .pth file or a network")  # fmt: skip
        model, extra = load_network(source, args.trust_source)
        return model, {key: extra[key] for key in _CARRIED if key in extra}
    model = _built(source, dict(given))
    print(f"{source}: new weights, not trained ones")
    return model, {"network": {"name": source, "options": given}}


def _is_path(source: str) -> bool:
    return Path(source).suffix in (".safetensors", ".pth") or ("/" in source and ":" not in source)


def _built(name: str, options: dict[str, int]) -> nn.Module:
    """Return a new network; a plain one with alpha, beta or branches is converted."""
    if registry.is_big_little(name):
        return registry.build(name, **options)
    branching = {key: options.pop(key) for key in _BRANCHING if key in options}
    plain = registry.build(name, **options)
    if not branching:
        return plain
    settings = {"alpha": 2, "beta": 4, "branches": 2} | branching
    alpha, beta, branches = settings.values()
    converted: nn.Module = convert(plain, alpha, beta, branches)
    return converted


def example_of(
    model: nn.Module, size: tuple[int, ...] | None, metadata: dict[str, Any]
) -> torch.Tensor | None:
    """Return an empty input of the size asked for, else of the checkpoint's, else None."""
    if size is None:
        preprocessing = metadata.get("preprocessing")
        side = preprocessing.get("size") if isinstance(preprocessing, dict) else None
        if not isinstance(side, int) or side < 1:
            return None
        size = (side, side)
    if len(size) == 2:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        size = (first.in_channels if first else 3, *size)
    return torch.empty(1, *size)
