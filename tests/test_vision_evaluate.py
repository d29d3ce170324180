"""``blnet evaluate vision``: counts that are right, the data that are meant, readable files."""

import contextlib
import csv
import io
import json
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import nn

import blnet
from blnet.cli import main
from blnet.commands.confusion import (
    draw_confusion,
    wilson,
    write_confusion,
    write_per_class,
)
from blnet.vision import evaluate, inference, report
from blnet.vision.config import DataConfig, VisionConfig
from blnet.vision.data import load_data
from blnet.vision.evaluate import evaluation_data, measure
from blnet.vision.inference import load_trained
from blnet.vision.preprocessing import IMAGENET, Preprocessing
from helpers.digits import DIGITS, GREY, header, network
from helpers.pictures import folder_of
from helpers.processes import become, free_port


def by_hand(model, data):
    """Return confusion and top-5 hits of each class, counted one image after the other."""
    confusion, hits = np.zeros((10, 10), int), np.zeros(10, int)
    for image, label in (data.evaluation[i] for i in range(len(data.evaluation))):
        with torch.no_grad():
            logits = model(data.preprocessing.normalize(image[None]))[0].tolist()
        order = sorted(range(10), key=lambda k: -logits[k])
        confusion[label, order[0]] += 1
        hits[label] += label in order[:5]
    return confusion, hits


def run(*words):
    return main(["evaluate", "vision", *map(str, words)])


# What is counted ----------------------------------------------------------------------------------


def test_counts_are_those_by_hand(saved):
    trained = load_trained(saved())
    data = evaluation_data(DataConfig(), trained.preprocessing)
    confusion, hits = by_hand(trained.model, data)
    # 7 does not divide 360: the last batch is smaller.
    found = measure(trained.model, data, VisionConfig(batch_size=7, device="cpu"))
    assert found.confusion.tolist() == confusion.tolist()
    assert found.top5_hits.tolist() == hits.tolist()
    assert (found.images, found.correct) == (360, confusion.trace())
    assert found.accuracy == confusion.trace() / 360
    assert found.top5 == hits.sum() / 360
    assert 0 < found.correct < found.correct_top5 < 360
    assert (confusion.sum(0) > 0).sum() > 4, "a network with few answers shows little"
    assert not found.corrupt


def test_the_loss_is_the_mean_cross_entropy(saved):
    trained = load_trained(saved())
    data = evaluation_data(DataConfig(limit=50), trained.preprocessing)
    images, labels = zip(*(data.evaluation[i] for i in range(50)), strict=True)
    with torch.no_grad():
        logits = trained.model(GREY.normalize(torch.stack(images)))
    expected = nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    # Label smoothing is training's affair.
    config = VisionConfig(batch_size=16, device="cpu", label_smoothing=0.2)
    assert measure(trained.model, data, config).loss == pytest.approx(expected, rel=1e-5)


def test_few_classes_have_no_top5(tmp_path, capsys):
    for kind in ("cat", "dog"):
        (tmp_path / "val" / kind).mkdir(parents=True)
        for number in range(3):
            shade = 200 if kind == "cat" else 20
            Image.new("RGB", (9, 12), (shade + number,) * 3).save(tmp_path / "val" / kind / f"{number}.png")  # fmt: skip # noqa: E501
    path = tmp_path / "net.safetensors"
    model = network(num_classes=2)
    blnet.save(model, path, **header(classes=["cat", "dog"], data={"name": "folder"}))
    assert run(path, "--eval-path", tmp_path / "val", "--output", tmp_path / "out") == 0
    assert "top-5" not in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["networks"]
    assert found["metrics"]["top5"] is None
    assert found["counts"]["images"] == 6
    assert {row["top-5"] for row in rows_of(tmp_path / "out" / "per_class.csv")} == {""}


@pytest.mark.parametrize(
    ("right", "of"), [(0, 7), (7, 7), (350, 360), (1, 50_000), (38_645, 50_000)]
)
def test_interval_is_wilsons(right, of):
    expected = binomtest(right, of).proportion_ci(0.95, method="wilson")
    assert wilson(right, of) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = wilson(right, of)
    assert 0 <= low <= right / of <= high <= 1


def test_preprocessing_is_the_checkpoints_not_the_datas():
    own = load_data(DataConfig(), parts="evaluation").preprocessing
    other = Preprocessing(16, 0.5, 3, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert own != other
    data = evaluation_data(DataConfig(), other)
    image, _ = data.evaluation[0]
    assert image.shape == (3, 16, 16)
    assert data.preprocessing == other
    assert data.evaluation.transform == other
    assert "16x16" in data.name


def test_shards_get_the_checkpoints_preprocessing(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    picture = io.BytesIO()
    Image.new("RGB", (20, 20), (250, 0, 0)).save(picture, "PNG")
    with webdataset.TarWriter(str(tmp_path / "val-0.tar")) as shard:
        for number in range(6):
            shard.write({"__key__": f"{number:03d}", "png": picture.getvalue(), "cls": b"3"})
    settings = DataConfig(name="webdataset", eval_path=str(tmp_path / "val-0.tar"), classes=10)
    data = evaluation_data(settings, GREY)
    model = network()
    found = measure(model, data, VisionConfig(batch_size=4, device="cpu"))
    image = GREY(Image.new("RGB", (20, 20), (250, 0, 0)))
    with torch.no_grad():
        answer = int(model(GREY.normalize(image[None])).argmax())
    assert found.confusion[3, answer] == found.images == 6


def test_every_network_has_a_folder_of_its_own(tmp_path):
    names = ["run", "a/run", "run-2", "b/run", "best.safetensors", "c/best.safetensors"]
    found = []
    for name in names:
        place = tmp_path / name
        (place.parent if place.suffix else place).mkdir(parents=True, exist_ok=True)
        found.append(SimpleNamespace(trained=SimpleNamespace(source=str(place))))
    assert report._places(found) == ["run", "run-3", "run-2", "run-4", "best", "best-2"]
    assert report._places(found[2:3]) == ["."]
    assert report._places(found[:2] + found[:1]) == ["run", "run-2", "run-3"]


# What is printed and written ----------------------------------------------------------------------


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_hold_what_was_counted(saved, tmp_path, capsys):
    path, out = saved(), tmp_path / "out"
    assert run(path, "--output", out, "--batch", 64, "--device", "cpu") == 0
    shown = capsys.readouterr().out
    trained = load_trained(path)
    data = evaluation_data(DataConfig(), GREY)
    confusion, hits = by_hand(trained.model, data)
    correct = int(confusion.trace())

    results = json.loads((out / "results.json").read_text())
    (found,) = results["networks"]
    assert found["counts"] == {
        "images": 360, "correct": correct, "correct_top5": int(hits.sum()), "classes": 10,
        "corrupt": 0,
    }  # fmt: skip
    assert found["metrics"]["accuracy"] == correct / 360
    assert found["metrics"]["error"] == 1 - correct / 360
    assert found["metrics"]["accuracy_interval_95"] == list(wilson(correct, 360))
    cost = blnet.profile(trained.model, (1, 1, 8, 8))
    assert found["cost"]["parameters"] == cost.parameters
    assert found["cost"]["macs"] == cost.macs
    assert found["model"]["config"]["widths"] == [8, 16]
    assert found["checkpoint"] == str(path)
    assert found["preprocessing"] == GREY.as_dict()
    assert (results["batch"], results["precision"]) == (64, "fp32")
    assert results["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]

    table = rows_of(out / "per_class.csv")
    assert [row["class"] for row in table] == DIGITS
    for index, row in enumerate(table):
        images = confusion[index].sum()
        assert int(row["images"]) == images
        assert float(row["top-1"]) == pytest.approx(confusion[index, index] / images, abs=1e-6)
        assert float(row["top-5"]) == pytest.approx(hits[index] / images, abs=1e-6)
        mistakes = {k: n for k, n in enumerate(confusion[index]) if k != index}
        assert int(row["times"] or 0) == max(mistakes.values())
        assert mistakes[int(row["most confused with"])] == int(row["times"])
    lines = list(csv.reader((out / "confusion.csv").open(newline="")))
    assert lines[0] == ["true class", *DIGITS]
    assert [[int(n) for n in line[1:]] for line in lines[1:]] == confusion.tolist()
    assert Image.open(out / "confusion.png").format == "PNG"

    low, high = wilson(correct, 360)
    assert f"{100 * correct / 360:.2f}" in shown
    assert f"{100 * low:.2f} to {100 * high:.2f}" in shown
    assert f"{100 - 100 * correct / 360:.2f}" in shown
    assert f"{cost.parameters:,}" in shown
    assert "bl_resnet18 (alpha 2, beta 4, width 0.5)" in shown


def test_several_networks_have_folders_of_their_own(saved, tmp_path):
    run_folder = tmp_path / "digits"
    run_folder.mkdir()
    saved("one").rename(run_folder / "best.safetensors")
    two = saved("two", network(seed=1))
    (tmp_path / "deep").mkdir()
    same = two.rename(tmp_path / "deep" / "digits.safetensors")
    out = tmp_path / "out"
    assert run(run_folder, same, "--output", out, "--limit", 100) == 0
    found = json.loads((out / "results.json").read_text())["networks"]
    assert [one["files"] for one in found] == ["digits", "digits-2"]
    assert [one["counts"]["images"] for one in found] == [100, 100]
    for one in found:
        table = rows_of(out / one["files"] / "per_class.csv")
        right = sum(float(row["top-1"]) * int(row["images"]) for row in table)
        assert right == pytest.approx(one["counts"]["correct"], abs=1e-3)
    assert found[0]["counts"]["correct"] != found[1]["counts"]["correct"]


def one_process(rank, port, folder, words):
    become(rank, 2, port)
    with (folder / f"{rank}.txt").open("w") as file, contextlib.redirect_stdout(file):
        status = run(*words)
    torch.distributed.destroy_process_group()
    sys.exit(status)


def test_every_process_counts_its_share_and_the_first_one_reports(saved, tmp_path):
    path, out = saved(), tmp_path / "out"
    words = (path, "--device", "cpu", "--limit", "101", "--output", out)
    port = free_port()
    # Forked: a new process takes seconds to import PyTorch.
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=one_process, args=(rank, port, tmp_path, words), daemon=True)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    shown = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert [text.count("parameters") for text in shown] == [1, 0]
    assert shown[1] == ""
    trained = load_trained(path)
    alone = measure(trained.model, evaluation_data(DataConfig(limit=101), GREY))
    results = json.loads((out / "results.json").read_text())
    assert results["device"].startswith("2 x ")
    (found,) = results["networks"]
    assert found["counts"]["images"] == 101
    assert found["counts"]["correct"] == alone.correct
    assert found["counts"]["correct_top5"] == alone.correct_top5
    assert found["metrics"]["loss"] == pytest.approx(alone.loss, rel=1e-5)


def test_per_class_leaves_out_what_has_no_meaning(tmp_path):
    confusion = np.array([[3, 0, 1], [0, 0, 0], [0, 0, 2]])
    write_per_class(tmp_path / "a.csv", ("a, b", "empty", "c"), confusion, None, "images")
    rows = rows_of(tmp_path / "a.csv")
    assert list(rows[0].values()) == ["a, b", "4", "0.750000", "", "c", "1"]
    assert list(rows[1].values()) == ["empty", "0", "", "", "", ""]
    assert list(rows[2].values()) == ["c", "2", "1.000000", "", "", ""]
    write_confusion(tmp_path / "b.csv", ("a, b", "empty", "c"), confusion)
    assert rows_of(tmp_path / "b.csv")[0] == {"true class": "a, b", "a, b": "3", "empty": "0", "c": "1"}  # fmt: skip # noqa: E501


@pytest.mark.parametrize("classes", [1, 10, 31, 300])
def test_picture_shows_every_cell(tmp_path, classes):
    """A single mistake in the corner changes the picture, however many classes there are."""
    pictures = []
    for mistakes in (0, 1):
        confusion = np.eye(classes, dtype=np.int64) * 5
        confusion[0, -1] += mistakes
        path = tmp_path / f"{mistakes}.png"
        # What looks like a formula is none, and would not parse as one.
        names = [f"$\\bad {n}$ with a name that is very long" for n in range(classes)]
        draw_confusion(path, names, confusion, "a title with $\\bad$ in it")
        pictures.append(np.asarray(Image.open(path).convert("L"), dtype=int))
    assert pictures[0].shape == pictures[1].shape
    assert min(pictures[0].shape) >= 700
    assert np.abs(pictures[0] - pictures[1]).max() > 50


@pytest.mark.filterwarnings("error")
def test_names_that_the_font_lacks_are_boxes_and_no_warning(tmp_path):
    draw_confusion(tmp_path / "a.png", ["\u732b", "\u72ac"], np.eye(2, dtype=np.int64), "\u8868")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_examples_name_flags_that_exist(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = {word for word in text.split("examples:")[1].split() if word.startswith("--")}
    assert flags - {"--nproc-per-node"} <= set(text.split("examples:")[0].replace(",", " ").split())


def test_bfloat16_is_measured_as_such(saved, tmp_path):
    assert run(saved(), "--precision", "bf16", "--output", Path(tmp_path, "out")) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["precision"] == "bf16"


# Which data ---------------------------------------------------------------------------------------


def settings_of(extra, **given):
    trained = inference.Trained("net", nn.Identity(), extra, IMAGENET, 10, None, None)
    return evaluate.data_settings(trained, given)


def test_data_are_those_of_training_changed_by_flags():
    recorded = {"data": {"name": "folder", "path": "/a", "eval_path": "/a/v", "split_seed": 3,
                         "holdout": 0.3, "unknown": 1}}  # fmt: skip
    same = DataConfig(name="folder", path="/a", eval_path="/a/v", split_seed=3, holdout=0.3)
    assert settings_of(recorded) == same
    assert settings_of(recorded, data="folder") == same
    assert settings_of(recorded, eval_path="/b").eval_path == "/b"
    assert settings_of(recorded, path="/a/.").eval_path == "/a/v", "the same, by another name"
    with pytest.raises(ValueError, match=r"--data-path /c .* /a/v was evaluated on; .*--eval-path"):
        settings_of(recorded, path="/c")
    assert settings_of(recorded, path="/c", eval_path="/c/v").eval_path == "/c/v"
    shared = {"data": {"name": "folder", "path": "/a", "split_seed": 3, "limit": 10}}
    moved = settings_of(shared, path="/c")
    assert (moved.path, moved.eval_path, moved.split_seed, moved.limit) == ("/c", None, 3, 10)
    assert settings_of(shared, eval_path="/e").limit is None, "how many there were of another part"
    assert settings_of(shared, eval_path="/e", limit=7).limit == 7
    assert settings_of(shared, paper=True).limit is None
    limited = {"data": {**recorded["data"], "limit": 10}}
    assert settings_of(limited, eval_path="/e").limit == 10, "the same part, moved"
    assert settings_of(recorded, data="digits") == DataConfig()
    assert settings_of({}, data="imagenet", path="/i") == DataConfig(name="imagenet", path="/i")
    split = {"name": "cifar10", "path": "/p.npz", "holdout": 0.3, "split_seed": 5}
    same = settings_of({"data": split}, data="npz", path="/p.npz")
    assert same.eval_path is None  # a share of it was trained on
    assert (same.holdout, same.split_seed) == (0.3, 5)  # and this one was not
    back = settings_of({"data": {**split, "name": "npz"}}, data="cifar10", path="/p.npz")
    assert (back.holdout, back.split_seed) == (0.3, 5)
    own = settings_of({"data": {**split, "eval_path": "/e.npz"}}, data="npz", path="/p.npz")
    assert own.eval_path == "/e.npz"
    for name in ("folder", "npz"):  # none of it was trained on
        found = settings_of({"data": {"name": "digits"}}, data=name, path="/p")
        assert (found.path, found.eval_path) == ("/p", "/p")


def test_of_a_folder_with_parts_the_evaluation_part_is_taken(tmp_path):
    folder_of(tmp_path / "train", cat=[1, 2], dog=[3])
    folder_of(tmp_path / "val", cat=[4], dog=[5, 6])
    settings = settings_of({"data": {"name": "digits"}}, data="folder", path=str(tmp_path))
    assert load_data(settings, parts="evaluation").counts == (0, 3)
    (tmp_path / "train").rename(tmp_path / "test")  # no part to train on, as ImageNet's alone
    assert load_data(settings, parts="evaluation").counts == (0, 3)
    settings = settings_of({}, data="folder", path=str(tmp_path / "test"))
    assert load_data(settings, parts="evaluation").counts == (0, 3)


def test_flags_that_the_set_does_not_read_are_refused():
    recorded = {"data": {"name": "digits", "path": "left from a run that passed it over"}}
    assert settings_of(recorded).name == "digits"
    for field, value in {"path": "/a", "eval_path": "/b", "classes": 3, "eval_images": 5}.items():
        flag = f"--data.{field.replace('_', '-')} is not read with --data.name digits"
        with pytest.raises(ValueError, match=flag):
            settings_of(recorded, **{field: value})


def test_held_out_images_are_those_of_the_run(saved, tmp_path):
    path = saved(data={"name": "digits", "holdout": 0.1, "split_seed": 5})
    assert run(path, "--output", tmp_path / "out") == 0
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["networks"]
    assert found["counts"]["images"] == 180
    assert found["data"]["settings"]["split_seed"] == 5


# What cannot be read ------------------------------------------------------------------------------


def pictures(folder, spoilt, count=150):
    for kind in ("a", "b"):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), number).save(folder / kind / f"{number:03d}.png")
    for number in range(spoilt):
        (folder / "b" / f"{number:03d}.png").write_bytes(b"spoilt")
    return folder


def test_a_few_spoilt_pictures_are_counted_skipped_and_named(tmp_path, capsys):
    folder = pictures(tmp_path / "val", spoilt=2)
    path = tmp_path / "net.safetensors"
    blnet.save(network(num_classes=2), path, **header(classes=["a", "b"], data={"name": "folder"}))
    assert run(path, "--eval-path", folder, "--output", tmp_path / "out", "--batch", 32) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert [str(folder / "b" / f"00{n}.png") in line for n, line in enumerate(warnings)] == [True] * 2  # fmt: skip # noqa: E501
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["networks"]
    assert (found["counts"]["images"], found["counts"]["corrupt"]) == (298, 2)
    assert found["corrupt"][0]["name"] == str(folder / "b" / "000.png")
    assert rows_of(tmp_path / "out" / "per_class.csv")[1]["images"] == "148"


def test_more_than_one_in_a_hundred_is_an_error(tmp_path, capsys):
    folder = pictures(tmp_path / "val", spoilt=4)
    path = tmp_path / "net.safetensors"
    blnet.save(network(num_classes=2), path, **header(classes=["a", "b"], data={"name": "folder"}))
    assert run(path, "--eval-path", folder) == 2
    assert "of the 300 evaluation images cannot be read, more than 1%" in capsys.readouterr().err
