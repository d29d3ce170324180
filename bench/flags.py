"""The flags of `blnet bench` that say what to measure."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from blnet.bench.catalogue import OF_ANY_NETWORK, OPS, QUICK_CPU_SUITES, STUDIES, SUITES, expanded
from blnet.bench.settings import (
    DEFAULT_BRANCHINGS,
    DEFAULT_MODELS,
    DEVICES,
    DTYPES,
    Settings,
)
from blnet.bench.studies import SCALES


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what to measure."""
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"suites to run: {', '.join(SUITES)}; {OPS} for all of the ops "
        f"(default: all but {' and '.join(STUDIES)}, which train; a quick run on a CPU: "
        f"{', '.join(QUICK_CPU_SUITES)})",
    )
    add = parser.add_argument
    add("--device", choices=DEVICES, default="auto", help="default: auto, a GPU if there is one")
    add("--dtype", choices=DTYPES, help="precision (default: float32; on a GPU bfloat16)")
    add(
        "--batch",
        type=int,
        metavar="N",
        help="images in the throughput batch (default: 8; on a GPU 256); latency is always "
        "measured at batch 1",
    )
    add(
        "--size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="height and width of the images, pixels (default: 224)",
    )
    add(
        "--models",
        nargs="+",
        metavar="NAME",
        help="networks to measure, Big-Little or plain; the plain network of each is added "
        f"(default: {' '.join(DEFAULT_MODELS)})",
    )
    add(
        "--model",
        metavar="NAME",
        help="one network of your own, package.module:function (or torchvision:NAME, timm:NAME), "
        "measured as it is and converted, with each --alpha and --beta",
    )
    add(
        "--input",
        type=parse_shape,
        metavar="CxHxW",
        help="channels, height and width of the images, such as 3x224x224 (default: 3 x --size "
        "x --size); other channels than 3 get noise",
    )
    add(
        "--alpha",
        nargs="+",
        type=int,
        metavar="A",
        help="width divisors of the little branch, paired with --beta (default: "
        f"{' '.join(str(a) for a, _ in DEFAULT_BRANCHINGS)}; the accuracy study takes the paper's "
        "four settings)",
    )
    add(
        "--beta",
        nargs="+",
        type=int,
        metavar="B",
        help="depth divisors of the little branch, paired with --alpha; one value serves all "
        f"(default: {' '.join(str(b) for _, b in DEFAULT_BRANCHINGS)})",
    )
    add(
        "--baseline",
        metavar="NAME",
        help="plain network to compare all with (default: each one's own, bl_resnet50 with "
        "resnet50)",
    )
    add(
        "--images",
        metavar="FOLDER",
        help="pictures to use as input (default: scikit-learn's two photographs)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--quick",
        action="store_true",
        help="rungs and rounds that fit a few minutes (the default)",
    )
    mode.add_argument(
        "--full",
        action="store_true",
        help="every rung, every merge site, more rounds: 51 minutes on two cores of a Xeon",
    )
    add(
        "--repeat",
        type=int,
        metavar="ROUNDS",
        help="how often each implementation is timed (default: at batch 1 24 times, else 8; "
        "--full 60 and 30; on a GPU 50 and --full 100; training half of that, 8 times at least); "
        "the suites of ops and features time four times as often, with --repeat too",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of PyTorch (default: PyTorch's own choice, one a core)",
    )
    add(
        "--graphs",
        action="store_true",
        help="kernel suites on a GPU: replay every implementation as a CUDA graph, so that "
        "launches cost next to nothing (networks have rungs of their own for it)",
    )
    add("--seed", type=int, default=0, help="of weights, crops and random inputs (default: 0)")
    _add_studies(parser)


def _add_studies(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the studies, which train networks."""
    add = parser.add_argument_group("studies (accuracy, conversion, speech)").add_argument
    add(
        "--scale",
        choices=tuple(SCALES),
        help="what to train on; precision, batch and size are its recipe's (default: digits, and "
        "synth of speech, minutes on a CPU; 'blnet bench --list' explains)",
    )
    add("--seeds", type=int, default=3, metavar="N", help="runs of each network (default: 3)")
    add("--epochs", type=int, metavar="N", help="epochs of each run (default: the recipe's)")
    add(
        "--data",
        metavar="PATH",
        help="pictures or recordings of the scale, where it is not the default",
    )


def parse_settings(words: Sequence[str]) -> Settings:
    """Return the settings that flags of `blnet bench` stand for.

    Raises:
        ValueError: if a flag is not known or a value is wrong.
    """
    parser = argparse.ArgumentParser(prog="blnet bench", exit_on_error=False, add_help=False)
    add_settings(parser)
    try:
        arguments, unknown = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if unknown:
        raise ValueError(f"unknown flags: {' '.join(unknown)}")
    return settings_of(arguments)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings in parsed arguments.

    Raises:
        ValueError: if a suite is not known, or --alpha and --beta do not pair.
    """
    known = [*SUITES, OPS]
    unknown = [name for name in arguments.suites if name not in known]
    if unknown:
        raise ValueError(f"no suite {unknown[0]!r}; choose from {', '.join(known)}")
    names = {field.name for field in fields(Settings)} - {"branchings"}
    values = {name: value for name, value in vars(arguments).items() if name in names}
    values["suites"] = expanded(arguments.suites)
    _check_own(arguments)
    values["models"] = tuple(arguments.models or DEFAULT_MODELS)
    return Settings(branchings=_branchings(arguments.alpha, arguments.beta), **values)


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return the numbers of "3x224x224".

    Raises:
        ArgumentTypeError: if it is no such text.
    """
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not channels x height x width; give three numbers, such as 3x224x224"
        )
    channels, height, width = map(int, numbers)
    return channels, height, width


def _check_own(arguments: argparse.Namespace) -> None:
    """Check that a network of one's own stands alone, in suites that take any network."""
    given = "--model" if arguments.model else "--input" if arguments.input else None
    if arguments.model and arguments.models:
        raise ValueError("--model and --models exclude each other; name networks with one of them")
    others = [name for name in arguments.suites if name not in OF_ANY_NETWORK]
    if given and others:
        raise ValueError(
            f"{given} is for the suites {' and '.join(OF_ANY_NETWORK)}; leave out {others[0]}"
        )
    if arguments.input and not arguments.model and arguments.input[0] != 3:
        raise ValueError(
            f"--input with {arguments.input[0]} channels needs a --model that takes so many"
        )


def _branchings(
    alphas: list[int] | None, betas: list[int] | None
) -> tuple[tuple[int, int], ...] | None:
    if alphas is None and betas is None:
        return None
    alphas = alphas or [2]
    betas = betas or [4]
    if len(betas) == 1:
        betas = betas * len(alphas)
    if len(alphas) == 1:
        alphas = alphas * len(betas)
    if len(alphas) != len(betas):
        raise ValueError(
            f"--alpha has {len(alphas)} values and --beta {len(betas)}; give as many of each"
        )
    return tuple(zip(alphas, betas, strict=True))
