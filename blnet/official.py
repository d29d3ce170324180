"""Reading the published Big-Little checkpoints.

The published format is a torch file with a dict whose 'state_dict' holds the weights; keys may
carry a leading "module.". Family, depth, alpha, beta, cardinality and base width are read off the
keys and shapes, never off the file's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blnet.files import read_torch_file
from blnet.keys import check_dense, kind, listed, state_dict_of
from blnet.module import branch_length
from blnet.network import BigLittleConfig, BigLittleNet

# Our name of a layer -> the published one; the first pattern that matches the key's head counts.
_RENAMES = (
    (r"stem\.conv1\.", "conv1."),
    (r"stem\.bn1\.", "bn1."),
    (r"stem\.pool\.big\.0\.", "b_conv0."),
    (r"stem\.pool\.big\.1\.", "bn_b0."),
    (r"stem\.pool\.little\.0\.", "l_conv0."),
    (r"stem\.pool\.little\.1\.", "bn_l0."),
    (r"stem\.pool\.little\.3\.", "l_conv1."),
    (r"stem\.pool\.little\.4\.", "bn_l1."),
    (r"stem\.pool\.expand\.0\.", "l_conv2."),
    (r"stem\.pool\.expand\.1\.", "bn_l2."),
    (r"stem\.pool\.fusion\.0\.", "bl_init."),
    (r"stem\.pool\.fusion\.1\.", "bn_bl_init."),
    (r"stages\.(\d+)\.branches\.0\.", "layer{}.little."),
    (r"stages\.(\d+)\.branches\.1\.", "layer{}.big."),
    (r"stages\.(\d+)\.expands\.0\.", "layer{}.little_e."),
    (r"stages\.(\d+)\.", "layer{}."),
)
# Settings of alpha's partner that leave the same network are told apart by the paper's habit.
_BETAS: tuple[int, ...] = (4, 2, 1, *range(3, 65))
_KEYS_SHOWN = 40


def load_official(source: str | os.PathLike[str] | Mapping[str, Any]) -> BigLittleNet:
    """Return the network of a published checkpoint, with its weights, in evaluation mode.

    Args:
        source: a path, or what `torch.load` gave: the outer dict or the state dict itself, with or
            without "module." before the keys. `num_batches_tracked` may be missing, as in files of
            old PyTorch versions.

    Returns:
        A float32 network on the CPU that shares no memory with `source`. Where several beta give
        the same network (3, 4 and more do for 50 layers), its configuration says 4, or else 2.

    Raises:
        ValueError: if the file is no such checkpoint, or a key is missing or too many (the error
            lists them, up to forty of each), or a shape or a dtype does not fit.
        OSError: if the file cannot be read.
    """
    if not isinstance(source, str | os.PathLike | Mapping):
        raise ValueError(
            "load_official takes the path of a published checkpoint or the dict that torch.load "
            f"gave, got {type(source).__name__}"
        )
    weights = state_dict_of(source if isinstance(source, Mapping) else read_torch_file(source))
    config = infer_config(weights)
    with torch.device("meta"):
        model = BigLittleNet(config)
    expected = {official_key(key): key for key in model.state_dict()}
    _check_keys(weights, expected)
    check_dense(weights)
    own = model.state_dict()
    ready: dict[str, Tensor] = {}
    for published, key in expected.items():
        value = weights.get(published)
        if value is None:
            value = torch.zeros((), dtype=torch.int64)
        ready[key] = _fitted(published, value, own[key])
    model.load_state_dict(ready, assign=True)
    return model.eval()


def official_key(key: str) -> str:
    """Return the published name of one of our two-branch network's state-dict keys."""
    for pattern, published in _RENAMES:
        match = re.match(pattern, key)
        if match:
            numbers = (int(group) + 1 for group in match.groups())
            key = published.format(*numbers) + key[match.end() :]
            break
    return key.replace(".se.", ".se_layer.")


def infer_config(weights: Mapping[str, Tensor]) -> BigLittleConfig:
    """Return the shape of the network that a published state dict belongs to.

    Args:
        weights: the published keys, without "module.".

    Raises:
        ValueError: if keys that decide the shape are missing, or contradict each other.
    """
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    decisive = ["conv1.weight", "l_conv0.weight", "fc.weight", "layer1.big.0.conv1.weight"]
    missing = [key for key in decisive if key not in shapes]
    if missing:
        raise ValueError(
            f"not a published Big-Little checkpoint: {listed(missing)} is missing; load our own "
            "files with blnet.load and torchvision's with blnet.convert"
        )
    block = "bottleneck" if "layer1.big.0.conv3.weight" in shapes else "basic"
    last_conv = "conv3" if block == "bottleneck" else "conv2"
    big_stages = _count(shapes, r"layer(\d+)\.big\.")
    big = [_count(shapes, rf"layer{s + 1}\.big\.(\d+)\.") for s in range(big_stages)]
    little = [_count(shapes, rf"layer{s + 1}\.little\.(\d+)\.") for s in range(big_stages)]
    lengths = [count + 1 for count in big]
    tail = _count(shapes, rf"layer{big_stages + 1}\.(\d+)\.")
    heads = [f"layer{s + 1}.big.0" for s in range(big_stages)] + [f"layer{big_stages + 1}.0"]
    widths = tuple(_sizes(shapes, f"{head}.{last_conv}.weight")[0] for head in heads)
    inner, group_width = _sizes(shapes, "layer1.big.0.conv2.weight")[:2]
    stem = _sizes(shapes, "conv1.weight")
    cardinality = inner // group_width if block == "bottleneck" else 1
    gate_key = "layer1.big.0.se_layer.fc1.weight"
    gate = _sizes(shapes, gate_key, ranks=(2, 4)) if gate_key in shapes else ()
    return BigLittleConfig(
        block=block,  # type: ignore[arg-type]
        depths=(*lengths, tail),
        widths=widths,
        alpha=stem[0] // _sizes(shapes, "l_conv0.weight")[0],
        beta=_infer_beta(lengths, little),
        cardinality=cardinality,
        base_width=group_width * 256 // widths[0] if block == "bottleneck" else 64,
        se_reduction=gate[1] // gate[0] if gate else 0,
        stem_width=stem[0],
        in_channels=stem[1],
        num_classes=_sizes(shapes, "fc.weight", ranks=(2,))[0],
    )


def _sizes(
    shapes: Mapping[str, tuple[int, ...]], key: str, ranks: tuple[int, ...] = (4,)
) -> tuple[int, ...]:
    """Return the shape of a weight that decides the network's, checked to be one of a layer."""
    if key not in shapes:
        raise ValueError(f"the checkpoint's key {key!r} is missing, which decides a width")
    if len(shapes[key]) not in ranks or 0 in shapes[key]:
        raise ValueError(
            f"the checkpoint's {key} has shape {shapes[key]}, which no layer has; it is damaged"
        )
    return shapes[key]


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """Return how many different numbers stand in the pattern's group."""
    matches = (re.match(pattern, key) for key in shapes)
    return len({match[1] for match in matches if match})


def _infer_beta(lengths: list[int], little: list[int]) -> int:
    for beta in _BETAS:
        if [branch_length(length, beta, 1) for length in lengths] == little:
            return beta
    raise ValueError(
        f"no beta gives little branches of {little} blocks in stages of {lengths} blocks; the "
        "checkpoint lacks blocks or is of another network"
    )


def _check_keys(weights: Mapping[str, Tensor], expected: Mapping[str, str]) -> None:
    missing = [
        key for key in expected if key not in weights and not key.endswith("num_batches_tracked")
    ]
    extra = [key for key in weights if key not in expected]
    faults = []
    if missing:
        faults.append(f"missing keys: {listed(missing, _KEYS_SHOWN)}")
    if extra:
        faults.append(f"extra keys: {listed(extra, _KEYS_SHOWN)}")
    if faults:
        raise ValueError(f"the checkpoint does not fit its own network; {'; '.join(faults)}")


def _fitted(key: str, value: Tensor, own: Tensor) -> Tensor:
    # The gates of squeeze-excitation were published as linear layers and as 1x1 convolutions.
    if ".se_layer." in key and value.ndim == 2 and own.ndim == 4:
        value = value[:, :, None, None]
    if value.shape != own.shape:
        raise ValueError(
            f"the checkpoint's {key} has shape {tuple(value.shape)}, the network it describes "
            f"needs {tuple(own.shape)}"
        )
    # A counter may have become a float on its way; weights that are no floats are another thing's.
    if kind(value) != kind(own) and (own.is_floating_point() or value.is_complex()):
        raise ValueError(
            f"the checkpoint's {key} is of {value.dtype}, the network needs {own.dtype}; "
            "give its weights as floating-point numbers"
        )
    return value.detach().to(device="cpu", dtype=own.dtype, copy=True)
