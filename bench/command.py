"""`blnet bench`: runs suites, prints the table and writes the results."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path

from blnet.bench.settings import (
    DEFAULT_BRANCHINGS,
    DEFAULT_MODELS,
    DEVICES,
    DTYPES,
    Settings,
    check_writable,
    resolve,
)
from blnet.bench.studies import SCALES, goes_on
from blnet.environment import command_line

# Suite -> (its module, one line on it).
SUITES = {
    "models": ("blnet.bench.suites.test_models", "whole networks, inference, every rung"),
    "training": (
        "blnet.bench.suites.test_training",
        "whole networks, forward and backward pass, fused and not",
    ),
    "speech_models": (
        "blnet.bench.suites.test_speech_models",
        "whole acoustic models, inference, every rung",
    ),
    "merge": ("blnet.bench.suites.test_merge", "relu(upsample(big) + little) at the merge sites"),
    "expand_merge": (
        "blnet.bench.suites.test_expand_merge",
        "relu(upsample(big) + BN(conv1x1(x))), inference and training",
    ),
    "moments": ("blnet.bench.suites.test_moments", "the batch statistics of expand_merge"),
    "bottleneck": ("blnet.bench.suites.test_bottleneck", "the little branches, inference"),
    "stem": ("blnet.bench.suites.test_stem", "the end of the stem, inference"),
    "features": (
        "blnet.bench.suites.test_features",
        "log-mel maps of recordings, against librosa's",
    ),
    "accuracy": (
        "blnet.bench.suites.test_accuracy",
        "study: plain and Big-Little networks trained alike, several seeds",
    ),
    "conversion": (
        "blnet.bench.suites.test_conversion",
        "study: a converted network, fine-tuned, against training anew",
    ),
    "speech": (
        "blnet.bench.suites.test_speech",
        "study: plain and Big-Little acoustic models trained alike, several seeds",
    ),
}
# Those that train: minutes to days, so only by name.
STUDIES = ("accuracy", "conversion", "speech")
# Those of a quick run on a CPU, where no kernel runs.
QUICK_CPU_SUITES = ("models", "merge")
OPS = "kernels"  # stands for the suite of every op: those named as an op is
NEEDED = ("pytest", "pytest_benchmark", "rich", "sklearn", "torchvision", "PIL")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `blnet bench`."""
    add_settings(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for results.json, results.csv and report.md "
        "(default: results/<date-time>-<device>)",
    )
    parser.add_argument(
        "--list", action="store_true", help="print suites, networks and rungs, and measure nothing"
    )


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
        default=list(DEFAULT_MODELS),
        metavar="NAME",
        help="networks to measure, Big-Little or plain; the plain network of each is added "
        f"(default: {' '.join(DEFAULT_MODELS)})",
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
        help="every rung, every merge site, more rounds: up to an hour with compiling",
    )
    add(
        "--repeat",
        type=int,
        metavar="ROUNDS",
        help="how often each implementation is timed (default: at batch 1 24 times, else 10; "
        "--full 60 and 30; on a GPU 50 and --full 100; the merge suite four times as often)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of PyTorch (default: PyTorch's own choice, one a core)",
    )
    add("--seed", type=int, default=0, help="of weights, crops and random inputs (default: 0)")
    _add_studies(parser)


def _add_studies(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the studies, which train networks."""
    add = parser.add_argument_group("studies (accuracy, conversion)").add_argument
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
    values["suites"] = _expanded(arguments.suites)
    values["models"] = tuple(arguments.models)
    return Settings(branchings=_branchings(arguments.alpha, arguments.beta), **values)


def _expanded(names: Sequence[str]) -> tuple[str, ...]:
    """Put the suites of the ops in place of `OPS`, each suite once."""
    found: list[str] = []
    for name in names:
        found += op_suites() if name == OPS else [name]
    return tuple(dict.fromkeys(found))


def _default(settings: Settings) -> tuple[str, ...]:
    everything = settings.full or settings.on_gpu
    timed = tuple(name for name in SUITES if name not in STUDIES)
    return timed if everything else QUICK_CPU_SUITES


def op_suites() -> list[str]:
    """Return the suites that time an op of `blnet.kernels`."""
    from blnet.kernels import catalogue

    ops = {op.name for op in catalogue.OPS}
    return [suite for suite in SUITES if suite in ops]


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


def run(arguments: argparse.Namespace) -> int:
    """Run the suites; see `blnet bench --help`. Returns 0, 1 if a check failed, 130 if stopped."""
    _check_extra()
    settings = resolve(settings_of(arguments))
    from blnet.bench import networks, studies

    networks.check(settings)
    for suite in set(settings.suites) & set(STUDIES) if not arguments.list else ():
        studies.check(settings, studies.KINDS[suite])
    if arguments.list:
        print(_listing(settings))
        return 0
    from blnet.bench.progress import Progress
    from blnet.bench.runner import finish, run_suites, steps
    from blnet.bench.session import Session

    folder = Path(arguments.output or _default_folder(settings))
    check_writable(folder, goes_on(settings, folder, STUDIES))
    with Progress() as progress:
        session = Session(settings, progress.watch, folder)
        for note in session.results.notes:
            progress.say(f"blnet bench: {note}")
        suites = {name: SUITES[name][0] for name in settings.suites or _default(session.settings)}
        progress.start(steps(suites, session.settings))
        run_suites(suites, session)
    status = finish(session.results, folder)
    if session.results.interrupted and set(suites) <= set(STUDIES):
        print(f"go on with: {_with_output(folder)}", file=sys.stderr)
    return status


def _with_output(folder: Path) -> str:
    """Return the command that was given, with its folder named."""
    command = command_line()
    named = any(word.partition("=")[0] == "--output" for word in shlex.split(command))
    return command if named else f"{command} --output {shlex.quote(str(folder))}"


def _check_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"blnet bench needs {', '.join(missing)}; install with: pip install 'blnet[bench]'"
        )


def _default_folder(settings: Settings) -> Path:
    return Path("results") / f"{datetime.now():%Y%m%d-%H%M%S}-{settings.device}"


def _listing(settings: Settings) -> str:
    from blnet.bench import networks
    from blnet.bench.ladder import rungs

    lines = ["scales of the studies:"]
    lines += [f"  {name:<24}{scale.about}" for name, scale in SCALES.items()]
    lines.append("suites:")
    lines += [f"  {name:<24}{text}" for name, (_, text) in SUITES.items()]
    lines.append("networks of this run:")
    lines += [f"  {s.label:<24}compared with {s.baseline}" for s in networks.specs(settings)]
    quick = {rung.name for rung in rungs(settings.device)}
    lines.append(f"rungs on {settings.device} (* only with --full):")
    for rung in rungs(settings.device, full=True):
        mark = "" if rung.name in quick else " *"
        lines.append(f"  {rung.name + mark:<24}{rung.description}")
    return "\n".join(lines)
