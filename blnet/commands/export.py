"""``blnet export``: a network by name, or a trained one, as ONNX, TorchScript or torch.export."""

from __future__ import annotations

import argparse
from pathlib import Path

from blnet.checks import positive
from blnet.commands.sources import add_source_flags, example_of, load_source
from blnet.exporting.exporter import Exported, export
from blnet.exporting.formats import FORMATS, OPSET

_EXAMPLES = """examples:
  blnet export results/pets --output pets.onnx
  blnet export bL-ResNet-50.pth --output bl_resnet50.onnx --size 224
  blnet export best.safetensors --output net.pt2 --format exported-program
  blnet export torchvision:resnet50 --alpha 2 --beta 4 --output bl.pt --format torch --static"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    add_source_flags(parser)
    parser.add_argument("--output", metavar="FILE", required=True, help="the file to write")
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx",
                        help="onnx, torch (TorchScript) or exported-program (onnx)")  # fmt: skip
    parser.add_argument("--opset", type=positive, help=f"of --format onnx ({OPSET})")
    parser.add_argument("--static", action="store_true", help="for one batch and size only")
    parser.add_argument("--no-check", action="store_true", help="do not run the file")
    parser.add_argument("--overwrite", action="store_true", help="replace the file, if any")


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written and how far it is from the network."""
    output = _checked_output(args)
    if args.opset is not None and args.format != "onnx":
        raise ValueError(f"--opset is ONNX's, and --format {args.format} has none; leave it out")
    model, metadata = load_source(args)
    done = export(
        model,
        output,
        args.format,
        example_of(model, args.size, metadata),
        not args.static,
        opset=OPSET if args.opset is None else args.opset,
        check=not args.no_check,
        metadata=metadata,
    )
    print(_told(done, output.stat().st_size))
    return 0


def _checked_output(args: argparse.Namespace) -> Path:
    path, suffix = Path(args.output), FORMATS[args.format].suffix
    if path.suffix != suffix:
        raise ValueError(f"--output {path} must end with {suffix}, as files of --format "
                         f"{args.format} do")  # fmt: skip
    if path.exists() and not args.overwrite:
        raise ValueError(f"--output {path} exists already; add --overwrite to replace it")
    return path


def _told(done: Exported, size: int) -> str:
    free = "free" if done.parity is not None else "free as traced"
    sizes = f"batch and sizes {free if done.dynamic else 'fixed'}"
    if done.dynamic and done.least:
        sizes += ", from " + ", ".join(f"{axis} {size}" for axis, size in done.least.items())
    text = (f"wrote {done.path} ({size / 1e6:.1f} MB, {done.format}; {', '.join(done.inputs)} -> "
            f"{', '.join(done.outputs)}; {sizes})\n")  # fmt: skip
    if done.parity is None:
        return f"{text}not checked: nothing was run, neither at the example's size nor at another"
    shapes = ", ".join("x".join(map(str, shape)) for shape in done.parity.shapes)
    return f"{text}checked at {shapes}: largest relative error {done.parity.error:.1e}"
