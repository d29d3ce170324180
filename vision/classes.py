"""Names of classes: ImageNet's, those that checkpoints hold, and whether two lists are the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

IMAGENET_CLASSES = 1000
NAMELESS = ("webdataset", "fake")  # sets whose classes are numbers


def imagenet_names() -> tuple[str, ...]:
    """Return the English names of ImageNet's 1,000 classes that torchvision gives its weights.

    Two of them stand for two classes each (crane, maillot).
    """
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def class_names(folders: Sequence[str]) -> tuple[str, ...]:
    """Return English names if the folders are ImageNet's 1,000 WordNet ids, sorted; else theirs."""
    ids = len(folders) == IMAGENET_CLASSES and all(re.fullmatch(r"n\d{8}", f) for f in folders)
    if not ids or (folders[0], folders[-1]) != ("n01440764", "n15075141"):
        return tuple(folders)
    return imagenet_names()


def class_names_of(extra: Mapping[str, Any], classes: int) -> tuple[str, ...] | None:
    """Return the class names that a checkpoint's header holds; None where it holds none.

    Args:
        extra: the header's `extra`.
        classes: number of classes that the network answers for.

    Raises:
        ValueError: if the names are not as many, or no text.
    """
    found = extra.get("classes")
    if found is None:
        return None
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise ValueError("its header's classes are not a list of names; train it anew")
    if len(found) != classes:
        raise ValueError(
            f"its header names {len(found)} classes and the network has {classes}; train it anew"
        )
    return tuple(found)


def labels_of(extra: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Return what to call each class: the header's names, ImageNet's for 1,000 classes, or numbers.

    Args:
        extra: the header's `extra`.
        classes: number of classes that the network answers for.

    Raises:
        ValueError: if the header's names are not as many.
    """
    names = class_names_of(extra, classes)
    if names is not None:
        return class_names(names)
    return imagenet_names() if classes == IMAGENET_CLASSES else tuple(map(str, range(classes)))


def check_same_names(
    known: Sequence[str] | None,
    extra: Mapping[str, Any],
    names: Sequence[str],
    data: str,
    told: tuple[str, str, str],
) -> None:
    """Check that a network's classes have the names of the data's, as far as both are known.

    Args:
        known: the network's, as many as the data's; None where they are not known.
        extra: what its checkpoint says beside the weights, the set it was trained on among it.
        names: the data's.
        data: the set's name, of `DataConfig`.
        told: what to call network and data in an error, and what to do.

    Raises:
        ValueError: naming the first class that differs.
    """
    recorded = extra.get("data")
    theirs = recorded.get("name") if isinstance(recorded, Mapping) else None
    if known is None or data in NAMELESS or theirs in NAMELESS:
        return
    network, title, advice = told
    # ImageNet's classes have ids as folders and English names elsewhere.
    pairs = zip(class_names(known), class_names(names), strict=True)
    for index, (mine, other) in enumerate(pairs):
        if mine != other:
            raise ValueError(f"{network} knows class {index} as {mine!r} and {title} has "
                             f"{other!r} there; {advice}")  # fmt: skip
