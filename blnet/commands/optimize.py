"""``blnet optimize``: what `blnet.optimize` makes of a network on this machine, and how fast."""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

from blnet.checks import positive
from blnet.commands.sources import add_source_flags, example_of, load_source
from blnet.exporting.forms import usual_shape
from blnet.optimizing.engines import engine_names, name_of
from blnet.optimizing.optimize import PRECISIONS, SECONDS, optimize

_EXAMPLES = """examples:
  blnet optimize bl_resnet50 --alpha 2 --beta 4 --size 224 --batch 8
  blnet optimize results/pets --precision bfloat16
  blnet optimize torchvision:resnet50 --engine onnxruntime"""

# In quotes: a name may hold a comma. argparse quotes choices in some versions of Python only.
_ENGINES = ", ".join(map(repr, engine_names()))


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    add_source_flags(parser)
    parser.add_argument("--batch", type=positive, default=1, help="inputs at once (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (a GPU if there is one)")
    parser.add_argument("--precision", choices=[name_of(p) for p in PRECISIONS],
                        help="what it computes in (the network's)")  # fmt: skip
    parser.add_argument("--engine", type=_engine, default="auto", metavar="NAME",
                        help=f"the only engine to build: {_ENGINES} (auto: the fastest)")  # fmt: skip # noqa: E501
    parser.add_argument("--seconds", type=positive, default=int(SECONDS), metavar="S",
                        help=f"for building and measuring ({SECONDS:.0f})")  # fmt: skip


def _engine(name: str) -> str:
    if name not in ("auto", *engine_names()):
        raise argparse.ArgumentTypeError(f"{name!r} is no engine; choose 'auto', {_ENGINES}")
    return name


def run(args: argparse.Namespace) -> int:
    """Optimise the network for drawn inputs and print what was done."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device; leave the flag out")
    model, metadata = load_source(args)
    example = example_of(model, args.size, metadata)
    shape = usual_shape(model) if example is None else example.shape
    torch.manual_seed(0)
    inputs = torch.randn(args.batch, *shape[1:], device=device)
    fast = optimize(
        model.to(device).eval(),
        example_input=inputs,
        precision=args.precision,
        engine=args.engine,
        seconds=args.seconds,
        say=partial(print, file=sys.stderr, flush=True),
    )
    fast.explain()  # type: ignore[operator]
    return 0
