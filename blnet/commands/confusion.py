"""Which class was taken for which: counts, their intervals, and the files made of them."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blnet.files import written_aside

PER_CLASS, CONFUSION, PICTURE = "per_class.csv", "confusion.csv", "confusion.png"
Counts = NDArray[np.int64]

CONFIDENCE = 0.95  # of the intervals
_MOST_NUMBERED = 30  # classes whose cells have room for numbers
_MOST_NAMED = 100  # classes whose names can be read along an axis
_NAME_SHOWN = 24  # characters of a class's name in the picture
_DARK = 0.4  # share from which on a cell needs white numbers


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share.

    (E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal
    of the American Statistical Association 22, 1927.)

    Args:
        successes: from 0 to trials.
        trials: at least 1.
    """
    from scipy.stats import binomtest  # half a second to import, and wanted once

    found = binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def per_class_columns(unit: str) -> tuple[str, ...]:
    """Return the columns of `write_per_class`; the unit is what a sample is called."""
    return ("class", unit, "top-1", "top-5", "most confused with", "times")


def write_per_class(
    path: Path, names: Sequence[str], confusion: Counts, top5: Counts | None, unit: str
) -> None:
    """Write a line for each class: samples, accuracies from 0 to 1, and its commonest mistake.

    Of a class without samples, or always right, the fields that have no meaning stay empty; so does
    top-5 of five classes or fewer.

    Args:
        path: the file.
        names: of the classes.
        confusion: samples of class i taken for class j, (classes, classes).
        top5: samples of each class with the class among the first five, (classes,).
        unit: what a sample is called, "images" say.

    Raises:
        OSError: if it cannot be written.
    """
    rows = []
    for index, name in enumerate(names):
        count, right = int(confusion[index].sum()), int(confusion[index, index])
        mistake, times = _commonest_mistake(confusion[index], index)
        rows.append(
            {
                "class": name,
                unit: count,
                "top-1": f"{right / count:.6f}" if count else "",
                "top-5": f"{int(top5[index]) / count:.6f}" if top5 is not None and count else "",
                "most confused with": names[mistake] if times else "",
                "times": times or "",
            }
        )
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, per_class_columns(unit), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _commonest_mistake(row: Counts, index: int) -> tuple[int, int]:
    """Return the class that class `index` is most often taken for, and how often."""
    mistakes = row.copy()
    mistakes[index] = 0
    most = int(mistakes.argmax())
    return most, int(mistakes[most])


def write_confusion(path: Path, names: Sequence[str], confusion: Counts) -> None:
    """Write the counts, a line for each true class and a column for each predicted one.

    Args:
        path: the file.
        names: of the classes.
        confusion: samples of class i taken for class j, (classes, classes).

    Raises:
        OSError: if it cannot be written.
    """
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["true class", *names])
        writer.writerows([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))


def draw_confusion(path: Path, names: Sequence[str], confusion: Counts, title: str) -> None:
    """Draw each class's shares as a PNG: with numbers up to 30 classes, with names up to 100.

    Args:
        path: the file.
        names: of the classes.
        confusion: samples of class i taken for class j, (classes, classes).
        title: what stands above.

    Raises:
        OSError: if it cannot be written.
    """
    from matplotlib.figure import Figure

    count = len(names)
    side = min(max(5.0, 1.5 + 0.45 * count), 11.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = _shares(confusion)
    if count <= _MOST_NUMBERED:
        _draw_cells(axes, confusion, shares, side)
    else:
        _draw_heat(figure, axes, shares)
    if count <= _MOST_NAMED:
        _name_axes(axes, names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(_plain(title), wrap=True)
    with written_aside(path) as aside, warnings.catch_warnings():
        # The names are in the tables, too; of letters that the font lacks the picture has boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(aside, format="png", dpi=150)


def _shares(confusion: Counts) -> NDArray[np.float64]:
    """Return each row divided by its sum; NaN for a class without samples."""
    counts = confusion.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        shares: NDArray[np.float64] = confusion / counts
    return shares


def _draw_cells(axes: Any, confusion: Counts, shares: NDArray[np.float64], side: float) -> None:
    """Draw cells with their counts; the square root of the share makes rare mistakes visible."""
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    cell = 0.75 * 72 * side / len(confusion)  # points
    digits = len(str(confusion.max()))
    size = min(12.0, 0.5 * cell, 1.2 * cell / digits)  # a digit is some 0.6 of it wide
    for row, column in np.argwhere(confusion > 0):
        colour = "white" if shares[row, column] > _DARK else "black"
        text = str(confusion[row, column])
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)


def _draw_heat(figure: Any, axes: Any, shares: NDArray[np.float64]) -> None:
    """Draw a heat map whose colours go by the logarithm of the share, white where there is none."""
    from matplotlib.colors import LogNorm

    shown = np.ma.masked_invalid(np.where(shares > 0, shares, np.nan))
    # From below the rarest: single pixels of the palest colours are hard to tell from white.
    norm = LogNorm(0.1 * float(shown.min()), 1)
    image = axes.imshow(shown, cmap="viridis_r", norm=norm, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")


def _name_axes(axes: Any, names: Sequence[str]) -> None:
    shown = [n if len(n) <= _NAME_SHOWN else f"{n[: _NAME_SHOWN - 1]}…" for n in names]
    size = 10 if len(names) <= 12 else 8 if len(names) <= 40 else 6
    long = max(map(len, shown)) > 3
    axes.set_xticks(
        range(len(names)), list(map(_plain, shown)), rotation=90 if long else 0, fontsize=size
    )
    axes.set_yticks(range(len(names)), list(map(_plain, shown)), fontsize=size)


def _plain(text: str) -> str:
    """Return text that Matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
