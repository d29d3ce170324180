"""Files: written aside and renamed; foreign checkpoints read without running what is in them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

StrPath = str | os.PathLike[str]
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # what colours a terminal
REASON_LENGTH = 160


def reason(error: BaseException, length: int = REASON_LENGTH) -> str:
    """Return an error's text on one line without colours, cut to a length; else its class."""
    try:
        text = str(error)
    except Exception:  # a class of the user's, whose text fails as well
        text = ""
    line = " ".join(_ESCAPE.sub("", text).split())
    return line[:length] or type(error).__name__


def read_torch_file(path: StrPath) -> Mapping[str, Any]:
    """Return the dict that a .pth file holds: tensors and plain values only (weights_only=True).

    Args:
        path: a file that `torch.save` wrote.

    Raises:
        ValueError: if it is no such file, or holds anything but a dict of tensors and plain values.
        OSError: if the file cannot be read.
    """
    import torch

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the checkpoint file itself")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the path of the checkpoint")
    with path.open("rb") as file:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # the unpickler raises nearly anything on bytes of another kind
            if getattr(error, "errno", None) == errno.EIO:
                raise
            # PyTorch makes a page of advice of it, to load without this care first, or a number.
            raise ValueError(
                f"{path} is not a torch checkpoint of plain tensors, which is all that is "
                "read; it is cut short, damaged or of another kind"
            ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; a checkpoint holds a dict")
    return loaded


def read_weights(path: StrPath) -> Mapping[str, Any]:
    """Return what a .safetensors file holds, or a .pth file (see `read_torch_file`).

    Raises:
        ValueError: if the file is not what its ending says.
        OSError: if the file cannot be read.
    """
    if Path(path).suffix != ".safetensors":
        return read_torch_file(path)
    import safetensors
    import safetensors.torch

    try:
        weights: Mapping[str, Any] = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({reason(error)})") from error
    return weights


@contextlib.contextmanager
def written_aside(path: StrPath) -> Iterator[Path]:
    """Give a file to write in place of `path`, and rename it to `path` once that is done.

    Where the body raises, `path` stays as it was and the file beside it is removed.

    Args:
        path: the file to make or replace. A link is followed.

    Raises:
        OSError: if the folder is missing or closed, `path` is no regular file, or the disk refuses.
    """
    # Replacing a link, or worse /dev/null, by a file is not what anybody means.
    target = Path(os.path.realpath(path))
    _check_target(path, target)
    aside = target.parent / f".blnet-{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        # Unlike tempfile's, a file made this way has the permissions that the user's umask gives.
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written: no file can be made in folder {target.parent} "
            f"({error.strerror}); choose a folder that you may write to"
        ) from error
    try:
        yield aside
        _flush(aside)
        os.replace(aside, target)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror or error}) and is as it was before; "
            "free some space or choose another folder"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    # The rename has happened; a file system that cannot flush folders is no reason to fail now.
    with contextlib.suppress(OSError):
        _flush(target.parent)


def _check_target(path: StrPath, target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file to write")
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is not a regular file; give the name of a file to write")
    if target.parent.exists() and not target.parent.is_dir():
        raise NotADirectoryError(
            f"{path} cannot be written: {target.parent} is not a folder; choose another place"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"{path} cannot be written: folder {target.parent} does not exist; create it first"
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(name: str) -> None:
    """Make the output's folder before any work is done.

    Raises:
        OSError: if it cannot be made or written to.
    """
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        probe = Path(name, ".writable")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--output {name} is no folder that can be written to ({error.strerror}); "
                      "choose another") from error  # fmt: skip


@contextlib.contextmanager
def folders_taken_back(folder: StrPath) -> Iterator[None]:
    """Where the body raises, remove the folder and those above it that it made and left empty."""
    made = [place for place in (Path(folder), *Path(folder).parents) if not place.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # of the first that is not there or holds anything
            for place in made:
                place.rmdir()
        raise


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where nobody may look
        return False


def files_below(
    folder: StrPath, fail: Callable[[OSError], None], above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, str]]:
    """Yield the folder and the name of each file in a folder, at any depth.

    Links are followed, but for those to a folder on the way to them. Hidden files and folders are
    passed over.

    Args:
        folder: where to look.
        fail: gets the error of each folder that cannot be read.
        above: the folders on the way to this one, without links.
    """
    folder, real = os.fspath(folder), os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            shown = [(entry.name, _is_folder(entry)) for entry in entries if entry.name[0] != "."]
    except OSError as error:
        fail(error)
        return
    for name, is_folder in shown:
        if is_folder:
            yield from files_below(os.path.join(folder, name), fail, above | {real})
        else:
            yield folder, name
