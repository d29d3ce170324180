"""From what a network says of each frame to text, and how much of the text is wrong.

`greedy` takes the likeliest path, `beam` the likeliest text; `make_decoder` chooses by name, and
takes a faster decoder from another package where one is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.text import CharErrorRate, WordErrorRate

from blnet.checks import check_flag_choice
from blnet.files import StrPath
from blnet.speech.hypotheses import (
    Collapse,
    Hypothesis,
    Token,
    Word,
    best_path,
    check_log_probs,
)
from blnet.speech.ngrams import LanguageModel, is_binary
from blnet.speech.outside import pyctcdecode_beam, torchaudio_beam
from blnet.speech.prefix_beam import beam
from blnet.speech.text import Alphabet

__all__ = [
    "Decoder",
    "DecoderName",
    "Hypothesis",
    "LanguageModel",
    "Token",
    "Word",
    "beam",
    "error_rates",
    "greedy",
    "make_decoder",
]

DecoderName = Literal["auto", "greedy", "beam"]
WIDTH = 16


def greedy(log_probs: Tensor, lengths: Tensor, alphabet: Alphabet) -> list[Hypothesis]:
    """Return what the likeliest path of each recording says.

    Args:
        log_probs: natural log probabilities (N, T, classes); class 0 is the blank.
        lengths: frames of each recording, int64 (N,).
        alphabet: the classes' characters.

    Returns:
        For each recording its text; `score` is the path's log probability.

    Raises:
        ValueError: if shapes do not fit.
    """
    check_log_probs(log_probs, alphabet, lengths)
    labels, values = best_path(log_probs)
    found = []
    for place, length in enumerate(lengths.tolist()):
        path, scores = labels[place, :length], values[place, :length]
        collapse = Collapse(alphabet)
        tokens = collapse.push(path, np.exp(scores)) + collapse.finish()
        found.append(Hypothesis(float(scores.sum(dtype=np.float64)), tuple(tokens)))
    return found


@dataclass(frozen=True)
class Decoder:
    """A decoder with its settings; called with log_probs and lengths as `greedy` takes them.

    Attributes:
        title: one line that says which it is, for the log.
        run: what decodes.
        is_greedy: whether it takes the likeliest path, which can be done frame by frame.
    """

    title: str
    run: Callable[[Tensor, Tensor], list[Hypothesis]]
    is_greedy: bool = False

    def __call__(self, log_probs: Tensor, lengths: Tensor) -> list[Hypothesis]:
        """Return what each recording says; see `greedy`."""
        return self.run(log_probs, lengths)


def make_decoder(
    name: DecoderName,
    alphabet: Alphabet,
    language_model: StrPath | None = None,
    width: int | None = None,
    alpha: float = 0.5,
    beta: float = 1.0,
    viterbi: bool = False,
) -> Decoder:
    """Return a decoder by its name.

    A beam search with a language model is pyctcdecode's where it and kenlm are installed, one
    without is torchaudio's where flashlight-text is; otherwise it is our own, which reads ARPA
    files. `Decoder.title` says which. pyctcdecode adds up paths and so is not taken for `viterbi`.

    Args:
        name: greedy, beam, or auto: beam if a language model or a width is given, else greedy.
        alphabet: the classes' characters.
        language_model: n-grams of words: .arpa, .arpa.gz, or KenLM's binary format.
        width: of the beam; 16 if none is given.
        alpha: weight of the language model.
        beta: bonus of every word beside a language model.
        viterbi: whether a beam search takes a text's likeliest path and not the sum over all, as
            networks of frame labels need (see `beam`).

    Raises:
        ValueError: if the settings contradict each other, or the language model cannot be read.
        OSError: if the language model is not there.
    """
    check_flag_choice("--decoder", name, get_args(DecoderName))
    if width is not None and width < 1:
        raise ValueError(f"--beam-width must be 1 or more, got {width}")
    plain = language_model is None and width is None
    if name == "greedy" and not plain:
        raise ValueError("--decoder greedy takes no language model and no beam; use --decoder beam")
    if name == "greedy" or (name == "auto" and plain):
        title = "greedy (the likeliest path)"
        return Decoder(title, lambda x, n: greedy(x, n, alphabet), is_greedy=True)
    width = width or WIDTH
    if language_model is None:
        return _plain_beam(alphabet, width, viterbi)
    return _beam_with_words(alphabet, language_model, width, alpha, beta, viterbi)


def _plain_beam(alphabet: Alphabet, width: int, viterbi: bool) -> Decoder:
    outside = torchaudio_beam(alphabet, width, viterbi)
    if outside is not None:
        return Decoder(f"beam of {width} (torchaudio)", outside)
    return Decoder(
        f"beam of {width} (our own)", lambda x, n: beam(x, n, alphabet, width, viterbi=viterbi)
    )


def _beam_with_words(
    alphabet: Alphabet, path: StrPath, width: int, alpha: float, beta: float, viterbi: bool
) -> Decoder:
    if viterbi and is_binary(path):
        raise ValueError(
            f"language model {path} is in KenLM's binary format, which is not read for a network "
            "of frame labels; give the .arpa file"
        )
    outside = None if viterbi else pyctcdecode_beam(alphabet, path, width, alpha, beta)
    if outside is not None:
        return Decoder(f"beam of {width} with language model {path} (pyctcdecode)", outside)
    model = LanguageModel.load(path, alphabet.normalise)
    return Decoder(
        f"beam of {width} with language model {path} ({model.order}-grams, our own)",
        lambda x, n: beam(x, n, alphabet, width, model, alpha, beta, viterbi),
    )


def error_rates() -> MetricCollection:
    """Return the metrics of transcripts: "wer" and "cer", word and character error rate.

    Errors (substitutions, insertions, deletions) of all transcripts over the words or characters
    of all references, so it can be above 1; NaN while no reference had any. `update` takes what
    was found and what was said, two lists of strings.
    """
    # As a group they would share one count wherever the first batch's words and characters agree.
    return MetricCollection({"wer": WordErrorRate(), "cer": CharErrorRate()}, compute_groups=False)
