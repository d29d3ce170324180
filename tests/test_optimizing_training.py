"""Optimising for training: the same network and gradients, fewer bytes kept for backward."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import blnet
from blnet.activations import activation_bytes, bytes_an_image, saved_bytes
from blnet.fusing import Fused
from blnet.optimizing.training import Optimized, optimize_training, training_report
from blnet.recomputing import recomputing
from blnet.vision import bl_resnet18, bl_resnet50

TINY = blnet.BigLittleConfig(widths=(16, 32), depths=(3, 2), stem_width=8, num_classes=5)


def network(seed: int = 0, config: blnet.BigLittleConfig = TINY) -> nn.Module:
    torch.manual_seed(seed)
    model = blnet.BigLittleNet(config)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.0)
            nn.init.normal_(part.bias, std=0.2)
    return model


def images(batch: int = 4, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output, all gradients and all buffers after one forward and backward pass."""
    out = model(x)
    out.float().square().sum().backward()
    found = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **found, **{n: b.clone() for n, b in model.named_buffers()}}


def check_same(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """Assert that a network optimised trains to the same bits, and return it."""
    ours = optimize_training(model, **options)
    expected, found = trained(copy.deepcopy(model), x), trained(ours, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    return ours


# The same network ---------------------------------------------------------------------------------


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "ours": network,
    "basic blocks": lambda: bl_resnet18(num_classes=5),
    "torchvision": lambda: torchvision.models.resnet50(num_classes=5),
    "timm": lambda: timm.create_model("resnet26", num_classes=5),
    "functional": lambda: Functional(),
}


class Functional(nn.Module):
    """A network without modules for its ReLUs, some in place, whose maps have several readers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.conv3, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.norm1(self.conv1(x)))
        b = self.norm2(self.conv2(a)).relu_()
        c = self.conv3(a) * b + F.silu(self.norm1(b))
        out: Tensor = self.head(c.mean((2, 3)))
        return out


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_bits_keys_and_statistics_are_the_plain_networks(name: str, recompute: bool) -> None:
    torch.manual_seed(0)
    model, x = MAKERS[name](), images(2)
    ours = check_same(model, x, recompute=recompute)
    assert list(ours.state_dict()) == list(model.state_dict())
    assert isinstance(ours, type(model))
    assert not any(isinstance(part, Optimized) for part in model.modules())
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), model.eval()(x))
        assert torch.equal(ours.train()(x), model.train()(x))
    if recompute:
        assert saved_bytes(ours, x) < saved_bytes(model, x)


@settings(max_examples=8, deadline=None)
@given(batch=st.integers(2, 4), height=st.integers(20, 33), width=st.integers(20, 33))
def test_gradients_in_float64(batch: int, height: int, width: int) -> None:
    model = network().double()
    x = torch.randn(batch, 3, height, width, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (found,) = torch.autograd.grad(optimize_training(model, recompute=True)(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast(recompute: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check_same(network(), images(), recompute=recompute)


def test_frozen_norms_and_weights() -> None:
    model = network()
    for part in list(model.modules())[::3]:
        part.eval()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    check_same(model, images(), recompute=True)


def test_second_backward_and_double_backward() -> None:
    model, x = Functional().double(), images().double().requires_grad_()
    results = []
    for one in (model, optimize_training(model, recompute=True)):
        out = one(x).square().sum()
        (first,) = torch.autograd.grad(out, x, retain_graph=True)
        (again,) = torch.autograd.grad(out, x, retain_graph=True)
        (once_more,) = torch.autograd.grad(out, x, create_graph=True)
        (second,) = torch.autograd.grad(once_more.square().sum(), x)
        assert torch.equal(first, again)
        results.append((first, second))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# Copies, processes, compilers ---------------------------------------------------------------------


AGAIN: list[Callable[[nn.Module], nn.Module]] = [
    copy.deepcopy,
    copy.copy,
    lambda m: pickle.loads(pickle.dumps(m)),  # type: ignore[no-any-return]
    lambda m: ModelEmaV3(m).module,  # type: ignore[no-any-return]
    lambda m: optimize_training(m, recompute=True),
]


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("make", [network, lambda: blnet.convert(torchvision.models.resnet18())])
def test_copies_stay_optimised(
    again: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module]
) -> None:
    ours, x = optimize_training(make(), recompute=True), images(2)
    twin = again(ours).train()
    assert isinstance(twin, Optimized)
    assert [type(p).__name__ for p in twin.modules()] == [type(p).__name__ for p in ours.modules()]
    for module in twin.modules():
        module.requires_grad_(True)
    assert saved_bytes(twin, x) == saved_bytes(ours, x)
    assert inspect.signature(twin.forward) == inspect.signature(make().forward)


def test_a_block_is_a_network_too() -> None:
    block = torchvision.models.resnet.Bottleneck(64, 16)
    ours = check_same(block, torch.randn(2, 64, 5, 5), recompute=True)
    assert isinstance(ours, Fused)
    twin = pickle.loads(pickle.dumps(ours))
    assert isinstance(twin, Fused)
    assert isinstance(twin, Optimized)
    ours.scale = 2.0  # its own code may ask for it
    assert not isinstance(ours, Fused)
    again = optimize_training(twin, without=["expand_merge"])
    assert not isinstance(again, Fused)


def test_activation_checkpointing_around_and_inside() -> None:
    model, x = network(), images()
    ours, plain = optimize_training(model, recompute=True), copy.deepcopy(model)
    for one in (plain, ours):
        checkpoint(one, x, use_reentrant=False).square().sum().backward()
    for (name, found), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), name
    with torch.autograd.graph.save_on_cpu():
        check_same(model, x, recompute=True)


@pytest.mark.parametrize("options", [{"recompute": True}, {"without": ("merge",)}])
def test_compiled_whole(options: dict[str, Any]) -> None:
    model, x = network(), images()
    ours = optimize_training(model, **options)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for one in (compiled, model):
        one(x).square().sum().backward()
    for (name, found), expected in zip(ours.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=name)


def _one_of_two(rank: int, path: str, queue: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    found = []
    for recompute in (False, True):
        ours = optimize_training(network(), recompute=recompute)
        ddp = nn.parallel.DistributedDataParallel(ours)
        ddp(images()[2 * rank : 2 * rank + 2]).square().sum().backward()
        found.append([p.grad.numpy() for p in ours.parameters() if p.grad is not None])
    queue.put((rank, found))
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    queue = context.Queue()
    arguments = (str(tmp_path / "meet"), queue)
    processes = [context.Process(target=_one_of_two, args=(r, *arguments)) for r in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
    assert len(results[0][0]) > 10
    for plain, ours, other in zip(*results[0], results[1][1], strict=True):
        assert (plain == ours).all()
        assert (ours == other).all()


# What is kept -------------------------------------------------------------------------------------


def test_saved_bytes_of_a_small_run() -> None:
    conv, norm, x = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), torch.zeros(2, 3, 5, 5)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(4, 1, 1))
    statistics, map_bytes = 4 * 4 * 2, 2 * 4 * 25 * 4
    assert (
        saved_bytes(model, x) == statistics + 2 * map_bytes
    )  # the norm's input, the ReLU's output
    assert saved_bytes(optimize_training(model, recompute=True), x) == statistics + map_bytes
    assert saved_bytes(lambda: model(x), apart=(model,)) == statistics + 2 * map_bytes + x.nbytes
    with torch.no_grad():
        assert saved_bytes(model, x) == 0


# ../shared/limits.md counts one image and the image itself.
@pytest.mark.parametrize(
    ("make", "megabytes"),
    [
        (torchvision.models.resnet50, 86.1),
        (lambda: bl_resnet50(alpha=2, beta=4), 63.3),
        (lambda: bl_resnet50(alpha=4, beta=4), 56.0),
    ],
)
def test_the_networks_of_the_paper_keep_what_was_counted(
    make: Callable[[], nn.Module], megabytes: float
) -> None:
    image = 3 * 224 * 224 * 4
    model = make()
    assert (activation_bytes(model, device="cpu") + image) / 1e6 == pytest.approx(
        megabytes, abs=0.05
    )


def test_counting_without_running_is_exact() -> None:
    model, x = network(), images(3)
    for options in ({}, {"recompute": True}):
        ours = optimize_training(model, **options)  # type: ignore[arg-type]
        assert activation_bytes(ours, tuple(x.shape), device="cpu") == saved_bytes(ours, x)
        with torch.autocast("cpu", torch.bfloat16):
            runs = [saved_bytes(ours, images(batch)) for batch in (2, 4)]
        half = bytes_an_image(ours, x.shape, dtype=torch.bfloat16, device="cpu")
        assert half == (runs[1] - runs[0]) // 2
        assert not torch.is_autocast_enabled("cuda")
    with pytest.raises(ValueError, match=r"does not take an input of size \(1, 4, 8, 8\)"):
        activation_bytes(model, (1, 4, 8, 8))


def test_shares_that_fused_ops_and_recomputing_save() -> None:
    model = bl_resnet50(alpha=2, beta=4)
    plain = bytes_an_image(model, device="cpu")
    fused = bytes_an_image(optimize_training(model))
    both = bytes_an_image(optimize_training(model, recompute=True))
    alone = bytes_an_image(optimize_training(model, recompute=True), device="cpu")
    assert 1 - fused / plain == pytest.approx(0.260, abs=0.001)
    assert 1 - both / plain == pytest.approx(0.472, abs=0.001)
    assert 1 - alone / plain == pytest.approx(0.211, abs=0.001)


def test_changes_in_place() -> None:
    conv, norm, after = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    x = torch.randn(2, 3, 5, 5)
    results = []
    for way in (torch.enable_grad(), recomputing()):
        with way:
            a = torch.relu(norm(conv(x))) * 1.0
            b = norm(conv(x))
            out = after(b.add_(1).relu_()) + after(a)  # no longer norm's result
        gradients = torch.autograd.grad(out.square().sum(), (conv.weight, after.weight))
        results.append(torch.cat([g.flatten() for g in gradients]))
    assert torch.equal(*results)
    with recomputing():
        y = conv(x)
        out = after(torch.relu(norm(y)))
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# Choices, training, the report --------------------------------------------------------------------


def test_unknown_ops_are_refused() -> None:
    for without in (["merges"], "merges"):
        with pytest.raises(ValueError, match="no training op 'merges'; choose from 'expand_merge'"):
            optimize_training(network(), without=without)
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got str"):
        optimize_training("bl_resnet50")  # type: ignore[arg-type]


def test_the_report_names_what_was_replaced_and_what_was_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(network(config=TINY), nn.Unflatten(1, (5, 1)), nn.GroupNorm(1, 5))
    done = {c.layer: c for c in training_report(optimize_training(model, recompute=True)).changes}
    assert done["0.stages.0"].now.startswith("expand_merge")
    assert done["0.stem.bn1"].now.startswith("recomputed")
    assert done["2"].reason == "only batch normalisation is recomputed"
    off = training_report(optimize_training(model, without=["expand_merge"])).changes
    assert "switched off" in next(c for c in off if c.layer == "0.stages.0").reason
    basic = optimize_training(bl_resnet18(num_classes=2), without=["merge"])
    assert any(
        c.reason == "merge is switched off by without" for c in training_report(basic).changes
    )
    assert all("not optimised" in c.reason for c in training_report(network()).changes if c.reason)
    basic.explain()  # type: ignore[operator]
    assert "BigLittleNet, train, float32 on cpu" in capsys.readouterr().out


def losses(seed: int, **options: Any) -> Tensor:
    model = network(seed)
    if options:
        model = optimize_training(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    draw = torch.Generator().manual_seed(seed)
    x, target = torch.randn(64, 3, 24, 24, generator=draw), torch.arange(64) % 5
    found = []
    for step in range(50):
        part = slice(step % 4 * 16, step % 4 * 16 + 16)
        loss = F.cross_entropy(model(x[part]), target[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def test_fifty_steps_go_as_the_plain_networks() -> None:
    plain, other = losses(0), losses(1)
    ours = losses(0, recompute=True)
    assert (ours - plain).abs().mean() <= (other - plain).abs().mean()
    assert torch.equal(ours, plain)  # on a CPU every bit
    assert plain[-1] < plain[0]
