"""The recordings of a run: what to train and evaluate on, by the name of the corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from blnet.speech import corpora
from blnet.speech.commands import load_speech_commands
from blnet.speech.config import DataConfig, TaskName
from blnet.speech.corpora import Parts, Wanted
from blnet.speech.recordings import Recordings, Utterance
from blnet.speech.splits import balanced, hold_out_speaker
from blnet.speech.synth import load_synth

__all__ = ["SpeechData", "load_data"]

Target = Callable[[Utterance], Tensor]
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SpeechData:
    """What a run trains and is evaluated on.

    Attributes:
        train: data set of (samples float32 (n,), target int64), varied by the transform; of length
            0 where only the evaluation was asked for.
        evaluation: likewise, not varied; the longest recordings come first, so that the batches
            hold recordings of similar length. Of length 0 where only the training was asked for.
        classes: the words in order (keyword); () otherwise.
        name: what to call the set in the log.
    """

    train: Recordings
    evaluation: Recordings
    classes: tuple[str, ...]
    name: str


class _Loader(Protocol):
    def __call__(self, data: DataConfig, wanted: Wanted = "both") -> Parts: ...


_LOADERS: dict[str, _Loader] = {
    "speech_commands": load_speech_commands,
    "fsdd": corpora.load_fsdd,
    "yesno": corpora.load_yesno,
    "librispeech": corpora.load_librispeech,
    "folder": corpora.load_folder,
    "manifest": corpora.load_manifest,
}
_WITH_EVAL_PATH = ("librispeech", "folder", "manifest")


def load_data(
    data: DataConfig,
    task: TaskName,
    target: Target | None = None,
    transform: Transform | None = None,
    *,
    parts: Wanted = "both",
    classes: Sequence[str] | None = None,
    evaluation_target: Target | None = None,
) -> SpeechData:
    """Return the recordings that a configuration names.

    What is split, and how, depends on `data.split_seed` alone, so that all runs are measured on the
    same recordings.

    Args:
        data: which recordings.
        task: keyword needs recordings with labels, ctc and frame need transcripts.
        target: what the network is to answer to a recording, int64; default: the number of its
            class (keyword).
        transform: varies the samples in training; default: not at all.
        parts: evaluation leaves the training recordings out, which then need not be there, and
            training those to evaluate on.
        evaluation_target: the same for evaluation, where it differs: nothing is played faster then.
        classes: the words of a trained network in its order (keyword); default: the corpus's.

    Raises:
        ValueError: of one sentence that names the setting, if one makes no sense or the recordings
            are not there, cannot be read or do not fit the task or together.
        ImportError: if a package is missing that the corpus needs.
    """
    data.check()
    _check_looked_at(data)
    if task != "keyword" and data.longer == "cut":
        raise ValueError(
            f"--data.longer cut would leave transcripts of the task {task} longer than their "
            "recordings; take --data.longer skip"
        )
    found = _parts(data, task, parts)
    words = tuple(classes or found.classes) if task == "keyword" else ()
    train = [] if parts == "evaluation" else found.train
    held = [] if parts == "training" else found.evaluation
    for utterances in (train, held):
        _check(utterances, data, task, words)
    if task == "keyword" and parts != "evaluation" and len(words) < 2:
        raise ValueError(
            f"{data.name} has {len(words)} word{'s' * (len(words) != 1)}, and there is nothing to "
            "tell apart below two; name data of two words at least with --data.path"
        )
    chosen = target or _ClassIndex(words)
    sets = []
    for utterances, answer, variation in (
        (train, chosen, transform),
        (_longest_first(held), evaluation_target or chosen, None),
    ):
        limited = balanced(utterances, data.limit, data.split_seed)
        sets.append(
            Recordings(limited, answer, data.sample_rate, data.max_seconds, data.longer, variation)
        )
    training, evaluation = sets
    if parts != "training":
        _check_kept(evaluation, data, "evaluate")
    if parts != "evaluation":
        _check_kept(training, data, "train")
    return SpeechData(training, evaluation, words, _title(data, training, evaluation))


def _check_looked_at(data: DataConfig) -> None:
    """Raise ValueError if a path is given that the corpus has no use for."""
    if data.name == "synth" and data.path is not None:
        raise ValueError(
            f"--data.path {data.path} is not looked at by the corpus synth, which is spoken here; "
            "name the path's corpus with --data.name, or leave it out"
        )
    if data.name not in _WITH_EVAL_PATH and data.eval_path is not None:
        raise ValueError(
            f"--data.eval-path {data.eval_path} is not looked at by the corpus {data.name}, which "
            "is split as it comes; leave it out, or name the path's corpus with --data.name"
        )


def _parts(data: DataConfig, task: TaskName, wanted: Wanted) -> Parts:
    if data.name == "synth":
        found = load_synth(data, task)
    else:
        # All recordings of a speaker are evaluated on, those too that the corpus would train on.
        found = _LOADERS[data.name](data, wanted if data.holdout_speaker is None else "both")
    if data.holdout_speaker is None:
        return found
    pool = [*found.train, *found.evaluation]
    return Parts(*hold_out_speaker(pool, data.holdout_speaker, data.name), found.classes)


def _longest_first(utterances: Sequence[Utterance]) -> list[Utterance]:
    return sorted(utterances, key=lambda one: -one.seconds)


class _ClassIndex:
    """The number of a recording's class, int64 (); a class, so that it can be pickled."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(classes)}

    def __call__(self, utterance: Utterance) -> Tensor:
        return torch.tensor(self._numbers[utterance.label], dtype=torch.int64)


def _check(
    utterances: Sequence[Utterance], data: DataConfig, task: TaskName, words: Sequence[str]
) -> None:
    """Raise ValueError if a recording does not fit the task."""
    needs = "label" if task == "keyword" else "text"
    lacking = [one for one in utterances if not getattr(one, needs)]
    if lacking:
        what = "label" if task == "keyword" else "transcript"
        raise ValueError(
            f"--task {task} needs a {what} for every recording, and {len(lacking):,} of "
            f"{data.name} have none ({lacking[0].name}); choose other data with "
            "--data.name, or another task"
        )
    strange = sorted({one.label for one in utterances} - set(words)) if words else []
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ValueError(
            f"{data.name} has a class {strange[0]!r}{more} to evaluate on that is not trained on; "
            "give both parts the same classes, or take another --data.split-seed if a share of the "
            "speakers is held out"
        )


def _check_kept(part: Recordings, data: DataConfig, verb: str) -> None:
    """Raise ValueError if no recordings of a part are left."""
    if len(part):
        return
    if part.skipped:
        raise ValueError(
            f"--data.max-seconds {data.max_seconds:g} leaves no recordings of {data.name} to "
            f"{verb} on; raise it"
        )
    raise ValueError(f"{data.name} holds no recordings to {verb} on; add some")


def _title(data: DataConfig, train: Recordings, evaluation: Recordings) -> str:
    """Return what the log calls the data: counts, durations, speakers, rate."""
    sets = [one for one in (train, evaluation) if len(one)]
    counts = " and ".join(f"{len(one):,} {'training' if one is train else 'test'}" for one in sets)
    minutes = " and ".join(f"{one.seconds.sum() / 60:,.1f}" for one in sets)
    speakers = {item.speaker for one in sets for item in one.utterances} - {""}
    details = [f"{counts} recordings", f"{minutes} minutes"]
    if speakers:
        details.append(f"of {len(speakers):,} speaker{'s' * (len(speakers) > 1)}")
    skipped = sum(one.skipped for one in (train, evaluation))
    if skipped:
        details.append(f"{skipped:,} longer than {data.max_seconds:g} s left out")
    return f"{data.name} ({', '.join(details)}, at {data.sample_rate / 1000:g} kHz)"
