"""The ``blnet`` command: one line for each sub-command, imported only when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

# Command -> (its module, one line of help). A module has configure(parser) and run(args), or
# main(words) where it parses by itself.
COMMANDS = {
    "bench": ("blnet.bench.command", "measure speed against the plain network and write a report"),
    "bench report": ("blnet.bench.report.command", "write the report of runs measured before"),
    "bench compare": (
        "blnet.bench.compare_command",
        "say what became slower or faster between two runs of blnet bench",
    ),
    "convert": ("blnet.commands.convert", "turn a network or an official checkpoint into ours"),
    "export": ("blnet.commands.export", "write a network as ONNX, TorchScript or torch.export"),
    "optimize": ("blnet.commands.optimize", "say what blnet.optimize makes of a network here"),
    "table": ("blnet.vision.table", "print the paper's recognition table beside our recount"),
    "table --speech": ("blnet.speech.table", "the same of the paper's acoustic models"),
    "kernels": ("blnet.kernels.command", "list, check, compile, tune and time the kernels"),
    "train vision": ("blnet.vision.train", "train a network on images"),
    "train speech": ("blnet.speech.train", "train a network on speech"),
    "evaluate vision": ("blnet.vision.evaluate", "measure a trained network's accuracy"),
    "evaluate speech": ("blnet.speech.evaluate", "measure a trained network's accuracy or WER"),
    "predict vision": ("blnet.vision.predict", "say what is on pictures"),
    "predict speech": ("blnet.speech.predict", "say which words recordings are"),
    "transcribe": ("blnet.speech.transcribe", "write down what recordings say"),
    "ngrams": ("blnet.speech.ngrams_command", "make a language model of transcripts or other text"),
    "align": ("blnet.speech.align", "make frame labels from transcripts with a CTC network"),
    "doctor": (
        "blnet.commands.doctor",
        "say what works on this machine and what to do about the rest",
    ),
}
# Two words -> the command they stand for. The kernels may not import the suites that time them.
_ALIASES: dict[tuple[str, ...], list[str]] = {("kernels", "bench"): ["bench", "kernels"]}
_SPEECH = "--speech"
# Optional package -> the extra that installs it.
_EXTRAS = {
    **dict.fromkeys(("torchvision", "PIL", "webdataset"), "vision"),
    **dict.fromkeys(
        (
            "accelerate",
            "docstring_parser",
            "jsonargparse",
            "matplotlib",
            "rich",
            "tensorboard",
            "timm",
            "torchmetrics",
            "typeshed_client",
        ),
        "train",
    ),
    **dict.fromkeys(
        ("torchaudio", "librosa", "soundfile", "soxr", "scipy", "espeakng_loader"), "speech"
    ),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
    **dict.fromkeys(("plotly", "pytest", "pytest_benchmark", "sklearn"), "bench"),
}
# Command -> modules that register the networks it takes by name, where they are installed.
_NETWORKS = {
    "convert": ("blnet.vision.models",),
    **dict.fromkeys(("export", "optimize"), ("blnet.vision.models", "blnet.speech.models")),
}
_TEXT_SHOWN = 400  # characters of an error that nobody foresaw


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line that says what was wrong and where to look, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; see '{self.prog} --help'\n")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: blnet COMMAND [options]\n\nBig-Little networks that are really faster.\n\n"
        f"commands:\n{rows}\n\noptions:\n"
        "  --version  print the version and exit\n"
        "  --debug    show a traceback with an error\n\n"
        "'blnet COMMAND --help' explains a command.\n"
    )


def _one_line(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        extra = _EXTRAS[error.name]
        return f"{error.name} is not installed; install it with: pip install 'blnet[{extra}]'"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _open_streams() -> None:
    """Give the process an output to write to where it was started without (``>&-``)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _discard_unwritable() -> None:
    """Throw away what cannot be printed, or the interpreter would fail on it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Its exit status: 0 done, 1 a check failed or the program itself did, 2 bad input.
    """
    _open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        return _print(_overview(), 0 if words else 2)
    if words[0] == "--version":
        return _print(importlib.import_module("importlib.metadata").version("blnet") + "\n", 0)
    words = _ALIASES.get((*words[:2],), words[:2]) + words[2:]
    if words[0] == "table" and _SPEECH in words:  # wherever it stands
        words = ["table", _SPEECH, *(word for word in words[1:] if word != _SPEECH)]
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return _run(name, words[length:], debug)
    print(f"blnet: error: {_what_is_near(words)}", file=sys.stderr)
    return 2


def _print(text: str, status: int) -> int:
    """Print a text and return a status, 2 where it cannot be printed."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        _discard_unwritable()
    except OSError as error:
        _discard_unwritable()
        print(f"blnet: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return status


def _what_is_near(words: Sequence[str]) -> str:
    """Return what to say of words that are no command."""
    first = words[0] if words else ""
    tasks = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if tasks:
        return f"'blnet {first}' needs one word more: {' or '.join(f'blnet {t}' for t in tasks)}"
    return f"no command {first!r}; choose one of {', '.join(COMMANDS)}"


def _register_networks(command: str) -> None:
    for module in _NETWORKS.get(command, ()):
        # A torchvision made for another PyTorch raises a RuntimeError. Names that are missing then
        # are missed by `blnet.registry`, which says what to install.
        with contextlib.suppress(ImportError, RuntimeError):
            importlib.import_module(module)


def _lacks(encoding: str, error: UnicodeEncodeError) -> bool:
    """Return whether an encoding lacks what could not be encoded, and UTF-8 has it."""
    text = error.object[error.start : error.end]
    return not _encodes(encoding, text) and _encodes("utf-8", text)


def _encodes(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _run(name: str, words: Sequence[str], debug: bool) -> int:
    module_name, description = COMMANDS[name]
    try:
        module = importlib.import_module(module_name)
        _register_networks(name)
        if hasattr(module, "main"):
            return int(module.main(words))
        parser = Parser(
            prog=f"blnet {name}",
            description=f"{description[0].upper()}{description[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # an epilog's examples are lines
        )
        module.configure(parser)
        status = module.run(parser.parse_args(words))
        sys.stdout.flush()
        return int(status)
    except KeyboardInterrupt:
        print(f"blnet {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has left; what it wanted, it has.
        _discard_unwritable()
        return 0
    except (ValueError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        _discard_unwritable()
        if isinstance(error, UnicodeEncodeError) and _lacks(sys.stdout.encoding or "utf-8", error):
            error = ValueError(
                f"the standard output takes {sys.stdout.encoding} and not "
                f"{error.object[error.start]!a}; set PYTHONUTF8=1, or write to a file"
            )
        print(f"blnet {name}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = f"{type(error).__name__}: {_one_line(error)[:_TEXT_SHOWN]}"
        advice = f"{'' if debug else 'run it with --debug and '}report the traceback"
        print(f"blnet {name}: internal error: {text}; {advice}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
