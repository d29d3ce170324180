"""The operations that the native engine has, and the steps they become.

Each function takes the lowering and a node of the graph, and returns the node's value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from blnet.kernels.native import Map
from blnet.optimizing.native_lowering import (
    Lowering,
    Pending,
    Resized,
    UnsupportedError,
    Value,
    argument_of,
    pair_of,
    shape_of,
    table_of,
    unsupported,
)

aten = torch.ops.aten


def _conv(to: Lowering, node: fx.Node) -> Value:
    _, _, _, stride, padding, dilation, transposed, _, groups = node.args
    if transposed or any(step != 1 for step in dilation):  # type: ignore[union-attr]
        raise UnsupportedError(
            f"the native engine has no transposed or dilated convolution (node {node.name}); "
            "take another engine"
        )
    x = to.made(node.args[0])  # type: ignore[arg-type]

    def emit(self: Pending) -> Map:
        assert self.conv is not None
        return to.builder.conv(
            x,
            *self.conv,
            stride=pair_of(stride),
            padding=pair_of(padding),
            groups=groups,  # type: ignore[arg-type]
            residual=self.residual,
            table=self.table,
            relu=self.relu,
        )

    return Pending(emit, (to.constant(node.args[1]), to.constant(node.args[2])))


def _batch_norm(to: Lowering, node: fx.Node) -> Value:
    x: Any = node.args[0]
    weight, bias, mean, variance, _, epsilon = (to.constant(part) for part in node.args[1:])
    scale: Tensor = (variance.double() + epsilon).rsqrt()
    scale = scale if weight is None else scale * weight
    shift: Tensor = -mean * scale if bias is None else bias - mean * scale
    pending = to.open(x)
    if pending is not None and pending.conv is not None and pending.residual is None:
        kernel, old = pending.conv
        shift = shift if old is None else shift + old * scale
        pending.conv = ((kernel * scale[:, None, None, None]).float(), shift.float())
        return pending
    source = to.made(x)

    def emit(self: Pending) -> Map:
        return to.builder.affine(source, scale.float(), shift.float(), relu=self.relu)

    return Pending(emit)


def _relu(to: Lowering, node: fx.Node) -> Value:
    pending = to.open(node.args[0])
    if pending is None:
        source = to.made(node.args[0])  # type: ignore[arg-type]
        pending = Pending(lambda self: to.builder.combine(source, relu=self.relu))
    pending.relu = True
    return pending


def _add(to: Lowering, node: fx.Node) -> Value:
    left, right = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1 or not _same_maps(to, node):
        raise unsupported(node)
    for one, other in ((right, left), (left, right)):
        pending = to.open(one)
        if pending and pending.conv and pending.residual is None and one is not other:
            pending.residual, pending.table = _residual(to, other)
            return pending
    # The one that keeps its pixels is the source; of a resized one, pixels are read by a table.
    if isinstance(to.values[left], Resized):  # type: ignore[index]
        left, right = right, left
    source = to.made(left)  # type: ignore[arg-type]
    residual, table = _residual(to, right)
    return Pending(lambda self: to.builder.combine(source, residual, table, relu=self.relu))


def _residual(to: Lowering, node: Any) -> tuple[Map, Tensor | None]:
    value = to.values[node]
    if isinstance(value, Resized) and value.made is None:
        return value.source, table_of(value)[0]
    return to.made(node), None


def _same_maps(to: Lowering, node: fx.Node) -> bool:
    parts = node.args[:2]
    return all(
        isinstance(part, fx.Node) and part in to.values and shape_of(part) == shape_of(node)
        for part in parts
    )


def _multiply(to: Lowering, node: fx.Node) -> Value:
    x, gate = node.args[:2]
    if not (isinstance(x, fx.Node) and isinstance(gate, fx.Node)):
        raise unsupported(node)
    if x not in to.values or gate not in to.values:
        raise unsupported(node)
    if shape_of(x) != shape_of(node):
        x, gate = gate, x
    if shape_of(x) != shape_of(node) or shape_of(gate)[:2] != shape_of(x)[:2]:
        raise unsupported(node)
    table = None
    if shape_of(gate) != shape_of(x):
        if shape_of(gate)[2:] != (1, 1):
            raise unsupported(node)
        table = torch.zeros(shape_of(x)[2] * shape_of(x)[3], dtype=torch.int32)
    source, other = to.made(x), to.made(gate)
    return Pending(
        lambda self: to.builder.combine(source, other, table, multiply=True, relu=self.relu)
    )


def _pixels(to: Lowering, node: fx.Node) -> Value:
    """Lower whatever copies pixels: the operation itself, done on indices, says which."""
    value = to.values[node.args[0]]  # type: ignore[index]
    if isinstance(value, Resized):
        source, indices = value.source, value.indices
    else:
        source = to.made(node.args[0])  # type: ignore[arg-type]
        height, width = source.shape[2:]
        indices = torch.arange(height * width).view(1, 1, height, width)
    rest = [to.constant(part) for part in node.args[1:]]
    if node.target is aten.index_select.default and rest[0] % 4 < 2:
        raise unsupported(node)
    # float32, as the map: where PyTorch's index depends on rounding, it rounds as it would.
    picked = node.target(indices.float(), *rest)  # type: ignore[operator]
    return Resized(source, picked.long())


def _average_pool(to: Lowering, node: fx.Node) -> Value:
    kernel = pair_of(node.args[1])
    stride = pair_of(argument_of(node, 2, []) or kernel)
    padding = pair_of(argument_of(node, 3, 0))
    include, divisor = argument_of(node, 5, True), argument_of(node, 6, 0)
    x = to.made(node.args[0])  # type: ignore[arg-type]
    sizes = zip(x.shape[2:], shape_of(node)[2:], kernel, stride, padding, strict=True)
    rows, columns = (_windows(*size, include=include) for size in sizes)
    if divisor:
        rows = [(first, end, divisor) for first, end, _ in rows]
        columns = [(first, end, 1) for first, end, _ in columns]
    return to.builder.pool(x, rows, columns, average=True)


def _maximum_pool(to: Lowering, node: fx.Node) -> Value:
    kernel = pair_of(node.args[1])
    stride = pair_of(argument_of(node, 2, []) or kernel)
    padding, dilation = pair_of(argument_of(node, 3, 0)), pair_of(argument_of(node, 4, 1))
    if dilation != (1, 1):
        raise unsupported(node)
    x = to.made(node.args[0])  # type: ignore[arg-type]
    sizes = zip(x.shape[2:], shape_of(node)[2:], kernel, stride, padding, strict=True)
    rows, columns = (_windows(*size, include=False) for size in sizes)
    return to.builder.pool(x, rows, columns, average=False)


def _windows(
    size: int, out: int, kernel: int, stride: int, padding: int, *, include: bool
) -> list[tuple[int, int, int]]:
    """Return the windows of a pool along one axis: first, end, length to divide by."""
    windows = []
    for start in range(-padding, -padding + out * stride, stride):
        first, end = max(start, 0), min(start + kernel, size)
        whole = min(start + kernel, size + padding) - start
        windows.append((first, end, whole if include else end - first))
    return windows


def _adaptive_pool(to: Lowering, node: fx.Node) -> Value:
    x = to.made(node.args[0])  # type: ignore[arg-type]
    rows, columns = (
        [(i * size // out, -(-(i + 1) * size // out), 0) for i in range(out)]
        for size, out in zip(x.shape[2:], shape_of(node)[2:], strict=True)
    )
    rows, columns = ([(a, b, b - a) for a, b, _ in windows] for windows in (rows, columns))
    return to.builder.pool(x, rows, columns, average=True)


def _mean(to: Lowering, node: fx.Node) -> Value:
    axes: Any = node.args[1]
    if sorted(axis % 4 for axis in axes) != [2, 3]:
        raise unsupported(node)
    return _adaptive_pool(to, node)


def _cat(to: Lowering, node: fx.Node) -> Value:
    parts: Any = node.args[0]
    if argument_of(node, 1, 0) % 4 != 1 or any(part not in to.values for part in parts):
        raise unsupported(node)
    try:
        return to.builder.cat([to.made(part) for part in parts])
    except ValueError as error:
        raise UnsupportedError(str(error)) from error


def _sigmoid(to: Lowering, node: fx.Node) -> Value:
    return to.builder.sigmoid(to.made(node.args[0]))  # type: ignore[arg-type]


def _same(to: Lowering, node: fx.Node) -> Value:
    """Pass on what changes nothing here: a copy, or the first of a pair of results."""
    if node.target is operator.getitem and node.args[1] != 0:
        raise unsupported(node)
    source: Any = node.args[0]
    return to.values[source] if len(source.users) == 1 else to.made(source)


def _as_strided(to: Lowering, node: fx.Node) -> Value:
    """Pass on a map of one pixel: exported means of channels-last maps change its strides only."""
    source: Any = node.args[0]
    images, channels, *pixels = shape_of(node)
    strides: Any = node.args[2]
    plain = pixels == [1, 1] and list(strides[:2]) == [channels, 1]
    if not plain or shape_of(source) != (images, channels, 1, 1) or argument_of(node, 3, 0):
        raise unsupported(node)
    return to.made(source)


LOWERED: dict[Any, Callable[[Lowering, fx.Node], Value]] = {
    aten.convolution.default: _conv,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.relu.default: _relu,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _multiply,
    aten.sigmoid.default: _sigmoid,
    aten.upsample_nearest2d.vec: _pixels,
    aten.upsample_nearest2d.default: _pixels,
    aten.index_select.default: _pixels,
    aten.avg_pool2d.default: _average_pool,
    aten.max_pool2d_with_indices.default: _maximum_pool,
    aten._adaptive_avg_pool2d.default: _adaptive_pool,
    aten.mean.dim: _mean,
    aten.cat.default: _cat,
    aten.clone.default: _same,
    aten.as_strided.default: _as_strided,
    operator.getitem: _same,
}

# What may come after the maps: changes of shape, and products with weights.
HEAD: tuple[Any, ...] = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.expand.default,
    aten.squeeze.dims,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.mean.dim,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.add.Tensor,
    aten.relu.default,
    aten._log_softmax.default,
    aten._softmax.default,
)
