"""Each op in plain PyTorch: the truth for the tests, and the code that runs on a CPU.

Nothing here but PyTorch's own operations, so autograd, torch.compile, torch.export and the ONNX
exporter see through it. Run in float64 it is the yardstick for the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# F.interpolate computes floor(i * scale) with scale = H_big / H rounded to float32. For
# H_big = (H + 1) / 2 with H odd, i * H_big / H is never an integer for 0 < i < H (H_big and H have
# no common factor) and so lies at least 1 / H from one, while the float32 product is off by
# less than 1.5 * 2**-24 * H. The floor is therefore exact up to H = 3000. For even H the scale
# is exactly 1 / 2.
_EXACT_ODD_LIMIT = 3000


def _interpolate_is_exact(size_big: int, size: int) -> bool:
    """Return whether F.interpolate takes exactly pixel floor(i * size_big / size)."""
    if not isinstance(size_big, int) or not isinstance(size, int):
        return False  # a symbolic size: asking would fix it, and integers are right for all
    if size_big == size or 2 * size_big == size:
        return size_big > 0
    return 2 * size_big == size + 1 and size <= _EXACT_ODD_LIMIT


def nearest_index(size_big: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the source pixel of each pixel: floor(i * size_big / size), in integers.

    Args:
        size_big: pixels of the source.
        size: pixels of the result.
        device: where to put the indices.

    Returns:
        int64 tensor of shape (size,).
    """
    return torch.arange(size, device=device) * size_big // size


def _is_exported(*sizes: object) -> bool:
    """Return whether an exporter traces with sizes that are no numbers, which no branch may ask."""
    if all(isinstance(size, int) for size in sizes):
        return False
    return torch.compiler.is_exporting() or bool(torch._C._is_tracing())


def _proven(equal: object) -> bool:
    """Return whether two sizes are equal for every input that an exported file will see."""
    if isinstance(equal, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return bool(statically_known_true(equal))
    return bool(equal)  # torch.jit.trace has numbers only; whoever exports checks other sizes


def _upsample_exported(big: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Compute `upsample_nearest` with sizes that are no numbers.

    An axis with n_big = ceil(n / 2), where a branch at half the size meets its neighbour, is
    resized by the scale 2, not by a ratio of sizes that rounds: floor(i n_big / n) is floor(i / 2)
    there. For even n that is plain, and for odd n, n_big = (n + 1) / 2, so that i = 2 k gives
    k + k / n and i = 2 k + 1 gives k + (k + n_big) / n, with k + n_big < n for i < n.
    """
    scales = []
    for axis, wanted in enumerate(size, 2):
        given = big.shape[axis]
        doubles = not _proven(given == wanted)
        if doubles and not _proven((wanted + 1) // 2 == given):
            big = big.index_select(axis, nearest_index(given, wanted, big.device))
            doubles = False
        scales.append(2.0 if doubles else 1.0)
    if scales == [1.0, 1.0]:
        return big
    # F.interpolate takes a size or scales; what it calls takes both, and exporters know it.
    resize: Any = torch._C._nn.upsample_nearest2d
    resized: torch.Tensor = resize(big, size, *scales)
    return resized


def upsample_nearest(big: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a map by copying, out[n, c, i, j] = big[n, c, floor(i H_big / H), floor(j W_big / W)].

    Equal to ``F.interpolate(big, size=size, mode="nearest")`` but for ratios where that one's
    float32 scale picks a neighbour; it is used where it is exact (no change, doubling, and the
    odd sizes next to doubling: ``H_big == ceil(H / 2)``), because it is the fastest there.

    Args:
        big: shape (N, C, H_big, W_big).
        size: (H, W); smaller than big is allowed.

    Returns:
        Shape (N, C, H, W); ``big`` itself where the size is the same.
    """
    height_big, width_big = big.shape[2], big.shape[3]
    height, width = size
    if _is_exported(height_big, width_big, height, width):
        return _upsample_exported(big, size)
    if height_big == height and width_big == width:
        return big
    channels = big.shape[1]
    if (
        _interpolate_is_exact(height_big, height)
        and _interpolate_is_exact(width_big, width)
        and (not isinstance(channels, int) or channels > 0)  # F.interpolate refuses 0 channels
    ):
        return F.interpolate(big, size=(height, width), mode="nearest")
    if height_big != height:
        big = big.index_select(2, nearest_index(height_big, height, big.device))
    if width_big != width:
        big = big.index_select(3, nearest_index(width_big, width, big.device))
    return big


def merge(big: torch.Tensor, little: torch.Tensor) -> torch.Tensor:
    """Compute relu(upsample_nearest(big) + little).

    Args:
        big: shape (N, C, H_big, W_big).
        little: shape (N, C, H, W).

    Returns:
        Shape (N, C, H, W).
    """
    upsampled = upsample_nearest(big, (little.shape[2], little.shape[3]))
    # In place on what is fresh, if it has little's layout: a map less to allocate and to write.
    # Measured on two CPU cores, 8x1024x14x14 float32: 0.41 ms instead of 0.66. Autograd needs only
    # the result.
    fresh = upsampled is not big and not _is_exported(*little.shape)  # strides are sizes as well
    fresh = fresh and upsampled.stride() == little.stride()
    return (upsampled.add_(little) if fresh else little + upsampled).relu_()


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """View a map as rows x channels: shape (N H W, K), one row a pixel.

    Args:
        x: shape (N, K, H, W).
    """
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def moments(
    x: torch.Tensor, shift: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the column sums and the Gram matrix of z = x - shift over all pixels.

    Args:
        x: shape (N, K, H, W).
        shift: shape (K,); None for 0.

    Returns:
        sums of shape (K,) and gram = z^T z of shape (K, K), in float64 for float64 and else in
        float32.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    z = rows_of(x).to(wide)
    if shift is not None:
        z = z - shift.to(wide)
    return z.sum(0), z.mT @ z


def conv1x1(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute the 1x1 convolution of a map.

    Args:
        x: shape (N, K, H, W).
        weight: shape (C, K, 1, 1) or (C, K).

    Returns:
        Shape (N, C, H, W).
    """
    return F.conv2d(x, weight.reshape(weight.shape[0], weight.shape[1], 1, 1))


def epilogue(y: torch.Tensor, big: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """Add the upsampled big and apply ReLU, each where it is wanted; y is fresh."""
    if big is None:
        return F.relu(y) if relu else y
    if big.dtype != y.dtype:  # under autocast
        dtype = torch.promote_types(big.dtype, y.dtype)
        big, y = big.to(dtype), y.to(dtype)
    if relu:
        return merge(big, y)
    return y + upsample_nearest(big, (y.shape[2], y.shape[3]))


def expand_merge(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    big: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """Compute relu(upsample_nearest(big) + scale conv1x1(x, weight) + shift).

    Args:
        x: shape (N, K, H, W).
        weight: shape (C, K, 1, 1) or (C, K).
        scale: shape (C,); None for 1.
        shift: shape (C,); None for 0.
        big: shape (N, C, H_big, W_big), or None for 0.
        relu: False leaves the closing ReLU out.

    Returns:
        Shape (N, C, H, W).
    """
    weight = weight.reshape(weight.shape[0], weight.shape[1], 1, 1)
    return epilogue(_affine(x, weight, scale, shift), big, relu)


def _affine(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stride: int = 1,
    padding: int = 0,
) -> torch.Tensor:
    """Compute scale conv2d(x, weight) + shift; scale and shift may have a dtype of their own."""
    if scale is None and (shift is None or shift.dtype == weight.dtype):
        return _conv2d(x, weight, shift, stride, padding)
    y = _conv2d(x, weight, None, stride, padding)
    # BatchNorm with mean 0, variance 0 and eps 1 is this very scale and shift, in one pass over y.
    given = shift if scale is None else scale
    assert given is not None
    zeros = torch.zeros_like(given)
    return F.batch_norm(y, zeros, zeros, scale, shift, False, 0.0, 1.0)


def _conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int,
) -> torch.Tensor:
    """Compute conv2d, in bfloat16 on CPUs with AMX as well.

    There oneDNN returns memory that nobody wrote where a map of one column comes of a stride above
    1 (pytorch/pytorch issue 169688, with torch 2.11.0 and its oneDNN). The first column is the same
    without the stride.
    """
    columns = (x.shape[-1] + 2 * padding - weight.shape[-1]) // stride + 1
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and stride > 1 and columns == 1:
        return F.conv2d(x, weight, bias, (stride, 1), padding)[..., :1]
    return F.conv2d(x, weight, bias, stride, padding)


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
    """Compute a residual bottleneck and, with weight_expand, expand_merge of it.

    Args:
        x: shape (N, C_in, H, W).
        weight1: shape (I, C_in, 1, 1) or (I, C_in).
        shift1: shape (I,); None for 0.
        weight2: shape (I, I, 3, 3).
        shift2: shape (I,); None for 0.
        weight3: shape (C, I, 1, 1) or (C, I).
        shift3: shape (C,); None for 0.
        shortcut: shape (N, C, H, W); None for x.
        relu: False leaves the block's closing ReLU out.
        weight_expand: shape (C_out, C, 1, 1) or (C_out, C); None ends after the block.
        shift_expand: shape (C_out,); None for 0.
        big: shape (N, C_out, H_big, W_big), or None for 0.

    Returns:
        Shape (N, C, H, W), or (N, C_out, H, W) with weight_expand.
    """
    h = expand_merge(x, weight1, None, shift1)
    u = _affine(h, weight2, None, shift2, 1, 1).relu()
    z = expand_merge(u, weight3, None, shift3, x if shortcut is None else shortcut, relu)
    if weight_expand is None:
        return z
    return expand_merge(z, weight_expand, None, shift_expand, big)


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
    """Compute the end of a Big-Little stem: merge of the branches, then the fusion convolution.

    Args:
        x: shape (N, C, H, W), or (N, C_x, H_in, W_in) with weight_big.
        little: shape (N, L, H, W), or (N, C_l, H_in, W_in) with weight_little.
        weight_expand: shape (C, L, 1, 1) or (C, L).
        shift_expand: shape (C,); None for 0.
        weight_fusion: shape (C_out, C, 1, 1) or (C_out, C).
        shift_fusion: shape (C_out,); None for 0.
        weight_big: shape (C, C_x, 3, 3), of the big branch's strided convolution; None if done.
        shift_big: shape (C,); None for 0.
        weight_little: shape (L, C_l, 3, 3), of the little branch's; None if done.
        shift_little: shape (L,); None for 0.

    Returns:
        Shape (N, C_out, H, W), H and W half of H_in and W_in, rounded up.
    """
    big = x if weight_big is None else _affine(x, weight_big, None, shift_big, 2, 1)
    if weight_little is not None:
        little = _affine(little, weight_little, None, shift_little, 2, 1).relu()
    z = expand_merge(little, weight_expand, None, shift_expand, big)
    return expand_merge(z, weight_fusion, None, shift_fusion)


def expand_merge_train(
    x: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    big: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """Compute relu(upsample_nearest(big) + BN(conv1x1(x, weight))) with the batch's statistics.

    Args:
        x: shape (N, K, H, W).
        weight: shape (C, K, 1, 1) or (C, K).
        gamma: BN's weight, shape (C,); None for 1.
        beta: BN's bias, shape (C,); None for 0.
        running_mean: shape (C,), updated in place; None keeps no running statistics.
        running_var: shape (C,), updated in place with the unbiased variance.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        big: shape (N, C, H_big, W_big), or None for 0.
        relu: False leaves the closing ReLU out.

    Returns:
        Shape (N, C, H, W).

    Raises:
        ValueError: if a channel has one value only, as torch.nn.BatchNorm2d does.
    """
    y = conv1x1(x, weight)
    y = F.batch_norm(y, running_mean, running_var, gamma, beta, True, momentum, eps)
    return epilogue(y, big, relu)
