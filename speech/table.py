"""``blnet table --speech``: the paper's acoustic models beside our recount.

The reported figures are facts about the published networks; parameters and MACs are counted anew
from our own networks whenever the table is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blnet.checks import positive
from blnet.commands.tables import add_flags, as_csv, put
from blnet.profiling import profile
from blnet.speech.models import bl_resnet22, resnet22

BINS, CHANNELS, FRAMES = 64, 3, 100
SOURCE = (
    'Reported: Chen et al., "Big-Little Net", ICLR 2019, Switchboard 2000 h, word error rate on '
    "Hub5; parameters without the layer of tied states. The plan of those networks was not to be "
    "had, nor the length of the recordings that their GMACs are for, so that only the shares of "
    "the plain network's MACs compare. Ours: counted just now, without the last layer, at "
    "{frames} frames ({seconds:g} s) of 64 bands in three channels, time reduction {reduction}."
)


@dataclass(frozen=True)
class Reported:
    """One of the paper's acoustic models and what was reported of it.

    Attributes:
        network: its name in print.
        options: options of `bl_resnet22`; None for the plain network.
        wer: word error rate on Hub5, percent.
        gmacs: GMACs.
        parameters: parameters, millions.
    """

    network: str
    options: dict[str, Any] | None
    wer: float
    gmacs: float
    parameters: float


# fmt: off
REPORTED = (
    Reported("ResNet-22", None, 14.67, 1.11, 3.02),
    Reported("bL-ResNet-22", {"alpha": 4, "beta": 1}, 14.72, 0.68, 3.15),
    Reported("bL-ResNet-22", {"alpha": 4, "beta": 2}, 14.47, 0.66, 3.11),
    Reported("bL-ResNet-22", {"alpha": 4, "beta": 3}, 14.66, 0.65, 3.10),
    Reported("bL-ResNet-22", {"alpha": 2, "beta": 3}, 14.46, 0.77, 3.07),
    Reported("bL-PYR-ResNet-22", {"alpha": 4, "beta": 1, "pyramid": True}, 14.50, 0.98, 3.32),
)
# fmt: on


@dataclass(frozen=True)
class Row:
    """A reported network beside our recount; the fields are the columns of JSON and CSV.

    Shares are of the plain network's MACs.
    """

    network: str
    alpha: int | None
    beta: int | None
    reported_wer_percent: float
    reported_gmacs: float
    reported_share: float
    gmacs: float
    share: float
    reported_parameters_millions: float
    parameters_millions: float
    difference_percent: float
    macs: int
    parameters: int


def recount(frames: int = FRAMES, time_reduction: int = 1) -> list[Row]:
    """Return the table, with every network of it counted on the meta device.

    Args:
        frames: of the map that MACs are counted for.
        time_reduction: of the networks.
    """
    counted = [_count(reported, frames, time_reduction) for reported in REPORTED]
    plain, plain_macs = REPORTED[0], counted[0][1]
    rows = []
    for reported, (parameters, macs) in zip(REPORTED, counted, strict=True):
        options = reported.options or {}
        rows.append(
            Row(
                network=reported.network,
                alpha=options.get("alpha"),
                beta=options.get("beta"),
                reported_wer_percent=reported.wer,
                reported_gmacs=reported.gmacs,
                reported_share=round(reported.gmacs / plain.gmacs, 3),
                gmacs=round(macs / 1e9, 3),
                share=round(macs / plain_macs, 3),
                reported_parameters_millions=reported.parameters,
                parameters_millions=round(parameters / 1e6, 3),
                difference_percent=round(100 * (parameters / 1e6 / reported.parameters - 1), 1),
                macs=macs,
                parameters=parameters,
            )
        )
    return rows


def _count(reported: Reported, frames: int, time_reduction: int) -> tuple[int, int]:
    """Return parameters and MACs without the last layer, whose classes are the task's."""
    common: dict[str, Any] = {"in_channels": CHANNELS, "time_reduction": time_reduction}
    with torch.device("meta"):
        if reported.options is None:
            model = resnet22(**common)
        else:
            model = bl_resnet22(**reported.options, **common)
    found = profile(model, (1, CHANNELS, BINS, frames))
    last = model.fc.weight.numel()
    return found.parameters - last - model.fc.out_features, found.macs - last


_HEADINGS = (
    "network", "alpha", "beta", "WER %: reported", "GMACs: reported", "share", "ours", "share",
    "parameters, M: reported", "ours", "difference",
)  # fmt: skip


def _cells(row: Row) -> list[str]:
    return [
        row.network,
        "-" if row.alpha is None else str(row.alpha),
        "-" if row.beta is None else str(row.beta),
        f"{row.reported_wer_percent:.2f}",
        f"{row.reported_gmacs:.2f}",
        f"{row.reported_share:.2f}",
        f"{row.gmacs:.3f}",
        f"{row.share:.2f}",
        f"{row.reported_parameters_millions:.2f}",
        f"{row.parameters_millions:.3f}",
        f"{row.difference_percent:+.1f} %",
    ]


def as_text(rows: Sequence[Row], source: str) -> str:
    """Return the table in aligned columns."""
    lines = [list(_HEADINGS), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            [f"{line[0]:<{widths[0]}}"]
            + [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*text, "", textwrap.fill(source, 100)]) + "\n"


def as_markdown(rows: Sequence[Row], source: str) -> str:
    """Return the table as a Markdown document."""
    marks = ["---", *["---:"] * (len(_HEADINGS) - 1)]
    lines = [list(_HEADINGS), marks, *map(_cells, rows)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", source]) + "\n"


def as_json(rows: Sequence[Row], source: str) -> str:
    """Return the table as a JSON object with its source and rows."""
    table = {"source": source, "rows": [dataclasses.asdict(row) for row in rows]}
    return json.dumps(table, indent=2) + "\n"


FORMATS: dict[str, Callable[[Sequence[Row], str], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "json": as_json,
    "csv": lambda rows, _: as_csv(rows),  # which has no place for the source
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_flags(parser, FORMATS)
    parser.add_argument(
        "--frames", type=positive, default=FRAMES, metavar="N",
        help=f"frames, 10 ms each, that MACs are counted for (default: {FRAMES}, a second)",
    )  # fmt: skip
    parser.add_argument(
        "--time-reduction", type=int, choices=(1, 2, 4), default=1,
        help="frames to one of the answer (default: 1, as for frame labels)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the table, or write it whole to a file, and return the exit status."""
    source = SOURCE.format(
        frames=args.frames, seconds=args.frames / 100, reduction=args.time_reduction
    )
    put(FORMATS[args.format](recount(args.frames, args.time_reduction), source), args.output)
    return 0
