"""``blnet kernels list | check | compile | tune | bench``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from blnet.kernels import aot, check, tune, tuning_tables
from blnet.kernels.backend import KERNEL_DTYPES, available_backends, choose_backend
from blnet.kernels.catalogue import OPS
from blnet.kernels.launch import Specialization

_LARGEST_BATCH = 65536
_MOST_JOBS = 256
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
    checking.add_argument(
        "--op",
        action="append",
        choices=tuple(op.name for op in OPS),
        help="an op to check; repeat for more (default: all)",
    )
    checking.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the work; compiling is most of it on a GPU (default: 1)",
    )
    checking.set_defaults(action=_check)

    _configure_compile(commands)
    _configure_tune(commands)
    commands.add_parser(
        "bench",
        help="run the benchmark suites of the ops here: the same as 'blnet bench kernels'",
    ).set_defaults(action=_bench)


def _configure_compile(commands: Any) -> None:
    compiling = commands.add_parser(
        "compile",
        help="compile every kernel without a GPU, with the rules' block sizes and the tables'; "
        "print registers and spills",
    )
    compiling.add_argument(
        "--target",
        action="append",
        choices=tuple(aot.TARGETS),
        help="an architecture to compile for; repeat for more (default: all)",
    )
    compiling.add_argument(
        "--kernel", default="", metavar="TEXT", help="only kernels whose name contains this"
    )
    compiling.add_argument(
        "--candidates", action="store_true", help="also every choice that 'tune' would measure"
    )
    compiling.set_defaults(action=_compile)


def _configure_tune(commands: Any) -> None:
    tuning = commands.add_parser(
        "tune",
        help="measure block sizes on this device, and write a table that the kernels then use; "
        "goes on from the table that is there",
    )
    add = tuning.add_argument
    add("--device", default="cuda", help="a CUDA or ROCm device (default: cuda)")
    add(
        "--op",
        action="append",
        metavar="NAME",
        help="kernels whose name begins so, such as 'merge'; repeat for more (default: all)",
    )
    add(
        "--dtype",
        action="append",
        choices=tuple(_DTYPES),
        help=f"repeat for more; float16 and bfloat16 share their entries (default: "
        f"{' '.join(tune.DTYPES)})",
    )
    add(
        "--batch",
        action="append",
        type=int,
        metavar="N",
        help="images in a batch; repeat for more. Give the batch that you will run (default: "
        f"{' '.join(map(str, tune.BATCHES))})",
    )
    add(
        "--output",
        metavar="FOLDER",
        help="where the table goes (default: where the kernels look for it, "
        "$BLNET_TABLES or ~/.cache/blnet/tables)",
    )
    add(
        "--budget",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="begin no further site after this; run it again to go on (default: no limit)",
    )
    add("--fresh", action="store_true", help="replace the table that is there")
    tuning.set_defaults(action=_tune)


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
    if device.type == "meta":
        raise ValueError("--device 'meta' cannot be used: it computes nothing")
    return device


def _check(args: argparse.Namespace) -> int:
    if not 1 <= args.jobs <= _MOST_JOBS:
        raise ValueError(f"--jobs must be from 1 to {_MOST_JOBS}, got {args.jobs}")
    device = _device(args.device)
    backend = choose_backend("check", torch.empty(1, device=device))
    print(f"checking backend {backend!r} on device {str(device)!r}, PyTorch {torch.__version__}")
    if backend == "torch":
        print("no kernel runs here; set TRITON_INTERPRET=1 to interpret the kernels on the CPU")
    header = f"{'op':<18} {'dtype':<9} {'layout':<14} {'max error':>10} {'relative':>10} "
    print(f"{header}{'eager':>10}  result  shape (why)")
    total = failed = 0
    ops = [op for op in OPS if op.name in args.op] if args.op else None
    dtypes = [_DTYPES[name] for name in args.dtype or _DTYPES]
    for row in check.check_all(str(device), dtypes, ops=ops, jobs=args.jobs):
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


def _chosen(target: str, text: str, with_candidates: bool) -> list[Specialization]:
    found = [*aot.specializations(), *aot.of_tables(target)]
    found += aot.of_candidates() if with_candidates else []
    return [item for item in found if text in item.name]


def _compile(args: argparse.Namespace) -> int:
    targets = args.target or list(aot.TARGETS)
    aot.check_ready(targets)
    chosen = {target: _chosen(target, args.kernel, args.candidates) for target in targets}
    if not any(chosen.values()):
        raise ValueError(f"--kernel {args.kernel!r}: no kernel's name contains it")
    columns = ("target", "registers", "shared", "spills", "matrix", "loads")
    print("{:<7} {:>9} {:>7} {:>7} {:>7} {:>7}  kernel".format(*columns))
    total = spilled = failed = 0
    for report in (r for target in targets for r in aot.compile_all([target], chosen[target])):
        total += 1
        spilled += report.spills > 0
        failed += report.fails
        loads = ",".join(str(width) for width in report.load_bytes)
        print(
            f"{report.target:<7} {report.registers:>9} {report.shared:>7} {report.spills:>7} "
            f"{report.matrix or 'no':>7} {loads:>7}  {report.name}",
            flush=True,
        )
    print(f"{total} kernels compiled, {spilled} with spills")
    return 1 if failed else 0


def _cuda_device(text: str) -> torch.device:
    """Return the CUDA or ROCm device of this name, which Triton must work on."""
    status = available_backends()["triton"]
    if not status.works:
        raise ValueError(f"tune needs a GPU, and {status.reason}; {status.advice}")
    device = _device(text)
    if device.type != "cuda":
        raise ValueError(f"--device {text!r}: tune needs a CUDA or ROCm device, such as 'cuda'")
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def _tune(args: argparse.Namespace) -> int:
    tunables = tune.chosen_tunables(args.op)
    batches = args.batch or tune.BATCHES
    if min(batches) < 1 or max(batches) > _LARGEST_BATCH:
        raise ValueError(f"--batch must be from 1 to {_LARGEST_BATCH}, got {args.batch}")
    if not args.budget > 0:
        raise ValueError(f"--budget must be above 0 seconds, got {args.budget:g}")
    device = _cuda_device(args.device)
    folder = Path(args.output) if args.output else tuning_tables.user_folder()
    if folder is None:
        raise ValueError("there is no home folder to keep a table in; name one with --output")
    name = torch.cuda.get_device_name(device)
    tuning_tables.prepare(folder)
    table = tune.begin(name, tune.architecture(device), folder, args.fresh)
    dtypes = [_DTYPES[dtype] for dtype in args.dtype or tune.DTYPES]
    work = list(tune.problems(tunables, dtypes, batches))
    path = folder / f"{tuning_tables.slug(name)}.json"
    print(f"tuning for {name} with PyTorch {table.torch}, Triton {table.triton}, into {path}")
    columns = ("kernel", "sizes", "rule (us)", "best (us)", "gain")
    print("{:<22} {:<44} {:>9} {:>9} {:>6}  kept".format(*columns), flush=True)
    with torch.cuda.device(device):
        left = tune.tune(table, folder, work, device, budget=args.budget, say=_say)
    known = sum(key in table.entries.get(tunable.name, {}) for tunable, _, _, key in work)
    print(f"{known} of {len(work)} sites are in {path}")
    if left:
        print("the budget is spent; run the same command again to go on")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _bench(args: argparse.Namespace) -> int:
    # The command line hands it on before it comes here: kernels may not import bench.
    raise ValueError("run the suites with 'blnet bench kernels'")
