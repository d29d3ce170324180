"""``blnet predict vision``: says what is on pictures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blnet.commands.answers import TOP, Answer, Kind, Prediction, most_probable, shown
from blnet.commands.device import device_of
from blnet.environment import core_count
from blnet.files import StrPath, reason
from blnet.limits import out_of_memory
from blnet.trained import add_trust_flag
from blnet.training.loading import CorruptSample
from blnet.vision.classes import labels_of
from blnet.vision.inference import check_finite, load_trained, preprocessing_of
from blnet.vision.preprocessing import Preprocessing
from blnet.vision.sources import PICTURE_ENDINGS, decode, read

PROG = "blnet predict vision"
STANDARD_INPUT = "-"
_BATCH = 32
PICTURES = Kind(PROG, "picture", "pictures", PICTURE_ENDINGS,
                "name pictures (JPEG, PNG, ...) or folders that hold some")  # fmt: skip
_EXAMPLES = """examples:
  blnet predict vision cat.jpg dog.png --checkpoint results/pets
  blnet predict vision holiday/ --checkpoint bL-ResNet-50.pth --top 3 --format csv
  curl -s https://example.org/cat.jpg | blnet predict vision - --checkpoint best.safetensors"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "files", nargs="+", metavar="FILE",
        help="a picture, a folder of them (all below it), or - for one on the standard input",
    )  # fmt: skip
    parser.add_argument("--checkpoint", metavar="CHECKPOINT",
                        help="a .safetensors file, a run's folder or a published .pth file")  # fmt: skip # noqa: E501
    add_trust_flag(parser)
    PICTURES.add_flags(parser, "classes", _BATCH)


def run(args: argparse.Namespace) -> int:
    """Predict every picture, print or write it, and return 0, or 1 if one could not be read."""
    if args.checkpoint is None:
        raise ValueError("--checkpoint is missing; name a trained network: 'blnet train vision' "
                         "makes one")  # fmt: skip
    if args.files.count(STANDARD_INPUT) > 1:
        raise ValueError("FILE - stands for the one picture on the standard input; name it once")
    device = device_of(args)
    trained = load_trained(args.checkpoint, args.trust_source)
    model = trained.model.to(device)
    files, failed = PICTURES.expand(args.files)
    found = predict(model, trained.extra, files, args.top, args.batch)
    unread = PICTURES.answer(found, args.format, args.output)
    return 1 if failed or unread else 0


@torch.inference_mode()
def predict(
    model: nn.Module,
    extra: Mapping[str, Any],
    files: Iterable[StrPath],
    top: int = TOP,
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
            for file, each in zip(map(shown, chunk), read_in, strict=True):
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
    return most_probable(logits, labels_of(extra, logits.shape[1]), top)
