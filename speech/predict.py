"""``blnet predict speech``: says which words recordings are."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice

from torch import Tensor

from blnet.commands.answers import TOP, Answer, Kind, Prediction, most_probable, shown
from blnet.commands.device import device_of
from blnet.speech.audio import AUDIO_ENDINGS, AudioError, audio_seconds, read_audio
from blnet.speech.inference import Trained, load_trained

PROG = "blnet predict speech"
RECORDINGS = Kind(PROG, "recording", "recordings", AUDIO_ENDINGS,
                  "name recordings (WAV, FLAC, OGG, MP3) or folders that hold some")  # fmt: skip
_BATCH = 16
_EXAMPLES = """examples:
  blnet predict speech yes.wav no.wav --checkpoint results/words
  blnet predict speech recordings/ --checkpoint results/words --top 3 --format csv"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "files", nargs="+", metavar="FILE",
        help="a recording, a folder of them (all below it), or archive.zip::member",
    )  # fmt: skip
    parser.add_argument("--checkpoint", metavar="CHECKPOINT",
                        help="a .safetensors file or a run's folder")  # fmt: skip
    RECORDINGS.add_flags(parser, "words", _BATCH)


def run(args: argparse.Namespace) -> int:
    """Tell every recording's word, print or write it; return 0, or 1 if one could not be read."""
    trained = load_trained(args.checkpoint, ("keyword",))
    trained.to(device_of(args))
    files, failed = RECORDINGS.expand(args.files)
    unread = RECORDINGS.answer(
        predict(trained, files, args.top, args.batch), args.format, args.output
    )
    return 1 if failed or unread else 0


def predict(
    trained: Trained, files: Iterable[str], top: int = TOP, batch_size: int = _BATCH
) -> Iterator[Answer]:
    """Yield what a keyword network says of each recording, in their order.

    Args:
        trained: the network.
        files: recordings, none longer than those that the network was trained on may be; if longer
            ones were cut in training, they are here.
        top: how many words to name; all, where there are fewer.
        batch_size: recordings that go through the network at once.

    Raises:
        ValueError: if the network's outputs are not finite numbers or memory runs out.
    """
    rest = iter(files)
    while chunk := list(islice(rest, batch_size)):
        found = [_samples(file, trained) for file in chunk]
        recordings = [each for each in found if isinstance(each, Tensor)]
        answers: list[tuple[Prediction, ...]] = []
        if recordings:
            logits, _ = trained(recordings)
            answers = most_probable(logits, trained.classes, top)
        told = iter(answers)
        for file, each in zip(map(shown, chunk), found, strict=True):
            if isinstance(each, str):
                yield Answer(file, problem=each)
            else:
                yield Answer(file, next(told))


def _samples(file: str, trained: Trained) -> Tensor | str:
    """Return a recording's samples (n,), or why it cannot be used."""
    longest = trained.data.max_seconds
    try:
        seconds = audio_seconds(file)
        if seconds > longest:
            if trained.data.longer == "cut":  # as in training
                return read_audio(file, trained.features.sample_rate, end=longest)
            return (
                f"it is {seconds:.1f} s long, and the network was trained on recordings of one "
                f"word, up to {longest:g} s; cut it into words"
            )
        return read_audio(file, trained.features.sample_rate)
    except AudioError as error:
        return error.reason
