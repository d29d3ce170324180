"""Networks by name, Big-Little and plain alike, so that every tool takes a name for either.

A name is one of
- a registered name, "bl_resnet50" or "resnet50" (`import blnet.vision.models` registers them);
- "torchvision:NAME" or "timm:NAME", any model of those libraries;
- "package.module:function", a function of one's own that returns a module.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from blnet.files import reason
from blnet.limits import out_of_memory


@dataclass(frozen=True)
class Entry:
    """A registered network.

    Attributes:
        name: what users call it.
        build: makes it; keyword arguments are its options.
        big_little: whether it is a Big-Little network, with alpha, beta and branches.
    """

    name: str
    build: Callable[..., nn.Module]
    big_little: bool

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword arguments that `build` takes."""
        return tuple(inspect.signature(self.build).parameters)


_ENTRIES: dict[str, Entry] = {}
_LIBRARIES = ("torchvision", "timm")


def register(name: str, build: Callable[..., nn.Module], *, big_little: bool) -> None:
    """Register a network.

    Raises:
        ValueError: if the name is taken.
    """
    if name in _ENTRIES:
        raise ValueError(f"a network named {name!r} is registered already; choose another name")
    _ENTRIES[name] = Entry(name, build, big_little)


def names(big_little: bool | None = None) -> list[str]:
    """Return the registered names: all, only the Big-Little ones (True) or the plain ones."""
    return [e.name for e in _ENTRIES.values() if big_little is None or e.big_little == big_little]


def is_big_little(name: str) -> bool:
    """Return whether a name stands for a registered Big-Little network."""
    return name in _ENTRIES and _ENTRIES[name].big_little


def is_own_code(name: str) -> bool:
    """Return whether a name is "package.module:function", which `build` imports and calls.

    A file that names one must be trusted: it may name any function of any module, os:system, say.
    """
    library, colon, _ = name.partition(":")
    return bool(colon) and library not in _LIBRARIES


def build(name: str, **options: Any) -> nn.Module:
    """Return a new network.

    Args:
        name: see the module's docstring.
        options: alpha, beta, branches, num_classes, in_channels, stem: what the network takes.

    Raises:
        ValueError: if nothing goes by that name, it takes no such option, an option's value is out
            of range, or code that is not ours raised, whatever that was.
    """
    if ":" in name:
        return _build_foreign(name, options)
    if name not in _ENTRIES:
        raise ValueError(f"no network is named {name!r}; {_what_is_near(name)}")
    entry = _ENTRIES[name]
    unknown = [option for option in options if option not in entry.options]
    if unknown:
        raise ValueError(
            f"{name} takes no option {', '.join(unknown)}; its options are "
            f"{', '.join(entry.options)}"
        )
    try:
        return entry.build(**options)
    except ValueError:
        raise  # of a builder's own, which name what was wrong
    except Exception as error:  # too large for the memory, mostly
        raise ValueError(f"{_not_built(name, options)}: {_told(error)}") from error


def _what_is_near(name: str) -> str:
    close = ", ".join(get_close_matches(name, _ENTRIES, n=3) or _ENTRIES)
    advice = [f"near it are {close}"] if close else []
    try:
        importlib.import_module("torchvision")
    except Exception:  # one made for another PyTorch raises a RuntimeError
        advice.append("the image networks need torchvision: pip install 'blnet[vision]'")
    return "; ".join(advice) or "import blnet.vision.models to register some"


def _build_foreign(name: str, options: dict[str, Any]) -> nn.Module:
    library, _, model = name.partition(":")
    if library == "torchvision":
        make = _torchvision_builder(model)
    elif library == "timm":
        make = _timm_builder(model)
    else:
        make = _user_builder(name, library, model)
    with _foreign_code(_not_built(name, options)):
        made = make(**options)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, it returned {type(made).__name__}")
    return made


@contextlib.contextmanager
def _foreign_code(what: str) -> Iterator[None]:
    """Turn whatever code that is not ours raises, sys.exit() too, into a ValueError."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: {_told(error)}") from error


def _not_built(name: str, options: dict[str, Any]) -> str:
    return f"{name} cannot be built{f' with {options}' if options else ''}"


def _told(error: BaseException) -> str:
    if out_of_memory(error):
        return "it does not fit into memory; choose a smaller one"
    kind, said = type(error).__name__, reason(error)
    return kind if said == kind else f"{kind}: {said}"


def _need(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        raise ValueError(
            f"{library} is not installed; install it with: pip install 'blnet[vision]'"
        ) from None
    except Exception as error:  # one made for another PyTorch raises a RuntimeError
        raise ValueError(
            f"{library} cannot be imported ({reason(error)}); install one that fits: "
            "pip install --upgrade 'blnet[vision]'"
        ) from error


def _torchvision_builder(model: str) -> Callable[..., nn.Module]:
    models = _need("torchvision.models")
    if model not in models.list_models(module=models):
        raise ValueError(
            f"torchvision has no classification model {model!r}; "
            "torchvision.models.list_models() names them"
        )
    builder: Callable[..., nn.Module] = models.get_model_builder(model)
    return builder


def _timm_builder(model: str) -> Callable[..., nn.Module]:
    timm = _need("timm")
    if not timm.is_model(model):
        raise ValueError(f"timm has no model {model!r}; timm.list_models() names them")
    return lambda **options: timm.create_model(model, pretrained=False, **options)


@contextlib.contextmanager
def _working_folder_importable() -> Iterator[None]:
    """Let modules of the working folder be imported, as `python -m` does and a script does not."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _user_builder(name: str, module_name: str, function: str) -> Callable[..., nn.Module]:
    # "" and ".x" are no module names, and a module of the user's may do anything when imported.
    unknown = f"{name} is neither torchvision:NAME nor timm:NAME, and module {module_name!r}"
    with _foreign_code(f"{unknown} cannot be imported"), _working_folder_importable():
        module = importlib.import_module(module_name)
    with _foreign_code(f"{name}: module {module_name!r} cannot be asked for {function!r}"):
        made = getattr(module, function, None)
    if not callable(made):
        raise ValueError(f"{name}: module {module_name!r} has no function {function!r}")
    return made  # type: ignore[no-any-return]
