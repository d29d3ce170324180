"""The order of the samples follows from seed, epoch and step alone, whoever loads them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.training.loading import (
    CorruptSample,
    Layout,
    Loaded,
    Loader,
    Stream,
    mixed_seed,
    shuffled_batches,
)
from helpers.blobs import TinyData, TinyStream
from helpers.processes import environment


def collate(samples: list[Any]) -> dict[str, Any]:
    return {"inputs": torch.stack([torch.as_tensor(sample[0]) for sample in samples])}


def values(batches: Iterator[Loaded], count: int | None = None) -> list[torch.Tensor]:
    found = []
    for batch in batches:
        assert batch.batch is not None
        found.append(batch.batch["inputs"])
        if len(found) == count:
            break
    return found


def check_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    assert one
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- layout -------------------------------------------------------------------------------------


@given(
    micro=st.integers(1, 5), accumulate=st.integers(1, 4), devices=st.integers(1, 4),
    count=st.integers(0, 200),
)  # fmt: skip
def test_devices_share_the_micro_batches_of_whole_steps(
    micro: int, accumulate: int, devices: int, count: int
) -> None:
    size = micro * accumulate * devices
    layouts = [Layout(size, accumulate, devices, rank) for rank in range(devices)]
    alone = Layout(size, accumulate * devices)
    order = shuffled_batches(count, layouts[0].micro_batch, seed=3, epoch=1)
    shares = [layout.own(order) for layout in layouts]
    steps = layouts[0].steps(len(order))
    assert steps == count // size
    assert {len(share) for share in shares} == {steps * accumulate}
    # Part by part, device by device, they are what one device takes one after the other.
    joined = [share[part] for part in range(steps * accumulate) for share in shares]
    assert joined == list(alone.own(shuffled_batches(count, alone.micro_batch, 3, 1)))


def test_a_batch_that_does_not_divide_names_a_multiple() -> None:
    with pytest.raises(ValueError, match=r"--batch-size 10 .* 2 devices .*multiple of 6"):
        Layout(10, accumulate=3, devices=2)


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [i for batch in shuffled_batches(23, 4, seed, epoch) for i in batch]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    for each in orders:
        assert len(set(each)) == len(each) == 20
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] == order(0, 0)


def test_a_seed_depends_on_every_number_and_their_order() -> None:
    seeds = [mixed_seed(*numbers) for numbers in ((1, 2), (2, 1), (12,), (1, 2, 0), (1,))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- map-style data -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_do_not_depend_on_the_loading_processes(workers: int) -> None:
    data, order = TinyData(20), [[3, 1], [7, 7], [0, 19]]
    alone = values(Loader(data, collate).batches(order, seed=5, epoch=2))
    check_equal(alone, values(Loader(data, collate, workers).batches(order, seed=5, epoch=2)))


def test_samples_do_not_depend_on_what_came_before() -> None:
    data, order = TinyData(20), [[3, 1], [7, 4], [0, 19]]
    loader = Loader(data, collate)
    whole = values(loader.batches(order, seed=5, epoch=2))
    torch.rand(7)
    check_equal(whole[1:], values(loader.batches(order[1:], seed=5, epoch=2)))
    for seed, epoch in ((6, 2), (5, 3)):
        other = values(loader.batches(order, seed=seed, epoch=epoch))
        assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_loading_processes_go_on_to_the_next_epoch() -> None:
    loader = Loader(TinyData(20), collate, workers=2)
    for epoch in range(3):
        order = shuffled_batches(20, 6, 0, epoch)
        alone = values(Loader(TinyData(20), collate).batches(order, 0, epoch))
        check_equal(alone, values(loader.batches(order, 0, epoch)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_sample_takes_the_place_of_a_corrupt_one(workers: int) -> None:
    data = TinyData(10, corrupt=(9, 0, 4), noise=0)
    loader = Loader(data, collate, workers, replace=True)
    first, second = loader.batches([[9, 5], [4, 2]], seed=0, epoch=0)
    assert [(one.name, one.place) for one in first.corrupt] == [("sample-9", 9), ("sample-0", 0)]
    assert [(one.name, one.place) for one in second.corrupt] == [("sample-4", 4)]
    for batch, indices in ((first, (1, 5)), (second, (5, 2))):
        assert batch.batch is not None
        assert torch.equal(batch.batch["inputs"], torch.stack([data[i][0] for i in indices]))


def test_without_replacement_a_corrupt_sample_is_missing() -> None:
    loader = Loader(TinyData(10, corrupt=(1, 2, 3)), collate)
    first, second = loader.batches([[0, 1], [2, 3]], seed=0, epoch=0)
    assert first.batch is not None
    assert len(first.batch["inputs"]) == 1
    assert second.batch is None
    assert second.corrupt[0] == ("sample-2", "it was spoilt on purpose", 2)


def test_loading_leaves_the_main_process_its_random_state() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    values(Loader(TinyData(8), collate, workers=1).batches([[0, 1], [2, 3]], 0, 0))
    assert torch.equal(before, torch.get_rng_state())


# --- streams ------------------------------------------------------------------------------------


def test_a_stream_is_told_from_a_map_style_set() -> None:
    assert isinstance(TinyStream(8), Stream)
    assert not isinstance(TinyData(8), Stream)
    assert Loader(TinyStream(8), collate).is_stream
    assert not Loader(TinyData(8), collate).is_stream


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_goes_on_in_the_middle(workers: int) -> None:
    loader = Loader(TinyStream(60), collate, workers)
    whole = values(loader.stream(4, epoch=1, seed=2), 9)
    for had in (1, 2, 3, 5, 8):
        rest = values(loader.stream(4, epoch=1, skipped=had, seed=2), 9 - had)
        check_equal(whole[had:], rest)


def test_a_streams_draws_follow_seed_and_epoch() -> None:
    loader = Loader(TinyStream(60), collate)
    whole = values(loader.stream(4, epoch=1, seed=2), 2)
    check_equal(whole, values(loader.stream(4, epoch=1, seed=2), 2))
    assert not torch.equal(whole[0], values(loader.stream(4, epoch=1, seed=3), 1)[0])
    assert not torch.equal(whole[0], values(loader.stream(4, epoch=2, seed=2), 1)[0])


class Drawn(TinyStream):
    """Gives nothing but what is drawn."""

    def read(self, epoch: int, reader: int, readers: int, skip: int) -> Iterator[Any]:
        while True:
            yield torch.rand(1), 0


def test_each_sample_of_a_stream_draws_anew() -> None:
    drawn = torch.cat(values(Loader(Drawn(60), collate, workers=2).stream(4, epoch=0), 6))
    assert len(drawn.unique()) == 24


class Recorded(TinyStream):
    """Gives what `read` was called with."""

    def read(self, epoch: int, reader: int, readers: int, skip: int) -> Iterator[Any]:
        for position in range(skip, 1000):
            yield torch.tensor([epoch, reader, readers, position]), 0


@given(
    workers=st.integers(0, 5), devices=st.integers(1, 3), had=st.integers(0, 12),
    size=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_readers_take_turns_and_skip_what_they_gave(
    workers: int, devices: int, had: int, size: int
) -> None:
    """What loading processes do, without starting any."""
    from unittest import mock

    from blnet.training import loading

    logical = max(1, workers)

    def turns(skipped: int) -> list[list[tuple[int, int]]]:
        """Return the (reader, position) of each batch, as DataLoader asks the processes."""
        shares = []
        for worker in range(logical):
            info = mock.Mock(id=worker, num_workers=logical) if workers else None
            stream = loading._GuardedStream(
                Recorded(9), seed=0, epoch=3, batch_size=size, skipped=skipped, rank=devices - 1,
                devices=devices,
            )  # fmt: skip
            with mock.patch.object(loading, "get_worker_info", return_value=info):
                shares.append(iter(stream))
                found = [next(shares[-1])[0][0].tolist() for _ in range(12 * size)]
            assert {(row[0], row[2]) for row in found} == {(3, devices * logical)}
            shares[-1] = iter([tuple(row[1::2]) for row in found])
        return [[next(shares[n % logical]) for _ in range(size)] for n in range(12)]

    whole, rest = turns(0), turns(had)
    assert rest[: 12 - had] == whole[had:]
    readers = {reader for batch in whole for reader, _ in batch}
    assert readers <= {(devices - 1) * logical + worker for worker in range(logical)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streams_corrupt_samples_are_named_and_missing(workers: int) -> None:
    loader = Loader(TinyStream(60, corrupt=(1,)), collate, workers)
    first = next(iter(loader.stream(4, epoch=0)))
    assert first.corrupt == [("item-0-1", "it was spoilt on purpose", None)]
    assert first.batch is not None
    assert len(first.batch["inputs"]) == 3


# --- failures -----------------------------------------------------------------------------------


class Failing(TinyData):
    """Fails at one sample, as a data set would that finds more wrong than a file."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 3:
            raise OSError("the archive pictures.npz is gone; mount its disk again")
        if index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_is_its_own_sentence(workers: int) -> None:
    loader = Loader(Failing(10), collate, workers)
    with pytest.raises(OSError, match=r"^the archive pictures.npz is gone; mount its disk again$"):
        list(loader.batches([[0, 3]], 0, 0))


def test_a_loading_process_that_dies_is_told_of() -> None:
    loader = Loader(Failing(10), collate, workers=1)
    with pytest.raises(ValueError, match=r"a data loading process died .*lower --workers"):
        list(loader.batches([[0, 1], [2, 4]], 0, 0))


class Torn:
    """Cannot be read from the pipe: what sent it has closed its end."""

    def __reduce__(self) -> Any:
        return torn, ()


def torn() -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


class Dying(TinyData):
    """Breaks the pipe at one sample, and dies half a second later if told to."""

    dies = True

    def __getitem__(self, index: int) -> Any:
        if index == 4 and self.dies:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return (Torn(), 0) if index == 4 else super().__getitem__(index)


@pytest.mark.parametrize("dies", [True, False])
def test_a_pipe_that_breaks_before_the_news_of_a_death(
    dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dying, "dies", dies)
    monkeypatch.setattr("blnet.training.loading._SECONDS_TO_DIE", 5.0 if dies else 0.1)
    loader = Loader(Dying(10), lambda items: {"first": items[0][0]}, workers=1)
    told = r"a data loading process died .*lower --workers" if dies else "Connection reset by peer"
    with pytest.raises(ValueError if dies else ConnectionResetError, match=told):
        list(loader.batches([[0, 1], [4, 2]], 0, 0))
    loader.close()


class Signalled(TinyData):
    """Signals the loading process at each sample, and hangs at the last."""

    number = signal.SIGINT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        os.kill(os.getpid(), self.number)
        if index == 9:
            time.sleep(600)
        return super().__getitem__(index)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loading_processes_outlive_a_stop(number: signal.Signals) -> None:
    order = [[0, 1], [2, 3], [4, 5]]
    alone = values(Loader(TinyData(10), collate).batches(order, 0, 0))
    data = Signalled(10)
    data.number = number
    loader = Loader(data, collate, workers=1)
    check_equal(alone, values(loader.batches(order, 0, 0)))
    loader.close()


def children() -> set[Any]:
    return set(multiprocessing.active_children())


def test_closing_a_loader_ends_a_process_that_hangs() -> None:
    others = children()
    loader = Loader(Signalled(10), collate, workers=1)
    next(loader.batches([[0], [9]], 0, 0))
    assert len(children() - others) == 1
    loader.close()  # PyTorch gives it five seconds
    assert not children() - others


def test_a_loader_that_nobody_closes_ends_with_the_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from blnet.training.loading import Loader\n"
        "from helpers.blobs import TinyData, TinyTask\n"
        "def begin():\n"
        "    loader = Loader(TinyData(40), TinyTask().collate, workers=2)\n"
        "    loader.me = loader  # for the garbage collector\n"
        "    return next(loader.batches([[0, 1]] * 9, 0, 0))\n"
        "begin()\n"
        "kept = Loader(TinyData(40), TinyTask().collate, workers=1)\n"
        "batches = kept.batches([[0, 1]] * 9, 0, 0)\n"
        "next(batches)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], timeout=60, capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("stream", [False, True])
def test_closing_a_loader_ends_its_processes_at_once(stream: bool) -> None:
    others = children()
    loader = Loader(TinyStream(60) if stream else TinyData(40), collate, workers=2)
    batches = loader.stream(4, 0) if stream else loader.batches([[0, 1]] * 9, 0, 0)
    next(batches)
    assert len(children() - others) == 2
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 5  # what PyTorch waits for one that does not end
    assert not children() - others
    loader.close()


def test_a_corrupt_sample_has_a_name_and_a_reason() -> None:
    error = CorruptSample("a.jpg", "it is empty")
    assert (error.name, error.reason) == ("a.jpg", "it is empty")
