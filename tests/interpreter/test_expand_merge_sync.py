"""expand_merge over two processes: SyncBatchNorm's semantics, on the kernels and in plain PyTorch.

Two processes with unequal shares of a batch must give what one process gives for the whole batch.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from blnet.kernels import expand_merge_train, testing, use_backend

SHARES = (slice(0, 1), slice(1, 4))
SHAPE = testing.ExpandShape(4, 6, 10, 6, 7, 3, 4, "split into one image and three")


def tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = testing.expand_merge_inputs(SHAPE, generator=generator, offset=5.0)
    x = tensors[0].clone()
    x[SHARES[0]] *= 2  # the shares differ in mean and variance
    grad = torch.randn(SHAPE.out, generator=generator)
    return (x, *tensors[1:]), grad


def run(share, group):
    (x, weight, gamma, beta, big), grad = tensors()
    x, big, grad = x[share], big[share], grad[share]
    leaves = [t.clone().requires_grad_() for t in (x, weight, gamma, beta, big)]
    running = [torch.zeros(SHAPE.c), torch.ones(SHAPE.c)]
    out = expand_merge_train(*leaves[:4], *running, 0.3, 1e-5, leaves[4], process_group=group)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad), *running]


def work(rank, backend, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    with use_backend(backend):
        torch.save(run(SHARES[rank], dist.group.WORLD), f"{folder}/{rank}.pt")
    # Gloo aborts a process whose peer has closed its sockets while it is still at work.
    dist.barrier()
    dist.destroy_process_group()


BACKENDS = ("interpret", "torch")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what each process has, by backend."""
    found = {}
    # The spawned processes import this file by its name below the repository's root.
    root = str(Path(__file__).parents[2])
    if root not in sys.path:
        sys.path.append(root)
    for backend in BACKENDS:
        folder = tmp_path_factory.mktemp(backend)
        mp.start_processes(work, (backend, str(folder)), nprocs=2, start_method="spawn")
        found[backend] = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_give_what_one_gives_for_the_whole_batch(backend, results):
    first, second = results[backend]
    with use_backend("torch"):
        whole = run(slice(0, 4), None)
    names = ("out", "x", "weight", "gamma", "beta", "big", "mean", "variance")
    for name, one, two, expected in zip(names, first, second, whole, strict=True):
        if name in ("out", "x", "big"):
            merged = torch.cat([one, two])
        elif name in ("weight", "gamma", "beta"):
            merged = one + two  # DistributedDataParallel averages what each process has
            assert testing.relative_error(one, expected) > 0.1
        else:
            merged = one
            assert torch.equal(one, two)
        assert testing.relative_error(merged, expected) < 1e-5, name


def test_each_share_of_the_weight_gradient_is_that_of_its_own_pixels(results):
    # The two backends compute it in entirely different ways.
    for ours, plain in zip(results["interpret"], results["torch"], strict=True):
        for got, expected in zip(ours, plain, strict=True):
            assert testing.relative_error(got, expected) < 2e-5
