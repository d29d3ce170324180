"""Flags that say which recordings a trained network meets: by default those it was made with."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from blnet.checks import flag_of, positive
from blnet.speech.config import DataConfig, DataName
from blnet.speech.inference import Trained
from blnet.trained import check_moved, is_foreign

_FIELDS = ("path", "eval_path", "download", "limit", "holdout_speaker", "words", "subset",
           "max_seconds", "longer")  # fmt: skip
_FLAGS = {"path": "data-path"}  # of fields that are called otherwise
_OWN = ("folder", "manifest")  # corpora of the user's own, of which a share may be held out


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; the names that training gives them, which errors use, are known too."""
    group = parser.add_argument_group("data, by default what the network was trained on")
    group.add_argument("--data", "--data.name", dest="data", choices=get_args(DataName),
                       metavar="NAME", help=", ".join(get_args(DataName)))  # fmt: skip
    group.add_argument("--data-path", "--data.path", dest="path", metavar="PATH",
                       help="folder or .zip archive of the corpus, or a manifest; of the corpus "
                       "that was trained on what is held out of it")  # fmt: skip
    group.add_argument("--eval-path", "--data.eval-path", dest="eval_path", metavar="PATH",
                       help="what to evaluate on: a folder, archive or manifest")  # fmt: skip
    group.add_argument("--download", "--data.download", dest="download", action="store_true",
                       default=None, help="fetch the corpus into --data-path")  # fmt: skip
    group.add_argument("--limit", "--data.limit", dest="limit", type=positive, metavar="N",
                       help="at most so many recordings of each part")  # fmt: skip
    group.add_argument("--holdout-speaker", "--data.holdout-speaker", dest="holdout_speaker",
                       metavar="NAME", help="evaluate on this speaker")  # fmt: skip
    group.add_argument("--words", "--data.words", dest="words", type=int, choices=(12, 35),
                       help="speech_commands: 12 or 35 words")  # fmt: skip
    group.add_argument("--subset", "--data.subset", dest="subset", metavar="NAMES",
                       help="librispeech: training parts")  # fmt: skip
    group.add_argument("--max-seconds", "--data.max-seconds", dest="max_seconds", type=float,
                       metavar="S", help="longest recording")  # fmt: skip
    group.add_argument("--longer", "--data.longer", dest="longer", choices=("cut", "skip"),
                       help="what becomes of longer ones")  # fmt: skip


def given_words(given: Mapping[str, Any]) -> list[str]:
    """Return the flags of the data as they were given, for a command that is to meet the same."""
    fields = {"data": given.get("data"), **{field: given.get(field) for field in _FIELDS}}
    return [
        word
        for field, value in fields.items()
        if value is not None and field != "download"
        for word in (flag_of(_FLAGS.get(field, field)), str(value))
    ]


def data_settings(
    trained: Trained,
    given: Mapping[str, Any],
    evaluating: bool = False,
    training_only: bool = False,
) -> DataConfig:
    """Return which data a network meets: what it was trained on, changed by flags.

    Args:
        trained: the network.
        given: flag -> value; None where it was not given.
        evaluating: whether all of a folder or manifest is to be evaluated, where the network was
            trained on another corpus.
        training_only: whether nothing is to be evaluated on, so that it does not matter where that
            lies.

    Raises:
        ValueError: if a setting makes no sense.
    """
    settings, name = trained.data, given.get("data")
    if name is not None and name != settings.name:
        # Of another corpus only what the network itself needs is as it was.
        settings = DataConfig(
            name=name, sample_rate=settings.sample_rate, alphabet=settings.alphabet
        )
    changes = {field: given[field] for field in _FIELDS if given.get(field) is not None}
    whole = evaluating and settings.name in _OWN and "holdout_speaker" not in changes
    if whole and "path" in changes:
        before = trained.data
        if is_foreign(settings.name, changes["path"], before.name, before.path):
            changes.setdefault("eval_path", changes["path"])
        elif settings.name != before.name and "eval_path" not in changes:
            changes = _same_part(before, settings.name) | changes
    has_eval_path = training_only or "eval_path" in changes or settings.name == "librispeech"
    if "path" in changes and not has_eval_path:
        check_moved(changes["path"], settings.path, settings.eval_path)
    if evaluating and "eval_path" in changes and settings.eval_path is None:
        changes.setdefault("limit", None)  # how many there were of another part says nothing
    settings = dataclasses.replace(settings, **changes)
    settings.check()
    return settings


def _same_part(before: DataConfig, name: str) -> dict[str, Any]:
    """Return what holds the same part out of the data that were trained on, by another name.

    Raises:
        ValueError: if they were split as their corpus comes.
    """
    if before.name not in _OWN:
        raise ValueError(
            f"the network was trained on {before.path} as {before.name}, which has a split of its "
            f"own that {name} does not know; leave out --data, or name what to evaluate on with "
            "--eval-path"
        )
    return {key: getattr(before, key) for key in ("holdout", "split_seed", "eval_path")}
