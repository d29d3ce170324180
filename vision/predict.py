"""``blnet predict vision``: says what is on pictures."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from blnet.environment import core_count
from blnet.files import StrPath, reason, written_aside
from blnet.training.config import TrainingConfig
from blnet.training.devices import make_accelerator, out_of_memory
from blnet.training.loading import CorruptSample
from blnet.vision.inference import (
    check_finite,
    labels_of,
    load_trained,
    plain_console,
    positive,
    preprocessing_of,
)
from blnet.vision.preprocessing import Preprocessing
from blnet.vision.sources import decode, read

PROG = "blnet predict vision"
STANDARD_INPUT = "-"
_BATCH, _TOP = 32, 5
_ENDINGS = (*IMG_EXTENSIONS, ".gif")  # of the files that a folder's pictures are
_EXAMPLES = """examples:
  blnet predict vision cat.jpg dog.png --checkpoint results/pets
  blnet predict vision holiday/ --checkpoint bL-ResNet-50.pth --top 3 --format csv
  curl -s https://example.org/cat.jpg | blnet predict vision - --checkpoint best.safetensors"""


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
    """What a network says of a picture.

    Attributes:
        file: the picture, as it was named.
        predictions: the most probable classes, the first first; none where it cannot be read.
        problem: why it cannot be read; None where it was.
    """

    file: str
    predictions: tuple[Prediction, ...] = ()
    problem: str | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "files", nargs="+", metavar="FILE",
        help="a picture, a folder of them (all below it), or - for one on the standard input",
    )  # fmt: skip
    parser.add_argument("--checkpoint", metavar="CHECKPOINT",
                        help="a .safetensors file, a run's folder or a published .pth file")  # fmt: skip # noqa: E501
    parser.add_argument("--top", type=positive, default=_TOP, metavar="N",
                        help=f"how many classes to name for each picture ({_TOP})")  # fmt: skip
    parser.add_argument("--format", choices=tuple(_FORMATS), default="table",
                        help="how to print it (table)")  # fmt: skip
    parser.add_argument("--output", metavar="FILE",
                        help="write it to FILE instead of the standard output")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto is a GPU if there is one")  # fmt: skip
    parser.add_argument("--batch", type=positive, default=_BATCH, metavar="N",
                        help=f"pictures taken at once ({_BATCH})")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Predict every picture, print or write it, and return 0, or 1 if one could not be read."""
    if args.checkpoint is None:
        raise ValueError("--checkpoint is missing; name a trained network: 'blnet train vision' "
                         "makes one")  # fmt: skip
    if args.files.count(STANDARD_INPUT) > 1:
        raise ValueError("FILE - stands for the one picture on the standard input; name it once")
    device = make_accelerator(TrainingConfig(device=args.device)).device
    trained = load_trained(args.checkpoint)
    model = trained.model.to(device)
    files, empty = expand(args.files)
    if args.output is None:
        answers, unread = _sorted_out(predict(model, trained.extra, files, args.top, args.batch))
        sys.stdout.write(_FORMATS[args.format](answers))
    else:
        with written_aside(args.output) as aside:
            found = predict(model, trained.extra, files, args.top, args.batch)
            answers, unread = _sorted_out(found)
            aside.write_text(_FORMATS[args.format](answers), encoding="utf-8")
    return 1 if empty or unread else 0


def _sorted_out(found: Iterator[Answer]) -> tuple[list[Answer], int]:
    """Return the answers, and how many pictures could not be read; name those on standard error.

    Raises:
        ValueError: if none could be read.
    """
    answers, unread = [], 0
    for answer in found:
        if answer.problem is None:
            answers.append(answer)
        else:
            unread += 1
            _complain(answer.file, f"cannot be read: {answer.problem}")
    if not answers:
        raise ValueError("not one picture could be read; name pictures (JPEG, PNG, ...) or folders "
                         "that hold some")  # fmt: skip
    return answers, unread


def _complain(file: str, what: str) -> None:
    print(f"{PROG}: {file} {what}", file=sys.stderr)


def expand(names: Sequence[StrPath]) -> tuple[list[str], int]:
    """Return the pictures that files and folders stand for, and how many folders hold none.

    A folder stands for all pictures below it, in the order of their names; hidden ones are passed
    over, and a folder without any is named on standard error.

    Args:
        names: files, folders, or - for the standard input.
    """
    files: list[str] = []
    empty = 0
    for name in (os.fspath(name) for name in names):
        if not os.path.isdir(name):
            files.append(name)
            continue
        found = sorted(_below(name))
        files += found
        if not found:
            empty += 1
            _complain(_shown(name), "is a folder without pictures")
    return files, empty


def _below(folder: str) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(_ENDINGS) and not name.startswith("."):
                yield os.path.join(place, name)


@torch.inference_mode()
def predict(
    model: nn.Module,
    extra: Mapping[str, Any],
    files: Iterable[StrPath],
    top: int = _TOP,
    batch_size: int = _BATCH,
) -> Iterator[Answer]:
    """Yield what a network says of each picture, in their order; a batch of them is in memory.

    Args:
        model: a network from images (N, channels, size, size) to logits (N, classes), float32, on
            any device; it is put into evaluation mode.
        extra: what its checkpoint says beside the weights: preprocessing and classes; {} stands for
            ImageNet's.
        files: pictures of any size and mode, of which the first frame counts; - reads one from the
            standard input.
        top: how many classes to name; all, where there are fewer.
        batch_size: pictures that go through the network at once.

    Raises:
        ValueError: if `extra` makes no sense, the network's outputs are not finite numbers or
            memory runs out.
    """
    preprocessing = preprocessing_of(extra)
    model.eval()
    rest = (os.fspath(file) for file in files)
    with ThreadPoolExecutor(min(core_count(), batch_size)) as pool:
        while chunk := list(islice(rest, batch_size)):
            read_in = list(pool.map(lambda file: _tensor(file, preprocessing), chunk))
            tensors = [each for each in read_in if isinstance(each, Tensor)]
            found = iter(_classify(model, extra, preprocessing, tensors, top) if tensors else ())
            for file, each in zip(map(_shown, chunk), read_in, strict=True):
                yield Answer(file, problem=each) if isinstance(each, str) else Answer(file, next(found))  # fmt: skip # noqa: E501


def _tensor(file: str, preprocessing: Preprocessing) -> Tensor | str:
    """Return a picture (channels, size, size) of bytes, or why it cannot be read."""
    try:
        encoded = sys.stdin.buffer.read() if file == STANDARD_INPUT else Path(file).read_bytes()
        return preprocessing(read(file, lambda: decode(encoded), preprocessing.convert))
    except CorruptSample as error:
        return error.reason
    except OSError as error:
        return error.strerror or reason(error)


def _classify(
    model: nn.Module,
    extra: Mapping[str, Any],
    preprocessing: Preprocessing,
    tensors: Sequence[Tensor],
    top: int,
) -> list[tuple[Prediction, ...]]:
    """Return the most probable classes of each picture of a batch."""
    device = next(model.parameters()).device
    try:
        images = preprocessing.normalize(torch.stack(list(tensors)).to(device))
        logits = model(images).float()
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise ValueError(f"memory ran out with {len(tensors)} pictures at once; lower --batch "
                             "to half of that") from error  # fmt: skip
        raise
    check_finite(logits)
    labels = labels_of(extra, logits.shape[1])
    found = logits.softmax(1).topk(min(top, len(labels)))
    rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [tuple(Prediction(i, labels[i], p) for i, p in zip(*row, strict=True)) for row in rows]


def _shown(file: str) -> str:
    """Return a file's name with what no UTF-8 text can hold replaced."""
    return os.fsencode(file).decode("utf-8", "replace")


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
    """Return a table: the most probable classes of each picture."""
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


_FORMATS = {"table": as_text, "json": as_json, "csv": as_csv}
