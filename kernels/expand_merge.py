"""expand_merge: relu(upsample(big) + scale conv1x1(x) + shift), the end of the little branch.

    y[n, c, i, j] = sum over k of weight[c, k] x[n, k, i, j]
    out[n, c, i, j] = relu(big[n, c, floor(i H_big / H), floor(j W_big / W)]
                           + scale[c] y[n, c, i, j] + shift[c])

x is (N, K, H, W), weight (C, K) or (C, K, 1, 1), scale and shift (C,), big (N, C, H_big, W_big)
and out (N, C, H, W). BatchNorm in evaluation is scale = gamma / sqrt(var + eps) and
shift = beta - mean scale; folded into the weight it leaves a shift only. big and the ReLU may be
absent; with equal sizes big is a residual. x, weight and big are float32, float16 or bfloat16;
sums in float32, and float32 products are exact to float32 (no tf32).

This file has the forward pass and the op with fixed statistics. ``expand_merge_backward.py`` has
the two backward kernels, ``expand_merge_train.py`` the op with the batch's own statistics, which
runs the same forward kernel.

Bytes, with M = N H W pixels and in elements: M (K + C) read and written, and M C / 4 of big
(doubling): y never reaches memory. x is read again for every tile of C, from L2. FLOPs: 2 M K C,
which is also what FlopCounterMode says on every backend. Backward reads dout, out and x twice,
writes dx and dbig: 4 M C + 3 M K + M C / 4, and computes 4 M K C.

Layouts. The kernels see rows x channels, that is channels-last; a map of another layout is copied
first, and the output takes x's layout (channels-last only if x is exactly that).
"""

# The arguments of kernels are typed by Triton, at launch:
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from typing import Any

import torch

from blnet.kernels import reference
from blnet.kernels.arguments import check_expand_merge
from blnet.kernels.backend import KERNEL_DTYPES, choose_backend
from blnet.kernels.expand_merge_backward import affine_gradients
from blnet.kernels.expand_merge_sizes import (
    PROBLEMS,
    Problem,
    channel_block,
    drawn,
    problem_of,
    sites,
    source_row,
)
from blnet.kernels.launch import (
    Launch,
    Specialization,
    allocate,
    ceil_divide,
    device_guard,
    known,
    memory_format_of,
    specialize,
)
from blnet.kernels.registration import cast_under_autocast, define_op, wrap_triton
from blnet.kernels.triton_shim import tl, triton
from blnet.kernels.tuning import Choice, Tunable, choices, choose, register

# Launch configuration -----------------------------------------------------------------------
#
# No device was at hand to tune on; compiled for sm_90, 128 x 128 outputs on 8 warps run on wgmma
# with 16-byte loads and without spills. float32 products run on the ordinary units.

# Where rows start at odd addresses loads are narrow and take registers: the tiles are smaller.

FORWARD_BLOCKS = "BLOCK_ROWS BLOCK_C BLOCK_K"  # then warps and stages
# (bytes of an element, aligned) -> what runs where no table says otherwise
FORWARD_RULE = {
    (2, True): (128, 128, 64, 8, 3),
    (2, False): (64, 64, 64, 8, 3),
    (4, True): (64, 64, 16, 8, 2),
    (4, False): (64, 32, 16, 8, 2),
}
# Bytes of an element -> what else to measure. None of these spills for sm_90 at any site; of what
# was tried these did in 16 bits: on 4 warps 128 x 128, 256 x 64 (64-bit offsets) and 64 x 256; on 8
# 128 x 256 and 256 x 128.
FORWARD_CANDIDATES = {
    2: (
        (128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 128, 128, 8, 2), (128, 64, 64, 8, 3),
        (128, 64, 64, 4, 3), (128, 64, 32, 4, 4), (64, 128, 64, 8, 3), (64, 128, 64, 4, 3),
        (64, 128, 128, 4, 2), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 128, 4, 2),
        (64, 256, 64, 8, 3), (256, 64, 64, 8, 3), (32, 256, 64, 8, 3), (32, 128, 64, 4, 3),
        (128, 32, 64, 4, 3), (64, 32, 64, 4, 3),
    ),
    4: (
        (64, 64, 16, 8, 3), (64, 64, 16, 8, 1), (64, 64, 16, 4, 2), (64, 64, 32, 8, 2),
        (128, 64, 16, 8, 2), (64, 128, 16, 8, 2), (128, 128, 16, 16, 2), (32, 128, 16, 8, 2),
        (128, 32, 16, 8, 2), (32, 64, 16, 4, 2), (64, 32, 16, 4, 2), (32, 64, 32, 4, 2),
        (32, 32, 32, 4, 2),
    ),
}  # fmt: skip


def forward_rule(problem: Problem) -> Choice:
    """Return the choice for a device that nobody measured."""
    (choice,) = choices(FORWARD_BLOCKS, FORWARD_RULE[problem.itemsize, problem.aligned])
    return choice


def forward_launch(problem: Problem, choice: Choice | None = None, **flags: bool) -> Launch:
    """Plan the forward pass; the flags are those constants of the kernel that sizes do not give."""
    choice = choice or forward_rule(problem)
    block_rows = choice["BLOCK_ROWS"]
    block_c = channel_block(problem.channels, choice["BLOCK_C"])
    return Launch(
        grid=(ceil_divide(problem.rows, block_rows) * ceil_divide(problem.channels, block_c),),
        integers={
            "rows": problem.rows,
            "channels_in": problem.channels_in,
            "channels": problem.channels,
            "height": problem.height,
            "width": problem.width,
            "height_big": problem.height_big,
            "width_big": problem.width_big,
        },
        constants={
            **flags,
            "SAME": problem.same,
            "RATIO_H": problem.ratios[0],
            "RATIO_W": problem.ratios[1],
            "WIDE": problem.wide,
            "BLOCK_ROWS": block_rows,
            "BLOCK_C": block_c,
            "BLOCK_K": channel_block(problem.channels_in, choice["BLOCK_K"]),
        },
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
    )


# Kernels: p_ is a pointer, o_ a tile of offsets, b_ a tile of values, m_ a mask -----------------


@triton.jit
def _forward_kernel(
    p_x,
    p_weight,
    p_scale,
    p_shift,
    p_center,
    p_big,
    p_out,
    rows,
    channels_in,
    channels,
    height,
    width,
    height_big,
    width_big,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    CENTER: tl.constexpr,  # subtract center from x: for float32 maps far from zero
    HAS_BIG: tl.constexpr,
    RELU: tl.constexpr,
    SAME: tl.constexpr,  # big is read where the output is written
    RATIO_H: tl.constexpr,  # height / height_big, width / width_big where both are whole numbers
    RATIO_W: tl.constexpr,  # and small; else both are 0
    WIDE: tl.constexpr,  # offsets may pass 32 bits
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    # Neighbouring programs share rows of x.
    blocks_c = tl.cdiv(channels, BLOCK_C)
    o_row = (program // blocks_c) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_c = (program % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_row, m_c = o_row < rows, o_c < channels

    b_sum = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)
    for k in tl.range(0, channels_in, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < channels_in
        o_x = o_row[:, None] * channels_in + o_k[None, :]
        b_x = tl.load(p_x + o_x, mask=m_row[:, None] & m_k[None, :], other=0.0)
        if CENTER:
            b_x = b_x - tl.load(p_center + o_k, mask=m_k, other=0.0)[None, :]
        o_weight = o_c[None, :] * channels_in + o_k[:, None]
        b_weight = tl.load(p_weight + o_weight, mask=m_k[:, None] & m_c[None, :], other=0.0)
        b_sum = tl.dot(b_x, b_weight, b_sum, input_precision="ieee")

    if HAS_SCALE:
        b_sum *= tl.load(p_scale + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        b_sum += tl.load(p_shift + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    m_tile = m_row[:, None] & m_c[None, :]
    if HAS_BIG:
        if SAME:
            o_big = o_row
        else:
            o_big = source_row(o_row, height, width, height_big, width_big, RATIO_H, RATIO_W)
        o_big = o_big[:, None] * channels + o_c[None, :]
        b_sum += tl.load(p_big + o_big, mask=m_tile, other=0.0).to(tl.float32)
    if RELU:
        # Not maximum(): a NaN is not <= 0 and so passes through, as in torch.relu.
        b_sum = tl.where(b_sum <= 0.0, 0.0, b_sum)
    o_out = o_row[:, None] * channels + o_c[None, :]
    tl.store(p_out + o_out, b_sum.to(p_out.dtype.element_ty), mask=m_tile)


# Launchers -----------------------------------------------------------------------------------


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    center: torch.Tensor | None,
    big: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    """Launch the forward kernel; weight is (C, K), center what to subtract from x first."""
    last = torch.channels_last
    memory_format, channels = memory_format_of(x), weight.shape[0]
    like = x if big is None or big.dtype == x.dtype else x.new_empty(0, dtype=_wider(x, big))
    out = allocate(like, (x.shape[0], channels, x.shape[2], x.shape[3]), last)
    if known(out.numel() == 0):
        return out.contiguous(memory_format=memory_format)
    source = x if big is None else big
    problem = problem_of(x, channels, (source.shape[2], source.shape[3]))
    flags = {"HAS_SCALE": scale is not None, "HAS_SHIFT": shift is not None}
    flags.update(CENTER=center is not None, HAS_BIG=big is not None, RELU=relu)
    choice = choose("expand_merge forward", problem.key(), x.device)
    launch = forward_launch(problem, choice, **flags)
    x, weight = x.contiguous(memory_format=last), weight.contiguous()
    vectors = [weight if v is None else v.contiguous() for v in (scale, shift, center)]
    big = x if big is None else big.contiguous(memory_format=last)
    with device_guard(out):
        wrap_triton(_forward_kernel)[launch.grid](
            p_x=x,
            p_weight=weight,
            p_scale=vectors[0],  # what is absent is never read
            p_shift=vectors[1],
            p_center=vectors[2],
            p_big=big,
            p_out=out,
            **launch.arguments,
        )
    return out.contiguous(memory_format=memory_format)


def _wider(x: torch.Tensor, big: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, big.dtype)


def _expand_merge(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    big: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    return forward(x, weight, scale, shift, None, big, relu)


# The registered op ---------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, scale, shift, big, relu = inputs
    ctx.size_big = None if big is None else tuple(big.shape[2:])
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, scale, shift, big))
    ctx.save_for_backward(x, weight, scale, output if relu else None)


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, scale, out = ctx.saved_tensors
    gradients = affine_gradients(
        grad, out, x, weight, scale, ctx.size_big, ctx.needs_input_grad[:5]
    )
    dtypes = (x.dtype, *ctx.dtypes)
    return (*(g if g is None else g.to(d) for g, d in zip(gradients, dtypes, strict=True)), None)


def flops(x: Any, weight: Any, *others: Any, **keywords: Any) -> int:
    """Count the convolution as FlopCounterMode does: 2 N H W K C, from the shapes."""
    return 2 * int(x[0] * x[2] * x[3]) * int(weight[0] * weight[1])


expand_merge_op = define_op(
    "blnet::expand_merge",
    _expand_merge,
    backward=_autograd,
    setup_context=_setup_context,
    flops=flops,
)


# The public function -------------------------------------------------------------------------


def expand_merge(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    big: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """Compute relu(upsample_nearest(big, x's size) + scale conv1x1(x, weight) + shift).

    Runs on the backend that ``blnet.kernels.backend`` chooses. On "torch" it is plain PyTorch
    (:func:`blnet.kernels.reference.expand_merge`), float64 included. Differentiable in every
    tensor: once on the kernels, any number of times on "torch". Under autocast x and weight are
    cast as for torch.conv2d, and the result is promoted with big as in torch.add.

    Args:
        x: shape (N, K, H, W), any layout.
        weight: shape (C, K, 1, 1) or (C, K), dtype and device of x.
        scale: shape (C,), any floating-point dtype; None for 1.
        shift: shape (C,), any floating-point dtype; None for 0. With BN folded into the weight
            it is the bias.
        big: shape (N, C, H_big, W_big), dtype and device of x; None for 0.
        relu: False leaves the closing ReLU out.

    Returns:
        Shape (N, C, H, W), in x's layout (channels-last or contiguous).

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, if big has no pixel to copy, or if
            the forced backend cannot run them.
    """
    check_expand_merge("expand_merge", x, weight, big, scale=scale, shift=shift)
    if choose_backend("expand_merge", x) == "torch":
        return reference.expand_merge(x, weight, scale, shift, big, relu)
    x, weight = cast_under_autocast(x, weight)
    weight = weight.reshape(weight.shape[0], weight.shape[1])
    return expand_merge_op(x, weight, scale, shift, big, relu)  # type: ignore[no-any-return]


# For tuning and ahead-of-time compilation ------------------------------------------------------


def _pointers(dtype: torch.dtype) -> dict[str, torch.dtype]:
    pointers = dict.fromkeys(("p_x", "p_weight", "p_big", "p_out"), dtype)
    return pointers | dict.fromkeys(("p_scale", "p_shift", "p_center"), torch.float32)


def _training_launch(problem: Problem, choice: Choice | None = None) -> Launch:
    flags = {"HAS_SCALE": True, "HAS_SHIFT": True, "HAS_BIG": True, "RELU": True}
    return forward_launch(problem, choice, CENTER=problem.itemsize == 4, **flags)


def _timed(problem: Problem, dtype: torch.dtype, device: torch.device) -> Any:
    tensors, _, _ = drawn(problem, dtype, device)
    return lambda: (expand_merge_op(*tensors, True),)


register(
    Tunable(
        name="expand_merge forward",
        blocks={"BLOCK_ROWS": (16, 256), "BLOCK_C": (16, 256), "BLOCK_K": (16, 128)},
        kernel=_forward_kernel,
        plan=_training_launch,
        pointers=_pointers,
        key=Problem.key,
        problems=sites,
        candidates=lambda p: choices(FORWARD_BLOCKS, *FORWARD_CANDIDATES[p.itemsize]),
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
            flags = {"HAS_SCALE": False, "HAS_SHIFT": True, "HAS_BIG": True, "RELU": True}
            for use, launch in (
                ("inference", forward_launch(problem, None, CENTER=False, **flags)),
                ("training", _training_launch(problem)),
            ):
                name = f"expand_merge {use} {title} {short}"
                found.append(specialize(name, _forward_kernel, launch, pointers))
        flags = {"HAS_SCALE": False, "HAS_SHIFT": True, "CENTER": False, "RELU": False}
        problem = Problem(*PROBLEMS["residual K=64 C=256"], dtype.itemsize)
        launch = forward_launch(problem, None, HAS_BIG=False, **flags)
        name = f"expand_merge alone {short}"
        found.append(specialize(name, _forward_kernel, launch, pointers))
    return found
