"""Big-Little Net's ops: Triton kernels, their plain PyTorch references, and the dispatch.

    from blnet.kernels import expand_merge, expand_merge_train, merge, use_backend
    y = merge(big, little)                      # relu(upsample_nearest(big) + little)
    y = expand_merge(x, weight, scale, shift, big)      # little = scale conv1x1(x, weight) + shift
    y = expand_merge_train(x, weight, gamma, beta, big=big)     # the same with BN on the batch

``bottleneck`` and ``stem`` are whole blocks of a network with BN folded, for inference.

Here ``merge`` is the function; the module of the same name is reached by
``from blnet.kernels.merge import ...``, and so for every op. ``blnet.kernels.testing`` (tolerances,
shape tables, NaN poisoning) and ``blnet.kernels.aot`` (compilation without a GPU) are imported when
asked for.
"""

from blnet.kernels import reference
from blnet.kernels.backend import (
    BACKENDS,
    BackendStatus,
    available_backends,
    forced_backend,
    use_backend,
)
from blnet.kernels.bottleneck import bottleneck
from blnet.kernels.center import estimate_center
from blnet.kernels.expand_merge import expand_merge
from blnet.kernels.expand_merge_train import expand_merge_train
from blnet.kernels.merge import merge
from blnet.kernels.moments import mean_and_covariance, moments
from blnet.kernels.stem import stem

__all__ = [
    "BACKENDS",
    "BackendStatus",
    "available_backends",
    "bottleneck",
    "estimate_center",
    "expand_merge",
    "expand_merge_train",
    "forced_backend",
    "mean_and_covariance",
    "merge",
    "moments",
    "reference",
    "stem",
    "use_backend",
]
