"""Image sets in archives, CIFAR's files and folders: how they are split, and what is refused."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from blnet.vision.config import DataConfig
from blnet.vision.data import class_names, load_data
from blnet.vision.npz import Archive
from blnet.vision.preprocessing import IMAGENET
from helpers.pictures import archive_of, encoded, folder_of, red, small


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


# Archives --------------------------------------------------------------------------------------


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


def test_pictures_of_one_name_are_told_apart(tmp_path):
    changes = {"names": np.array(["img.png"] * 4)}
    path = archive_of(tmp_path / "a.npz", [0, 1, 0, 1], changes=changes)
    source = Archive(path)
    assert [source.name(i) for i in range(2)] == [f"{path}/img.png (0)", f"{path}/img.png (1)"]


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
    path.write_bytes(b"no archive")  # which NumPy takes for a pickle, and advises to load that
    with pytest.raises(ValueError, match="plain arrays; fetch or write it again"):
        load_data(small(path))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("digits", "path", "pictures"),
        ("digits", "eval_path", "pictures"),
        ("digits", "download", True),
        ("digits", "classes", 3),
        ("fake", "path", "pictures"),
        ("folder", "train_images", 20),
        ("folder", "download", True),
        ("npz", "classes", 7),
        ("cifar10", "eval_images", 20),
        ("webdataset", "download", True),
    ],
)
def test_what_a_set_does_not_read_is_refused(name, field, value):
    flag = f"--data.{field.replace('_', '-')}"
    refused(DataConfig(name=name, **{field: value}), f"{flag} is not read with --data.name {name}")


def test_a_size_that_no_network_has_is_refused_by_its_flag():
    refused(DataConfig(size=20_000), "--data.size must be at most 16384 pixels, got 20000")


def test_official_files_have_their_own_test_part(tmp_path):
    config = DataConfig(name="cifar10", path=str(tmp_path), eval_path=str(tmp_path))
    refused(config, "--data.eval-path is not read with the official files")


@pytest.mark.parametrize("name", ["npz", "folder", "imagenet"])
def test_a_path_is_needed_and_must_exist(tmp_path, name):
    refused(DataConfig(name=name), "--data.path is missing")
    refused(DataConfig(name=name, path=str(tmp_path / "none")), "--data.path", str(tmp_path))
    refused(DataConfig(name=name, eval_path=str(tmp_path)), "--data.path is missing")


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


def test_a_failed_download_takes_its_empty_folders_back(tmp_path, monkeypatch):
    def fetch(self):
        os.makedirs(self.root)
        if keep:
            Path(self.root, "part").touch()
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    root = tmp_path / "new" / "data"
    for keep in (False, True):
        refused(DataConfig(name="cifar10", path=str(root), download=True), "no route")
        assert (tmp_path / "new").exists() == keep
    assert (root / "part").exists()


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


def test_parts_by_other_names_are_no_classes(tmp_path):
    for part in ("Training", "testing"):
        folder_of(tmp_path / "set" / part, a=[1], b=[2])
    refused(small(tmp_path / "set", "folder"), "Training and testing", "call them train and val")
    (tmp_path / "set" / "Training").rename(tmp_path / "set" / "train")
    (tmp_path / "set" / "testing").rename(tmp_path / "set" / "validation")
    data = load_data(small(tmp_path / "set", "folder"))
    assert (data.counts, data.classes) == ((2, 2), ("a", "b"))
    (tmp_path / "set" / "validation").rename(tmp_path / "set" / "Eval")
    refused(small(tmp_path / "set", "folder"), "train and beside it Eval", "call it val")
    (tmp_path / "set" / "Eval").rename(tmp_path / "set" / "raw")
    folder_of(tmp_path / "set" / "train" / "deep", c=range(8), d=range(8))
    assert load_data(small(tmp_path / "set", "folder")).classes == ("a", "b", "deep")


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


def test_a_class_whose_name_is_no_text_is_named(tmp_path):
    folder_of(tmp_path, a=[1], b=[2])
    os.rename(tmp_path / "b", os.fsencode(tmp_path) + b"/caf\xe9")
    refused(small(tmp_path, "folder"), "caf\\udce9", "not UTF-8", "rename it")


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


@pytest.mark.parametrize(
    ("ending", "kind"), [("GIF", "GIF"), ("jfif", "JPEG"), ("jp2", "JPEG2000")]
)
def test_pictures_of_other_endings_count(tmp_path, ending, kind):
    folder_of(tmp_path, cat=[1, 2], dog=[3])
    (tmp_path / "dog" / f"4.{ending}").write_bytes(encoded(red(4), kind))
    data = load_data(small(tmp_path, name="folder", holdout=0.5))
    assert sum(data.counts) == 4


def test_a_class_without_pictures_is_named(tmp_path):
    folder_of(tmp_path, cat=[1, 2], dog=[])
    (tmp_path / "dog" / "readme.txt").write_text("nothing")
    refused(small(tmp_path, name="folder"), str(tmp_path / "dog"), "holds no pictures")


def test_an_evaluation_folder_without_training_folder_is_refused(tmp_path):
    folder_of(tmp_path / "val", cat=[1], dog=[2])
    refused(small(tmp_path, name="folder"), "folder val but no train")


@pytest.mark.parametrize("which", ["", "cat", "cat/more"])
def test_an_unreadable_folder_is_named(tmp_path, monkeypatch, which):
    """Tests may run as root, whom no permission stops."""
    folder_of(tmp_path, cat=[1, 2], dog=[3, 4])
    folder_of(tmp_path / "cat", more=[5])
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
