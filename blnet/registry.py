"""Networks by name, Big-Little and plain alike, so that every tool takes a name for either.

A name is one of
- a registered name, "bl_resnet50" or "resnet50" (`import blnet.vision.models` registers them);
- "torchvision:NAME" or "timm:NAME", any model of those libraries;
- "package.module:function", a function of one's own that returns a module.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn


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


def build(name: str, **options: Any) -> nn.Module:
    """Return a new network.

    Args:
        name: see the module's docstring.
        options: alpha, beta, branches, num_classes, in_channels, stem: what the network takes.

    Raises:
        ValueError: if nothing goes by that name, it takes no such option, or an option's value is
            out of range.
    """
    if ":" in name:
        return _build_foreign(name, options)
    if name not in _ENTRIES:
        close = ", ".join(get_close_matches(name, _ENTRIES, n=3) or _ENTRIES)
        near = f"near it are {close}" if close else "import blnet.vision.models to register some"
        raise ValueError(f"no network is named {name!r}; {near}")
    entry = _ENTRIES[name]
    unknown = [option for option in options if option not in entry.options]
    if unknown:
        raise ValueError(
            f"{name} takes no option {', '.join(unknown)}; its options are "
            f"{', '.join(entry.options)}"
        )
    return entry.build(**options)


def _build_foreign(name: str, options: dict[str, Any]) -> nn.Module:
    library, _, model = name.partition(":")
    if library == "torchvision":
        make = _torchvision_builder(model)
    elif library == "timm":
        make = _timm_builder(model)
    else:
        make = _user_builder(name, library, model)
    try:
        made = make(**options)
    except TypeError as error:
        raise ValueError(f"{name} cannot be built with {options}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, it returned {type(made).__name__}")
    return made


def _need(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        raise ValueError(
            f"{library} is not installed; install it with: pip install 'blnet[vision]'"
        ) from None


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


def _user_builder(name: str, module_name: str, function: str) -> Callable[..., nn.Module]:
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:  # "" and ".x" are no module names
        raise ValueError(
            f"{name}: module {module_name!r} cannot be imported ({error}); give "
            "torchvision:NAME, timm:NAME or an importable package.module:function"
        ) from error
    made = getattr(module, function, None)
    if not callable(made):
        raise ValueError(f"{name}: module {module_name!r} has no function {function!r}")
    return made  # type: ignore[no-any-return]
