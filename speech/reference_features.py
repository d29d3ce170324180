"""The features as librosa computes them: what `LogMel` is tested and timed against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from blnet.speech.config import FeatureConfig
from blnet.speech.features import FLOOR, framing


def librosa_log_mel(samples: NDArray[Any], config: FeatureConfig, sample_rate: int) -> NDArray[Any]:
    """Return what `LogMel.unnormalized` returns of recordings of one length, made by librosa.

    librosa's frames are as long as its Fourier transform, with the window in their middle, so the
    recording has zeros added where that reaches out at either end.

    Args:
        samples: float32 or float64 (..., n).
        config: bands, window, hop and differences.
        sample_rate: of the recordings, Hz.

    Returns:
        (..., channels, bins, T), of the samples' type.

    Raises:
        ImportError: if librosa is not installed.
    """
    import librosa

    window, fft = framing(config, sample_rate)
    before = (fft - window) // 2
    missing = max(0, window - samples.shape[-1])
    around = (before, missing + fft - window - before)
    power = librosa.feature.melspectrogram(
        y=np.pad(samples, [(0, 0)] * (samples.ndim - 1) + [around]),
        sr=sample_rate,
        n_fft=fft,
        hop_length=round(config.hop * sample_rate),
        win_length=window,
        center=False,
        n_mels=config.bins,
        htk=False,
        norm="slaney",
    )
    channels = [np.log(np.maximum(power, FLOOR))]
    for _ in range(2 if config.deltas else 0):
        channels.append(librosa.feature.delta(channels[-1], width=5, order=1, mode="nearest"))
    return np.stack(channels, axis=-3)
