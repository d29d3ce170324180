"""Features suite: log-mel maps of recordings, `blnet.speech.features.LogMel` against librosa's.

Both are checked against the definition in float64, written with NumPy below, to 5e-5, so that they
agree to 1e-4. librosa runs on the CPU, wherever ours runs, and is given whole batches at once.
Recordings are noise of the run's seed: no step's time depends on the values. --dtype does not
matter here; features are float32 whatever a network takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blnet.bench.measure import Call, Group, Implementation
from blnet.bench.memory import tensor_bytes
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import Measurement
from blnet.bench.roofline import measure_ceilings
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings
from blnet.limits import UnavailableError
from blnet.speech.config import FeatureConfig

NAME = "features"
COMPUTES = "log-mel maps, 64 bands, 25 ms under a window, every 10 ms, at 16 kHz"
REFERENCE = "the definition in float64, with NumPy"
TOLERANCE = 5e-5
RATE = 16000
CONFIG = FeatureConfig(normalize="none")
OURS, BASELINE = "blnet", "librosa"
DESCRIPTIONS = {
    BASELINE: "librosa.feature.melspectrogram on the CPU, the batch at once.",
    OURS: "LogMel of blnet.speech, on the run's device.",
}
# Rounds for one of a network's: a call takes milliseconds.
ROUNDS = 4


@dataclass(frozen=True)
class Load:
    """So many recordings of one length at once."""

    batch: int
    seconds: int

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.batch} x {self.seconds} s"


LOADS = (Load(1, 1), Load(16, 1), Load(1, 16), Load(16, 16))


def cases(settings: Settings) -> list[Case]:
    """Return both implementations at every load."""
    return [Case(load.label, load.label, name) for load in LOADS for name in DESCRIPTIONS]


def build(group: str, session: Session) -> Group:
    """Return both implementations at one load."""
    settings = session.settings
    measure_ceilings(session)
    load = next(load for load in LOADS if load.label == group)
    generator = torch.Generator().manual_seed(settings.seed)
    batch = session.batch(NAME, group, load.batch)
    samples = 0.1 * torch.randn(batch, load.seconds * RATE, generator=generator)
    return Group(
        suite=NAME,
        name=group,
        implementations=[
            _implementation(BASELINE, load, samples, partial(_librosa, samples)),
            _implementation(OURS, load, samples, partial(_blnet, samples, settings.device)),
        ],
        references={load.label: partial(reference, samples)},
        tolerance=TOLERANCE,
        reference_text=REFERENCE,
        rounds=ROUNDS * settings.rounds(load.batch),
        budget=session.budget(NAME),
    )


def _implementation(
    name: str, load: Load, samples: Tensor, make: Callable[[], Call]
) -> Implementation:
    frames = len(samples) * (load.seconds * 100 - 2)
    return Implementation(
        name=name,
        family=load.label,
        build=make,
        description=DESCRIPTIONS[name],
        facts={
            "computes": COMPUTES,
            "site": load.label,
            "pass": "forward",
            "batch": len(samples),
            # The samples read once, the map written once.
            "bytes": tensor_bytes(samples) + 4 * frames * CONFIG.bins,
            "baseline": name == BASELINE,
            "dtype": "float32",
        },
        held_bytes=tensor_bytes(samples),
        memory=name == OURS,  # of NumPy's arrays PyTorch's profiler knows nothing
    )


def _librosa(samples: Tensor) -> Call:
    try:
        import librosa  # noqa: F401 - found here, so that nothing is imported when it is timed
    except ImportError:
        raise UnavailableError("librosa is missing; pip install 'blnet[speech]'") from None
    from blnet.speech.reference_features import librosa_log_mel

    array = samples.numpy()
    return lambda: torch.from_numpy(librosa_log_mel(array, CONFIG, RATE))


def _blnet(samples: Tensor, device: str) -> Call:
    from blnet.speech.features import LogMel

    features = LogMel(CONFIG, RATE).to(device)
    own = samples.to(device)
    lengths = torch.full((len(own),), own.shape[1], device=device)

    def call() -> Any:
        with torch.inference_mode():
            return features(own, lengths)[0]

    return call


def reference(samples: Tensor) -> Tensor:
    """Return the maps by their definition, float64 (N, 1, bins, T)."""
    from blnet.speech.features import FLOOR, framing, mel_filters

    window, fft = framing(CONFIG, RATE)
    hop = round(CONFIG.hop * RATE)
    filters = mel_filters(CONFIG.bins, fft, RATE).numpy()
    hann = np.sin(np.pi * np.arange(window) / window) ** 2
    maps = []
    for row in samples.double().numpy():
        frames = np.lib.stride_tricks.sliding_window_view(row, window)[::hop]
        power = np.abs(np.fft.rfft(frames * hann, fft)) ** 2
        maps.append(np.log(np.maximum(filters @ power.T, FLOOR)))
    return torch.from_numpy(np.stack(maps)[:, None])


@pytest.mark.benchmark(timer=virtual_clock)
def test_features(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
