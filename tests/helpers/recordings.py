"""Files of recordings: in every format that is to be understood, whole corpora, broken ones."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

import numpy as np
import soundfile

from helpers.tones import RATE, Samples, spoken, write


def odd_recordings(folder: Path, samples: Samples) -> list[Path]:
    """Write the same sound in every way that is to be understood; return the files."""
    quick = np.interp(np.arange(12 * len(samples)) / 12, np.arange(len(samples)), samples)
    found = [
        write(folder / f"{kind}.wav", samples, subtype=kind)
        for kind in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")
    ]
    return [
        *found,
        write(folder / "stereo.wav", np.stack([samples, samples], 1)),
        write(folder / "96khz.wav", quick, 12 * RATE),
        write(folder / "packed.flac", samples),
        write(folder / "packed.ogg", samples),
    ]


def recorded(path: Path, seconds: float = 0.1, rate: int = RATE) -> None:
    """Write a recording of nothing but its length, and the folders that it is in.

    Args:
        path: its ending names the format.
        seconds: its length.
        rate: samples a second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_constant(round(seconds * rate), rate, path.suffix[1:].upper()))


@functools.cache
def _constant(count: int, rate: int, kind: str) -> bytes:
    return _packed(np.full(count, 0.25), kind, rate)


def zipped(folder: Path) -> Path:
    """Return an archive of a folder, with that folder in it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


def without_length(mp3: bytes) -> bytes:
    """Return an MP3 file less its first frame, which says how many there are."""
    return mp3[mp3.index(mp3[:2], 2) :]


def _packed(samples: Samples, kind: str, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


def bad_recordings(folder: Path) -> dict[Path, str]:
    """Write files that are no recordings; return each with what is to be said of it.

    The last one is not there.
    """
    whole = write(folder / "whole.wav", spoken("abc")).read_bytes()
    (folder / "whole.wav").unlink()
    contents = {
        "empty": (b"", "the file is empty"),
        "text": (b"no recording\n" * 100, "it cannot be decoded as WAV, FLAC, OGG or MP3"),
        "cut": (whole[:-1000], "its header promises 1,000 bytes more than are there"),
        "head": (whole[:30], "it cannot be decoded as WAV, FLAC, OGG or MP3"),
        "cut64": (
            _packed(spoken("abc"), "W64")[:-1000],
            "its header promises 1,000 bytes more than are there",
        ),
        "bare": (
            without_length(_packed(np.append(spoken("abc"), np.zeros(RATE)), "MP3")),
            "it does not say how long it is",
        ),
    }
    found = {}
    for name, (content, said) in contents.items():
        path = folder / f"{name}.wav"
        path.write_bytes(content)
        found[path] = said
    silent = write(folder / "none.wav", np.zeros(0))
    broken = spoken("abc")
    broken[len(broken) // 2] = np.nan
    spoilt = write(folder / "nan.wav", broken, subtype="FLOAT")
    return found | {
        silent: "it holds no samples",
        spoilt: "it holds samples that are no finite numbers",
        folder / "missing.wav": "No such file or directory",
    }
