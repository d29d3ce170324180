"""What a network says of files: the most probable classes of each, as a table, JSON or CSV."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from torch import Tensor

from blnet.checks import positive
from blnet.commands.device import add_device_flag
from blnet.files import StrPath, files_below, written_aside
from blnet.training.display import plain_console

TOP = 5  # classes that are named of each file


@dataclass(frozen=True)
class Prediction:
    """A class and how probable it is.

    Attributes:
        index: the class's number.
        label: its name.
        probability: 0 to 1, by the softmax of the logits.
    """

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """What a network says of a file.

    Attributes:
        file: the file, as it was named.
        predictions: the most probable classes, the first first; none where it cannot be read.
        problem: why it cannot be read; None where it was.
    """

    file: str
    predictions: tuple[Prediction, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of file that a command takes.

    Attributes:
        prog: the command, for what it says.
        singular: what one is called, "picture" say.
        plural: what several are called.
        endings: of the files that count in a folder, small letters with the dot.
        advice: what to name where nothing could be read.
    """

    prog: str
    singular: str
    plural: str
    endings: tuple[str, ...]
    advice: str

    def add_flags(self, parser: argparse.ArgumentParser, classes: str, batch: int) -> None:
        """Add the flags of a command that answers with classes, called so, in such batches."""
        parser.add_argument("--top", type=positive, default=TOP, metavar="N",
                            help=f"how many {classes} to name for each {self.singular} ({TOP})")  # fmt: skip # noqa: E501
        parser.add_argument("--format", choices=tuple(FORMATS), default="table",
                            help="how to print it (table)")  # fmt: skip
        parser.add_argument("--output", metavar="FILE",
                            help="write it to FILE instead of the standard output")  # fmt: skip
        add_device_flag(parser)
        parser.add_argument("--batch", type=positive, default=batch, metavar="N",
                            help=f"{self.plural} taken at once ({batch})")  # fmt: skip

    def complain(self, file: str, what: str) -> None:
        """Say on standard error what is wrong with a file."""
        print(f"{self.prog}: {file} {what}", file=sys.stderr)

    def expand(self, names: Sequence[StrPath]) -> tuple[list[str], int]:
        """Return the files that files and folders stand for, and how many folders gave none.

        A folder stands for all files of the kind below it, in the order of their names; hidden ones
        are passed over. Folders without any are named on standard error and counted, and so are
        those that cannot be read, each with what the system said.
        """
        files: list[str] = []
        failed = 0
        for name in (os.fspath(name) for name in names):
            if not os.path.isdir(name):
                files.append(name)
                continue
            closed: list[OSError] = []
            found = sorted(self._below(name, closed.append))
            files += found
            failed += len(closed) or not found
            for error in closed:
                what = f"is a folder that cannot be read ({error.strerror})"
                self.complain(shown(str(error.filename)), what)
            if not found and not closed:
                self.complain(shown(name), f"is a folder without {self.plural}")
        return files, failed

    def _below(self, folder: str, closed: Callable[[OSError], None]) -> Iterator[str]:
        for place, name in files_below(folder, closed):
            if name.lower().endswith(self.endings):
                yield os.path.join(place, name)

    def readable(self, found: Iterable[Answer]) -> tuple[list[Answer], int]:
        """Return the answers, and how many files could not be read; name those on standard error.

        Raises:
            ValueError: if none could be read.
        """
        answers, unread = [], 0
        for answer in found:
            if answer.problem is None:
                answers.append(answer)
            else:
                unread += 1
                self.complain(answer.file, f"cannot be read: {answer.problem}")
        if not answers:
            raise ValueError(f"not one {self.singular} could be read; {self.advice}")
        return answers, unread

    def answer(self, found: Iterable[Answer], form: str, output: StrPath | None) -> int:
        """Print answers, or write them whole to a file; return how many files could not be read.

        Raises:
            ValueError: if none could be read.
            OSError: if the file cannot be written.
        """
        if output is None:
            answers, unread = self.readable(found)
            sys.stdout.write(FORMATS[form](answers))
            return unread
        with written_aside(output) as aside:
            answers, unread = self.readable(found)
            aside.write_text(FORMATS[form](answers), encoding="utf-8")
        return unread


def shown(file: str) -> str:
    """Return a file's name with what no UTF-8 text can hold replaced."""
    return os.fsencode(file).decode("utf-8", "replace")


def most_probable(logits: Tensor, labels: Sequence[str], top: int) -> list[tuple[Prediction, ...]]:
    """Return the most probable classes of each sample, the first first.

    Args:
        logits: (N, classes).
        labels: name of each class.
        top: how many to name; all, where there are fewer.
    """
    found = logits.float().softmax(1).topk(min(top, len(labels)))
    rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [tuple(Prediction(i, labels[i], p) for i, p in zip(*row, strict=True)) for row in rows]


def as_json(answers: Sequence[Answer]) -> str:
    """Return a list of {"file", "predictions": [{"class", "label", "probability"}]} as JSON."""
    rows = [
        {
            "file": answer.file,
            "predictions": [
                {"class": p.index, "label": p.label, "probability": p.probability}
                for p in answer.predictions
            ],
        }
        for answer in answers
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def as_csv(answers: Sequence[Answer]) -> str:
    """Return a line for each prediction: file, rank from 1, class, label, probability."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["file", "rank", "class", "label", "probability"])
    for answer in answers:
        for rank, p in enumerate(answer.predictions, 1):
            writer.writerow([answer.file, rank, p.index, p.label, f"{p.probability:.6f}"])
    return out.getvalue()


def as_text(answers: Sequence[Answer]) -> str:
    """Return a table: the most probable classes of each file."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for answer in answers:
        table.add_section()
        for rank, p in enumerate(answer.predictions):
            file = answer.file if rank == 0 else ""
            table.add_row(file, p.label, f"{100 * p.probability:.2f} %")
    console = plain_console()
    with console.capture() as captured:
        console.print(table)
    return captured.get()


FORMATS: dict[str, Callable[[Sequence[Answer]], str]] = {
    "table": as_text,
    "json": as_json,
    "csv": as_csv,
}
