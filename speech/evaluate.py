"""``blnet evaluate speech``: measures trained networks on recordings."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from blnet.checks import positive
from blnet.commands.answers import shown
from blnet.commands.confusion import (
    CONFUSION,
    PER_CLASS,
    PICTURE,
    draw_confusion,
    write_confusion,
    write_per_class,
)
from blnet.commands.device import add_device_flag, device_of
from blnet.environment import collect, command_line
from blnet.files import make_folder, written_aside
from blnet.profiling import Profile
from blnet.speech.config import DataConfig
from blnet.speech.data import SpeechData, load_data
from blnet.speech.data_flags import add_data_flags, data_settings
from blnet.speech.inference import Trained, configuration, load_trained
from blnet.speech.measurement import Line, Measurement, measure
from blnet.speech.tasks import make_target, make_task
from blnet.speech.transcribe import add_decoder_flags, check_no_decoder, decoder_of
from blnet.training.display import plain_console

RESULTS, TRANSCRIPTS = "results.json", "transcripts.csv"
UNIT = "recordings"
_BATCH = 32
_EXAMPLES = """examples:
  blnet evaluate speech results/words
  blnet evaluate speech results/words results/words/baseline --output results/words/evaluation
  blnet evaluate speech results/english --data manifest --eval-path mine.tsv --beam-width 16"""


@dataclass(frozen=True)
class Evaluation:
    """A network, the data and what was measured.

    Attributes:
        trained: the network.
        cost: its parameters, and MACs for a second of speech.
        settings: which data were asked for.
        data: the data.
        decoder: which decoder wrote (ctc and frame), "" otherwise.
        measured: what was counted.
    """

    trained: Trained
    cost: Profile
    settings: DataConfig
    data: SpeechData
    decoder: str
    measured: Measurement


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT",
        help="a .safetensors file or a run's folder (its best network)",
    )  # fmt: skip
    add_data_flags(parser)
    add_decoder_flags(parser)
    parser.add_argument("--batch", type=positive, default=_BATCH, metavar="N",
                        help=f"recordings taken at once ({_BATCH})")  # fmt: skip
    add_device_flag(parser)
    parser.add_argument(
        "--output", metavar="DIR",
        help="write results.json there, and per_class.csv, confusion.csv and confusion.png, or "
        "transcripts.csv",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Evaluate every checkpoint, print the table and write the files that were asked for."""
    device = device_of(args)
    if args.output is not None:
        make_folder(args.output)
    loaded = [load_trained(name) for name in args.checkpoints]  # whatever is wrong shows first
    if all(trained.head == "keyword" for trained in loaded):
        check_no_decoder(args)
    found = [evaluate(trained.to(device), args) for trained in loaded]
    environment = collect("cpu" if device.type == "cpu" else None)
    console = plain_console()
    for kind in (True, False):
        some = [one for one in found if (one.measured.confusion is not None) == kind]
        if some:
            console.print(as_table(some, environment.device))
    if args.output is not None:
        write_results(Path(args.output), found, args.batch, environment)
        print(f"wrote {args.output}")
    return 0


def evaluate(trained: Trained, args: argparse.Namespace) -> Evaluation:
    """Return how a network does on the data that flags ask for.

    Raises:
        ValueError: if the data does not fit the network, or is not there.
    """
    settings = data_settings(trained, vars(args), evaluating=True)
    spells = trained.head != "keyword"
    decoder = decoder_of(args, trained) if spells else None
    # A network of frame labels is measured by transcripts: other data have no labels.
    config = configuration(trained, settings, task="ctc" if spells else "keyword")
    data = load_data(
        settings, config.task, make_target(config), parts="evaluation",
        classes=trained.classes or None,
    )  # fmt: skip
    measured = measure(trained, make_task(config, data), args.batch, decoder)
    title = "" if decoder is None else decoder.title
    return Evaluation(trained, trained.cost(), settings, data, title, measured)


def as_table(evaluations: Sequence[Evaluation], device: str) -> Table:
    """Return the table to print: a row for each network, all for keywords or none of them.

    Args:
        evaluations: what was measured; at least one.
        device: name of what computed.
    """
    data = list(dict.fromkeys(one.data.name for one in evaluations))
    decoders = list(dict.fromkeys(one.decoder for one in evaluations if one.decoder))
    caption = "; ".join([device, *(f"decoder: {name}" for name in decoders)])
    table = Table(title="; ".join(data), caption=caption, title_justify="left",
                  caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("network\ncheckpoint", overflow="fold")
    words = evaluations[0].measured.confusion is not None
    figures = ["accuracy %\n95 % interval", "error %"] if words else ["WER %", "CER %"]
    names = ["recordings\nminutes", *figures, "real-time\nfactor", "parameters\nGMACs/s"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in evaluations:
        table.add_row(*_cells(one))
    return table


def _cells(one: Evaluation) -> list[str]:
    measured = one.measured
    if measured.accuracy is not None and measured.interval is not None:
        low, high = (100 * bound for bound in measured.interval)
        figures = [f"{100 * measured.accuracy:.2f}\n{low:.2f} to {high:.2f}",
                   f"{100 * (1 - measured.accuracy):.2f}"]  # fmt: skip
    else:
        figures = [f"{100 * measured.rates[name]:.2f}" for name in ("wer", "cer")]
    return [
        f"{one.trained.title}\n{one.trained.source}",
        f"{measured.recordings:,}\n{measured.audio_seconds / 60:.1f}",
        *figures,
        f"{measured.real_time_factor:.4f}",
        f"{one.cost.parameters:,}\n{one.cost.macs / 1e9:.4g}",
    ]


def write_results(
    folder: Path, evaluations: Sequence[Evaluation], batch: int, environment: Any
) -> None:
    """Write results.json, and each network's files: in the folder, or of several in one each.

    Raises:
        OSError: if a file cannot be written.
    """
    places = ["."] if len(evaluations) == 1 else [f"{n}" for n in range(1, len(evaluations) + 1)]
    for one, place in zip(evaluations, places, strict=True):
        _write_files(folder / place, one)
    results = {
        "command": command_line(),
        "device": environment.device,
        "batch": batch,
        "networks": [_facts(one, place) for one, place in zip(evaluations, places, strict=True)],
        "environment": environment.as_dict(),
    }
    with written_aside(folder / RESULTS) as aside:
        aside.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_files(place: Path, one: Evaluation) -> None:
    place.mkdir(exist_ok=True)
    measured, names = one.measured, one.data.classes
    if measured.confusion is None:
        write_transcripts(place / TRANSCRIPTS, measured.lines)
        return
    assert measured.accuracy is not None
    write_per_class(place / PER_CLASS, names, measured.confusion, None, UNIT)
    write_confusion(place / CONFUSION, names, measured.confusion)
    title = (
        f"{one.trained.title}: {100 * measured.accuracy:.2f} % of {measured.recordings:,} {UNIT}"
    )
    draw_confusion(place / PICTURE, names, measured.confusion, title)


def write_transcripts(path: Path, lines: Sequence[Line]) -> None:
    """Write what was said and what was written of each recording, as CSV.

    Raises:
        OSError: if it cannot be written.
    """
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["recording", "reference", "hypothesis"])
        writer.writerows([shown(line.name), line.reference, line.hypothesis] for line in lines)


def _facts(one: Evaluation, place: str) -> dict[str, Any]:
    trained, measured = one.trained, one.measured
    metrics: dict[str, Any] = dict(measured.rates)
    if measured.interval is not None:
        metrics = {"accuracy": measured.accuracy, "accuracy_interval_95": list(measured.interval)}
    return {
        "checkpoint": trained.source,
        "files": place,
        "model": {"title": trained.title, **trained.extra["network"]},
        "cost": {"parameters": one.cost.parameters, "macs_per_second": one.cost.macs},
        "data": {"title": one.data.name, "settings": dataclasses.asdict(one.settings)},
        "features": trained.features.as_dict(),
        "decoder": one.decoder or None,
        "metrics": metrics,
        "recordings": measured.recordings,
        "audio_seconds": measured.audio_seconds,
        "seconds": measured.seconds,
        "corrupt": [{"name": shown(name), "reason": why} for name, why in measured.corrupt],
    }
