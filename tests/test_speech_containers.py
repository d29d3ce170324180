"""Lengths by a file's own bytes: MP3 files that do not say theirs, what is cut off or damaged."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from blnet.speech import audio
from blnet.speech.audio import AudioError, audio_seconds, read_audio, stream_audio
from helpers.recordings import without_length

RATE = 16000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(10 * RATE) / RATE)).astype(np.float32)
NOISE = np.random.RandomState(0).uniform(-0.3, 0.3, 10 * RATE)
SILENCE = np.zeros(5 * RATE)
CONSTANT = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}


def encoded(samples: Any, kind: str, rate: int = RATE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, **options)
    return buffer.getvalue()


def unnumbered(mp3: bytes, flags: int) -> bytes:
    """An MP3 file as a program that was stopped leaves it: with no number of frames, or with 0."""
    place = mp3.index(b"Xing") + 4
    return mp3[:place] + bytes((0, 0, 0, flags)) + bytes(4) + mp3[place + 8 :]


def tagged(content: bytes, size: int) -> bytes:
    """A file behind a tag of a size, as a picture in it makes it."""
    return (
        b"ID3\4\0\0"
        + bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
        + bytes(size)
        + content
    )


def replaced(content: bytes, place: int, length: int) -> bytes:
    return content[:place] + length.to_bytes(4, "big") + content[place + 4 :]


def refusals(file: Path) -> list[str]:
    """Why each way to read a recording refuses it, in one line that names it once."""
    found = []
    for read in (audio_seconds, lambda one: read_audio(one, RATE),
                 lambda one: list(stream_audio(one, RATE, 1))):  # fmt: skip
        with pytest.raises(AudioError) as error:
            read(file)
        assert str(error.value).count(str(file)) == 1
        assert "\n" not in str(error.value)
        found.append(error.value.reason)
    return found


# MP3 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(), (300,), (300, 20)])
@pytest.mark.parametrize("flags", [None, 0, 15])
def test_an_mp3_file_that_would_not_be_read_to_its_end_is_refused(
    tmp_path: Path, heads: tuple[int, ...], flags: int | None
) -> None:
    whole = encoded(np.append(NOISE, SILENCE), "MP3")
    spoilt = without_length(whole) if flags is None else unnumbered(whole, flags)
    path = tmp_path / "a.mp3"
    for head in heads:
        spoilt = tagged(spoilt, head)
    path.write_bytes(spoilt)
    for told in refusals(path):
        assert told.startswith("it does not say how long it is, and of 24")  # 24x,xxx samples
        assert told.endswith("would be read; write it anew, to a file and not to a pipe")


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("end", [b"", b"TAG" + bytes(125)])
def test_an_mp3_file_of_one_bit_rate_need_not_say_its_length(
    tmp_path: Path, rate: int, end: bytes
) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(without_length(encoded(NOISE, "MP3", rate, **CONSTANT)) + end)
    assert len(read_audio(path, rate)) == pytest.approx(len(NOISE), rel=0.02)
    assert audio_seconds(path) == pytest.approx(len(NOISE) / rate, rel=0.02)


def test_an_mp3_file_that_seems_longer_than_it_is_is_refused_once_read(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(without_length(encoded(np.append(SILENCE, NOISE), "MP3")))
    for read in (lambda: read_audio(path, RATE), lambda: list(stream_audio(path, RATE, 1))):
        with pytest.raises(AudioError, match="cut off, or does not say how long it is: 69"):
            read()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("options", [{}, CONSTANT])
def test_an_mp3_file_that_says_its_length_is_believed(
    tmp_path: Path, channels: int, options: dict[str, Any]
) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(encoded(np.stack([TONE] * channels, 1), "MP3", **options))
    assert len(read_audio(path, RATE)) == len(TONE)


@pytest.mark.parametrize("size", range(2, 80, 3))
def test_the_head_of_an_mp3_file_alone_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(encoded(TONE, "MP3")[:size])
    refusals(path)


@pytest.mark.parametrize("seconds", [0.05, 0.3, 3])
@pytest.mark.parametrize("between", [b"", tagged(b"", 300), b"TAG" + bytes(125) + tagged(b"", 20)])
def test_mp3_files_that_were_joined_are_refused(
    tmp_path: Path, seconds: float, between: bytes
) -> None:
    one = encoded(TONE[: round(seconds * RATE)], "MP3")
    path = tmp_path / "a.mp3"
    path.write_bytes(one + between)
    assert len(read_audio(path, RATE)) == round(seconds * RATE)
    path.write_bytes(one + between + one)
    for told in refusals(path):
        assert told.startswith("it says that it holds ")
        assert told.endswith("join what is heard in them in place of their bytes")


def test_an_mp3_file_may_count_a_frame_less_than_it_has(tmp_path: Path) -> None:
    mp3 = encoded(TONE[: RATE // 20], "MP3")
    place = mp3.index(b"Xing") + 8
    path = tmp_path / "a.mp3"
    path.write_bytes(replaced(mp3, place, int.from_bytes(mp3[place : place + 4], "big") - 1))
    assert len(read_audio(path, RATE)) > 0


def test_the_tag_that_libsndfile_does_not_look_at_says_no_length(tmp_path: Path) -> None:
    mp3 = encoded(np.append(NOISE, SILENCE), "MP3")
    tag, frames = mp3.index(b"Xing"), mp3[mp3.index(b"Xing") + 8 :][:4]
    vbri = b"VBRI" + bytes(10) + frames + bytes(8)
    path = tmp_path / "a.mp3"
    path.write_bytes(mp3[:tag] + bytes(36 - tag) + vbri + mp3[36 + len(vbri) :])
    for told in refusals(path):
        assert told.startswith("it does not say how long it is, and of 24")


# Ogg ---------------------------------------------------------------------------------------------


def pages(ogg: bytes) -> list[bytes]:
    return [b"OggS" + rest for rest in ogg.split(b"OggS")[1:]]


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_an_ogg_file_that_is_damaged_is_refused(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.ogg"
    whole = encoded(NOISE, "OGG", subtype=codec)
    path.write_bytes(whole)
    assert len(read_audio(path, RATE)) == len(NOISE)
    told = "it is damaged, and what is spoilt would be left out; fetch or copy it again"
    for place in (len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        assert refusals(path) == [told] * 3
    first, *rest = pages(whole)
    path.write_bytes(first + b"".join(rest[:5] + rest[6:]))
    assert refusals(path) == [told] * 3
    path.write_bytes(first + b"".join(rest[:5]) + bytes(9) + b"".join(rest[5:]))
    assert refusals(path) == [told] * 3


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_ogg_files_that_were_joined_are_refused(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.ogg"
    path.write_bytes(2 * encoded(TONE[:RATE], "OGG", subtype=codec))
    for told in refusals(path):
        assert told.startswith("it holds several recordings one behind another, of which only the")


def test_a_recorded_broadcast_begins_with_the_headers_and_any_page(tmp_path: Path) -> None:
    path = tmp_path / "a.ogg"
    whole = pages(encoded(NOISE, "OGG", subtype="VORBIS"))
    path.write_bytes(b"".join(whole[:2] + whole[6:]))
    assert 0 < len(read_audio(path, RATE)) == round(audio_seconds(path) * RATE) < len(NOISE)


# AIFF, AU, CAF, NIST SPHERE, 8SVX -----------------------------------------------------------------

OTHERS = [
    ("AIFF", {"subtype": "PCM_16"}),
    ("AIFF", {"subtype": "PCM_16", "endian": "LITTLE"}),  # AIFF-C
    ("AIFF", {"subtype": "IMA_ADPCM"}),
    ("AU", {"subtype": "PCM_16"}),
    ("AU", {"subtype": "ULAW", "endian": "LITTLE"}),
    ("CAF", {"subtype": "PCM_16"}),
    ("NIST", {"subtype": "PCM_16"}),
    ("SVX", {"subtype": "PCM_16"}),
]


@pytest.mark.parametrize(("kind", "options"), OTHERS)
def test_a_file_of_any_kind_that_is_cut_off_is_refused(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    path = tmp_path / "a"
    channels = 1 if kind == "SVX" else 2
    whole = encoded(np.stack([TONE] * channels, 1), kind, **options)
    for tail in (b"", bytes(6)):
        path.write_bytes(whole + tail)
        assert len(read_audio(path, RATE)) == pytest.approx(len(TONE), abs=64)
    whole = whole[: len(whole) - len(whole) % 2]
    for missing in (2, 1000, len(whole) // 2):
        path.write_bytes(whole[:-missing])
        for told in refusals(path):
            assert told.startswith("it is cut off: its header promises ")


# As programs write them into a pipe: FFmpeg, SoX, others.
@pytest.mark.parametrize("length", [0, 0x7F000008, 0xFFFFFFFF])
def test_an_aiff_file_of_unknown_length_is_read_to_its_end(tmp_path: Path, length: int) -> None:
    whole = encoded(TONE, "AIFF")
    sound, facts = (whole.index(name) for name in (b"SSND", b"COMM"))
    samples = replaced(replaced(whole, 4, length), sound + 4, length)
    path = tmp_path / "a.aiff"
    path.write_bytes(replaced(samples, facts + 10, length // 2))
    assert len(read_audio(path, RATE)) == len(TONE)


@pytest.mark.parametrize("endian", ["BIG", "LITTLE"])
def test_an_au_file_of_unknown_length_is_read_to_its_end(tmp_path: Path, endian: str) -> None:
    path = tmp_path / "a.au"
    path.write_bytes(replaced(encoded(TONE, "AU", endian=endian), 8, 0xFFFFFFFF))
    assert len(read_audio(path, RATE)) == len(TONE)


def test_a_sphere_file_that_does_not_say_its_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(TONE, "NIST").replace(b"sample_count -i", b"sample_many_ -i"))
    assert len(read_audio(path, RATE)) == len(TONE)


def test_packed_samples_are_not_taken_for_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    packed = encoded(TONE, "NIST").replace(b"-s3 pcm\n", b"-s26 pcm,embedded-shorten-v2.00\n")
    path.write_bytes(packed[:100_000])
    for told in refusals(path):
        assert "cut off" not in told


# Formats that cannot be searched -----------------------------------------------------------------


def test_telephone_recordings_of_gsm_are_read_whole_and_in_part(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(TONE, "WAV", 8000, subtype="GSM610"))
    whole = read_audio(path, 8000)
    assert len(whole) == len(TONE)
    assert (read_audio(path, 8000, 1.5, 2) == whole[12_000:16_000]).all()


# Wave64 ------------------------------------------------------------------------------------------


def test_a_wave64_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.w64"
    path.write_bytes(encoded(TONE, "W64", subtype="FLOAT"))
    assert np.array_equal(read_audio(path, RATE), TONE)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("missing", [1, 1000, 100_000])
def test_a_wave64_file_that_is_cut_off_is_refused(
    tmp_path: Path, subtype: str, missing: int
) -> None:
    path = tmp_path / "a.w64"
    path.write_bytes(encoded(TONE, "W64", subtype=subtype)[:-missing])
    told = f"it is cut off: its header promises {missing:,} bytes more than are there"
    assert refusals(path) == [told] * 3


def test_a_wave64_file_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.w64"
    whole = encoded(TONE, "W64")
    place = whole.index(b"data") + 16
    path.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
    assert len(read_audio(path, RATE)) == len(TONE)


def test_a_wave64_file_with_other_chunks_is_read_and_a_spoilt_one_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.w64"
    whole = encoded(TONE, "W64")
    place = whole.index(b"data")
    # The name of a chunk is anything, its length counts name and length, and 3 bytes more follow.
    other = b"junk" + whole[place + 4 : place + 16] + (29).to_bytes(8, "little") + bytes(8)
    path.write_bytes(whole[:place] + other + whole[place:])
    assert len(read_audio(path, RATE)) == len(TONE)
    path.write_bytes((whole[:place] + other + whole[place:])[:-1000])
    assert "1,000 bytes more than are there" in refusals(path)[0]
    path.write_bytes(whole[:place] + b"junk" + bytes(40))  # a length of 0 leads nowhere
    refusals(path)


@pytest.mark.parametrize("kind", ["OGG", "MP3"])
def test_a_file_is_looked_through_once_until_it_is_another(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hour-long recordings are read in parts, thousands of times."""
    looked = []
    monkeypatch.setattr(audio, "mp3_samples", lambda data: looked.append(data) or (0, 0))
    path = tmp_path / "long.audio"
    path.write_bytes(encoded(TONE, kind))
    for start in (0.0, 1.0, 2.0):
        read_audio(path, RATE, start, start + 1)
    assert len(looked) == 1
    path.write_bytes(encoded(TONE[:RATE], kind))
    assert audio_seconds(path) < 2
    assert len(looked) == 2
