"""``blnet transcribe``: writes down what recordings of any length say."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from blnet.checks import finite, positive
from blnet.commands.answers import shown
from blnet.commands.device import add_device_flag, device_of
from blnet.files import written_aside
from blnet.speech.audio import AudioError, audio_seconds, stream_audio
from blnet.speech.decode import Decoder, DecoderName, make_decoder
from blnet.speech.hypotheses import SPACE, Word
from blnet.speech.inference import Trained, load_trained
from blnet.speech.predict import RECORDINGS as _RECORDINGS
from blnet.speech.text import BLANK
from blnet.speech.windows import WordStream, plan, windows

PROG = "blnet transcribe"
RECORDINGS = dataclasses.replace(_RECORDINGS, prog=PROG)
WINDOW, OVERLAP = 20.0, 4.0  # seconds
_BLOCK = 30.0  # seconds of sound that are read at once
_PAUSE = 0.5  # seconds of silence at which a search by beam starts anew
_LONGEST = 30.0  # seconds after which it does so at a space, or anywhere
_EXAMPLES = """examples:
  blnet transcribe talk.flac --checkpoint results/english
  blnet transcribe talks/ --checkpoint results/english --format json --output talks.json
  blnet transcribe talk.flac --checkpoint results/english --language-model words.arpa.gz"""


@dataclass(frozen=True)
class SpokenWord:
    """A word with its time.

    Attributes:
        word: its characters.
        start: where it begins, seconds.
        end: where it ends, seconds.
        score: mean probability of its characters, 0 to 1.
    """

    word: str
    start: float
    end: float
    score: float


@dataclass(frozen=True)
class Transcript:
    """What a recording says.

    Attributes:
        file: the recording.
        seconds: its length.
        words: what is said.
    """

    file: str
    seconds: float
    words: tuple[SpokenWord, ...]

    @property
    def text(self) -> str:
        """The words with one space in between."""
        return SPACE.join(word.word for word in self.words)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "files", nargs="+", metavar="FILE",
        help="a recording of any length, a folder of them, or archive.zip::member",
    )  # fmt: skip
    parser.add_argument("--checkpoint", metavar="CHECKPOINT",
                        help="a .safetensors file or a run's folder, of --task ctc or frame")  # fmt: skip # noqa: E501
    parser.add_argument("--format", choices=("text", "json"), default="text",
                        help="text, or JSON with each word's time (text)")  # fmt: skip
    parser.add_argument("--output", metavar="FILE",
                        help="write it to FILE instead of the standard output")  # fmt: skip
    add_device_flag(parser)
    parser.add_argument("--window", type=_seconds, default=WINDOW, metavar="S",
                        help=f"seconds that go through the network at once ({WINDOW:g})")  # fmt: skip # noqa: E501
    parser.add_argument("--overlap", type=_seconds, default=OVERLAP, metavar="S",
                        help=f"seconds that a window shares with the next ({OVERLAP:g})")  # fmt: skip # noqa: E501
    add_decoder_flags(parser)


def add_decoder_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a decoder, for `decoder_of`."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--decoder", choices=get_args(DecoderName), default="auto",
                       help="greedy, beam, or auto: beam if a width or a language model is given")  # fmt: skip # noqa: E501
    group.add_argument("--beam-width", type=positive, metavar="N", help="texts that are followed")
    group.add_argument("--language-model", metavar="FILE",
                       help="n-grams of words: .arpa, .arpa.gz, or KenLM's own format")  # fmt: skip
    group.add_argument("--lm-weight", type=finite, default=0.5, metavar="W",
                       help="weight of the language model (0.5)")  # fmt: skip
    group.add_argument("--word-bonus", type=finite, default=1.0, metavar="B",
                       help="bonus of every word beside a language model (1)")  # fmt: skip


def check_no_decoder(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, if one of a decoder was given to networks of words."""
    given = {
        "--decoder": args.decoder != "auto",
        "--beam-width": args.beam_width is not None,
        "--language-model": args.language_model is not None,
    }
    for flag, there in given.items():
        if there:
            raise ValueError(
                f"{flag} is for networks that spell, and these tell words apart; leave it out"
            )


def decoder_of(args: argparse.Namespace, trained: Trained) -> Decoder:
    """Return the decoder that flags choose.

    Raises:
        ValueError: if they contradict each other, or the language model cannot be read.
        OSError: if the language model is not there.
    """
    return make_decoder(args.decoder, trained.alphabet, args.language_model, args.beam_width,
                        args.lm_weight, args.word_bonus, viterbi=trained.head == "frame")  # fmt: skip # noqa: E501


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of seconds up to 3600")
    return value


def run(args: argparse.Namespace) -> int:
    """Transcribe every recording, print or write it; return 0, or 1 if one could not be read."""
    trained = load_trained(args.checkpoint, ("ctc", "frame"))
    plan(args.window, args.overlap, trained.features.sample_rate, trained.step, trained.lacking)
    decoder = decoder_of(args, trained)
    trained.to(device_of(args))
    files, failed = RECORDINGS.expand(args.files)
    print(f"{PROG}: {trained.title}, decoder: {decoder.title}", file=sys.stderr)

    def transcripts() -> tuple[str, int]:
        found, unread = _transcripts(trained, files, decoder, args.window, args.overlap)
        if args.format == "json":
            return as_json(found), unread
        return as_text(found, named=len(files) + failed > 1), unread

    if args.output is None:
        text, unread = transcripts()
        sys.stdout.write(text)
    else:
        with written_aside(args.output) as aside:
            text, unread = transcripts()
            aside.write_text(text, encoding="utf-8")
    return 1 if failed or unread else 0


def _transcripts(
    trained: Trained, files: Sequence[str], decoder: Decoder, window: float, overlap: float
) -> tuple[list[Transcript], int]:
    """Return the transcripts, and how many recordings could not be read, which are named.

    Raises:
        ValueError: if none could be read.
    """
    found: list[Transcript] = []
    unread = 0
    for file in files:
        try:
            seconds = audio_seconds(file)
            with _bar(shown(file), seconds) as told:
                words = tuple(transcribe(trained, file, decoder, window, overlap, told))
        except AudioError as error:
            unread += 1
            RECORDINGS.complain(shown(file), f"cannot be read: {error.reason}")
            continue
        found.append(Transcript(shown(file), seconds, words))
    if not found:
        raise ValueError(f"not one recording could be read; {RECORDINGS.advice}")
    return found, unread


@contextlib.contextmanager
def _bar(title: str, seconds: float) -> Iterator[Callable[[float], None]]:
    """Show how much of a recording is transcribed, on a terminal; give what takes the seconds."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    off = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=off) as progress:
        bar = progress.add_task(title, total=seconds)
        yield lambda done: progress.update(bar, completed=done)


def transcribe(
    trained: Trained,
    file: str,
    decoder: Decoder | None = None,
    window: float = WINDOW,
    overlap: float = OVERLAP,
    told: Callable[[float], None] | None = None,
) -> Iterator[SpokenWord]:
    """Yield the words of a recording as they end; a window of it and a few seconds are in memory.

    Args:
        trained: a network of the task ctc or frame.
        file: the recording.
        decoder: what decodes, from pause to pause if it searches; None takes the likeliest path.
        window: seconds that go through the network at once.
        overlap: seconds that a window shares with the next; raised where the network needs more.
        told: is called with the seconds that are done.

    Yields:
        The words in their order; no time is beyond the recording's end.

    Raises:
        AudioError: if the recording cannot be read.
        ValueError: if the windows do not get on, or memory runs out.
    """
    rate = trained.features.sample_rate
    size, shared = plan(window, overlap, rate, trained.step, trained.lacking)
    stream: WordStream | SearchStream = (
        WordStream(trained.alphabet)
        if decoder is None or decoder.is_greedy
        else SearchStream(trained, decoder)
    )
    heard = 0.0
    for part in windows(stream_audio(file, rate, _BLOCK), size, shared, trained.step):
        logits, _ = trained([part.samples])
        heard = (part.first_frame * trained.step + len(part.samples)) / rate
        for word in stream.push(part.kept(logits[0].log_softmax(-1))):
            yield _timed(word, trained, heard)
        if told is not None:
            told(heard)
    for word in stream.finish():
        yield _timed(word, trained, heard)


def _timed(word: Word, trained: Trained, heard: float) -> SpokenWord:
    """Return a word with its times; the last frame may stand for more than there was to hear."""
    reduction = trained.model.config.time_reduction
    start, end = (
        round(min(trained.features.seconds(frame * reduction), heard), 3)
        for frame in (word.start_frame, word.end_frame)
    )
    return SpokenWord(word.text, start, end, round(word.score, 4))


class SearchStream:
    """Decodes frames that come in parts by a search over each stretch between two pauses.

    Where nobody pauses for half a minute, a stretch ends at the last space.

    Args:
        trained: the network, for its frames' duration and its alphabet.
        decoder: the search.
    """

    def __init__(self, trained: Trained, decoder: Decoder) -> None:
        seconds = trained.step / trained.features.sample_rate
        self._pause = max(1, round(_PAUSE / seconds))
        self._longest = max(1, round(_LONGEST / seconds))
        self._space = trained.alphabet.classes.get(SPACE, BLANK)
        self._decoder = decoder
        self._held: Tensor | None = None
        self._first = 0

    def push(self, log_probs: Tensor) -> list[Word]:
        """Take the next frames (T, classes), and return the words before the last pause."""
        held = log_probs if self._held is None else torch.cat([self._held, log_probs])
        self._held = held
        words: list[Word] = []
        while (cut := self._cut(self._held)) is not None:
            words += self._decoded(self._held[:cut])
            self._held = self._held[cut:]
        return words

    def finish(self) -> list[Word]:
        """Return the words of what is left."""
        rest, self._held = self._held, None
        return [] if rest is None or not len(rest) else self._decoded(rest)

    def _cut(self, log_probs: Tensor) -> int | None:
        """Return where the first stretch ends, a frame above 0; None where that is not known."""
        labels = log_probs.argmax(-1).cpu().numpy()
        said = np.flatnonzero(labels != BLANK)
        pauses = said[np.diff(said, append=len(labels)) > self._pause]
        if len(pauses):  # its middle, as far as it has to go
            return int(pauses[0]) + 1 + (self._pause + 1) // 2
        if len(labels) <= self._longest:
            return None
        for label in (self._space, BLANK):  # no word is cut, or at least no letter
            places = np.flatnonzero(labels[: self._longest] == label)
            if len(places) and places[-1]:
                return int(places[-1])
        return self._longest

    def _decoded(self, log_probs: Tensor) -> list[Word]:
        (found,) = self._decoder(log_probs[None], torch.tensor([len(log_probs)]))
        first, self._first = self._first, self._first + len(log_probs)
        return [
            Word(word.text, word.start_frame + first, word.end_frame + first, word.score)
            for word in found.words
        ]


def as_text(found: Sequence[Transcript], named: bool) -> str:
    """Return a line for each recording: its text, after its name if that is to be there."""
    return "".join(f"{one.file}: {one.text}\n" if named else f"{one.text}\n" for one in found)


def as_json(found: Sequence[Transcript]) -> str:
    """Return a list of {"file", "seconds", "text", "words": [{"word", "start", "end", "score"}]}.

    Times are seconds, scores from 0 to 1.
    """
    rows = [
        {
            "file": one.file,
            "seconds": round(one.seconds, 3),
            "text": one.text,
            "words": [vars(word) for word in one.words],
        }
        for one in found
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
