"""Speech from text, by eSpeak NG; its library and voices come with the wheel espeakng-loader."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blnet.files import reason

# Of espeak-ng/speak_lib.h.
_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to a callback, before espeak_Synth returns
_DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_CHARACTERS = 1  # espeak_POSITION_TYPE
_UTF8 = 1  # espeakCHARS_UTF8
_SEED = 1
_RATES = (80, 450)  # words a minute
_PITCHES = (0, 99)
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Synthesizer:
    """A speaker of text with a memory of its own.

    eSpeak's waver of the voice and its breath go on from one text to the next. So the same texts in
    the same order give the same samples, from every new synthesizer; other orders do not, and nor
    do some variants of Klatt's kind (klatt, Reed, caleb, ...), which draw from the C library. Each
    loads a copy of the library, about a megabyte that stays until the process ends: make few. It
    may be used by several threads, one after the other.

    Attributes:
        version: of eSpeak NG.
        sample_rate: samples a second.

    Raises:
        ImportError: if the package espeakng-loader is missing.
        ValueError: if its library does not work here.
    """

    def __init__(self) -> None:
        library, data = _installed()
        self._lock = threading.Lock()
        self._chunks: list[NDArray[np.int16]] = []
        self._callback = _Callback(self._hear)  # kept, as the library calls it later
        try:
            self._library = _private_copy(library)
        except OSError as error:
            raise ValueError(
                f"eSpeak NG's library cannot be loaded ({reason(error)}); install espeakng-loader "
                "anew, or let TMPDIR name a folder that libraries may be loaded from"
            ) from error
        self.sample_rate = int(
            self._library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), _DONT_EXIT)
        )
        if self.sample_rate <= 0:
            raise ValueError(f"eSpeak NG finds no voices in {data}; install espeakng-loader anew")
        self._library.espeak_Info.restype = ctypes.c_char_p
        self.version: str = self._library.espeak_Info(None).decode()
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))  # else that is the time

    def speak(
        self, text: str, voice: str = "en-us", rate: int = 175, pitch: int = 50
    ) -> NDArray[np.float32]:
        """Return a text as sound.

        Args:
            text: what to say.
            voice: a language of `languages`, or that with one of `variants`: "en-us+f2".
            rate: words a minute, 80 to 450.
            pitch: 0 to 99.

        Returns:
            float32 (samples,) in [-1, 1] at `sample_rate`, with a little silence around it.

        Raises:
            ValueError: if the voice is unknown, or a number is out of range.
        """
        _check_voice(voice)
        for name, value, (low, high) in (("rate", rate, _RATES), ("pitch", pitch, _PITCHES)):
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {value}")
        if not text.strip() or "\0" in text:
            raise ValueError(f"eSpeak NG cannot say {text!r}; give it words")
        encoded = text.encode() + b"\0"
        with self._lock:
            self._chunks.clear()
            if self._library.espeak_SetVoiceByName(voice.encode()):
                raise ValueError(f"eSpeak NG cannot use its voice {voice!r}; choose another")
            self._library.espeak_SetParameter(_RATE, rate, 0)
            self._library.espeak_SetParameter(_PITCH, pitch, 0)
            failed = self._library.espeak_Synth(
                encoded, ctypes.c_size_t(len(encoded)), 0, _CHARACTERS, 0, _UTF8, None, None
            )
            chunks = self._chunks[:]
        if failed or not chunks:
            raise ValueError(f"eSpeak NG cannot say {text!r}; give it words")
        return np.concatenate(chunks).astype(np.float32) / np.float32(32768)

    def _hear(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: object) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on


@functools.cache
def languages() -> tuple[str, ...]:
    """Return the languages and accents that eSpeak NG has: "en-us", "en-gb-scotland", "de", ...

    British English is "en".

    Raises:
        ImportError: if the package espeakng-loader is missing.
    """
    _, data = _installed()
    files = (path for path in (Path(data) / "lang").rglob("*") if path.is_file())
    return tuple(sorted(path.name.lower() for path in files))


@functools.cache
def variants() -> tuple[str, ...]:
    """Return the variants that any language can be spoken in: "f2", "m3", "klatt4", ...

    Raises:
        ImportError: if the package espeakng-loader is missing.
    """
    _, data = _installed()
    return tuple(sorted(path.name for path in (Path(data) / "voices" / "!v").iterdir()))


def _installed() -> tuple[str, str]:
    """Return the library and the folder of voices."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            "speech synthesis needs the package espeakng-loader; install it with "
            "pip install 'blnet[speech]'"
        ) from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def _private_copy(library: str) -> ctypes.CDLL:
    """Load a copy of a library, whose variables nobody else has touched."""
    with tempfile.TemporaryDirectory(prefix="blnet-", ignore_cleanup_errors=True) as folder:
        return ctypes.CDLL(shutil.copy(library, folder))


def _check_voice(voice: str) -> None:
    """Raise ValueError of an unknown voice, for which the library would take another silently."""
    language, plus, variant = voice.partition("+")
    if language not in languages():
        raise ValueError(f"voice {voice!r} is unknown; its language must be {_some(languages())}")
    if plus and variant not in variants():
        raise ValueError(f"voice {voice!r} is unknown; its variant must be {_some(variants())}")


def _some(names: Sequence[str]) -> str:
    return f"one of {len(names)}: {', '.join(names[:3])}, ..., {', '.join(names[-3:])}"
