"""Checks of values that a user gives, in a configuration or as a flag."""

from __future__ import annotations

import argparse
import math


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a ValueError unless a value is one of the choices."""
    if value not in choices:
        # Where a choice holds a comma itself, only quotes tell where it ends.
        show = repr if any("," in str(choice) for choice in choices) else str
        raise ValueError(f"{name} must be one of {', '.join(map(show, choices))}, got {value!r}")


def check_count(name: str, value: object, least: int) -> None:
    """Raise a ValueError unless a value is a whole number of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def flag_of(setting: str) -> str:
    """Return the flag of a setting: "--data.eval-path" of "data.eval_path"."""
    return f"--{setting.replace('_', '-')}"


def check_flag_choice(flag: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a ValueError unless what a flag was given is one of the choices."""
    if value not in choices:
        raise ValueError(
            f"{flag} {value!r} is unknown; choose one of {', '.join(map(str, choices))}"
        )


def check_flag_count(flag: str, value: int | None) -> None:
    """Raise a ValueError unless a flag was left out or given a number of at least 1."""
    if value is not None and value < 1:
        raise ValueError(f"{flag} must be at least 1, got {value}; leave it out for the default")


def finite(text: str) -> float:
    """Return a finite number, for argparse.

    Raises:
        argparse.ArgumentTypeError: if the text is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number")
    return value


def positive(text: str) -> int:
    """Return a whole number of at least 1, for argparse.

    Raises:
        argparse.ArgumentTypeError: if the text is none.
    """
    if not (text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least 1")
    return int(text)
