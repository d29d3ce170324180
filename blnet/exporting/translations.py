"""Operations that PyTorch translates to ONNX for some sizes only, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

_INT64, _BOOL = 7, 9  # as onnx.TensorProto has them


def translations(free: bool) -> dict[Any, Callable[..., Any]]:
    """Return what translates operations of PyTorch's, for `torch.onnx.export`.

    Args:
        free: whether sizes are free; for fixed ones PyTorch's own averages are right, and faster.
    """
    aten = torch.ops.aten
    table = {
        aten.upsample_nearest2d.default: _upsample(),
        aten.adaptive_max_pool2d.default: _adaptive_maximum(),
    }
    return table | {aten._adaptive_avg_pool2d.default: _adaptive_mean()} if free else table


def _upsample() -> Any:
    """Return what translates a resize by copying.

    PyTorch's own translation forgets the size where there are scales, and so gives a pixel too
    many where the size is odd.
    """
    from onnxscript import FLOAT, INT64, opset18

    op: Any = opset18  # its operators' types are those of tensors, not of values in a graph
    copying = {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }

    def upsample_nearest2d(
        self: Any, output_size: Any, scales_h: Any = None, scales_w: Any = None
    ) -> Any:
        size = op.Cast(output_size, to=_INT64)
        if scales_h is None or scales_w is None:
            whole = op.Concat(op.Shape(self, start=0, end=2), size, axis=0)
            return op.Resize(self, None, None, whole, **copying)
        scales = op.Constant(value_floats=[1.0, 1.0, scales_h, scales_w])
        resized = op.Resize(self, None, scales, None, **copying)
        first, axes = op.Constant(value_ints=[0, 0]), op.Constant(value_ints=[2, 3])
        return op.Slice(resized, first, size, axes)

    # onnxscript reads these as types, and not as the text that annotations are in this file.
    upsample_nearest2d.__annotations__ = {
        "self": FLOAT,
        "output_size": INT64,
        "scales_h": float,
        "scales_w": float,
        "return": FLOAT,
    }
    return upsample_nearest2d


def _windows(op: Any, x: Any, axis: int, count: int, beyond: float) -> tuple[Any, Any]:
    """Return the values of so many windows along a last axis or that before it, and which count.

    Window i of k reaches from floor(i n / k) to ceil((i + 1) n / k) of n values
    (ATen/native/AdaptivePooling.h); here all are as long as the longest, with `beyond` behind the
    ends of the others.
    """
    numbers, behind = op.Constant(value_ints=[*range(count)]), op.Constant(value_ints=[1])
    size = op.Shape(x, start=axis, end=axis + 1 or None)
    starts = op.Unsqueeze(op.Div(op.Mul(numbers, size), count), behind)
    ends = op.Div(op.Add(op.Mul(op.Add(numbers, 1), size), count - 1), count)
    ends = op.Unsqueeze(ends, behind)
    longest = op.ReduceMax(op.Sub(ends, starts), keepdims=0)
    places = op.Add(starts, op.Range(0, longest, 1))
    values = op.Gather(x, op.Min(places, op.Sub(size, 1)), axis=axis)
    inside = op.Less(places, ends)
    if axis == -2:
        inside = op.Unsqueeze(inside, op.Constant(value_ints=[2]))
    # What is beyond a window's end may be NaN, which no factor of 0 takes away.
    return op.Where(inside, values, op.CastLike(beyond, values)), inside


def _adaptive_mean() -> Any:
    """Return what translates an average over as many windows as there are results.

    PyTorch's own translation asks how long the windows are, and is right for the example's sizes
    only.
    """
    from onnxscript import FLOAT, opset18

    op: Any = opset18

    def mean(x: Any, axis: int, count: int) -> Any:
        values, inside = _windows(op, x, axis, count, 0.0)
        along = op.Constant(value_ints=[axis])
        counted = op.ReduceSum(op.CastLike(inside, values), along, keepdims=0)
        return op.Div(op.ReduceSum(values, along, keepdims=0), counted)

    def adaptive_avg_pool2d(self: Any, output_size: Any) -> Any:
        height, width = output_size
        return mean(mean(self, -2, height), -1, width)

    adaptive_avg_pool2d.__annotations__ = {
        "self": FLOAT,
        "output_size": Sequence[int],
        "return": FLOAT,
    }
    return adaptive_avg_pool2d


def _adaptive_maximum() -> Any:
    """Return what translates the largest of as many windows as there are results.

    PyTorch has no translation. Where the largest lie (`return_indices`) is left out: the second
    result, which nothing may use, is not that.
    """
    from onnxscript import FLOAT, INT64, opset18

    op: Any = opset18

    def largest(x: Any, axis: int, count: int) -> Any:
        values, _ = _windows(op, x, axis, count, -math.inf)
        along = op.Constant(value_ints=[axis])
        # ONNX Runtime's maximum leaves NaN out, PyTorch's is NaN.
        missing = op.ReduceMax(op.Cast(op.IsNaN(values), to=_INT64), along, keepdims=0)
        result = op.ReduceMax(values, along, keepdims=0)
        return op.Where(op.Cast(missing, to=_BOOL), op.CastLike(math.nan, result), result)

    def adaptive_max_pool2d(self: Any, output_size: Any) -> Any:
        height, width = output_size
        return largest(largest(self, -2, height), -1, width), op.Shape(self)

    adaptive_max_pool2d.__annotations__ = {
        "self": FLOAT,
        "output_size": Sequence[int],
        "return": tuple[FLOAT, INT64],
    }
    return adaptive_max_pool2d
