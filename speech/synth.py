"""The embedded corpus, made on first use and kept for the next."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import warnings
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

from blnet.files import reason, written_aside
from blnet.speech.commands import TEN_WORDS
from blnet.speech.config import DataConfig, TaskName
from blnet.speech.corpora import Parts
from blnet.speech.files import SEPARATOR
from blnet.speech.manifest import read_manifest
from blnet.speech.spoken import PARTS, VERSION, Recipe, write_corpus
from blnet.speech.synthesis import Synthesizer

_COUNTS = {"words": (2000, 400), "sentences": (1500, 200)}


def load_synth(data: DataConfig, task: TaskName) -> Parts:
    """Return the embedded corpus: ten words (keyword) or sentences (ctc, frame).

    `data.split_seed` decides what is said and by whom; the evaluation's voices and sentences are
    not in the training part. It takes seconds to make, and is kept in `cache_folder`.

    Raises:
        ImportError: if the package espeakng-loader is missing.
    """
    kind = "words" if task == "keyword" else "sentences"
    train, evaluation = _COUNTS[kind]
    recipe = Recipe(
        "words" if task == "keyword" else "sentences",
        data.train_items or train,
        data.eval_items or evaluation,
        data.sample_rate,
        data.split_seed,
    )
    archive = corpus_archive(recipe)
    found = {part: read_manifest(f"{archive}{SEPARATOR}{part}.jsonl") for part in PARTS}
    classes = TEN_WORDS if kind == "words" else ()
    return Parts(found["train"], found["evaluation"], classes)


def corpus_archive(recipe: Recipe) -> Path:
    """Return the archive of a corpus, which is made if it is not there or damaged.

    Where the cache's folder cannot be written, a warning says so and the archive lies in a
    temporary folder, until the process ends.

    Raises:
        ImportError: if the package espeakng-loader is missing.
    """
    name = f"synth-{recipe.kind}-{_key(recipe)}.zip"
    folder = cache_folder()
    path = folder / name
    if _whole(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            write_corpus(recipe, aside)
        return path
    except OSError as error:
        path = Path(_temporary_folder()) / name
        if not _whole(path):
            warnings.warn(
                f"the synthetic corpus cannot be kept in {folder} ({reason(error)}) and is made "
                "anew by every run; let BLNET_CACHE name a folder that you may write to",
                stacklevel=2,
            )
            write_corpus(recipe, path)
        return path


def cache_folder() -> Path:
    """Return where corpora are kept: $BLNET_CACHE, $XDG_CACHE_HOME/blnet or ~/.cache/blnet."""
    if os.environ.get("BLNET_CACHE"):
        return Path(os.environ["BLNET_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "blnet"
    return Path(os.path.expanduser("~")) / ".cache" / "blnet"


def _key(recipe: Recipe) -> str:
    """Return a name for all that decides what the archive holds."""
    import soxr

    decisive = [VERSION, _espeak_version(), soxr.__version__, asdict(recipe)]
    return hashlib.blake2b(json.dumps(decisive).encode(), digest_size=8).hexdigest()


def _whole(path: Path) -> bool:
    """Tell whether an archive is there with every byte as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            return archive.testzip() is None and names >= {f"{part}.jsonl" for part in PARTS}
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        return False


@functools.cache
def _espeak_version() -> str:
    return Synthesizer().version


@functools.cache
def _kept_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="blnet-")


def _temporary_folder() -> str:
    """Return a folder that goes when this process ends."""
    return _kept_folder().name
