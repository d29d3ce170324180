"""Files in folders and in .zip archives, named and opened the same way.

A member of an archive is written "archive.zip::inner/name.wav"; anything else is a path.
"""

from __future__ import annotations

import functools
import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO, cast

from blnet.files import StrPath, files_below, reason

SEPARATOR = "::"
_IN_MEMORY = 1 << 26  # bytes; larger members are read piece by piece
# What zipfile raises of an archive that is damaged, encrypted or packed in some other way.
_SPOILT = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def split_name(file: StrPath) -> tuple[str, str | None]:
    """Return the archive and the member that a name means; a plain path and None otherwise."""
    text = os.fspath(file)
    archive, found, member = text.partition(SEPARATOR)
    if found and not os.path.exists(text):
        return archive, member
    return text, None


def open_file(file: StrPath) -> BinaryIO:
    """Open a file or a member of an archive for reading.

    Args:
        file: a path, or "archive.zip::member".

    Raises:
        ValueError: if the archive is damaged or holds no such member; the text does not repeat the
            name of the file.
        OSError: if the file cannot be opened.
    """
    path, member = split_name(file)
    if member is None:
        return open(path, "rb")
    archive = open_archive(path)
    try:
        info = archive.getinfo(member)
        if info.file_size > _IN_MEMORY:
            return cast("BinaryIO", archive.open(info))
        return io.BytesIO(archive.read(info))
    except KeyError as error:
        raise ValueError("the archive holds no such file") from error
    except _SPOILT as error:
        raise ValueError(f"the archive is damaged or encrypted ({reason(error)})") from error


def open_archive(path: StrPath) -> zipfile.ZipFile:
    """Return an opened .zip archive; this process opens each only once.

    Raises:
        ValueError: if it is no whole .zip archive.
        OSError: if it cannot be opened.
    """
    found = os.stat(path)
    # Processes that share an open file share its position: after a fork each opens its own. And an
    # archive that was written anew is opened anew.
    key = (os.getpid(), found.st_ino, found.st_size, found.st_mtime_ns)
    try:
        return _opened(os.fspath(path), key)
    except _SPOILT as error:
        raise ValueError(f"it is not a whole .zip archive ({reason(error)})") from error


@functools.lru_cache(maxsize=16)
def _opened(path: str, key: tuple[int, ...]) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@dataclass(frozen=True)
class Tree:
    """The files in a folder, at any depth, or in a .zip archive.

    Hidden files and folders are passed over, and so is what macOS adds to archives.

    Attributes:
        root: the folder or archive.
        names: their names below root, with "/" between folders, sorted.
    """

    root: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, root: StrPath, flag: str) -> Tree:
        """Return all files of a folder or archive.

        Args:
            root: the folder or archive.
            flag: the setting that named it, for errors.

        Raises:
            ValueError: if it is missing, cannot be read or is neither.
        """
        root = os.fspath(root)
        if not os.path.exists(root):
            raise ValueError(
                f"{flag}: {root} does not exist; name the corpus's folder or .zip archive"
            )
        try:
            names = _in_folder(root) if os.path.isdir(root) else open_archive(root).namelist()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or reason(error)
            raise ValueError(
                f"{flag}: {root} cannot be read: {why}; name a folder or a whole .zip archive"
            ) from error
        return cls(root, tuple(sorted(name for name in names if _shown(name))))

    def file(self, name: str) -> str:
        """Return what to open a file by, as `open_file` takes it."""
        if os.path.isdir(self.root):
            return os.path.join(self.root, *name.split("/"))
        return f"{self.root}{SEPARATOR}{name}"


def read_lines(file: StrPath) -> list[str]:
    """Return the lines of a text file, UTF-8 with or without byte order mark.

    Lines end at line feeds, with or without a carriage return: what else Unicode takes for an end
    of a line may stand in a transcript.

    Raises:
        ValueError: of one sentence that names the file, if it cannot be read or is no such text.
    """
    try:
        with open_file(file) as opened:
            text = opened.read().decode("utf-8-sig")
        return [line.removesuffix("\r") for line in text.split("\n")]
    except UnicodeDecodeError as error:
        told = "write it as such"
        if zipfile.is_zipfile(file):
            told = f"name a text file in the archive, as in {file}{SEPARATOR}train.tsv"
        raise ValueError(f"{file} is not UTF-8 text; {told}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise ValueError(f"{file} cannot be read: {why}; check the name") from error


def _in_folder(root: str) -> list[str]:
    def fail(error: OSError) -> None:
        raise error

    found, last, below = [], "", ""
    for place, name in files_below(root, fail):
        if place != last:
            last, below = place, os.path.relpath(place, root).replace(os.sep, "/")
        found.append(name if below == "." else f"{below}/{name}")
    return found


def _shown(name: str) -> bool:
    parts = name.split("/")
    return bool(parts[-1]) and not any(part.startswith((".", "__MACOSX")) for part in parts)
