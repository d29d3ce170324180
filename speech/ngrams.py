"""Language models of words: n-grams with back-off, read from ARPA files and written to them."""

from __future__ import annotations

import bisect
import functools
import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TextIO, cast

from blnet.files import StrPath, reason, written_aside

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
_NEVER = -100.0  # log10, for words of which a model says nothing; KenLM takes the same
_BINARY = b"mmap lm http://kheafield.com/code"  # how KenLM's binary files begin
_COUNT = re.compile(r"ngram\s+(\d+)\s*=\s*(\d+)")
_BORDER = re.compile(r"\\\d+-grams:|\\end\\")
_Gram = tuple[float, float]  # log10 probability, log10 back-off weight


class LanguageModel:
    """Says how likely a word is after others.

    Katz, "Estimation of Probabilities from Sparse Data" (IEEE Trans. ASSP, 1987): where the model
    has no n-gram of a word and those before it, it takes the weight of those before it and asks for
    the word after one fewer of them.

    Args:
        grams: n-gram, its words with one space in between -> log10 of its probability and of its
            back-off weight.
        order: words of the longest n-gram.
    """

    def __init__(self, grams: dict[str, _Gram], order: int) -> None:
        self._grams = grams
        self.order = order

    @classmethod
    def load(
        cls, path: StrPath, normalise: Callable[[str], str] = lambda words: words
    ) -> LanguageModel:
        """Return the model of an ARPA file.

        Args:
            path: the file, .arpa or packed .arpa.gz.
            normalise: spells its words as the network does (`Alphabet.normalise`); of two that
                become one the first is taken.

        Raises:
            ValueError: if it is no such file, is cut off or contradicts itself; it names the line.
            OSError: if it is not there or cannot be read.
        """
        if is_binary(path):
            raise ValueError(
                f"language model {path} is in KenLM's binary format, which needs the packages "
                "kenlm and pyctcdecode; install them or give the .arpa file that it was made of"
            )
        try:
            with _open(path, Path(path).suffix == ".gz") as file:
                grams, order = _read(_Lines(file, path), normalise)
                file.read()  # to the end, where gzip has its checksum
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"language model {path} is not a whole ARPA file ({reason(error)}); give the file "
                "anew"
            ) from error
        return cls(grams, order)

    def save(self, path: StrPath) -> None:
        """Write the model as an ARPA file, packed where its name ends with .gz.

        Raises:
            OSError: if it cannot be written; what was there before stays.
        """
        orders: list[list[str]] = [[] for _ in range(self.order)]
        for gram in sorted(self._grams):
            orders[gram.count(" ")].append(gram)
        packed = Path(path).suffix == ".gz"
        with written_aside(path) as aside, _open(aside, packed, "w") as file:
            file.write("\\data\\\n")
            for length, grams in enumerate(orders, start=1):
                file.write(f"ngram {length}={len(grams)}\n")
            for length, grams in enumerate(orders, start=1):
                file.write(f"\n\\{length}-grams:\n")
                file.writelines(self._line(gram) for gram in grams)
            file.write("\n\\end\\\n")

    def _line(self, gram: str) -> str:
        score, weight = self._grams[gram]
        return f"{score:.7f}\t{gram}" + (f"\t{weight:.7f}\n" if weight else "\n")

    def __contains__(self, word: str) -> bool:
        return word in self._grams

    @functools.cached_property
    def _words(self) -> list[str]:
        return sorted(gram for gram in self._grams if " " not in gram)

    def has_beginning(self, beginning: str) -> bool:
        """Return whether a word of the model begins so."""
        place = bisect.bisect_left(self._words, beginning)
        return place < len(self._words) and self._words[place].startswith(beginning)

    def score(self, word: str, history: tuple[str, ...]) -> float:
        """Return log10 of the probability of a word after others.

        A word that the model lacks counts as its <unk>; where it has none, as nearly impossible.

        Args:
            word: the word; "</s>" for the end of the sentence.
            history: the words before it, the last one last; "<s>" is the beginning.
        """
        word = self._known(word)
        looked_at = history[max(0, len(history) - self.order + 1) :]
        context = [self._known(before) for before in looked_at]
        weight = 0.0
        while True:
            found = self._grams.get(" ".join([*context, word]))
            if found is not None:
                return weight + found[0]
            if not context:
                return weight + _NEVER
            weight += self._grams.get(" ".join(context), (0.0, 0.0))[1]
            del context[0]

    def after(self, word: str, history: tuple[str, ...]) -> tuple[str, ...]:
        """Return the history with a word added, as long as the model looks back."""
        return (*history, word)[-(self.order - 1) :] if self.order > 1 else ()

    def sentence(self, words: Iterable[str]) -> float:
        """Return log10 of the probability of a whole sentence, its end included."""
        history: tuple[str, ...] = (START,)
        score = 0.0
        for word in words:
            score += self.score(word, history)
            history = self.after(word, history)
        return score + self.score(END, history)

    def _known(self, word: str) -> str:
        return word if word in self._grams else UNKNOWN


def is_binary(path: StrPath) -> bool:
    """Return whether a file is a language model in KenLM's binary format.

    Raises:
        OSError: if it is not there or cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"language model {path} does not exist or is no file; name an .arpa or .arpa.gz file"
        )
    with Path(path).open("rb") as file:
        return file.read(len(_BINARY)) == _BINARY


def _open(path: StrPath, packed: bool, mode: Literal["r", "w"] = "r") -> TextIO:
    if packed:
        return cast("TextIO", gzip.open(path, f"{mode}t", encoding="utf-8"))
    return cast("TextIO", Path(path).open(mode, encoding="utf-8"))


class _Lines:
    """The lines of an ARPA file that hold something, with their numbers for errors."""

    def __init__(self, file: TextIO, path: StrPath) -> None:
        self._file = file
        self._path = path
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            stripped = line.strip()
            if stripped:
                yield stripped
        raise self.error("it ends without the line \\end\\")

    def error(self, what: str) -> ValueError:
        return ValueError(
            f"language model {self._path}, line {self.number}: {what}; give a whole ARPA file"
        )


def _read(lines: _Lines, normalise: Callable[[str], str]) -> tuple[dict[str, _Gram], int]:
    """Return the n-grams of a file and the order of the longest."""
    counts = _read_counts(lines)
    grams: dict[str, _Gram] = {}
    for order, count in enumerate(counts, start=1):
        left = count
        for line in lines:
            if _BORDER.fullmatch(line):
                break
            words, gram = _gram(lines, line, order)
            grams.setdefault(normalise(words), gram)
            left -= 1
        if left:
            raise lines.error(f"it has {count - left} {order}-grams and promised {count}")
        _check_border(lines, line, order + 1 if order < len(counts) else None)
    return grams, len(counts)


def _check_border(lines: _Lines, line: str, order: int | None) -> None:
    wanted = "\\end\\" if order is None else f"\\{order}-grams:"
    if line != wanted:
        raise lines.error(f"'{line[:60]}' where {wanted} was to come")


def _read_counts(lines: _Lines) -> list[int]:
    """Read the file's head and return how many n-grams of each order follow."""
    counts: list[int] | None = None
    for line in lines:
        if line == "\\data\\":
            counts = []
        elif counts is None:
            continue  # anything may stand before
        elif found := _COUNT.fullmatch(line):
            if int(found[1]) != len(counts) + 1:
                raise lines.error(f"{line} where the number of {len(counts) + 1}-grams was to come")
            counts.append(int(found[2]))
        else:
            _check_border(lines, line, 1)
            if not counts:
                raise lines.error("it names no number of 1-grams")
            return counts
    raise AssertionError("the lines end with an error")


def _gram(lines: _Lines, line: str, order: int) -> tuple[str, _Gram]:
    """Return the n-gram of a line: logarithm, words, and a back-off weight unless that is 0."""
    probability, *words = line.split()
    weight = words.pop() if len(words) == order + 1 else "0"
    try:
        gram = float(probability), float(weight)
    except ValueError:
        gram = math.nan, math.nan
    if len(words) != order or not (gram[0] <= 0 and math.isfinite(gram[1])):
        raise lines.error(
            f"{line[:60]!r} is no {order}-gram, which has the logarithm of a probability, "
            f"{order} words and at most a back-off weight"
        )
    return " ".join(words).replace("<UNK>", UNKNOWN), (max(gram[0], _NEVER), gram[1])
