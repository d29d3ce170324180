"""Recordings as tensors: any common format, from folders and archives, whole or block by block."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from blnet.files import StrPath, reason
from blnet.speech.containers import missing_bytes, mp3_samples, ogg_fault
from blnet.speech.files import open_file, split_name

AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")
_BLOCK = 1 << 16  # frames that are decoded at once while streaming
_BLOCK_SECONDS = 30  # and how long these may be: at a low rate, resampling makes many of few
_MP3_LEAST = 0.95  # share of the samples
_MP3_MISCOUNT = 2304  # samples of two frames; whether one of tags counts, programs differ
_TOLERANCE = 0.01  # seconds; times in manifests are rounded
_UNKNOWN_FRAMES = 1 << 60  # where FLAC does not know, libsndfile says the largest number there is
_WRITE_ANEW = "write it anew, to a file and not to a pipe"
_NO_LENGTH = f"its header does not say how long it is; {_WRITE_ANEW}"
_REMEMBERED = 100_000  # files of which this process knows that they are whole
_LOUDEST = 1e15  # of full scale; what is louder by far has no power spectrum in float32


class AudioError(ValueError):
    """A recording that cannot be used.

    Args:
        file: its name.
        reason: what is wrong with it, without the name.
    """

    def __init__(self, file: StrPath, reason: str) -> None:
        super().__init__(os.fspath(file), reason)  # both, so that it can be pickled
        self.file = os.fspath(file)
        self.reason = reason

    def __str__(self) -> str:
        return f"recording {self.file}: {self.reason}"


def read_audio(
    file: StrPath,
    sample_rate: int,
    start: float | None = None,
    end: float | None = None,
    longest: float | None = None,
) -> Tensor:
    """Return a recording: its channels' mean, brought to a sample rate.

    Args:
        file: WAV, FLAC, OGG or MP3; a path or "archive.zip::member".
        sample_rate: samples a second of the result.
        start: where to begin, seconds; default: at the beginning.
        end: where to end, seconds; default: at the end.
        longest: how much to read at most, seconds; default: all.

    Returns:
        float32 (samples,), full scale from -1 to 1; ceil(frames * sample_rate / the file's rate)
        samples.

    Raises:
        AudioError: if it is missing, empty, cut off, of another format, holds no samples or some
            that are no finite numbers or huge, does not say how long it is, or start and end lie
            outside.
    """
    with _opened(file) as sound:
        first, last = _range(file, sound, start, end)
        if longest is not None:
            last = min(last, first + max(1, round(longest * sound.samplerate)))
        if sound.seekable():
            sound.seek(first)
        else:  # GSM, say, can only be read on
            sound.read(first, dtype="float32")
        samples = _mono(file, sound.read(last - first, dtype="float32", always_2d=True))
        _check_length(file, sound, last - first, len(samples))
        rate = int(sound.samplerate)
    return torch.from_numpy(_resampled(samples, rate, sample_rate))


def audio_seconds(file: StrPath) -> float:
    """Return the duration of a recording, seconds, from its header.

    Raises:
        AudioError: if it is missing, empty, cut off (but for FLAC and MP3, which only reading
            tells), of another format, has no samples or does not say how many.
    """
    with _opened(file) as sound:
        return float(sound.frames / sound.samplerate)


def stream_audio(file: StrPath, sample_rate: int, seconds: float) -> Iterator[Tensor]:
    """Yield a recording in consecutive blocks, without ever holding more than a block or two.

    The blocks together are what `read_audio` gives.

    Args:
        file: as `read_audio` takes it.
        sample_rate: samples a second of the result.
        seconds: length of a block; the last one is shorter or of that length.

    Yields:
        float32 (samples,).

    Raises:
        ValueError: if a block would hold no samples.
        AudioError: as `read_audio`; of the middle of a file it is raised once it is read.
    """
    size = round(seconds * sample_rate)
    if size < 1:
        raise ValueError(f"blocks of {seconds:g} s hold no samples; make them longer")
    waiting: list[NDArray[np.float32]] = []
    count = 0
    for piece in _pieces(file, sample_rate):
        waiting.append(piece)
        count += len(piece)
        if count >= size:
            joined = np.concatenate(waiting)
            whole = count - count % size
            for start in range(0, whole, size):
                yield torch.from_numpy(joined[start : start + size].copy())
            waiting, count = [joined[whole:]], count - whole
    if count:
        yield torch.from_numpy(np.concatenate(waiting))


@contextlib.contextmanager
def _opened(file: StrPath) -> Iterator[soundfile.SoundFile]:
    """Open a recording; whatever is wrong with it, now or later, becomes an AudioError."""
    try:
        with open_file(file) as data:
            counted, said = _checked(file, data)
            if said and said < _MP3_LEAST * (counted - _MP3_MISCOUNT):
                raise AudioError(file, _joined(said, counted))
            data.seek(0)
            with soundfile.SoundFile(data) as sound:
                if not sound.frames:
                    raise AudioError(file, _why_empty(data))
                if sound.frames >= _UNKNOWN_FRAMES:
                    raise AudioError(file, _NO_LENGTH)
                if not said and sound.frames < _MP3_LEAST * counted:
                    raise AudioError(file, _too_few(sound.frames, counted))
                yield sound
    except AudioError:
        raise
    except soundfile.LibsndfileError as error:
        text = error.error_string.strip().rstrip(".")
        raise AudioError(file, f"it cannot be decoded as WAV, FLAC, OGG or MP3 ({text})") from error
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise AudioError(file, getattr(error, "strerror", None) or reason(error)) from error


def _range(
    file: StrPath, sound: soundfile.SoundFile, start: float | None, end: float | None
) -> tuple[int, int]:
    """Return the first frame and the one after the last."""
    rate, frames = sound.samplerate, sound.frames
    length = frames / rate
    begin, stop = 0.0 if start is None else start, length if end is None else end
    # Written so that NaN fails as well.
    if not (0 <= begin < length and begin < stop <= length + _TOLERANCE):
        raise AudioError(file, f"{begin:g} to {stop:g} s is no part of its {length:g} s")
    first = min(round(begin * rate), frames - 1)
    return first, min(max(round(stop * rate), first + 1), frames)


def _mono(file: StrPath, frames: NDArray[np.float32]) -> NDArray[np.float32]:
    samples = frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1)
    peak = np.abs(samples).max(initial=0)
    if not np.isfinite(peak):
        raise AudioError(file, "it holds samples that are no finite numbers")
    if peak > _LOUDEST:
        raise AudioError(file, f"it holds samples as large as {peak:.3g}, and full scale is 1; "
                         "scale it down")  # fmt: skip
    return np.ascontiguousarray(samples, dtype=np.float32)


def _resampled(samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """Return samples at another rate; the SoX resampler takes any pair of rates."""
    if rate == wanted:
        return samples
    import soxr

    found = soxr.resample(samples, rate, wanted)
    return _fitted(found, _resampled_length(len(samples), rate, wanted))


def _resampled_length(count: int, rate: int, wanted: int) -> int:
    return math.ceil(count * wanted / rate)


def _fitted(samples: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Cut the end or repeat the last sample; the resampler's own rounding is off by one or so."""
    if len(samples) >= count:
        return samples[:count]
    return np.pad(samples, (0, count - len(samples)), mode="edge" if len(samples) else "constant")


def _pieces(file: StrPath, sample_rate: int) -> Iterator[NDArray[np.float32]]:
    """Yield a recording, resampled, in pieces of any length."""
    import soxr

    with _opened(file) as sound:
        rate, frames = int(sound.samplerate), int(sound.frames)
        stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
        read, given = 0, 0
        size = min(_BLOCK, _BLOCK_SECONDS * rate)
        while True:
            block = _mono(file, sound.read(size, dtype="float32", always_2d=True))
            read += len(block)
            done = not len(block)
            piece = block if rate == sample_rate else stream.resample_chunk(block, last=done)
            left = _resampled_length(read, rate, sample_rate) - given
            piece = _fitted(piece, left if done else min(len(piece), left))
            given += len(piece)
            yield piece
            if done:
                break
        _check_length(file, sound, frames, read)


def _check_length(file: StrPath, sound: soundfile.SoundFile, promised: int, found: int) -> None:
    """Raise AudioError if far fewer samples came than there were to be."""
    # Some MP3 files say their length nowhere, and libsndfile estimates it.
    estimated = sound.format == "MP3"
    least = _MP3_LEAST * promised if estimated else promised
    if not found or found < least:
        fault = "cut off, or does not say how long it is" if estimated else "cut off"
        raise AudioError(
            file, f"it is {fault}: {promised:,} samples were promised, and {found:,} are there"
        )


_whole: dict[tuple[object, ...], tuple[int, int]] = {}


def _checked(file: StrPath, data: BinaryIO) -> tuple[int, int]:
    """Check a file's bytes, and return what `mp3_samples` does.

    A file is looked through once: parts of a long one are read again and again in training.
    """
    path, member = split_name(file)
    found = os.stat(path)
    key = (path, member, found.st_ino, found.st_size, found.st_mtime_ns)
    if key not in _whole:
        _check_bytes(file, data)
        if len(_whole) >= _REMEMBERED:
            _whole.clear()
        _whole[key] = mp3_samples(data)
    return _whole[key]


def _check_bytes(file: StrPath, data: BinaryIO) -> None:
    """Raise AudioError of what libsndfile passes over: nothing at all, and what is not whole."""
    size = data.seek(0, os.SEEK_END)
    data.seek(0)
    if not size:
        raise AudioError(file, "the file is empty")
    fault = ogg_fault(data) if data.read(4) == b"OggS" else None
    if fault is not None:
        raise AudioError(file, fault)
    missing = missing_bytes(data, size)
    if missing:
        raise AudioError(
            file, f"it is cut off: its header promises {missing:,} bytes more than are there"
        )


def _too_few(estimated: int, counted: int) -> str:
    """Say why an MP3 file cannot be read to its end: libsndfile stops where it was to be."""
    return (
        f"it does not say how long it is, and of {counted:,} samples {estimated:,} would be read; "
        f"{_WRITE_ANEW}"
    )


def _joined(said: int, counted: int) -> str:
    """Say why only the first of several MP3 files in one would be read."""
    return (
        f"it says that it holds {said:,} samples, and {counted:,} are there, as where files were "
        "put one behind another; join what is heard in them in place of their bytes"
    )


def _why_empty(data: BinaryIO) -> str:
    """Say why there are no samples: a recorder that was stopped may not have written how many."""
    data.seek(0)
    head = data.read(8)
    size = data.seek(0, os.SEEK_END)
    promised = max(44, 8 + int.from_bytes(head[4:], "little"))  # 44: a header alone
    return _NO_LENGTH if head[:4] == b"RIFF" and size > promised else "it holds no samples"
