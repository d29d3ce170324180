"""Linear layers at a network's end as steps of a native program.

Acoustic models flatten (N, C, H, W) to (N, C H, W) and give every frame's features to one linear
layer. That is a convolution whose kernel is as high as the map, H x 1. Left to PyTorch, all of the
features would be written anew, column by column, and multiplied by one more library. Predicted on a
Xeon at batch 1: 0.5 of bL-ResNet-22's 8.6 ms; measured: 0.4.

Classifiers flatten one image's map to a vector, and their layer is a convolution with a kernel of
the map's size. Its time is that of reading the weights, which the engine fetches ahead. Predicted
on a Zen 4 at batch 1: 0.4 of ResNet-50's 31 ms and of bL-ResNet-50's 23; measured: 0.5. A larger
batch is left to PyTorch, which reads the weights once for all images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from blnet.kernels.native import Output
from blnet.optimizing.native_lowering import Lowering, is_map, shape_of

aten = torch.ops.aten

_SAME_ORDER = (  # as long as they keep how many values there are
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.clone.default,
)
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default)


@dataclass(eq=False)
class _Linear:
    """A linear layer that was found.

    Attributes:
        nodes: the operations that it is made of, in order.
        kernel: (C, H, 1) or (C, H, W), the inputs of an answer.
        weight: shape (inputs, K).
        bias: shape (K,); None for 0.
    """

    nodes: list[fx.Node]
    kernel: tuple[int, int, int]
    weight: Tensor = field(default_factory=Tensor)
    bias: Tensor | None = None


def linear_layer(to: Lowering, node: fx.Node) -> bool:
    """Add the step for a linear layer that begins with this flattening of a map, if one does.

    Args:
        to: the lowering.
        node: a view.

    Returns:
        Whether there is one; then its last operation has its value.
    """
    source: Any = node.args[0]
    if source not in to.values or not is_map(source):
        return False
    found = _found(to, node, shape_of(source))
    if found is None:
        return False
    weight, last = found.weight.T.reshape(-1, *found.kernel), found.nodes[-1]
    answers = to.builder.conv(to.made(source), weight, found.bias)
    to.head[last] = to.output(Output(answers, shape_of(last), channels_last=True))
    to.joined |= set(found.nodes)
    return True


def _found(to: Lowering, node: fx.Node, shape: tuple[int, ...]) -> _Linear | None:
    """Return the layer: view, permute for columns, product with a weight and a bias.

    Nothing else may read what lies between.
    """
    images, channels, rows, columns = shape
    if shape_of(node) == (1, channels * rows * columns):  # of a single image
        found = _Linear([node], (channels, rows, columns))
    elif shape_of(node) == (images, channels * rows, columns):
        found = _Linear([node], (channels, rows, 1))
        permute = _only_user(node)
        if permute is None or permute.target != aten.permute.default:
            return None
        axes: Any = permute.args[1]
        if list(axes) != [0, 2, 1]:
            return None
        found.nodes.append(permute)
    else:
        return None
    _pass_on(found, prod(found.kernel))
    product = _only_user(found.nodes[-1])
    if product is None or product.target not in _PRODUCTS or product.kwargs:
        return None
    operands: Any = product.args
    *biases, x, matrix = (to.known.get(part, part) for part in operands)
    fixed = isinstance(matrix, Tensor) and all(isinstance(bias, Tensor) for bias in biases)
    if x is not found.nodes[-1] or not fixed or any(bias.dim() != 1 for bias in biases):
        return None
    if matrix.dim() == 3 and not (matrix == matrix[:1]).all():
        return None  # another weight for each image
    found.weight = matrix if matrix.dim() == 2 else matrix[0]
    found.bias = biases[0].expand(found.weight.shape[1]) if biases else None
    found.nodes.append(product)
    _pass_on(found, found.weight.shape[1])
    _take_bias(to, found)
    return found


def _pass_on(found: _Linear, last: int) -> None:
    """Take in operations that keep all values, their order and the last size."""
    values = prod(shape_of(found.nodes[-1]))
    user = _only_user(found.nodes[-1])
    while user is not None and user.target in _SAME_ORDER:
        shape = shape_of(user)
        if prod(shape) != values or shape[-1] != last:
            return
        found.nodes.append(user)
        user = _only_user(user)


def _take_bias(to: Lowering, found: _Linear) -> None:
    add = _only_user(found.nodes[-1])
    if found.bias is not None or add is None or add.target != aten.add.Tensor or add.kwargs:
        return
    other = next((part for part in add.args if part is not found.nodes[-1]), None)
    if other in to.known and tuple(to.known[other].shape) == (found.weight.shape[1],):  # type: ignore[index]
        found.bias = to.known[other]  # type: ignore[index]
        found.nodes.append(add)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
