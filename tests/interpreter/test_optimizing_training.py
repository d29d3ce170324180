"""Networks optimised for training on the fused ops, in Triton's interpreter."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import blnet
from blnet.activations import activation_bytes, bytes_an_image, saved_bytes
from blnet.kernels import testing, use_backend
from blnet.optimizing.training import optimize_training

SMALL = blnet.BigLittleConfig(
    widths=(16, 32), depths=(3, 2), stem="small", stem_width=8, num_classes=5
)
BASIC = blnet.BigLittleConfig(
    block="basic", widths=(8, 16), depths=(2, 2), stem="small", stem_width=8, num_classes=5
)


def network(config=SMALL, seed=2):
    torch.manual_seed(seed)
    model = blnet.BigLittleNet(config)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.0)
    return model


def images(batch=3, size=9):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(model, x):
    out = model(x)
    out.float().square().sum().backward()
    found = {"out": out.detach()} | {f"d{n}": p.grad for n, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def calls(model, x):
    with torch.profiler.profile() as profile:
        model(x)
    names = [event.name for event in profile.events()]
    return [names.count(f"blnet::{op}") for op in ("expand_merge_train", "merge")]


def test_recomputing_changes_no_bit_and_fused_ops_agree_with_float64():
    model, x = network(), images()
    fused = trained(optimize_training(model), x)
    both = trained(optimize_training(model, recompute=True), x)
    with use_backend("torch"):
        truth = trained(copy.deepcopy(model).double(), x.double())
    for name, expected in truth.items():
        assert torch.equal(fused[name], both[name]), name
        assert testing.relative_error(both[name], expected) < 5e-5, name


def test_recomputing_under_autocast_and_checkpointing():
    model, x = network(), images()
    ours = [optimize_training(model, recompute=choice) for choice in (False, True)]
    with torch.autocast("cpu", torch.bfloat16):
        plain, recomputed = (trained(one, x) for one in ours)
    for name, expected in plain.items():
        assert torch.equal(recomputed[name], expected), name
    ours = [optimize_training(model, recompute=choice) for choice in (False, True)]
    for one in ours:
        checkpoint(one, x, use_reentrant=False).square().sum().backward()
    for one, other in zip(*(list(o.parameters()) for o in ours), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    ("config", "without", "expected"),
    [
        (SMALL, (), [7, 0]),
        (SMALL, ("expand_merge",), [0, 6]),
        (BASIC, ("merge", "expand_merge"), [0, 0]),
        (BASIC, (), [1, 5]),
        (BASIC, ("merge",), [1, 0]),
    ],
)
def test_ops_are_switched_off_one_by_one_for_one_network(config, without, expected):
    model, x = network(config), images()
    ours, other = optimize_training(model, without=without), optimize_training(model)
    assert calls(ours, x) == expected
    assert testing.relative_error(ours(x), other(x)) < 1e-4


def test_a_compiled_network_keeps_an_op_switched_off():
    ours = optimize_training(network(BASIC), without=("merge",), recompute=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    compiled(images())
    assert calls(compiled, images()) == [1, 0]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_fused_ops_keep_is_what_is_counted_without_running(recompute):
    ours = optimize_training(network(), recompute=recompute)
    run = [saved_bytes(ours, images(batch)) for batch in (2, 4)]
    counted = [activation_bytes(ours, (batch, 3, 9, 9), device="cpu") for batch in (2, 4)]
    assert run == counted


def test_shares_of_the_plain_network():
    config = blnet.BigLittleConfig(alpha=2, beta=4)  # bL-ResNet-50
    model = blnet.BigLittleNet(config)
    with use_backend("torch"):
        plain = bytes_an_image(model, device="cpu")
    fused = bytes_an_image(optimize_training(model), device="cpu")
    both = bytes_an_image(optimize_training(model, recompute=True), device="cpu")
    assert fused <= 0.75 * plain
    assert both <= 0.65 * plain


class Block(nn.Module):
    """One fused op: the interpreter takes a second for a step of a small network."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.down, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 4)

    def forward(self, x):
        residual = self.bn3(self.conv3(torch.relu(self.bn1(self.conv1(x)))))
        return self.head(torch.relu(residual + self.down(x)).mean((2, 3)))


def test_losses_stay_within_the_spread_of_two_seeds():
    def losses(seed, **options):
        torch.manual_seed(seed)
        model = Block()
        model = optimize_training(model, **options) if options else model
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        found = []
        for _ in range(50):
            loss = nn.functional.cross_entropy(model(images(4, 4)), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    with use_backend("torch"):
        plain, other = losses(2), losses(3)
    ours = losses(2, recompute=True)
    assert (ours - plain).abs().mean() <= (other - plain).abs().mean()
    assert plain[-1] < plain[0]
