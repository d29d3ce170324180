"""Google's Speech Commands, versions 1 and 2, as Warden (2018, arXiv:1804.03209) splits them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from blnet.speech.config import DataConfig
from blnet.speech.corpora import Parts, Wanted, check_found, labels_of, tree_of
from blnet.speech.files import Tree, read_lines
from blnet.speech.recordings import Utterance, measured

TEN_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "unknown", "silence"
_NOISE = "_background_noise_"
_NAME = re.compile(r"(?:.*/)?(?P<word>[^/_][^/]*)/(?P<file>(?P<speaker>[^/]+)_nohash_\d+\.wav)")
_HASHES = 2**27 - 1  # the published program's most recordings of a word
_SHARE = 10  # per cent, of validation and of testing
_SILENCE_SECONDS = 1.0
_ROUNDING = 1e-6  # seconds
# Which part of each noise recording silence is cut from, so that no evaluation hears what the
# training heard; what lies between is left to a validation part.
_NOISE_SPANS = {"train": (0.0, 0.8), "test": (0.9, 1.0)}


def load_speech_commands(data: DataConfig, wanted: Wanted = "both") -> Parts:
    """Return the corpus with its published split; the validation part is left out.

    testing_list.txt and validation_list.txt say which recording is in which part; where they are
    missing, the hash of the speaker does. With 12 words, "unknown" are a tenth as many recordings
    of other words as there are of the ten, rounded up as the published program does, and "silence"
    as many cuts from the noise recordings.

    Raises:
        ValueError: if the corpus is not there or not whole, or could not be fetched.
    """
    from torchaudio.datasets import SPEECHCOMMANDS

    tree = tree_of(data, lambda root: SPEECHCOMMANDS(root, download=True))
    parts = _split(tree)
    found = [*parts["train"], *parts["test"]]
    check_found(found, data, "recordings named like yes/0a7c2a8d_nohash_0.wav")
    if data.words != 12:
        return Parts(parts["train"], parts["test"], labels_of(found))
    missing = sorted(set(TEN_WORDS) - set(labels_of(found)))
    if missing:
        raise ValueError(
            f"--data.path {tree.root} has no recordings of {', '.join(missing)}; take "
            "--data.words 35 for the words that are there"
        )
    train, test = (_twelve(parts[part], tree, part, data.split_seed) for part in ("train", "test"))
    return Parts(train, test, (*TEN_WORDS, UNKNOWN, SILENCE))


def part_by_hash(file: str) -> str:
    """Return "train", "validation" or "test" by the published rule (Warden 2018, section 5.10).

    All recordings of a speaker are in the same part, and stay there as others are added.

    Args:
        file: the recording's name without folders; what follows "_nohash_" does not count.
    """
    digest = hashlib.sha1(re.sub(r"_nohash_.*$", "", file).encode()).hexdigest()
    percentage = int(digest, 16) % (_HASHES + 1) * (100 / _HASHES)
    if percentage < _SHARE:
        return "validation"
    return "test" if percentage < 2 * _SHARE else "train"


def _split(tree: Tree) -> dict[str, list[Utterance]]:
    """Return the recordings of words in each part."""
    listed = {
        "test": _listed(tree, "testing_list.txt"),
        "validation": _listed(tree, "validation_list.txt"),
    }
    parts: dict[str, list[Utterance]] = {"train": [], "validation": [], "test": []}
    for name in tree.names:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        word, inner = match["word"], f"{match['word']}/{match['file']}"
        if any(names is not None for names in listed.values()):
            part = next((part for part, names in listed.items() if inner in (names or ())), "train")
        else:
            part = part_by_hash(match["file"])
        if part != "validation":
            file = tree.file(name)
            parts[part].append(Utterance(file, measured(file), word, word, match["speaker"]))
    return parts


def _listed(tree: Tree, name: str) -> frozenset[str] | None:
    """Return the recordings that a list names, "word/file.wav"; None where there is no list."""
    found = [file for file in tree.names if file.split("/")[-1] == name]
    if not found:
        return None
    return frozenset(line.strip() for line in read_lines(tree.file(found[0])))


def _twelve(words: Sequence[Utterance], tree: Tree, part: str, seed: int) -> list[Utterance]:
    """Return the ten words' recordings, some of the others and some silence."""
    known = [one for one in words if one.label in TEN_WORDS]
    others = [one for one in words if one.label not in TEN_WORDS]
    count = math.ceil(len(known) / len(TEN_WORDS))
    random = np.random.RandomState([seed, len(part)])
    chosen = sorted(random.permutation(len(others))[:count].tolist())
    unknown = [replace(others[place], label=UNKNOWN) for place in chosen]
    return [*known, *unknown, *_silence(tree, part, count, random)]


def _silence(
    tree: Tree, part: str, count: int, random: np.random.RandomState
) -> Iterable[Utterance]:
    """Yield cuts of a second from the noise recordings, taken in turn."""
    low, high = _NOISE_SPANS[part]
    spans = []
    for name in tree.names:
        if f"/{_NOISE}/" in f"/{name}" and name.endswith(".wav"):
            file = tree.file(name)
            seconds = measured(file)
            first, last = low * seconds, high * seconds - _SILENCE_SECONDS
            if last - first > -_ROUNDING:
                spans.append((file, first, max(first, last)))
    if not spans:
        raise ValueError(
            f"--data.path {tree.root} has no folder {_NOISE} with recordings of 10 s or more, of "
            "which 'silence' is cut; add it, or take --data.words 35"
        )
    for place in range(count):
        file, first, last = spans[place % len(spans)]
        start = round(random.uniform(first, last), 3)
        end = round(start + _SILENCE_SECONDS, 3)
        yield Utterance(file, _SILENCE_SECONDS, label=SILENCE, start=start, end=end)
