"""Folded networks on the fused inference ops, in Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import blnet
from blnet.kernels import use_backend
from blnet.optimizing.choosing import difference
from blnet.optimizing.folding import fold_batch_norms
from blnet.optimizing.fused_ops import FusedBottleneck, FusedPool, with_fused_ops

SMALL = blnet.BigLittleConfig(
    depths=(2, 2), widths=(32, 64), stem_width=16, num_classes=5, alpha=2, beta=2
)


def big_little() -> nn.Module:
    return blnet.BigLittleNet(SMALL)


def plain() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 0, 0, 0], 5)


def lived_in(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def folded(model: nn.Module) -> nn.Module:
    own = copy.deepcopy(model)
    fold_batch_norms(own)
    return own


def images(size: tuple[int, int] = (17, 13)) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_network_on_the_ops_agrees_with_float64(dtype: torch.dtype) -> None:
    model = lived_in(big_little())
    exact = copy.deepcopy(model).double()(images().double())
    network = folded(model).to(dtype)
    fused, changes = with_fused_ops(network)
    x = images().to(dtype)
    with use_backend("torch"):
        eager = difference(model.to(dtype)(x), exact)
    with use_backend("interpret"):
        error = difference(fused(x), exact)
    # As good as eager PyTorch in the same precision, which rounds after every layer.
    assert error <= (1e-5 if dtype == torch.float32 else 1.25 * eager)
    kinds = [type(m) for m in fused.modules()]
    assert FusedPool in kinds
    assert FusedBottleneck in kinds
    ops = {change.now for change in changes}
    assert {"the op stem", "the op bottleneck", "the op expand_merge"} <= ops
    assert not any(isinstance(m, FusedBottleneck | FusedPool) for m in network.modules())


@torch.no_grad()
def test_torchvisions_bottleneck_runs_as_one_op() -> None:
    model = lived_in(plain())
    fused, changes = with_fused_ops(folded(model))
    assert [c.layer for c in changes if c.now == "the op bottleneck"] == ["layer1.0"]
    with use_backend("interpret"):
        assert difference(fused(images()), model(images())) < 1e-5


@torch.no_grad()
def test_the_kernels_are_an_engine_of_optimize() -> None:
    model = lived_in(big_little())
    with use_backend("interpret"):
        fast = blnet.optimize(model, example_input=images(), engine="kernels", seconds=200)
        assert fast.report.engine == "kernels"
        assert difference(fast(images()), model(images())) < 1e-5
    assert any(change.now == "the op stem" for change in fast.report.changes)


def test_what_the_ops_do_not_take_is_left() -> None:
    wide = lived_in(blnet.BigLittleNet(blnet.BigLittleConfig(depths=(2, 2), widths=(1024, 2048))))
    strided = lived_in(big_little())
    unfolded, _ = with_fused_ops(strided)
    assert not any(isinstance(m, FusedBottleneck | FusedPool) for m in unfolded.modules())
    fused, _ = with_fused_ops(folded(wide))
    blocks = [m for m in fused.modules() if isinstance(m, FusedBottleneck)]
    assert all(m.conv2.in_channels <= 128 for m in blocks)
    watched = folded(strided)
    watched.stages[0].branches[0][0].register_forward_hook(lambda *_: None)
    fused, _ = with_fused_ops(watched)
    assert not isinstance(fused.stages[0].branches[0][0], FusedBottleneck)


def changed(what: str) -> nn.Module:
    network = lived_in(big_little())
    pool = network.stem.pool
    block = network.stages[0].branches[0][0]
    places = {"pool": (pool.fusion, 2), "pool inside": (pool.little, 5), "block": (block, "relu")}
    if what in places:
        parent, name = places[what]
        parent._modules[str(name)] = nn.SiLU()
    else:
        watched = {"hook on pool": pool, "hook on fusion": pool.fusion, "hook on relu": block.relu}
        watched[what].register_forward_hook(lambda *arguments: 2 * arguments[2])
    return network.eval()


@pytest.mark.parametrize(
    "what",
    ["pool", "pool inside", "block", "hook on pool", "hook on fusion", "hook on relu"],
)
def test_other_activations_and_hooks_stay(what: str) -> None:
    network = changed(what)
    fused, _ = with_fused_ops(folded(network))
    assert difference(fused(images()), network(images())) < 1e-5
