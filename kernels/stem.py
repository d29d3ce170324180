"""stem: the end of the Big-Little stem for inference, as one kernel.

    big = conv3x3/2(x, weight_big) + shift_big                  or x itself, given
    l   = relu(conv3x3/2(little, weight_little) + shift_little) or little itself, given
    z   = relu(big + weight_expand l + shift_expand)            L channels to C
    out = relu(weight_fusion z + shift_fusion)                  C channels to C_out

conv3x3/2 has stride 2 and padding 1: from (H_in, W_in) to (ceil(H_in / 2), ceil(W_in / 2)). In the
terms of ``blnet.stem.BigLittlePool`` with BN folded: x and little are the stem's map and what the
little branch's first convolution makes of it, weight_expand is ``expand``, weight_fusion
``fusion``. Maps and weights are float32, float16 or bfloat16; sums in float32; l and z are rounded
to the weights' dtype, as eager PyTorch does.

A program owns 64 or 128 pixels of the output with all their channels; big, l and z stay in
registers. In float32 without tf32 the products run on ordinary units and spill at these widths, so
there, and where a width is no multiple of 16, the op is the launches of ``conv3x3.py`` and of
expand_merge's kernel, one for each line.

What it saves, in bytes of 16-bit maps for one image of 224 x 224 (x 112 x 112 x 64, little
112 x 112 x 32, out 56 x 56 x 64), and at 3.0 TB/s, the bound of one H100, for 256 images:

    conv of big            reads 1 605 632, writes 401 408
    conv of little         reads   802 816, writes 200 704
    expand_merge           reads   602 112, writes 401 408
    fusion                 reads   401 408, writes 401 408      in all 4 816 896: 411 us
    the last two as one    reads   602 112, writes 401 408      saves    802 816:  69 us
    all four as one        reads 2 408 448, writes 401 408      saves  2 007 040: 171 us

and the launches of one or three kernels. Pixels of x and little are loaded 9 / 4 times, from L2
but for the first. FLOPs: 2 M (9 C_x C + 9 C_l L + L C + C C_out) with M pixels of the output, each
convolution where it is computed here; FlopCounterMode says the same on every backend.

The little branch's first convolution, 3x3 of x, is not pulled in: an output needs a 3x3 window of
its result at stride 2, and outputs do not share: each of its pixels would be computed 9 / 4 times.
462 million FLOPs an image become 1040, which with the other 328 take 443 us for 256 images at an
H100's full 790 TFLOP/s. Apart both kernels are bound by their bytes, that convolution by 205 us and
all else as one kernel by 240: nothing is gained. No device was at hand to time any of this.

There is no backward pass: differentiating the op is an error. Layouts as for expand_merge; 3x3
weights are packed as for bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch

from blnet.kernels import reference, testing
from blnet.kernels.arguments import check_stem, check_width
from blnet.kernels.backend import choose_backend
from blnet.kernels.conv3x3 import convolve, strided_size
from blnet.kernels.expand_merge import forward
from blnet.kernels.launch import Specialization, memory_format_of, specialize
from blnet.kernels.registration import cast_under_autocast, define_op
from blnet.kernels.stem_close import (
    LARGEST_WIDTH,
    StemProblem,
    _stem_kernel,
    close_stem,
    fits_at_once,
    stem_candidates,
    tuned_launch,
)
from blnet.kernels.tuning import Tunable, register

# The launcher ----------------------------------------------------------------------------------


def _stem(
    x: torch.Tensor,
    little: torch.Tensor,
    weight_expand: torch.Tensor,
    shift_expand: torch.Tensor | None,
    weight_fusion: torch.Tensor,
    shift_fusion: torch.Tensor | None,
    weight_big: torch.Tensor | None,
    shift_big: torch.Tensor | None,
    weight_little: torch.Tensor | None,
    shift_little: torch.Tensor | None,
) -> torch.Tensor:
    """Launch a stem's end; weight_expand and weight_fusion are matrices."""
    memory_format, last = memory_format_of(x), torch.channels_last
    x, little = x.contiguous(memory_format=last), little.contiguous(memory_format=last)
    stride = 1 if weight_big is None else 2
    size = strided_size(x.shape[2], stride), strided_size(x.shape[3], stride)
    # Widths are the network's: a graph with dynamic sizes may hold them fixed.
    problem = StemProblem(
        x.shape[0], int(x.shape[1]), int(little.shape[1]), int(weight_expand.shape[1]),
        int(weight_expand.shape[0]), int(weight_fusion.shape[0]), *size,
        (x.shape[2], x.shape[3]), (little.shape[2], little.shape[3]),
        (weight_big is not None, weight_little is not None),
    )  # fmt: skip
    if little.dtype is not torch.float32 and fits_at_once(problem):
        pairs = {
            "BIG": (weight_big, shift_big),
            "LITTLE": (weight_little, shift_little),
            "EXPAND": (weight_expand, shift_expand),
            "FUSION": (weight_fusion, shift_fusion),
        }
        out = close_stem(x, little, pairs, problem)
    else:
        if weight_big is not None:
            x = convolve(x, weight_big, shift_big, 2, False)
        if weight_little is not None:
            little = convolve(little, weight_little, shift_little, 2, True)
        z = forward(little, weight_expand, None, shift_expand, None, x, True)
        # Under autocast a float32 big makes z float32: round it, as autocast's conv2d does.
        z = z.to(weight_fusion.dtype)
        out = forward(z, weight_fusion, None, shift_fusion, None, None, True)
    return out.contiguous(memory_format=memory_format)


# The registered op ---------------------------------------------------------------------------


def flops(
    x: Any,
    little: Any,
    weight_expand: Any,
    shift_expand: Any,
    weight_fusion: Any,
    shift_fusion: Any,
    weight_big: Any,
    shift_big: Any,
    weight_little: Any,
    *others: Any,
    **keywords: Any,
) -> int:
    """Count the convolutions as FlopCounterMode does, from the shapes."""
    products = int(weight_expand[0] * weight_expand[1] + weight_fusion[0] * weight_fusion[1])
    for weight in (weight_big, weight_little):
        products += 0 if weight is None else 9 * int(weight[0] * weight[1])
    stride = 1 if weight_big is None else 2
    size = strided_size(int(x[2]), stride) * strided_size(int(x[3]), stride)
    return 2 * int(x[0]) * size * products


stem_op = define_op("blnet::stem", _stem, flops=flops, inference_only=True)


# The public function -------------------------------------------------------------------------


def stem(
    x: torch.Tensor,
    little: torch.Tensor,
    weight_expand: torch.Tensor,
    shift_expand: torch.Tensor | None,
    weight_fusion: torch.Tensor,
    shift_fusion: torch.Tensor | None,
    weight_big: torch.Tensor | None = None,
    shift_big: torch.Tensor | None = None,
    weight_little: torch.Tensor | None = None,
    shift_little: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the end of a Big-Little stem with BN folded: strided convolutions, merge, fusion.

    Runs on the backend that ``blnet.kernels.backend`` chooses. On "torch" it is plain PyTorch
    (:func:`blnet.kernels.reference.stem`), float64 included, and differentiable. On the kernels it
    is for inference. Under autocast what is convolved is cast as for torch.conv2d.

    Args:
        x: the big branch's map (N, C, H, W) in any layout or, with weight_big, what it is the
            convolution of, (N, C_x, H_in, W_in).
        little: the little branch's map (N, L, H, W) or, with weight_little, what it is the
            convolution of, (N, C_l, H_in, W_in); dtype and device of x.
        weight_expand: shape (C, L) or (C, L, 1, 1).
        shift_expand: shape (C,), any floating-point dtype; None for 0. So are the other shifts.
        weight_fusion: shape (C_out, C) or (C_out, C, 1, 1).
        shift_fusion: shape (C_out,).
        weight_big: shape (C, C_x, 3, 3), applied with stride 2 and padding 1; None if x is done.
            Packed in advance if in channels-last memory.
        shift_big: shape (C,); only with weight_big.
        weight_little: shape (L, C_l, 3, 3), likewise, and then ReLU; None if little is done.
        shift_little: shape (L,); only with weight_little.

    Returns:
        Shape (N, C_out, H, W), in x's layout (channels-last or contiguous).

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, if L or C is above 128 on the kernels,
            or if the forced backend cannot run the tensors.
    """
    big, narrow = (weight_big, shift_big), (weight_little, shift_little)
    expand, fusion = (weight_expand, shift_expand), (weight_fusion, shift_fusion)
    check_stem("stem", x, little, expand, fusion, big, narrow)
    if choose_backend("stem", x) == "torch":
        return reference.stem(x, little, *expand, *fusion, *big, *narrow)
    check_width("stem", "the little branch's width", weight_expand.shape[1], LARGEST_WIDTH)
    check_width("stem", "the big branch's width", weight_expand.shape[0], LARGEST_WIDTH)
    little, weight_expand, weight_fusion = cast_under_autocast(little, weight_expand, weight_fusion)
    if weight_big is not None:
        x, weight_big = cast_under_autocast(x, weight_big)
    if weight_little is not None:
        (weight_little,) = cast_under_autocast(weight_little)
    return stem_op(  # type: ignore[no-any-return]
        x, little, weight_expand.reshape(weight_expand.shape[:2]), shift_expand,
        weight_fusion.reshape(weight_fusion.shape[:2]), shift_fusion,
        weight_big, shift_big, weight_little, shift_little,
    )  # fmt: skip


# For tuning and ahead-of-time compilation ------------------------------------------------------

# Name -> N, C_x, C_l, L, C, C_out, side of the output, and which branches are convolved here.
_PROBLEMS = {
    "C=64 L=32": (32, 64, 32, 32, 64, 64, 56, True, True),
    "C=64 L=32 little only": (32, 64, 32, 32, 64, 64, 56, False, True),
    "C=64 L=32 big only": (32, 64, 32, 32, 64, 64, 56, True, False),
    "C=64 L=32 maps given": (32, 64, 32, 32, 64, 64, 56, False, False),
    "C=64 L=16": (32, 64, 16, 16, 64, 64, 56, True, True),
    "C=128 L=64": (32, 128, 64, 64, 128, 128, 56, True, True),
    "C=128 L=128 maps given": (32, 128, 128, 128, 128, 128, 56, False, False),
    "wide C=64 L=32": (2048, 64, 32, 32, 64, 64, 111, True, True),
    "wide C=128 L=128": (2048, 128, 128, 128, 128, 128, 111, True, True),
}


# Name -> C_x, C_l, L, which branches are convolved here: bL-ResNet-50's, alpha 2 and 4.
_SITES = {
    f"{title} L={narrow}": (64, narrow, narrow, convolved)
    for title, convolved in (
        ("stem", (True, True)),
        ("stem, little only", (False, True)),
        ("stem, maps given", (False, False)),
    )
    for narrow in (32, 16)
}


def _sites(batch: int, itemsize: int) -> dict[str, StemProblem]:
    if itemsize != 2:  # float32 is the launches of other files
        return {}
    found = {}
    for name, (c_x, c_little, narrow, convolved) in _SITES.items():
        size_x, size_little = (((1 + of) * 56, (1 + of) * 56) for of in convolved)
        sizes = (batch, c_x, c_little, narrow, 64, 64, 56, 56)
        found[name] = StemProblem(*sizes, size_x, size_little, convolved)
    return found


def _pointers(dtype: torch.dtype) -> dict[str, torch.dtype]:
    matrices = ("p_big_weight", "p_little_weight", "p_expand", "p_fusion")
    names = ("big", "little", "expand", "fusion")
    shifts = dict.fromkeys((f"p_{name}_shift" for name in names), torch.float32)
    return dict.fromkeys(("p_x", "p_little", *matrices, "p_out"), dtype) | shifts


def _timed(problem: StemProblem, dtype: torch.dtype, device: torch.device) -> Any:
    p, generator = problem, torch.Generator(device).manual_seed(0)
    c_x, c_little = (
        channels if here else 0
        for channels, here in zip((p.channels_x, p.channels_little), p.convolved, strict=True)
    )
    size_in = p.size_x if p.convolved[0] else p.size_little
    shape = testing.StemShape(
        p.n, c_x, c_little, p.narrow, p.channels, p.channels_out, *size_in, "for timing"
    )
    tensors = testing.stem_inputs(shape, dtype, "channels_last", device, generator)
    matrices = [t.flatten(1) if t is not None and i in (2, 4) else t for i, t in enumerate(tensors)]
    return lambda: (stem_op(*matrices),)


register(
    Tunable(
        name="stem",
        blocks={
            "BLOCK_ROWS": (16, 256),
            "BLOCK_X": (16, 128),
            "BLOCK_LITTLE": (16, 128),
            "BLOCK_OUT": (16, 128),
        },
        kernel=_stem_kernel,
        plan=tuned_launch,
        pointers=_pointers,
        key=StemProblem.key,
        problems=_sites,
        candidates=stem_candidates,
        call=_timed,
    )
)


def specializations() -> list[Specialization]:
    """List what ``blnet kernels compile`` builds: every branch of the kernel, in 16 bits.

    What float32 and other widths run is listed with ``conv3x3.py`` and expand_merge.
    """
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        short = str(dtype).removeprefix("torch.")
        for title, (n, c_x, c_little, narrow, c, c_out, side, *convolved) in _PROBLEMS.items():
            size_x, size_little = (((1 + of) * side, (1 + of) * side) for of in convolved)
            sizes = (n, c_x, c_little, narrow, c, c_out, side, side)
            here = (bool(convolved[0]), bool(convolved[1]))
            launch = tuned_launch(StemProblem(*sizes, size_x, size_little, here))
            name = f"stem {title} {short}"
            found.append(specialize(name, _stem_kernel, launch, _pointers(dtype)))
    return found
