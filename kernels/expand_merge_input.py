"""The second backward kernel of expand_merge: the gradient of x.

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

INPUT_BLOCKS = "BLOCK_ROWS BLOCK_C BLOCK_K"  # C: the summed channels; then warps and stages
# (bytes of an element, aligned) -> what runs where no table says otherwise
INPUT_RULE = {
    (2, True): (64, 32, 128, 8, 2),
    (2, False): (64, 16, 64, 8, 2),
    (4, True): (64, 16, 64, 8, 1),
    (4, False): (64, 16, 64, 8, 1),
}
# Bytes of an element -> what else to measure. None of these spills for sm_90 at any site; of what
# was tried only 128 rows of 64 on 8 warps did, in float32.
INPUT_CANDIDATES = {
    2: (
        (64, 32, 128, 8, 3), (64, 16, 128, 8, 3), (64, 64, 128, 8, 2), (64, 64, 128, 8, 1),
        (64, 32, 128, 4, 2), (128, 32, 128, 8, 2), (32, 64, 128, 8, 2), (32, 64, 128, 4, 2),
        (32, 32, 128, 4, 2), (64, 32, 64, 8, 3), (64, 64, 64, 8, 2), (64, 64, 64, 4, 2),
        (64, 32, 64, 4, 3), (128, 32, 64, 8, 3), (128, 64, 64, 8, 2), (128, 32, 64, 4, 2),
        (32, 64, 64, 4, 3), (64, 32, 256, 8, 2),
    ),
    4: (
        (64, 16, 64, 8, 2), (64, 32, 64, 8, 1), (64, 16, 64, 4, 1), (64, 16, 128, 8, 1),
        (32, 16, 64, 8, 2), (32, 16, 64, 4, 1), (32, 16, 64, 4, 2), (32, 32, 64, 4, 1),
        (64, 16, 32, 4, 1), (64, 32, 32, 8, 1), (32, 32, 32, 4, 2),
    ),
}  # fmt: skip


def input_rule(problem: Problem) -> Choice:
    """Return the choice for a device that nobody measured."""
    (choice,) = choices(INPUT_BLOCKS, INPUT_RULE[problem.itemsize, problem.aligned])
    return choice


def input_launch(problem: Problem, choice: Choice | None = None, **flags: bool) -> Launch:
    """Plan the pass that writes dx."""
    choice = choice or input_rule(problem)
    tile_rows, tile_c = choice["BLOCK_ROWS"], choice["BLOCK_C"]
    block_k = channel_block(problem.channels_in, choice["BLOCK_K"])
    tiles_k = ceil_divide(problem.channels_in, block_k)
    return Launch(
        grid=(ceil_divide(problem.rows, tile_rows) * tiles_k,),
        integers={
            "rows": problem.rows,
            "channels_in": problem.channels_in,
            "channels": problem.channels,
        },
        constants={
            **flags,
            "WIDE": problem.wide,
            "BLOCK_ROWS": tile_rows,
            "BLOCK_C": channel_block(problem.channels, tile_c),
            "BLOCK_IN": channel_block(problem.channels_in, tile_c),
            "BLOCK_K": block_k,
        },
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
    )


# Kernels: p_ is a pointer, o_ a tile of offsets, b_ a tile of values, m_ a mask -----------------


@triton.jit
def _input_kernel(
    p_grad,
    p_out,
    p_x,
    p_weight,  # (channels, channels_in)
    p_scale,
    p_offset,
    p_second,  # (channels_in, channels_in), each column in its unit
    p_unit,
    p_constant,
    p_center,
    p_dx,
    rows,
    channels_in,
    channels,
    RELU: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STATISTICS: tl.constexpr,  # False: (g scale) weight alone
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    blocks_k = tl.cdiv(channels_in, BLOCK_K)
    o_row = (program // blocks_k) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_k = (program % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_row, m_k = o_row < rows, o_k < channels_in
    dtype = p_x.dtype.element_ty

    b_dx = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=tl.float32)
    for c in tl.range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        b_g = gradient(p_grad, p_out, o_row, o_c, m_row, m_c, channels, RELU)
        if STATISTICS:
            b_g -= tl.load(p_offset + o_c, mask=m_c, other=0.0)[None, :]
        if HAS_SCALE:
            b_g *= tl.load(p_scale + o_c, mask=m_c, other=0.0)[None, :]
        o_weight = o_c[:, None] * channels_in + o_k[None, :]
        b_weight = tl.load(p_weight + o_weight, mask=m_c[:, None] & m_k[None, :], other=0.0)
        b_dx = tl.dot(b_g.to(dtype), b_weight, b_dx, input_precision="ieee")
    if STATISTICS:
        # One accumulator for both products, so it is in second's units for a while.
        b_unit = tl.load(p_unit + o_k, mask=m_k, other=1.0)[None, :]
        b_dx *= 1.0 / b_unit
        for k in tl.range(0, channels_in, BLOCK_IN):
            o_in = k + tl.arange(0, BLOCK_IN)
            m_in = o_in < channels_in
            b_center = tl.load(p_center + o_in, mask=m_in, other=0.0)
            b_z = centered(p_x, b_center, o_row, o_in, m_row, m_in, channels_in)
            o_second = o_in[:, None] * channels_in + o_k[None, :]
            b_second = tl.load(p_second + o_second, mask=m_in[:, None] & m_k[None, :], other=0.0)
            b_dx = tl.dot(b_z, b_second, b_dx, input_precision="ieee")
        b_dx *= b_unit
        b_dx += tl.load(p_constant + o_k, mask=m_k, other=0.0)[None, :]
    o_dx = o_row[:, None] * channels_in + o_k[None, :]
    tl.store(p_dx + o_dx, b_dx.to(dtype), mask=m_row[:, None] & m_k[None, :])


# The launcher and the registered op -----------------------------------------------------------


def _input(
    grad: torch.Tensor,
    out: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    second: torch.Tensor | None,
    unit: torch.Tensor | None,
    constant: torch.Tensor | None,
    center: torch.Tensor | None,
) -> torch.Tensor:
    # Returns dx. scale and what follows but for second are float32; what follows scale is given
    # together or not at all.
    memory_format = memory_format_of(x)
    dx = allocate(x, tuple(x.shape), torch.channels_last)
    if known(x.numel() == 0):
        return dx.contiguous(memory_format=memory_format)
    statistics = second is not None
    problem = problem_of(x, grad.shape[1], (x.shape[2], x.shape[3]))
    flags = {"RELU": out is not None, "HAS_SCALE": scale is not None, "STATISTICS": statistics}
    choice = choose("expand_merge input", problem.key(upsampling=False), x.device)
    launch = input_launch(problem, choice, **flags)
    x, grad, weight = channels_last(x), channels_last(grad), weight.contiguous()
    # What is absent is never read.
    vectors = [
        weight if v is None else v.contiguous() for v in (scale, offset, unit, constant, center)
    ]
    with device_guard(dx):
        wrap_triton(_input_kernel)[launch.grid](
            p_grad=grad,
            p_out=grad if out is None else channels_last(out),
            p_x=x,
            p_weight=weight,
            p_scale=vectors[0],
            p_offset=vectors[1],
            p_second=weight if second is None else second.contiguous(),
            p_unit=vectors[2],
            p_constant=vectors[3],
            p_center=vectors[4],
            p_dx=dx,
            **launch.arguments,
        )
    return dx.contiguous(memory_format=memory_format)


def _input_flops(grad: Any, out: Any, x: Any, *others: Any, **keywords: Any) -> int:
    # As the convolution's backward is counted; the product with second is this method's own.
    return 2 * int(x[0] * x[2] * x[3]) * int(x[1] * grad[1])


input_op = define_op("blnet::expand_merge_input", _input, flops=_input_flops)


# For tuning and ahead-of-time compilation ------------------------------------------------------


def _pointers(dtype: torch.dtype) -> dict[str, torch.dtype]:
    names = ("p_grad", "p_out", "p_x", "p_weight", "p_second", "p_dx")
    vectors = ("p_scale", "p_offset", "p_unit", "p_constant", "p_center")
    return dict.fromkeys(names, dtype) | dict.fromkeys(vectors, torch.float32)


def _training_launch(problem: Problem, choice: Choice | None = None) -> Launch:
    return input_launch(problem, choice, RELU=True, HAS_SCALE=True, STATISTICS=True)


def _timed(problem: Problem, dtype: torch.dtype, device: torch.device) -> Any:
    (x, weight, scale, shift, *_), grad, out = drawn(problem, dtype, device)
    second = weight.mT @ weight / len(weight)
    center = x.new_zeros(x.shape[1], dtype=torch.float32)
    unit = torch.ones_like(center)
    arguments = (grad, out, x, weight, scale, shift, second, unit, center, center)
    return lambda: (input_op(*arguments),)


register(
    Tunable(
        name="expand_merge input",
        blocks={"BLOCK_ROWS": (16, 256), "BLOCK_C": (16, 128), "BLOCK_K": (16, 256)},
        kernel=_input_kernel,
        plan=_training_launch,
        pointers=_pointers,
        key=lambda problem: problem.key(upsampling=False),
        problems=sites,
        candidates=lambda p: choices(INPUT_BLOCKS, *INPUT_CANDIDATES[p.itemsize]),
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
            launch = _training_launch(problem)
            name = f"expand_merge input {title} {short}"
            found.append(specialize(name, _input_kernel, launch, pointers))
        problem = Problem(*PROBLEMS["residual K=64 C=256"], dtype.itemsize)
        launch = input_launch(problem, RELU=False, HAS_SCALE=False, STATISTICS=False)
        name = f"expand_merge input alone {short}"
        found.append(specialize(name, _input_kernel, launch, pointers))
    return found
