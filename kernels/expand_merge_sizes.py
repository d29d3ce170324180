"""What the kernels of expand_merge share: sizes of a problem, tiles, where big is read."""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from blnet.kernels import testing
from blnet.kernels.launch import fits_int32, known, next_power_of_2, whole_ratio
from blnet.kernels.triton_shim import tl, triton
from blnet.kernels.tuning import bucket, concrete, ratio_text


@dataclass(frozen=True)
class Problem:
    """Sizes of an expand_merge.

    Attributes:
        n: batch.
        channels_in: K.
        channels: C.
        height: of x and the output.
        width: of x and the output.
        height_big: of big; that of x where there is no big.
        width_big: of big.
        itemsize: bytes of an element of x.
    """

    n: int
    channels_in: int
    channels: int
    height: int
    width: int
    height_big: int
    width_big: int
    itemsize: int

    @property
    def rows(self) -> int:
        """Pixels of x."""
        return self.n * self.height * self.width

    @property
    def rows_big(self) -> int:
        """Pixels of big."""
        return self.n * self.height_big * self.width_big

    @property
    def same(self) -> bool:
        """Whether big is certainly read where the output is written."""
        return known(self.height == self.height_big) and known(self.width == self.width_big)

    @property
    def aligned(self) -> bool:
        """Whether rows of x and of big start at multiples of 16 bytes: loads of 16 bytes."""
        return all(known(c * self.itemsize % 16 == 0) for c in (self.channels, self.channels_in))

    @property
    def ratios(self) -> tuple[int, int]:
        """H / H_big and W / W_big where both are small whole numbers, else 0."""
        ratios = whole_ratio(self.height, self.height_big), whole_ratio(self.width, self.width_big)
        return ratios if all(ratios) else (0, 0)

    @property
    def wide(self) -> bool:
        """Whether offsets may pass 32 bits."""
        widest = torch.sym_max(self.channels, self.channels_in)
        products = (
            (self.height + 1) * (self.height_big + 1),
            (self.width + 1) * (self.width_big + 1),
        )
        return not fits_int32(self.rows * widest, self.rows_big * widest, *products)

    def key(self, upsampling: bool = True) -> str | None:
        """Return the bucket that tuning tables know the sizes by; None for symbolic ones.

        Args:
            upsampling: whether it matters where big is read.
        """
        sizes = (self.channels_in, self.channels, self.rows, self.rows_big)
        return _key(self, upsampling) if concrete(*sizes) else None


@functools.lru_cache(maxsize=1024)  # a launch in eager mode has no time for text
def _key(problem: Problem, upsampling: bool) -> str:
    parts = [f"K={problem.channels_in}", f"C={problem.channels}"]
    if upsampling:
        parts.append(ratio_text(problem.same, problem.ratios))
    return bucket(problem.itemsize, *parts, rows=problem.rows, wide=problem.wide)


def problem_of(x: torch.Tensor, channels: int, size_big: tuple[int, int]) -> Problem:
    """Collect the sizes of a problem from x (N, K, H, W)."""
    n, channels_in, height, width = x.shape
    return Problem(n, channels_in, channels, height, width, *size_big, x.element_size())


@triton.jit
def source_row(
    o_row, height, width, height_big, width_big, RATIO_H: tl.constexpr, RATIO_W: tl.constexpr
):
    """Return the row of big that is copied to each row of the output."""
    line = o_row // width  # N * height lines of width pixels
    column = o_row - line * width
    if RATIO_H > 0:
        line_big = line // RATIO_H  # height is a multiple, so this crosses no image
        column_big = column // RATIO_W
    else:
        image = line // height
        line_big = image * height_big + (line - image * height) * height_big // height
        column_big = column * width_big // width
    return line_big * width_big + column_big


@triton.jit
def gradient(p_grad, p_out, o_row, o_c, m_row, m_c, channels, RELU):
    """Load one tile of g, float32, 0 outside the map."""
    o_tile = o_row[:, None] * channels + o_c[None, :]
    m_tile = m_row[:, None] & m_c[None, :]
    b_grad = tl.load(p_grad + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    if RELU:
        b_out = tl.load(p_out + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_grad = tl.where(b_out <= 0.0, 0.0, b_grad)
    return b_grad


@triton.jit
def centered(p_x, b_center, o_row, o_k, m_row, m_k, channels_in):
    """Load one tile of z = x - center in x's dtype, 0 outside the map."""
    o_tile = o_row[:, None] * channels_in + o_k[None, :]
    m_tile = m_row[:, None] & m_k[None, :]
    b_x = tl.load(p_x + o_tile, mask=m_tile, other=0.0)
    return tl.where(m_tile, b_x.to(tl.float32) - b_center[None, :], 0.0).to(b_x.dtype)


def channel_block(channels: int, largest: int) -> int:
    """Choose how many channels a tile of a matrix product spans: at least 16."""
    return min(max(next_power_of_2(channels), 16), largest)


# Name -> N, K, C, H, W, H_big, W_big: the merges of a network, and what compiles otherwise.
PROBLEMS = {
    "stem K=32 C=64 x2": (32, 32, 64, 56, 56, 28, 28),
    "stage 1 K=64 C=256 x2": (32, 64, 256, 56, 56, 28, 28),
    "stage 1 K=128 C=256 x2": (32, 128, 256, 56, 56, 28, 28),
    "stage 2 K=256 C=512 x2": (32, 256, 512, 28, 28, 14, 14),
    "stage 3 K=512 C=1024 x2": (32, 512, 1024, 14, 14, 7, 7),
    "residual K=64 C=256": (32, 64, 256, 56, 56, 56, 56),
    "odd K=128 C=256": (32, 128, 256, 55, 55, 28, 28),
    "unaligned K=37 C=75 odd": (3, 37, 75, 55, 55, 28, 28),
    "wide K=128 C=256 x2": (2048, 128, 256, 112, 112, 56, 56),
    "wide K=128 C=256 odd": (2048, 128, 256, 111, 111, 56, 56),
}

# K, C, side, side of big at 224 x 224 pixels, alpha 2 and 4: what bL-ResNet-50 and ResNet-50 run.
SITES = {
    **{f"stem K={k}": (k, 64, 56, 56) for k in (16, 32)},
    **{f"stage 1 K={k}": (k, 256, 56, 28) for k in (64, 128)},
    **{f"stage 2 K={k}": (k, 512, 28, 14) for k in (128, 256)},
    **{f"stage 3 K={k}": (k, 1024, 14, 7) for k in (256, 512)},
    # The end of a bottleneck: at full size, and in the big branch at half of it.
    **{
        f"residual K={k} {side}x{side}": (k, 4 * k, side, side)
        for k, full in ((64, 56), (128, 28), (256, 14), (512, 7))
        for side in (full, max(full // 2, 7))
    },
}


def sites(batch: int, itemsize: int) -> dict[str, Problem]:
    """List the problems that ``blnet kernels tune`` measures, by name of the site."""
    return {
        name: Problem(batch, k, c, side, side, big, big, itemsize)
        for name, (k, c, side, big) in SITES.items()
    }


def drawn(
    problem: Problem, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """Draw (x, weight, scale, shift, big), a gradient and an output for a problem."""
    p, generator = problem, torch.Generator(device).manual_seed(0)
    sizes = (p.n, p.channels_in, p.channels, p.height, p.width, p.height_big, p.width_big)
    shape = testing.ExpandShape(*sizes, "for timing")
    x, weight, *rest = testing.expand_merge_inputs(shape, dtype, "channels_last", device, generator)
    grad, out = (testing.draw(shape.out, dtype, "channels_last", device, generator) for _ in "12")
    tensors = (x, weight.flatten(1), *(t for t in rest if t is not None))
    return tensors, grad, out
