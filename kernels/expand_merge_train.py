"""expand_merge with the batch's own statistics: relu(upsample(big) + BN(conv1x1(x))) in training.

Neither the convolution's output y nor its gradient is ever written. With m and S the mean and the
covariance of x's K channels over M pixels (``moments.py``), for y = W x

    mean(y) = W m,   var(y) = diag(W S W^T),   r = 1 / sqrt(var(y) + eps)
    out = relu(upsample(big) + scale W x + beta - scale mean(y)),   scale = gamma r

which is the forward kernel of ``expand_merge.py``. Backward, with g = dout where out > 0 and
else 0, A = g^T (x - m), D = diag(gamma r) and u = gamma r^2 dgamma / M:

    dbeta = sum g                      dgamma = r rowsum(W * A)
    dW = D (A - diag(r dgamma) W S)    dbig = window sums of g
    dx = g D W - (sum g / M) D W - (x - m) W^T diag(u) W

A, sum g and dbig are the first kernel of ``expand_merge_backward.py``, dx is the second.

Across processes (SyncBatchNorm's semantics) the pixel count, m and S are those of all processes,
and A and sum g are summed over all in dx, u and dW's corrections, while dW, dgamma and dbeta stay
each process's own share, which DistributedDataParallel then averages. A share sees its own mean
m' and covariance S' over M' pixels, e = m' - m, and with q = r dgamma / M

    dW = D (A' - (sum g M' / M) e^T - diag(q) W M' (S' + e e^T))
         + D (sum g' - sum g M' / M - q * (M' W e)) m^T

which for one process is the line above.

Numerics. x is centred, in the moments and in backward, by an estimate of its mean that
``moments.py`` explains; float32 maps also before the product of the forward pass.
The small matrices are float64 (``expand_merge_matrices.py``): a handful of operations on at most
C x K numbers, in which tf32 or float32 would lose what the kernels kept. Saved for backward: x,
out and small matrices. The Gram matrix is a float32 sum: an output channel whose variance is far
below that of its summands, two inputs that all but cancel, loses digits to that (at a hundredth of
the deviation of either, up to 1e-3 of the output), as the convolution's own output does not.
Bytes: x once more than in ``expand_merge``, for the moments. FLOPs count as the convolution's.
"""

from __future__ import annotations

from typing import Any

import torch

from blnet.kernels import reference
from blnet.kernels.arguments import check_expand_merge
from blnet.kernels.backend import choose_backend
from blnet.kernels.center import row_count
from blnet.kernels.expand_merge import flops, forward
from blnet.kernels.expand_merge_backward import reduced
from blnet.kernels.expand_merge_between import between_op, second_op
from blnet.kernels.expand_merge_input import input_op
from blnet.kernels.expand_merge_matrices import small_product
from blnet.kernels.expand_merge_statistics import (
    affine,
    centered_statistics_op,
    output_statistics_op,
)
from blnet.kernels.expand_merge_sync import (
    all_reduced,
    local_statistics,
    merged_over,
    reference_with_group,
    share_of_weight,
)
from blnet.kernels.launch import known
from blnet.kernels.registration import cast_under_autocast, define_op

# The launcher --------------------------------------------------------------------------------


def _train(
    x: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    big: torch.Tensor | None,
    center: torch.Tensor,
    mean: torch.Tensor,
    covariance: torch.Tensor,
    variance: torch.Tensor,
    count: torch.Tensor | None,
    local_mean: torch.Tensor | None,
    local_covariance: torch.Tensor | None,
    eps: float,
    relu: bool,
    group: str,
) -> torch.Tensor:
    # mean and covariance are of x, variance of y, over all processes: float64. They are inputs so
    # that processes can be asked for theirs outside, but the derivatives are those of a function of
    # x alone. Where there is a group, the count of pixels and the local ones are given too.
    subtract = center if x.dtype is torch.float32 else None
    scale, shift = affine(weight, mean, subtract, variance, gamma, beta, eps)
    return forward(x, weight, scale, shift, subtract, big, relu)


# The registered op ---------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    (x, weight, gamma, beta, big, center, mean, covariance, variance, count,
     local_mean, local_covariance, ctx.eps, relu, ctx.group) = inputs  # fmt: skip
    ctx.size_big = None if big is None else tuple(big.shape[2:])
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, weight, gamma, beta, big))
    ctx.save_for_backward(
        x, weight, gamma, output if relu else None, center, mean, covariance, variance, count,
        local_mean, local_covariance,
    )  # fmt: skip


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (x, weight, gamma, out, center, mean, covariance, variance, count, *local) = ctx.saved_tensors
    needs_x, needs_weight, needs_gamma, needs_beta, needs_big = ctx.needs_input_grad[:5]
    needs_products = needs_x or needs_weight or needs_gamma
    products, sums, dbig = reduced(grad, out, x, center, ctx.size_big, needs_products, needs_big)
    dx = dweight = dgamma = None
    if needs_products:
        wide = weight.double()
        given = (weight, gamma, center, mean, covariance, variance)
        if ctx.group:
            between = _between_of_group(products, sums, given, count, local, row_count(x), ctx)
        else:
            product = small_product(wide, covariance)
            between = between_op(
                products, sums, weight, product, gamma, variance, mean, center, ctx.eps,
                row_count(x),
            )  # fmt: skip
        dweight, dgamma, _, scale, offset, u = between
        if needs_x:
            rest = second_op(small_product(wide.mT, u), mean, center, x)
            dx = input_op(grad, out, x, weight, scale, offset, *rest, center)
    gradients = (dx, dweight if needs_weight else None, dgamma if needs_gamma else None,
                 sums if needs_beta else None, dbig)  # fmt: skip
    cast = (g if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))
    return (*cast, *(None,) * 10)


def _between_of_group(
    raw: torch.Tensor,
    sums: torch.Tensor,
    given: tuple[torch.Tensor, ...],
    count: torch.Tensor,
    local: list[torch.Tensor],
    rows: int,
    ctx: Any,
) -> tuple[torch.Tensor, ...]:
    """Do what ``between_op`` does where statistics are shared between processes."""
    weight, gamma, center, mean, _, variance = given
    wide, raw, sums = weight.double(), raw.double(), sums.double()
    products = raw - torch.outer(sums, mean - center.double())  # A, this process's share
    total, total_sums = all_reduced(products, sums, ctx.group)
    r = torch.rsqrt(variance + ctx.eps)
    scale = r if gamma is None else r * gamma.double()
    q = r * r * (wide * total).sum(1) / count
    share = (products, sums, total_sums / count, rows)
    dweight = scale[:, None] * share_of_weight(share, wide, q, mean, local[0], local[1])
    dgamma = r * (wide * products).sum(1)
    offset = (total_sums / count).float()
    return dweight, dgamma, sums, scale.float(), offset, -(scale * q)[:, None] * wide


expand_merge_train_op = define_op(
    "blnet::expand_merge_train",
    _train,
    backward=_autograd,
    setup_context=_setup_context,
    flops=flops,
)


# Statistics ----------------------------------------------------------------------------------


def update_running(
    running: torch.Tensor | None, batch: torch.Tensor, momentum: float | torch.Tensor
) -> None:
    """Mix a batch's statistics into the running ones in place, as torch.nn.BatchNorm2d does.

    Args:
        running: shape (C,), or None.
        batch: shape (C,), float32; of variances the unbiased one.
        momentum: weight of the batch.
    """
    if running is None:
        return
    if running.dtype is torch.float32 and not isinstance(momentum, torch.Tensor):
        running.lerp_(batch, momentum)  # one launch
        return
    running.copy_(running.double() * (1 - momentum) + batch.double() * momentum)


def _momentum(
    momentum: float | None, num_batches_tracked: torch.Tensor | None, plain: bool
) -> float | torch.Tensor:
    """Count the batch and return its weight: momentum, or 1 / batches so far where that is None."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is not None:
        return momentum
    assert num_batches_tracked is not None  # checked before
    # On a device a tensor, so that nothing waits for it; torch's own batch_norm wants a float.
    return 1.0 / float(num_batches_tracked) if plain else 1.0 / num_batches_tracked.double()


def _fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    running: tuple[torch.Tensor | None, torch.Tensor | None, float | torch.Tensor],
    eps: float,
    big: torch.Tensor | None,
    relu: bool,
    group: str,
) -> torch.Tensor:
    x, weight = cast_under_autocast(x, weight)
    weight = weight.reshape(weight.shape[0], weight.shape[1])
    count = None
    local: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    with torch.no_grad():
        center, mean, covariance = centered_statistics_op(x.detach())
        if group:
            local = (mean, covariance)
            overall = merged_over(local_statistics(mean, covariance, row_count(x)), group)
            mean, covariance, count = overall.mean, overall.covariance, overall.count
        matrix = weight.detach()
        product = small_product(matrix, covariance)
        variance, batch_mean, batch_variance = output_statistics_op(
            matrix, product, mean, row_count(x)
        )
        if count is not None:
            batch_variance = (variance * (count / (count - 1))).float()
            count = count.clamp_min(1.0)
        if group or not known(row_count(x) == 0):  # torch.nn.BatchNorm2d passes over no pixels
            update_running(running[0], batch_mean, running[2])
            update_running(running[1], batch_variance, running[2])
    return expand_merge_train_op(  # type: ignore[no-any-return]
        x, weight, gamma, beta, big, center, mean, covariance, variance, count, *local,
        eps, relu, group,
    )  # fmt: skip


# The public function -------------------------------------------------------------------------


def expand_merge_train(
    x: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    big: torch.Tensor | None = None,
    relu: bool = True,
    process_group: Any = None,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute relu(upsample_nearest(big, x's size) + BN(conv1x1(x, weight))) in training.

    BN is torch.nn.BatchNorm2d's with the statistics of the batch, of all processes where
    ``process_group`` is given (torch.nn.SyncBatchNorm's). The running statistics are updated in
    place. On "torch" it is plain PyTorch (:func:`blnet.kernels.reference.expand_merge_train`).
    Differentiable in x, weight, gamma, beta and big: once on the kernels, any number of times on
    "torch". Under autocast x and weight are cast as for torch.conv2d.

    Args:
        x: shape (N, K, H, W), any layout.
        weight: shape (C, K, 1, 1) or (C, K), dtype and device of x.
        gamma: BN's weight, shape (C,), any floating-point dtype; None for 1.
        beta: BN's bias, shape (C,); None for 0.
        running_mean: shape (C,); None keeps no running mean.
        running_var: shape (C,); None keeps no running variance.
        momentum: weight of the batch in the running statistics; None for the average over all
            batches, which needs num_batches_tracked.
        eps: added to the variance.
        big: shape (N, C, H_big, W_big), dtype and device of x; None for 0.
        relu: False leaves the closing ReLU out.
        process_group: a torch.distributed process group whose processes share their statistics.
        num_batches_tracked: integer scalar, incremented by one.

    Returns:
        Shape (N, C, H, W), in x's layout (channels-last or contiguous).

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, if big has no pixel to copy, if a
            channel has one value only, if momentum is None and no batches are counted, or if the
            forced backend cannot run them.
    """
    op = "expand_merge_train"
    running = {"running_mean": running_mean, "running_var": running_var}
    check_expand_merge(op, x, weight, big, gamma=gamma, beta=beta, **running)
    if momentum is None and num_batches_tracked is None:
        raise ValueError(
            f"{op}: momentum None averages over all batches, which needs num_batches_tracked; "
            "pass BatchNorm's, or a number as momentum"
        )
    processes = 1 if process_group is None else process_group.size()
    if processes == 1 and known(row_count(x) == 1):  # in the words of torch.nn.BatchNorm2d
        size = torch.Size((x.shape[0], weight.shape[0], x.shape[2], x.shape[3]))
        message = "Expected more than 1 value per channel when training, got input size"
        raise ValueError(f"{message} {size}")
    plain = choose_backend(op, x) == "torch"
    factor = _momentum(momentum, num_batches_tracked, plain)
    if not plain:
        group = process_group.group_name if processes > 1 else ""
        tracked = (running_mean, running_var, factor)
        return _fused(x, weight, gamma, beta, tracked, eps, big, relu, group)
    assert isinstance(factor, float)
    if processes > 1:
        return reference_with_group(
            x, weight, gamma, beta, running_mean, running_var, factor, eps, big, relu, process_group
        )
    return reference.expand_merge_train(
        x, weight, gamma, beta, running_mean, running_var, factor, eps, big, relu
    )
