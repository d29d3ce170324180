"""What an evaluation hands over: a table to print, and a folder of files."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from blnet.commands.confusion import (
    CONFUSION,
    PER_CLASS,
    PICTURE,
    draw_confusion,
    write_confusion,
    write_per_class,
)
from blnet.environment import collect, command_line
from blnet.files import written_aside
from blnet.vision.config import DataConfig, VisionConfig
from blnet.vision.data import ImageData
from blnet.vision.inference import Trained, network_facts
from blnet.vision.measurement import Measurement
from blnet.vision.reproduction import Reproduction

RESULTS = "results.json"
UNIT = "images"
_MISSING = "-"


@dataclass(frozen=True)
class Evaluation:
    """A network, the data and what was measured.

    Attributes:
        trained: the network.
        settings: which data were asked for.
        data: the data.
        measured: what was counted.
    """

    trained: Trained
    settings: DataConfig
    data: ImageData
    measured: Measurement


def as_table(evaluations: Sequence[Evaluation], device: str, precision: str) -> Table:
    """Return the table to print: a row for each network.

    Args:
        evaluations: what was measured; at least one.
        device: name of what computed.
        precision: "fp32" or the like.
    """
    data = list(dict.fromkeys(one.data.name for one in evaluations))
    caption = f"{device}, {precision}; images/s with loading; waiting for data"
    table = Table(title="; ".join(data), caption=caption, title_justify="left",
                  caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("network\ncheckpoint", overflow="fold")
    # Two or three figures in a cell: a terminal may have but 80 columns.
    names = ["images\nimages/s\nwaiting", "top-1 %\n95 % interval", "top-5 %", "error %",
             "parameters\nGMACs"]  # fmt: skip
    with_top5 = any(one.measured.top5 is not None for one in evaluations)
    for name in names if with_top5 else [name for name in names if name != "top-5 %"]:
        table.add_column(name, justify="right", no_wrap=True)
    for one in evaluations:
        table.add_row(*_cells(one, with_top5))
    return table


def _cells(one: Evaluation, with_top5: bool) -> list[str]:
    measured, cost = one.measured, one.trained.cost
    low, high = (100 * bound for bound in measured.interval)
    top5 = _MISSING if measured.top5 is None else f"{100 * measured.top5:.2f}"
    return [
        f"{one.trained.title}\n{one.trained.source}",
        f"{measured.images:,}\n{measured.images_per_second:,.0f}\n{measured.waiting:.0%}",
        f"{100 * measured.accuracy:.2f}\n{low:.2f} to {high:.2f}",
        *([top5] if with_top5 else []),
        f"{100 * (1 - measured.accuracy):.2f}",
        f"{cost.parameters:,}\n{cost.macs / 1e9:.4g}",
    ]


def write_results(
    folder: Path,
    evaluations: Sequence[Evaluation],
    config: VisionConfig,
    device: str,
    processes: int,
    paper: Sequence[Reproduction] | None = None,
) -> None:
    """Write results.json, and per_class.csv, confusion.csv and confusion.png of each network.

    Of one network they all lie in the folder; of several, each network's lie in a folder of its own
    inside, which results.json names.

    Args:
        folder: where to; it exists.
        evaluations: what was measured.
        config: batch_size and precision it was measured with.
        device: "cpu" or "cuda".
        processes: how many worked together.
        paper: the reproduction table, if it was asked for.

    Raises:
        OSError: if a file cannot be written.
    """
    places = _places(evaluations)
    for one, place in zip(evaluations, places, strict=True):
        _write_files(folder / place, one)
    found = collect("cpu" if device == "cpu" else None)
    results: dict[str, Any] = {
        "command": command_line(),
        "device": f"{processes} x {found.device}" if processes > 1 else found.device,
        "precision": config.precision,
        "batch": config.batch_size,
        "networks": [_facts(one, place) for one, place in zip(evaluations, places, strict=True)],
        "environment": found.as_dict(),
    }
    if paper is not None:
        results["paper"] = [dataclasses.asdict(row) for row in paper]
    with written_aside(folder / RESULTS) as aside:
        aside.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _places(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return each network's folder inside the output's: that of its run, or its file's name."""
    if len(evaluations) == 1:
        return ["."]
    paths = [Path(one.trained.source) for one in evaluations]
    stems = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    names: list[str] = []
    for stem in stems:
        # None takes a name that another one has of its own: "run-2" may be a run's folder.
        others = (f"{stem}-{number}" for number in itertools.count(2))
        free = (name for name in others if name not in names and name not in stems)
        names.append(next(free) if stem in names else stem)
    return names


def _write_files(place: Path, one: Evaluation) -> None:
    names, measured = one.data.classes, one.measured
    place.mkdir(exist_ok=True)
    write_per_class(place / PER_CLASS, names, measured.confusion, measured.top5_hits, UNIT)
    write_confusion(place / CONFUSION, names, measured.confusion)
    title = f"{one.trained.title}: {100 * measured.accuracy:.2f} % of {measured.images:,} images"
    draw_confusion(place / PICTURE, names, measured.confusion, title)


def _facts(one: Evaluation, place: str) -> dict[str, Any]:
    trained, measured = one.trained, one.measured
    return {
        "checkpoint": trained.source,
        "files": place,
        "model": network_facts(trained),
        "cost": {
            "parameters": trained.cost.parameters,
            "macs": trained.cost.macs,
            "input_size": list(trained.cost.input_size),
        },
        "data": {"title": one.data.name, "settings": dataclasses.asdict(one.settings)},
        "preprocessing": one.data.preprocessing.as_dict(),
        "metrics": {
            "accuracy": measured.accuracy,
            "accuracy_interval_95": list(measured.interval),
            "error": 1 - measured.accuracy,
            "top5": measured.top5,
            "loss": measured.loss,
        },
        "counts": {
            "images": measured.images,
            "correct": measured.correct,
            "correct_top5": measured.correct_top5,
            "classes": len(one.data.classes),
            "corrupt": len(measured.corrupt),
        },
        "corrupt": [{"name": name, "reason": why} for name, why in measured.corrupt],
        "seconds": measured.seconds,
        "images_per_second": measured.images_per_second,
        "waiting": measured.waiting,
    }
