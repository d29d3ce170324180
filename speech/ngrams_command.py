"""``blnet ngrams``: makes a language model of words, for `transcribe` and `evaluate speech`."""

from __future__ import annotations

import argparse
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence

from blnet.checks import positive
from blnet.commands.answers import shown
from blnet.speech.config import DataConfig
from blnet.speech.data import load_data
from blnet.speech.data_flags import add_data_flags, data_settings, given_words
from blnet.speech.files import read_lines
from blnet.speech.hypotheses import SPACE, check_spaced
from blnet.speech.inference import Trained, load_trained
from blnet.speech.measurement import say
from blnet.speech.ngram_counts import count_ngrams
from blnet.speech.text import Alphabet, named

PROG = "blnet ngrams"
ORDER = 3
_EXAMPLES = """examples:
  blnet ngrams results/english --output english.arpa
  blnet ngrams results/english --text book.txt news.txt --order 4 --output english.arpa.gz
  blnet transcribe talk.flac --checkpoint results/english --language-model english.arpa"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="the network that is to use it, of --task ctc or frame: a "
                        ".safetensors file or a run's folder")  # fmt: skip
    parser.add_argument("--output", metavar="FILE", required=True,
                        help="the language model, .arpa or packed .arpa.gz")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the file, if any")
    parser.add_argument("--order", type=positive, default=ORDER, metavar="N",
                        help=f"words of the longest n-gram ({ORDER})")  # fmt: skip
    parser.add_argument("--text", nargs="+", metavar="FILE",
                        help="a sentence on each line, in UTF-8, in place of the transcripts that "
                        "the network was trained on")  # fmt: skip
    add_data_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Count the n-grams, write the language model and return 0."""
    trained = load_trained(args.checkpoint, ("ctc", "frame"))
    settings = data_settings(trained, vars(args), training_only=True)
    _check_output(args, settings)
    if args.text is not None and settings != trained.data:
        raise ValueError("--text takes the place of transcripts; leave out the flags of the data")
    spelled = _Spelled(trained.alphabet)
    lines = _transcripts(settings) if args.text is None else _lines(args.text)
    model = count_ngrams(map(spelled, lines), args.order)
    model.save(args.output)
    if spelled.warning:
        say(spelled.warning)
    advice = ["blnet", "evaluate", "speech", args.checkpoint, *_advised(trained, args),
              "--language-model", args.output]  # fmt: skip
    print(f"{PROG}: wrote {model.order}-grams of {spelled.sentences:,} sentences; try them: "
          f"{shown(shlex.join(advice))}")  # fmt: skip
    return 0


def _check_output(args: argparse.Namespace, data: DataConfig) -> None:
    """Raise a ValueError if the output is what the command reads, or there without --overwrite."""
    if not os.path.exists(args.output):
        return
    given = (args.checkpoint, data.path, data.eval_path, *(args.text or ()))
    read = [file for file in given if file is not None and os.path.exists(file)]
    if any(os.path.samefile(file, args.output) for file in read):
        raise ValueError(f"--output {args.output} is read by this command; name another file")
    if not args.overwrite:
        raise ValueError(f"--output {args.output} exists already; add --overwrite to replace it")


class _Spelled:
    """Spells sentences as an alphabet does, and counts them.

    Attributes:
        sentences: how many had words.
        lacking: characters that the alphabet lacks; each parts words, as a space does.
    """

    def __init__(self, alphabet: Alphabet) -> None:
        check_spaced(alphabet, "none can be used with it")
        self._alphabet = alphabet
        self.sentences = 0
        self.lacking: Counter[str] = Counter()

    def __call__(self, text: str) -> str:
        known = self._alphabet.classes
        normal = self._alphabet.normalise(text)
        self.lacking.update(character for character in normal if character not in known)
        spelled = "".join(character if character in known else SPACE for character in normal)
        self.sentences += bool(spelled.strip())
        return spelled

    @property
    def warning(self) -> str | None:
        """What to say of characters that the alphabet lacks; None where there were none."""
        if not self.lacking:
            return None
        (character, _), *_ = self.lacking.most_common(1)
        return (
            f"warning: {self.lacking.total():,} characters, {named(character)} most of all, are "
            f"not in the alphabet {self._alphabet.characters!r} and were taken for spaces"
        )


def _advised(trained: Trained, args: argparse.Namespace) -> list[str]:
    """Return the data's flags as an evaluation of what was not counted takes them, if it does."""
    if args.data is not None:  # all of another kind would be evaluated on, most of it counted
        return []
    try:
        data_settings(trained, vars(args), evaluating=True)
    except ValueError:  # they say where the training part lies now, and not where the other does
        return []
    return given_words(vars(args))


def _transcripts(settings: DataConfig) -> Iterator[str]:
    """Yield the transcripts of the training recordings."""
    data = load_data(settings, "ctc", parts="training")
    yield from (one.text for one in data.train.utterances)


def _lines(files: Sequence[str]) -> Iterator[str]:
    """Yield the lines of text files."""
    for file in files:
        yield from read_lines(file)
