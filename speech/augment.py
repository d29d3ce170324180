"""How recordings are varied in training: one by one when they are read, and in batches.

All draws come from torch's global random state, on the device of what is varied. What works on
batches draws for each recording by itself, loops over nothing and never waits for a GPU.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio import functional as audio
from torchaudio import transforms

from blnet.speech.config import SPEED_DENOMINATOR, AugmentConfig

SNR_RANGE = 30.0  # dB from the lowest to the highest signal-to-noise ratio
STEEPEST = 2.0  # exponent of the power spectrum of brown noise
TIME_SHARE = 5  # a mask over time covers at most one part in so many of the recording


class Perturb:
    """Varies one recording: its speed, and where in time it lies.

    The speed is 1 - speed, 1 or 1 + speed, each as probable, by resampling, which moves the pitch
    as well (Ko et al., "Audio augmentation for speech recognition", Interspeech 2015). Then the
    recording is moved by up to `shift` seconds to either side, at most half its own length, so that
    something of it stays; zeros move in.

    Args:
        config: speed and shift of it.
        sample_rate: of the recordings, Hz.

    Raises:
        ValueError: naming the first setting that makes no sense.
    """

    def __init__(self, config: AugmentConfig, sample_rate: int) -> None:
        config.check()
        share = Fraction(config.speed).limit_denominator(SPEED_DENOMINATOR)
        self._shift = round(config.shift * sample_rate)
        # Played at f = p / q of its speed, a recording has q samples for every p.
        self._speeds = [
            transforms.Resample(speed.numerator, speed.denominator)
            for speed in ((1 - share, Fraction(1), 1 + share) if share else ())
        ]

    def __call__(self, samples: Tensor) -> Tensor:
        """Return a recording, varied.

        Args:
            samples: float32 (n,).

        Returns:
            float32 (n / speed,), rounded up.
        """
        if self._speeds:
            choice = int(torch.randint(len(self._speeds), ()))
            samples = self._speeds[choice](samples)
        most = min(self._shift, len(samples) // 2)
        if most:
            later = int(torch.randint(-most, most + 1, ()))
            samples = F.pad(samples, (later, -later))
        return samples


class WaveAugment:
    """Varies a batch of recordings: adds noise, and makes them louder or softer.

    Noise comes with probability `noise`. Its power spectrum falls as 1 / f^a, a uniform from 0
    (white) to 2 (brown); the signal-to-noise ratio is uniform from `noise_snr` to 30 dB above, of
    the mean power of the recording's own samples. The gain is uniform in dB.

    Args:
        config: gain, noise and noise_snr of it.

    Raises:
        ValueError: naming the first setting that makes no sense.
    """

    def __init__(self, config: AugmentConfig) -> None:
        config.check()
        self._config = config

    def __call__(self, samples: Tensor, lengths: Tensor) -> Tensor:
        """Return a padded batch, varied; padding stays as it is.

        Args:
            samples: float32 (N, L), 0 behind each recording's end.
            lengths: int64 (N,).
        """
        if self._config.noise:
            samples = self._with_noise(samples, lengths)
        if self._config.gain:
            decibels = _uniform(samples, -self._config.gain, self._config.gain)
            samples = samples * 10 ** (decibels / 20)[:, None]
        return samples

    def _with_noise(self, samples: Tensor, lengths: Tensor) -> Tensor:
        lowest = self._config.noise_snr
        ratio = _uniform(samples, lowest, lowest + SNR_RANGE)
        quiet = _uniform(samples, 0, 1) >= self._config.noise
        noise = coloured_noise(_uniform(samples, 0, STEEPEST), samples.shape[1])
        noisy = audio.add_noise(samples, noise, ratio.masked_fill(quiet, torch.inf), lengths)
        within = torch.arange(samples.shape[1], device=samples.device) < lengths[:, None]
        return torch.where(within, noisy, samples)


def coloured_noise(slopes: Tensor, length: int) -> Tensor:
    """Return Gaussian noise whose power spectrum falls as 1 / f^slope, with no constant part.

    Args:
        slopes: float32 (N,): 0 is white noise, 1 pink, 2 brown.
        length: samples of each.

    Returns:
        float32 (N, length), on the device of the slopes; its power is not normalised.
    """
    # A power of two, which is fast for any length.
    size = 1 << max(1, length - 1).bit_length()
    shape = len(slopes), size // 2 + 1
    spectrum = torch.randn(shape, dtype=torch.complex64, device=slopes.device)
    frequency = torch.arange(shape[1], device=slopes.device)
    fall = frequency.clamp(min=1) ** (-slopes[:, None] / 2) * (frequency > 0)
    noise: Tensor = torch.fft.irfft(spectrum * fall, size)[:, :length]
    return noise


class SpecAugment:
    """Sets stripes of maps to their mean: some bands, some stretches of time.

    Park et al., "SpecAugment", Interspeech 2019, without its warping of time. The width of each
    mask is uniform from 0 to the widest, and its place uniform among those where it fits; over time
    it lies within the valid frames and covers at most a fifth of them. All channels of a map get
    the same masks.

    The mean is 0 of maps that are normalised. Of others it is each band's own over the recording,
    which is what 0 stands for in maps that are normalised utterance by utterance; there 0 itself
    would be a power of 1, louder than nearly all that is said.

    Args:
        config: freq_masks, freq_width, time_masks and time_width of it.
        hop_seconds: time from one frame to the next.
        normalized: whether the maps are.

    Raises:
        ValueError: naming the first setting that makes no sense.
    """

    def __init__(self, config: AugmentConfig, hop_seconds: float, normalized: bool = True) -> None:
        config.check()
        self._config = config
        self._normalized = normalized
        self._time_width = round(config.time_width / hop_seconds)

    def __call__(self, maps: Tensor, frames: Tensor) -> Tensor:
        """Return the maps with masks.

        Args:
            maps: floating-point (N, channels, bins, T), 0 behind a recording's last frame.
            frames: int64 (N,), the valid ones.
        """
        bins, config = maps.shape[2], self._config
        mean = maps.new_zeros(())
        if not self._normalized:
            valid = torch.arange(maps.shape[3], device=maps.device) < frames[:, None, None, None]
            mean = torch.where(valid, maps.sum(-1, keepdim=True) / frames[:, None, None, None], 0)
        if config.freq_masks:
            sizes = torch.full_like(frames, bins)
            stripes = _stripes(sizes, sizes.clamp(max=config.freq_width), config.freq_masks, bins)
            maps = torch.where(stripes[:, None, :, None], mean, maps)
        if config.time_masks:
            widest = (frames // TIME_SHARE).clamp(max=self._time_width)
            stripes = _stripes(frames, widest, config.time_masks, maps.shape[3])
            maps = torch.where(stripes[:, None, None], mean, maps)
        return maps


def _stripes(sizes: Tensor, widest: Tensor, count: int, length: int) -> Tensor:
    """Return which of `length` positions some mask covers, bool (N, length).

    Args:
        sizes: (N,), positions that masks may cover.
        widest: (N,), at most that.
        count: masks of each.
        length: positions.
    """
    widths = _whole(widest[:, None].expand(-1, count))
    starts = _whole(sizes[:, None] - widths)
    places = torch.arange(length, device=sizes.device)
    begun = places >= starts[..., None]
    return (begun & (places < (starts + widths)[..., None])).any(1)


def _whole(most: Tensor) -> Tensor:
    """Return whole numbers, each uniform from 0 to `most`, both included."""
    # The largest float32 below 1 times k is below k even when rounded.
    return (torch.rand(most.shape, device=most.device) * (most + 1)).long()


def _uniform(samples: Tensor, low: float, high: float) -> Tensor:
    """Return a number for each recording, float32 (N,), uniform from low to high."""
    return torch.empty(len(samples), device=samples.device).uniform_(low, high)
