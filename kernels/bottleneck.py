"""bottleneck: a whole residual bottleneck for inference, in two kernels.

    h = relu(weight1 x + shift1)                                1x1, I channels
    u = relu(conv3x3(h, weight2) + shift2)                      stride 1, padding 1, I channels
    z = [relu](weight3 u + shift3 + shortcut)                   1x1, C channels
    out = relu(weight_expand z + shift_expand + upsample_nearest(big))      only if asked for

x is (N, C_in, H, W), shortcut (N, C, H, W) or x itself, big (N, C_out, H_big, W_big) of any size
or absent. BatchNorm in evaluation is folded: gamma / sqrt(var + eps) into the weight, the rest is
the shift. The last line is the end of a Big-Little module's little branch (`expand_merge`): the
branch's last block hands z on without writing it. Maps and weights are float32, float16 or
bfloat16; sums in float32; h, u and z are rounded to the weights' dtype, as eager PyTorch does.

The first kernel is ``expand_merge``'s, with no big. In 16 bits the second does the rest
(``bottleneck_close.py``): u never reaches memory, nor does z where the expansion is chained on.
That is where C is at most 256 and I, C and C_out are multiples of 16; else, and the numbers why are
there, the expansion is a third launch. In float32 without tf32 products run on ordinary units, and
one with the whole of I or C as its inner dimension spills; so u is a launch of ``conv3x3.py`` and z
and the output are launches of expand_merge's kernel.

Elements moved, with M = N H W pixels: M (C_in + I) by the first kernel; by the second M (I + 2 C),
or chained M (I + C + C_out) and those of big, M C_out / 4 when doubling. h is loaded nine times,
from L1 and L2. Against one kernel for each convolution this saves 2 M I, chained 2 M (I + C).
FLOPs: 2 M (C_in I + 9 I^2 + I C + C C_out), which is also what FlopCounterMode says on every
backend. There is no backward pass: differentiating the op is an error.

Layouts. As for expand_merge: the kernels see channels-last maps, another layout is copied first,
and the output takes x's layout. weight2 is packed as channels-last, (I, 3, 3, I); in a model that
is ``.to(memory_format=torch.channels_last)`` it is so already, else it is copied in every call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from blnet.kernels import reference, testing
from blnet.kernels.arguments import check_bottleneck, check_width
from blnet.kernels.backend import choose_backend
from blnet.kernels.bottleneck_close import (
    LARGEST_INNER,
    CloseProblem,
    _close_kernel,
    chains,
    close,
    close_candidates,
    close_launch,
    tuned_launch,
)
from blnet.kernels.conv3x3 import convolve
from blnet.kernels.expand_merge import forward
from blnet.kernels.expand_merge_sizes import Problem
from blnet.kernels.launch import Specialization, memory_format_of, specialize
from blnet.kernels.registration import cast_under_autocast, define_op
from blnet.kernels.tuning import Tunable, register

# The launcher ----------------------------------------------------------------------------------


def _bottleneck(
    x: torch.Tensor,
    weight1: torch.Tensor,
    shift1: torch.Tensor | None,
    weight2: torch.Tensor,
    shift2: torch.Tensor | None,
    weight3: torch.Tensor,
    shift3: torch.Tensor | None,
    shortcut: torch.Tensor,
    relu: bool,
    weight_expand: torch.Tensor | None,
    shift_expand: torch.Tensor | None,
    big: torch.Tensor | None,
) -> torch.Tensor:
    """Launch a bottleneck; the weights of 1x1 convolutions are matrices."""
    memory_format, last = memory_format_of(x), torch.channels_last
    h = forward(x.contiguous(memory_format=last), weight1, None, shift1, None, None, True)
    if h.dtype is torch.float32:
        u = convolve(h, weight2, shift2, 1, True)
        out = forward(u, weight3, None, shift3, None, shortcut, relu)
        chained = False
    else:
        # Widths are the network's: a graph with dynamic sizes may hold them fixed.
        inner, channels = int(weight2.shape[0]), int(weight3.shape[0])
        chained = weight_expand is not None and chains(
            (inner, channels, int(weight_expand.shape[0]))
        )
        expansion = None
        if chained:
            assert weight_expand is not None
            expansion = weight_expand, shift_expand, big
        out = close(h, weight2, shift2, weight3, shift3, shortcut, relu, expansion)
    if weight_expand is not None and not chained:
        # A float32 shortcut under autocast makes z float32: round it, as autocast's conv2d does.
        out = forward(out.to(x.dtype), weight_expand, None, shift_expand, None, big, True)
    return out.contiguous(memory_format=memory_format)


# The registered op ---------------------------------------------------------------------------


def flops(
    x: Any,
    weight1: Any,
    shift1: Any,
    weight2: Any,
    shift2: Any,
    weight3: Any,
    shift3: Any,
    shortcut: Any,
    relu: bool,
    weight_expand: Any,
    *others: Any,
    **keywords: Any,
) -> int:
    """Count the convolutions as FlopCounterMode does, from the shapes."""
    weights = [weight1, weight2, weight3] + ([] if weight_expand is None else [weight_expand])
    inner = weight2[0]
    products = sum(int(weight[0] * weight[1]) for weight in weights) + 8 * int(inner * inner)
    return 2 * int(x[0] * x[2] * x[3]) * products


bottleneck_op = define_op("blnet::bottleneck", _bottleneck, flops=flops, inference_only=True)


# The public function -------------------------------------------------------------------------


def bottleneck(
    x: torch.Tensor,
    weight1: torch.Tensor,
    shift1: torch.Tensor | None,
    weight2: torch.Tensor,
    shift2: torch.Tensor | None,
    weight3: torch.Tensor,
    shift3: torch.Tensor | None,
    shortcut: torch.Tensor | None = None,
    relu: bool = True,
    weight_expand: torch.Tensor | None = None,
    shift_expand: torch.Tensor | None = None,
    big: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a residual bottleneck with BN folded, and what expands and merges it, if given.

    Runs on the backend that ``blnet.kernels.backend`` chooses. On "torch" it is plain PyTorch
    (:func:`blnet.kernels.reference.bottleneck`), float64 included, and differentiable. On the
    kernels it is for inference. Under autocast x and the weights are cast as for torch.conv2d, and
    sums with shortcut and big are promoted as in torch.add.

    Args:
        x: shape (N, C_in, H, W), any layout.
        weight1: shape (I, C_in) or (I, C_in, 1, 1), dtype and device of x.
        shift1: shape (I,), any floating-point dtype; None for 0. So are the other shifts.
        weight2: shape (I, I, 3, 3); packed in advance if in channels-last memory.
        shift2: shape (I,).
        weight3: shape (C, I) or (C, I, 1, 1).
        shift3: shape (C,).
        shortcut: shape (N, C, H, W), the projected x; None for x itself, then C = C_in.
        relu: False leaves the block's closing ReLU out.
        weight_expand: shape (C_out, C) or (C_out, C, 1, 1); None ends after the block.
        shift_expand: shape (C_out,); only with weight_expand.
        big: shape (N, C_out, H_big, W_big); None for 0; only with weight_expand.

    Returns:
        Shape (N, C, H, W), or (N, C_out, H, W) with weight_expand, which always ends with a ReLU;
        in x's layout (channels-last or contiguous).

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, if I is above 128 on the kernels, or if
            the forced backend cannot run the tensors.
    """
    check_bottleneck(
        "bottleneck", x, (weight1, weight2, weight3), (shift1, shift2, shift3), shortcut,
        weight_expand, shift_expand, big,
    )  # fmt: skip
    if choose_backend("bottleneck", x) == "torch":
        return reference.bottleneck(
            x, weight1, shift1, weight2, shift2, weight3, shift3, shortcut, relu,
            weight_expand, shift_expand, big,
        )  # fmt: skip
    check_width("bottleneck", "the inner width", weight2.shape[0], LARGEST_INNER)
    shortcut = x if shortcut is None else shortcut  # before x is rounded
    x, weight1, weight2, weight3 = cast_under_autocast(x, weight1, weight2, weight3)
    if weight_expand is not None:
        (weight_expand,) = cast_under_autocast(weight_expand)
        weight_expand = weight_expand.reshape(weight_expand.shape[:2])
    weight1, weight3 = (weight.reshape(weight.shape[:2]) for weight in (weight1, weight3))
    return bottleneck_op(  # type: ignore[no-any-return]
        x, weight1, shift1, weight2, shift2, weight3, shift3, shortcut, relu,
        weight_expand, shift_expand, big,
    )  # fmt: skip


# For tuning and ahead-of-time compilation ------------------------------------------------------

# I, C, C_out, side, side of big: the little branches of bL-ResNet-50 at alpha 2 and 4, whose last
# block chains; the others end after z, and so does (128, 512).
_SITES = (
    (16, 64, 256, 56, 28),
    (32, 128, 512, 28, 14),
    (64, 256, 1024, 14, 7),
    (32, 128, 256, 56, 28),
    (64, 256, 512, 28, 14),
    (128, 512, 1024, 14, 7),
)


def _sites(chained: bool, batch: int, itemsize: int) -> dict[str, CloseProblem]:
    found = {}
    for inner, c, c_out, side, big in (
        _SITES if itemsize == 2 else ()
    ):  # float32 runs no such kernel
        if chained and chains((inner, c, c_out)):
            tail = Problem(batch, c, c_out, side, side, big, big, itemsize)
            found[f"I={inner} C={c} to {c_out}"] = CloseProblem(inner, tail, True)
        elif not chained:
            tail = Problem(batch, c, c, side, side, side, side, itemsize)
            found[f"I={inner} C={c} {side}x{side}"] = CloseProblem(inner, tail, False)
    return found


def _pointers(dtype: torch.dtype) -> dict[str, torch.dtype]:
    maps = ("p_h", "p_weight2", "p_weight3", "p_shortcut", "p_expand", "p_big", "p_out")
    shifts = ("p_shift2", "p_shift3", "p_shift_expand")
    return dict.fromkeys(maps, dtype) | dict.fromkeys(shifts, torch.float32)


def _timed(problem: CloseProblem, dtype: torch.dtype, device: torch.device) -> Any:
    tail, generator = problem.tail, torch.Generator(device).manual_seed(0)
    # With a narrow x the first kernel, which is timed with the second, takes little.
    sizes = (tail.n, 16, problem.inner, tail.channels_in, tail.height, tail.width)
    expansion = (tail.channels, tail.height_big, tail.width_big) if problem.chained else (0, 0, 0)
    shape = testing.BottleneckShape(*sizes, *expansion, "for timing")
    drawn = testing.bottleneck_inputs(shape, dtype, "channels_last", device, generator)
    tensors = [t.flatten(1) if t is not None and i in (1, 5, 8) else t for i, t in enumerate(drawn)]
    tensors[7] = drawn[0] if drawn[7] is None else drawn[7]
    return lambda: (bottleneck_op(*tensors[:8], True, *tensors[8:]),)


def _tunable(name: str, chained: bool, block: str) -> Tunable:
    return Tunable(
        name=name,
        # Chained, BLOCK_C is no choice: z is one tile of all its channels.
        blocks={"BLOCK_ROWS": (16, 256), "BLOCK_K": (16, 128), block: (16, 256)},
        kernel=_close_kernel,
        plan=tuned_launch,
        pointers=_pointers,
        key=CloseProblem.key,
        problems=partial(_sites, chained),
        candidates=close_candidates,
        call=_timed,
    )


register(_tunable("bottleneck alone", False, "BLOCK_C"))
register(_tunable("bottleneck chained", True, "BLOCK_OUT"))

# Name -> I and the sizes of what follows (N, C, C_out, H, W, H_big, W_big), and whether it chains:
# the little blocks of bL-ResNet-50 at alpha 4 and 2, and what compiles otherwise.
_PROBLEMS = {
    "I=16 C=64": (16, (32, 64, 64, 56, 56, 56, 56), False),
    "I=32 C=128": (32, (32, 128, 128, 56, 56, 56, 56), False),
    "I=64 C=256": (64, (32, 256, 256, 28, 28, 28, 28), False),
    "I=128 C=512": (128, (32, 512, 512, 14, 14, 14, 14), False),
    "wide I=128 C=512": (128, (2048, 512, 512, 111, 111, 111, 111), False),
    "unaligned I=9 C=37": (9, (3, 37, 37, 55, 55, 55, 55), False),
    "wide unaligned I=101 C=404": (101, (2048, 404, 404, 111, 111, 111, 111), False),
    "I=16 C=64 to 256 x2": (16, (32, 64, 256, 56, 56, 28, 28), True),
    "I=32 C=128 to 256 x2": (32, (32, 128, 256, 56, 56, 28, 28), True),
    "I=32 C=128 to 512 x2": (32, (32, 128, 512, 28, 28, 14, 14), True),
    "I=64 C=256 to 512 x2": (64, (32, 256, 512, 28, 28, 14, 14), True),
    "I=64 C=256 to 512 odd": (64, (32, 256, 512, 55, 55, 28, 28), True),
    "I=64 C=256 to 512 equal": (64, (32, 256, 512, 28, 28, 28, 28), True),
    "wide I=32 C=128 to 256 x2": (32, (2048, 128, 256, 112, 112, 56, 56), True),
    "wide I=64 C=256 to 512 odd": (64, (2048, 256, 512, 111, 111, 56, 56), True),
}


def specializations() -> list[Specialization]:
    """List what ``blnet kernels compile`` builds: every branch of the kernel, in 16 bits.

    What float32 runs is listed with ``conv3x3.py`` and expand_merge.
    """
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        pointers, short = _pointers(dtype), str(dtype).removeprefix("torch.")
        for title, (inner, sizes, chained) in _PROBLEMS.items():
            problem = CloseProblem(inner, Problem(*sizes, dtype.itemsize), chained)
            name = f"bottleneck {title} {short}"
            found.append(specialize(name, _close_kernel, tuned_launch(problem), pointers))
        flags = dict.fromkeys(("HAS_SHIFT2", "HAS_SHIFT3", "HAS_SHIFT_EXPAND"), True)
        inner, sizes, chained = _PROBLEMS["I=64 C=256 to 512 equal"]
        bare = CloseProblem(inner, Problem(*sizes, dtype.itemsize), chained)
        launch = close_launch(bare, None, HAS_BIG=False, RELU=False, **flags)
        name = f"bottleneck I=64 C=256 to 512 without big {short}"
        found.append(specialize(name, _close_kernel, launch, pointers))
    return found
