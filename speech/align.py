"""``blnet align``: makes frame labels from transcripts with a network that was trained by CTC."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from blnet.checks import flag_of
from blnet.commands.answers import shown
from blnet.commands.device import add_device_flag, device_of
from blnet.files import make_folder
from blnet.speech.alignment import FrameLabels, align, expand, fill_blanks
from blnet.speech.config import DataConfig
from blnet.speech.data import load_data
from blnet.speech.data_flags import add_data_flags, data_settings
from blnet.speech.inference import Trained, configuration, load_trained
from blnet.speech.measurement import check_corrupt, say, usable
from blnet.speech.recordings import Recordings
from blnet.speech.tasks import make_target

PROG = "blnet align"
SILENCE = 0.3  # seconds; longer stretches without a character keep some silence
_EXAMPLES = """examples:
  blnet align results/english --output labels/english
  blnet train speech --task frame --data.name manifest --data.path train.tsv --data.labels labels/english"""  # noqa: E501


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="a .safetensors file or a run's folder, of --task ctc")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the labels")
    parser.add_argument("--silence", type=float, default=SILENCE, metavar="S",
                        help="longest stretch without a character that is divided between its "
                        f"neighbours, seconds ({SILENCE:g})")  # fmt: skip
    add_device_flag(parser)
    add_data_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Label the training and the evaluation recordings, write the labels and return 0."""
    if not 0 <= args.silence <= 60:
        raise ValueError(f"--silence must be from 0 to 60 seconds, got {args.silence:g}")
    trained = load_trained(args.checkpoint, ("ctc",))
    settings = data_settings(trained, vars(args))
    make_folder(args.output)
    config = configuration(trained, settings)
    data = load_data(settings, config.task, make_target(config))
    trained.to(device_of(args))
    corrupt: list[tuple[str, str]] = []
    sets = (data.train, data.evaluation)
    _check_names(sets)
    labels = FrameLabels.of(
        (entry for part in sets for entry in _labelled(trained, part, args.silence, corrupt)),
        trained.alphabet,
        trained.features.hop_seconds,
        f"{trained.title}, {trained.source}",
    )
    check_corrupt(corrupt, sum(map(len, sets)), say)
    labels.save(args.output)
    left_out = f", left out {len(corrupt):,}" if corrupt else ""
    print(f"{PROG}: labelled {len(labels):,} recordings of {data.name}{left_out}; train on them: "
          f"{shown(_advice(settings, args.output))}")  # fmt: skip
    return 0


def _advice(data: DataConfig, labels: str) -> str:
    """Return the command that trains on labels of some data."""
    plain = dataclasses.asdict(DataConfig())
    chosen = dataclasses.asdict(dataclasses.replace(data, download=False, labels=labels))
    words = [
        f"{flag_of(f'data.{name}')}={value}"
        for name, value in chosen.items()
        if value != plain[name]
    ]
    return shlex.join(["blnet", "train", "speech", "--task", "frame", *words])


def _check_names(sets: Sequence[Recordings]) -> None:
    """Raise ValueError, before the work is done, if two recordings have one name."""
    names = Counter(one.key for part in sets for one in part.utterances)
    ((name, count),) = names.most_common(1)
    if count > 1:
        raise ValueError(f"recording {name} is in the data {count} times, and labels are found by "
                         "their recording's name; name it once, to train or to evaluate on")  # fmt: skip # noqa: E501


def _labelled(
    trained: Trained, data: Recordings, silence: float, corrupt: list[tuple[str, str]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield key and labels of each recording, a label for every frame of the features."""
    reduction = trained.model.config.time_reduction
    longest = round(silence / trained.features.hop_seconds)
    console = Console(stderr=True)
    shown = track(
        usable(data, corrupt), "aligning", len(data), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    for one, (samples, ids) in shown:
        logits, _ = trained([samples])
        frames = int(trained.features.frames(torch.tensor(len(samples))))
        try:
            path = align(logits[0].log_softmax(-1).cpu(), ids)
        except ValueError as error:
            corrupt.append((one.name, str(error)))
            continue
        dense = fill_blanks(expand(path, reduction, frames), longest)
        yield one.key, dense
