"""Comparing results in which infinity or NaN may be meant."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_parts(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of one shape in float64, without what is the same NaN or infinity in both.

    What is not finite in one of them only, or not the same, is kept: their difference is then
    infinite or NaN. Of complex numbers real and imaginary parts are numbers of their own.
    """
    if ours.is_complex() or theirs.is_complex():
        pair = (one.to(torch.complex128).resolve_conj() for one in (ours, theirs))
        ours, theirs = map(torch.view_as_real, pair)
    ours, theirs = ours.double(), theirs.double()
    odd = ~theirs.isfinite()
    if not bool(odd.any()):
        return ours, theirs
    same = odd & ((ours == theirs) | (ours.isnan() & theirs.isnan()))
    return ours[~same], theirs[~same]
