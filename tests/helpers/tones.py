"""Letters as tones, to try the commands on: known texts, and tiny networks that read them off.

Each letter is a tone and so is the space, silence is the blank. Where a letter begins is thus known
to the sample, and networks that seconds of training make find it to a frame.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

import blnet.speech.models  # noqa: F401  (registers the networks by name)
from blnet import checkpoint, registry
from blnet.speech.config import FeatureConfig
from blnet.speech.features import LogMel
from blnet.speech.hypotheses import SPACE
from blnet.speech.network import HeadName, SpeechNet
from blnet.speech.text import BLANK, Alphabet

RATE = 8000
ALPHABET = Alphabet("abc ")
TONE, GAP = 0.12, 0.08  # seconds of a letter's sound, and of the silence after it
FEATURES = FeatureConfig(bins=16, normalize="none")
WORDS = ("low", "middle", "high")  # what networks for keywords tell apart
NAME = "bl_resnet22"
_PAUSE = "_"
_HERTZ = dict(zip(ALPHABET.characters, (400, 900, 1700, 3000), strict=True))
_OPTIONS = {"alpha": 2, "beta": 2, "width": 0.125, "bins": 16}
_STEPS = {"frame": 50, "keyword": 15}
_LETTERS = 16  # of a text to train on

Samples = NDArray[np.float64]


def spoken(text: str, rate: int = RATE) -> Samples:
    """Return the samples of a text: every character a tone and a gap, with a little noise.

    A "_" stands for digital silence as long as a character.
    """
    cell, sound = round((TONE + GAP) * rate), round(TONE * rate)
    samples = _noise(cell * len(text), len(text))
    for place, character in enumerate(text):
        begin = place * cell
        if character == _PAUSE:
            samples[begin : begin + cell] = 0
        else:
            samples[begin : begin + sound] += _tone(_HERTZ[character], sound, rate)
    return samples


def times(text: str) -> list[tuple[str, float, float]]:
    """Return the words of a spoken text, where each begins and where it ends, seconds."""
    found, place = [], 0
    for word in text.split(SPACE):
        last = place + len(word) - 1
        if word:
            found.append((word, place * (TONE + GAP), last * (TONE + GAP) + TONE))
        place += len(word) + 1
    return found


def random_text(seed: int, words: int) -> str:
    """Return words of one to four letters, no letter twice in a row."""
    draw, found = random.Random(seed), []
    for _ in range(words):
        letters = [draw.choice("abc")]
        for _ in range(draw.randrange(4)):
            letters.append(draw.choice([one for one in "abc" if one != letters[-1]]))
        found.append("".join(letters))
    return SPACE.join(found)


def keyword(name: str, seed: int = 0, seconds: float = 0.3) -> Samples:
    """Return a recording of one of `WORDS`: a tone, a little off."""
    hertz = (400, 900, 1700)[WORDS.index(name)] * random.Random(seed).uniform(0.95, 1.05)
    count = round(seconds * RATE)
    return _tone(hertz, count, RATE) + _noise(count, seed)


def write(path: Path, samples: Samples, rate: int = RATE, **more: Any) -> Path:
    """Write a recording; return its path."""
    soundfile.write(path, samples, rate, **more)
    return path


def untrained(head: HeadName, **options: Any) -> SpeechNet:
    """Return a tiny new network, the same every time."""
    torch.manual_seed(0)
    return _build({**_options(head), **options})


@functools.cache
def trained(head: HeadName) -> SpeechNet:
    """Return a tiny trained network, which nobody may change.

    Args:
        head: keyword tells `WORDS` apart, frame labels the letters, and ctc has its weights.
    """
    if head == "ctc":
        model = untrained("ctc")
        model.load_state_dict(trained("frame").state_dict())
        return model
    model = untrained(head).train()
    features = LogMel(FEATURES, RATE)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=_STEPS[head])
    for step in range(_STEPS[head]):
        maps, frames, targets = _batch(head, features, step)
        loss = F.cross_entropy(model(maps, frames).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def save(path: Path, head: HeadName, model: SpeechNet | None = None, **changes: Any) -> Path:
    """Write a checkpoint as a run does; return its path.

    Args:
        path: the file.
        head: of the trained network to write.
        model: what to write in its place.
        changes: entries of the header; None leaves one out.
    """
    model = model or trained(head)
    options = {**_options(head), "time_reduction": model.config.time_reduction}
    said = {
        "task": "speech",
        "network": {"name": NAME, "options": options},
        "head": head,
        "classes": list(WORDS) if head == "keyword" else [],
        "alphabet": ALPHABET.characters,
        "features": LogMel(FEATURES, RATE).as_dict(),
        "data": {"name": "manifest", "sample_rate": RATE, "alphabet": ALPHABET.characters},
    }
    header = {name: value for name, value in {**said, **changes}.items() if value is not None}
    checkpoint.save(model, path, **header)
    return path


def _options(head: HeadName) -> dict[str, Any]:
    classes = len(WORDS) if head == "keyword" else ALPHABET.size
    return {"head": head, "num_classes": classes, "time_reduction": 1, **_OPTIONS}


def _build(options: dict[str, Any]) -> SpeechNet:
    network = registry.build(NAME, **options)
    assert isinstance(network, SpeechNet)
    return network.eval()


def _batch(head: HeadName, features: LogMel, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps, frames and targets to train on."""
    if head == "frame":
        texts = [_with_pauses(10 * step + n) for n in range(6)]
        recordings = [spoken(text) for text in texts]
    else:
        recordings = [keyword(WORDS[n % 3], 100 * step + n) for n in range(12)]
    samples = torch.tensor(np.stack(recordings), dtype=torch.float32)
    maps, frames = features(samples, torch.full((len(samples),), samples.shape[1]))
    if head == "keyword":
        return maps, frames, torch.arange(len(samples)) % len(WORDS)
    return maps, frames, torch.stack([_labels(text, features, int(frames[0])) for text in texts])


def _with_pauses(seed: int) -> str:
    draw = random.Random(seed)
    text = random_text(seed, _LETTERS)[: draw.randrange(4, _LETTERS)]
    place = draw.randrange(len(text) + 1)
    return text[:place] + _PAUSE * (_LETTERS - len(text)) + text[place:]


def _labels(text: str, features: LogMel, frames: int) -> Tensor:
    """Return the label of each frame: of what sounds under the middle of its window."""
    middles = torch.arange(frames) * features.hop_samples + features.window_samples // 2
    cell = round((TONE + GAP) * RATE)
    letters = torch.tensor([ALPHABET.classes.get(character, BLANK) for character in text])
    return torch.where(middles % cell < TONE * RATE, letters[middles // cell], BLANK)


def _tone(hertz: float, count: int, rate: int) -> Samples:
    wave: Samples = 0.3 * np.sin(2 * np.pi * hertz / rate * np.arange(count))
    return wave


def _noise(count: int, seed: int) -> Samples:
    return 1e-3 * np.random.RandomState(seed).standard_normal(count)
