"""The embedded corpus: made by eSpeak NG in many voices, with rooms and noise around them."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from blnet.speech.commands import TEN_WORDS
from blnet.speech.grammar import sentences
from blnet.speech.synthesis import Synthesizer

Samples = NDArray[np.float32]
VERSION = 2  # of what is made here; a change makes every cached corpus anew
# In the order in which they are made: the evaluation does not depend on how much else there is.
PARTS = ("evaluation", "train")
_ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc",
            "en-gb-x-gbclan", "en-gb-x-gbcwmd")  # fmt: skip
# Without those of Klatt's kind, whose breath is drawn by the C library: never the same again.
_NAMES = (
    "Alex Alicia Andrea Andy Annie aunty belinda boris Denis f1 f2 f3 f4 f5 Gene grandma grandpa "
    "gustave ian iven4 Jacky john Lee linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo Marco Mario max "
    "Michael michel miguel Mike Nguyen norbert paul quincy rob robert sandro shelby steph travis "
    "victor zac"
)
_VARIANTS = tuple(_NAMES.split())
_HELD_OUT = 0.2  # of the variants
_RATES = {"words": (120, 230), "sentences": (120, 180)}  # words a minute
_PITCHES = (20, 80)
_PEAK = 0.9
_AUDIBLE = 0.01  # of the peak; what is softer at the ends is cut off
_DATE = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever it is made


@dataclass(frozen=True)
class Recipe:
    """All that decides what the corpus is.

    Attributes:
        kind: single words, or sentences.
        train: recordings to train on.
        evaluation: recordings to evaluate on, by voices that the others do not have.
        sample_rate: samples a second.
        seed: of everything that is drawn.
    """

    kind: Literal["words", "sentences"]
    train: int
    evaluation: int
    sample_rate: int
    seed: int


def write_corpus(recipe: Recipe, path: Path) -> None:
    """Write the corpus as a .zip archive of FLAC files with manifests train and evaluation.jsonl.

    The same recipe gives the same bytes, with the same versions of eSpeak NG and of the resampler.

    Args:
        recipe: what to make.
        path: the archive; replaced if it is there.

    Raises:
        ImportError: if the package espeakng-loader is missing.
        OSError: if it cannot be written.
    """
    texts = _texts(recipe)
    voices = voices_of_parts(recipe.seed)
    synthesizer = Synthesizer()
    with zipfile.ZipFile(path, "w") as archive:
        for number, (part, spoken, speakers) in enumerate(zip(PARTS, texts, voices, strict=True)):
            rows = []
            for place, text in enumerate(spoken):
                random = np.random.RandomState([recipe.seed, number, place])
                voice = speakers[random.randint(len(speakers))]
                samples = _recording(recipe, synthesizer, text, voice, random)
                name = f"{part}/{place:06}.flac"
                _add(archive, name, _flac(samples, recipe.sample_rate))
                row = {"audio": name, "text": text, "speaker": voice,
                       "seconds": round(len(samples) / recipe.sample_rate, 6)}  # fmt: skip
                rows.append(row | ({"label": text} if recipe.kind == "words" else {}))
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            _add(archive, f"{part}.jsonl", lines.encode())


def voices_of_parts(seed: int) -> tuple[list[str], list[str]]:
    """Return the voices to evaluate on and those to train on, which share no variant."""
    order = np.random.RandomState(seed).permutation(len(_VARIANTS))
    count = round(_HELD_OUT * len(_VARIANTS))
    held, kept = order[:count], order[count:]
    evaluation, train = (
        [f"{accent}+{_VARIANTS[place]}" for place in places for accent in _ACCENTS]
        for places in (held, kept)
    )
    return evaluation, train


def _texts(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return what is said in each part; no sentence is in both."""
    if recipe.kind == "words":
        evaluation, train = (
            [TEN_WORDS[place % len(TEN_WORDS)] for place in range(count)]
            for count in (recipe.evaluation, recipe.train)
        )
        return evaluation, train
    random = np.random.RandomState(recipe.seed)
    held = sentences(recipe.evaluation, random)
    return held, sentences(recipe.train, random, other_than=frozenset(held))


def _recording(
    recipe: Recipe,
    synthesizer: Synthesizer,
    text: str,
    voice: str,
    random: np.random.RandomState,
) -> Samples:
    """Return a text, spoken somewhere, peak 0.9."""
    import soxr

    rate = int(random.randint(*_RATES[recipe.kind]))
    pitch = int(random.randint(*_PITCHES))
    spoken = _trimmed(synthesizer.speak(text, voice, rate, pitch))
    samples: Samples = soxr.resample(spoken, synthesizer.sample_rate, recipe.sample_rate)
    before, after = (random.uniform(0.02, 0.1, 2) * recipe.sample_rate).astype(int)
    samples = np.pad(samples, (before, after))
    if random.rand() < 0.5:
        samples = _reverberated(samples, recipe.sample_rate, random)
    samples = samples + _noise(samples, random)
    samples *= np.float32(_PEAK / np.abs(samples).max())
    return samples


def _trimmed(samples: Samples) -> Samples:
    """Cut off the silence at both ends."""
    heard = np.flatnonzero(np.abs(samples) > _AUDIBLE * np.abs(samples).max())
    return samples[heard[0] : heard[-1] + 1] if len(heard) else samples


def _reverberated(samples: Samples, rate: int, random: np.random.RandomState) -> Samples:
    """Add the echo of a room: noise that decays by 60 dB in 0.1 to 0.4 s (Moorer, 1979)."""
    from scipy.signal import fftconvolve

    decay, strength = random.uniform(0.1, 0.4), random.uniform(0.1, 0.5)
    time = np.arange(int(decay * rate)) / rate
    response = random.randn(len(time)) * 10 ** (-3 * time / decay)
    response *= strength / np.sqrt((response**2).sum())
    echo: Samples = fftconvolve(samples, response)[: len(samples)].astype(np.float32)
    return samples + echo


def _noise(samples: Samples, random: np.random.RandomState) -> Samples:
    """Return noise, white to pink, at a signal-to-noise ratio from 10 to 40 dB."""
    from scipy.fft import irfft, next_fast_len, rfft

    length = next_fast_len(len(samples), real=True)
    spectrum = rfft(random.randn(length))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** random.uniform(0, 0.5)
    noise = irfft(spectrum, length)[: len(samples)]
    level = np.sqrt((samples**2).mean() / (noise**2).mean()) * 10 ** (-random.uniform(10, 40) / 20)
    found: Samples = (noise * level).astype(np.float32)
    return found


def _flac(samples: Samples, rate: int) -> bytes:
    packed = io.BytesIO()
    soundfile.write(packed, samples, rate, format="FLAC", subtype="PCM_16")
    return packed.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _DATE), content)
