"""The suites: their names, their modules, and which of them a run takes."""

from __future__ import annotations

from collections.abc import Sequence

from blnet.bench.settings import Settings

# Suite -> (its module, one line on it).
SUITES = {
    "models": ("blnet.bench.suites.test_models", "whole networks, inference, every rung"),
    "training": (
        "blnet.bench.suites.test_training",
        "whole networks, forward and backward pass, fused and not",
    ),
    "speech_models": (
        "blnet.bench.suites.test_speech_models",
        "whole acoustic models, inference, every rung",
    ),
    "merge": ("blnet.bench.suites.test_merge", "relu(upsample(big) + little) at the merge sites"),
    "expand_merge": (
        "blnet.bench.suites.test_expand_merge",
        "relu(upsample(big) + BN(conv1x1(x))), inference and training",
    ),
    "moments": ("blnet.bench.suites.test_moments", "the batch statistics of expand_merge"),
    "bottleneck": ("blnet.bench.suites.test_bottleneck", "the little branches, inference"),
    "stem": ("blnet.bench.suites.test_stem", "the end of the stem, inference"),
    "features": (
        "blnet.bench.suites.test_features",
        "log-mel maps of recordings, against librosa's",
    ),
    "accuracy": (
        "blnet.bench.suites.test_accuracy",
        "study: plain and Big-Little networks trained alike, several seeds",
    ),
    "conversion": (
        "blnet.bench.suites.test_conversion",
        "study: a converted network, fine-tuned, against training anew",
    ),
    "speech": (
        "blnet.bench.suites.test_speech",
        "study: plain and Big-Little acoustic models trained alike, several seeds",
    ),
}
# Those that train: minutes to days, so only by name.
STUDIES = ("accuracy", "conversion", "speech")
# Those of a quick run on a CPU, where no kernel runs.
QUICK_CPU_SUITES = ("models", "merge")
# Those that measure any network for images.
OF_ANY_NETWORK = ("models", "training")
OPS = "kernels"  # stands for the suite of every op: those named as an op is


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """Put the suites of the ops in place of `OPS`, each suite once."""
    found: list[str] = []
    for name in names:
        found += op_suites() if name == OPS else [name]
    return tuple(dict.fromkeys(found))


def default_suites(settings: Settings) -> tuple[str, ...]:
    """Return the suites of a run that names none."""
    everything = settings.full or settings.on_gpu
    if settings.model or settings.input:
        return OF_ANY_NETWORK if everything else OF_ANY_NETWORK[:1]
    timed = tuple(name for name in SUITES if name not in STUDIES)
    return timed if everything else QUICK_CPU_SUITES


def op_suites() -> list[str]:
    """Return the suites that time an op of `blnet.kernels`."""
    from blnet.kernels import catalogue

    ops = {op.name for op in catalogue.OPS}
    return [suite for suite in SUITES if suite in ops]
