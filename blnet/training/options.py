"""Flags and YAML recipes for a configuration: one flag for every field of the dataclass tree."""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse

from blnet.training.config import flat

Config = TypeVar("Config")
_FLAG = re.compile(r"--[a-z][\w.]*")


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line and whose flags are written with hyphens."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Print one line that says what was wrong and where to look, and exit with status 2."""
        lines = [line.strip() for line in str(message).splitlines() if line.strip()]
        text = _hyphens(" ".join(lines)).replace('Parser key "', "--").replace('":', ":")
        print(f"{self.prog}: error: {text}; see '{self.prog} --help'\n", end="", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self) -> str:
        """Return the help with the flags as users write them."""
        return _hyphens(str(super().format_help()))


def _hyphens(text: str) -> str:
    return _FLAG.sub(lambda found: found[0].replace("_", "-"), text)


def _completed(words: Sequence[str], flags: dict[str, Any]) -> list[str]:
    """Return flags as jsonargparse knows them; values stay as they are.

    --lr stands for --optimizer.lr where no other flag ends so, and a switch without a value is on.

    Args:
        words: what users typed.
        flags: every field by its dotted name, with its default.
    """
    ends: dict[str, list[str]] = {}
    for name in flags:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    found = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if not word.startswith("--"):
            found.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in flags and len(ends.get(name, ())) == 1:
            name = ends[name][0]
        if isinstance(flags.get(name), bool) and not equals and following.startswith("--"):
            equals, value = "=", "true"
        found.append(f"--{name}{equals}{value}")
    return found


def parse(
    kind: type[Config], prog: str, description: str, recipes: Path, default: str,
    words: Sequence[str],
) -> tuple[Config, str]:  # fmt: skip
    """Return the configuration that flags stand for, on top of a recipe, and the recipe's name.

    Args:
        kind: the configuration's dataclass.
        prog: what users typed, "blnet train vision".
        description: one line on it.
        recipes: folder of the recipes that --recipe knows by name.
        default: the recipe where none is given.
        words: the flags.

    Raises:
        ValueError: if there is no such recipe.
        SystemExit: after --help and --print-config, and with status 2 if a flag is wrong.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    known = sorted(path.stem for path in recipes.glob("*.yaml"))
    parser.add_argument(
        "--recipe",
        action="config",
        help=f"a recipe: {', '.join(known)}, or a YAML file; flags change what it says "
        f"(default: {default})",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser.add_class_arguments(kind, None, as_group=False)
    flags = flat(dataclasses.asdict(kind()))  # type: ignore[call-overload]
    name, others = _split_recipe(_completed(words, flags), default)
    path = _recipe_file(name, recipes, known)
    found = parser.parse_args([f"--recipe={path}", *others])
    values = parser.instantiate(found)
    values.pop("recipe", None)
    return kind(**vars(values)), path.stem


def _split_recipe(words: list[str], default: str) -> tuple[str, list[str]]:
    """Take --recipe out, wherever it stands: flags count more than what it says."""
    name, others = default, []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag != "--recipe":
            others.append(word)
            continue
        name = value if equals else next(rest, "")
        if not name:
            raise ValueError("--recipe needs the name of a recipe or of a YAML file")
    return name, others


def _recipe_file(name: str, recipes: Path, known: list[str]) -> Path:
    if name in known:
        return recipes / f"{name}.yaml"
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    raise ValueError(
        f"--recipe {name} is neither a recipe ({', '.join(known)}) nor a YAML file that exists"
    )
