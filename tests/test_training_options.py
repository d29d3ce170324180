"""Flags and recipes: one flag for every field, and one line for every mistake."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from blnet.training.config import OptimizerConfig, TrainingConfig, flat
from blnet.training.options import given, parse


@dataclass(frozen=True)
class PartConfig:
    """A part.

    Attributes:
        path: folder of it, 100 % of it.
        ratio: share of it; default: all.
        names: what it has.
    """

    path: str | None = None
    ratio: float | None = None
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Config(TrainingConfig):
    """A run with a part.

    Attributes:
        part: what it is made of.
        baseline: whether something else comes after.
    """

    part: PartConfig = field(default_factory=PartConfig)
    baseline: bool = False


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "small.yaml").write_text("epochs: 7\noptimizer:\n  name: adamw\n  lr: 1e-3\n")
    (folder / "plain.yaml").write_text("# nothing\n")
    return folder


def parsed(recipes: Path, *words: str) -> Config:
    return parse(Config, "blnet try", "Try.", recipes, "small", words)[0]


def test_flags_change_what_the_recipe_says(recipes: Path) -> None:
    assert parsed(recipes) == replace(
        Config(), epochs=7, optimizer=OptimizerConfig(name="adamw", lr=1e-3)
    )
    found = parsed(recipes, "--optimizer.lr", "0.5", "--epochs=3", "--recipe", "small")
    assert found.optimizer == OptimizerConfig(name="adamw", lr=0.5)
    assert found.epochs == 3
    assert parsed(recipes, "--recipe=plain") == Config()


def test_the_recipes_name_is_told(recipes: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("seed: 3\n")
    config, name = parse(Config, "blnet try", "Try.", recipes, "small", ["--recipe", str(own)])
    assert (config.seed, config.epochs, name) == (3, 30, "mine")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--batch-size", "12"], "batch_size", 12),
        (["--batch_size=12"], "batch_size", 12),
        (["--lr", "2"], "optimizer.lr", 2.0),
        (["--lr", "5e-4"], "optimizer.lr", 5e-4),
        (["--weight-decay", "0"], "optimizer.weight_decay", 0.0),
        (["--compile"], "compile", True),
        (["--compile", "--epochs", "2"], "compile", True),
        (["--tensorboard", "false"], "tensorboard", False),
        (["--schedule.step-epochs", "[3, 4]"], "schedule.step_epochs", [3, 4]),
        (["--part.names", "[a-b, c_d]"], "part.names", ["a-b", "c_d"]),
        (["--part.path", "a-b/--c"], "part.path", "a-b/--c"),
        (["--part.path=x_y-z"], "part.path", "x_y-z"),
        (["--workers", "null"], "workers", None),
        (["--ratio", "0.5"], "part.ratio", 0.5),
    ],
)
def test_flags_mean_what_they_look_like(
    words: list[str], name: str, value: Any, recipes: Path
) -> None:
    found = flat(parsed(recipes, *words).as_dict())[name]
    assert found == value
    assert type(found) is type(value)


def test_what_flags_set_is_known_apart_from_the_recipe() -> None:
    words = ["--lr", "0.5", "--recipe=small", "--baseline", "--part.path", "a b"]
    assert given(Config, words) == {"optimizer.lr", "recipe", "baseline", "part.path"}


def test_every_field_has_a_flag(recipes: Path) -> None:
    for name, value in flat(Config().as_dict()).items():
        text = "null" if value is None else str(value).lower() if value == [] else f"{value}"
        found = parsed(recipes, f"--{name.replace('_', '-')}={text.lower()}")
        assert flat(found.as_dict())[name] == value, name


MISTAKES = {
    "--learning-rat 3": "there is no flag --learning-rat; --help lists them all",
    "--batchsize 3": "there is no flag --batchsize; did you mean --batch-size?",
    "--optimizer.lrr 3": "there is no flag --optimizer.lrr; did you mean --optimizer.lr?",
    "--weightdecay 3": "there is no flag --weightdecay; did you mean --optimizer.weight-decay?",
    "--optimizer x": "there is no flag --optimizer; did you mean --optimize?",
    "--name x": "--name may be --optimizer.name or --schedule.name; write it out",
    "--optimizer.lr abc": "--optimizer.lr must be a number, got abc",
    "--batch-size 1.5": "--batch-size must be a whole number, got 1.5",
    "--workers x": "--workers must be a whole number or null, got x",
    "--ratio x": "--part.ratio must be a number or null, got x",
    "--compile maybe": "--compile must be true or false, got maybe",
    "--optimizer.name foo": "--optimizer.name must be one of sgd, adamw, lamb, got foo",
    "--schedule.step-epochs 3,4": "--schedule.step-epochs must be a list such as [30, 60], got 3,4",
    "--epochs": "argument --epochs: expected one argument",
    "file.txt": "unrecognized arguments: file.txt",
    "--recipe": "--recipe needs the name of a recipe or of a YAML file",
    "--recipe none": "--recipe none is neither a recipe (plain, small) nor a YAML file that exists",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_wrong_flag_gets_one_line(
    words: str, recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        parsed(recipes, *words.split())
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        told = f"blnet try: error: {MISTAKES[words]}; see 'blnet try --help'\n"
        assert capsys.readouterr() == ("", told)
    else:
        assert str(caught.value) == MISTAKES[words]


RECIPES = {
    "optimizer:\n  lrr: 3\n": "sets optimizer.lrr, which is no setting; did you mean "
    "--optimizer.lr?",
    "epoch: 3\n": "sets epoch, which is no setting; did you mean --epochs?",
    "optimizer: 3\n": "gives optimizer a value, which is a group of settings; set those, each on "
    "a line of its own below it",
    "epochs:\n": "gives epochs no value; it must be a whole number",
    "- a\n- b\n": "must be lines such as 'epochs: 30'; --print-config prints one",
    "3: x\n": "must be lines such as 'epochs: 30'; --print-config prints one",
    "epochs: [1\nfoo: }": "cannot be read as YAML (line 2: expected ',' or ']', but got ':')",
    "a: !!python/object/apply:os.getcwd []\n": "cannot be read as YAML (line 1: could not "
    "determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd')",
    "\0": "cannot be read as YAML (unacceptable character #x0000: special characters are not "
    'allowed in "<byte string>", position 0)',
}


@pytest.mark.parametrize("text", RECIPES)
def test_a_wrong_recipe_gets_one_line(text: str, recipes: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="--recipe") as caught:
        parsed(recipes, "--recipe", str(path))
    assert str(caught.value) == f"--recipe {path} {RECIPES[text]}"


def test_a_recipe_with_a_value_of_the_wrong_type_gets_one_line(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("optimizer:\n  lr: fast\n")
    with pytest.raises(SystemExit) as caught:
        parsed(recipes, "--recipe", str(path))
    assert caught.value.code == 2
    told = "blnet try: error: --optimizer.lr must be a number, got fast; see 'blnet try --help'\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("flag", ["--print-config", "--print_config"])
def test_the_printed_configuration_is_a_recipe(
    flag: str, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--schedule.step-epochs", "[3, 4]", "--lr", "5e-4", "--part.path", "x y: z"]
    with pytest.raises(SystemExit) as caught:
        parsed(recipes, *words, flag)
    assert not caught.value.code
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert parsed(recipes, "--recipe", str(printed)) == parsed(recipes, *words)
    assert yaml.safe_load(printed.read_text())["part"]["path"] == "x y: z"


def test_help_explains_every_flag(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(recipes, "--help")
    assert not caught.value.code
    told = capsys.readouterr().out
    flags = {line.split()[0] for line in told.splitlines() if line.startswith("  --")}
    expected = {f"--{name.replace('_', '-')}" for name in flat(Config().as_dict())}
    assert flags == expected | {"--recipe", "--print-config"}
    words = " ".join(told.split())
    assert "what moves the weights: --optimizer.name {sgd,adamw,lamb} sgd, adamw or lamb" in words
    assert "folder of it, 100 % of it --part.ratio" in words
    assert (
        "--batch-size BATCH_SIZE samples in a step, over all devices together (default: 128)"
        in words
    )
    assert "--baseline {true,false} whether something else comes after (default: false)" in words
    assert "passes over the training data (default: 30; recipe small: 7)" in words
    for wrong in ("class '", "type:", "CONFIG ", "_epochs", "null", "Literal", "+"):
        assert wrong not in told.replace("step_epochs)", ""), wrong
