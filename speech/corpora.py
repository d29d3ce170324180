"""Corpora as they come: which recordings each holds, what is said there, and its own split."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from blnet.files import StrPath, folders_taken_back, reason
from blnet.speech.audio import AUDIO_ENDINGS
from blnet.speech.config import DataConfig
from blnet.speech.files import Tree
from blnet.speech.manifest import read_manifest
from blnet.speech.recordings import Utterance, measured
from blnet.speech.splits import hold_out

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EVALUATION_FOLDERS = ("val", "valid", "validation", "dev", "test")
_PART_NAMES = {"train", "training", "eval", "evaluation", "testing", *EVALUATION_FOLDERS}
LIBRISPEECH_PARTS = (
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
)
_FSDD_TEST_TAKES = 5
_FSDD_NAME = re.compile(r"(?:.*/)?(\d)_([a-zA-Z][^/]*)_(\d+)\.wav")
_YESNO_NAME = re.compile(r"(?:.*/)?([01](?:_[01])*)\.wav")

Wanted = Literal["both", "training", "evaluation"]  # parts; one with a place of its own may be left


@dataclass(frozen=True)
class Parts:
    """What a corpus consists of.

    Attributes:
        train: the recordings to train on; () where only the evaluation was asked for and they are
            not at hand.
        evaluation: those to evaluate on; likewise.
        classes: the words, in order; () where the corpus has no labels.
    """

    train: Sequence[Utterance]
    evaluation: Sequence[Utterance]
    classes: tuple[str, ...] = ()


def load_fsdd(data: DataConfig, wanted: Wanted = "both") -> Parts:
    """Return the Free Spoken Digit Dataset with its own split: takes 0 to 4 are the test part.

    Files are named digit_speaker_take.wav (github.com/Jakobovski/free-spoken-digit-dataset).

    Raises:
        ValueError: if the corpus is not there.
    """
    train: list[Utterance] = []
    test: list[Utterance] = []
    tree = tree_of(data)
    for name in tree.names:
        match = _FSDD_NAME.fullmatch(name)
        if match is None:
            continue
        word, take = DIGITS[int(match[1])], int(match[3])
        file = tree.file(name)
        one = Utterance(file, measured(file), text=word, label=word, speaker=match[2])
        (test if take < _FSDD_TEST_TAKES else train).append(one)
    check_found([*train, *test], data, "recordings named like 7_george_0.wav")
    return Parts(train, test, DIGITS)


def load_yesno(data: DataConfig, wanted: Wanted = "both") -> Parts:
    """Return the 60 recordings of yesno (openslr.org/1), each eight words; a share is held out.

    A file's name is its transcript: 1 for yes (in Hebrew), 0 for no.

    Raises:
        ValueError: if the corpus is not there, or could not be fetched.
    """
    from torchaudio.datasets import YESNO

    tree = tree_of(data, lambda root: YESNO(root, download=True))
    found = []
    for name in tree.names:
        match = _YESNO_NAME.fullmatch(name)
        if match is not None:
            text = " ".join("yes" if digit == "1" else "no" for digit in match[1].split("_"))
            file = tree.file(name)
            found.append(Utterance(file, measured(file), text=text))
    check_found(found, data, "recordings named like 0_1_0_1_0_1_1_1.wav")
    return Parts(*hold_out(found, data.holdout, data.split_seed))


def load_librispeech(data: DataConfig, wanted: Wanted = "both") -> Parts:
    """Return parts of LibriSpeech (openslr.org/12): data.subset, and eval_path or test-clean.

    Raises:
        ValueError: if a part is not there or not whole, or could not be fetched.
    """
    train: list[Utterance] = []
    evaluation: list[Utterance] = []
    if wanted != "evaluation":
        for part in data.subset.split("+"):
            train += _librispeech_part(data, part.strip(), "--data.subset")
    if wanted != "training":
        part = data.eval_path or "test-clean"
        evaluation = _librispeech_part(data, part, "--data.eval-path")
    return Parts(train, evaluation)


def load_folder(data: DataConfig, wanted: Wanted = "both") -> Parts:
    """Return the recordings of a folder (or archive) of folders, one for each word.

    The evaluation part is `data.eval_path`, of which a folder val, validation, valid, dev or test
    beside a folder train, if it has them; else such a folder of data.path; else a share of each
    word's recordings.

    Raises:
        ValueError: if there are no such folders, or no recordings in them.
    """
    train: list[Utterance] = []
    evaluation: list[Utterance] = []
    if data.eval_path is None:
        own, held = _parts(tree_of(data), "--data.path")
        train = _word_folders(own, "--data.path")
        if held is own:
            train, evaluation = hold_out(train, data.holdout, data.split_seed)
        else:
            evaluation = _word_folders(held, "--data.path")
        return Parts(train, evaluation, labels_of(train))
    if wanted != "training":
        _, held = _parts(Tree.of(data.eval_path, data.eval_flag), data.eval_flag)
        evaluation = _word_folders(held, data.eval_flag)
    if wanted != "evaluation":
        own, _ = _parts(tree_of(data), "--data.path")
        train = _word_folders(own, "--data.path")
    return Parts(train, evaluation, labels_of(train or evaluation))


def load_manifest(data: DataConfig, wanted: Wanted = "both") -> Parts:
    """Return the recordings that manifests list (`read_manifest`): path, and eval_path if given.

    Without eval_path a share of path is held out.

    Raises:
        ValueError: if a manifest is missing or a line makes no sense.
    """
    train: list[Utterance] = []
    evaluation: list[Utterance] = []
    if data.eval_path is None:
        found = read_manifest(required(data.path, "a manifest (JSON Lines or a table with tabs)"))
        train, evaluation = hold_out(found, data.holdout, data.split_seed)
        return Parts(train, evaluation, labels_of(train))
    if wanted != "training":
        evaluation = read_manifest(data.eval_path)
    if wanted != "evaluation":
        train = read_manifest(required(data.path, "the training manifest"))
    return Parts(train, evaluation, labels_of(train or evaluation))


def labels_of(utterances: Iterable[Utterance]) -> tuple[str, ...]:
    """Return the labels of some recordings, sorted, each once.

    Raises:
        ValueError: if one is no text.
    """
    labels = tuple(sorted({one.label for one in utterances} - {""}))
    for label in labels:
        try:
            label.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the name of class {label!r} is not UTF-8; rename it") from error
    return labels


def required(path: str | None, what: str) -> str:
    """Return data.path.

    Raises:
        ValueError: if it was not given.
    """
    if path is None:
        raise ValueError(f"--data.path is missing; name {what}")
    return path


def check_found(found: Sequence[Utterance], data: DataConfig, what: str) -> None:
    """Raise ValueError if nothing was found where data.path said."""
    if not found:
        raise ValueError(
            f"--data.path {data.path} holds no {what}; name the folder or archive of {data.name}"
        )


def is_audio(name: str) -> bool:
    """Tell whether a file's name ends as a recording's does."""
    return name.lower().endswith(AUDIO_ENDINGS)


def tree_of(data: DataConfig, fetch: Callable[[str], object] | None = None) -> Tree:
    """Return the files of a corpus's folder or archive.

    Args:
        data: `path` names it.
        fetch: puts the corpus into a folder; called where data.download says so and no recordings
            are there.

    Raises:
        ValueError: if the corpus is not there, or could not be fetched.
    """
    path = required(data.path, f"the folder or .zip archive of {data.name}")
    if data.download and fetch is not None and not _holds_audio(path):
        try:
            with folders_taken_back(path):
                os.makedirs(path, exist_ok=True)
                fetch(path)
        except (OSError, RuntimeError, ValueError) as error:
            raise _not_fetched(data, path, error) from error
    return Tree.of(path, "--data.path")


def _holds_audio(path: str) -> bool:
    """Tell an archive, and a folder with recordings."""
    if not os.path.isdir(path):
        return os.path.exists(path)
    return any(map(is_audio, Tree.of(path, "--data.path").names))


def _not_fetched(data: DataConfig, root: StrPath, error: Exception) -> ValueError:
    return ValueError(
        f"{data.name} could not be fetched into folder {root} ({reason(error)}); try again, or "
        "name the folder that holds it with --data.path"
    )


# Folders of words ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folders:
    """Recordings in folders of words.

    Attributes:
        tree: where they are.
        split: their names, as they are and by folders.
        depth: folders around those of words.
    """

    tree: Tree
    split: tuple[tuple[str, list[str]], ...]
    depth: int


def _parts(tree: Tree, flag: str) -> tuple[_Folders, _Folders]:
    """Return a tree's folder train and the one to evaluate on, or all of it twice.

    A folder around all recordings is passed by. A tree has parts if all of its other folders with
    recordings are called so: a word may be train or test.

    Raises:
        ValueError: if it has parts that go by other names.
    """
    split = tuple((name, name.split("/")) for name in tree.names if is_audio(name))
    whole = _inside(_Folders(tree, split, 0))
    depth = whole.depth
    top = {parts[depth] for _, parts in split if len(parts) > depth + 1}
    held = [name for name in EVALUATION_FOLDERS if name in top]
    deep = all(len(parts) != depth + 2 for _, parts in split)
    if "train" not in top or not held or top - {"train", *EVALUATION_FOLDERS}:
        if deep and len(top) > 1 and {name.casefold() for name in top} <= _PART_NAMES:
            raise ValueError(
                f"{flag}: {tree.root} has folders {' and '.join(sorted(top))}, which are called "
                "like parts and not like words; call them train and val"
            )
        return whole, whole
    train, evaluation = (
        tuple((name, parts) for name, parts in split if parts[depth] == part)
        for part in ("train", held[0])
    )
    held_out = _inside(_Folders(tree, evaluation, depth + 1))
    return _inside(_Folders(tree, train, depth + 1)), held_out


def _inside(found: _Folders) -> _Folders:
    """Pass by a folder around all recordings, and one around them in that."""
    depth = found.depth
    while _all_deeper(found.split, depth):
        depth += 1
    return replace(found, depth=depth)


def _all_deeper(split: Sequence[tuple[str, list[str]]], depth: int) -> bool:
    """Tell whether all recordings share a folder at a depth and have another one below it."""
    return (
        bool(split)
        and all(len(parts) > depth + 2 for _, parts in split)
        and len({parts[depth] for _, parts in split}) == 1
    )


def _word_folders(found: _Folders, flag: str) -> list[Utterance]:
    """Return the recordings in folders of words.

    Raises:
        ValueError: if there are none.
    """
    utterances = []
    for name, parts in found.split:
        if len(parts) > found.depth + 1:
            word, file = parts[found.depth], found.tree.file(name)
            text = word.replace("_", " ")
            utterances.append(Utterance(file, measured(file), text=text, label=word))
    if not utterances:
        where = "/".join(
            [found.tree.root, *(found.split[0][1][: found.depth] if found.split else ())]
        )
        raise ValueError(
            f"{flag}: {where} holds no folders with recordings ({', '.join(AUDIO_ENDINGS)}); put "
            "those of each word into a folder of its own there"
        )
    return utterances


# LibriSpeech -----------------------------------------------------------------------------------


def _librispeech_part(data: DataConfig, part: str, flag: str) -> list[Utterance]:
    from torchaudio.datasets import LIBRISPEECH

    root = Path(required(data.path, "the folder that holds the folder LibriSpeech"))
    if root.name == "LibriSpeech":
        root = root.parent
    _check_librispeech(data, root, part, flag)
    try:
        with folders_taken_back(root):
            if data.download:
                root.mkdir(parents=True, exist_ok=True)
            found = LIBRISPEECH(root, part, download=data.download)
    except (OSError, RuntimeError) as error:
        raise _not_fetched(data, root, error) from error
    try:
        metadata = [found.get_metadata(place) for place in range(len(found))]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{flag}: part {part} of LibriSpeech in folder {root} is not whole ({reason(error)}); "
            "unpack it again"
        ) from error
    utterances = []
    for inner, _, text, speaker, _, _ in metadata:
        file = str(root / "LibriSpeech" / inner)
        utterances.append(Utterance(file, measured(file), text=text, speaker=str(speaker)))
    check_found(utterances, data, f"recordings of {part}")
    return utterances


def _check_librispeech(data: DataConfig, root: Path, part: str, flag: str) -> None:
    if part not in LIBRISPEECH_PARTS:
        raise ValueError(
            f"{flag} {part!r} is no part of LibriSpeech; choose from {', '.join(LIBRISPEECH_PARTS)}"
        )
    if not data.download and not (root / "LibriSpeech" / part).is_dir():
        raise ValueError(
            f"{flag}: folder {root / 'LibriSpeech' / part} does not exist; fetch it with "
            "--data.download, or name the folder that holds LibriSpeech with --data.path"
        )
