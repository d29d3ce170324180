"""Triton where it is installed, and stand-ins where it is not.

Op files say ``from blnet.kernels.triton_shim import tl, triton`` and read from top to bottom with
``@triton.jit`` in place, whether or not Triton can be imported. Without it a kernel is an
:class:`MissingKernel`, which says what to install if somebody launches it; the dispatch in
``backend.py`` never does.

TRITON_INTERPRET is read once, here, because ``@triton.jit`` reads it when a kernel is *defined*:
setting it later changes nothing, and a half-interpreted process would be wrong in ways that are
hard to see.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

__all__ = ["INTERPRETED", "TRITON_ERROR", "TRITON_INSTALLED", "MissingKernel", "tl", "triton"]


class MissingKernel:
    """Takes the place of a kernel where Triton is not installed.

    Args:
        function: the Python function that ``@triton.jit`` would have compiled.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function
        self.__name__ = function.__name__

    def __getitem__(self, grid: object) -> Callable[..., None]:
        """Refuse a launch."""
        raise ImportError(
            f"kernel {self.__name__} needs Triton, which is not installed; "
            "install it with: pip install triton"
        )


def _stand_ins() -> tuple[Any, Any]:
    # Only what an op file touches while it is being imported: the decorator and annotations.
    language = SimpleNamespace(constexpr=object())
    return SimpleNamespace(jit=MissingKernel, language=language), language


if TYPE_CHECKING:
    triton: Any
    tl: Any
    TRITON_INSTALLED: bool
    TRITON_ERROR: str
    INTERPRETED: bool
else:
    try:
        import triton
        import triton.language as tl

        TRITON_INSTALLED = True
        TRITON_ERROR = ""
        INTERPRETED = bool(triton.knobs.runtime.interpret)
    except ImportError as error:
        triton, tl = _stand_ins()
        TRITON_INSTALLED = False
        TRITON_ERROR = str(error)
        INTERPRETED = False


def _round_bfloat16(values: Any) -> Any:
    """Round a float32 array to bfloat16 bits, to the nearest and to even on a tie."""
    import numpy as np  # NumPy is there: the interpreter itself is built on it.

    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF).astype(np.uint32)) >> 16
    # Adding to a NaN's bits could carry into its exponent: keep it a quiet NaN instead.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _correct_interpreter() -> None:
    """Mend three faults of Triton 3.6's interpreter; the compiler has none of them.

    It truncates float32 to bfloat16 instead of rounding to the nearest as a GPU and PyTorch do,
    which doubles the error of every result. A loop over a run-time bound calls ``int`` on an
    array of one element, which NumPy 2.4 refuses. And a matrix product of bfloat16 multiplies
    the bits as integers.
    """
    import numpy as np
    from triton.runtime import interpreter

    original, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return _round_bfloat16(values).reshape(values.shape)
        if source == tl.bfloat16 and target == tl.float32:
            bits = values.view(np.uint16).astype(np.uint32) << 16
            return bits.view(np.uint32).reshape(values.shape)
        return original(values, source, target, rounding)

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(x: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            return convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return x.data.astype(np.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        # Products of 16-bit floats are exact in float32, in which a GPU sums them too.
        return interpreter.TensorHandle(widened(a) @ widened(b) + d.data, d.dtype.scalar)

    interpreter._convert_float, interpreter._patch_lang_tensor = convert, patch
    interpreter.InterpreterBuilder.create_dot = dot


if INTERPRETED:
    _correct_interpreter()
