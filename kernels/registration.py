"""How an op is registered with PyTorch: once, the same way for every op.

``torch.library.triton_op`` lets torch.compile see the Triton kernels inside an op, and
torch.export keeps the op whole. It refuses kernels that TRITON_INTERPRET=1 has turned into
interpreted functions, so in that case the op goes through ``torch.library.custom_op``. Without
Triton nothing is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from blnet.kernels.triton_shim import INTERPRETED, TRITON_INSTALLED

Implementation = Callable[..., Any]


_faking = False  # True while a launcher runs as its own fake


class _NoKernel:
    """Takes a kernel's place while a launcher runs as its own fake."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda **arguments: None


def wrap_triton(kernel: Any) -> Any:
    """Make a kernel's launch visible to tracing; an interpreted kernel is returned as it is.

    Named as PyTorch's, because PyTorch looks for calls of this name in an op's source to learn
    which kernels a cached graph depends on.
    """
    if not INTERPRETED:
        return torch.library.wrap_triton(kernel)
    return _NoKernel() if _faking else kernel


def _fake_of(implementation: Implementation) -> Implementation:
    @wraps(implementation)
    def fake(*arguments: Any) -> Any:
        global _faking
        _faking = True
        try:
            return implementation(*arguments)
        finally:
            _faking = False

    return fake


def define_op(
    name: str,
    implementation: Implementation,
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    flops: Callable[..., int] | None = None,
    inference_only: bool = False,
) -> Implementation:
    """Register an op that is made of Triton kernels.

    The launcher is its own fake implementation on both ways of registering: it allocates its
    outputs, and its kernels are traced or skipped. Shapes and strides cannot drift apart.

    Args:
        name: qualified name, "blnet::<op>".
        implementation: the launcher; its type annotations are the op's schema. It may use
            tensor operations, and kernels through :func:`wrap_triton`.
        backward: ``backward(ctx, *grads)`` as in torch.library.register_autograd; None for an op
            that is itself a backward pass: differentiating it raises a RuntimeError.
        setup_context: ``setup_context(ctx, inputs, output)``.
        flops: formula for torch's FlopCounterMode, from shapes; None counts 0.
        inference_only: whether the error on differentiating says that the op has no backward pass
            at all.

    Returns:
        The registered op, or ``implementation`` where Triton is not installed.
    """
    if not TRITON_INSTALLED:
        return implementation
    op: Any
    if INTERPRETED:
        op = torch.library.custom_op(name, implementation, mutates_args=())
        op.register_fake(_fake_of(implementation))
    else:
        op = torch.library.triton_op(name, implementation, mutates_args=())
    op.register_autograd(backward or _refuse(name, inference_only), setup_context=setup_context)
    namespace, _, short = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), short)
    register_flop_formula(packet)(flops or no_flops)
    return packet  # type: ignore[no-any-return]


def no_flops(*shapes: Any, **keywords: Any) -> int:
    """Count nothing: FlopCounterMode counts matrix products and convolutions only.

    An op without either must say so, or a network's count would depend on the backend.
    """
    return 0


def _refuse(name: str, inference_only: bool) -> Callable[..., Any]:
    reason = (
        f"{name} cannot be differentiated: the kernels compute first derivatives only; "
        "call blnet.kernels.use_backend('torch') for second derivatives"
    )
    if inference_only:
        reason = (
            f"{name} is for inference and has no gradient; call it under torch.no_grad(), or "
            "blnet.kernels.use_backend('torch') for plain PyTorch, which has one"
        )

    def refuse(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(reason)

    return refuse


def promote_under_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Bring floating-point tensors of mixed dtypes to the widest, if autocast is on.

    This is what torch.add does. Outside autocast the tensors come back as they are, and the op
    refuses the mixture. torch.library.register_autocast cannot express it: that casts to one
    fixed dtype.
    """
    first = tensors[0]
    if all(t.dtype == first.dtype for t in tensors[1:]):
        return tensors
    if not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = first.dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def cast_under_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast floating-point tensors to autocast's dtype, if it is on: what torch.conv2d does.

    As there, float64 is left alone.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype is torch.float64 else t.to(dtype) for t in tensors)
