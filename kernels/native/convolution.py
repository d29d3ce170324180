"""What the ways to compute a convolution share: its sizes, its weights, their price."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from blnet.kernels.native.cutting import BLOCK, blocks_of
from blnet.kernels.native.library import Library, Step

# What decides between the ways to compute a convolution, in cycles of one core: products, bytes of
# weights, and Winograd's transforms, which stand beside its tiles. These two numbers were chosen on
# a Zen 4, two threads, among 77 convolutions of ResNets and speech networks timed with each tile,
# weights coming from memory: what they choose takes 0.6 % longer than the fastest on average, at
# most 10 %.
PRODUCTS_PER_CYCLE = 24.0
WEIGHT_BYTES_PER_CYCLE = 16.0


@dataclass(frozen=True)
class Convolution:
    """The sizes of a convolution.

    Attributes:
        shape: of the input, (N, C, H, W).
        weight: shape of the weight, (C_out, C / groups, K_h, K_w).
        stride: in height and width.
        padding: in height and width.
        groups: as of torch.nn.Conv2d.
        planar: whether the input is the caller's tensor, read as it is.
    """

    shape: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    planar: bool

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output, (N, C_out, H_out, W_out)."""
        height, width = (
            (size + 2 * pad - kernel) // step + 1
            for size, pad, kernel, step in zip(
                self.shape[2:], self.padding, self.weight[2:], self.stride, strict=True
            )
        )
        return self.shape[0], self.weight[0], height, width

    @property
    def weights(self) -> int:
        """How many it has."""
        return math.prod(self.weight)

    @property
    def in_place(self) -> bool:
        """Whether each output pixel reads the input from its own place down and nothing else."""
        simple = self.weight[3] == 1 and self.stride == (1, 1) and self.padding == (0, 0)
        return simple and not self.planar


@dataclass
class Packed:
    """A convolution made ready.

    Attributes:
        step: kind, sizes and cuts; pointers are not set.
        weight: float32, as the kernels read it.
        bias: float32, padded to whole groups of channels.
        segments: see step.h.
        starts: see step.h.
        scratch: floats of scratch memory that a thread needs.
        method: one of `packing.METHODS`.
    """

    step: Step
    weight: Tensor
    bias: Tensor
    segments: Tensor
    starts: Tensor | None
    scratch: int
    method: str


def sized_step(conv: Convolution) -> Step:
    """Return a step of these sizes."""
    images, channels, height, width = conv.shape
    _, out_channels, out_height, out_width = conv.out_shape
    step = Step(batch=images, channels=channels, blocks=blocks_of(channels))
    step.height, step.width = height, width
    step.out_channels, step.out_blocks = out_channels, blocks_of(out_channels)
    step.out_height, step.out_width = out_height, out_width
    step.kernel_h, step.kernel_w = conv.weight[2:]
    step.stride_h, step.stride_w = conv.stride
    step.pad_h, step.pad_w = conv.padding
    step.planar = conv.planar
    return step


def order_weights(
    library: Library, conv: Convolution, weight: Tensor, starts: list[int], span: int
) -> Tensor:
    """Return the weights as [group][block][row][column][channel in][channel of the group]."""
    out_channels, width_in, *kernel = conv.weight
    width_out, floats = out_channels // conv.groups, 1 if conv.planar else BLOCK
    planes = conv.shape[1] if conv.planar else span * BLOCK
    parts = []
    for start, first in zip(starts, range(0, out_channels, library.group), strict=True):
        last = min(first + library.group, out_channels)
        # What is left at the end is computed by the smaller kernel where that suffices.
        size = BLOCK if last - first <= BLOCK else library.group
        dense = torch.zeros(size, planes, *kernel, dtype=torch.float32, device="cpu")
        for group in range(first // width_out, (last - 1) // width_out + 1):
            begin, end = max(first, group * width_out), min(last, (group + 1) * width_out)
            place = group * width_in - start * BLOCK
            dense[begin - first : end - first, place : place + width_in] = weight[begin:end]
        split = dense.view(size, planes // floats, floats, *kernel)
        parts.append(split.permute(1, 3, 4, 2, 0).reshape(-1))
    return torch.cat(parts)
