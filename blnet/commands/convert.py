"""``blnet convert``: a network by name, or an official checkpoint, into a Big-Little network."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from blnet import registry
from blnet.checkpoint import save
from blnet.checks import flag_of
from blnet.commands.sources import parse_classes, parse_size
from blnet.conversion.converter import convert
from blnet.conversion.plan import ConversionPlan
from blnet.files import read_weights, reason
from blnet.keys import check_dense, misfits, state_dict_of
from blnet.official import load_official
from blnet.profiling import Profile, profile

# Flag -> its default and the largest value that means anything.
_BRANCHING = {"alpha": (2, 65536), "beta": (4, 65536), "branches": (2, 16)}
_EXAMPLES = """examples:
  blnet convert torchvision:resnet50 --alpha 2 --beta 4
  blnet convert timm:resnet50d --branches 3 --output bl_resnet50d.safetensors
  blnet convert mypackage.nets:make --input 1x80x120
  blnet convert resnet50 --weights resnet50.pth --inherit-weights --output bl.safetensors
  blnet convert --official bL-ResNet-50.pth --output bl_resnet50.safetensors"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "network",
        nargs="?",
        help="a name of ours, torchvision:NAME, timm:NAME or package.module:function",
    )
    parser.add_argument("--official", metavar="FILE", help="a published Big-Little checkpoint")
    # No defaults here: --official must know what was given.
    parser.add_argument("--alpha", type=int, help="little branch: times narrower (2)")
    parser.add_argument("--beta", type=int, help="little branch: times shorter (4)")
    parser.add_argument("--branches", type=int, help="number of branches (2)")
    parser.add_argument(
        "--num-classes",
        type=parse_classes,
        metavar="N",
        help="classes of the network (its own default)",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="trained weights of NETWORK: .pth or ours"
    )
    parser.add_argument(
        "--inherit-weights", action="store_true", help="move those weights into the converted one"
    )
    parser.add_argument(
        "--input", type=parse_size, metavar="CxHxW", help="size of a sample input (usual images)"
    )
    parser.add_argument("--output", metavar="FILE", help="write the result as .safetensors")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the file that --output names, if any"
    )


def run(args: argparse.Namespace) -> int:
    """Convert, print the plan and what it costs, and write the result where asked."""
    if bool(args.network) == bool(args.official):
        raise ValueError("give either a NETWORK or --official FILE, not both and not neither")
    output = _checked_output(args.output, args.overwrite)
    if args.official:
        _check_official(args)
        model: nn.Module = load_official(args.official)
        print(f"{args.official}: {_describe_official(model)}")
        print(_cost("network", profile(model, (1, *(args.input or _image_size(model))))))
    else:
        model = _convert_named(args)
    if output is not None:
        save(model, output)
        print(f"wrote {output}")
    return 0


def _check_official(args: argparse.Namespace) -> None:
    settings = ("alpha", "beta", "branches", "num_classes", "weights", "inherit_weights")
    given = [name for name in settings if getattr(args, name) not in (None, False)]
    if given:
        flags = ", ".join(map(flag_of, given))
        raise ValueError(f"--official takes its settings from the file; leave out {flags}")
    if args.output is None:
        raise ValueError("--official needs --output FILE.safetensors to write the network to")


def _branching(args: argparse.Namespace) -> tuple[int, int, int]:
    """Return alpha, beta and branches; what is too small is `convert`'s to say."""
    values = []
    for name, (default, most) in _BRANCHING.items():
        given = getattr(args, name)
        if given is not None and given > most:
            raise ValueError(f"--{name} must be at most {most}, got {given}")
        values.append(default if given is None else given)
    alpha, beta, branches = values
    return alpha, beta, branches


def _checked_output(name: str | None, overwrite: bool) -> Path | None:
    if name is None:
        if overwrite:
            raise ValueError("--overwrite needs --output FILE, the file to replace")
        return None
    path = Path(name)
    if path.suffix != ".safetensors":
        raise ValueError(f"--output {name} must end with .safetensors, the format that is written")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output {name} is no file in an existing folder; create the folder")
    if path.exists() and not overwrite:
        raise ValueError(f"--output {name} exists already; add --overwrite to replace it")
    return path


def _convert_named(args: argparse.Namespace) -> nn.Module:
    if args.inherit_weights and not args.weights:
        raise ValueError("--inherit-weights needs --weights FILE, the trained weights to move")
    if args.weights and not args.inherit_weights:
        raise ValueError("--weights are only used with --inherit-weights; add it or leave both out")
    alpha, beta, branches = _branching(args)
    options = {} if args.num_classes is None else {"num_classes": args.num_classes}
    plain = registry.build(args.network, **options)
    if args.weights:
        _load_weights(plain, args.weights)
    size = None if args.input is None else (1, *args.input)
    model = convert(plain, alpha, beta, branches, args.inherit_weights, size)
    found = model.plan
    assert isinstance(found, ConversionPlan)
    plan = dataclasses.replace(found, source=args.network, source_options=options)
    model.plan = plan
    print(plan)
    shape = plan.input_size or (1, *(args.input or _image_size(plain)))
    before, after = profile(plain, shape), profile(model, shape)
    print(_cost("before", before))
    print(_cost("after", after))
    print(f"the plain network does {before.macs / after.macs:.2f} times the MACs")
    return model


def _load_weights(model: nn.Module, name: str) -> None:
    own = model.state_dict()
    loaded = read_weights(name)
    try:
        weights = state_dict_of(loaded, own)
        # Files of old PyTorch versions have no counters; those of a new network will do.
        old = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
        weights = {**old, **weights}
        told = misfits(own, weights)
        if told:
            raise ValueError(f"it does not fit {type(model).__name__}; {told}")
        check_dense(weights)
        model.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--weights {name} cannot be used: {reason(error, 4000)}") from error


def _image_size(model: nn.Module) -> tuple[int, int, int]:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return (first.in_channels if first else 3), 224, 224


def _describe_official(model: nn.Module) -> str:
    config: Any = model.config
    kind = "bL-SE" if config.se_reduction else "bL-"
    family = "ResNeXt" if config.cardinality > 1 else "ResNet"
    per_block = 3 if config.block == "bottleneck" else 2
    groups = f" {config.cardinality}x{config.base_width}d" if config.cardinality > 1 else ""
    depth = _nominal_depth(config.depths, per_block)
    return (
        f"{kind}{family}-{depth}{groups}, alpha {config.alpha}, beta {config.beta}, "
        f"{config.num_classes} classes"
    )


def _nominal_depth(depths: tuple[int, ...], per_block: int) -> int:
    """Return the network's layers: its blocks' convolutions, the stem's and the classifier."""
    return sum(depths) * per_block + 2


def _cost(label: str, result: Profile) -> str:
    size = "x".join(map(str, result.input_size))
    return f"{label}: {result.parameters:,} parameters, {result.macs / 1e9:.3f} GMACs at {size}"
