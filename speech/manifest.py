"""Manifests: text files with a recording a line, JSON Lines or a table with tabs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from blnet.files import StrPath, reason
from blnet.speech.audio import AUDIO_ENDINGS
from blnet.speech.files import SEPARATOR, open_archive, read_lines, split_name
from blnet.speech.recordings import Utterance, measured

_WORDS = ("text", "label", "speaker")
_TIMES = ("seconds", "start", "end")


def read_manifest(file: StrPath) -> list[Utterance]:
    """Return the recordings that a manifest lists.

    It is JSON Lines (an object a line) or a table with tabs and a header. The keys or columns:

    - audio or path: the recording, absolute or relative to the manifest's folder or archive; or
      utt: its name without ending, in a folder named like the manifest or beside the manifest;
    - text: what is said; label: its class; speaker: who speaks;
    - start, end: where a part of the file begins and ends, seconds;
    - seconds: how long it is, which saves opening it; after a start and without an end, how long
      the part is, unless the file ends before.

    All but the first may be left out, and others are passed over.

    Args:
        file: a path, or "archive.zip::train.tsv".

    Raises:
        ValueError: of one sentence that names the manifest and the line, if one makes no sense, or
            the manifest cannot be read or is empty.
    """
    lines = read_lines(file)
    place = _Place(file)
    found = []
    for number, row in _rows(file, lines):
        try:
            found.append(_utterance(row, place))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {reason(error, 400)}") from error
    if not found:
        raise ValueError(f"{file} lists no recordings; write one a line")
    return found


def _rows(file: StrPath, lines: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield each row with the number of its line."""
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if numbered and numbered[0][1].lstrip().startswith("{"):
        for number, line in numbered:
            yield number, _json_object(file, number, line)
        return
    header: list[str] = []
    for number, line in numbered:
        cells = line.split("\t")  # quotes are letters like any other: transcripts have some
        if not header:
            header = _header(file, cells)
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"{file}, line {number}: {len(cells)} columns, and the header has {len(header)}; "
                "put one tab between columns"
            )
        yield number, dict(zip(header, cells, strict=True))


def _header(file: StrPath, cells: list[str]) -> list[str]:
    header = [cell.strip().lower() for cell in cells]
    if not {"audio", "path", "utt"} & set(header):
        raise ValueError(
            f"{file} is neither JSON Lines nor a table with tabs whose header names a column "
            "audio, path or utt; its first line must be one of these"
        )
    if len(set(header)) != len(header):
        raise ValueError(f"{file} names a column twice; give each a name of its own")
    return header


def _json_object(file: StrPath, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, line {number}: not JSON ({reason(error)})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line {number}: not a JSON object; write {{...}}")
    return row


def _utterance(row: Mapping[str, Any], place: _Place) -> Utterance:
    words = {key: _word(row, key) for key in _WORDS}
    times = {key: _time(row, key) for key in _TIMES}
    start, end = times["start"], times["end"]
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"end {end:g} is not after start {start or 0.0:g}")
    file = place.find(row)
    seconds = times["seconds"]
    if end is not None:
        seconds = end - (start or 0.0)
    elif seconds is None:
        seconds = max(0.0, measured(file) - (start or 0.0))
    return Utterance(file, seconds, start=start, end=end, **words)


def _word(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value).strip()
    if value is None:
        return ""
    raise ValueError(f"{key} is {value!r}, not text; put quotes around it")


def _time(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None or value == "":
        return None
    try:
        seconds = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{key} is {value!r}; write a number of seconds")
    return seconds


class _Place:
    """Where a manifest lies, and the recordings that it names.

    Args:
        manifest: the manifest, as `open_file` takes it.
    """

    def __init__(self, manifest: StrPath) -> None:
        path, member = split_name(manifest)
        self.archive = None if member is None else path
        self.members = frozenset(open_archive(path).namelist()) if member is not None else ()
        self.folder, name = os.path.split(path if member is None else member)
        self.stem = os.path.splitext(name)[0]

    def find(self, row: Mapping[str, Any]) -> str:
        """Return the file of a row.

        Raises:
            ValueError: if the row names none, or one that is not there.
        """
        named = next((_word(row, key) for key in ("audio", "path") if row.get(key)), "")
        if named:
            candidates = [named]
        else:
            utt = _word(row, "utt")
            if not utt:
                raise ValueError("it names no audio; write the name of a recording")
            bases = (f"{self.stem}/{utt}", utt)
            candidates = [base + ending for base in bases for ending in AUDIO_ENDINGS]
        for candidate in candidates:
            file = self._existing(candidate)
            if file is not None:
                return file
        raise ValueError(f"recording {candidates[0]} is not there; correct its name or add it")

    def _existing(self, name: str) -> str | None:
        if self.archive is None:
            path = os.path.join(self.folder, name)
            return path if os.path.isfile(split_name(path)[0]) else None
        member = os.path.normpath(os.path.join(self.folder, name)).replace(os.sep, "/")
        return f"{self.archive}{SEPARATOR}{member}" if member in self.members else None
