"""merge: relu(upsample(big) + little), where two branches meet, and every residual add.

    out[n, c, i, j] = relu(big[n, c, floor(i H_big / H), floor(j W_big / W)] + little[n, c, i, j])

big is (N, C, H_big, W_big), little and out are (N, C, H, W); any sizes, H_big > H included. With
equal sizes it is a plain residual add. float32, float16 and bfloat16; sums in float32.

Backward, with g = dout where out > 0 and else 0: dlittle = g, and dbig is the sum of g over the
window of pixels that were copied from a big pixel, ceil(b H / H_big) to
ceil((b + 1) H / H_big) - 1 in each axis (empty for some b where H_big > H). One pass, no atomics:
bits repeat. Only the output is saved. As with torch.relu a NaN output passes its gradient on.

Both passes are bound by memory. With M = N C H W elements and big a quarter of that (doubling),
in bytes per element of the dtype: forward reads M + M/4 and writes M; backward reads 2 M (dout,
out) and writes M + M/4. FLOPs: M additions, and M more in backward; nothing that PyTorch's
FlopCounterMode counts (it counts matrix products and convolutions), so the formula says 0 and a
network's count is the same on every backend.

Layouts. A map is seen as (outer, H, W, inner), inner contiguous: channels-last is (N, H, W, C),
contiguous is (N C, H, W, 1). The output takes little's layout (channels-last only if little is
exactly that; any other view is made contiguous) and big is brought to it first, which copies only
where they differ.

This file is the pattern for every op; its order is that of every op file.
"""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from typing import Any

import torch

from blnet.kernels import reference
from blnet.kernels.arguments import check_map, check_merge_sizes, check_same_kind
from blnet.kernels.backend import KERNEL_DTYPES, choose_backend
from blnet.kernels.launch import (
    Launch,
    Specialization,
    allocate,
    device_guard,
    known,
    memory_format_of,
    specialize,
)
from blnet.kernels.merge_sizes import (
    BACKWARD_CANDIDATES,
    FORWARD_CANDIDATES,
    PROBLEMS,
    Problem,
    Shape,
    Size,
    candidates,
    drawn,
    equal_sizes,
    key,
    plan,
    site_key,
    sites,
)
from blnet.kernels.registration import (
    define_op,
    no_flops,
    promote_under_autocast,
    wrap_triton,
)
from blnet.kernels.triton_shim import tl, triton
from blnet.kernels.tuning import Choice, Tunable, choose, register

# Launch configuration -----------------------------------------------------------------------
#
# No device was at hand to tune on, so this follows from counting. 128 threads with 16-byte
# accesses move 2 KiB an instruction. Forward: 8 KiB of output a program gives each thread four
# independent loads from little and four from big before the first use, about 18 KiB moved a
# program, enough to pay for its start. Backward with doubling: 2 KiB of big is already four
# windows of dout and of out, eight loads in flight, 26 KiB moved.

FORWARD_TILE_BYTES = 8192
BACKWARD_TILE_BYTES = 2048


def forward_launch(
    shape: Shape, size_big: Size, itemsize: int, choice: Choice | None = None
) -> Launch:
    """Plan the forward pass; ``itemsize`` is the bytes of an element."""
    same = equal_sizes((shape, size_big, itemsize))
    return plan(shape, size_big, False, FORWARD_TILE_BYTES // itemsize, choice, SAME=same)


def backward_launch(
    shape: Shape,
    size_big: Size,
    itemsize: int,
    needs_big: bool,
    needs_little: bool,
    choice: Choice | None = None,
) -> Launch:
    """Plan the backward pass: over big's pixels, or over all elements where only g is wanted."""
    tile = (BACKWARD_TILE_BYTES if needs_big else FORWARD_TILE_BYTES) // itemsize
    flags = {"SAME": not needs_big, "STORE_LITTLE": needs_little}
    return plan(shape, size_big, needs_big, tile, choice, **flags)


# Kernels: p_ is a pointer, o_ a tile of offsets, b_ a tile of values, m_ a mask -----------------


@triton.jit
def _forward_kernel(
    p_big,
    p_little,
    p_out,
    rows,  # of the output: outer * height * width
    inner,
    height,
    width,
    height_big,
    width_big,
    SAME: tl.constexpr,  # sizes are equal: big is read where little is
    RATIO_H: tl.constexpr,  # height / height_big, width / width_big where both are whole numbers
    RATIO_W: tl.constexpr,  # and small; else both are 0
    WIDE: tl.constexpr,  # offsets may pass 32 bits
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    # Neighbouring programs share rows, and so share big's cache lines.
    blocks_inner = tl.cdiv(inner, BLOCK_INNER)
    o_row = (program // blocks_inner) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_inner = (program % blocks_inner) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    m_tile = (o_row < rows)[:, None] & (o_inner < inner)[None, :]

    if SAME:
        o_row_big = o_row
    else:
        line = o_row // width  # outer * height lines of width pixels
        column = o_row - line * width
        if RATIO_H > 0:
            line_big = line // RATIO_H  # height is a multiple, so this crosses no image
            column_big = column // RATIO_W
        else:
            image = line // height
            line_big = image * height_big + (line - image * height) * height_big // height
            column_big = column * width_big // width
        o_row_big = line_big * width_big + column_big

    o_out = o_row[:, None] * inner + o_inner[None, :]
    o_big = o_row_big[:, None] * inner + o_inner[None, :]
    b_big = tl.load(p_big + o_big, mask=m_tile, other=0.0).to(tl.float32)
    b_little = tl.load(p_little + o_out, mask=m_tile, other=0.0).to(tl.float32)
    b_sum = b_big + b_little
    # Not maximum(): a NaN is not <= 0 and so passes through, as in torch.relu.
    b_out = tl.where(b_sum <= 0.0, 0.0, b_sum)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def _masked_gradient(p_grad, p_out, p_dlittle, o_tile, m_tile, STORE_LITTLE: tl.constexpr):
    """Return g = dout where out > 0 for one tile, and write it to dlittle."""
    b_grad = tl.load(p_grad + o_tile, mask=m_tile, other=0.0)
    b_out = tl.load(p_out + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_g = tl.where(b_out <= 0.0, 0.0, b_grad.to(tl.float32))
    if STORE_LITTLE:
        tl.store(p_dlittle + o_tile, b_g.to(p_dlittle.dtype.element_ty), mask=m_tile)
    return b_g


@triton.jit
def _backward_kernel(
    p_grad,
    p_out,
    p_dbig,
    p_dlittle,
    rows,  # of dbig: outer * height_big * width_big
    inner,
    height,
    width,
    height_big,
    width_big,
    SAME: tl.constexpr,  # only g is wanted: no windows
    STORE_LITTLE: tl.constexpr,
    RATIO_H: tl.constexpr,
    RATIO_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    blocks_inner = tl.cdiv(inner, BLOCK_INNER)
    o_row = (program // blocks_inner) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_inner = (program % blocks_inner) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    m_inner = (o_inner < inner)[None, :]
    m_row = o_row < rows
    m_tile = m_row[:, None] & m_inner
    o_big = o_row[:, None] * inner + o_inner[None, :]

    if SAME:
        _masked_gradient(p_grad, p_out, p_dlittle, o_big, m_tile, STORE_LITTLE)
    else:
        line_big = o_row // width_big
        column_big = o_row - line_big * width_big
        b_sum = tl.zeros((BLOCK_ROWS, BLOCK_INNER), dtype=tl.float32)
        if RATIO_H > 0:
            # Every window is RATIO_H x RATIO_W pixels and lies inside its image.
            for i in tl.static_range(RATIO_H):
                for j in tl.static_range(RATIO_W):
                    line = line_big * RATIO_H + i
                    o_pixel = line * width + column_big * RATIO_W + j
                    o_tile = o_pixel[:, None] * inner + o_inner[None, :]
                    b_sum += _masked_gradient(
                        p_grad, p_out, p_dlittle, o_tile, m_tile, STORE_LITTLE
                    )
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
                    o_tile = o_pixel[:, None] * inner + o_inner[None, :]
                    b_sum += _masked_gradient(
                        p_grad, p_out, p_dlittle, o_tile, m_pixel[:, None] & m_inner, STORE_LITTLE
                    )
        tl.store(p_dbig + o_big, b_sum.to(p_dbig.dtype.element_ty), mask=m_tile)


# Launchers -----------------------------------------------------------------------------------


def _blocked(tensor: torch.Tensor, memory_format: torch.memory_format) -> Shape:
    n, c, h, w = tensor.shape
    return (n, h, w, c) if memory_format == torch.channels_last else (n * c, h, w, 1)


def _merge(big: torch.Tensor, little: torch.Tensor) -> torch.Tensor:
    memory_format = memory_format_of(little)
    big = big.contiguous(memory_format=memory_format)
    little = little.contiguous(memory_format=memory_format)
    out = allocate(little, tuple(little.shape), memory_format)
    if known(out.numel() == 0):
        return out
    size_big = (big.shape[2], big.shape[3])
    sizes = (_blocked(little, memory_format), size_big, little.element_size())
    choice = choose("merge forward", key(*sizes, equal_sizes(sizes)), out.device)
    launch = forward_launch(*sizes, choice)
    with device_guard(out):
        wrap_triton(_forward_kernel)[launch.grid](
            p_big=big, p_little=little, p_out=out, **launch.arguments
        )
    return out


def _merge_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    height_big: int,
    width_big: int,
    needs_big: bool,
    needs_little: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Returns (dbig, dlittle); what is not needed comes back with no elements.
    memory_format = memory_format_of(out)
    grad = grad.contiguous(memory_format=memory_format)
    shape_big = (out.shape[0], out.shape[1], height_big, width_big)
    dbig = allocate(out, shape_big, memory_format) if needs_big else out.new_empty(0)
    dlittle = allocate(out, tuple(out.shape), memory_format) if needs_little else out.new_empty(0)
    if known(out.numel() == 0):
        return dbig.zero_(), dlittle
    sizes = (_blocked(out, memory_format), (height_big, width_big), out.element_size())
    choice = choose("merge backward", key(*sizes, not needs_big), out.device)
    launch = backward_launch(*sizes, needs_big, needs_little, choice)
    with device_guard(out):
        wrap_triton(_backward_kernel)[launch.grid](
            p_grad=grad, p_out=out, p_dbig=dbig, p_dlittle=dlittle, **launch.arguments
        )
    return dbig, dlittle


# The registered ops --------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: Any) -> None:
    ctx.size_big = inputs[0].shape[2:]
    ctx.save_for_backward(output)


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    (out,) = ctx.saved_tensors
    needs_big, needs_little = ctx.needs_input_grad
    height_big, width_big = ctx.size_big
    if known(out.shape[2] == height_big) and known(out.shape[3] == width_big):
        # Both gradients are g. One write serves both, as in PyTorch's own add: autograd knows
        # that the tensor is shared and copies before it accumulates in place.
        _, g = merge_backward_op(grad, out, height_big, width_big, False, True)
        return (g if needs_big else None), (g if needs_little else None)
    dbig, dlittle = merge_backward_op(grad, out, height_big, width_big, needs_big, needs_little)
    return (dbig if needs_big else None), (dlittle if needs_little else None)


merge_backward_op = define_op("blnet::merge_backward", _merge_backward)
merge_op = define_op(
    "blnet::merge", _merge, backward=_autograd, setup_context=_setup_context, flops=no_flops
)


# The public function -------------------------------------------------------------------------


def merge(big: torch.Tensor, little: torch.Tensor) -> torch.Tensor:
    """Compute relu(upsample_nearest(big, little's size) + little).

    Runs on the backend that ``blnet.kernels.backend`` chooses. On "torch" it is plain PyTorch
    (:func:`blnet.kernels.reference.merge`), float64 included; the kernels take float32, float16
    and bfloat16. Differentiable once on the kernels, any number of times on "torch".

    Args:
        big: shape (N, C, H_big, W_big), any layout.
        little: shape (N, C, H, W), same N, C, dtype and device; any H and W, larger or smaller
            than big's. Under autocast mixed dtypes are promoted to the wider, as torch.add does.

    Returns:
        Shape (N, C, H, W), in little's layout (channels-last or contiguous).

    Raises:
        ValueError: if an argument is not a 4-dimensional floating-point tensor, if N, C, dtype or
            device differ, if big has no pixel to copy, or if the forced backend cannot run them.
    """
    check_map("merge", "big", big)
    check_map("merge", "little", little)
    check_merge_sizes("merge", big, little)
    big, little = promote_under_autocast(big, little)
    check_same_kind("merge", big=big, little=little)
    if choose_backend("merge", little) == "torch":
        return reference.merge(big, little)
    return merge_op(big, little)  # type: ignore[no-any-return]


# For tuning and ahead-of-time compilation ------------------------------------------------------

_BLOCKS = {"BLOCK_ROWS": (1, 16384), "BLOCK_INNER": (1, 256)}


def _forward_pointers(dtype: torch.dtype) -> dict[str, torch.dtype]:
    return dict.fromkeys(("p_big", "p_little", "p_out"), dtype)


def _backward_pointers(dtype: torch.dtype) -> dict[str, torch.dtype]:
    return dict.fromkeys(("p_grad", "p_out", "p_dbig", "p_dlittle"), dtype)


def _forward_plan(problem: Problem, choice: Choice | None = None) -> Launch:
    return forward_launch(*problem, choice)


def _backward_plan(problem: Problem, choice: Choice | None = None) -> Launch:
    return backward_launch(*problem, not equal_sizes(problem), True, choice)


def _forward_call(problem: Problem, dtype: torch.dtype, device: torch.device) -> Any:
    big, little, _ = drawn(problem, dtype, device)
    return lambda: (merge_op(big, little),)


def _backward_call(problem: Problem, dtype: torch.dtype, device: torch.device) -> Any:
    _, out, grad = drawn(problem, dtype, device)
    # As autograd asks: at equal sizes both gradients are one.
    return lambda: merge_backward_op(grad, out, *problem[1], not equal_sizes(problem), True)


register(
    Tunable(
        name="merge forward",
        blocks=_BLOCKS,
        kernel=_forward_kernel,
        plan=_forward_plan,
        pointers=_forward_pointers,
        key=site_key,
        problems=sites,
        candidates=lambda problem: candidates(problem, FORWARD_CANDIDATES),
        call=_forward_call,
    )
)
register(
    Tunable(
        name="merge backward",
        blocks=_BLOCKS,
        kernel=_backward_kernel,
        plan=_backward_plan,
        pointers=_backward_pointers,
        key=site_key,
        problems=sites,
        candidates=lambda problem: candidates(problem, BACKWARD_CANDIDATES),
        call=_backward_call,
    )
)


def specializations() -> list[Specialization]:
    """List what ``blnet kernels compile`` builds: every branch of the kernels, in every dtype."""
    found = []
    for dtype in KERNEL_DTYPES:
        for problem, (shape, size_big) in PROBLEMS.items():
            name = f"{problem} {str(dtype).removeprefix('torch.')}"
            launch = _forward_plan((shape, size_big, dtype.itemsize))
            pointers = _forward_pointers(dtype)
            found.append(specialize(f"merge forward {name}", _forward_kernel, launch, pointers))
            launch = _backward_plan((shape, size_big, dtype.itemsize))
            pointers = _backward_pointers(dtype)
            found.append(specialize(f"merge backward {name}", _backward_kernel, launch, pointers))
    return found
