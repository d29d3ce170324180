"""The converter's small operations, each by itself."""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from blnet.blocks import BlockSpec
from blnet.conversion.surgery import (
    norm_like,
    pooled_shortcut,
    resize_norm,
    shortcut_projection,
)
from blnet.tracing import trace_own_code


def test_a_group_norm_keeps_its_groups_where_they_divide() -> None:
    for channels, groups in ((32, 8), (12, 4), (64, 8)):
        norm = nn.GroupNorm(8, 64)
        resize_norm(norm, channels)
        assert (norm.num_groups, norm.num_channels) == (groups, channels)
        assert norm(torch.randn(2, channels, 3, 3)).shape[1] == channels


def test_a_norm_in_front_of_an_add_has_no_activation() -> None:
    make = norm_like(BatchNormAct2d(8))
    assert make is not None
    assert make(16)(torch.randn(4, 16, 5, 5)).min() < 0


class Modal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3 if self.training else x + 1


def test_code_that_differs_in_training_is_not_traced() -> None:
    for training in (True, False):
        block = Modal().train(training)
        assert trace_own_code(block) is None
        assert block.training is training
    assert trace_own_code(nn.Sequential(nn.ReLU())) is not None


def test_a_shortcut_without_normalisation_stays_without() -> None:
    block = nn.Module()
    block.shortcut = nn.Conv2d(8, 16, 1, 2, bias=False)
    project = shortcut_projection(block, norm_like(nn.BatchNorm2d(16)))
    made = pooled_shortcut(BlockSpec(8, 16, 2), project)
    assert made is not None
    assert [type(part) for part in made] == [nn.AvgPool2d, nn.Conv2d]
    assert made[1].bias is None
