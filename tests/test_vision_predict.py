"""``blnet predict vision``: right classes for every kind of picture, clean output."""

import csv
import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import blnet
from blnet.cli import main
from blnet.commands.answers import Answer
from blnet.network import BigLittleConfig, BigLittleNet
from blnet.official import official_key
from blnet.vision import predict as predicting
from blnet.vision.classes import imagenet_names
from blnet.vision.inference import load_trained
from blnet.vision.predict import PICTURES, predict
from blnet.vision.preprocessing import Preprocessing

COLOUR = Preprocessing(12, 0.75, 3, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
EXTRA = {"task": "vision", "classes": list(NAMES), "preprocessing": COLOUR.as_dict()}


def network(**changes):
    settings = {
        "block": "basic", "depths": (2, 2), "widths": (8, 16), "stem": "small", "stem_width": 8,
        "num_classes": len(NAMES),
    }  # fmt: skip
    torch.manual_seed(0)
    model = BigLittleNet(BigLittleConfig(**{**settings, **changes})).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            module.momentum = 1.0
    with torch.no_grad():
        images = torch.randn(16, model.config.in_channels, 12, 12)
        model(images)
        model.fc.bias -= model.eval()(images).mean(0)
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "net.safetensors"
    blnet.save(network(), path, **EXTRA)
    return path


def noise(seed, size=(20, 31), mode="RGB"):
    drawn = np.random.RandomState(seed).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(drawn).resize(size).convert(mode)


@pytest.fixture
def pictures(tmp_path):
    """Make five pictures of different sizes, in folders of two depths."""
    folder = tmp_path / "pictures"
    for number, place in enumerate(("b", "a/deep", "a", "b", "")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        noise(number, (20 + 9 * number, 31)).save(folder / place / f"{number}.png")
    return folder


def expected(picture, model, preprocessing=COLOUR):
    """Return the probabilities of a picture's classes, one picture by itself."""
    image = preprocessing.normalize(preprocessing(picture)[None])
    with torch.no_grad():
        return torch.softmax(model(image)[0].double(), 0).tolist()


def run(*words):
    return main(["predict", "vision", *map(str, words)])


def refused(capsys, *words):
    """Return the last line of what a command is refused with."""
    assert run(*words) == 2
    found = capsys.readouterr()
    assert found.out == ""
    line = found.err.splitlines()[-1]
    assert line.startswith("blnet predict vision: error: ")
    return line.removeprefix("blnet predict vision: error: ")


def check(rows, files, model, top):
    """Check JSON rows against a computation of each picture by itself."""
    assert [row["file"] for row in rows] == [str(file) for file in files]
    for row in rows:
        shares = expected(Image.open(row["file"]), model)
        order = sorted(range(len(shares)), key=lambda k: -shares[k])[:top]
        assert [p["class"] for p in row["predictions"]] == order
        assert [p["label"] for p in row["predictions"]] == [NAMES[k] for k in order]
        found = [p["probability"] for p in row["predictions"]]
        assert found == pytest.approx([shares[k] for k in order], abs=1e-5)


# What is predicted --------------------------------------------------------------------------------


def test_json_on_a_clean_standard_output(pictures, checkpoint, capsys):
    assert run(pictures, "--checkpoint", checkpoint, "--format", "json", "--top", 3) == 0
    found = capsys.readouterr()
    assert found.err == ""
    rows = json.loads(found.out)
    # Sorted by their whole path.
    files = [pictures / n for n in ("4.png", "a/2.png", "a/deep/1.png", "b/0.png", "b/3.png")]
    check(rows, files, network(), 3)
    assert {row["predictions"][0]["label"] for row in rows} > {rows[0]["predictions"][0]["label"]}


def test_batches_do_not_change_answers_or_order(pictures, checkpoint, capsys):
    answers = []
    for batch in (1, 2, 32):
        words = ("--batch", batch, "--format", "json", "--top", 100)
        assert run(pictures / "b" / "3.png", pictures, "--checkpoint", checkpoint, *words) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [row["file"][-5:] for row in answers[0]] == [f"{n}.png" for n in (3, 4, 2, 1, 0, 3)]
    for other in answers[1:]:
        for one, two in zip(answers[0], other, strict=True):
            assert one["file"] == two["file"]
            mine, theirs = ({p["class"]: p["probability"] for p in row["predictions"]} for row in (one, two))  # fmt: skip # noqa: E501
            assert mine == pytest.approx(theirs, abs=1e-5)
            assert sum(mine.values()) == pytest.approx(1, abs=1e-5)


def test_no_more_than_a_batch_is_read_ahead(pictures, monkeypatch):
    read = []
    real = predicting.decode
    monkeypatch.setattr(predicting, "decode", lambda data: (read.append(1), real(data))[1])
    files = [pictures / "4.png"] * 7
    answers = predict(network(), EXTRA, iter(files), top=1, batch_size=3)
    next(answers)
    assert len(read) == 3
    assert len(list(answers)) == 6
    assert len(read) == 7


def test_a_network_in_training_mode_predicts_as_in_evaluation(pictures):
    (answer,) = predict(network().train(), EXTRA, [pictures / "4.png"], top=1)
    shares = expected(Image.open(pictures / "4.png"), network())
    assert answer.predictions[0].probability == pytest.approx(max(shares), abs=1e-5)


def animated():
    frames = [noise(n, (16, 16)).quantize(16) for n in (11, 12, 13)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=40, loop=0)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("RGBA", "PNG"),
        ("RGBA", "WEBP"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("1", "PNG"), ("I;16", "PNG"),
    ],
)  # fmt: skip
def test_pictures_of_every_mode(tmp_path, checkpoint, capsys, mode, kind):
    sixteen = np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    picture = Image.fromarray(sixteen) if mode == "I;16" else noise(3, mode=mode)
    assert picture.mode == mode
    path = tmp_path / "picture"  # whose kind its bytes tell
    picture.save(path, kind)
    assert run(path, "--checkpoint", checkpoint, "--format", "json") == 0
    check(json.loads(capsys.readouterr().out), [path], network(), 5)


def test_of_an_animation_the_first_frame_counts(tmp_path):
    (tmp_path / "a.gif").write_bytes(animated())
    model = network()
    (answer,) = predict(model, EXTRA, [tmp_path / "a.gif"])
    frames = Image.open(tmp_path / "a.gif")
    shares = []
    for number in (0, 1):
        frames.seek(number)
        shares.append(max(expected(frames.copy(), model)))
    assert answer.predictions[0].probability == pytest.approx(shares[0], abs=1e-5)
    assert shares[0] != pytest.approx(shares[1], abs=1e-3)


def test_standard_input(pictures, checkpoint, capsys, monkeypatch):
    data = io.TextIOWrapper(io.BytesIO((pictures / "4.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", data)
    assert run("-", "--checkpoint", checkpoint, "--format", "json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["file"] == "-"
    shares = expected(Image.open(pictures / "4.png"), network())
    assert row["predictions"][0]["probability"] == pytest.approx(max(shares), abs=1e-5)


def test_a_published_checkpoint_knows_imagenets_names(tmp_path, capsys):
    torch.manual_seed(0)
    model = BigLittleNet(BigLittleConfig(
        widths=(32, 32, 64, 64), depths=(2, 2, 2, 2), stem_width=8, num_classes=1000
    )).eval()  # fmt: skip
    nn.init.normal_(model.fc.bias)
    state = {official_key(key): value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    noise(1, (300, 260)).save(tmp_path / "a.png")
    words = ("--checkpoint", tmp_path / "official.pth", "--format", "json")
    assert run(tmp_path / "a.png", *words) == 0
    (row,) = json.loads(capsys.readouterr().out)
    names = imagenet_names()
    assert (len(names), names[0], names[-1]) == (1000, "tench", "toilet tissue")
    imagenet = Preprocessing(224, 0.875, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    shares = expected(Image.open(tmp_path / "a.png"), model, imagenet)
    best = int(np.argmax(shares))
    assert row["predictions"][0]["class"] == best
    assert row["predictions"][0]["label"] == names[best]
    assert row["predictions"][0]["probability"] == pytest.approx(shares[best], rel=1e-3)
    assert len(row["predictions"]) == 5


def test_classes_without_names_are_numbers(pictures):
    extra = {"preprocessing": COLOUR.as_dict()}
    (answer,) = predict(network(), extra, [pictures / "4.png"], top=2)
    assert [p.label for p in answer.predictions] == [str(p.index) for p in answer.predictions]


# How it is shown ----------------------------------------------------------------------------------


def test_csv(pictures, checkpoint, capsys):
    assert run(pictures, "--checkpoint", checkpoint, "--format", "csv", "--top", 2) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["rank"] for row in rows] == ["1", "2"] * 5
    for row in rows:
        shares = expected(Image.open(row["file"]), network())
        assert float(row["probability"]) == pytest.approx(shares[int(row["class"])], abs=2e-5)
        assert row["label"] == NAMES[int(row["class"])]


def test_table(tmp_path, checkpoint, capsys):
    path = tmp_path / "a [bold]odd[red] name :cat:.png"
    noise(1).save(path)
    assert run(path, "--checkpoint", checkpoint, "--top", 2) == 0
    text = capsys.readouterr().out
    shares = sorted(expected(Image.open(path), network()))
    for share in shares[-2:]:
        assert f"{100 * share:.2f} %" in text
    # Square brackets and colons are nobody's mark-up.
    assert "a[bold]odd[red]name:cat:.png" in re.sub(r"\s", "", text)


def test_output_goes_to_a_file(pictures, checkpoint, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = (pictures, "--checkpoint", checkpoint, "--format", "json")
    assert run(*words, "--output", out) == 0
    assert capsys.readouterr().out == ""
    assert run(*words) == 0
    assert out.read_text() == capsys.readouterr().out


def test_a_failure_leaves_the_file_as_it_was(tmp_path, checkpoint, capsys):
    out = tmp_path / "out.json"
    out.write_text("before")
    refused(capsys, tmp_path / "no.png", "--checkpoint", checkpoint, "--output", out)
    assert out.read_text() == "before"
    line = refused(capsys, tmp_path / "no.png", "--checkpoint", checkpoint, "--output", tmp_path / "x" / "y")  # fmt: skip # noqa: E501
    assert "does not exist; create it first" in line


# What cannot be read ------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_and_the_others_go_on(pictures, checkpoint, capsys):
    (pictures / "a" / "bad.jpg").write_bytes(b"no picture")
    (pictures / "a" / "empty.jpg").touch()
    whole = (pictures / "b" / "0.png").read_bytes()
    (pictures / "a" / "short.png").write_bytes(whole[: len(whole) // 2])
    words = ("--checkpoint", checkpoint, "--format", "json", "--batch", 2)
    assert run(pictures / "none.png", pictures, *words) == 1
    found = capsys.readouterr()
    assert len(json.loads(found.out)) == 5
    lines = found.err.splitlines()
    problems = [
        ("none.png", "No such file or directory"),
        ("bad.jpg", "not a picture of a format that PIL knows"),
        ("empty.jpg", "the file is empty"),
        ("short.png", "truncated"),
    ]
    assert len(lines) == 4
    for line, (name, why) in zip(lines, problems, strict=True):
        assert line.startswith("blnet predict vision: ")
        assert f"{name} cannot be read: " in line
        assert why in line


def test_answers_tell_what_is_wrong(pictures, tmp_path):
    files = [tmp_path / "no.png", pictures / "4.png"]
    first, second = predict(network(), EXTRA, files, top=1)
    assert first == Answer(str(files[0]), problem="No such file or directory")
    assert second.problem is None
    assert len(second.predictions) == 1


@pytest.mark.parametrize("which", ["", "below"])
def test_a_folder_that_cannot_be_read_is_named(
    pictures, checkpoint, tmp_path, capsys, monkeypatch, which
):
    """Tests may run as root, whom no permission stops."""
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    shutil.copy(pictures / "4.png", folder)
    closed, scandir = folder / which, os.scandir

    def refuse(path="."):
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    words = ("--checkpoint", checkpoint, "--format", "json")
    assert run(folder, pictures / "4.png", *words) == 1
    found = capsys.readouterr()
    told = f"{closed} is a folder that cannot be read (Permission denied)"
    assert found.err == f"blnet predict vision: {told}\n"
    assert len(json.loads(found.out)) == (2 if which else 1)


def test_a_folder_without_pictures_is_named(pictures, checkpoint, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no picture")
    (tmp_path / "notes" / ".hidden.png").touch()
    words = ("--checkpoint", checkpoint, "--format", "json")
    assert run(tmp_path / "notes", pictures / "4.png", *words) == 1
    found = capsys.readouterr()
    assert found.err == f"blnet predict vision: {tmp_path / 'notes'} is a folder without pictures\n"
    assert len(json.loads(found.out)) == 1
    assert "not one picture could be read" in refused(capsys, tmp_path / "notes", *words)


def test_hidden_folders_are_passed_over(pictures):
    (pictures / ".cache").mkdir()
    noise(0).save(pictures / ".cache" / "thumb.png")
    noise(0).save(pictures / "Z.JPG", "JPEG")
    files, empty = PICTURES.expand([pictures])
    assert empty == 0
    assert [file[len(str(pictures)) + 1 :] for file in files] == [
        "4.png", "Z.JPG", "a/2.png", "a/deep/1.png", "b/0.png", "b/3.png",
    ]  # fmt: skip


def test_names_that_are_no_text(tmp_path, checkpoint, capsys):
    raw = bytes(tmp_path) + b"/\xff.png"
    with open(raw, "wb") as file:
        noise(1).save(file, "PNG")
    for form in ("json", "csv", "table"):
        assert run(tmp_path, "--checkpoint", checkpoint, "--format", form) == 0
        assert "\ufffd.png" in re.sub(r"\s", "", capsys.readouterr().out)


# What is refused ----------------------------------------------------------------------------------


def test_no_checkpoint(pictures, capsys, tmp_path):
    line = refused(capsys, pictures)
    assert line.startswith("--checkpoint is missing")
    assert "'blnet train vision' makes one" in line
    line = refused(capsys, pictures, "--checkpoint", tmp_path / "no.safetensors")
    assert "no.safetensors does not exist" in line
    assert "'blnet train vision' makes one" in line


def test_standard_input_can_be_read_once(checkpoint, capsys):
    assert "name it once" in refused(capsys, "-", "-", "--checkpoint", checkpoint)


def test_outputs_that_are_no_numbers(pictures, tmp_path, capsys):
    model = network()
    nn.init.constant_(model.fc.bias, torch.inf)
    blnet.save(model, tmp_path / "bad.safetensors", **EXTRA)
    line = refused(capsys, pictures, "--checkpoint", tmp_path / "bad.safetensors")
    assert "outputs that are not finite numbers" in line


def test_memory_that_runs_out(pictures, checkpoint, capsys, monkeypatch):
    trained = load_trained(checkpoint)
    monkeypatch.setattr(predicting, "load_trained", lambda *_: trained)

    def forward(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trained.model, "forward", forward)
    line = refused(capsys, pictures, "--checkpoint", checkpoint)
    assert "memory ran out with 5 pictures at once; lower --batch" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(pictures, checkpoint, capsys):
    line = refused(capsys, pictures, "--checkpoint", checkpoint, "--device", "cuda")
    assert "--device cuda: PyTorch sees no GPU" in line


@pytest.mark.parametrize("words", [("--top", "0"), ("--batch", "-1"), ("--format", "xml")])
def test_flags_that_make_no_sense(pictures, capsys, words):
    with pytest.raises(SystemExit) as stop:
        run(pictures, *words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_it_needs_a_file(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--checkpoint", "x")
    assert stop.value.code == 2
