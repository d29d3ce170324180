"""Each op in plain PyTorch: the truth for the tests, and the code that runs on a CPU.

Nothing here but PyTorch's own operations, so autograd, torch.compile, torch.export and the ONNX
exporter see through it. Run in float64 it is the yardstick for the kernels.
"""

from __future__ import annotations

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
    fresh = upsampled is not big and upsampled.stride() == little.stride()
    return (upsampled.add_(little) if fresh else little + upsampled).relu_()
