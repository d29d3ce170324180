"""Image sets: the digits, fakes, real ones; loading processes; pictures that cannot be read."""

import pickle
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from blnet.training.loading import CorruptSample
from blnet.vision.config import AugmentConfig, DataConfig
from blnet.vision.data import load_data
from blnet.vision.preprocessing import IMAGENET
from blnet.vision.sources import decode, read
from helpers.pictures import archive_of, encoded, folder_of, red, small

# Digits ----------------------------------------------------------------------------------------


def test_digits_are_embedded():
    digits = load_data(DataConfig())
    assert digits.counts == (1437, 360) == (len(digits.train), len(digits.evaluation))
    assert digits.classes == tuple("0123456789")
    assert digits.name == "digits (1,437 training and 360 test images of scikit-learn, 8x8)"
    image, label = digits.train[0]
    assert (image.shape, image.dtype, type(label)) == ((1, 8, 8), torch.uint8, int)
    images = torch.stack([image for image, _ in digits.train])
    assert images.unique().numel() == 17  # 0 to 16 in the original
    assert (images.min(), images.max()) == (0, 255)
    normal = digits.preprocessing.normalize(images)
    assert abs(normal.mean()) < 1e-3
    assert abs(normal.std() - 1) < 1e-3


def test_digits_are_those_of_scikit_learn_under_their_labels():
    from sklearn.datasets import load_digits

    original = load_digits()
    expected = {
        (tuple(np.rint(image.ravel() * 255 / 16).astype(int)), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    }
    digits = load_data(DataConfig())
    found = {
        (tuple(image.flatten().tolist()), label)
        for part in (digits.train, digits.evaluation)
        for image, label in part
    }
    assert found == expected


def test_the_split_is_the_same_for_all_runs_and_that_of_its_seed():
    one, two = (load_data(DataConfig()).evaluation.part.indices for _ in range(2))
    assert np.array_equal(one, two)
    other = load_data(DataConfig(split_seed=1)).evaluation.part.indices
    assert not np.array_equal(one, other)


def test_evaluation_alone_is_the_same_evaluation():
    both, alone = load_data(DataConfig()), load_data(DataConfig(), parts="evaluation")
    assert np.array_equal(both.evaluation.part.indices, alone.evaluation.part.indices)
    assert alone.preprocessing == both.preprocessing
    assert alone.counts == (0, 360) == (len(alone.train), 360)
    assert alone.name == "digits (360 test images of scikit-learn, 8x8)"


def test_a_limit_takes_as_many_of_each_class():
    digits = load_data(DataConfig(limit=50))
    assert digits.counts == (50, 50)
    for part in (digits.train, digits.evaluation):
        assert np.bincount(part.part.labels).tolist() == [5] * 10
    whole = load_data(DataConfig())
    assert digits.preprocessing == whole.preprocessing
    assert set(digits.evaluation.part.indices) <= set(whole.evaluation.part.indices)
    assert load_data(DataConfig(limit=10_000)).counts == whole.counts


def test_training_is_varied_and_evaluation_is_not():
    digits = load_data(DataConfig(), AugmentConfig(crop="padded"))
    torch.manual_seed(0)
    found = {tuple(digits.train[3][0].flatten().tolist()) for _ in range(40)}
    assert len(found) == 9
    assert len({tuple(digits.evaluation[3][0].flatten().tolist()) for _ in range(5)}) == 1


# What cannot be read ---------------------------------------------------------------------------


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content)
    )  # fmt: skip


def bomb():
    """Return a PNG of a hundred bytes that says it has 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 50, 3), dtype=np.uint8))
SPOILT = {
    "empty": (b"", "empty"),
    "text": (b"<html>404</html>", "not a picture"),
    "cut jpeg": (encoded(NOISE, "JPEG")[:900], "truncated"),
    "cut png": (encoded(NOISE)[:3000], "truncated"),
    "spoilt png": (encoded(NOISE).replace(b"IDAT", b"IDXT"), ""),
    "bomb": (bomb(), "decompression bomb"),
    "floats": (encoded(Image.new("F", (9, 9)), "TIFF"), "floating-point"),
    "integers": (encoded(Image.new("I", (9, 9)), "TIFF"), "signed or 32-bit numbers"),
}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("where", ["npz", "folder"])
def test_a_spoilt_picture_is_a_corrupt_sample(tmp_path, kind, where):
    content, words = SPOILT[kind]
    if where == "npz":
        files = [content, encoded(red(1)), encoded(red(2))]
        changes = {
            "blob": np.frombuffer(b"".join(files), np.uint8),
            "offsets": np.cumsum([0, *map(len, files)]),
        }
        path = archive_of(tmp_path / "a.npz", [0, 1, 1], split=np.array([0, 0, 1]), changes=changes)
        name = f"{path}/n0.png"
    else:
        path = tmp_path / "set"
        folder_of(path / "train", a=[0], b=[1])
        folder_of(path / "val", a=[0], b=[1])
        (path / "train" / "a" / "000.png").write_bytes(content)
        name = str(path / "train" / "a" / "000.png")
    data = load_data(small(path, name=where), AugmentConfig(crop="resized"))
    with pytest.raises(CorruptSample) as error:
        data.train[0]
    assert error.value.name == name
    assert words in error.value.reason
    assert "\n" not in error.value.reason
    assert "0x" not in error.value.reason  # no address, the same in every run
    assert data.train[1][1] == 1


def test_a_picture_that_has_gone_is_a_corrupt_sample(tmp_path):
    folder_of(tmp_path, a=[0, 1], b=[2, 3])
    data = load_data(small(tmp_path, name="folder", holdout=0.5))
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    with pytest.raises(CorruptSample, match="No such file"):
        data.train[0]


def test_a_fault_of_a_transform_is_not_blamed_on_the_picture(tmp_path):
    folder_of(tmp_path, a=[0, 1], b=[2, 3])
    data = load_data(small(tmp_path, name="folder", holdout=0.5))
    data.train.transform = lambda picture: 1 / 0
    with pytest.raises(ZeroDivisionError):
        data.train[0]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of spoilt TIFF files
@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_spoilt_bytes_never_crash(data, kind):
    content = bytearray(encoded(NOISE, kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = read("x", lambda: decode(content), IMAGENET.convert)
    except CorruptSample as error:
        found = error
    assert getattr(found, "mode", "") == "RGB" or (found.name == "x" and found.reason)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1", "I;16"])
def test_files_of_every_mode_are_read(tmp_path, mode):
    folder_of(tmp_path, a=[0, 1], b=[2, 3])
    image = Image.fromarray(np.full((20, 20), 0xC123, np.uint16))
    if mode != "I;16":
        image = Image.new("L", (20, 20), 255).convert("RGB").convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(encoded(image, kind))
    data = load_data(small(tmp_path, name="folder", holdout=0.5))
    expected = 0xC1 if mode == "I;16" else 255
    assert (data.train[0][0] == expected).all()


# All sets --------------------------------------------------------------------------------------


def every_set(tmp_path):
    folder_of(tmp_path / "folder", a=[0, 1, 2], b=[3, 4, 5])
    path = archive_of(tmp_path / "a.npz", [0, 1] * 4)
    return [
        DataConfig(limit=8),
        small(tmp_path / "folder", name="folder"),
        small(path),
        DataConfig(name="fake", size=8, train_images=6, eval_images=4, classes=3),
    ]


@pytest.mark.parametrize("which", range(4), ids=["digits", "folder", "npz", "fake"])
def test_sets_reach_loading_processes(tmp_path, which):
    data = load_data(every_set(tmp_path)[which])
    again = pickle.loads(pickle.dumps(data))
    for part in ("train", "evaluation"):
        direct = list(DataLoader(getattr(data, part), batch_size=3))
        copied = list(DataLoader(getattr(again, part), batch_size=3))
        loaded = list(DataLoader(getattr(data, part), batch_size=3, num_workers=2))
        assert len(direct) == len(loaded) == len(copied) > 0
        for batches in zip(direct, copied, loaded, strict=True):
            for images, labels in batches:
                assert torch.equal(images, batches[0][0])
                assert torch.equal(labels, batches[0][1])


def test_fake_pictures_are_the_same_each_time_and_all_different():
    config = DataConfig(name="fake", size=8, train_images=30, eval_images=20, classes=7)
    one, two = load_data(config), load_data(config)
    assert one.counts == (30, 20)
    assert len(one.classes) == 7
    assert one.train[0][0].shape == (3, 8, 8)
    pictures = [*one.train, *one.evaluation]
    again = [*two.train, *two.evaluation]
    assert all(torch.equal(x, y) and a == b for (x, a), (y, b) in zip(pictures, again, strict=True))
    assert len({tuple(image.flatten().tolist()) for image, _ in pictures}) == 50
    assert [label for _, label in one.train][:8] == [0, 1, 2, 3, 4, 5, 6, 0]
    other = load_data(replace(config, split_seed=1))
    assert not torch.equal(other.train[0][0], one.train[0][0])


def test_fake_pictures_default_to_imagenets_shape():
    data = load_data(DataConfig(name="fake", limit=3))
    assert data.counts == (3, 3)
    assert len(data.classes) == 1000
    assert data.train[0][0].shape == (3, 224, 224)


@pytest.mark.parametrize("size", [8, 20])
def test_size_and_crop_can_be_chosen(size):
    data = load_data(DataConfig(size=size, crop_ratio=0.5))
    assert data.train[0][0].shape == (1, size, size)
    assert data.preprocessing.resized == 2 * size


# Real sets -------------------------------------------------------------------------------------


def test_cifar10_as_jpegs(shared):
    data = load_data(DataConfig(name="cifar10", path=shared("cifar10_jpeg_full.npz")))
    assert data.counts == (50_000, 10_000)
    assert data.classes[:2] == ("airplane", "automobile")
    assert len(data.classes) == 10
    assert np.bincount(data.train.part.labels).tolist() == [5000] * 10
    images = torch.stack([data.train[i][0] for i in range(0, 50_000, 250)])
    assert images.shape == (200, 3, 32, 32)
    normal = data.preprocessing.normalize(images)
    assert abs(normal.mean()) < 0.1
    assert abs(normal.std() - 1) < 0.1


def test_imagenette(shared):
    path = shared("imagenette224_train_1of3.npz")
    data = load_data(DataConfig(name="npz", path=path), AugmentConfig(crop="resized"))
    assert sum(data.counts) == 3157
    assert data.counts[1] == 632
    assert data.classes[0] == "n01440764 tench"
    shares = np.bincount(data.evaluation.part.labels) / np.bincount(data.train.part.labels)
    assert shares.min() > 0.24
    assert shares.max() < 0.26
    for place in range(0, 600, 60):
        image, label = data.train[place]
        assert image.shape == (3, 224, 224)
        assert 0 <= label < 10
    pixels = torch.stack([data.evaluation[i][0] for i in range(0, 600, 30)])
    assert abs(data.preprocessing.normalize(pixels).mean()) < 0.4
