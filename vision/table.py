"""``blnet table``: the paper's recognition table beside our recount.

The errors and reference figures below are facts about published networks, with their sources.
Parameters and MACs are counted anew from our own networks whenever the table is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

import blnet.vision.models  # noqa: F401  (registers the networks by name)
from blnet import registry
from blnet.commands.tables import add_flags, as_csv, put
from blnet.profiling import profile

INPUT_SIZE = (1, 3, 224, 224)
PAPER = "paper"
OFFICIAL = "official checkpoints"
SOURCE = (
    'Errors: ImageNet top-1, single 224x224 crop, Chen et al., "Big-Little Net", ICLR 2019 '
    f"({PAPER}) and the authors' retrained checkpoints ({OFFICIAL}). Reference: the published "
    "networks counted with torch's FLOP counter, 2 FLOPs a MAC (the paper's \"FLOPs\" are MACs), "
    "except where a note says published. Ours: counted just now, at 224x224."
)


@dataclass(frozen=True)
class Published:
    """One published network and what is known of it.

    Attributes:
        group: where its error comes from, `PAPER` or `OFFICIAL`.
        network: its name in print.
        name: its name in our registry.
        alpha: its alpha; None for the plain network.
        beta: its beta; None for the plain network.
        top1_error: ImageNet top-1 error in percent; None where none was published.
        gmacs: reference GMACs, to the digits given.
        parameters: reference parameter count.
        note: what is to be said about the figures.
    """

    group: str
    network: str
    name: str
    alpha: int | None
    beta: int | None
    top1_error: float | None
    gmacs: str
    parameters: int
    note: str = ""


# fmt: off
PUBLISHED = (
    Published(PAPER, "ResNet-50", "resnet50", None, None, 23.66, "4.089", 25_557_032),
    Published(PAPER, "bL-ResNet-50", "bl_resnet50", 2, 2, 22.72, "2.911", 26_974_632),
    Published(PAPER, "bL-ResNet-50", "bl_resnet50", 2, 4, 22.69, "2.856", 26_694_568),
    Published(PAPER, "bL-ResNet-50", "bl_resnet50", 4, 2, 23.20, "2.491", 26_306_856),
    Published(PAPER, "bL-ResNet-50", "bl_resnet50", 4, 4, 23.15, "2.477", 26_236_456),
    Published(OFFICIAL, "bL-ResNet-50", "bl_resnet50", 2, 4, 22.41, "2.856", 26_694_568),
    Published(OFFICIAL, "bL-ResNet-101", "bl_resnet101", 2, 4, 21.34, "3.893", 41_851_560),
    Published(OFFICIAL, "bL-ResNeXt-50 32x4d", "bl_resnext50_32x4d", 2, 4, 21.62, "3.027",
              26_192_168),
    Published(OFFICIAL, "bL-ResNeXt-101 32x4d", "bl_resnext101_32x4d", 2, 4, 20.87, "4.079",
              41_512_744),
    Published(OFFICIAL, "bL-ResNeXt-101 64x4d", "bl_resnext101_64x4d", 2, 4, 20.34, "7.142",
              77_355_816, "7.97 GMACs were published, which goes with beta 2 (our "
              "count there: {beta2}); the reference here is a recount at beta 4"),
    Published(OFFICIAL, "bL-SEResNeXt-50 32x4d", "bl_seresnext50_32x4d", 2, 4, 21.44, "3.030",
              28_767_120),
    Published(OFFICIAL, "bL-SEResNeXt-101 32x4d", "bl_seresnext101_32x4d", 2, 4, 21.04, "4.08",
              45_881_952, "4.08 GMACs is the published figure, to two decimals; the difference is "
              "taken to two decimals as well"),
    Published(OFFICIAL, "bL-ResNet-152", "bl_resnet152", 2, 4, None, "5.040", 57_359_016,
              "no checkpoint of this network was published, so no error is known"),
)
# fmt: on


@dataclass(frozen=True)
class Row:
    """A published network beside our recount; the fields are the columns of JSON and CSV."""

    group: str
    network: str
    name: str
    alpha: int | None
    beta: int | None
    top1_error_percent: float | None
    reference_gmacs: float
    gmacs: float
    difference_gmacs: float
    macs: int
    reference_parameters: int
    parameters: int
    difference_parameters: int
    note: str


def recount() -> list[Row]:
    """Return the table, with every network of it counted on the meta device."""
    return [_row(published) for published in PUBLISHED]


def _row(published: Published) -> Row:
    parameters, macs = _count(published.name, published.alpha, published.beta)
    # A figure of two decimals can only be compared to two decimals.
    decimals = len(published.gmacs.partition(".")[2])
    difference = round(round(macs / 1e9, decimals) - float(published.gmacs), decimals)
    note = published.note
    if "{beta2}" in note:
        note = note.format(beta2=f"{_count(published.name, published.alpha, 2)[1] / 1e9:.3f}")
    return Row(
        group=published.group,
        network=published.network,
        name=published.name,
        alpha=published.alpha,
        beta=published.beta,
        top1_error_percent=published.top1_error,
        reference_gmacs=float(published.gmacs),
        gmacs=round(macs / 1e9, 3),
        difference_gmacs=difference,
        macs=macs,
        reference_parameters=published.parameters,
        parameters=parameters,
        difference_parameters=parameters - published.parameters,
        note=note,
    )


@cache
def _count(name: str, alpha: int | None, beta: int | None) -> tuple[int, int]:
    """Return parameters and MACs; the same network stands in the table more than once."""
    options = {} if alpha is None else {"alpha": alpha, "beta": beta}
    with torch.device("meta"):
        model = registry.build(name, **options)
    counted = profile(model, INPUT_SIZE)
    return counted.parameters, counted.macs


# fmt: off
_HEADINGS = (
    "network", "alpha", "beta", "top-1 error %", "GMACs: reference", "ours", "difference",
    "parameters: reference", "ours", "difference", "note",
)
# fmt: on


def _cells(row: Row, mark: str) -> list[str]:
    missing = "-"
    return [
        row.network,
        missing if row.alpha is None else str(row.alpha),
        missing if row.beta is None else str(row.beta),
        missing if row.top1_error_percent is None else f"{row.top1_error_percent:.2f}",
        _reference_gmacs(row),
        f"{row.gmacs:.3f}",
        _signed(row.difference_gmacs, ".3f"),
        f"{row.reference_parameters:,}",
        f"{row.parameters:,}",
        _signed(row.difference_parameters, ","),
        mark,
    ]


def _reference_gmacs(row: Row) -> str:
    # As it was given: "4.08" must not turn into a "4.080" that nobody published.
    given = {(p.group, p.name, p.alpha, p.beta): p.gmacs for p in PUBLISHED}
    return given[row.group, row.name, row.alpha, row.beta]


def _signed(value: float, form: str) -> str:
    return f"{value:+{form}}" if value else f"{0:{form}}"


def _sections(rows: Sequence[Row]) -> tuple[dict[str, list[list[str]]], list[str]]:
    """Return the cells of each group's rows, and the notes that their last cells point to."""
    sections: dict[str, list[list[str]]] = {}
    notes: list[str] = []
    for row in rows:
        if row.note:
            notes.append(row.note)
        mark = f"[{len(notes)}]" if row.note else ""
        sections.setdefault(row.group, []).append(_cells(row, mark))
    return sections, notes


def as_text(rows: Sequence[Row]) -> str:
    """Return the table in aligned columns."""
    sections, notes = _sections(rows)
    cells = [list(_HEADINGS), *(cell for section in sections.values() for cell in section)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]

    def aligned(line: Sequence[str]) -> str:
        first, *rest = zip(line, widths, strict=True)
        padded = [f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in rest)]
        return "  ".join(padded).rstrip()

    lines = [aligned(_HEADINGS)]
    for group, section in sections.items():
        lines += ["", f"{group}:", *(aligned(line) for line in section)]
    told = [*(f"[{number}] {note}." for number, note in enumerate(notes, 1)), SOURCE]
    return "\n".join([*lines, "", *(textwrap.fill(text, 100) for text in told)]) + "\n"


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the table as a Markdown document."""
    sections, notes = _sections(rows)
    lines = []
    for group, section in sections.items():
        lines += [f"**{group}**", "", _piped(_HEADINGS)]
        lines += [_piped(["---", *["---:"] * (len(_HEADINGS) - 2), "---"])]
        lines += [*(_piped(line) for line in section), ""]
    lines += [f"{number}. {note}." for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", SOURCE]) + "\n"


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_json(rows: Sequence[Row]) -> str:
    """Return the table as a JSON object with its source, input size and rows."""
    table = {
        "source": SOURCE,
        "input_size": INPUT_SIZE,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    return json.dumps(table, indent=2) + "\n"


FORMATS = {"text": as_text, "markdown": as_markdown, "json": as_json, "csv": as_csv}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_flags(parser, FORMATS)
    parser.epilog = "'blnet table --speech' prints the table of the paper's acoustic models."


def run(args: argparse.Namespace) -> int:
    """Print the table, or write it whole to a file, and return the exit status."""
    put(FORMATS[args.format](recount()), args.output)
    return 0
