"""Batches in an order that seed, epoch and step decide, so that a run can go on anywhere.

Nothing random has a past: each sample's randomness is seeded by (seed, epoch, index), wherever and
whenever it is loaded. A run that goes on from step n therefore sees what it would have seen, with
any number of loading processes, and so does a run on several devices.
"""

from __future__ import annotations

import atexit
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from blnet.training.failures import in_words
from blnet.training.stopping import endure

Collate = Callable[[list[Any]], dict[str, Any]]
_MOST_TRIES = 100  # samples tried in place of one that cannot be read
_SECONDS_TO_DIE = 5.0  # between a broken pipe to a loading process and the news of its death


class CorruptSample(Exception):  # noqa: N818 - it is a finding, not a fault of the program
    """A sample that cannot be read; a data set raises it, and the loop counts and skips it.

    Args:
        name: the file or entry.
        reason: what was wrong with it, one line.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason


class Corrupt(NamedTuple):
    """What is known of a corrupt sample.

    Attributes:
        name: the file or entry.
        reason: what was wrong with it, one line.
        place: which sample of the data set it is, as two may have one name; None in a stream.
    """

    name: str
    reason: str
    place: int | None = None


def mixed_seed(*numbers: int) -> int:
    """Return a seed of 63 bits that depends on every one of some whole numbers, in their order."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Layout:
    """How the samples of a step are shared out.

    Attributes:
        batch_size: samples in a step, over all devices.
        accumulate: micro-batches that each device takes one after the other in a step.
        devices: number of processes, one a device.
        rank: which of them this is.
    """

    batch_size: int
    accumulate: int = 1
    devices: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        parts = self.accumulate * self.devices
        if self.batch_size % parts:
            raise ValueError(
                f"--batch-size {self.batch_size} does not divide by {self.devices} devices times "
                f"--accumulate {self.accumulate}; choose a multiple of {parts}"
            )

    @property
    def micro_batch(self) -> int:
        """Samples that go through the network at once."""
        return self.batch_size // (self.accumulate * self.devices)

    def steps(self, micro_batches: int) -> int:
        """Return how many whole steps so many micro-batches of an epoch are."""
        return micro_batches // (self.accumulate * self.devices)

    def own(self, micro_batches: Sequence[Any]) -> Sequence[Any]:
        """Return this device's micro-batches of those of an epoch, of its whole steps."""
        whole = self.steps(len(micro_batches)) * self.accumulate * self.devices
        return micro_batches[self.rank : whole : self.devices]


def shuffled_batches(count: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the indices 0 ... count - 1, shuffled and cut into whole batches.

    Args:
        count: number of samples; those that fill no batch are left out.
        size: samples in a batch.
        seed: of the run.
        epoch: counted from 0; each has an order of its own.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    order = torch.randperm(count, generator=generator).tolist()
    return [order[start : start + size] for start in range(0, count - size + 1, size)]


@runtime_checkable
class Stream(Protocol):
    """A data set that is read from one end to the other: shards that no machine holds all of.

    Its readers are the loading processes of all devices. Each reads a share of its own, in an order
    that depends on the arguments of `read` and on nothing that was read before. For training a
    share must be long enough for its part of an epoch; one that starts over at its end always is.

    Attributes:
        samples: samples in an epoch, of all readers together.
    """

    samples: int

    def read(self, epoch: int, reader: int, readers: int, skip: int) -> Iterator[Any]:
        """Yield a reader's samples of an epoch, and a `CorruptSample` for each that is unreadable.

        Torch's global random state is seeded before each of them is asked for.

        Args:
            epoch: counted from 0.
            reader: which reader, from 0 to readers - 1.
            readers: how many there are.
            skip: items that this reader gave earlier, corrupt ones counted; the first item now is
                the one after those. They need not be decoded.
        """


class _Guarded(Dataset[Any]):
    """Seeds the drawing for each sample, and reads past those that are corrupt.

    An item is (sample or None, what was corrupt). With `replace` the next readable sample takes the
    place of a corrupt one, which keeps every batch as large as it was to be.
    """

    def __init__(self, dataset: Any, replace: bool) -> None:
        self.dataset = dataset
        self.replace = replace

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[Corrupt]]:
        first, seed = key
        corrupt: list[Corrupt] = []
        count = len(self.dataset)
        for offset in range(min(count, _MOST_TRIES) if self.replace else 1):
            torch.default_generator.manual_seed(seed)
            index = (first + offset) % count
            try:
                return self.dataset[index], corrupt
            except CorruptSample as error:
                corrupt.append(Corrupt(error.name, error.reason, index))
        return None, corrupt


@dataclass
class _GuardedStream(IterableDataset[Any]):
    """The same over a stream: a corrupt sample leaves its batch one smaller.

    Attributes:
        stream: what is read.
        seed: of the run.
        epoch: counted from 0.
        batch_size: items in a batch.
        skipped: batches that this device has had already.
        rank: which device this is.
        devices: how many there are.
    """

    stream: Any
    seed: int
    epoch: int
    batch_size: int
    skipped: int
    rank: int
    devices: int

    def __iter__(self) -> Iterator[tuple[Any, list[Corrupt]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # Loading processes take turns giving a batch, from the first. After some batches another
        # one's turn has come, so the first process reads what that one would have.
        turn = (worker + self.skipped) % workers
        skip = -(-max(0, self.skipped - turn) // workers) * self.batch_size
        reader, readers = self.rank * workers + turn, self.devices * workers
        samples = iter(self.stream.read(self.epoch, reader, readers, skip))
        while True:
            torch.default_generator.manual_seed(mixed_seed(self.seed, self.epoch, reader, skip))
            try:
                sample = next(samples)
            except StopIteration:
                return
            skip += 1
            if isinstance(sample, CorruptSample):
                yield None, [Corrupt(sample.name, sample.reason)]
            else:
                yield sample, []


@dataclass
class Loaded:
    """What a loading process hands over.

    Attributes:
        batch: the collated samples; None where all were corrupt.
        corrupt: every sample that could not be read.
    """

    batch: dict[str, Any] | None
    corrupt: list[Corrupt]

    def pin_memory(self) -> Loaded:
        """Move the tensors to page-locked memory; DataLoader calls it."""
        pin = torch.utils.data._utils.pin_memory.pin_memory
        return Loaded(None if self.batch is None else pin(self.batch), self.corrupt)


class _Collate:
    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[Any, list[Corrupt]]]) -> Loaded:
        samples = [sample for sample, _ in items if sample is not None]
        corrupt = [entry for _, found in items for entry in found]
        return Loaded(self.collate(samples) if samples else None, corrupt)


class _Keys:
    """The batch sampler: lists of (index, seed). It lives in the main process and can change."""

    def __init__(self) -> None:
        self.batches: Sequence[Sequence[int]] = ()
        self.seeds = (0, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [(index, mixed_seed(*self.seeds, index)) for index in batch]

    def __len__(self) -> int:
        return len(self.batches)


class Loader:
    """Loads the batches of one data set, in this process or in others.

    Args:
        dataset: map-style (item i of `len`), or a `Stream`.
        collate: makes a dict of tensors from a list of samples.
        workers: loading processes; 0 loads in this one.
        replace: whether the next sample takes the place of a corrupt one (map-style, training).
        pin: whether to put batches into page-locked memory, from which a GPU reads faster.
    """

    def __init__(
        self, dataset: Any, collate: Collate, workers: int = 0, replace: bool = False,
        pin: bool = False,
    ) -> None:  # fmt: skip
        self._dataset = dataset
        self._keys = _Keys()
        self._options: dict[str, Any] = {
            "collate_fn": _Collate(collate),
            "num_workers": workers,
            "pin_memory": pin,
            # Not from the process's own random state, which a loader must not move.
            "generator": torch.Generator(),
            "worker_init_fn": endure,
        }
        self._loader: DataLoader[Any] | None = None
        self._running: Any = None
        if not isinstance(dataset, Stream):
            self._loader = DataLoader(
                _Guarded(dataset, replace),
                batch_sampler=self._keys,
                persistent_workers=workers > 0,
                **self._options,
            )

    @property
    def is_stream(self) -> bool:
        """Whether the data set is read from one end to the other."""
        return self._loader is None

    def batches(self, order: Sequence[Sequence[int]], seed: int, epoch: int) -> Iterator[Loaded]:
        """Yield the batches of a map-style data set whose indices are given, in that order.

        Raises:
            ValueError: if a loading process dies.
        """
        assert self._loader is not None
        self._keys.batches, self._keys.seeds = order, (seed, epoch)
        yield from self._told(self._loader)

    def stream(
        self, batch_size: int, epoch: int, skipped: int = 0, seed: int = 0
    ) -> Iterator[Loaded]:
        """Yield the batches of a `Stream`'s epoch after those that this device has had already.

        Raises:
            ValueError: if a loading process dies.
        """
        here = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if here else 0
        devices = torch.distributed.get_world_size() if here else 1
        guarded = _GuardedStream(self._dataset, seed, epoch, batch_size, skipped, rank, devices)
        yield from self._told(DataLoader(guarded, batch_size=batch_size, **self._options))

    def _told(self, batches: DataLoader[Any]) -> Iterator[Loaded]:
        try:
            running = iter(batches)
            if running is not self._running:
                self.close()
                self._running = running
                atexit.register(self.close)
            yield from running
        except (ValueError, OSError, RuntimeError, EOFError) as error:
            told = in_words(error) or in_words(self._cause(error))
            if told is None:
                raise
            raise told from error

    def _cause(self, error: Exception) -> Exception:
        """Return the death of a loading process where that is what an error stems from.

        A process that dies closes its pipes first, and the system tells of its death later. What
        reads from a pipe in between fails, and PyTorch takes the process for alive. It would raise
        the death where the program happens to be by then.
        """
        if not isinstance(error, ConnectionError | EOFError):
            return error
        processes = {
            process.sentinel: process for process in getattr(self._running, "_workers", ())
        }
        try:
            for sentinel in connection.wait(processes, _SECONDS_TO_DIE):
                process = processes[sentinel]
                process.join()
                return RuntimeError(
                    f"DataLoader worker (pid {process.pid}) ended with status {process.exitcode}"
                )
        except RuntimeError as death:  # PyTorch's own, raised while we wait
            return death
        return error

    def close(self) -> None:
        """End the loading processes; otherwise they end with this process.

        Python's garbage collector is not to be left with it: it may first close what tells them to
        end, and they ignore (`endure`) the signal that PyTorch and Python would then send.
        """
        running, self._running = self._running, None
        atexit.unregister(self.close)
        if hasattr(running, "_shutdown_workers"):
            running._shutdown_workers()
            for process in running._workers:
                process.kill()
                process.join()
