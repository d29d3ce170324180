"""How recordings are varied: what is drawn, within which bounds, and what stays as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blnet.speech.augment import Perturb, SpecAugment, WaveAugment, coloured_noise
from blnet.speech.config import AugmentConfig

RATE = 8000
HOP = 0.01


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def waves(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """A padded batch of noise of several powers, and its lengths."""
    samples = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        samples[row, :length] = torch.randn(length) * 10.0 ** -(row % 4)
    return samples, torch.tensor(lengths)


def runs(covered: Tensor) -> list[tuple[int, int]]:
    """The stretches (start, end) of True in a row."""
    edges = torch.diff(torch.nn.functional.pad(covered.int(), (1, 1)))
    starts, ends = ((edges == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return list(zip(starts, ends, strict=True))


# Nothing, and the seed --------------------------------------------------------------------------


def test_without_settings_nothing_is_touched_or_drawn() -> None:
    config = AugmentConfig()
    samples, lengths = waves([900, 500])
    maps = torch.randn(2, 3, 64, 20)
    state = torch.get_rng_state()
    assert Perturb(config, RATE)(lengths) is lengths
    assert WaveAugment(config)(samples, lengths) is samples
    assert SpecAugment(config, HOP)(maps, lengths) is maps
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_follows_from_the_seed() -> None:
    config = AugmentConfig(
        speed=0.1, gain=6, shift=0.02, noise=0.5, freq_masks=2, time_masks=2, time_width=1
    )
    samples, lengths = waves([900, 800, 700])
    maps, frames = torch.ones(3, 1, 64, 90), torch.tensor([90, 80, 70])

    def vary(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [
            Perturb(config, RATE)(samples[0]),
            WaveAugment(config)(samples, lengths),
            SpecAugment(config, HOP)(maps, frames),
        ]

    for first, second in zip(vary(1), vary(1), strict=True):
        assert torch.equal(first, second)
    for first, other in zip(vary(1), vary(2), strict=True):
        assert first.shape != other.shape or not torch.equal(first, other)


def test_inputs_are_left_as_they_are() -> None:
    config = AugmentConfig(
        speed=0.1, gain=6, shift=0.02, noise=1, freq_masks=2, time_masks=2, time_width=1
    )
    samples, lengths = waves([900, 800])
    maps = torch.ones(2, 1, 64, 90)
    before = samples.clone()
    Perturb(config, RATE)(samples[0])
    WaveAugment(config)(samples, lengths)
    SpecAugment(config, HOP)(maps, torch.tensor([90, 80]))
    assert torch.equal(samples, before)
    assert (maps == 1).all()


def test_batches_are_varied_without_looking_at_values() -> None:
    # A tensor on meta has no values: whatever would wait for a GPU raises.
    config = AugmentConfig(gain=6, noise=0.5, freq_masks=2, time_masks=2)
    samples, lengths = (rows.to("meta") for rows in waves([900, 800]))
    assert WaveAugment(config)(samples, lengths).shape == samples.shape
    assert SpecAugment(config, HOP)(samples[:, None, None], lengths).shape == (2, 1, 1, 900)


@pytest.mark.parametrize("make", [lambda c: Perturb(c, RATE), WaveAugment,
                                  lambda c: SpecAugment(c, HOP)])  # fmt: skip
def test_settings_are_checked(make: Any) -> None:
    with pytest.raises(ValueError, match=r"--augment\.gain must be from 0 to 60, got -1"):
        make(AugmentConfig(gain=-1))


# Speed and shift --------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [0.1, 0.05, 0.25])
def test_speed_changes_length_and_pitch(speed: float) -> None:
    hertz, length = 500, 8000
    tone = torch.sin(2 * math.pi * hertz * torch.arange(length) / RATE)
    perturb = Perturb(AugmentConfig(speed=speed), RATE)
    counts = dict.fromkeys((1 - speed, 1.0, 1 + speed), 0)
    for _ in range(60):
        varied = perturb(tone)
        factor = min(counts, key=lambda f: abs(length / f - len(varied)))
        counts[factor] += 1
        assert len(varied) == math.ceil(round(length / factor, 6))
        middle = varied[500:-500]
        spectrum = torch.fft.rfft(middle * torch.hann_window(len(middle))).abs()
        found = spectrum.argmax().item() * RATE / len(middle)
        assert found == pytest.approx(hertz * factor, abs=1.5)
        assert middle.abs().max() == pytest.approx(1, abs=0.01)
    assert min(counts.values()) >= 8  # each of the three is as probable: 20 expected


def test_shift_moves_zeros_in_and_keeps_the_length() -> None:
    perturb = Perturb(AugmentConfig(shift=0.01), RATE)
    samples = torch.arange(1.0, 1001)
    seen = set()
    for _ in range(600):
        moved = perturb(samples)
        assert len(moved) == 1000
        kept = moved.nonzero().flatten()
        first = int(kept[0])
        later = first if first else 1000 - len(kept)
        sign = 1 if first else -1
        expected = samples[: 1000 - later] if first else samples[later:]
        assert torch.equal(moved[kept], expected)
        seen.add(sign * later)
    assert min(seen) == -80
    assert max(seen) == 80
    assert len(seen) > 130  # of 161


def test_a_short_recording_keeps_half_of_itself() -> None:
    perturb = Perturb(AugmentConfig(shift=10), RATE)
    for length in (1, 2, 7, 100):
        for _ in range(30):
            moved = perturb(torch.ones(length))
            assert len(moved) == length
            assert moved.sum() >= length / 2


# Gain and noise ---------------------------------------------------------------------------------


def test_gain_is_uniform_in_decibels() -> None:
    samples, lengths = waves([300] * 2000)
    varied = WaveAugment(AugmentConfig(gain=6))(samples, lengths)
    ratio = varied / samples
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0)
    decibels = 20 * ratio[:, 0].log10()
    assert decibels.min() == pytest.approx(-6, abs=0.05)
    assert decibels.max() == pytest.approx(6, abs=0.05)
    assert decibels.mean() == pytest.approx(0, abs=0.3)
    assert decibels.std() == pytest.approx(12 / math.sqrt(12), abs=0.15)


def ratios(samples: Tensor, varied: Tensor, lengths: Tensor) -> Tensor:
    """Signal-to-noise ratio of each recording over its own samples, dB."""
    found = []
    for row, length in enumerate(lengths.tolist()):
        clean = samples[row, :length].double()
        added = varied[row, :length].double() - clean
        found.append(10 * torch.log10(clean.square().sum() / added.square().sum()))
    return torch.stack(found)


def test_noise_has_the_ratio_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import blnet.speech.augment as module

    monkeypatch.setattr(module, "SNR_RANGE", 0.0)
    samples, lengths = waves([2000, 1999, 700, 100, 50] * 10)
    varied = WaveAugment(AugmentConfig(noise=1, noise_snr=5))(samples, lengths)
    found = ratios(samples, varied, lengths)
    torch.testing.assert_close(found, torch.full_like(found, 5), atol=0.1, rtol=0)


def test_ratios_are_uniform_over_30_decibels() -> None:
    samples, lengths = waves([200, 150] * 1000)
    varied = WaveAugment(AugmentConfig(noise=1, noise_snr=-3))(samples, lengths)
    found = ratios(samples, varied, lengths)
    assert found.min() == pytest.approx(-3, abs=0.2)
    assert found.max() == pytest.approx(27, abs=0.2)
    assert found.mean() == pytest.approx(12, abs=1)
    assert found.std() == pytest.approx(30 / math.sqrt(12), abs=0.4)


def test_noise_comes_with_its_probability() -> None:
    samples, lengths = waves([100, 80] * 1000)
    varied = WaveAugment(AugmentConfig(noise=0.3))(samples, lengths)
    noisy = (varied != samples).any(1)
    assert noisy.float().mean() == pytest.approx(0.3, abs=0.04)
    assert torch.equal(varied[~noisy], samples[~noisy])


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_padding_and_silence_stay_zero(lengths: list[int]) -> None:
    samples, counts = waves(lengths)
    samples = torch.nn.functional.pad(samples, (0, 7))
    samples[0] = 0
    varied = WaveAugment(AugmentConfig(noise=1, gain=6))(samples, counts)
    assert varied.shape == samples.shape
    assert varied.isfinite().all()
    assert (varied[0] == 0).all()
    for row, length in enumerate(lengths):
        assert (varied[row, length:] == 0).all()


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_noise_has_its_colour(slope: float) -> None:
    rows = coloured_noise(torch.full((200,), slope), 4096)
    power = torch.fft.rfft(rows.double()).abs().square().mean(0)
    assert power[0] < 1e-6 * power[1]
    octaves = torch.stack([power[2**k : 2 ** (k + 1)].mean() for k in range(3, 11)])
    fall = torch.diff(octaves.log2())
    assert -fall.mean() == pytest.approx(slope, abs=0.05)
    assert (fall + slope).abs().max() < 0.3


def test_colours_are_drawn_for_each_recording() -> None:
    silence_free, lengths = waves([4096] * 300)
    varied = WaveAugment(AugmentConfig(noise=1, noise_snr=0))(silence_free, lengths)
    power = torch.fft.rfft(varied - silence_free).abs().square()
    fall = (power[:, 8:16].mean(1) / power[:, 1024:2048].mean(1)).log2() / 7
    assert fall.min() < 0.2
    assert fall.max() > 1.8
    assert fall.mean() == pytest.approx(1, abs=0.15)
    assert not torch.equal(varied[0] - silence_free[0], varied[1] - silence_free[1])


# SpecAugment ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    frames=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    channels=st.sampled_from([1, 3]),
    bins=st.sampled_from([4, 16]),
)
def test_masks_keep_their_bounds(frames: list[int], channels: int, bins: int) -> None:
    config = AugmentConfig(freq_masks=1, freq_width=6, time_masks=1, time_width=0.1)
    maps = torch.ones(len(frames), channels, bins, max(frames) + 3)
    masked = SpecAugment(config, HOP)(maps, torch.tensor(frames)) == 0
    assert torch.equal(masked, masked[:, :1].expand_as(masked))
    for row, count in enumerate(frames):
        bands, times = masked[row, 0].all(1), masked[row, 0].all(0)
        if not bands.all():
            assert sum(end - start for start, end in runs(times)) <= min(10, count // 5)
            assert not times[count:].any()
        if not times.all():
            assert sum(end - start for start, end in runs(bands)) <= 6
        assert torch.equal(masked[row, 0], bands[:, None] | times[None])


def test_widths_and_places_of_masks_are_uniform() -> None:
    maps, frames = torch.ones(4000, 1, 20, 60), torch.full((4000,), 60)
    masked = SpecAugment(AugmentConfig(freq_masks=1, freq_width=5), HOP)(maps, frames)[:, 0, :, 0]
    widths = (masked == 0).sum(1)
    shares = torch.bincount(widths, minlength=6) / 4000
    torch.testing.assert_close(shares, torch.full((6,), 1 / 6), atol=0.03, rtol=0)
    starts = torch.bincount((masked[widths == 5] == 0).int().argmax(1), minlength=16).float()
    torch.testing.assert_close(starts / starts.sum(), torch.full((16,), 1 / 16), atol=0.04, rtol=0)

    config = AugmentConfig(time_masks=1, time_width=10)
    widths = (SpecAugment(config, HOP)(maps, frames)[:, 0, 0] == 0).sum(1)
    shares = torch.bincount(widths, minlength=13) / 4000  # a fifth of 60 is the widest
    torch.testing.assert_close(shares, torch.full((13,), 1 / 13), atol=0.03, rtol=0)


def test_masks_of_both_ends_are_reached() -> None:
    config = AugmentConfig(time_masks=1, time_width=10)
    maps = torch.ones(3000, 1, 4, 50)
    masked = SpecAugment(config, HOP)(maps, torch.full((3000,), 30))[:, 0, 0] == 0
    assert masked[:, 0].any()
    assert masked[:, 29].any()
    assert not masked[:, 30:].any()


def test_masks_are_as_many_as_asked_for() -> None:
    config = AugmentConfig(freq_masks=2, freq_width=2)
    masked = SpecAugment(config, HOP)(torch.ones(500, 1, 200, 4), torch.full((500,), 4))
    counts = [len(runs(row == 0)) for row in masked[:, 0, :, 0]]
    assert max(counts) == 2
    # Two masks, neither of them of width 0, that do not touch: nearly 4 / 9.
    assert counts.count(2) / 500 == pytest.approx(4 / 9, abs=0.08)


def test_recordings_are_masked_each_in_its_own_way() -> None:
    config = AugmentConfig(freq_masks=2, time_masks=2, time_width=1)
    masked = SpecAugment(config, HOP)(torch.ones(8, 1, 64, 100), torch.full((8,), 100))
    assert len({tuple(row.flatten().tolist()) for row in masked}) == 8


def test_maps_that_are_not_normalised_get_each_bands_own_mean() -> None:
    config = AugmentConfig(freq_masks=2, time_masks=2, time_width=1)
    frames = torch.tensor([100, 60])
    maps = torch.randn(2, 3, 64, 100) - torch.arange(64.0)[:, None]
    maps[1, ..., 60:] = 0
    torch.manual_seed(1)
    masked = SpecAugment(config, HOP, normalized=False)(maps, frames)
    torch.manual_seed(1)
    hidden = SpecAugment(config, HOP)(torch.ones_like(maps), frames) == 0
    assert hidden.any()
    assert torch.equal(masked[~hidden], maps[~hidden])
    assert not masked[1, ..., 60:].any(), "what is behind the last frame stays 0"
    for row, count in enumerate(frames.tolist()):
        means = maps[row, ..., :count].mean(-1, keepdim=True).expand(3, 64, 100)
        within = hidden[row, ..., :count]
        torch.testing.assert_close(masked[row, ..., :count][within], means[..., :count][within])


def test_a_speed_that_changes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--augment\.speed 0\.004 changes nothing; give 0, or"):
        AugmentConfig(speed=0.004).check()
    AugmentConfig(speed=0.006).check()  # which is 1 / 100
