"""Dataclasses from JSON that another version of blnet, or somebody's hand, may have written."""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_as(kind: type[T], values: Any, what: str) -> T:
    """Return a dataclass with the values of a JSON object.

    What a later version of blnet added to it is left out.

    Args:
        kind: the dataclass.
        values: what was read; fields that the dataclass has a default for may lack.
        what: names it in messages.

    Raises:
        ValueError: if a field lacks or is of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{what} is {_short(values)}, not an object")
    hints, made = get_type_hints(kind), {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in values:
            if field.default is MISSING and field.default_factory is MISSING:
                raise ValueError(f"{what} lacks {field.name!r}")
            continue
        made[field.name] = values[field.name]
        if not fits(made[field.name], hints[field.name]):
            raise ValueError(f"{what} has {_short(made[field.name])} as its {field.name!r}")
    return kind(**made)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value from JSON, whose lists stand for tuples too, is of a type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(item, inner[0]) for item in value)
    if hint is Any or isinstance(value, bool):
        return hint in (Any, bool)
    if hint is float:
        return isinstance(value, int | float)
    # A dataclass is looked into by who reads it.
    return isinstance(value, dict if is_dataclass(hint) else hint)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
