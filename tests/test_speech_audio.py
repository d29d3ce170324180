"""Recordings as tensors: formats, channels, rates, parts, blocks, and what cannot be read."""

import io
import math
import multiprocessing
import pickle
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.speech.audio import AudioError, audio_seconds, read_audio, stream_audio
from blnet.speech.files import Tree, open_archive


def tone(seconds=0.5, rate=16000, hertz=440.0):
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def encoded(samples, rate=16000, kind="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def refused(file, *words, **options):
    """Check that a recording is refused in one sentence that names it once."""
    with pytest.raises(AudioError) as error:
        read_audio(file, 16000, **options)
    text = str(error.value)
    assert "\n" not in text
    assert text.count(str(file)) == 1, text
    for word in words:
        assert word in text, text
    assert str(file) not in error.value.reason


# Formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 1 / 127),
        ("WAV", "PCM_16", 1 / 32767),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-7),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("FLAC", "PCM_16", 1 / 32767),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "VORBIS", 0.05),
        ("MP3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_formats_give_what_was_recorded(tmp_path, kind, subtype, error):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(tone(), 16000, kind, subtype))
    samples = read_audio(path, 16000)
    assert (samples.dtype, samples.shape) == (torch.float32, (8000,))
    inside = slice(1000, -1000)  # lossy formats spoil the ends
    difference = np.abs(samples.numpy() - tone())[inside].max()
    assert difference <= error
    assert audio_seconds(path) == 0.5


def test_channels_are_averaged(tmp_path):
    path = tmp_path / "a.wav"
    channels = np.stack([3 * tone() / 2, tone(), tone() / 2], axis=1)
    soundfile.write(path, channels, 16000, subtype="FLOAT")
    assert np.allclose(read_audio(path, 16000), tone(), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([8000, 11025, 22050, 44100, 44101, 96000]),
    wanted=st.sampled_from([8000, 16000, 22050]),
    count=st.integers(1, 3000),
)
def test_any_rate_gives_the_same_duration(tmp_path_factory, rate, wanted, count):
    path = tmp_path_factory.mktemp("rates") / "a.wav"
    soundfile.write(path, np.full(count, 0.25, np.float32), rate, subtype="FLOAT")
    samples = read_audio(path, wanted)
    assert samples.shape == (math.ceil(count * wanted / rate),)
    assert samples.isfinite().all()


def test_resampling_keeps_what_is_heard_and_drops_what_is_not(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1, 96000, 440), 96000, subtype="FLOAT")
    assert np.allclose(read_audio(path, 16000)[800:-800], tone(1, 16000, 440)[800:-800], atol=1e-3)
    soundfile.write(path, tone(1, 96000, 15000), 96000, subtype="FLOAT")  # above 8 kHz
    assert read_audio(path, 16000)[800:-800].abs().max() < 1e-3


def test_a_single_sample_and_silence_are_recordings(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.array([0.5]), 96000)
    assert read_audio(path, 16000).shape == (1,)
    assert read_audio(path, 96000).tolist() == [0.5]
    soundfile.write(path, np.zeros(100), 16000)
    assert read_audio(path, 8000).tolist() == [0.0] * 50


def test_float_recordings_above_full_scale_are_not_cut(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.array([2.0, -3.0]), 16000, subtype="FLOAT")
    assert read_audio(path, 16000).tolist() == [2.0, -3.0]


# Parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_part_is_that_part(tmp_path, kind):
    path = tmp_path / "a"
    path.write_bytes(encoded(tone(), kind=kind))
    whole = read_audio(path, 16000)
    assert torch.equal(read_audio(path, 16000, 0.1, 0.3), whole[1600:4800])
    assert torch.equal(read_audio(path, 16000, start=0.1), whole[1600:])
    assert torch.equal(read_audio(path, 16000, end=0.3), whole[:4800])
    assert torch.equal(read_audio(path, 16000, 0.1, 0.505), whole[1600:])  # rounded in a manifest


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0.5, None),
        (-0.1, None),
        (0.2, 0.2),
        (0.3, 0.2),
        (None, 0.6),
        (math.nan, None),
        (0, math.nan),
    ],
)
def test_times_beyond_the_recording_are_refused(tmp_path, start, end):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(tone()))
    refused(path, "is no part of its 0.5 s", start=start, end=end)


# Archives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_archives_are_recordings(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("inner/b.wav", encoded(tone(), subtype="FLOAT"))
    file = f"{tmp_path / 'a.zip'}::inner/b.wav"
    assert np.array_equal(read_audio(file, 16000), tone())
    assert audio_seconds(file) == 0.5
    assert np.array_equal(torch.cat(list(stream_audio(file, 16000, 0.2))), tone())
    refused(f"{tmp_path / 'a.zip'}::inner/c.wav", "the archive holds no such file")
    refused(f"{tmp_path / 'b.zip'}::inner/b.wav", "No such file")


def test_an_archive_that_is_written_anew_is_read_anew(tmp_path):
    for value in (0.25, 0.5):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("b.wav", encoded(np.full(round(100 * value), value), subtype="FLOAT"))
        assert read_audio(f"{tmp_path / 'a.zip'}::b.wav", 16000)[0] == value


def test_a_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.wav", encoded(tone()))
    spoilt = bytearray(path.read_bytes())
    spoilt[500] ^= 255
    path.write_bytes(spoilt)
    refused(f"{path}::b.wav", "damaged")
    path.write_bytes(spoilt[:300])
    refused(f"{path}::b.wav", "not a whole .zip archive")


def read_in_a_child(file, parents, results):
    assert open_archive(file.split("::")[0]) is not parents
    results.put([float(read_audio(file, 16000)[0]) for _ in range(50)])


def test_processes_do_not_share_an_open_archive(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(4):
            samples = np.full(20000, number / 4)
            archive.writestr(f"{number}.wav", encoded(samples, subtype="FLOAT"))
    mine = open_archive(path)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(target=read_in_a_child, args=(f"{path}::{number}.wav", mine, results))
        for number in range(4)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    found = sorted(results.get(timeout=30) for _ in children)
    assert found == [[number / 4] * 50 for number in range(4)]
    assert open_archive(path) is mine


def test_a_tree_lists_what_is_shown(tmp_path):
    for name in ("b/2.wav", "a/1.wav", ".git/x", "a/.hidden", "__MACOSX/a.wav"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for path in sorted((tmp_path / "tree").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "tree"))
    for root in (tmp_path / "tree", tmp_path / "tree.zip"):
        assert Tree.of(root, "--data.path").names == ("a/1.wav", "b/2.wav")


# What cannot be read -----------------------------------------------------------------------------


def test_what_is_no_recording_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    refused(path, "No such file")
    refused(tmp_path, "directory")
    path.write_bytes(b"")
    refused(path, "the file is empty")
    path.write_text("this is a text\n" * 100)
    refused(path, "cannot be decoded as WAV, FLAC, OGG or MP3")
    path.write_bytes(encoded(np.zeros(0)))
    refused(path, "holds no samples")
    for spoilt in (math.nan, math.inf):
        path.write_bytes(encoded(np.array([0.0, spoilt]), subtype="FLOAT"))
        refused(path, "no finite numbers")


@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_have_no_power_in_float32_are_refused(tmp_path, channels):
    path = tmp_path / "a.wav"
    for value in (-3.4e38 / channels, 1e16):
        path.write_bytes(encoded(np.full((9, channels), value), subtype="FLOAT"))
        refused(path, "and full scale is 1; scale it down")
        with pytest.raises(AudioError, match="full scale"):
            list(stream_audio(path, 8000, 1))
    path.write_bytes(encoded(np.full((9, channels), 1e9), subtype="FLOAT"))
    assert len(read_audio(path, 16000)) == 9


def test_a_flac_file_of_unknown_length_is_refused(tmp_path):
    path = tmp_path / "a.flac"
    whole = bytearray(encoded(tone(), kind="FLAC"))
    # STREAMINFO begins at byte 8; its last 36 bits before the checksum are the samples in all.
    whole[21] &= 0xF0
    whole[22:26] = bytes(4)
    path.write_bytes(whole)
    refused(path, "its header does not say how long it is; write it anew")
    for reads in (audio_seconds, lambda file: next(stream_audio(file, 16000, 1))):
        with pytest.raises(AudioError, match="does not say how long"):
            reads(path)


@pytest.mark.parametrize("kind", ["WAV", "RF64", "FLAC", "MP3", "OGG", "OPUS"])
def test_a_recording_that_is_cut_off_is_refused(tmp_path, kind):
    path = tmp_path / "a"
    noise = np.random.RandomState(0).uniform(-0.5, 0.5, 100_000)
    options = {"kind": "OGG", "subtype": "OPUS"} if kind == "OPUS" else {"kind": kind}
    whole = encoded(noise, **options)
    path.write_bytes(whole)
    assert len(read_audio(path, 16000)) == pytest.approx(100_000, abs=4000)
    for share in (0.3, 0.7):
        path.write_bytes(whole[: round(share * len(whole))])
        refused(path)
        with pytest.raises(AudioError):
            list(stream_audio(path, 8000, 1))


def test_a_wav_file_cut_by_a_byte_is_refused_from_its_header(tmp_path):
    path = tmp_path / "a.wav"
    whole = encoded(tone())
    path.write_bytes(whole[:-1])
    refused(path, "its header promises 1 bytes more than are there")
    with pytest.raises(AudioError, match="cut off"):
        audio_seconds(path)


# As programs write them into a pipe: SoX, FFmpeg, and others less their header.
@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFFFFF - 36])
def test_a_wav_file_of_unknown_length_is_read_to_its_end(tmp_path, length):
    path = tmp_path / "a.wav"
    whole = bytearray(encoded(tone()))
    place = whole.index(b"data") + 4
    whole[place : place + 4] = length.to_bytes(4, "little")
    path.write_bytes(whole)
    assert len(read_audio(path, 16000)) == 8000


@pytest.mark.parametrize("riff", [0, 36])
def test_a_wav_file_whose_header_was_never_finished_is_refused(tmp_path, riff):
    path = tmp_path / "a.wav"
    whole = bytearray(encoded(tone()))
    whole[4:8] = riff.to_bytes(4, "little")
    place = whole.index(b"data") + 4
    whole[place : place + 4] = bytes(4)
    path.write_bytes(whole)
    refused(path, "its header does not say how long it is")
    path.write_bytes(whole[: place + 4])
    refused(path, "it holds no samples")


def test_a_large_wav_file_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    whole = bytearray(encoded(tone()))
    place = whole.index(b"data") + 4
    whole[place : place + 4] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(whole)
    refused(path, "its header promises 3,221,209,472 bytes more than are there")


@pytest.mark.parametrize("tail", [b"", b"TAG" + bytes(125)])
def test_an_ogg_file_ends_with_its_last_page(tmp_path, tail):
    """What taggers append does not count; a mark of the last one is not asked for."""
    path = tmp_path / "a.ogg"
    whole = encoded(tone(), kind="OGG")
    path.write_bytes(whole + tail)
    assert len(read_audio(path, 16000)) == 8000
    last = whole.rindex(b"OggS")
    for spoilt in (whole[: last + 20], whole[: last + 27], whole[:-1]):
        path.write_bytes(spoilt)
        refused(path, "it is cut off in the midst of a page")


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(AudioError("a.wav", "it is empty")))
    assert (type(error), str(error)) == (AudioError, "recording a.wav: it is empty")
    assert error.reason == "it is empty"


# Blocks ------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    rates=st.sampled_from([(16000, 16000), (8000, 16000), (44100, 16000), (44101, 8000)]),
    count=st.integers(1, 200_000),
    seconds=st.sampled_from([0.013, 0.5, 1, 60]),
)
def test_blocks_together_are_the_whole(tmp_path_factory, rates, count, seconds):
    path = tmp_path_factory.mktemp("blocks") / "a.wav"
    noise = np.random.RandomState(count).uniform(-0.9, 0.9, (count, 2))
    soundfile.write(path, noise, rates[0], subtype="FLOAT")
    blocks = list(stream_audio(path, rates[1], seconds))
    size = round(seconds * rates[1])
    assert all(len(block) == size for block in blocks[:-1])
    assert 0 < len(blocks[-1]) <= size
    whole = read_audio(path, rates[1])
    together = torch.cat(blocks)
    assert together.shape == whole.shape
    assert torch.allclose(together, whole, rtol=0, atol=1e-5)


def test_blocks_are_made_as_they_are_asked_for(tmp_path):
    import tracemalloc

    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(16000 * 600, np.int16), 16000)
    tracemalloc.start()
    count = sum(len(block) for block in stream_audio(path, 8000, 10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000 * 600
    assert peak < 5e6  # all of it would be 38 MB


def test_blocks_of_a_low_rate_are_no_longer_than_others(tmp_path):
    import tracemalloc

    path = tmp_path / "slow.wav"
    soundfile.write(path, np.zeros(12_000, np.int16), 10)
    tracemalloc.start()
    count = sum(len(block) for block in stream_audio(path, 16000, 10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 16000 * 1200
    assert peak < 25e6  # all of it would be 77 MB


def test_blocks_without_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="make them longer"):
        next(stream_audio(tmp_path / "a.wav", 16000, 0))
