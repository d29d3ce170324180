"""Tables of measured choices: where they lie, what they hold, how they are read and written.

A table is one JSON file for one device, named after it: ``nvidia-h200.json``. The user's lie in
``$BLNET_TABLES`` or ``$XDG_CACHE_HOME/blnet/tables`` (``~/.cache/blnet/tables``), the repository's
in ``kernels/tables``. A table that cannot be used is warned about once and left alone; the kernels
then run with their rule, since a launch is no place to fail for want of a measurement.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
SHIPPED = Path(__file__).resolve().parent / "tables"
WARPS = (1, 32)
STAGES = (1, 8)
# Kernel -> block -> its smallest and largest value; filled by tuning.register.
BLOCKS: dict[str, Mapping[str, tuple[int, int]]] = {}

_LONGEST = 1e12  # microseconds of a launch
_FACTS = ("device", "architecture", "torch", "triton", "date")


@dataclass(frozen=True)
class Entry:
    """What was measured for one kernel in one bucket.

    Attributes:
        choice: the fastest choice; None where none was clearly faster than the rule.
        microseconds: median time of the fastest, or of the rule where choice is None.
        rule_microseconds: median time of the rule.
    """

    choice: Mapping[str, int] | None
    microseconds: float
    rule_microseconds: float


@dataclass
class Table:
    """All that was measured on one device.

    Attributes:
        device: its name, as ``torch.cuda.get_device_name`` says it.
        architecture: what it compiles for: "sm_90", "gfx942".
        torch: version of PyTorch.
        triton: version of Triton.
        date: of the last measurement, ISO 8601.
        entries: kernel -> key -> entry.
    """

    device: str
    architecture: str
    torch: str
    triton: str
    date: str
    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)


def slug(device: str) -> str:
    """Return a device's name as the name of a file, without ending: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unnamed"


def user_folder() -> Path | None:
    """Return the folder of the user's own tables; None where there is no home to hold one."""
    if os.environ.get("BLNET_TABLES"):
        return Path(os.environ["BLNET_TABLES"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "blnet" / "tables"
    try:
        return Path.home() / ".cache" / "blnet" / "tables"
    except RuntimeError:
        return None


# Reading -------------------------------------------------------------------------------------


def _whole(value: object, bounds: tuple[int, int], power: bool) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return bounds[0] <= value <= bounds[1] and not (power and value & (value - 1))


def wrong_choice(kernel: str, choice: Any) -> str:
    """Say what is wrong with a choice; empty if nothing is.

    A kernel that this version does not know is held to the general bounds only.
    """
    if not isinstance(choice, Mapping):
        return f"a choice is a dict of numbers, got {type(choice).__name__}"
    blocks = BLOCKS.get(kernel)
    if blocks is None:
        blocks = {name: (1, 2**16) for name in choice if name not in ("num_warps", "num_stages")}
    bounds = {**blocks, "num_warps": WARPS, "num_stages": STAGES}
    if set(choice) != set(bounds):
        return f"it must hold {', '.join(bounds)}, got {', '.join(map(str, choice)) or 'nothing'}"
    for name, value in choice.items():
        power = name != "num_stages"
        if not _whole(value, bounds[name], power):
            least, most = bounds[name]
            kind = "a power of two" if power else "a whole number"
            return f"{name} must be {kind} from {least} to {most}, got {str(value)[:40]}"
    return ""


def _entry(kernel: str, key: str, values: Any) -> Entry:
    where = f"{kernel}, {key}"
    if not isinstance(values, dict) or set(values) != set(Entry.__dataclass_fields__):
        names = ", ".join(Entry.__dataclass_fields__)
        raise ValueError(f"the entry of {where} must hold {names}")
    problem = "" if values["choice"] is None else wrong_choice(kernel, values["choice"])
    if problem:
        raise ValueError(f"the choice of {where} is wrong: {problem}")
    times = (values["microseconds"], values["rule_microseconds"])
    if not all(
        isinstance(t, int | float) and not isinstance(t, bool) and 0 < t < _LONGEST for t in times
    ):
        raise ValueError(f"the times of {where} must be numbers above 0 and below {_LONGEST:g}")
    return Entry(values["choice"], *map(float, times))


def read(path: Path, device: str) -> Table | None:
    """Return the table in a file, or None where there is none.

    Args:
        path: the file.
        device: the name of the device that it must be of.

    Raises:
        ValueError: saying what is wrong, if it is no such table.
        OSError: if the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else None
        raise ValueError(
            f"it has schema {str(found)[:40]} and this version of blnet reads {SCHEMA}"
        )
    facts: dict[str, Any] = {name: values.get(name) for name in _FACTS}
    entries = values.get("entries")
    if not all(isinstance(fact, str) for fact in facts.values()) or not isinstance(entries, dict):
        raise ValueError(f"it lacks one of {', '.join(_FACTS)} (texts) and entries")
    if facts["device"] != device:
        raise ValueError(f"it was measured on {facts['device']!r}, and this is {device!r}")
    for kernel, of_kernel in entries.items():
        if not isinstance(of_kernel, dict):
            raise ValueError(f"the entries of {kernel} must be a dict")
        entries[kernel] = {key: _entry(kernel, key, v) for key, v in of_kernel.items()}
    return Table(**facts, entries=entries)


@functools.cache
def _usable(path: Path, device: str) -> Table | None:
    """Read a table once; where it cannot be used warn, and go on without."""
    try:
        return read(path, device)
    except (ValueError, OSError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        warnings.warn(
            f"the kernels' tuning table {path} is not used: {what or type(error).__name__}; "
            "delete it, or measure it anew by 'blnet kernels tune --fresh'",
            stacklevel=2,
        )
        return None


@functools.cache
def _device_name(device: torch.device) -> str | None:
    # Asked only of a device that is there: tracing may see fake tensors of one that is not.
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else None


def look_up(kernel: str, key: str, device: torch.device) -> Mapping[str, int] | None:
    """Return what the tables say of a bucket; the user's go before the repository's."""
    name = _device_name(device)
    if name is None:
        return None
    for folder in (user_folder(), SHIPPED):
        table = None if folder is None else _usable(folder / f"{slug(name)}.json", name)
        entry = table and table.entries.get(kernel, {}).get(key)
        if entry:
            return entry.choice
    return None


def forget() -> None:
    """Read every table anew when it is next needed."""
    _usable.cache_clear()
    _device_name.cache_clear()


def tables_in(folder: Path) -> list[Table]:
    """Return every table in a folder, whatever its device.

    Raises:
        ValueError: naming the file, if one is no table.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            device = json.loads(path.read_text(encoding="utf-8"))["device"]
            table = read(path, device)
        except (ValueError, OSError, LookupError, TypeError, RecursionError) as error:
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is no tuning table: {text}; delete it") from None
        found += [] if table is None else [table]
    return found


# Writing -------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Make a folder for tables, before anything is measured that could then not be kept.

    Raises:
        OSError: if it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise type(error)(
            f"{folder} cannot hold a table ({error.strerror}); choose another --output"
        ) from None


def write(table: Table, folder: Path) -> Path:
    """Write a table into a folder, which is made if it is missing; atomic.

    Returns:
        The file.

    Raises:
        OSError: if it cannot be written; what was there is as it was.
    """
    values: dict[str, Any] = {"schema": SCHEMA}
    values |= {name: getattr(table, name) for name in _FACTS}
    values["entries"] = {
        kernel: {key: vars(entry) for key, entry in sorted(of_kernel.items())}
        for kernel, of_kernel in sorted(table.entries.items())
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(table.device)}.json"
    target = Path(os.path.realpath(path))  # a link stays one
    aside = target.parent / f".blnet-{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror or error}) and is as it was before; "
            "free some space, then run it again to go on"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return path
