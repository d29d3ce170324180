"""Steps before they have pointers, their order in time, and where their maps lie in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from blnet.kernels.native import winograd
from blnet.kernels.native.cutting import BLOCK, alone, blocks_of
from blnet.kernels.native.library import Step

Shape = tuple[int, int, int, int]


@dataclass(eq=False)
class Map:
    """A map that a program computes.

    Attributes:
        shape: (N, C, H, W).
        is_input: whether it is the caller's tensor, which has its own layout.
    """

    shape: Shape
    is_input: bool = False

    @property
    def floats(self) -> int:
        """Its size in memory."""
        images, channels, height, width = self.shape
        return images * blocks_of(channels) * BLOCK * height * width

    @property
    def image(self) -> int:
        """Floats from one image to the next."""
        return self.floats // self.shape[0]


@dataclass(eq=False)
class Draft:
    """A step whose pointers are still maps and tensors."""

    step: Step
    text: str
    target: Map | None
    source: Map | None = None
    residual: Map | None = None
    offset: int = 0  # of the target, in floats
    scratch: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by pointer


def first_together(drafts: Sequence[Draft]) -> int:
    """Return how many steps run image by image before the rest runs on the whole batch.

    Large maps of a whole batch would go to memory and back between steps; those of one image stay
    in the caches. Small maps go together, because there the weights are what must be read.
    """
    large = [i for i, d in enumerate(drafts) if d.target is not None and alone(d.step)]
    return max(large) + 1 if large else 0


def maps_of(draft: Draft) -> list[Map]:
    """Return the maps in the arena that a step reads or writes."""
    parts = (draft.source, draft.residual, draft.target)
    return [part for part in parts if part is not None and not part.is_input]


def crossing_maps(drafts: Sequence[Draft], count: int) -> set[Map]:
    """Return the maps that the first steps write and later ones read."""
    later = {part for draft in drafts[count:] for part in maps_of(draft)}
    return {part for draft in drafts[:count] for part in maps_of(draft)} & later


def for_image(draft: Draft, step: Step, image: int, crossing: set[Map], shift: int = 0) -> Step:
    """Return a step of one image of the batch; only crossing maps hold all images.

    Args:
        draft: the step's.
        step: of the whole batch.
        image: which one.
        crossing: see `crossing_maps`.
        shift: bytes from where the image's own maps were planned to where they lie.
    """
    own = Step.from_buffer_copy(step)
    own.first_image = image
    if step.kind == winograd.KIND:
        tiles = math.ceil(step.out_height / step.tile_h) * math.ceil(step.out_width / step.tile_w)
        own.chunks = math.ceil(tiles / step.chunk)
        own.items = own.chunks * step.slices
    else:
        own.items = step.items // step.batch
    own.batch = 1
    for name in ("source", "target", "residual"):
        part: Map | None = getattr(draft, name)
        if part is None or part.is_input:
            continue
        move = 4 * image * part.image if part in crossing else shift
        setattr(own, name, getattr(step, name) + move)
    return own


def plan_arena(drafts: Sequence[Draft], count: int) -> tuple[dict[Map, int], int]:
    """Return where each map lies, in floats, and the arena's size.

    Maps that are needed at the same time do not overlap. A sum takes the place of its residual, if
    nobody reads that again: what is read anyway is written, and the caches hold one map less. Any
    other map takes the lowest place that is free while it lives.

    Args:
        drafts: the steps.
        count: how many of them run image by image; their own maps hold one image.
    """
    born: dict[Map, int] = {}
    dies: dict[Map, int] = {}
    for index, draft in enumerate(drafts):
        for item in maps_of(draft):
            born.setdefault(item, index)
            dies[item] = index
    sizes = {item: item.image if dies[item] < count else item.floats for item in born}
    for item in crossing_maps(drafts, count):
        born[item] = 0  # it keeps the first image while the next ones are computed
    places: dict[Map, int] = {}
    summed = {d.target: (index, d.residual) for index, d in enumerate(drafts) if _in_place(d)}
    for item in sorted(born, key=lambda item: born[item]):
        index, residual = summed.get(item, (-1, None))
        if residual in places and dies[residual] == index and sizes[residual] == sizes[item]:
            places[item] = places[residual]
            continue
        others = [
            (places[other], places[other] + sizes[other])
            for other in places
            if dies[other] >= born[item]
        ]
        place = 0
        for begin, end in sorted(others):
            if place + sizes[item] <= begin:
                break
            place = max(place, end)
        places[item] = place
    return places, max((places[item] + sizes[item] for item in born), default=0)


def _in_place(draft: Draft) -> bool:
    """Return whether each value of the residual is read only where a sum is written."""
    same = draft.residual is not None and "table" not in draft.tensors
    return same and draft.residual is not draft.source
