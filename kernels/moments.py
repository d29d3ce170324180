"""moments: column sums and Gram matrix of a map, from which BN's statistics follow.

    z = x - shift                  rows x K: every pixel of the map is a row
    sums[k] = sum over rows of z[r, k]
    gram[k, l] = sum over rows of z[r, k] z[r, l]

x is (N, K, H, W) in float32, float16 or bfloat16; shift is (K,); sums (K,) and gram (K, K) are
float32. With d = sums / rows the mean is shift + d and the covariance gram / rows - d d^T
(:func:`mean_and_covariance`), and for y = W x, a 1x1 convolution, mean(y) = W mean and
var(y) = diag(W covariance W^T): the statistics of C channels from one pass over K.

The shift keeps digits: without it the covariance of a channel with |mean| = 30 std is the
difference of two numbers 900 times as large. Any shift near the mean will do; ``center.py`` takes
one from a sample of rows. float32 products are exact to float32 (no tf32). For 16-bit maps z is
rounded to x's dtype before the product, on matrix units; that loses nothing if the shift is 0, or
is itself of that dtype and within a factor of two of x (Sterbenz's lemma), so the estimate is 0
unless |mean| > 4 std, and rounded where it is not.

Deterministic in two stages, no atomics: each program adds up a share of the rows for one pair of
channel tiles and writes it to a workspace, and torch.sum adds the shares. Only pairs on and above
the diagonal are computed; the rest is mirrored, so gram is exactly symmetric.

Bytes: one pass over x, rows K itemsize (twice that, mostly from L2, where K is more than one
tile), and a workspace of at most 1/4 of that. FLOPs: 2 rows K^2 as FlopCounterMode counts the
product, about half of which is computed where K is several tiles. Not differentiable on the
kernels: expand_merge, whose statistics these are, has its own backward pass.
"""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from typing import Any

import torch

from blnet.kernels import reference, testing
from blnet.kernels.arguments import check_map, check_vector
from blnet.kernels.backend import KERNEL_DTYPES, choose_backend
from blnet.kernels.center import row_count
from blnet.kernels.expand_merge_sizes import sites
from blnet.kernels.launch import (
    Launch,
    Specialization,
    allocate,
    ceil_divide,
    channels_last,
    device_guard,
    fits_int32,
    known,
    next_power_of_2,
    specialize,
)
from blnet.kernels.registration import define_op, wrap_triton
from blnet.kernels.triton_shim import tl, triton
from blnet.kernels.tuning import Choice, Tunable, bucket, choices, choose, concrete, register

# Launch configuration -----------------------------------------------------------------------
#
# No device was at hand to tune on. 128 x 128 float32 sums are 64 registers a thread on 8 warps.
# float32 products run on the ordinary units, where a 64 x 64 tile is large enough to reuse.

LARGEST_TILE = {2: 128, 4: 64}  # channels of a tile by bytes of an element
BLOCK_ROWS = {2: 64, 4: 16}
BLOCKS = "BLOCK_ROWS BLOCK"  # then warps and stages
# Bytes of an element -> what else to measure. None of these spills for sm_90 at any site; of what
# was tried these did: in 16 bits 64 rows of 128 on 4 warps; in float32 on 4 warps 16 or 32 rows of
# 64 and 64 rows of 32, on 8 64 rows of 64.
CANDIDATES = {
    2: (
        (64, 128, 8, 2), (64, 128, 8, 4), (32, 128, 8, 3), (32, 128, 4, 3), (128, 128, 8, 2),
        (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 3), (128, 64, 4, 2),
        (128, 64, 4, 3), (128, 64, 8, 3), (256, 64, 8, 2), (32, 64, 4, 3), (32, 64, 4, 4),
        (64, 32, 4, 3), (128, 32, 4, 3), (256, 32, 4, 2),
    ),
    4: (
        (16, 64, 8, 1), (16, 64, 8, 2), (16, 64, 8, 4), (32, 64, 8, 2), (32, 64, 8, 3),
        (16, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 3),
    ),
}  # fmt: skip
PROGRAMS = 512  # about four for each multiprocessor of a large GPU
# Rows of a share, per channel: keeps the workspace below 1 / 4 of a 16-bit map.
ROWS_PER_CHANNEL = 8


def moments_rule(channels: int, itemsize: int) -> Choice:
    """Return the choice for a device that nobody measured."""
    block = min(max(next_power_of_2(channels), 16), LARGEST_TILE[itemsize])
    num_warps = 8 if block == 128 or channels > block else 4
    (choice,) = choices(BLOCKS, (BLOCK_ROWS[itemsize], block, num_warps, 3))
    return choice


def moments_launch(rows: int, channels: int, itemsize: int, choice: Choice | None = None) -> Launch:
    """Plan the first stage; ``itemsize`` is the bytes of an element."""
    choice = choice or moments_rule(channels, itemsize)
    block = min(max(next_power_of_2(channels), 16), choice["BLOCK"])
    block_rows = choice["BLOCK_ROWS"]
    tiles = ceil_divide(channels, block)
    pairs = tiles * (tiles + 1) // 2
    share = max(ROWS_PER_CHANNEL * channels, 8 * block_rows)
    parts = torch.sym_min(ceil_divide(rows, share), max(PROGRAMS // pairs, 1))
    chunk = ceil_divide(ceil_divide(rows, parts), block_rows) * block_rows
    return Launch(
        grid=(pairs, parts),
        integers={"rows": rows, "channels": channels, "chunk": chunk},
        constants={
            "TILES": tiles,
            "WIDE": not fits_int32(rows * channels, (parts + 1) * chunk * channels),
            "BLOCK_ROWS": block_rows,
            "BLOCK": block,
        },
        num_warps=choice["num_warps"],
        # A single 16-bit tile is both factors of its product. Triton 3.6 cannot pipeline that for
        # sm_100 (an assertion in its compiler), so there several programs hide the latency.
        num_stages=1 if tiles == 1 and itemsize == 2 else choice["num_stages"],
    )


def moments_key(rows: int, channels: int, itemsize: int) -> str | None:
    """Return the bucket that tuning tables know the sizes by; None for symbolic ones."""
    if not concrete(rows, channels):
        return None
    wide = not fits_int32(rows * channels)
    return bucket(itemsize, f"K={channels}", rows=rows, wide=wide)


# Kernels: p_ is a pointer, o_ a tile of offsets, b_ a tile of values, m_ a mask -----------------


@triton.jit
def _shifted(p_x, b_shift, o_row, o_channel, m_row, m_channel, channels):
    """Load one tile of x - shift in float32, 0 outside the map."""
    m_tile = m_row[:, None] & m_channel[None, :]
    o_tile = o_row[:, None] * channels + o_channel[None, :]
    b_x = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    return tl.where(m_tile, b_x - b_shift[None, :], 0.0)


@triton.jit
def _moments_kernel(
    p_x,
    p_shift,
    p_sums,  # (parts, channels)
    p_gram,  # (parts, channels, channels)
    rows,
    channels,
    chunk,  # rows of a part, a multiple of BLOCK_ROWS
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Walk down the triangle of pairs: its row t has TILES - t of them.
    first = 0
    offset = tl.program_id(0)
    for t in tl.static_range(TILES - 1):
        further = (first == t) & (offset >= TILES - t)
        first = tl.where(further, t + 1, first)
        offset = tl.where(further, offset - (TILES - t), offset)
    part = tl.program_id(1)
    if WIDE:
        part = part.to(tl.int64)
    o_first = first * BLOCK + tl.arange(0, BLOCK)
    o_second = o_first + offset * BLOCK
    m_first, m_second = o_first < channels, o_second < channels
    b_shift_first = tl.load(p_shift + o_first, mask=m_first, other=0.0)
    b_shift_second = tl.load(p_shift + o_second, mask=m_second, other=0.0)

    b_sums = tl.zeros((BLOCK,), dtype=tl.float32)
    b_gram = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    start = part * chunk
    for row in tl.range(start, tl.minimum(start + chunk, rows), BLOCK_ROWS):
        o_row = row + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < rows
        b_first = _shifted(p_x, b_shift_first, o_row, o_first, m_row, m_first, channels)
        b_sums += tl.sum(b_first, 0)
        b_one = b_first.to(p_x.dtype.element_ty)
        if TILES == 1:
            b_two = b_one
        else:
            b_second = _shifted(p_x, b_shift_second, o_row, o_second, m_row, m_second, channels)
            b_two = b_second.to(p_x.dtype.element_ty)
        b_gram = tl.dot(tl.trans(b_one), b_two, b_gram, input_precision="ieee")

    tl.store(p_sums + part * channels + o_first, b_sums, mask=m_first & (offset == 0))
    o_gram = (part * channels + o_first)[:, None] * channels + o_second[None, :]
    tl.store(p_gram + o_gram, b_gram, mask=m_first[:, None] & m_second[None, :])


# Launchers -----------------------------------------------------------------------------------


def shares(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the first stage: the sums and Gram matrices of shares of the pixels.

    Args:
        x: shape (N, K, H, W), with a pixel and a channel at least.
        shift: shape (K,), float32.

    Returns:
        Shapes (parts, K) and (parts, K, K), float32; the latter on and above the diagonal only.
    """
    rows, channels = row_count(x), x.shape[1]
    x = channels_last(x)
    choice = choose("moments", moments_key(rows, channels, x.element_size()), x.device)
    launch = moments_launch(rows, channels, x.element_size(), choice)
    parts = launch.grid[1]
    sums = allocate(shift, (parts, channels), torch.contiguous_format)
    gram = allocate(shift, (parts, channels, channels), torch.contiguous_format)
    with device_guard(x):
        wrap_triton(_moments_kernel)[launch.grid](
            p_x=x, p_shift=shift.contiguous(), p_sums=sums, p_gram=gram, **launch.arguments
        )
    return sums, gram


def _moments(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    channels = x.shape[1]
    if known(row_count(x) * channels == 0):
        return shift.new_zeros(channels), shift.new_zeros(channels, channels)
    sums, gram = shares(x, shift)
    upper = gram.sum(0).triu()  # below the diagonal tiles nothing was written
    return sums.sum(0), upper + upper.triu(1).mT


# The registered ops --------------------------------------------------------------------------


def _flops(x: Any, shift: Any, out_shape: Any = None, **keywords: Any) -> int:
    # reference.moments has one matrix product, K x rows times rows x K.
    return 2 * int(x[0] * x[2] * x[3]) * int(x[1]) ** 2


moments_op = define_op("blnet::moments", _moments, flops=_flops)


# The public functions ------------------------------------------------------------------------


def moments(
    x: torch.Tensor, shift: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the column sums and the Gram matrix of x - shift over all pixels.

    Runs on the backend that ``blnet.kernels.backend`` chooses; on "torch" it is
    :func:`blnet.kernels.reference.moments`, which is differentiable. The kernels are not.

    Args:
        x: shape (N, K, H, W), any layout; none of N, H, W need be above 0.
        shift: shape (K,), an estimate of the mean, such as ``estimate_center`` gives, on x's
            device and of any floating-point dtype; None for 0.

    Returns:
        sums of shape (K,) and gram of shape (K, K), float32 (float64 for a float64 map).

    Raises:
        ValueError: if x is not a 4-dimensional floating-point tensor, if shift is not one number
            a channel, or if the forced backend cannot run them.
    """
    check_map("moments", "x", x)
    check_vector("moments", "shift", shift, x.shape[1], x)
    if choose_backend("moments", x) == "torch":
        return reference.moments(x, shift)
    if shift is None:
        shift = x.new_zeros(x.shape[1], dtype=torch.float32)
    return moments_op(x, shift.float())  # type: ignore[no-any-return]


def mean_and_covariance(
    sums: torch.Tensor, gram: torch.Tensor, rows: int | torch.Tensor, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn moments into the mean and the (biased) covariance of the map's channels.

    Args:
        sums: shape (K,), from :func:`moments`.
        gram: shape (K, K), from :func:`moments`.
        rows: number of pixels, above 0.
        shift: the shift that the moments were taken with.

    Returns:
        mean of shape (K,) and covariance of shape (K, K), in float64: they are small, and here
        their digits would be lost.
    """
    offset = sums.double() / rows
    covariance = gram.double() / rows - torch.outer(offset, offset)
    return (offset if shift is None else offset + shift.double()), covariance


# For tuning and ahead-of-time compilation ------------------------------------------------------


Sizes = tuple[int, int, int]  # rows, channels, bytes of an element


def _pointers(dtype: torch.dtype) -> dict[str, torch.dtype]:
    return {"p_x": dtype, **dict.fromkeys(("p_shift", "p_sums", "p_gram"), torch.float32)}


def _plan(sizes: Sizes, choice: Choice | None = None) -> Launch:
    return moments_launch(*sizes, choice)


def _key(sizes: Sizes) -> str | None:
    return moments_key(*sizes)


def _sites(batch: int, itemsize: int) -> dict[str, Sizes]:
    problems = sites(batch, itemsize)
    return {name: (p.rows, p.channels_in, itemsize) for name, p in problems.items()}


def _timed(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Any:
    rows, channels, _ = sizes
    generator = torch.Generator(device).manual_seed(0)
    x = testing.draw((rows, channels, 1, 1), dtype, "channels_last", device, generator)
    return lambda: moments_op(x, x.new_zeros(channels, dtype=torch.float32))


register(
    Tunable(
        name="moments",
        blocks={"BLOCK_ROWS": (16, 256), "BLOCK": (16, 128)},
        kernel=_moments_kernel,
        plan=_plan,
        pointers=_pointers,
        key=_key,
        problems=_sites,
        candidates=lambda sizes: choices(BLOCKS, *CANDIDATES[sizes[2]]),
        call=_timed,
    )
)

# Name -> rows, channels: each compiles to different code.
_PROBLEMS = {
    "K=16": (32 * 112 * 112, 16),
    "K=32": (32 * 112 * 112, 32),
    "K=37 unaligned": (3 * 55 * 55, 37),
    "K=64": (32 * 56 * 56, 64),
    "K=128": (32 * 28 * 28, 128),
    "K=256": (32 * 14 * 14, 256),
    "K=512": (32 * 7 * 7, 512),
    "K=64 wide": (2**26, 64),
}


def specializations() -> list[Specialization]:
    """List what ``blnet kernels compile`` builds: every branch of the kernels, in every dtype."""
    found = []
    for dtype in KERNEL_DTYPES:
        for problem, (rows, channels) in _PROBLEMS.items():
            name = f"{problem} {str(dtype).removeprefix('torch.')}"
            launch = moments_launch(rows, channels, dtype.itemsize)
            found.append(specialize(f"moments {name}", _moments_kernel, launch, _pointers(dtype)))
    return found
