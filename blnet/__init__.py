"""Big-Little Net: multi-scale networks for images and speech that are really faster.

Public names are resolved on first use, so that ``import blnet`` costs nothing and works without
Triton, torchvision or a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blnet.checkpoint import load, save
    from blnet.conversion import convert
    from blnet.expand_merge import ExpandMerge
    from blnet.exporting.exporter import export
    from blnet.fusing import fuse, fusions, unfuse
    from blnet.module import BigLittleModule
    from blnet.network import BigLittleConfig, BigLittleNet
    from blnet.official import load_official
    from blnet.optimizing import optimize
    from blnet.profiling import profile

__all__ = [
    "BigLittleConfig",
    "BigLittleModule",
    "BigLittleNet",
    "ExpandMerge",
    "convert",
    "export",
    "fuse",
    "fusions",
    "load",
    "load_official",
    "optimize",
    "profile",
    "save",
    "unfuse",
]

# Public name -> the module that defines it.
_HOMES = {
    "BigLittleConfig": "blnet.network",
    "BigLittleModule": "blnet.module",
    "BigLittleNet": "blnet.network",
    "ExpandMerge": "blnet.expand_merge",
    "convert": "blnet.conversion",
    "export": "blnet.exporting.exporter",
    "fuse": "blnet.fusing",
    "fusions": "blnet.fusing",
    "load": "blnet.checkpoint",
    "load_official": "blnet.official",
    "optimize": "blnet.optimizing",
    "profile": "blnet.profiling",
    "save": "blnet.checkpoint",
    "unfuse": "blnet.fusing",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("blnet")
    if name not in _HOMES:
        raise AttributeError(f"module 'blnet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
