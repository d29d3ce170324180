"""expand_merge's statistics across processes: SyncBatchNorm's semantics.

The sums run over a process group by name, through PyTorch's functional collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from blnet.kernels import reference
from blnet.kernels.expand_merge_matrices import small_product


@dataclass(frozen=True)
class Statistics:
    """Statistics of a map's channels, in float64.

    Attributes:
        count: number of pixels, a scalar.
        mean: shape (K,).
        covariance: biased, shape (K, K).
    """

    count: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor


def local_statistics(mean: torch.Tensor, covariance: torch.Tensor, rows: int) -> Statistics:
    """Return this process's statistics; without pixels all are 0."""
    count = torch.full((), rows, dtype=torch.float64, device=mean.device)
    return Statistics(count, mean, covariance)


def _all_reduce(tensor: torch.Tensor, group: str) -> torch.Tensor:
    from torch.distributed import _functional_collectives as collectives

    name: Any = group  # a type of its own in newer PyTorch, a string in all
    total: torch.Tensor = collectives.wait_tensor(collectives.all_reduce(tensor, "sum", name))
    return total


def merged_over(mine: Statistics, group: str) -> Statistics:
    """Merge the statistics of all processes of a group.

    Two sums: pixels and means first, then covariances about the common mean, so that nothing
    cancels where the means are far from zero.
    """
    packed = torch.cat([mine.count.reshape(1), mine.count * mine.mean])
    packed = _all_reduce(packed, group)
    count = packed[0]
    mean = packed[1:] / count.clamp_min(1.0)
    off = mine.mean - mean
    scatter = mine.count * (mine.covariance + torch.outer(off, off))
    return Statistics(count, mean, _all_reduce(scatter, group) / count.clamp_min(1.0))


def all_reduced(
    products: torch.Tensor, sums: torch.Tensor, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum g^T (x - mean) and the sums of g over all processes of a group."""
    packed = _all_reduce(torch.cat([products, sums[:, None]], 1), group)
    return packed[:, :-1], packed[:, -1]


def share_of_weight(
    share: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int],
    weight: torch.Tensor,
    q: torch.Tensor,
    mean: torch.Tensor,
    local_mean: torch.Tensor,
    local_covariance: torch.Tensor,
) -> torch.Tensor:
    """Compute this process's dW but for the factor D: see the top of expand_merge_train.py.

    Args:
        share: this process's A and sums of g, the mean of g over all processes' pixels, and
            this process's pixels.
        weight: shape (C, K).
        q: shape (C,).
        mean: of x over all processes.
        local_mean: of this process's x.
        local_covariance: of this process's x.
    """
    products, sums, mean_g, rows = share
    off = local_mean - mean
    spread = rows * (local_covariance + torch.outer(off, off))
    correction = q[:, None] * small_product(weight, spread)
    centered = products - torch.outer(rows * mean_g, off) - correction
    rest = sums - rows * mean_g - q * (rows * small_product(weight, off))
    total: torch.Tensor = centered + torch.outer(rest, mean)
    return total


def reference_with_group(
    x: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    big: torch.Tensor | None,
    relu: bool,
    process_group: Any,
) -> torch.Tensor:
    """Compute expand_merge over a process group in plain PyTorch, on any device.

    PyTorch's own SyncBatchNorm runs on GPUs only. Arguments and result as for
    :func:`blnet.kernels.reference.expand_merge_train`.
    """
    from torch.distributed.nn.functional import all_reduce

    y = reference.conv1x1(x, weight)
    axes, ones = (0, 2, 3), (1, -1, 1, 1)
    wide = y.double() if y.dtype is torch.float64 else y.float()
    count = torch.full((), y.numel() // y.shape[1], dtype=torch.float64, device=y.device)
    count = all_reduce(count, group=process_group).to(wide.dtype)
    mean = all_reduce(wide.sum(axes), group=process_group) / count
    deviation = wide - mean.view(ones)
    var = all_reduce(deviation.square().sum(axes), group=process_group) / count
    with torch.no_grad():
        for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            if running is not None:
                running.copy_(running * (1 - momentum) + batch * momentum)
    normal = deviation * torch.rsqrt(var + eps).view(ones)
    if gamma is not None:
        normal = normal * gamma.view(ones)
    if beta is not None:
        normal = normal + beta.view(ones)
    return reference.epilogue(normal.to(y.dtype), big, relu)
