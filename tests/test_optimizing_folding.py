"""Batch norms are folded where that is right, and left with a reason where it is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import blnet
from blnet.optimizing.folding import fold_batch_norms
from blnet.optimizing.report import Change
from blnet.vision.models import bl_resnet18, bl_seresnext50_32x4d


def lived_in(model: nn.Module) -> nn.Module:
    """Give batch norms the statistics and weights of a network that was trained, more or less."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval().double()


def folded(model: nn.Module) -> tuple[nn.Module, list[Change]]:
    own = copy.deepcopy(model)
    return own, fold_batch_norms(own)


def error(model: nn.Module, other: nn.Module, *sizes: tuple[int, ...]) -> float:
    torch.manual_seed(2)
    worst = 0.0
    with torch.no_grad():
        for size in sizes:
            x = torch.randn(size, dtype=torch.float64)
            right = model(x)
            worst = max(worst, float((other(x) - right).norm() / right.norm()))
    return worst


NETWORKS = {
    "bl_resnet18": lambda: bl_resnet18(alpha=2, beta=4, num_classes=10),
    "bl_seresnext50": lambda: bl_seresnext50_32x4d(alpha=2, beta=4, num_classes=10),
    "torchvision": lambda: torchvision.models.resnet50(num_classes=10),
    "converted": lambda: blnet.convert(torchvision.models.resnet18(), alpha=2, beta=2),
    "fused before": lambda: blnet.unfuse(blnet.fuse(bl_resnet18(alpha=2, beta=4))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_norm_is_folded_and_nothing_changes(name: str) -> None:
    model = lived_in(NETWORKS[name]())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    own, changes = folded(model)
    assert changes
    assert all(change.now for change in changes)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in own.modules())
    assert error(model, own, (2, 3, 65, 47)) < 1e-12
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_timms_deep_stem_and_average_shortcuts_are_folded() -> None:
    timm = pytest.importorskip("timm")
    model = lived_in(timm.create_model("resnet26d", num_classes=10))
    own, changes = folded(model)
    assert [change for change in changes if not change.now] == []
    assert error(model, own, (2, 3, 64, 64)) < 1e-12


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnetv2_50"])
def test_timms_norms_with_activations_keep_them(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = lived_in(timm.create_model(name, num_classes=10))
    own, changes = folded(model)
    assert sum(bool(change.now) for change in changes) > 0.6 * len(changes)
    assert error(model, own, (1, 3, 64, 64)) < 1e-12


def test_timms_frozen_norms_are_folded() -> None:
    timm = pytest.importorskip("timm")
    model = lived_in(timm.create_model("efficientnet_b0", num_classes=10))
    own, changes = folded(timm.layers.freeze_batch_norm_2d(model).eval())
    assert {type(layer).__name__ for layer in model.modules()} >= {"FrozenBatchNormAct2d"}
    assert all(change.now for change in changes)
    assert len(changes) == 49
    assert error(model, own, (1, 3, 64, 64)) < 1e-12


def test_a_change_names_both_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    (change,) = fold_batch_norms(model)
    assert str(change) == "1 (BatchNorm2d): folded into 0"
    assert model[0].bias is not None


def test_a_bias_is_kept_and_a_norm_without_weights_folded() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4, affine=False)))
    own, changes = folded(model)
    assert changes[0].now
    assert error(model, own, (2, 3, 8, 8)) < 1e-14


class Twice(nn.Module):
    """Uses a convolution's result beside its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Again(Twice):
    """Calls the same two layers twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


class Gated(Twice):
    """Has something between the two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.relu(self.conv(x)))


class Activated(nn.BatchNorm2d):
    """A user's normalisation, which does more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).abs()


class Renamed(nn.BatchNorm2d):
    """A user's normalisation, which does no more."""


class Taps(nn.Module):
    """Calls the layers of a Sequential one by one and keeps what is between, as losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for layer in self.features[0]:
            x = layer(x)
            kept.append(x)
        return torch.cat(kept, 1)


class Untraceable(Taps):
    """Calls the whole, by code that asks for values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x) if x.sum() > -1e9 else x


class Plain(Twice):
    """Calls one after the other and nothing else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class ReachesIn(nn.Module):
    """Calls a block, and a layer within it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + self.block.conv(x)


class Borrows(ReachesIn):
    """Calls a block, and uses the weight of a layer within it as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + nn.functional.conv2d(x, self.block.conv.weight)


class Listed(nn.Module):
    """Calls Sequentials within a Sequential and in a list, whole."""

    def __init__(self) -> None:
        super().__init__()
        self.nested = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
        self.list = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in (*self.nested, *self.list):
            x = part(x)
        return x


def shared() -> nn.Module:
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), conv)


def watched() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda *_: None)
    return model


def normalised() -> nn.Module:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    return nn.Sequential(conv, nn.BatchNorm2d(3))


class FrozenBatchNorm2d(nn.Module):
    """One of another library: no eps that is told, and it is not added to the variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 2.0), ("bias", 1.0), ("running_mean", 3.0),
                            ("running_var", 0.5)):  # fmt: skip
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight / (self.running_var.sqrt() + 0.1)
        return (x - self.running_mean[:, None, None]) * scale[:, None, None] + 1


LEFT = {
    "result used twice": (Twice, "no convolution alone"),
    "called twice": (Again, "no convolution alone"),
    "ReLU between": (Gated, "no convolution alone"),
    "first of all": (lambda: nn.Sequential(nn.BatchNorm2d(3)), "no convolution alone"),
    "shared": (shared, "several places"),
    "hooks": (watched, "hooks"),
    "layers of a Sequential used apart": (Taps, "called one by one"),
    "a layer of a block used by its parent": (ReachesIn, "the code of ReachesIn calls a layer"),
    "a weight of a block used by its parent": (Borrows, "the code of Borrows calls a layer"),
    "no trace": (Untraceable, "Untraceable, which calls it, could not be traced"),
    "frozen by another library": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), FrozenBatchNorm2d(3)),
        "a forward of its own",
    ),
    "a forward of its own": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Activated(3)),
        "a forward of its own",
    ),
    "computed weight": (normalised, "no convolution alone|computed anew"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        "statistics of the batch",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_is_left_and_says_why(name: str) -> None:
    make, reason = LEFT[name]
    model = lived_in(make())
    own, (change,) = folded(model)
    assert change.now == ""
    assert any(part in change.reason for part in reason.split("|"))
    assert error(model, own, (4, 3, 5, 5)) < 1e-14


def test_a_hook_before_the_convolution_stays() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))
    model[0].register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    own, (change,) = folded(model)
    assert change.now
    assert error(model, own, (2, 3, 8, 8)) < 1e-14


@pytest.mark.parametrize("make", [Listed, lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Renamed(3))])
def test_what_does_no_more_is_folded(make: Any) -> None:
    model = lived_in(make())
    own, changes = folded(model)
    assert all(change.now for change in changes)
    assert error(model, own, (2, 3, 5, 5)) < 1e-14


def test_an_example_bears_out_what_cannot_be_traced() -> None:
    model = lived_in(Untraceable())
    (change,) = fold_batch_norms(model, checked=True)
    assert change.now


def test_torchvisions_frozen_norms_are_folded() -> None:
    norm = torchvision.ops.FrozenBatchNorm2d(3, eps=0.5)
    norm.running_mean.fill_(2)
    norm.running_var.fill_(0.25)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm).eval().double()
    own, (change,) = folded(model)
    assert change.now
    assert error(model, own, (2, 3, 5, 5)) < 1e-14
