"""A 1x1 convolution and its BatchNorm as one op with what follows: upsample, add, ReLU.

`ExpandMerge` is the end of a Big-Little module's little branch as a module of its own;
`conv_norm_merge` is the same for two layers that already stand somewhere, such as a bottleneck's
conv3 and bn3. `blnet.fuse` puts it into whole networks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from blnet.kernels import expand_merge, expand_merge_train
from blnet.kernels.backend import choose_backend
from blnet.kernels.reference import epilogue


def why_not_fusable(conv: object, norm: object) -> str:
    """Say why two layers cannot run as one op; an empty text where they can.

    A convolution with a bias is refused because BatchNorm cancels it but for its running mean,
    hooks because they would not be called, and subclasses that compute something else.
    """
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
        return f"{type(conv).__name__} is not a plain Conv2d"
    folded = type(norm) is nn.Identity  # by `blnet.optimize`; the bias is the normalisation's
    if not folded and (
        not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
        or type(norm).forward not in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    ):
        return f"{type(norm).__name__} is not a plain BatchNorm2d"
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding not in ((0, 0), "same"):
        return "the convolution is not 1x1 with stride 1 and no padding"
    if conv.groups != 1:
        return f"the convolution has {conv.groups} groups"
    if conv.bias is not None and not folded:
        return "the convolution has a bias"
    if hooked(conv) or hooked(cast("nn.Module", norm)):
        return "a layer has hooks or a forward of its own, which would not be called"
    return ""


def hooked(layer: nn.Module) -> bool:
    """Return whether calling a layer does more than its class says."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    return any(hooks) or bool(layer._backward_pre_hooks) or "forward" in layer.__dict__


def conv_norm_merge(
    conv: nn.Module,
    norm: nn.Module,
    x: Tensor,
    big: Tensor | None = None,
    relu: bool = True,
    upsample: bool = True,
) -> Tensor:
    """Return relu(upsample_nearest(big, x's size) + norm(conv(x))), as one op where kernels run.

    In training, `norm` uses the batch's statistics and updates its running ones, those of all
    processes where it is a SyncBatchNorm; in evaluation it uses the running ones. Where no kernel
    runs (a CPU, float64), or the two are not what :func:`why_not_fusable` asks for, this calls the
    two layers and then PyTorch's operations.

    Args:
        conv: a convolution.
        norm: its normalisation, or an nn.Identity where that is folded into the convolution.
        x: shape (N, K, H, W).
        big: shape (N, C, H_big, W_big), or None for 0.
        relu: False leaves the closing ReLU out.
        upsample: False adds a `big` of another shape or dtype as PyTorch's own add does.

    Returns:
        Shape (N, C, H, W).

    Raises:
        ValueError: if the tensors do not fit; in training, if a channel has one value only.
    """
    if why_not_fusable(conv, norm):
        return _layer_by_layer(norm(conv(x)), big, relu, upsample)
    conv = cast("nn.Conv2d", conv)
    group = _process_group(norm)
    plain = group is None and choose_backend("expand_merge", x) == "torch"
    if plain or (big is not None and not upsample and not _fits(big, conv, x)):
        return _layer_by_layer(norm(conv(x)), big, relu, upsample)
    if isinstance(norm, nn.Identity):
        return expand_merge(x, conv.weight, None, conv.bias, big, relu)
    affine = cast("tuple[Tensor | None, Tensor | None]", (norm.weight, norm.bias))
    mean, var = cast("tuple[Tensor | None, Tensor | None]", (norm.running_mean, norm.running_var))
    eps = cast("float", norm.eps)
    if not norm.training and mean is not None and var is not None:
        scale, shift = _fold(*affine, mean, var, eps)
        return expand_merge(x, conv.weight, scale, shift, big, relu)
    tracking = norm.training and bool(norm.track_running_stats)
    counted = cast("Tensor | None", norm.num_batches_tracked) if tracking else None
    momentum = cast("float | None", norm.momentum)
    return expand_merge_train(
        x,
        conv.weight,
        *affine,
        *((mean, var) if tracking else (None, None)),
        momentum=momentum if counted is not None else momentum or 0.0,
        eps=eps,
        big=big,
        relu=relu,
        process_group=group,
        num_batches_tracked=counted,
    )


def _layer_by_layer(y: Tensor, big: Tensor | None, relu: bool, upsample: bool) -> Tensor:
    if big is None or upsample or (big.shape == y.shape and big.dtype == y.dtype):
        return epilogue(y, big, relu)
    return torch.relu(y + big) if relu else y + big


def _fits(big: Tensor, conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether a sum with big is one of equal shapes and dtypes (autocast sees to those)."""
    shape = torch.Size((x.shape[0], conv.out_channels, *x.shape[2:]))
    if big.shape != shape:
        return False
    return big.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)


def _process_group(norm: nn.Module) -> Any:
    """Return the processes that a SyncBatchNorm shares its statistics with now, or None."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _fold(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return BatchNorm in evaluation as scale and shift, in float32: shape (C,) each."""
    scale = torch.rsqrt(var.float() + eps)
    if weight is not None:
        scale = scale * weight.float()
    shift = -mean.float() * scale
    return scale, shift if bias is None else shift + bias.float()


def fused_tail(
    layers: tuple[nn.Module, ...],
    x: Tensor,
    big: Tensor,
    activation: nn.Module | bool,
    upsample: bool,
) -> Tensor:
    """Run the end of a block as one op if its layers allow it now, and else one after the other.

    What `blnet.fuse` puts into a network's code: layers may be exchanged or get hooks afterwards.

    Args:
        layers: a convolution and its normalisation, or a Sequential of the two.
        x: the convolution's input.
        big: what is added.
        activation: the module that follows the add, True for a ReLU, False for nothing.
        upsample: whether big is upsampled.
    """
    pair = _pair(layers)
    relu = activation if isinstance(activation, bool) else type(activation) is nn.ReLU
    plain = isinstance(activation, bool) or (relu and not hooked(activation))
    if pair is not None and plain:
        return conv_norm_merge(*pair, x, big, relu, upsample)
    for layer in layers:
        x = layer(x)
    if isinstance(activation, bool):
        return _layer_by_layer(x, big, activation, upsample)
    return cast("Tensor", activation(_layer_by_layer(x, big, False, upsample)))


# One node for every graph tracer: its code asks questions that only real tensors answer.
torch.fx.wrap("fused_tail")


def _pair(layers: tuple[nn.Module, ...]) -> tuple[nn.Module, nn.Module] | None:
    """Return the convolution and the normalisation, or None where there is more to them."""
    if len(layers) == 2:
        return layers[0], layers[1]
    sequence = layers[0]
    if type(sequence) is not nn.Sequential or len(sequence) != 2 or hooked(sequence):
        return None
    return sequence[0], sequence[1]


class ExpandMerge(nn.Sequential):
    """The end of a little branch: relu(upsample_nearest(big) + norm(conv(x))), as one op.

    A Sequential of the two layers, so that parameters and checkpoint keys are those of
    ``nn.Sequential(conv, norm)``: checkpoints move both ways.

    Args:
        conv: 1x1 convolution with stride 1, without groups and bias.
        norm: nn.BatchNorm2d or nn.SyncBatchNorm of as many channels.
        relu: False leaves the closing ReLU out.

    Raises:
        ValueError: if the two cannot run as one op.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, relu: bool = True) -> None:
        reason = why_not_fusable(conv, norm)
        if not reason and norm.num_features != conv.out_channels:
            reason = f"norm has {norm.num_features} channels and conv {conv.out_channels}"
        if reason:
            raise ValueError(
                f"ExpandMerge: conv and norm cannot run as one op: {reason}; give a 1x1 Conv2d "
                "without bias and a BatchNorm2d, or keep nn.Sequential(conv, norm)"
            )
        super().__init__(conv, norm)
        self.relu = relu

    def forward(self, x: Tensor, big: Tensor | None = None) -> Tensor:
        """Map (N, K, H, W), and big (N, C, H_big, W_big) if there is one, to (N, C, H, W)."""
        conv, norm = self
        return conv_norm_merge(cast("nn.Conv2d", conv), norm, x, big, self.relu)

    def extra_repr(self) -> str:
        """Say whether it closes with its ReLU."""
        return f"relu={self.relu}"
