"""The backward pass of expand_merge; the forward pass is in ``expand_merge.py``.

With g = dout where out > 0 and else 0 (dout itself without a ReLU), M pixels and z = x - center:

    reduce   products = g^T z (C x K), sums = sum of g (C), dbig = window sums of g
    input    dx = ((g - offset) scale) weight + z second unit + constant,
             offset and scale (C), weight (C x K), second (K x K), unit and constant (K)

Neither the convolution's output nor its gradient appears, and g is not stored: it is two loads
and a comparison. All else is arithmetic on small matrices between the two, in float64:
:func:`affine_gradients` here for a fixed scale and shift, and that of batch statistics in
``expand_merge_train.py``.

reduce walks over the pixels of big; the window of a pixel b is ceil(b H / H_big) to
ceil((b + 1) H / H_big) - 1 in each axis (empty for some b where H_big > H), so every pixel of the
output is in exactly one window. It is deterministic in two stages, like ``moments``: each program
adds up a share of the pixels for one tile of products, torch.sum adds the shares; no atomics.

In 16 bits g and the weight are exact and z almost always (see ``moments.py``). (g - offset) scale
is rounded to x's dtype, with the offset, BN's mean of g, taken off first, so that the error is
relative to what is left: eager PyTorch rounds the gradient of the convolution's output here. The
one rounding more is that of second, whose product is BN's correction for the variance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blnet.kernels.expand_merge_input import input_op
from blnet.kernels.expand_merge_reduce import reduce_op
from blnet.kernels.launch import known


def reduced(
    grad: torch.Tensor,
    out: torch.Tensor | None,
    x: torch.Tensor,
    center: torch.Tensor,
    size_big: tuple[int, int] | None,
    needs_products: bool,
    needs_big: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return g^T (x - center) and the sums of g in float32, and dbig or None."""
    size = (x.shape[2], x.shape[3])
    # Without a ReLU and at equal sizes dbig is the incoming gradient itself.
    same = out is None and size_big is not None
    same = same and all(known(a == b) for a, b in zip(size, size_big or size, strict=True))
    products, sums, dbig = reduce_op(
        grad, out, x, center, *(size_big or size), needs_products, needs_big and not same
    )
    if not needs_big:
        return products, sums, None
    return products, sums, (grad if same else dbig)


def affine_gradients(
    grad: torch.Tensor,
    out: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    size_big: tuple[int, int] | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Differentiate relu(upsample(big) + scale conv1x1(x, weight) + shift).

    Args:
        grad: gradient of the output.
        out: the output, or None without a ReLU.
        x: shape (N, K, H, W).
        weight: shape (C, K).
        scale: shape (C,), or None for 1.
        size_big: (H_big, W_big), or None without big.
        needs: which of the gradients are wanted.

    Returns:
        Gradients of (x, weight, scale, shift, big), None for what is not wanted.
    """
    needs_x, needs_weight, needs_scale, needs_shift, needs_big = needs
    wide = weight.double()
    products = sums = dbig = None
    needs_products = needs_weight or needs_scale
    if needs_products or needs_shift or needs_big:
        center = x.new_zeros(x.shape[1], dtype=torch.float32)
        products, sums, dbig = reduced(grad, out, x, center, size_big, needs_products, needs_big)
    dweight = dscale = None
    if needs_products:
        assert products is not None
        products = products.double()
        dscale = (wide * products).sum(1)
        dweight = products if scale is None else products * scale.double()[:, None]
    dx = None
    if needs_x:
        scale = None if scale is None else scale.float()
        dx = input_op(grad, out, x, weight, scale, None, None, None, None, None)
    return (
        dx,
        dweight if needs_weight else None,
        dscale if needs_scale else None,
        sums if needs_shift else None,
        dbig,
    )
