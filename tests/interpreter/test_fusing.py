"""Whole networks on the fused kernels, in Triton's interpreter: agreement, tracing, processes."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

import blnet
from blnet.kernels import testing, use_backend

SMALL = blnet.BigLittleConfig(
    widths=(16, 32), depths=(3, 2), stem="small", stem_width=8, num_classes=5
)


# bL-ResNet-50's modules and lengths, narrower: the interpreter takes minutes for its widths.
NARROW_50 = blnet.BigLittleConfig(
    depths=(3, 4, 6, 3), widths=(16, 32, 64, 128), stem_width=8, num_classes=5
)


def network(config=SMALL, seed=2):
    # With seed 0 one sum of the last layer is within rounding of zero: float64 masks it otherwise.
    torch.manual_seed(seed)
    return initialised(blnet.BigLittleNet(config))


COUNT = 7


def initialised(model):
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.0)
            nn.init.normal_(part.running_mean, std=0.1)
    return model


def images(batch=3, size=9, dtype=torch.float32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def calls(model, x):
    """Return how often each op of the kernels runs in a forward pass."""
    with torch.profiler.profile() as profile:
        model(x)
    names = [event.name for event in profile.events()]
    ops = ("expand_merge", "expand_merge_train", "merge")
    return {op: names.count(f"blnet::{op}") for op in ops}


def trained(model, x, **autocast):
    """Return the output, all gradients and all buffers after one step's backward pass."""
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        out = model(x)
    out.float().square().sum().backward()
    results = {"out": out.detach()}
    results |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return results | {name: b.clone() for name, b in model.named_buffers()}


def truth_of(model, x):
    with use_backend("torch"):
        return trained(copy.deepcopy(model).double(), x.double())


def test_the_fused_ops_run_and_are_as_many_as_fusions_says():
    fused = blnet.fuse(network())
    count = sum(not fusion.reason for fusion in blnet.fusions(fused))
    assert (
        count == COUNT
    )  # conv3 of 1 + 1 + 1 blocks in the first stage and of 2 in the second, 1 merge
    assert calls(fused.train(), images()) == {
        "expand_merge": 0, "expand_merge_train": count, "merge": 0,
    }  # fmt: skip
    assert calls(fused.eval(), images()) == {
        "expand_merge": count, "expand_merge_train": 0, "merge": 0,
    }  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_agrees_with_float64(memory_format):
    model, x = network(), images()
    truth = truth_of(model, x)
    fused = blnet.fuse(model).to(memory_format=memory_format)
    ours = trained(fused, x.contiguous(memory_format=memory_format))
    for name, expected in truth.items():
        assert testing.relative_error(ours[name], expected) < 5e-5, name


def test_training_under_autocast_is_no_worse_than_eager():
    model, x = network(), images(8, 16)
    truth = truth_of(model, x)
    ours = trained(blnet.fuse(model), x, dtype=torch.bfloat16)
    with use_backend("torch"):
        eager = trained(copy.deepcopy(model), x, dtype=torch.bfloat16)

    def whole(results, kind):
        parts = [results[name].double().flatten() for name in truth if name.startswith(kind)]
        return torch.cat(parts)

    for kind in ("out", "d"):
        expected = whole(truth, kind)
        testing.assert_no_worse(whole(ours, kind), whole(eager, kind), expected, what=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluation_agrees_with_float64(dtype):
    model, x = network().eval(), images(8, 16, dtype)
    with torch.no_grad():
        low = copy.deepcopy(model).to(dtype)
        truth = copy.deepcopy(low).double().forward_features(x.double())
        ours = blnet.fuse(low).forward_features(x)
        with use_backend("torch"):
            eager = low.forward_features(x)
    if dtype is torch.float32:
        assert testing.relative_error(ours, truth) < 1e-5
    else:
        testing.assert_no_worse(ours, eager, truth)


@pytest.mark.parametrize("training", [False, True])
def test_a_whole_network_compiles_without_a_graph_break(training):
    fused = blnet.fuse(network(NARROW_50)).train(training)
    x = images(2, 64)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        expected, actual = fused(x), compiled(x)
    assert torch.equal(actual, expected)
    if not training:
        return
    actual.sum().backward()
    expected.sum().backward()
    for (name, got), plain in zip(compiled.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(got.grad, plain.grad, rtol=1e-4, atol=1e-5, msg=name)
    for got, plain in zip(compiled.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(got, plain)


def test_export_keeps_the_ops():
    fused = blnet.fuse(network()).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fused, (images(),), dynamic_shapes=({0: batch},))
    assert str(program.graph).count("torch.ops.blnet.expand_merge.default") == COUNT
    for n in (1, 3, 4):
        torch.testing.assert_close(program.module()(images(n)), fused(images(n)))


def test_gradient_checkpointing_gives_the_same_gradients():
    x = images()
    plain = trained(blnet.fuse(network()).eval(), x)
    fused = blnet.fuse(network()).eval()  # evaluation: replaying must not count a batch twice

    class Replayed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = fused

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    replayed = trained(Replayed(), x)
    for name in plain:
        wanted = f"dnet.{name[1:]}" if name.startswith("d") else name
        if wanted in replayed:
            assert torch.equal(plain[name], replayed[wanted]), name
    assert len(replayed) == len(plain)


def test_fewer_bytes_are_saved_for_backward():
    def saved(model):
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(images(8, 16))
        return sum(n for p, n in sizes.items() if p not in parameters), out

    plain, fused = saved(network())[0], saved(blnet.fuse(network()))[0]
    assert fused < 0.8 * plain


# Two processes -----------------------------------------------------------------------------------

SHARES = (slice(0, 2), slice(2, 4))


class Tail(nn.Module):
    """A block in which every BatchNorm is part of a fused pair: PyTorch's own sync needs a GPU."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 4, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(torch.relu(self.first(x)))) + x)


def tails():
    torch.manual_seed(0)
    return initialised(nn.Sequential(Tail(), Tail()))


def maps():
    return torch.randn(4, 8, 6, 5, generator=torch.Generator().manual_seed(3))


def one_step(model, x):
    model(x).square().sum().div(len(x)).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {name: b.clone() for name, b in model.named_buffers()}
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def averaged(results):
    """Average gradients over the processes, as DistributedDataParallel does by itself."""
    for name, tensor in results.items():
        if "running" not in name and "tracked" not in name:
            dist.all_reduce(tensor)
            tensor /= 2
    return results


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    fused, share = blnet.fuse(tails()), maps()[SHARES[rank]]
    # DistributedDataParallel refuses SyncBatchNorm on a CPU, so that one goes without it.
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fused))
    low = copy.deepcopy(synced)
    compiled = torch.compile(copy.deepcopy(synced), fullgraph=True, backend="aot_eager")
    results = {
        "ddp": one_step(nn.parallel.DistributedDataParallel(fused), share),
        "synced": averaged(one_step(synced, share)),
        "compiled": averaged(one_step(compiled, share)),
        "bfloat16": averaged(one_step(low.bfloat16(), share.bfloat16())),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Return what each of two processes has after one step."""
    root, folder = str(Path(__file__).parents[2]), str(tmp_path_factory.mktemp("processes"))
    if root not in sys.path:
        sys.path.append(root)  # the spawned processes import this file by its name below it
    mp.start_processes(work, (folder,), nprocs=2, start_method="spawn")
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


def test_ddp_averages_the_gradients(processes):
    with use_backend("torch"):
        alone = [one_step(tails().double(), maps()[share].double()) for share in SHARES]
    for results in processes:
        for name, _ in tails().named_parameters():
            expected = (alone[0][name] + alone[1][name]) / 2
            assert testing.relative_error(results["ddp"][name], expected) < 1e-5, name


@pytest.mark.parametrize("form", ["synced", "compiled"])
def test_shared_statistics_give_what_one_process_gives_for_all(processes, form):
    with use_backend("torch"):
        whole = one_step(tails().double(), maps().double())
    first, second = (results[form] for results in processes)
    assert {name.removeprefix("_orig_mod.") for name in first} == set(whole)
    for name in first:
        expected = whole[name.removeprefix("_orig_mod.")]
        assert torch.equal(first[name], second[name]), name
        assert testing.relative_error(first[name], expected) < 1e-5, name


def test_shared_statistics_in_16_bits(processes):
    with use_backend("torch"):
        whole = one_step(tails().bfloat16().double(), maps().bfloat16().double())
    got, expected = (
        torch.cat([results[name].double().flatten() for name in whole])
        for results in (processes[0]["bfloat16"], whole)
    )
    assert testing.relative_error(got, expected) < 1.6e-2  # bfloat16's
