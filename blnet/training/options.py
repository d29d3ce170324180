"""Flags and YAML recipes for a configuration: one flag for every field of the dataclass tree."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import docstring_parser
import jsonargparse
import yaml

from blnet.files import reason
from blnet.training.config import flat

Config = TypeVar("Config")
_FLAG = re.compile(r"--[a-z][\w.]*")
# What jsonargparse says of a value of the wrong type.
_WRONG = re.compile(r'(?:Parser key "|--)(?P<name>[\w.]+)"?:.*(?:Got|Given) value: (?P<value>.*)$')
_LIST_MORE = re.compile(r", --\S+\+ .*$")  # the flag that adds to a list; one is enough
_OWN = ("help", "recipe", "print_config")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class _Field:
    """A field of the configuration tree: its dotted name's type, default, help and group."""

    kind: Any
    default: Any
    help: str
    group: str

    def wanted(self) -> str:
        """Return what its value must be, for an error."""
        return " or ".join(_kind_name(part) for part in _parts(self.kind))


def _parts(kind: Any) -> tuple[Any, ...]:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if typing.get_origin(kind) is list:
        return "a list such as [30, 60]" if typing.get_args(kind) == (int,) else "a list"
    return "null" if kind is type(None) else _KINDS.get(kind, str(kind))


def _fields(kind: Any, prefix: str = "", group: str = "the run") -> Iterator[tuple[str, _Field]]:
    """Yield every leaf of a dataclass tree by its dotted name."""
    hints = typing.get_type_hints(kind)
    told = _help(kind)
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], f"{name}.", told.get(field.name, field.name))
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield name, _Field(hints[field.name], default, told.get(field.name, ""), group)


def _help(kind: Any) -> dict[str, str]:
    """Return what the docstrings of a class and of those it extends say of each attribute."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        for entry in docstring_parser.parse(each.__doc__ or "").params:
            found[entry.arg_name] = " ".join((entry.description or "").split())
    return found


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line and whose flags are written with hyphens."""

    fields: dict[str, _Field]

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Print one line that says what was wrong and where to look, and exit with status 2."""
        text = _in_words(" ".join(str(message).split()), self.fields)
        print(f"{self.prog}: error: {text}; see '{self.prog} --help'", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self) -> str:
        """Return the help with the flags as users write them."""
        return _hyphens(str(super().format_help()))


class _Formatter(jsonargparse.DefaultHelpFormatter):
    """Leaves out what Python calls a type; the text and the default tell enough."""

    def _get_help_string(self, action: Any) -> str:
        return action.help or ""

    def _format_action_invocation(self, action: Any) -> str:
        return _LIST_MORE.sub("", super()._format_action_invocation(action))


def _in_words(message: str, fields: dict[str, _Field]) -> str:
    """Return an error of jsonargparse as users speak."""
    found = _WRONG.search(message)
    if found and found["name"] in fields:
        wanted = fields[found["name"]].wanted()
        return f"--{_hyphened(found['name'])} must be {wanted}, got {found['value']}"
    return _hyphens(message)


def _hyphened(name: str) -> str:
    return name.replace("_", "-")


def _hyphens(text: str) -> str:
    return _FLAG.sub(lambda found: _hyphened(found[0]), text)


def _nearest(name: str, fields: dict[str, _Field]) -> str:
    """Return '; did you mean --...?' for a name; where none is near, where to look."""
    ends = {known.rpartition(".")[2]: known for known in fields}
    near = difflib.get_close_matches(name, [*fields, *_OWN], 1)
    end = difflib.get_close_matches(name.rpartition(".")[2], ends, 1)
    if not near and not end:
        return "; --help lists them all"
    return f"; did you mean --{_hyphened(near[0] if near else ends[end[0]])}?"


def _completed(words: Sequence[str], fields: dict[str, _Field]) -> list[str]:
    """Return flags as jsonargparse knows them; values stay as they are.

    --lr stands for --optimizer.lr where no other flag ends so, and a switch without a value is on.

    Args:
        words: what users typed.
        fields: every field by its dotted name.

    Raises:
        ValueError: if a flag is unknown, or ends as several do.
    """
    found = []
    for word, following in itertools.pairwise([*words, "--"]):
        if not word.startswith("--"):
            found.append(word)
            continue
        typed, equals, value = word[2:].partition("=")
        name = _full_name(typed.replace("-", "_"), fields)
        on = name in fields and fields[name].kind is bool and not equals
        if on and following.startswith("--"):
            equals, value = "=", "true"
        found.append(f"--{name}{equals}{value}")
    return found


def _full_name(name: str, fields: dict[str, _Field]) -> str:
    if name in fields or name in _OWN:
        return name
    full = [known for known in fields if known.rpartition(".")[2] == name]
    if not full:
        raise ValueError(f"there is no flag --{_hyphened(name)}{_nearest(name, fields)}")
    if len(full) > 1:
        several = " or ".join(f"--{_hyphened(each)}" for each in full)
        raise ValueError(f"--{_hyphened(name)} may be {several}; write it out")
    return full[0]


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
        ValueError: if there is no such recipe or flag.
        SystemExit: after --help and --print-config, and with status 2 if a value is wrong.
    """
    known = sorted(path.stem for path in recipes.glob("*.yaml"))
    fields = dict(_fields(kind))
    name, others = _split_recipe(_completed(words, fields), default)
    path = _recipe_file(name, recipes, known)
    values = _read_recipe(path, fields)
    parser = _make_parser(prog, description, fields, (path.stem, values))
    parser.add_argument(
        "--recipe",
        action="config",
        help=f"a recipe: {', '.join(known)}, or a YAML file; flags change what it says "
        f"(default: {default})",
    )
    found = parser.parse_args([f"--recipe={path}", *others] if values else others)
    return _built(kind, found), path.stem


def given(kind: type[Any], words: Sequence[str]) -> set[str]:
    """Return the dotted names of the fields that flags set, whatever the recipe says of them.

    Raises:
        ValueError: if there is no such flag.
    """
    completed = _completed(words, dict(_fields(kind)))
    return {word[2:].partition("=")[0] for word in completed if word.startswith("--")}


def _make_parser(
    prog: str, description: str, fields: dict[str, _Field], recipe: tuple[str, dict[str, Any]]
) -> _Parser:
    """Return the parser; the help says what a recipe, of some name, makes of the fields."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--recipe NAME] [--FLAG VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    parser.fields = fields
    groups: dict[str, Any] = {}
    for name, field in parser.fields.items():
        if field.group not in groups:
            groups[field.group] = parser.add_argument_group(field.group.rstrip("."))
        text = field.help.rstrip(".") + _told_values(name, field, *recipe)
        groups[field.group].add_argument(
            f"--{name}", type=field.kind, default=field.default, help=text
        )
    return parser


def _told_values(name: str, field: _Field, recipe: str, values: dict[str, Any]) -> str:
    """Return what a field's help says of its default, and of the value that a recipe gives it."""
    told = [] if field.default in (None, []) else [f"default: {_written(field.default)}"]
    if name in values and values[name] != field.default:
        told.append(f"recipe {recipe}: {_written(values[name])}")
    return f" ({'; '.join(told)})" if told else ""


def _written(value: Any) -> Any:
    """Return a value as flags take it."""
    return str(value).lower() if isinstance(value, bool) else value


def _built(kind: Any, values: Any) -> Any:
    """Return the dataclass tree of nested values."""
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        value, hint = getattr(values, field.name), hints[field.name]
        found[field.name] = _built(hint, value) if dataclasses.is_dataclass(hint) else value
    return kind(**found)


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


def _read_recipe(path: Path, fields: dict[str, _Field]) -> dict[str, Any]:
    """Return what a recipe sets, by dotted names, all of which there are."""
    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        why = f"line {mark.line + 1}: {problem}" if mark and problem else reason(error)
        raise ValueError(f"--recipe {path} cannot be read as YAML ({why})") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(
            f"--recipe {path} must be lines such as 'epochs: 30'; --print-config prints one"
        )
    values = flat(found)
    for name, value in values.items():
        if any(known.startswith(f"{name}.") for known in fields):
            raise ValueError(f"--recipe {path} gives {name} a value, which is a group of settings; "
                             "set those, each on a line of its own below it")  # fmt: skip
        if name not in fields:
            raise ValueError(f"--recipe {path} sets {name}, which is no setting"
                             f"{_nearest(name, fields)}")  # fmt: skip
        if value is None and type(None) not in _parts(fields[name].kind):
            raise ValueError(f"--recipe {path} gives {name} no value; it must be "
                             f"{fields[name].wanted()}")  # fmt: skip
    return values
