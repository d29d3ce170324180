"""The paper's recognition table beside what was measured; nothing stands for what was not run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from rich import box
from rich.table import Table
from torch import nn
from torchvision.models import ResNet

from blnet import registry
from blnet.keys import shapes_of
from blnet.network import BigLittleNet
from blnet.vision.classes import IMAGENET_CLASSES
from blnet.vision.config import DataConfig
from blnet.vision.preprocessing import IMAGENET, Preprocessing
from blnet.vision.table import PUBLISHED, Published

VALIDATION_IMAGES = 50_000  # in ImageNet's validation set (ILSVRC 2012)
NOT_RUN = "not run"
_MISSING = "-"


@dataclass(frozen=True)
class Measured:
    """What was measured of one checkpoint on ImageNet's validation set.

    Attributes:
        source: the checkpoint, as the user named it.
        rows: the table's rows that its network is; see `matching`.
        error: top-1 error, percent.
        interval: 95 % interval of that error, percent.
        images: on how many images.
    """

    source: str
    rows: tuple[Published, ...]
    error: float
    interval: tuple[float, float]
    images: int


@dataclass(frozen=True)
class Reproduction:
    """One row of the table; the fields are those of the JSON. Errors are top-1, in percent.

    Attributes:
        group: where the published error comes from.
        network: the network's name in print.
        name: its name in our registry.
        alpha: its alpha; None for the plain network.
        beta: its beta; None for the plain network.
        published_error_percent: None where none was published.
        checkpoint: what was measured; None: not run, and all that follows is None as well.
        measured_error_percent: on `images` images.
        interval_percent: 95 % interval of the measured error.
        difference_points: measured minus published; None where none was published.
        images: images it was measured on.
    """

    group: str
    network: str
    name: str
    alpha: int | None
    beta: int | None
    published_error_percent: float | None
    checkpoint: str | None = None
    measured_error_percent: float | None = None
    interval_percent: tuple[float, float] | None = None
    difference_points: float | None = None
    images: int | None = None


def check_data(data: DataConfig) -> None:
    """Check that data are those of the paper's table, as far as their settings tell.

    Raises:
        ValueError: if they are not ImageNet's whole validation set.
    """
    if data.name != "imagenet":
        raise ValueError(
            "--paper compares errors on ImageNet's validation set, and the data is "
            f"{data.name}; add --data imagenet --data-path FOLDER, or leave --paper out"
        )
    if data.limit is not None:
        raise ValueError(
            f"--paper compares errors on ImageNet's whole validation set; leave out --limit "
            f"{data.limit}, or --paper"
        )


def check_preprocessing(source: str, preprocessing: Preprocessing) -> None:
    """Check that a network sees pictures as those of the paper's table did.

    Raises:
        ValueError: if it sees others.
    """
    wanted = IMAGENET.size, IMAGENET.resized
    found = preprocessing.size, preprocessing.resized
    if found != wanted:
        raise ValueError(
            f"--paper compares errors on crops of {wanted[0]} pixels out of {wanted[1]}, and "
            f"{source} takes {found[0]} out of {found[1]}; leave it out, or --paper"
        )


def check_classes(classes: int) -> None:
    """Check that data have as many classes as ImageNet.

    Raises:
        ValueError: if not.
    """
    if classes != IMAGENET_CLASSES:
        raise ValueError(
            f"--paper compares errors on ImageNet's {IMAGENET_CLASSES} classes, and the data has "
            f"{classes}; name the folder of all of them with --data-path"
        )


def matching(model: nn.Module) -> tuple[Published, ...]:
    """Return the rows of the paper's table that a network is, of both groups.

    A network is a row's if its configuration is (beta may differ where that changes no layer); the
    plain ResNet-50 is so as torchvision's and as ours with one branch.
    """
    return tuple(row for row in PUBLISHED if _is_row(model, row))


def _is_row(model: nn.Module, row: Published) -> bool:
    if row.alpha is None or row.beta is None:
        return _is_plain(model, row.name)
    if type(model) is not BigLittleNet or model.config.branches == 1:
        return False
    reference = cast("BigLittleNet", _reference(row.name, row.alpha, row.beta))
    same = dataclasses.replace(model.config, beta=row.beta) == reference.config
    return same and model.state_dict().keys() == reference.state_dict().keys()


def _is_plain(model: nn.Module, name: str) -> bool:
    if type(model) is BigLittleNet:
        ours = cast("BigLittleNet", _reference(f"bl_{name}", None, None)).config
        mine = model.config
        return dataclasses.replace(mine, alpha=ours.alpha, beta=ours.beta) == ours
    return isinstance(model, ResNet) and shapes_of(model) == shapes_of(_reference(name, None, None))


@cache
def _reference(name: str, alpha: int | None, beta: int | None) -> nn.Module:
    """Return a network of the registry on the meta device; without alpha, its plain form."""
    options: dict[str, Any] = {"alpha": alpha, "beta": beta}
    if alpha is None:
        options = {"branches": 1} if registry.is_big_little(name) else {}
    with torch.device("meta"):
        return registry.build(name, **options)


def reproduce(measured: Sequence[Measured]) -> list[Reproduction]:
    """Return the table: a row for each measured checkpoint, and those that none was given for."""
    rows = []
    for published in PUBLISHED:
        found = [one for one in measured if published in one.rows]
        rows += [_row(published, one) for one in found or (None,)]
    return rows


def _row(published: Published, measured: Measured | None) -> Reproduction:
    error = published.top1_error
    row = Reproduction(
        published.group, published.network, published.name, published.alpha, published.beta, error
    )
    if measured is None:
        return row
    return dataclasses.replace(
        row,
        checkpoint=measured.source,
        measured_error_percent=measured.error,
        interval_percent=measured.interval,
        difference_points=None if error is None else measured.error - error,
        images=measured.images,
    )


def strangers(measured: Sequence[Measured]) -> list[str]:
    """Return a sentence on each checkpoint that is no row of the table."""
    return [
        f"{one.source} is no network of the paper's table: its error, {one.error:.2f} %, stands "
        "beside none"
        for one in measured
        if not one.rows
    ]


def as_table(rows: Sequence[Reproduction], images: int) -> Table:
    """Return the rows as a table to print, with the checkpoints named below it.

    Args:
        rows: of `reproduce`.
        images: on how many images they were measured.
    """
    sources = list(dict.fromkeys(row.checkpoint for row in rows if row.checkpoint is not None))
    marks = {source: f"[{number}]" for number, source in enumerate(sources, 1)}
    caption = "\n".join(f"{mark} {source}" for source, mark in marks.items())
    table = Table(title=_heading(images), caption=caption or None, title_justify="left",
                  caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("network", overflow="fold")
    for name in ("alpha", "beta", "published\nerror %", "measured\nerror %", "95 %\ninterval",
                 "differ-\nence", ""):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_section()
            table.add_row(f"{group}:")
        table.add_row(*_cells(row, marks.get(row.checkpoint or "", "")))
    return table


def _heading(images: int) -> str:
    part = "" if images == VALIDATION_IMAGES else f"only {images:,} of "
    return (
        f"Top-1 error on {part}the {VALIDATION_IMAGES:,} images of ImageNet's validation set, "
        "single 224x224 crop; difference: measured minus published, points"
    )


def _cells(row: Reproduction, mark: str) -> list[str]:
    head = [
        row.network,
        _MISSING if row.alpha is None else str(row.alpha),
        _MISSING if row.beta is None else str(row.beta),
        _number(row.published_error_percent, ".2f"),
    ]
    if row.checkpoint is None or row.interval_percent is None:
        return [*head, NOT_RUN, _MISSING, _MISSING, mark]
    low, high = row.interval_percent
    return [
        *head,
        _number(row.measured_error_percent, ".2f"),
        f"{low:.2f} to {high:.2f}",
        _number(row.difference_points, "+.2f"),
        mark,
    ]


def _number(value: float | None, form: str) -> str:
    return _MISSING if value is None else f"{value:{form}}"
