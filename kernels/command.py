"""``blnet kernels list | check | compile``."""

from __future__ import annotations

import argparse
import math

import torch

from blnet.kernels import aot, check
from blnet.kernels.backend import KERNEL_DTYPES, available_backends, choose_backend
from blnet.kernels.catalogue import OPS

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in KERNEL_DTYPES}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands and their options to a parser."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser(
        "list", help="print the ops, what they compute, and which backends work here"
    )
    listing.set_defaults(action=_list)

    checking = commands.add_parser(
        "check", help="hold every op to float64 and to PyTorch's own error, on this device"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    checking.add_argument("--device", default=default, help=f"where to run (default: {default})")
    checking.add_argument(
        "--dtype",
        action="append",
        choices=tuple(_DTYPES),
        help="a dtype to check; repeat for more (default: all)",
    )
    checking.set_defaults(action=_check)

    compiling = commands.add_parser(
        "compile", help="compile every kernel without a GPU; print registers and spills"
    )
    compiling.add_argument(
        "--target",
        action="append",
        choices=tuple(aot.TARGETS),
        help="an architecture to compile for; repeat for more (default: all)",
    )
    compiling.set_defaults(action=_compile)


def run(args: argparse.Namespace) -> int:
    """Run the chosen sub-command.

    Returns:
        0, or 1 if a check failed or a kernel spills.
    """
    return int(args.action(args))


def _list(args: argparse.Namespace) -> int:
    width = max(len(op.name) for op in OPS)
    print("ops:")
    for op in OPS:
        print(f"  {op.name:<{width}}  {op.computes}; {op.used_for}")
    print("backends:")
    for name, status in available_backends().items():
        advice = f"; {status.advice}" if status.advice else ""
        print(f"  {name:<9}  {'yes' if status.works else 'no':<3}  {status.reason}{advice}")
    return 0


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # PyTorch's messages run over many lines; the first says it.
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {text!r} cannot be used: {reason}") from None
    return device


def _check(args: argparse.Namespace) -> int:
    device = _device(args.device)
    backend = choose_backend("check", torch.empty(1, device=device))
    print(f"checking backend {backend!r} on device {str(device)!r}, PyTorch {torch.__version__}")
    if backend == "torch":
        print("no kernel runs here; set TRITON_INTERPRET=1 to interpret the kernels on the CPU")
    header = f"{'op':<18} {'dtype':<9} {'layout':<14} {'max error':>10} {'relative':>10} "
    print(f"{header}{'eager':>10}  result  shape (why)")
    total = failed = 0
    for row in check.check_all(str(device), [_DTYPES[name] for name in args.dtype or _DTYPES]):
        total += 1
        failed += bool(row.failure)
        dtype = str(row.dtype).removeprefix("torch.")
        print(
            f"{row.op:<18} {dtype:<9} {row.layout:<14} {_number(row.max_error):>10} "
            f"{_number(row.error):>10} {_number(row.eager_error):>10}  "
            f"{'FAILED' if row.failure else 'ok':<6}  {row.shape} ({row.shape.reason})",
            flush=True,
        )
        if row.failure:
            print(f"    {row.failure}")
    print(f"{total} rows, {failed} failed")
    return 1 if failed else 0


def _number(value: float) -> str:
    return "0" if value == 0 else "NaN" if math.isnan(value) else f"{value:.2e}"


def _compile(args: argparse.Namespace) -> int:
    targets = args.target or list(aot.TARGETS)
    aot.check_ready(targets)
    columns = ("target", "registers", "shared", "spills", "matrix", "loads")
    print("{:<7} {:>9} {:>7} {:>7} {:>7} {:>7}  kernel".format(*columns))
    total = spilled = 0
    for report in aot.compile_all(targets):
        total += 1
        spilled += report.spills > 0
        loads = ",".join(str(width) for width in report.load_bytes)
        print(
            f"{report.target:<7} {report.registers:>9} {report.shared:>7} {report.spills:>7} "
            f"{'yes' if report.matrix else 'no':>7} {loads:>7}  {report.name}",
            flush=True,
        )
    print(f"{total} kernels compiled, {spilled} with spills")
    return 1 if spilled else 0
