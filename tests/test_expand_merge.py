"""The ExpandMerge module: 1x1 convolution, BatchNorm, upsampling, add and ReLU as one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blnet
from blnet.expand_merge import conv_norm_merge, why_not_fusable
from blnet.kernels import reference


def layers(**options: object) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(12, **options)  # type: ignore[arg-type]
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return nn.Conv2d(4, 12, 1, bias=False), norm


def test_checkpoints_move_both_ways() -> None:
    module, plain = blnet.ExpandMerge(*layers()), nn.Sequential(*layers())
    assert list(module.state_dict()) == list(plain.state_dict())
    nn.init.normal_(module[0].weight)
    plain.load_state_dict(module.state_dict())
    module.load_state_dict(plain.state_dict())
    assert "relu=True" in repr(module)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size_big", [None, (3, 4), (6, 7)])
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_conv_norm_upsample_add_and_relu(
    training: bool, size_big: tuple[int, int] | None, relu: bool
) -> None:
    module = blnet.ExpandMerge(*layers(), relu=relu).train(training)
    plain = nn.Sequential(*layers()).train(training)
    x = torch.randn(2, 4, 6, 7)
    big = None if size_big is None else torch.randn(2, 12, *size_big)
    expected = plain(x) if big is None else plain(x) + reference.upsample_nearest(big, (6, 7))
    expected = expected.relu() if relu else expected
    assert torch.equal(module(x, big), expected)
    for got, wanted in zip(module.buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, wanted)


def test_a_big_of_the_wrong_shape_is_refused_or_added_as_pytorch_adds() -> None:
    conv, norm = layers()
    x, big = torch.randn(2, 4, 6, 7), torch.randn(2, 12, 1, 7)
    upsampled = conv_norm_merge(conv, norm, x, big)
    assert torch.equal(conv_norm_merge(conv, norm, x, big, upsample=False), upsampled)
    added = conv_norm_merge(conv, norm, x, torch.randn(12, 1, 1), relu=False, upsample=False)
    assert added.shape == (2, 12, 6, 7)
    with pytest.raises(RuntimeError, match="size"):  # PyTorch's own words
        conv_norm_merge(conv, norm, x, torch.randn(2, 12, 5, 7), upsample=False)


WRONG = {
    "a wide kernel": (nn.Conv2d(4, 12, 3, bias=False), "not 1x1"),
    "a stride": (nn.Conv2d(4, 12, 1, 2, bias=False), "stride 1"),
    "padding": (nn.Conv2d(4, 12, 1, padding=1, bias=False), "no padding"),
    "groups": (nn.Conv2d(4, 12, 1, groups=2, bias=False), "2 groups"),
    "a bias": (nn.Conv2d(4, 12, 1), "has a bias"),
    "no convolution": (nn.Linear(4, 12, bias=False), "Linear is not a plain Conv2d"),
    "channels": (nn.Conv2d(4, 8, 1, bias=False), "norm has 12 channels and conv 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_layers_that_cannot_run_as_one_are_refused(name: str) -> None:
    conv, reason = WRONG[name]
    with pytest.raises(ValueError, match=rf"ExpandMerge: .*{reason}.*nn\.Sequential\(conv, norm"):
        blnet.ExpandMerge(conv, nn.BatchNorm2d(12))  # type: ignore[arg-type]


def test_a_subclass_that_computes_something_else_is_refused() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Renamed(nn.BatchNorm2d):
        pass

    conv, _ = layers()
    assert why_not_fusable(conv, Doubled(12)) == "Doubled is not a plain BatchNorm2d"
    assert why_not_fusable(conv, Renamed(12)) == ""
    x = torch.randn(2, 4, 5, 5)
    torch.manual_seed(1)
    assert torch.equal(conv_norm_merge(conv, Doubled(12), x, relu=False), Doubled(12)(conv(x)))
