"""Beam searches of other packages, where they are installed: pyctcdecode and torchaudio's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from blnet.files import StrPath, reason
from blnet.speech.alignment import write
from blnet.speech.hypotheses import SPACE, Hypothesis, check_log_probs
from blnet.speech.ngrams import is_binary
from blnet.speech.text import Alphabet

_Decode = Callable[[Tensor, Tensor], list[Hypothesis]]
_BLANK_NAME = "<blank>"


def pyctcdecode_beam(
    alphabet: Alphabet, path: StrPath, width: int, alpha: float, beta: float
) -> _Decode | None:
    """Return pyctcdecode's beam search with a KenLM language model.

    Args:
        alphabet: the classes' characters.
        path: the model, .arpa or KenLM's binary format.
        width: of the beam.
        alpha: weight of the model.
        beta: bonus of every word.

    Returns:
        The search; None where pyctcdecode or kenlm is not installed, the file is packed, or the
        alphabet has no space.

    Raises:
        ValueError: if the model cannot be read.
        OSError: if it is not there.
    """
    binary = is_binary(path)
    if SPACE not in alphabet.classes or (Path(path).suffix == ".gz" and not binary):
        return None
    try:
        import kenlm
        import pyctcdecode
    except ImportError:
        return None
    try:
        shout = not alphabet.has_capitals and _is_in_capitals(kenlm.Model(str(path)), alphabet)
        labels = [c.upper() if shout else c for c in alphabet.characters]
        decoder = pyctcdecode.build_ctcdecoder(
            ["", *labels], kenlm_model_path=str(path), alpha=alpha, beta=beta
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"language model {path} cannot be read by KenLM ({reason(error)}); give the .arpa file "
            "or make the binary anew"
        ) from error

    def decode(output: Tensor) -> tuple[Tensor, float]:
        best = decoder.decode_beams(output.numpy(), beam_width=width)[0]
        return alphabet.encode(best[0]), float(best[-1])

    return _each(decode, alphabet)


def _is_in_capitals(model: Any, alphabet: Alphabet) -> bool:
    """Return whether a model's words are in capitals, as single letters among them tell."""
    letters = [c for c in alphabet.characters if c.isalpha()]
    return any(c.upper() in model for c in letters) and not any(c in model for c in letters)


def torchaudio_beam(alphabet: Alphabet, width: int, viterbi: bool = False) -> _Decode | None:
    """Return torchaudio's beam search (flashlight-text), without a language model.

    Args:
        alphabet: the classes' characters.
        width: of the beam.
        viterbi: whether a text counts by its likeliest path, not by all.

    Returns:
        The search; None where flashlight-text is not installed.
    """
    try:
        from torchaudio.models.decoder import ctc_decoder
    except (ImportError, RuntimeError):
        return None
    decoder = ctc_decoder(
        lexicon=None,
        tokens=[_BLANK_NAME, *alphabet.characters],
        beam_size=width,
        beam_threshold=1e3,  # as good as none: the width alone prunes
        log_add=not viterbi,
        blank_token=_BLANK_NAME,
        # It stands at both ends of every path; a space there, or a blank, is taken off again.
        sil_token=SPACE if SPACE in alphabet.classes else _BLANK_NAME,
    )

    def decode(output: Tensor) -> tuple[Tensor, float]:
        best = decoder(output[None])[0][0]
        return alphabet.encode(alphabet.decode(best.tokens.tolist())), float(best.score)

    return _each(decode, alphabet)


def _each(decode: Callable[[Tensor], tuple[Tensor, float]], alphabet: Alphabet) -> _Decode:
    """Return a decoder of batches, given one that finds classes and score of one recording."""

    def decode_all(log_probs: Tensor, lengths: Tensor) -> list[Hypothesis]:
        check_log_probs(log_probs, alphabet, lengths)
        outputs = log_probs.detach().float().cpu()
        found = []
        for place, length in enumerate(lengths.tolist()):
            output = outputs[place, :length].contiguous()
            ids, score = decode(output) if length else (alphabet.encode(""), 0.0)
            found.append(write(ids, score, output, alphabet))
        return found

    return decode_all
