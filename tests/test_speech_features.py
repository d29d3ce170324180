"""Log-mel features: librosa's numbers, the same in any batch, normalised, kept in checkpoints."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from blnet.bench.session import Session
from blnet.bench.settings import Settings
from blnet.speech import features as features_module
from blnet.speech.config import FeatureConfig
from blnet.speech.features import LogMel, global_statistics, mel_filters
from blnet.speech.reference_features import librosa_log_mel

MODES = ("utterance", "global", "none")
RATE = 8000
QUIET = -23.025851  # ln(1e-10)


def noise(*shape: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one(features: LogMel, samples: Tensor, raw: bool = False) -> Tensor:
    """The map of one recording, (channels, bins, T)."""
    call = features.unnormalized if raw else features
    maps, frames = call(samples[None], torch.tensor([len(samples)]))
    assert frames.tolist() == [maps.shape[-1]]
    return maps[0]


def made(rate: int = RATE, **changes: Any) -> LogMel:
    features = LogMel(FeatureConfig(**changes), rate)
    if features.config.normalize == "global":
        shape = features.mean.shape
        features.set_statistics(noise(*shape, scale=3), noise(*shape, seed=1).abs() + 0.5)
    return features


def signals(rate: int) -> dict[str, np.ndarray]:
    seconds = np.arange(rate) / rate
    rng = np.random.default_rng(0)
    rows = {
        "noise": 0.1 * rng.standard_normal(rate),
        "chirp": 0.5 * np.sin(2 * np.pi * (50 * seconds + 0.45 * rate / 2 * seconds**2)),
        "tone": np.sin(2 * np.pi * 440 * seconds),
        "near silence": 3e-5 * rng.integers(-1, 2, rate),
        "silence": np.zeros(rate),
        "constant": np.ones(rate),
        "click": np.eye(1, rate, rate // 2)[0],
        "shorter than a window": rng.standard_normal(50),
    }
    return {name: values.astype(np.float32) for name, values in rows.items()}


# librosa --------------------------------------------------------------------------------------


@pytest.mark.parametrize("deltas", [False, True])
@pytest.mark.parametrize("rate", [8000, 16000, 22050])
def test_numbers_are_those_of_librosa(rate: int, deltas: bool) -> None:
    features = made(rate, deltas=deltas)
    for name, samples in signals(rate).items():
        ours = one(features, torch.from_numpy(samples), raw=True).numpy()
        right = librosa_log_mel(samples, features.config, rate)
        assert ours.shape == right.shape, name
        assert np.abs(ours - right).max() < 1e-4, name


def test_a_recording_of_speech_gives_the_numbers_of_librosa(shared: Callable[[str], str]) -> None:
    import soundfile

    features = made(deltas=True)
    with zipfile.ZipFile(shared("fsdd.zip")) as files:
        names = [name for name in sorted(files.namelist()) if name.endswith("_jackson_0.wav")]
        assert len(names) == 10
        for name in names[:3]:
            samples, rate = soundfile.read(io.BytesIO(files.read(name)), dtype="float32")
            assert rate == RATE
            ours = one(features, torch.from_numpy(samples), raw=True).numpy()
            assert np.abs(ours - librosa_log_mel(samples, features.config, rate)).max() < 1e-4


def test_librosa_takes_many_recordings_at_once() -> None:
    samples, config = noise(2, 900).numpy(), FeatureConfig(deltas=True)
    maps = librosa_log_mel(samples, config, RATE)
    assert maps.shape == (2, 3, 64, 9)
    np.testing.assert_allclose(maps[1], librosa_log_mel(samples[1], config, RATE), atol=1e-6)


@pytest.mark.parametrize("rate", [4000, 8000, 16000, 48000])
def test_filters_are_those_of_librosa(rate: int) -> None:
    librosa = pytest.importorskip("librosa")
    ours = mel_filters(40, 1024, rate)
    right = librosa.filters.mel(sr=rate, n_fft=1024, n_mels=40, dtype=np.float64)
    np.testing.assert_allclose(ours.numpy(), right, atol=1e-15)


def test_the_bench_suite_checks_both_and_skips_a_missing_librosa(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite: Any = pytest.importorskip("blnet.bench.suites.test_features")
    monkeypatch.setattr(suite, "measure_ceilings", lambda session: None)

    def statuses() -> dict[str, str]:
        session = Session(Settings(device="cpu", repeat=2))
        cases = suite.cases(session.settings)
        assert len(cases) == 8
        return {c.implementation: session.measured(suite, c).status for c in cases[:2]}

    assert statuses() == {"librosa": "ok", "blnet": "ok"}
    monkeypatch.setitem(sys.modules, "librosa", None)
    monkeypatch.setattr(LogMel, "_normalize", lambda self, maps, valid: maps + 0.01)
    assert statuses() == {"librosa": "skipped", "blnet": "wrong"}


# Frames ---------------------------------------------------------------------------------------


def test_frames_are_counted_by_hand() -> None:
    features = made()  # a window of 200 samples, a hop of 80
    lengths = torch.tensor([0, 1, 199, 200, 279, 280, 360, 8000])
    assert features.frames(lengths).tolist() == [1, 1, 1, 1, 1, 2, 3, 98]


def test_a_frame_is_decided_by_the_samples_under_its_window() -> None:
    features, samples = made(normalize="none"), noise(1000)
    before = one(features, samples)
    for place in (0, 79, 80, 399, 400, 919, 920, 999):
        changed = samples.clone()
        changed[place] += 0.5
        moved = (one(features, changed) != before).any(0).any(0)
        # The window's first sample has weight 0.
        expected = [t * 80 < place < t * 80 + 200 for t in range(before.shape[-1])]
        assert moved.tolist() == expected, place


def test_the_transform_is_the_next_power_of_two() -> None:
    assert [made(window=w / RATE).fft for w in (200, 255, 256, 257)] == [256, 256, 256, 512]


def test_times_of_frames() -> None:
    features = made(11025)  # a hop is 110.25 samples: 110 are taken
    assert features.hop_seconds == 110 / 11025
    middle = (features.seconds(7) + features.seconds(8)) / 2
    assert middle == pytest.approx((7 * 110 + features.window_samples / 2) / 11025)


def test_differences_are_those_of_torchaudio() -> None:
    features = made(deltas=True)
    maps = one(features, noise(2000), raw=True)
    for channel in (1, 2):
        expected = torchaudio.functional.compute_deltas(maps[channel - 1], win_length=5)
        torch.testing.assert_close(maps[channel], expected, atol=1e-5, rtol=0)


# Batches --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 1500), min_size=1, max_size=4),
    more=st.integers(0, 700),
    normalize=st.sampled_from(MODES),
    deltas=st.booleans(),
    rubbish=st.sampled_from([0.0, 3.0, float("nan")]),
    tone=st.booleans(),
)
def test_padding_changes_nothing(
    lengths: list[int], more: int, normalize: str, deltas: bool, rubbish: float, tone: bool
) -> None:
    features = made(normalize=normalize, deltas=deltas, bins=16)
    samples = torch.full((len(lengths), max(lengths) + more), rubbish)
    for row, length in enumerate(lengths):
        wave = torch.sin(torch.arange(length) * (0.1 + row)) if tone else noise(length, seed=row)
        samples[row, :length] = wave
    maps, frames = features(samples, torch.tensor(lengths))
    assert maps.dtype == torch.float32
    assert maps.is_contiguous()
    for row, length in enumerate(lengths):
        alone = one(features, samples[row, :length])
        valid = int(frames[row])
        torch.testing.assert_close(maps[row, ..., :valid], alone, atol=1e-5, rtol=0)
        assert (maps[row, ..., valid:] == 0).all()


def test_a_batch_of_many_blocks_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features, samples = made(), noise(3, 4000)
    lengths = torch.tensor([4000, 3000, 150])
    maps, _ = features(samples, lengths)
    monkeypatch.setattr(features_module, "_BLOCK_CPU", 1)
    torch.testing.assert_close(features(samples, lengths)[0], maps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize", MODES)
def test_maps_are_made_without_looking_at_values(normalize: str) -> None:
    # A fake tensor has no values: whatever would wait for a GPU raises.
    features = made(normalize=normalize, deltas=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        maps, frames = features(torch.empty(2, 900), torch.empty(2, dtype=torch.int64))
    assert maps.shape == (2, 3, 64, 9)
    assert frames.shape == (2,)


def test_autocast_changes_nothing() -> None:
    features, samples = made(deltas=True), noise(1, 2000)
    right, _ = features(samples, torch.tensor([2000]))
    with torch.autocast("cpu", torch.bfloat16):
        maps, _ = features(samples, torch.tensor([2000]))
    assert torch.equal(maps, right)


def test_samples_are_left_as_they_are() -> None:
    samples = noise(2, 900)
    before = samples.clone()
    made()(samples, torch.tensor([900, 400]))
    assert torch.equal(samples, before)


# Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("deltas", [False, True])
def test_silence_is_the_floor_and_zero_once_normalised(deltas: bool) -> None:
    silence = torch.zeros(1234)
    raw = one(made(deltas=deltas), silence, raw=True)
    torch.testing.assert_close(raw[0], torch.full_like(raw[0], QUIET))
    assert (raw[1:] == 0).all()
    assert (one(made(deltas=deltas), silence) == 0).all()


@pytest.mark.parametrize("normalize", MODES)
def test_odd_recordings_give_finite_maps(normalize: str) -> None:
    features = made(normalize=normalize, deltas=True)
    click = torch.zeros(900).index_fill_(0, torch.tensor(450), 1)
    for samples in (torch.ones(1), torch.ones(3000), click, 1e4 * noise(900)):
        assert one(features, samples).isfinite().all()


def test_normalised_bands_have_mean_0_and_deviation_1() -> None:
    maps = one(made(deltas=True), noise(16000))
    torch.testing.assert_close(maps.mean(-1), torch.zeros(3, 64), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.std(-1, correction=0), torch.ones(3, 64), atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(0.01, 100))
def test_loudness_is_normalised_away(scale: float) -> None:
    features, samples = made(deltas=True), noise(4000)
    torch.testing.assert_close(
        one(features, scale * samples), one(features, samples), atol=1e-4, rtol=0
    )


def test_a_band_that_hardly_varies_is_not_blown_up() -> None:
    features = made()
    maps = torch.full((1, 1, 64, 50), 5.0)
    maps[..., ::2] += 2e-4
    valid = torch.ones(1, 1, 1, 50, dtype=torch.bool)
    assert features._normalize(maps, valid).abs().max() < 0.02


# Global statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("deltas", [False, True])
def test_global_statistics_are_those_of_all_frames_together(deltas: bool) -> None:
    features = LogMel(FeatureConfig(normalize="global", deltas=deltas, bins=20), RATE)
    lengths = [900, 100, 2000, 1500, 333]
    rows = [noise(length, seed=length, scale=10.0**-row) for row, length in enumerate(lengths)]
    batches = []
    for part in (rows[:2], rows[2:4], rows[4:]):
        padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=7.0)
        batches.append((padded, torch.tensor([len(row) for row in part])))
    mean, std = global_statistics(iter(batches), features)
    together = torch.cat([one(features, row, raw=True) for row in rows], -1).double()
    torch.testing.assert_close(mean.double(), together.mean(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        std.double(), together.std(-1, correction=0).clamp(min=0.01), atol=1e-5, rtol=1e-5
    )
    features.set_statistics(mean, std)
    normalised = torch.cat([one(features, row) for row in rows], -1)
    torch.testing.assert_close(normalised.mean(-1), torch.zeros_like(mean), atol=1e-4, rtol=0)


def test_statistics_of_silence_have_the_floor_to_divide_by() -> None:
    features = LogMel(FeatureConfig(normalize="global"), RATE)
    batch = torch.zeros(2, 900), torch.tensor([900, 500])
    mean, std = global_statistics([batch], features)
    torch.testing.assert_close(mean, torch.full((1, 64), QUIET))
    assert (std == torch.tensor(0.01)).all()


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="need recordings, and there is none"):
        global_statistics([], made())


def test_global_normalisation_without_statistics_is_refused() -> None:
    features = LogMel(FeatureConfig(normalize="global"), RATE)
    with pytest.raises(ValueError, match=r"set_statistics first"):
        features(torch.zeros(1, 900), torch.tensor([900]))
    with pytest.raises(ValueError, match=r"features\.mean must be of shape \(1, 64\)"):
        features.set_statistics(torch.zeros(64), torch.ones(64))
    with pytest.raises(ValueError, match=r"features\.std must hold finite numbers above 0"):
        features.set_statistics(torch.zeros(1, 64), torch.zeros(1, 64))
    with pytest.raises(ValueError, match=r"features\.mean must hold finite numbers;"):
        features.set_statistics(torch.full((1, 64), torch.nan), torch.ones(1, 64))


# Checkpoints and settings ---------------------------------------------------------------------


@pytest.mark.parametrize("normalize", MODES)
def test_features_come_back_from_json(normalize: str) -> None:
    features, samples = made(normalize=normalize, deltas=True, bins=20), noise(3000)
    again = LogMel.from_dict(json.loads(json.dumps(features.as_dict())))
    assert again.config == features.config
    assert again.sample_rate == RATE
    assert torch.equal(one(again, samples), one(features, samples))
    assert not features.state_dict()  # a checkpoint's weights do not depend on them


GOOD = made(normalize="global", bins=8).as_dict()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bins": "8"}, r"features\.bins must be of type int, got '8'"),
        ({"bins": True}, r"features\.bins must be of type int, got True"),
        ({"bins": 4}, r"--features\.bins must be from 8 to 512, got 4"),
        ({"window": None}, r"features\.window must be of type float or int, got None"),
        ({"hop": float("nan")}, r"--features\.hop must be from 0\.001 to 1, got nan"),
        ({"deltas": 1}, r"features\.deltas must be of type bool, got 1"),
        ({"normalize": "all"}, r"--features\.normalize 'all' is unknown"),
        ({"sample_rate": 1}, r"sample-rate must be from 4000"),
        ({"mean": None}, r"features\.mean must be a table of numbers, got None"),
        ({"mean": [[1.0], [2.0, 3.0]]}, r"features\.mean must be a table of numbers"),
        ({"std": [["x"] * 8]}, r"features\.std must be a table of numbers"),
        ({"std": [[1.0] * 7]}, r"features\.std must be of shape \(1, 8\)"),
        ({"std": [[-1.0] * 8]}, r"features\.std must hold finite numbers above 0"),
        ({"mean": [[1e99] * 8]}, r"features\.mean must hold finite numbers"),
        ({"colour": 3}, r"features\.colour is unknown"),
    ],
)
def test_damaged_settings_are_named(change: dict[str, Any], said: str) -> None:
    LogMel.from_dict(GOOD)
    with pytest.raises(ValueError, match=said) as caught:
        LogMel.from_dict({**GOOD, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GOOD)
def test_missing_settings_are_named(name: str) -> None:
    values = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(ValueError, match=rf"features\.{name} is missing"):
        LogMel.from_dict(values)


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="features must be a table of settings, got None"):
        LogMel.from_dict(None)  # type: ignore[arg-type]


def test_bands_without_frequencies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--features\.bins 400 leaves \d+ bands without any"):
        made(bins=400)
