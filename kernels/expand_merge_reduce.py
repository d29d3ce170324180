"""The first backward kernel of expand_merge: g^T (x - center), sums of g, window sums of g.

What it is for, and the mathematics, are at the top of ``expand_merge_backward.py``.
"""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from typing import Any

import torch

from blnet.kernels.backend import KERNEL_DTYPES
from blnet.kernels.expand_merge_sizes import (
    PROBLEMS,
    Problem,
    centered,
    channel_block,
    drawn,
    gradient,
    problem_of,
    sites,
)
from blnet.kernels.launch import (
    Launch,
    Specialization,
    allocate,
    ceil_divide,
    channels_last,
    device_guard,
    known,
    memory_format_of,
    specialize,
)
from blnet.kernels.registration import define_op, wrap_triton
from blnet.kernels.triton_shim import tl, triton
from blnet.kernels.tuning import Choice, Tunable, choices, choose, register

# Launch configuration: by bytes of an element of x; see expand_merge.py and moments.py -----------

REDUCE_BLOCKS = "BLOCK_ROWS BLOCK_C BLOCK_K"  # then warps and stages
# (bytes of an element, aligned) -> what runs where no table says otherwise
REDUCE_RULE = {
    (2, True): (32, 128, 128, 8, 3),
    (2, False): (32, 64, 64, 8, 2),
    (4, True): (16, 64, 64, 8, 3),
    (4, False): (16, 64, 64, 8, 1),
}
# Bytes of an element -> what else to measure. None of these spills for sm_90 at any site; of what
# was tried these did, by 8 bytes, in float32 on 2 stages: 16 or 32 rows of 64 x 64 on 8 warps, 16
# rows of 32 x 64 and 64 x 32 on 4.
REDUCE_CANDIDATES = {
    2: (
        (32, 128, 128, 8, 2), (32, 128, 128, 8, 4), (64, 128, 128, 8, 2), (16, 128, 128, 8, 3),
        (16, 128, 128, 8, 4), (64, 128, 64, 8, 2), (64, 128, 64, 8, 3), (32, 128, 64, 8, 3),
        (32, 128, 64, 4, 3), (32, 64, 128, 8, 3), (32, 64, 128, 4, 3), (64, 64, 128, 8, 2),
        (64, 64, 64, 8, 3), (64, 64, 64, 4, 3), (32, 64, 64, 8, 4), (32, 64, 64, 4, 3),
        (128, 64, 64, 8, 2), (32, 128, 256, 8, 2),
    ),
    4: (
        (16, 64, 64, 8, 1), (32, 64, 64, 8, 1), (16, 64, 64, 4, 2), (16, 128, 64, 8, 2),
        (32, 64, 32, 8, 2), (32, 32, 64, 4, 2), (32, 32, 32, 4, 2), (16, 32, 32, 4, 3),
    ),
}  # fmt: skip
PROGRAMS = 256  # about two for each multiprocessor of a large GPU
ROWS_PER_CHANNEL = 8  # rows of a share per input channel: workspace below 1 / 4 of g


def reduce_rule(problem: Problem, same: bool) -> Choice:
    """Return the choice for a device that nobody measured; same: no windows are wanted."""
    (choice,) = choices(REDUCE_BLOCKS, REDUCE_RULE[problem.itemsize, problem.aligned])
    if same or all(problem.ratios):
        return choice
    # Windows of different sizes take registers.
    block_c = choice["BLOCK_C"] // 2 if problem.itemsize == 2 else choice["BLOCK_C"]
    return {**choice, "BLOCK_C": block_c, "num_stages": 1}


def reduce_launch(problem: Problem, choice: Choice | None = None, **flags: bool) -> Launch:
    """Plan the reducing pass over big's pixels, or all pixels where no windows are wanted."""
    same = problem.same or not flags["STORE_BIG"]
    rows = problem.rows if same else problem.rows_big
    choice = choice or reduce_rule(problem, same)
    tile_rows = choice["BLOCK_ROWS"]
    block_c = channel_block(problem.channels, choice["BLOCK_C"])
    block_k = channel_block(problem.channels_in, choice["BLOCK_K"])
    tiles_k = ceil_divide(problem.channels_in, block_k) if flags["PRODUCTS"] else 1
    tiles = max(tiles_k, 1) * ceil_divide(problem.channels, block_c)  # 0 where K is
    share = max(ROWS_PER_CHANNEL * problem.channels_in, 8 * tile_rows)
    parts = torch.sym_min(ceil_divide(problem.rows, share), max(PROGRAMS // tiles, 1))
    chunk = ceil_divide(ceil_divide(rows, parts), tile_rows) * tile_rows
    return Launch(
        grid=(tiles, parts),
        integers={
            "rows": rows,
            "chunk": chunk,
            "channels_in": problem.channels_in,
            "channels": problem.channels,
            "height": problem.height,
            "width": problem.width,
            "height_big": problem.height_big,
            "width_big": problem.width_big,
        },
        constants={
            **flags,
            "SAME": same,
            "RATIO_H": problem.ratios[0],
            "RATIO_W": problem.ratios[1],
            "TILES_K": tiles_k,
            "WIDE": problem.wide,
            "BLOCK_ROWS": tile_rows,
            "BLOCK_C": block_c,
            "BLOCK_K": block_k,
        },
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
    )


# Kernels: p_ is a pointer, o_ a tile of offsets, b_ a tile of values, m_ a mask -----------------


@triton.jit
def _reduce_tile(
    p_grad, p_out, p_x, b_center, b_products, o_row, o_c, o_k, m_row, m_c, m_k,
    channels, channels_in, RELU: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Return g of some rows, and the products with theirs added."""
    b_g = gradient(p_grad, p_out, o_row, o_c, m_row, m_c, channels, RELU)
    if PRODUCTS:
        b_z = centered(p_x, b_center, o_row, o_k, m_row, m_k, channels_in)
        b_left = tl.trans(b_g.to(b_z.dtype))
        b_products = tl.dot(b_left, b_z, b_products, input_precision="ieee")
    return b_g, b_products


@triton.jit
def _reduce_kernel(
    p_grad,
    p_out,
    p_x,
    p_center,
    p_products,  # (parts, channels, channels_in)
    p_sums,  # (parts, channels)
    p_dbig,
    rows,  # of big, or of the output where SAME
    chunk,  # rows of a part, a multiple of BLOCK_ROWS
    channels_in,
    channels,
    height,
    width,
    height_big,
    width_big,
    RELU: tl.constexpr,
    PRODUCTS: tl.constexpr,
    STORE_BIG: tl.constexpr,
    SAME: tl.constexpr,  # no windows
    RATIO_H: tl.constexpr,
    RATIO_W: tl.constexpr,
    TILES_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_k = tl.program_id(0) % TILES_K
    o_c = (tl.program_id(0) // TILES_K) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_c, m_k = o_c < channels, o_k < channels_in
    part = tl.program_id(1)
    if WIDE:
        part = part.to(tl.int64)
    b_center = tl.load(p_center + o_k, mask=m_k, other=0.0)
    b_sums = tl.zeros((BLOCK_C,), dtype=tl.float32)
    b_products = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)

    start = part * chunk
    for row in tl.range(start, tl.minimum(start + chunk, rows), BLOCK_ROWS):
        o_row = row + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < rows
        if SAME:
            b_window, b_products = _reduce_tile(
                p_grad, p_out, p_x, b_center, b_products, o_row, o_c, o_k, m_row, m_c, m_k,
                channels, channels_in, RELU, PRODUCTS,
            )  # fmt: skip
        else:
            b_window = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)
            line_big = o_row // width_big
            column_big = o_row - line_big * width_big
            if RATIO_H > 0:
                # Every window is RATIO_H x RATIO_W pixels and lies inside its image.
                for window in tl.range(0, RATIO_H * RATIO_W):
                    line = line_big * RATIO_H + window // RATIO_W
                    o_pixel = line * width + column_big * RATIO_W + window % RATIO_W
                    b_g, b_products = _reduce_tile(
                        p_grad, p_out, p_x, b_center, b_products, o_pixel, o_c, o_k, m_row, m_c,
                        m_k, channels, channels_in, RELU, PRODUCTS,
                    )  # fmt: skip
                    b_window += b_g
            else:
                image = line_big // height_big
                row_big = line_big - image * height_big
                first_i = tl.cdiv(row_big * height, height_big)
                first_j = tl.cdiv(column_big * width, width_big)
                end_i = tl.cdiv((row_big + 1) * height, height_big)
                end_j = tl.cdiv((column_big + 1) * width, width_big)
                for i in tl.range(0, tl.cdiv(height, height_big)):
                    for j in tl.range(0, tl.cdiv(width, width_big)):
                        m_pixel = m_row & (first_i + i < end_i) & (first_j + j < end_j)
                        o_pixel = (image * height + first_i + i) * width + first_j + j
                        b_g, b_products = _reduce_tile(
                            p_grad, p_out, p_x, b_center, b_products, o_pixel, o_c, o_k, m_pixel,
                            m_c, m_k, channels, channels_in, RELU, PRODUCTS,
                        )  # fmt: skip
                        b_window += b_g
        b_sums += tl.sum(b_window, 0)
        if STORE_BIG:
            o_big = o_row[:, None] * channels + o_c[None, :]
            m_big = m_row[:, None] & m_c[None, :] & (tile_k == 0)
            tl.store(p_dbig + o_big, b_window.to(p_dbig.dtype.element_ty), mask=m_big)

    tl.store(p_sums + part * channels + o_c, b_sums, mask=m_c & (tile_k == 0))
    if PRODUCTS:
        o_products = (part * channels + o_c)[:, None] * channels_in + o_k[None, :]
        tl.store(p_products + o_products, b_products, mask=m_c[:, None] & m_k[None, :])


# The launcher and the registered op -----------------------------------------------------------


def _reduce(
    grad: torch.Tensor,
    out: torch.Tensor | None,
    x: torch.Tensor,
    center: torch.Tensor,
    height_big: int,
    width_big: int,
    needs_products: bool,
    needs_big: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Returns (products, sums, dbig), the first two float32; what is not needed is empty.
    n, channels, channels_in = grad.shape[0], grad.shape[1], x.shape[1]
    memory_format, flat = memory_format_of(grad), torch.contiguous_format
    size = (n, channels, height_big, width_big)
    dbig = allocate(grad, size, torch.channels_last) if needs_big else grad.new_empty(0)
    if known(grad.numel() == 0):
        products = center.new_zeros(channels, channels_in)
        return products, center.new_zeros(channels), dbig.zero_()
    problem = problem_of(x, channels, (height_big, width_big))
    flags = {"RELU": out is not None, "PRODUCTS": needs_products, "STORE_BIG": needs_big}
    # Without windows the kernel is that of equal sizes.
    alike = problem if needs_big else problem_of(x, channels, (x.shape[2], x.shape[3]))
    choice = choose("expand_merge reduce", alike.key(), x.device)
    launch = reduce_launch(problem, choice, **flags)
    parts = launch.grid[1]
    sums = allocate(center, (parts, channels), flat)
    size_products = (parts, channels, channels_in) if needs_products else (1, 0, 0)
    products = allocate(center, size_products, flat)
    grad = channels_last(grad)
    with device_guard(grad):
        wrap_triton(_reduce_kernel)[launch.grid](
            p_grad=grad,
            p_out=grad if out is None else channels_last(out),
            p_x=channels_last(x),
            p_center=center,
            p_products=products,
            p_sums=sums,
            p_dbig=dbig,
            **launch.arguments,
        )
    if needs_big:
        dbig = dbig.contiguous(memory_format=memory_format)
    return products.sum(0), sums.sum(0), dbig


def _reduce_flops(
    grad: Any, out: Any, x: Any, center: Any, h: int, w: int, products: bool, *others: Any,
    **keywords: Any,
) -> int:  # fmt: skip
    return 2 * int(x[0] * x[2] * x[3]) * int(x[1] * grad[1]) if products else 0


reduce_op = define_op("blnet::expand_merge_reduce", _reduce, flops=_reduce_flops)


# For tuning and ahead-of-time compilation ------------------------------------------------------


def _pointers(dtype: torch.dtype) -> dict[str, torch.dtype]:
    pointers = dict.fromkeys(("p_grad", "p_out", "p_x", "p_dbig"), dtype)
    return pointers | dict.fromkeys(("p_center", "p_products", "p_sums"), torch.float32)


def _whole_launch(problem: Problem, choice: Choice | None = None) -> Launch:
    return reduce_launch(problem, choice, RELU=True, PRODUCTS=True, STORE_BIG=True)


def _timed(problem: Problem, dtype: torch.dtype, device: torch.device) -> Any:
    (x, *_), grad, out = drawn(problem, dtype, device)
    center = x.new_zeros(x.shape[1], dtype=torch.float32)
    size_big = (problem.height_big, problem.width_big)
    return lambda: reduce_op(grad, out, x, center, *size_big, True, True)


register(
    Tunable(
        name="expand_merge reduce",
        blocks={"BLOCK_ROWS": (16, 128), "BLOCK_C": (16, 256), "BLOCK_K": (16, 256)},
        kernel=_reduce_kernel,
        plan=_whole_launch,
        pointers=_pointers,
        key=Problem.key,
        problems=sites,
        candidates=lambda p: choices(REDUCE_BLOCKS, *REDUCE_CANDIDATES[p.itemsize]),
        call=_timed,
    )
)


def specializations() -> list[Specialization]:
    """List what ``blnet kernels compile`` builds: every branch of the kernel, in every dtype."""
    found = []
    for dtype in KERNEL_DTYPES:
        pointers = _pointers(dtype)
        short = str(dtype).removeprefix("torch.")
        for title, sizes in PROBLEMS.items():
            problem = Problem(*sizes, dtype.itemsize)
            launch = _whole_launch(problem)
            name = f"expand_merge reduce {title} {short}"
            found.append(specialize(name, _reduce_kernel, launch, pointers))
        problem = Problem(*PROBLEMS["residual K=64 C=256"], dtype.itemsize)
        launch = reduce_launch(problem, RELU=False, PRODUCTS=True, STORE_BIG=False)
        name = f"expand_merge reduce alone {short}"
        found.append(specialize(name, _reduce_kernel, launch, pointers))
    return found
