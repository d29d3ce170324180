"""Log-mel features: batches of recordings to maps of bands over time, on any device.

A frame is decided by the samples under its window alone, and only frames that lie within a
recording are valid, so a recording has the same features alone and in a padded batch.

The numbers are librosa's (see `blnet.speech.reference_features`). For that everything up to the
logarithm is float64, under autocast as well: the rounding of a float32 FFT is relative to the
loudest frequency, and in the logarithm of a quiet band beside a pure tone it shows as 0.03. The
filters are our own because torchaudio makes its in float32, which their edges show as 2e-4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blnet.speech.config import DataConfig, FeatureConfig

# Least power of a band. White noise of 16-bit rounding has 4e-10, so that this is digital silence.
FLOOR = 1e-10
# Least standard deviation that normalisation divides by, of natural logarithms: 0.04 dB. What
# varies less is a constant and its rounding.
STD_FLOOR = 0.01
# Frames whose spectra are held at once. On a CPU they fit its cache, which is several times faster;
# elsewhere they fill the device and do not take all of its memory.
_BLOCK_CPU, _BLOCK = 256, 1 << 16


class LogMel(nn.Module):
    """Makes maps of recordings: logarithms of mel bands, their differences, normalised.

    Frame t covers the samples from t hop to t hop + window, under a Hann window, and nothing is
    padded at either end; only a recording shorter than one window has zeros added up to that. The
    power spectrum, over the next power of two of samples, goes through Slaney's mel filters, each
    of area 1, and becomes ln(max(power, `FLOOR`)).

    Args:
        config: bands, window, hop, differences and normalisation.
        sample_rate: of all recordings, Hz.

    Attributes:
        config: see above.
        sample_rate: see above.
        window_samples: samples under a window.
        hop_samples: samples from one frame to the next.
        fft: samples of the Fourier transform.
        mean: float32 (channels, bins), what normalisation "global" takes off.
        std: likewise, what it divides by.

    Raises:
        ValueError: if a setting makes no sense, or a band has no frequency of the transform.
    """

    mean: Tensor
    std: Tensor
    _hann: Tensor
    _filters: Tensor

    def __init__(self, config: FeatureConfig, sample_rate: int) -> None:
        super().__init__()
        config.check()
        DataConfig(sample_rate=sample_rate).check()
        self.config, self.sample_rate = config, sample_rate
        self.window_samples, self.fft = framing(config, sample_rate)
        self.hop_samples = round(config.hop * sample_rate)
        filters = mel_filters(config.bins, self.fft, sample_rate)
        empty = int((filters.sum(1) == 0).sum())
        if empty:
            raise ValueError(
                f"--features.bins {config.bins} leaves {empty} bands without any frequency, at "
                f"{sample_rate} Hz and --features.window {config.window:g}; take fewer bands or a "
                "longer window"
            )
        shape = config.channels, config.bins
        buffers = {
            "_hann": torch.hann_window(self.window_samples, dtype=torch.float64),
            "_filters": filters,
            "mean": torch.zeros(shape),
            "std": torch.ones(shape),
        }
        # Checkpoints carry `as_dict`, from which all of them are made again.
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self._ready = config.normalize != "global"

    @property
    def hop_seconds(self) -> float:
        """Time from one frame to the next, seconds: config.hop in whole samples."""
        return self.hop_samples / self.sample_rate

    def seconds(self, frame: float) -> float:
        """Return where a frame begins to be the nearest one, seconds into the recording.

        The middle of frame t is at t hop + window / 2; its share of the time begins half a hop
        earlier. The end of a stretch of frames is where the next one begins.
        """
        return (frame * self.hop_samples + (self.window_samples - self.hop_samples) / 2) / (
            self.sample_rate
        )

    def frames(self, lengths: Tensor) -> Tensor:
        """Return how many valid frames recordings have: max(1, 1 + (length - window) // hop).

        Args:
            lengths: samples of each, whole numbers of any shape.
        """
        return (1 + (lengths - self.window_samples) // self.hop_samples).clamp(min=1)

    def forward(self, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps of a padded batch.

        Args:
            samples: float32 (N, L); what stands behind a recording's end does not matter.
            lengths: int64 (N,), samples of each, at most L.

        Returns:
            float32 maps (N, channels, bins, T), contiguous and 0 behind a recording's last frame,
            and int64 frames (N,), the valid ones of each; T follows from L.

        Raises:
            ValueError: if normalisation is "global" and nobody has set mean and std.
        """
        if not self._ready:
            raise ValueError(
                "--features.normalize global needs the mean and std of the training set; give them "
                "to set_statistics first"
            )
        maps, frames = self.unnormalized(samples, lengths)
        return self._normalize(maps, _within(frames, maps.shape[-1])[:, None, None]), frames

    def unnormalized(self, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return maps and frames as `forward` does, before normalisation."""
        frames = self.frames(lengths)
        channels = [self._log_mel(samples, lengths)]
        for _ in range(self.config.channels - 1):
            channels.append(_difference(channels[-1], frames))
        maps = torch.stack(channels, 1)
        outside = ~_within(frames, maps.shape[-1])[:, None, None]
        return maps.masked_fill_(outside, 0), frames

    def _log_mel(self, samples: Tensor, lengths: Tensor) -> Tensor:
        """Return the logarithms of the bands, (N, bins, T); frames behind the end are anything."""
        count, length = samples.shape
        samples = samples.masked_fill(~_within(lengths, length), 0)
        if length < self.window_samples:
            samples = F.pad(samples, (0, self.window_samples - length))
        frames = samples.unfold(1, self.window_samples, self.hop_samples)
        block = _BLOCK_CPU if samples.device.type == "cpu" else _BLOCK
        parts = frames.split(max(1, block // max(1, count)), dim=1)
        return torch.cat([self._bands(part) for part in parts], 2)

    def _bands(self, frames: Tensor) -> Tensor:
        """Return the logarithms of the bands, (N, bins, T), of frames (N, T, window)."""
        spectrum = torch.fft.rfft(frames * self._hann, self.fft)
        power = spectrum.real.square().add_(spectrum.imag.square())
        return F.linear(power, self._filters).float().clamp_(min=FLOOR).log_().mT

    def _normalize(self, maps: Tensor, valid: Tensor) -> Tensor:
        """Return the maps, normalised where valid, (N, 1, 1, T), and 0 elsewhere."""
        if self.config.normalize == "none":
            return maps
        if self.config.normalize == "global":
            shifted = (maps - self.mean[..., None]) / self.std[..., None]
            return shifted.masked_fill_(~valid, 0)
        count = valid.sum(-1, keepdim=True)
        # Sums in float64: padding then changes nothing, and a constant band becomes exactly 0.
        mean = maps.sum(-1, keepdim=True, dtype=torch.float64) / count
        centred = (maps - mean.float()).masked_fill_(~valid, 0)
        variance = (centred.square().sum(-1, keepdim=True, dtype=torch.float64) / count).float()
        return centred / variance.sqrt().clamp(min=STD_FLOOR)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set what normalisation "global" takes off and divides by; `global_statistics` finds it.

        Args:
            mean: (channels, bins).
            std: likewise, above 0.

        Raises:
            ValueError: if they are of another shape, or not all finite and above 0.
        """
        shape = tuple(self.mean.shape)
        for name, values in (("mean", mean), ("std", std)):
            if tuple(values.shape) != shape:
                raise ValueError(
                    f"features.{name} must be of shape {shape}, a number for each channel and "
                    f"band, got {tuple(values.shape)}; take it of these features"
                )
            if not values.isfinite().all() or (name == "std" and not (values > 0).all()):
                wanted = "finite numbers" + (" above 0" if name == "std" else "")
                raise ValueError(f"features.{name} must hold {wanted}; measure it again")
        self.mean.copy_(mean)
        self.std.copy_(std)
        self._ready = True

    def as_dict(self) -> dict[str, Any]:
        """Return the settings, and the statistics if there are any, as plain values for JSON."""
        known = self.config.normalize == "global" and self._ready
        statistics = {name: getattr(self, name).tolist() if known else None for name in _STATISTICS}
        return {**asdict(self.config), "sample_rate": self.sample_rate, **statistics}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LogMel:
        """Return the features that a checkpoint holds, on the CPU.

        Raises:
            ValueError: naming the first setting that is missing, unknown or wrong.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"features must be a table of settings, got {values!r:.100}")
        for name in values:
            if name not in _TYPES and name not in _STATISTICS:
                known = ", ".join([*_TYPES, *_STATISTICS])
                raise ValueError(f"features.{name} is unknown; the settings are {known}")
        for name in (*_TYPES, *_STATISTICS):
            if name not in values:
                raise ValueError(f"features.{name} is missing; take it from the training run")
        for name, kinds in _TYPES.items():
            if type(values[name]) not in kinds:
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"features.{name} must be of type {wanted}, got {values[name]!r}")
        settings = {name: values[name] for name in _TYPES if name != "sample_rate"}
        features = cls(FeatureConfig(**settings), values["sample_rate"])
        if features.config.normalize == "global":
            features.set_statistics(*(_numbers(name, values[name]) for name in _STATISTICS))
        return features


class Renormalized(nn.Module):
    """A network for maps that were normalised with the global statistics of another training set.

    Args:
        network: takes (maps, frames), normalised as by `own`.
        own: the features that it was trained with.
        given: those that the maps come from.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, own: LogMel, given: LogMel) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("scale", (given.std.cpu() / own.std)[..., None])
        self.register_buffer("shift", ((given.mean.cpu() - own.mean) / own.std)[..., None])

    def forward(self, maps: Tensor, frames: Tensor) -> Tensor:
        """Return what the network answers to maps (N, channels, bins, frames)."""
        answers: Tensor = self.network(maps * self.scale + self.shift, frames)
        return answers


_STATISTICS = ("mean", "std")
_TYPES: dict[str, tuple[type, ...]] = {
    "bins": (int,),
    "window": (float, int),
    "hop": (float, int),
    "deltas": (bool,),
    "normalize": (str,),
    "sample_rate": (int,),
}


def _numbers(name: str, values: Any) -> Tensor:
    try:
        return torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"features.{name} must be a table of numbers, got {values!r:.100}; take it from the "
            "training run"
        ) from None


def framing(config: FeatureConfig, sample_rate: int) -> tuple[int, int]:
    """Return the samples of a window and of its Fourier transform, the next power of two."""
    window = round(config.window * sample_rate)
    return window, 1 << (window - 1).bit_length()


def mel_filters(bins: int, fft: int, sample_rate: int) -> Tensor:
    """Return the filters that turn a power spectrum into mel bands, float64 (bins, fft // 2 + 1).

    They are triangles of area 1 (over Hz), evenly spaced from 0 to half the sample rate on the mel
    scale of Slaney's Auditory Toolbox (Technical Report 1998-010, Interval Research): linear up to
    1 kHz, 15 mel there, and logarithmic above, 27 mel to a factor of 6.4.

    Args:
        bins: number of bands.
        fft: samples of the Fourier transform.
        sample_rate: at least 2000 Hz.
    """
    top = sample_rate / 2
    highest = 15 + 27 * math.log(top / 1000) / math.log(6.4)
    mel = torch.linspace(0, highest, bins + 2, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))[:, None]
    hertz = torch.linspace(0, top, fft // 2 + 1, dtype=torch.float64)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (hertz - low) / (middle - low), (high - hertz) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)


def _within(lengths: Tensor, size: int) -> Tensor:
    """Return which of `size` positions lie within each length: bool (N, size)."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _difference(bands: Tensor, frames: Tensor) -> Tensor:
    """Return the slope over five frames, the first and the last valid one replicated outside.

    d_t = sum of n (c_(t + n) - c_(t - n)) over n = 1, 2, divided by 10: HTK's regression formula
    (Young et al., The HTK Book, 5.9).

    Args:
        bands: (N, bins, T).
        frames: (N,).
    """
    times = torch.arange(-2, bands.shape[-1] + 2, device=bands.device).clamp(min=0)
    index = torch.minimum(times, frames[:, None] - 1)[:, None].expand(-1, bands.shape[1], -1)
    c = bands.gather(2, index)
    return (c[..., 3:-1] - c[..., 1:-3] + 2 * (c[..., 4:] - c[..., :-4])) / 10


@torch.no_grad()
def global_statistics(
    batches: Iterable[tuple[Tensor, Tensor]], features: LogMel
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel and band over all valid frames.

    One pass, in float64, batches merged as Chan et al. do ("Updating formulae and a pairwise
    algorithm for computing sample variances", 1979).

    Args:
        batches: (samples (N, L), lengths (N,)), as `LogMel.forward` takes them; they are brought to
            the features' device.
        features: whose maps they are, before normalisation.

    Returns:
        Two float32 tensors (channels, bins); no deviation is below `STD_FLOOR`.

    Raises:
        ValueError: if there are no recordings.
    """
    device = features.mean.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    mean = torch.zeros(features.mean.shape, dtype=torch.float64, device=device)
    squares = torch.zeros_like(mean)
    for samples, lengths in batches:
        maps, frames = features.unnormalized(samples.to(device), lengths.to(device))
        valid = _within(frames, maps.shape[-1])[:, None, None]
        count = frames.sum()
        own = maps.double().sum((0, 3)) / count
        around = (maps - own[..., None]).masked_fill_(~valid, 0)
        step, merged = own - mean, total + count
        squares += around.square().sum((0, 3)) + step.square() * (total * count / merged)
        mean += step * (count / merged)
        total = merged
    if not total:
        raise ValueError("global mean and std need recordings, and there is none; name some data")
    return mean.float(), (squares / total).sqrt().clamp(min=STD_FLOOR).float()
