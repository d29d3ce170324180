"""Shards: every image once where it counts, the same order in every run, and going on anywhere."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch

from blnet.training.loading import Loader, Stream, mixed_seed
from blnet.vision.augment import training_transform
from blnet.vision.config import AugmentConfig, DataConfig
from blnet.vision.data import load_data
from helpers.shards import (
    CLASSES,
    SMALL,
    all_of,
    collate,
    first,
    number_of,
    pairs,
    stream,
    write_shard,
    write_shards,
)

pytest.importorskip("webdataset", reason="webdataset is not installed")

VARIED = training_transform(AugmentConfig(flip=0.5, color_jitter=0.3), SMALL)


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(a, b) and c == d for (a, c), (b, d) in zip(one, two, strict=True)
    )


# Evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [1, 2, 3, 6])
@pytest.mark.parametrize("counts", [[3, 5, 2, 4], [6]])
def test_evaluation_sees_every_image_once(tmp_path, readers, counts):
    part = stream(write_shards(tmp_path, counts), training=False)
    shares = [[number_of(x) for x in part.read(0, reader, readers)] for reader in range(readers)]
    assert sorted(itertools.chain(*shares)) == list(range(sum(counts)))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_loading_processes_and_devices_see_every_image_once(tmp_path, monkeypatch, workers, world):
    part = stream(write_shards(tmp_path, [3, 5, 2, 4]), training=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        for loaded in Loader(part, collate, workers=workers).stream(3, epoch=0):
            assert not loaded.corrupt
            found += loaded.batch["images"][:, 1, 0, 0].tolist()
    assert sorted(found) == list(range(14))


def test_a_shard_goes_to_one_reader(tmp_path):
    part = stream(write_shards(tmp_path, [3, 3, 3, 3]), training=False)
    assert [number_of(sample) for sample in part.read(0, 1, 2)] == [3, 4, 5, 9, 10, 11]


# Training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[4, 6, 5, 5], [20]])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_a_pass_of_training_sees_every_image_once(tmp_path, counts, readers):
    """Readers take shards of their own, or every so many samples where the shards are too few."""
    # Drawn from one sample only, so that a pass ends before the next begins.
    part = stream(write_shards(tmp_path, counts), buffer=1)
    seen = []
    for reader in range(readers):
        own = 20 // readers
        if len(counts) >= readers:
            own = sum(counts[int(url[-5])] for url in first_shards(part)[reader::readers])
        seen += [number_of(sample) for sample in first(part, own, 0, reader, readers)]
    assert sorted(seen) == list(range(20))


def first_shards(part):
    """Return the shards in the order of the first pass."""
    urls = list(part.urls)
    random.Random(mixed_seed(part.seed, 0, -1, 0)).shuffle(urls)
    return urls


def test_training_never_ends_and_shuffles(tmp_path):
    pattern = write_shards(tmp_path, [5, 5, 5])
    found = [number_of(sample) for sample in first(stream(pattern), 150)]
    assert set(found) == set(range(15))
    counts = np.bincount(found)
    assert counts.min() >= 9
    assert counts.max() <= 11
    assert found[:15] != sorted(found[:15])
    assert found[:15] != found[15:30]
    whole = [number_of(sample) for sample in first(stream(pattern, buffer=100), 150)]
    assert whole != found


def test_every_pass_has_an_order_of_its_own(tmp_path):
    part = stream(write_shards(tmp_path, [1] * 6), buffer=1)
    found = [number_of(sample) for sample in first(part, 12)]
    assert sorted(found[:6]) == sorted(found[6:]) == list(range(6))
    assert found[:6] != found[6:]


def test_the_buffer_draws_anew_for_every_seed_epoch_and_reader(tmp_path):
    """Two shards of the same images: their order tells nothing."""
    for place in range(2):
        write_shard(tmp_path / f"part-{place}.tar", pairs(range(12)))
    orders = []
    for seed, epoch, reader in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        part = stream(str(tmp_path / "part-{0..1}.tar"), seed=seed)
        orders.append(tuple(number_of(sample) for sample in first(part, 10, epoch, reader, 2)))
    assert len(set(orders)) == 4


def test_the_order_is_that_of_the_seed_the_epoch_and_the_reader(tmp_path):
    pattern = write_shards(tmp_path, [5, 5, 5])

    def run(epoch=0, reader=0, readers=1, **options):
        part = stream(pattern, **options)
        return [number_of(sample) for sample in first(part, 30, epoch, reader, readers)]

    once = run()
    random.seed(99)  # what the process drew before does not count
    torch.manual_seed(99)
    assert run() == once
    assert run(epoch=1) != once
    assert run(seed=4) != once
    assert run(readers=2) != once
    assert run(reader=1, readers=2) != run(reader=0, readers=2)


def test_the_variation_is_drawn_from_torchs_random_state(tmp_path):
    part = stream(write_shards(tmp_path, [1]), transform=VARIED)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(first(part, 5))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("skip", [0, 1, 7])
def test_skipping_gives_the_rest_without_decoding(tmp_path, skip, training):
    part = stream(write_shards(tmp_path, [5, 5, 5]), training=training)
    whole = first(part, 14, 2)
    decoded = []

    def convert(picture):
        decoded.append(picture)
        return SMALL.convert(picture)

    part.convert = convert
    assert same(first(part, 14 - skip, 2, 0, 1, skip), whole[skip:])
    assert len(decoded) == 14 - skip


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("batches", [1, 4, 5])
def test_a_loader_goes_on_where_it_was(tmp_path, workers, batches):
    """The same images, varied the same way."""
    part = stream(write_shards(tmp_path, [5, 5, 5, 4]), transform=VARIED)
    assert isinstance(part, Stream)
    loader = Loader(part, collate, workers=workers)
    whole = list(itertools.islice(loader.stream(3, epoch=1), 8))
    rest = list(itertools.islice(loader.stream(3, epoch=1, skipped=batches), 8 - batches))
    for one, two in zip(whole[batches:], rest, strict=True):
        assert torch.equal(one.batch["images"], two.batch["images"])
        assert torch.equal(one.batch["labels"], two.batch["labels"])


def test_a_stream_survives_pickling(tmp_path):
    part = stream(write_shards(tmp_path, [5, 5]))
    assert same(first(pickle.loads(pickle.dumps(part)), 10), first(part, 10))


# Configuration ---------------------------------------------------------------------------------


def config(tmp_path, **changes):
    pattern = write_shards(tmp_path, [3, 3])
    values = {
        "path": pattern, "eval_path": pattern, "classes": CLASSES, "train_images": 60, "size": 8,
    }  # fmt: skip
    return DataConfig(name="webdataset", **{**values, **changes})


def test_load_data_gives_streams(tmp_path):
    data = load_data(config(tmp_path), AugmentConfig(flip=0.5), seed=1)
    assert data.counts == (60, None)
    assert data.train.samples == 60
    assert data.classes == tuple("0123456")
    assert data.name.startswith("webdataset (60 training and all test images of ")
    assert data.preprocessing.size == 8
    assert len(all_of(data.evaluation)) == 6
    assert same(all_of(data.evaluation), all_of(data.evaluation))
    left = [int(image[0, 0, 0]) for image, _ in first(data.train, 40)]
    assert set(left) == {0, 200}  # some are flipped
    order = [number_of(sample) for sample in first(data.train, 40)]
    other = load_data(config(tmp_path), seed=2)
    assert order != [number_of(sample) for sample in first(other.train, 40)]
    again = load_data(config(tmp_path), seed=1)
    assert order == [number_of(sample) for sample in first(again.train, 40)]


def test_evaluation_alone_needs_no_training_shards(tmp_path):
    data = load_data(config(tmp_path, path=None, train_images=None), parts="evaluation")
    assert data.counts == (0, None)
    assert data.name.startswith("webdataset (all test images of ")
    assert len(data.train) == 0
    assert len(all_of(data.evaluation)) == 6


@pytest.mark.parametrize("field", ["path", "eval_path", "classes", "train_images"])
def test_what_is_needed_is_named(tmp_path, field):
    with pytest.raises(ValueError, match=f"--data.{field.replace('_', '-')} is missing"):
        load_data(config(tmp_path, **{field: None}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "none-{0..3}.tar"}, "--data.path: shard none-0.tar does not exist"),
        ({"eval_path": "file:none.tar"}, "--data.eval-path: shard none.tar does not exist"),
        ({"path": "part-{0..3.tar"}, "--data.path 'part-{0..3.tar' is no pattern"),
        ({"limit": 3}, "--data.limit cannot be had"),
        ({"eval_images": 3}, "--data.eval-images cannot be had with webdataset"),
        ({"classes": 1}, "--data.classes 1: webdataset has 1 class"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=r"\S") as error:
        load_data(config(tmp_path, **changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_one_missing_shard_of_many_is_named(tmp_path):
    made = config(tmp_path)
    (tmp_path / "part-1.tar").unlink()
    with pytest.raises(ValueError, match=r"part-1\.tar does not exist"):
        load_data(made)
