"""What every launcher shares: launch records, memory formats, outputs, questions about sizes.

A :class:`Launch` is everything of a kernel launch but the tensors. Op files compute it in one
function from plain sizes; the launcher runs it and ``aot.py`` compiles it ahead of time, so the
two cannot drift apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

INT32_LIMIT = 2**31
_LARGEST_TILE = 2**16  # elements
_NARROWEST = 16  # channels of a tile; narrower maps are not split
# Whole-number ratios up to this are compiled in: index arithmetic by constants, unrolled windows.
LARGEST_CONSTANT_RATIO = 4

# True while blnet.kernels.testing.poisoned_outputs is active.
_poison = False


@dataclass(frozen=True)
class Launch:
    """A kernel launch without its tensors.

    Attributes:
        grid: number of programs along each axis.
        integers: run-time integer arguments by name; sizes may be symbolic while tracing.
        constants: compile-time (``tl.constexpr``) arguments by name.
        num_warps: warps per program.
        num_stages: depth of the software pipeline; 1 for kernels without a pipelined loop.
    """

    grid: tuple[int, ...]
    integers: Mapping[str, int]
    constants: Mapping[str, float]
    num_warps: int = 4
    num_stages: int = 1
    arguments: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Join the keyword arguments of the launch once."""
        joined = {**self.integers, **self.constants}
        joined.update(num_warps=self.num_warps, num_stages=self.num_stages)
        object.__setattr__(self, "arguments", joined)


def known(condition: object) -> bool:
    """Return whether ``condition`` certainly holds, without adding a guard.

    While torch.compile or torch.export traces with dynamic sizes, a comparison of sizes is
    symbolic, and asking Python for its truth would fix the size or fail. A launcher that asks
    ``known`` instead gets False wherever the sizes do not decide, and takes the general path.

    Args:
        condition: a bool, or a torch.SymBool.
    """
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))  # type: ignore[arg-type]


def fits_int32(*values: int) -> bool:
    """Return whether offsets up to all of these values fit 32 bits, with room for a tile more.

    A tile reaches past the end before it is masked. A symbolic size does not fit: the launcher
    then computes in 64 bits, which is slower by a little and right for every size.
    """
    return all(known(value < INT32_LIMIT - _LARGEST_TILE) for value in values)


def ceil_divide(numerator: int, denominator: int) -> int:
    """Divide non-negative integers, rounding up; symbolic sizes stay symbolic."""
    return (numerator + denominator - 1) // denominator


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least ``number`` (at least 1)."""
    return 1 << max(int(number) - 1, 0).bit_length()


def whole_ratio(size: int, size_big: int) -> int:
    """Return size / size_big where it is a small whole number and known while tracing, else 0."""
    for ratio in range(1, LARGEST_CONSTANT_RATIO + 1):
        if known(size == ratio * size_big):
            return ratio
    return 0


def inner_block(inner: int, largest: int = 256) -> int:
    """Choose how many channels a tile spans.

    The largest power of two that leaves at most one lane in eight idle: 96 channels take tiles
    of 32, not one of 128 with a quarter of its lanes masked. Below 16 channels a lane's 16-byte
    access would no longer be full, so narrow maps take one tile, masked.

    Args:
        inner: number of channels; 1 for contiguous maps.
        largest: upper bound on the answer, a power of two.
    """
    block = min(next_power_of_2(inner), largest)
    while block > _NARROWEST:
        if ceil_divide(inner, block) * block * 8 <= inner * 9:
            return block
        block //= 2
    return min(next_power_of_2(inner), largest) if inner < _NARROWEST else block


def memory_format_of(tensor: torch.Tensor) -> torch.memory_format:
    """Return the format that the kernels use for a map: channels-last only if it is exactly that.

    A map that is both (one channel, or one pixel) counts as contiguous, and so does a view that
    is neither: it is copied into contiguous order first.
    """
    if tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Return a map in channels-last layout, a copy only where it has another."""
    return tensor.contiguous(memory_format=torch.channels_last)


def allocate(
    like: torch.Tensor, shape: tuple[int, ...], memory_format: torch.memory_format
) -> torch.Tensor:
    """Allocate an op's output, uninitialised; every launcher allocates through this.

    Inside ``blnet.kernels.testing.poisoned_outputs`` it is filled with NaN, so that an element
    which no program writes shows.

    Args:
        like: gives dtype and device.
        shape: the output's shape.
        memory_format: torch.channels_last or torch.contiguous_format.
    """
    if memory_format == torch.channels_last:
        # By its strides: torch.compile fills an empty tensor of a memory format with NaN first, in
        # a kernel of its own (Inductor's code of a compiled bL-ResNet-50: 23 of them).
        _, channels, height, width = shape
        strides = channels * height * width, 1, width * channels, channels
        output = torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
    else:
        output = torch.empty(shape, dtype=like.dtype, device=like.device)
    return output.fill_(float("nan")) if _poison else output


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make a tensor's device the current one, on which Triton launches.

    Without it a launch for a tensor on cuda:1 would run on cuda:0. While tracing, tensors are
    fake and nothing is launched; the compiler guards its own launches.

    Args:
        tensor: an output of the launch.
    """
    if not tensor.is_cuda or type(tensor) is not torch.Tensor:
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@dataclass(frozen=True)
class Specialization:
    """A kernel with everything fixed that its machine code depends on.

    Attributes:
        name: for people: op, pass, problem and dtype.
        kernel: the ``@triton.jit`` function.
        signature: Triton's type for each argument by name: "*bf16", "i32", "constexpr".
        constants: the value of each "constexpr" argument.
        divisible: names of the arguments (pointers, sizes) that are multiples of 16.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, float]
    divisible: frozenset[str]
    num_warps: int
    num_stages: int


_TRITON_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}


def specialize(
    name: str, kernel: Any, launch: Launch, pointers: Mapping[str, torch.dtype]
) -> Specialization:
    """Specialise a kernel as Triton's run time would for this launch.

    As there, an integer argument of 1 is compiled in, and multiples of 16 are declared; tensors
    are taken to be aligned to 16 bytes, as PyTorch allocates them.

    Args:
        name: what to call it.
        kernel: the ``@triton.jit`` function.
        launch: the plan, of concrete sizes.
        pointers: dtype of each tensor argument by name.
    """
    signature = {argument: _TRITON_TYPES[dtype] for argument, dtype in pointers.items()}
    constants = dict(launch.constants)
    divisible = set(pointers)
    for argument, value in launch.integers.items():
        signature[argument] = "i32" if value < INT32_LIMIT else "i64"
        if value == 1:
            constants[argument] = 1
        elif value % 16 == 0:
            divisible.add(argument)
    signature.update(dict.fromkeys(constants, "constexpr"))
    return Specialization(
        name=name,
        kernel=kernel,
        signature={argument: signature[argument] for argument in kernel.arg_names},
        constants=constants,
        divisible=frozenset(divisible),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
