"""Image sets: what they hold, how they are split, and what is said where they cannot be read."""

import io
import os
import pickle
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

from blnet.training.loading import CorruptSample
from blnet.vision.config import AugmentConfig, DataConfig
from blnet.vision.data import class_names, load_data
from blnet.vision.preprocessing import IMAGENET
from blnet.vision.sources import decode, read

SHARED = Path(
    os.environ.get("BLNET_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


def shared(name):
    """Return a file of the real data sets, or skip the test."""
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is missing; BLNET_SHARED_DATA names the folder that holds it")
    return str(SHARED / name)


def plain(colour, size=(24, 20)):
    return Image.new("RGB", size, colour)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def red(number):
    """Return a picture that tells its number by its red."""
    return plain((number, 50, 100))


def numbers(dataset):
    return [int(dataset[i][0][0, 0, 0]) for i in range(len(dataset))]


def refused(data, *words, **options):
    """Check that a configuration is refused in one sentence with some words in it."""
    with pytest.raises(ValueError, match=r"\S") as error:
        load_data(data, **options)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


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


# Archives --------------------------------------------------------------------------------------


def archive_of(path, labels, classes=("a", "b"), changes=None, split=None):
    """Write an archive in which the red of each picture tells its number."""
    files = [encoded(red(number)) for number in range(len(labels))]
    arrays = {
        "blob": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array(labels, np.int16),
        "names": np.array([f"n{number}.png" for number in range(len(labels))], dtype=np.str_),
        "classes": np.array(classes),
        "split": split,
        **(changes or {}),
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def small(path, name="npz", **options):
    return DataConfig(name=name, path=str(path), size=16, **options)


def test_an_archive_is_split_as_it_says(tmp_path):
    path = archive_of(tmp_path / "a.npz", [0, 1, 0, 1, 1], split=np.array([0, 0, 1, 0, 1]))
    data = load_data(small(path))
    assert numbers(data.train) == [0, 1, 3]
    assert numbers(data.evaluation) == [2, 4]
    assert [label for _, label in data.train] == [0, 1, 1]
    assert data.classes == ("a", "b")
    assert data.train[0][0].shape == (3, 16, 16)
    assert data.preprocessing.mean == IMAGENET.mean
    assert data.preprocessing.crop_ratio == 0.875
    assert load_data(small(path), parts="evaluation").counts == (0, 2)


@pytest.mark.parametrize("split", [None, np.zeros(20, np.uint8)])
def test_an_archive_without_evaluation_part_gives_a_share(tmp_path, split):
    path = archive_of(tmp_path / "a.npz", [0, 1] * 10, split=split)
    data = load_data(small(path, holdout=0.25))
    assert data.counts == (15, 5)
    assert sorted(numbers(data.train) + numbers(data.evaluation)) == list(range(20))


def test_two_archives(tmp_path):
    one = archive_of(tmp_path / "one.npz", [0, 1, 0])
    two = archive_of(tmp_path / "two.npz", [1, 1, 0, 1], split=np.array([0, 1, 1, 1]))
    data = load_data(small(one, eval_path=two))
    assert numbers(data.train) == [0, 1, 2]
    assert numbers(data.evaluation) == [1, 2, 3]
    alone = load_data(DataConfig(name="npz", eval_path=two), parts="evaluation")
    assert alone.counts == (0, 3)
    assert str(tmp_path / "two.npz") in alone.name
    other = archive_of(tmp_path / "other.npz", [0, 1], classes=("a", "c"))
    refused(small(one, eval_path=other), "--data.eval-path", "other classes")


@pytest.mark.parametrize("name", ["blob", "offsets", "labels", "names", "classes"])
def test_a_missing_array_is_named(tmp_path, name):
    path = archive_of(tmp_path / "a.npz", [0, 1, 1], changes={name: None})
    refused(small(path), "--data.path", path, f"no array {name!r}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.array([0.0, 1.0, 1.0])}, ["'labels' of float64"]),
        ({"labels": np.array([[0, 1, 1]])}, ["'labels'", "one dimension"]),
        ({"blob": np.zeros(9, np.int16)}, ["'blob' of int16"]),
        ({"classes": np.array([1, 2])}, ["'classes' of int64"]),
        ({"labels": np.array([0, 1, 2])}, ["labels from 0 to 2 and 2 classes"]),
        ({"labels": np.array([0, -1, 1])}, ["labels from -1 to 1 and 2 classes"]),
        ({"labels": np.array([0, 1])}, ["2 labels", "'offsets' must have 3"]),
        ({"names": np.array(["x"])}, ["'names' must have 3 elements, not 1"]),
        ({"split": np.array([0, 1])}, ["'split' must have 3"]),
        ({"split": np.array([0, 2, 1])}, ["unknown split 2"]),
        ({"split": np.array([0, 0, 1])}, ["no image of class 'b'", "train"]),
        ({"offsets": np.array([0, 5, 3, 9])}, ["offsets that go backwards"]),
        ({"offsets": np.array([0, 5, 9, 10**9])}, ["offsets outside"]),
        ({"classes": np.array(["a", "b"], dtype=object)}, ["plain arrays", "pickle"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, changes, words):
    path = archive_of(tmp_path / "a.npz", [0, 0, 1], changes=changes)
    refused(small(path), "--data.path", *words)


def test_an_empty_archive_is_refused(tmp_path):
    refused(small(archive_of(tmp_path / "a.npz", [])), "no labels")


@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"PK\x03\x04 torn", encoded(red(1))], ids=str
)
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    refused(small(tmp_path / "a.npz"), "--data.path", "cannot be read as an .npz archive")


def test_a_spoilt_archive_is_refused(tmp_path):
    path = Path(archive_of(tmp_path / "a.npz", [0, 1] * 20))
    content = bytearray(path.read_bytes())
    content[200:220] = b"x" * 20
    path.write_bytes(content)
    refused(small(path), "cannot be read as an .npz archive")


@pytest.mark.parametrize("name", ["npz", "folder", "imagenet"])
def test_a_path_is_needed_and_must_exist(tmp_path, name):
    refused(DataConfig(name=name), "--data.path is missing")
    refused(DataConfig(name=name, path=str(tmp_path / "none")), "--data.path", str(tmp_path))
    refused(DataConfig(name=name, eval_path=str(tmp_path)), "--data.path is missing")


# CIFAR -----------------------------------------------------------------------------------------

CIFAR10_CLASSES = tuple(f"c{number}" for number in range(10))


def test_cifar_from_an_archive_keeps_its_size_and_statistics(tmp_path):
    split = np.repeat([0, 1], [20, 10])
    path = archive_of(tmp_path / "c.npz", list(range(10)) * 3, CIFAR10_CLASSES, split=split)
    data = load_data(DataConfig(name="cifar10", path=path))
    assert data.counts == (20, 10)
    own = data.preprocessing
    assert (own.size, own.crop_ratio, own.resized) == (32, 1.0, 32)
    assert own.mean == (0.4914, 0.4822, 0.4465)
    refused(DataConfig(name="cifar100", path=path), "10 classes", "cifar100")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_not_fetched_unless_asked(tmp_path, monkeypatch, name):
    def fetch(self):
        raise AssertionError("fetched without being asked")

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    refused(DataConfig(name=name, path=str(tmp_path)), "--data.download", "--data.path", name)
    monkeypatch.chdir(tmp_path)
    refused(DataConfig(name=name), "--data.download", "--data.path", "folder data")


def test_cifar_that_cannot_be_fetched_says_why(tmp_path, monkeypatch):
    def fetch(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    refused(
        DataConfig(name="cifar10", path=str(tmp_path), download=True), "no route", "--data.path"
    )


@pytest.mark.parametrize("only", [False, True])
def test_cifar_in_its_official_layout(tmp_path, monkeypatch, only):
    """The files are ours, so their MD5 is not the original's; the rest is torchvision's reading."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for place, (name, _) in enumerate(datasets.CIFAR10.train_list + datasets.CIFAR10.test_list):
        pixels = np.full((2, 3072), 10 * place, np.uint8)
        batch = {"data": pixels, "labels": [place, 9 - place]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    meta = {**datasets.CIFAR10.meta, "md5": None}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    config = DataConfig(name="cifar10", path=str(tmp_path))
    data = load_data(config, parts="evaluation" if only else "both")
    assert data.counts == (0 if only else 10, 2)
    assert numbers(data.train) == ([] if only else [0, 0, 10, 10, 20, 20, 30, 30, 40, 40])
    assert [label for _, label in data.evaluation] == [5, 4]
    assert data.classes == CIFAR10_CLASSES


# Folders ---------------------------------------------------------------------------------------


def folder_of(root, **classes):
    """Make class folders of PNGs whose red tells their number."""
    for name, found in classes.items():
        (root / name).mkdir(parents=True)
        for number in found:
            (root / name / f"{number:03}.png").write_bytes(encoded(red(number)))
    return root


def test_a_flat_folder_gives_a_share(tmp_path):
    folder_of(tmp_path, cat=range(10), dog=range(100, 110))
    data = load_data(small(tmp_path, name="folder"))
    assert data.counts == (16, 4)
    assert data.classes == ("cat", "dog")
    assert sorted(numbers(data.train) + numbers(data.evaluation)) == [
        *range(10), *range(100, 110)
    ]  # fmt: skip
    assert all((label == 1) == (int(image[0, 0, 0]) >= 100) for image, label in data.train)
    assert data.name == f"folder (16 training and 4 test images of {tmp_path}, 16x16)"


@pytest.mark.parametrize("part", ["val", "valid", "test"])
@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_folder_of_two_parts(tmp_path, part, name):
    folder_of(tmp_path / "train", cat=range(5), dog=range(5, 9))
    folder_of(tmp_path / part, cat=[20], dog=[21, 22])
    config = small(tmp_path, name=name)
    data = load_data(config)
    assert numbers(data.train) == list(range(9))
    assert numbers(data.evaluation) == [20, 21, 22]
    assert [label for _, label in data.evaluation] == [0, 1, 1]
    for path in (tmp_path / "train").rglob("*.png"):
        path.unlink()
    assert load_data(config, parts="evaluation").counts == (0, 3)


def test_training_folder_alone_gives_a_share(tmp_path):
    folder_of(tmp_path / "train", cat=range(5), dog=range(5, 10))
    assert load_data(small(tmp_path, name="folder")).counts == (8, 2)
    refused(small(tmp_path, name="imagenet"), "--data.path", "no folder val")


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_pictures_of_no_class_are_not_passed_over(tmp_path, name):
    folder_of(tmp_path / "train", cat=range(5), dog=range(5, 10))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "notes.txt").touch()
    if name == "folder":
        assert load_data(small(tmp_path, name=name)).counts == (8, 2)
    (tmp_path / "test" / "a.png").write_bytes(encoded(red(1)))
    refused(small(tmp_path, name=name), str(tmp_path / "test"), "pictures but no class folders")
    # A test part that nobody has labelled, beside one to evaluate on.
    folder_of(tmp_path / "val", cat=[20], dog=[21])
    assert load_data(small(tmp_path, name=name)).counts == (10, 2)


def test_one_class_is_nothing_to_learn(tmp_path):
    folder_of(tmp_path / "one", cat=range(5))
    told = "has 1 class, and there is nothing to tell apart"
    refused(small(tmp_path / "one", name="folder"), told, str(tmp_path / "one"))
    folder_of(tmp_path / "two" / "train", cat=range(5))
    folder_of(tmp_path / "two" / "val", cat=[7])
    refused(small(tmp_path / "two", name="imagenet"), told)
    path = archive_of(tmp_path / "c.npz", [0] * 5, ("cat",))
    refused(DataConfig(name="npz", path=path), told, path)
    refused(DataConfig(name="fake", classes=1), told)


def test_an_evaluation_folder_of_its_own(tmp_path):
    folder_of(tmp_path / "one", cat=[1, 2], dog=[3])
    folder_of(tmp_path / "two", cat=[4], dog=[5])
    config = small(tmp_path / "one", name="folder", eval_path=str(tmp_path / "two"))
    data = load_data(config)
    assert numbers(data.train) == [1, 2, 3]
    assert numbers(data.evaluation) == [4, 5]
    alone = load_data(replace(config, path=None), parts="evaluation")
    assert alone.counts == (0, 2)


def test_a_class_may_be_called_train(tmp_path):
    folder_of(tmp_path, bus=range(5), train=range(5, 10), test=range(10, 15))
    assert load_data(small(tmp_path, name="folder")).classes == ("bus", "test", "train")


def test_hidden_files_are_passed_over_and_deep_ones_found(tmp_path):
    folder_of(tmp_path, cat=[1, 2, 3], dog=[4, 5, 6])
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "._001.png").write_bytes(b"of a Mac")
    (tmp_path / "cat" / "notes.txt").write_bytes(b"no picture")
    folder_of(tmp_path / "cat", deep=[7])
    data = load_data(small(tmp_path, name="folder", holdout=0.4))
    assert data.classes == ("cat", "dog")
    assert sorted(numbers(data.train) + numbers(data.evaluation)) == [1, 2, 3, 4, 5, 6, 7]


def test_names_outside_of_ascii(tmp_path):
    folder_of(tmp_path, Käse=[1, 2], 猫=[3, 4])
    data = load_data(small(tmp_path, name="folder", holdout=0.5))
    assert sorted(data.classes) == sorted(("Käse", "猫"))
    assert sorted(numbers(data.train) + numbers(data.evaluation)) == [1, 2, 3, 4]


def test_parts_must_have_the_same_classes(tmp_path):
    folder_of(tmp_path / "train", ape=[0], cat=[1], dog=[2])
    folder_of(tmp_path / "val", cat=[1], dog=[2], emu=[3])
    refused(small(tmp_path, name="folder"), "'ape'", str(tmp_path / "val"))
    folder_of(tmp_path / "val", ape=[0])
    refused(small(tmp_path, name="folder"), "'emu'", str(tmp_path / "train"))


def test_an_empty_folder_is_refused(tmp_path):
    refused(small(tmp_path, name="folder"), "--data.path", "holds no folders")
    (tmp_path / "a.png").write_bytes(encoded(red(1)))
    refused(small(tmp_path, name="folder"), "holds no folders")


def test_a_class_without_pictures_is_named(tmp_path):
    folder_of(tmp_path, cat=[1, 2], dog=[])
    (tmp_path / "dog" / "readme.txt").write_text("nothing")
    refused(small(tmp_path, name="folder"), str(tmp_path / "dog"), "holds no pictures")


def test_an_evaluation_folder_without_training_folder_is_refused(tmp_path):
    folder_of(tmp_path / "val", cat=[1], dog=[2])
    refused(small(tmp_path, name="folder"), "folder val but no train")


@pytest.mark.parametrize("which", ["", "cat"])
def test_an_unreadable_folder_is_named(tmp_path, monkeypatch, which):
    """Tests may run as root, whom no permission stops."""
    folder_of(tmp_path, cat=[1, 2], dog=[3, 4])
    closed = tmp_path / which if which else tmp_path
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused(
        small(tmp_path, name="folder"), "--data.path", str(closed), "(Permission denied)",
        "permissions",
    )  # fmt: skip


def test_imagenets_classes_have_names():
    middle = [f"n{number:08}" for number in range(2_000_000, 2_000_998)]
    names = class_names(["n01440764", *middle, "n15075141"])
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")
    assert class_names(["n01440764", "n15075141"]) == ("n01440764", "n15075141")
    assert class_names(["a", *middle, "b"])[0] == "a"


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "mnist"), ("size", 0), ("crop_ratio", 0.0), ("crop_ratio", 1.1), ("limit", 0),
        ("holdout", 0.0), ("holdout", 1.0), ("holdout", float("nan")), ("split_seed", -1),
        ("split_seed", 2**32), ("train_images", 0), ("eval_images", -1), ("classes", 0),
    ],
)  # fmt: skip
def test_a_setting_without_meaning_is_named(field, value):
    refused(DataConfig(**{field: value}), f"--data.{field.replace('_', '-')}", repr(value))


# Real sets -------------------------------------------------------------------------------------


def test_cifar10_as_jpegs():
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


def test_imagenette():
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
