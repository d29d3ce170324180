"""Big-Little Net's ops: Triton kernels, their plain PyTorch references, and the dispatch.

    from blnet.kernels import merge, use_backend
    y = merge(big, little)                      # relu(upsample_nearest(big) + little)

Here ``merge`` is the function; the module of the same name is reached by
``from blnet.kernels.merge import ...``. ``blnet.kernels.testing`` (tolerances, shape tables, NaN
poisoning) and ``blnet.kernels.aot`` (compilation without a GPU) are imported when asked for.
"""

from blnet.kernels import reference
from blnet.kernels.backend import (
    BACKENDS,
    BackendStatus,
    available_backends,
    forced_backend,
    use_backend,
)
from blnet.kernels.merge import merge

__all__ = [
    "BACKENDS",
    "BackendStatus",
    "available_backends",
    "forced_backend",
    "merge",
    "reference",
    "use_backend",
]
