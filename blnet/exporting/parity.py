"""The check of a written file: does it compute what the network computes, at other sizes too?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from blnet.comparing import finite_parts
from blnet.exporting.formats import Runner
from blnet.exporting.forms import Form
from blnet.files import reason

TOLERANCE = 1e-4  # float32 sums in another order; measured: below 2e-6


class ParityError(ValueError):
    """A file does not compute what its network computes."""


@dataclass(frozen=True)
class Parity:
    """How far a file is from its network.

    Attributes:
        error: largest relative error: of each output the largest difference over the largest value.
        shapes: of the first input, at which it was measured.
    """

    error: float
    shapes: tuple[tuple[int, ...], ...]


def compare(
    form: Form, run: Runner, dynamic: bool, least: Mapping[str, int] | None = None
) -> Parity:
    """Run a file beside its network at several shapes.

    A shape that the network itself does not run at is left out, but for its example's, and so is
    one that is too small for the file.

    Args:
        form: the network.
        run: runs the file.
        dynamic: whether the file's sizes are free.
        least: the free axes that are not free from 1 on, with the file's least sizes.

    Raises:
        ParityError: if the file does not run, or an error is above `TOLERANCE`, at some shape.
    """
    worst, shapes = 0.0, []
    for seed, shape in enumerate(form.probes(dynamic), 1):
        if not form.is_taken(shape, least or {}):
            continue
        inputs = form.drawn(shape, seed)
        try:
            wanted = form.answer(*inputs)
        except Exception:  # whatever the user's network raises
            if shape == form.shape:
                raise
            continue
        told = f"the file does not compute what the network computes at {_text(shape)}"
        try:
            given = run(inputs)
        except Exception as error:  # a runtime's own
            raise ParityError(f"{told}: it fails ({reason(error)}); report it, and try another "
                              "--format or --static") from error  # fmt: skip
        found = _relative_error(given, wanted)
        if not found <= TOLERANCE:
            raise ParityError(f"{told}: the relative error is {found:.1e}, above {TOLERANCE:.0e}; "
                              "report it, and try another --format or --static")  # fmt: skip
        worst = max(worst, found)
        shapes.append(shape)
    return Parity(worst, tuple(shapes))


def _relative_error(given: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """Return the largest error of all outputs; infinite where shapes differ, NaN or infinities.

    Integers, which are indices and counts, must be the same.
    """
    if [one.shape for one in given] != [one.shape for one in wanted]:
        return float("inf")
    errors = [0.0]
    for ours, theirs in zip(given, wanted, strict=True):
        if not (theirs.is_floating_point() or theirs.is_complex()):
            errors.append(0.0 if bool((ours == theirs).all()) else float("inf"))
            continue
        ours, theirs = finite_parts(ours, theirs)
        if theirs.numel() == 0:
            continue
        difference = (ours - theirs).abs().max()
        # An output that is 0 everywhere must be that exactly.
        scale = theirs.abs().max()
        error = float(difference if bool(difference == 0) else difference / scale)
        errors.append(float("inf") if math.isnan(error) else error)
    return max(errors)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
