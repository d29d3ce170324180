"""Comparing results in which infinity or NaN may be meant."""

from __future__ import annotations

from torch import Tensor


def finite_parts(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of one shape in float64, without what is the same NaN or infinity in both.

    What is not finite in one of them only, or not the same, is kept: their difference is then
    infinite or NaN.
    """
    ours, theirs = ours.double(), theirs.double()
    odd = ~theirs.isfinite()
    if not bool(odd.any()):
        return ours, theirs
    same = odd & ((ours == theirs) | (ours.isnan() & theirs.isnan()))
    return ours[~same], theirs[~same]
