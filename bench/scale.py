"""What sharing gradients costs: a training step of several processes, with and without it.

    torchrun --nproc-per-node 2 -m blnet.bench.scale --models resnet50 bl_resnet50 --json scale.json

Times three things on every process and prints the first one's: a step whose gradients stay where
they are (DDP's `no_sync`), a step that shares them while backward still runs, and the exchange of
as many bytes alone. What the second takes longer than the first is the exchange that backward does
not hide. The three take turns, round by round; times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from blnet.bench.networks import known
from blnet.bench.results import write_text
from blnet.environment import collect, command_line
from blnet.wording import counted


@dataclass(frozen=True)
class Sharing:
    """A network's training step among several processes.

    Attributes:
        network: its name.
        processes: how many take part.
        gradient_bytes: of its gradients, on each process.
        alone: seconds of a step that shares nothing.
        shared: seconds of a step that shares its gradients.
        exchange: seconds of exchanging as many bytes with nothing else going on.
    """

    network: str
    processes: int
    gradient_bytes: int
    alone: float
    shared: float
    exchange: float

    @property
    def hidden(self) -> float:
        """The share of the exchange that backward hides, 0 to 1."""
        return min(1.0, max(0.0, 1 - (self.shared - self.alone) / self.exchange))


def measure(name: str, batch: int, size: int, rounds: int) -> Sharing:
    """Measure a network's step; a process group must be there.

    Args:
        name: as `blnet.registry` knows it.
        batch: images of each process.
        size: height and width of the images, pixels.
        rounds: how often each of the three is timed, after once that is not.
    """
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    plain: nn.Module = known().build(name).to(device)
    model = DistributedDataParallel(plain, device_ids=[device] if on_gpu else None)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.arange(batch, device=device)
    elements = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    gradients = torch.zeros(elements, device=device)

    def shared() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()

    def alone() -> None:
        with model.no_sync():
            shared()

    def exchange() -> None:
        dist.all_reduce(gradients)

    times: list[list[float]] = [[], [], []]
    for _ in range(rounds + 1):
        for found, call in zip(times, (alone, shared, exchange), strict=True):
            found.append(_timed(call, on_gpu))
    medians = [statistics.median(found[1:]) for found in times]
    return Sharing(name, dist.get_world_size(), elements * gradients.element_size(), *medians)


def _timed(call: Callable[[], None], on_gpu: bool) -> float:
    """Return the seconds of a call that all processes begin together."""
    dist.barrier()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def text(found: Sequence[Sharing]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        "| network | processes | gradients, MB | step alone, ms | step sharing, ms | "
        "exchange alone, ms | hidden |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.network} | {s.processes} | {s.gradient_bytes / 1e6:.1f} | {1e3 * s.alone:.1f} | "
        f"{1e3 * s.shared:.1f} | {1e3 * s.exchange:.1f} | {s.hidden:.0%} |"
        for s in found
    ]
    return "\n".join(lines)


def _record(args: argparse.Namespace, found: Sequence[Sharing]) -> dict[str, Any]:
    """Return the measurements with all that one needs to measure them again, fit for JSON."""
    return {
        "command": command_line(),
        **{name: getattr(args, name) for name in ("batch", "size", "rounds")},
        "backend": dist.get_backend(),
        "environment": collect().as_dict(),
        "networks": [asdict(sharing) for sharing in found],
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure the networks that the words name, as one of torchrun's processes."""
    parser = argparse.ArgumentParser(prog="blnet.bench.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet50", "bl_resnet50"], metavar="NAME")
    parser.add_argument("--batch", type=int, default=8, help="images of each process")
    parser.add_argument("--size", type=int, default=224, help="of the images, pixels")
    parser.add_argument("--rounds", type=int, default=10, help="how often each step is timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go as well")
    args = parser.parse_args(words)
    if not dist.is_torchelastic_launched():
        parser.error("it needs several processes; start it with torchrun --nproc-per-node 2 -m ...")
    # Named, as torch tells the backend of a group only where one was asked for.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
    found = [measure(name, args.batch, args.size, args.rounds) for name in args.models]
    if dist.get_rank() == 0:
        environment = collect()
        print(
            f"{environment.device}, {counted(environment.threads, 'thread')} and "
            f"{counted(args.batch, 'image')} of {args.size}x{args.size} pixels a process, medians "
            f"of {counted(args.rounds, 'round')}:\n"
        )
        print(text(found))
        if args.json:
            write_text(args.json, json.dumps(_record(args, found), indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
