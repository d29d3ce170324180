"""Programs: lists of steps over one arena, run by one call of the library."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from blnet.kernels.native.arena import (
    Draft,
    Map,
    Shape,
    crossing_maps,
    first_together,
    for_image,
    plan_arena,
)
from blnet.kernels.native.library import COUNTERS, Call, Library, Step
from blnet.kernels.native.memory import gathered, reserve

_ALIGNMENT = 16  # floats: a cache line

_forked = False
_programs: weakref.WeakSet[Program] = weakref.WeakSet()


def _after_fork() -> None:
    global _forked
    _forked = True  # OpenMP's threads stayed with the parent, and it waits for them for ever
    for program in _programs:
        program._lock = threading.Lock()  # so did the thread that may have held the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Program:
    """A list of steps over its own memory; call it with a tensor.

    Of a batch, the first steps, whose maps are large, run image by image: each thread takes images
    of its own and waits for nobody. The rest runs on the whole batch, all threads at one step.

    Args:
        library: the compiled library.
        shape: of the input.
        drafts: the steps.
        outputs: shapes of the outputs.
        threads: how many may work at once.

    Attributes:
        steps: what each step does.
        shape: of the input.
    """

    def __init__(
        self,
        library: Library,
        shape: Shape,
        drafts: Sequence[Draft],
        outputs: Sequence[tuple[int, ...]],
        threads: int = 1,
    ) -> None:
        self.steps = [draft.text for draft in drafts]
        self.shape = shape
        self._library = library
        self._outputs = list(outputs)
        self._tensors = _gathered(drafts)
        count = first_together(drafts)
        places, size = plan_arena(drafts, count)
        # Each lane has an arena of its own for the maps of its image; the others lie in the first.
        self._lanes = min(threads, shape[0]) if count else 0
        self._arena = reserve(size * max(self._lanes, 1))
        self._scratch_floats = -(-max(d.scratch for d in drafts) // _ALIGNMENT) * _ALIGNMENT
        self._scratch = torch.empty(0, dtype=torch.float32, device="cpu")
        self._taken = torch.empty(0, dtype=torch.int64, device="cpu")
        self._prepared = 0
        self._lock = threading.Lock()
        # One for all calls: after each, the caches hold maps and weights and nothing of Python, so
        # that every line of memory that a call goes through first costs it time.
        self._call = Call(scratch_floats=self._scratch_floats)
        steps = [self._place(draft, places) for draft in drafts]
        crossing = crossing_maps(drafts, count)

        def of_image(image: int, lane: int) -> list[Step]:
            pairs = zip(drafts[:count], steps, strict=False)
            return [for_image(d, step, image, crossing, 4 * size * lane) for d, step in pairs]

        # Lane after lane, each its images; then the images that are left, by all threads together.
        rounds = shape[0] // self._lanes if self._lanes else 0
        together = range(rounds * self._lanes, shape[0] if self._lanes else 0)
        passes = [
            step
            for lane in range(self._lanes)
            for image in range(lane, rounds * self._lanes, self._lanes)
            for step in of_image(image, lane)
        ]
        passes += [step for image in together for step in of_image(image, 0)]
        passes += steps[count:]
        self._alone = rounds * count
        self._steps = (Step * len(passes))(*passes)
        _programs.add(self)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return the outputs, contiguous, for an input of the program's shape, any strides.

        Threads of Python may call at once: they take turns.

        Raises:
            ValueError: if x is not a float32 tensor of the program's shape on the CPU.
        """
        if x.layout != torch.strided:
            raise ValueError(
                f"this program reads strided tensors, got one of layout {x.layout}; call to_dense()"
            )
        if x.shape != self.shape or x.dtype != torch.float32 or not x.is_cpu:
            raise ValueError(
                f"this program takes float32 tensors of shape {self.shape} on the CPU, got "
                f"{x.dtype} of shape {tuple(x.shape)} on {x.device}; build one for this shape"
            )
        x = x.resolve_neg()  # the library reads memory as it is
        outputs = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in self._outputs]
        threads = torch.get_num_threads() if self._library.threaded and not _forked else 1
        with self._lock:
            call = self._call
            if threads > self._prepared:
                self._prepare(threads)
            call.threads, call.input = threads, x.data_ptr()
            call.strides[:] = x.stride()
            call.outputs[: len(outputs)] = [output.data_ptr() for output in outputs]
            self._library.handle.blnet_native_run(
                self._steps,
                self._lanes,
                self._alone,
                len(self._steps),
                ctypes.byref(call),
                threads,
            )
        return outputs

    def _prepare(self, threads: int) -> None:
        """Reserve what so many threads need beside the arena."""
        self._scratch = reserve(threads * self._scratch_floats)
        self._taken = torch.empty(
            len(self._steps) * threads * COUNTERS, dtype=torch.int64, device="cpu"
        )
        self._call.scratch, self._call.taken = self._scratch.data_ptr(), self._taken.data_ptr()
        self._prepared = threads

    def _place(self, draft: Draft, places: dict[Map, int]) -> Step:
        """Return the draft's step with its pointers."""
        step, base = draft.step, self._arena.data_ptr()
        for name, tensor in draft.tensors.items():
            setattr(step, name, tensor.data_ptr())
        for name in ("source", "target", "residual"):
            item: Map | None = getattr(draft, name)
            if item is not None:
                setattr(step, f"{name}_image", item.image)
                if not item.is_input:
                    setattr(step, name, base + 4 * places[item])
        if draft.target is not None:
            step.target += 4 * draft.offset
        return step


def _gathered(drafts: Sequence[Draft]) -> list[Tensor]:
    """Bring all weights into one region of memory; return what the steps point at."""
    kept = []
    for draft in drafts:
        names = [name for name, tensor in draft.tensors.items() if tensor.dtype == torch.float32]
        kept += [(draft, name) for name in names]
    copies = gathered([draft.tensors[name] for draft, name in kept], _ALIGNMENT)
    for (draft, name), copy in zip(kept, copies, strict=True):
        draft.tensors[name] = copy
    return [tensor for draft in drafts for tensor in draft.tensors.values()]
