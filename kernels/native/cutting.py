"""How the work of a step is cut into pieces."""

from __future__ import annotations

import math

from blnet.kernels.native.library import Library, Step

BLOCK = 16  # channels of a block, as in step.h
ALONE_BYTES = 1024 * 1024  # of an image's map, from where the third cache would not hold the batch


def blocks_of(channels: int) -> int:
    """Return how many blocks of 16 hold so many channels."""
    return math.ceil(channels / BLOCK)


def even(chunks: int, step: Step, threads: int) -> int:
    """Return so many chunks, or some more so that each thread gets as many as the others."""
    sharing = pieces_for(step, threads, 1)
    return chunks if chunks == 1 else math.ceil(chunks / sharing) * sharing


def shared(chunks: int, step: Step, weights: int, threads: int) -> int:
    """Return so many chunks, or one for each thread where there is more of maps than of weights.

    Threads then have the pixels that they have of the steps around it. Where there is more to read
    of weights, they rather share those: each has its output channels.
    """
    sharing = chunks == 1 and step.batch < threads and weights < map_floats(step)
    return threads if sharing else chunks


def map_floats(step: Step) -> int:
    """Return how many an image's two maps hold, read and written."""
    read, written = step.height * step.width, step.out_height * step.out_width
    return int(BLOCK * (step.blocks * read + step.out_blocks * written))


def cut_rows(step: Step, threads: int) -> None:
    """Cut a step without weights: by images, or by rows where there are more threads."""
    step.chunks = min(threads, step.out_height) if step.batch < threads else 1
    step.chunk = math.ceil(step.out_height / step.chunks)
    step.items = step.batch * step.chunks * step.blocks


def alone(step: Step) -> bool:
    """Return whether a step's map is so large that images go through it one at a time."""
    size = 4 * BLOCK * step.out_blocks * step.out_height * step.out_width
    return bool(step.batch > 1 and size >= ALONE_BYTES)


def pieces_for(step: Step, threads: int, each: int) -> int:
    """Return how many pieces a step's work is cut into at least, `each` for a thread."""
    # Threads that take images of their own share no step: a cut would only repeat its preparation.
    return 1 if alone(step) and step.batch % threads == 0 else threads * each


def cut_slices(library: Library, step: Step, pieces: int, images: int) -> None:
    """Cut the output channels so that there are about so many pieces of work."""
    groups = math.ceil(step.out_channels / library.group)
    wanted = min(groups, math.ceil(pieces / (images * step.chunks)))
    step.slice = math.ceil(groups / wanted)
    step.slices = math.ceil(groups / step.slice)
    step.items = step.batch * step.chunks * step.slices
