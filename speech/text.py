"""Text for networks that spell: an alphabet, and transcripts as its classes."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BLANK = 0
_APOSTROPHE = "'"
_TYPOGRAPHIC = "\u2018\u2019\u02bc\u2032\uff07"  # quotation marks, letter, prime, full width


@dataclass(frozen=True)
class Alphabet:
    """The characters that a network writes with.

    Class 0 is the blank of CTC, class i + 1 is `characters[i]`.

    Attributes:
        characters: each of them once.

    Raises:
        ValueError: if there is none, one comes twice, or one can be in no normalised text.
    """

    characters: str

    def __post_init__(self) -> None:
        if not self.characters or len(set(self.characters)) != len(self.characters):
            raise ValueError(
                f"the alphabet {self.characters!r} must name characters, each of them once"
            )
        for character in self.characters:
            if (character.isspace() and character != " ") or not _is_composed(character):
                raise ValueError(
                    f"the alphabet has {named(character)}, which no text keeps once spaces are "
                    "made plain and accents are joined to their letters; leave it out"
                )

    @property
    def size(self) -> int:
        """Classes of a network: the characters and the blank."""
        return len(self.characters) + 1

    @functools.cached_property
    def classes(self) -> dict[str, int]:
        """Class of each character."""
        return {character: place for place, character in enumerate(self.characters, start=1)}

    @functools.cached_property
    def has_capitals(self) -> bool:
        """Whether capitals are kept; without any in the alphabet they are made small."""
        return any(character != character.lower() for character in self.characters)

    @functools.cached_property
    def _replacements(self) -> dict[int, str]:
        if _APOSTROPHE not in self.classes:
            return {}
        return {ord(mark): _APOSTROPHE for mark in _TYPOGRAPHIC if mark not in self.classes}

    def normalise(self, text: str) -> str:
        """Return a text as it is to be spelled; characters outside the alphabet stay in it.

        Accents are joined to their letters (Unicode NFC), letters are made small unless the
        alphabet has capitals, typographic apostrophes become ', any run of white space one space;
        there is none at the ends.
        """
        text = unicodedata.normalize("NFC", text)
        if not self.has_capitals:
            # A few small letters can be joined to an accent that their capitals cannot.
            text = unicodedata.normalize("NFC", text.lower())
        return " ".join(text.translate(self._replacements).split())

    def encode(self, text: str) -> Tensor:
        """Return the classes of a text's characters, int64 (n,); the text is normalised first.

        Raises:
            ValueError: if a character is not in the alphabet; it names the first.
        """
        text, classes = self.normalise(text), self.classes
        try:
            return torch.tensor([classes[character] for character in text], dtype=torch.int64)
        except KeyError as error:
            raise ValueError(
                f"the text has {named(error.args[0])}, which is not in the alphabet "
                f"{self.characters!r}; spell it out, leave it out or add it to --data.alphabet"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of classes: no blanks, and no repeats but those of the text.

        Raises:
            ValueError: if one is no class of a character.
        """
        found = [int(i) for i in ids]
        for i in found:
            if not 1 <= i < self.size:
                raise ValueError(
                    f"class {i} stands for no character; those of this alphabet are 1 to "
                    f"{self.size - 1}"
                )
        return "".join(self.characters[i - 1] for i in found)


def required_frames(ids: Tensor) -> int:
    """Return the fewest frames in which CTC can write some classes.

    Each takes a frame, and a blank must stand between two equal ones (Graves et al.,
    "Connectionist Temporal Classification", ICML 2006).

    Args:
        ids: classes without blanks, (n,).
    """
    return len(ids) + int((ids[1:] == ids[:-1]).sum())


def named(character: str) -> str:
    """Return what an error calls a character: "'e' (U+0065)"."""
    return f"{character!r} (U+{ord(character):04X})"


def _is_composed(character: str) -> bool:
    return unicodedata.normalize("NFC", character) == character
