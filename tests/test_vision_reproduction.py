"""The paper's table beside measurements: which network is which row, and nothing made up."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn.functional import one_hot

from blnet.cli import main
from blnet.network import BigLittleNet
from blnet.official import official_key
from blnet.vision import evaluate, reproduction
from blnet.vision.config import DataConfig
from blnet.vision.preprocessing import IMAGENET
from blnet.vision.reproduction import Measured, as_table, matching, reproduce, strangers
from blnet.vision.table import OFFICIAL, PAPER, PUBLISHED
from helpers.networks import on_meta


def places(model):
    return [PUBLISHED.index(row) for row in matching(model)]


# Which network is which row -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "alpha", "beta", "rows"),
    [
        ("bl_resnet50", 2, 2, [1]),
        ("bl_resnet50", 2, 4, [2, 5]),
        ("bl_resnet50", 4, 2, [3]),
        ("bl_resnet50", 4, 4, [4]),
        ("bl_resnet101", 2, 4, [6]),
        ("bl_resnext50_32x4d", 2, 4, [7]),
        ("bl_resnext101_32x4d", 2, 4, [8]),
        ("bl_resnext101_64x4d", 2, 4, [9]),
        ("bl_seresnext50_32x4d", 2, 4, [10]),
        ("bl_seresnext101_32x4d", 2, 4, [11]),
        ("bl_resnet152", 2, 4, [12]),
        # For 50 layers the same network; for 101 another.
        ("bl_resnet50", 2, 3, [2, 5]),
        ("bl_resnet101", 2, 3, []),
        ("bl_resnet50", 4, 1, []),
        ("bl_resnet18", 2, 4, []),
        ("bl_resnet101", 4, 4, []),
    ],
)
def test_networks_are_recognised(name, alpha, beta, rows):
    assert places(on_meta(name, alpha=alpha, beta=beta)) == rows
    assert len(PUBLISHED) == 13
    for place in rows:
        assert PUBLISHED[place].name == name


def test_the_plain_network_is_recognised_in_each_of_its_forms():
    assert PUBLISHED[0].name == "resnet50"
    for name, options in (
        ("resnet50", {}),
        ("torchvision:resnet50", {}),
        ("bl_resnet50", {"branches": 1}),
        ("bl_resnet50", {"branches": 1, "alpha": 4, "beta": 1}),
    ):
        assert places(on_meta(name, **options)) == [0], name
    for name, options in (
        ("resnet101", {}),
        ("wide_resnet50_2", {}),
        ("resnet50", {"num_classes": 10}),
        ("bl_resnet101", {"branches": 1}),
    ):
        assert places(on_meta(name, **options)) == [], name


@pytest.mark.parametrize(
    "change",
    [{"num_classes": 10}, {"branches": 3}, {"stem": "small"}, {"in_channels": 1}, {"width": 0.5}],
)
def test_a_change_makes_it_another_network(change):
    assert places(on_meta("bl_resnet50", **change)) == []


# The table ----------------------------------------------------------------------------------------


def measured(name, *rows, error=23.0):
    return Measured(name, tuple(PUBLISHED[r] for r in rows), error, (22.5, 23.5), 50_000)


def text_of(rows, images=50_000):
    console = Console(width=160, markup=False)
    with console.capture() as captured:
        console.print(as_table(rows, images))
    return captured.get()


def test_what_was_not_run_stays_empty():
    rows = reproduce([measured("a.pth", 2, 5), measured("b.pth", 12)])
    assert len(rows) == 13
    facts = ("group", "network", "name", "alpha", "beta")
    for place, (row, published) in enumerate(zip(rows, PUBLISHED, strict=True)):
        assert all(getattr(row, fact) == getattr(published, fact) for fact in facts)
        assert row.published_error_percent == published.top1_error
        if place not in (2, 5, 12):
            found = dataclasses.asdict(row)
            assert {found[k] for k in list(found)[6:]} == {None}
    assert (rows[2].group, rows[5].group) == (PAPER, OFFICIAL)
    assert rows[2].difference_points == pytest.approx(23.0 - 22.69)
    assert rows[5].difference_points == pytest.approx(23.0 - 22.41)
    assert (rows[2].checkpoint, rows[2].measured_error_percent) == ("a.pth", 23.0)
    # Of the 152 no error was published.
    assert (rows[12].measured_error_percent, rows[12].difference_points) == (23.0, None)


def test_two_checkpoints_of_a_row_are_two_lines():
    rows = reproduce([measured("a.pth", 3), measured("b.pth", 3, error=25.0)])
    assert len(rows) == 14
    assert [row.checkpoint for row in rows[3:5]] == ["a.pth", "b.pth"]
    assert rows[4].difference_points == pytest.approx(1.8)


def test_printed_table():
    text = text_of(reproduce([measured("a.pth", 2, 5)]))
    assert text.count("not run") == 11
    assert "[1] a.pth" in text
    paper, official = (line for line in text.splitlines() if "[1]" in line and "a.pth" not in line)
    assert paper.split() == [
        "bL-ResNet-50", "2", "4", "22.69", "23.00", "22.50", "to", "23.50", "+0.31", "[1]",
    ]  # fmt: skip
    assert "+0.59" in official
    assert "only" not in text
    assert "only 1,000 of the 50,000 images" in text_of(reproduce([]), images=1000)


def test_strangers_are_named():
    (line,) = strangers([measured("a.pth", 2), measured("other.pth", error=12.345)])
    assert line.startswith("other.pth is no network of the paper's table: its error, 12.35 %")


# The command --------------------------------------------------------------------------------------


def run(*words):
    return main(["evaluate", "vision", *map(str, words)])


def published_file(path, **options):
    """Write a made-up official checkpoint: a file of a few bytes a weight, all of them alike."""
    state = {
        f"module.{official_key(key)}": torch.ones((), dtype=value.dtype).expand(value.shape)
        for key, value in on_meta("bl_resnet50", **options).state_dict().items()
    }
    torch.save({"state_dict": state}, path)
    return path


def ids(count):
    """Return sorted names such as ImageNet's class folders have, its first and last among them."""
    return ["n01440764", *(f"n{n + 2_000_000:08d}" for n in range(count - 2)), "n15075141"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Make a folder like ImageNet's with a picture a class, whose colour is the class's number."""
    root = tmp_path_factory.mktemp("imagenet")
    for number, name in enumerate(ids(1000)):
        (root / "val" / name).mkdir(parents=True)
        colour = (number // 250, number % 250, 0)
        Image.new("RGB", (4, 4), colour).save(root / "val" / name / "a.png")
    return root


def three_of_four(self, images):
    """Read the class off the colour, and be wrong where it divides by 4: by one."""
    mean, std = torch.tensor(IMAGENET.mean), torch.tensor(IMAGENET.std)
    pixels = ((images[:, :, 112, 112] * std + mean) * 255).round().long()
    number = pixels[:, 0] * 250 + pixels[:, 1]
    return one_hot(number + (number % 4 == 0), 1000).float()


def test_an_official_checkpoint_on_imagenets_folders(imagenet, tmp_path, capsys, monkeypatch):
    # A real network would take minutes for so many pictures.
    monkeypatch.setattr(BigLittleNet, "forward", three_of_four)
    monkeypatch.setattr(evaluate, "load_trained", quickly(evaluate.load_trained))
    path, out = published_file(tmp_path / "official.pth", alpha=2, beta=4), tmp_path / "out"
    words = ("--data", "imagenet", "--data-path", imagenet, "--paper", "--output", out)
    assert run(path, *words, "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "only 1,000 of the 50,000" in shown
    assert shown.count("not run") == 11
    assert "bL-ResNet-50 (alpha 2, beta 4)" in shown
    results = json.loads((out / "results.json").read_text())
    ran = [row for row in results["paper"] if row["checkpoint"] is not None]
    assert [(row["group"], row["measured_error_percent"]) for row in ran] == [
        (PAPER, 25.0), (OFFICIAL, 25.0),
    ]  # fmt: skip
    assert ran[0]["difference_points"] == pytest.approx(25 - 22.69)
    low, high = ran[0]["interval_percent"]
    accuracy = results["networks"][0]["metrics"]["accuracy_interval_95"]
    assert (low, high) == pytest.approx((100 - 100 * accuracy[1], 100 - 100 * accuracy[0]))
    assert low < 25 < high
    with (out / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["class"] == "tench"
    assert rows[0]["most confused with"] == "goldfish"
    assert [float(row["top-1"]) for row in rows] == [float(n % 4 > 0) for n in range(1000)]
    confusion = np.loadtxt(out / "confusion.csv", delimiter=",", skiprows=1, usecols=range(1, 5),
                           max_rows=4, quotechar='"', dtype=str)  # fmt: skip
    assert confusion.astype(int).tolist()[0] == [0, 1, 0, 0]


def quickly(load):
    """Load a network without profiling it; the forward pass of these tests is none."""

    def loaded(*source):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BigLittleNet, "forward", FORWARD)
            return load(*source)

    return loaded


FORWARD = BigLittleNet.forward


def refused(capsys, *words):
    assert run(*words) == 2
    found = capsys.readouterr()
    assert found.out == ""
    (line,) = found.err.splitlines()
    return line


def test_other_data_are_refused(tmp_path, capsys, imagenet):
    path = published_file(tmp_path / "official.pth")
    line = refused(capsys, path, "--data", "fake", "--paper")
    assert "--paper compares errors on ImageNet's validation set, and the data is fake" in line
    words = ("--data", "imagenet", "--data-path", imagenet, "--paper")
    assert "whole validation set; leave out --limit 5" in refused(capsys, path, *words, "--limit", 5)  # fmt: skip # noqa: E501
    (tmp_path / "val" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "cat" / "a.png")
    other = refused(capsys, path, "--data", "imagenet", "--data-path", tmp_path, "--paper")
    assert "official.pth knows 1000 classes and imagenet (1 test" in other
    small = published_file(tmp_path / "small.pth", num_classes=1)
    line = refused(capsys, small, "--data", "imagenet", "--data-path", tmp_path, "--paper")
    assert "--paper compares errors on ImageNet's 1000 classes, and the data has 1" in line


def test_other_pictures_are_refused():
    reproduction.check_preprocessing("net", IMAGENET)
    whole = dataclasses.replace(IMAGENET, crop_ratio=0.95)
    with pytest.raises(ValueError, match="224 pixels out of 256, and net takes 224 out of 236"):
        reproduction.check_preprocessing("net", whole)


def test_a_published_checkpoint_needs_to_be_told_its_data(tmp_path, capsys):
    line = refused(capsys, published_file(tmp_path / "official.pth"))
    assert "does not say what it was trained on; name the data with --data" in line


def test_a_published_checkpoint_knows_imagenets_names(tmp_path, imagenet):
    trained = evaluate.load_trained(published_file(tmp_path / "official.pth"))
    settings = DataConfig(name="folder", eval_path=str(imagenet / "val"))
    data = evaluate.evaluation_data(settings, trained.preprocessing)
    assert data.classes[0] == "n01440764"
    evaluate.check_same_classes(trained, settings, data)
    swapped = dataclasses.replace(data, classes=("n00000000", *data.classes[1:]))
    with pytest.raises(ValueError, match=r"class 0 as 'tench' and folder .* has 'n00000000'"):
        evaluate.check_same_classes(trained, settings, swapped)
