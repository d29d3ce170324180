"""The networks of the models suite: which ones, what they cost, and instances fit to be timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from blnet.bench.results import Network, Results
from blnet.bench.settings import DEFAULT_BRANCHINGS, Settings

DEFAULT_BASELINE = "resnet50"
CALIBRATION_IMAGES = 8


@dataclass(frozen=True)
class Spec:
    """A network to measure.

    Attributes:
        name: as the registry knows it.
        alpha: None for a plain network.
        beta: None for a plain network.
        baseline: name of the plain network it is compared with.
    """

    name: str
    alpha: int | None
    beta: int | None
    baseline: str

    @property
    def label(self) -> str:
        """What tables call it."""
        if self.alpha is None:
            return self.name
        return f"{self.name} a{self.alpha} b{self.beta}"

    def build(self) -> nn.Module:
        """Return a new network with random weights, in train mode.

        Raises:
            ValueError: if the registry does not know it, or its settings do not fit it.
        """
        registry = known()
        options = {} if self.alpha is None else {"alpha": self.alpha, "beta": self.beta}
        made: nn.Module = registry.build(self.name, **options)
        return made


def specs(
    settings: Settings, branchings: tuple[tuple[int, int], ...] = DEFAULT_BRANCHINGS
) -> list[Spec]:
    """Return the networks of a run, the plain ones first: they are what others are held against.

    Args:
        settings: of the run.
        branchings: (alpha, beta) pairs where the settings name none.

    Raises:
        ValueError: if a name is not known, or the baseline is no plain network.
    """
    registry = known()
    if settings.baseline and registry.is_big_little(settings.baseline):
        raise ValueError(
            f"--baseline {settings.baseline} is a Big-Little network; name a plain one, such as "
            f"{baseline_of(settings.baseline)}"
        )
    found: list[Spec] = []
    for name in settings.models:
        if not registry.is_big_little(name):
            found.append(Spec(name, None, None, settings.baseline or name))
            continue
        baseline = settings.baseline or baseline_of(name)
        found += [
            Spec(name, alpha, beta, baseline) for alpha, beta in settings.branchings or branchings
        ]
    plain = [Spec(spec.baseline, None, None, spec.baseline) for spec in found]
    # dict.fromkeys drops what is asked for twice and keeps the order.
    return list(dict.fromkeys([*plain, *found]))


def baseline_of(name: str) -> str:
    """Return the plain network that a Big-Little network is made from: "bl_X" from "X".

    Where the registry has no such network (an SE-ResNeXt), it is ResNet-50.
    """
    registry = known()
    plain = name.removeprefix("bl_")
    return plain if plain in registry.names() else DEFAULT_BASELINE


def check(settings: Settings) -> None:
    """Check, in a second, that every network of a run can be built.

    Raises:
        ValueError: if one is not known or its settings do not fit.
    """
    for spec in specs(settings):
        with torch.device("meta"):
            spec.build()


def record(results: Results, found: Sequence[Spec], input_size: tuple[int, ...]) -> None:
    """Note in the results what some networks cost, for one input of a size, batch included."""
    known_labels = {network.label for network in results.networks}
    results.networks += [facts(s, input_size) for s in found if s.label not in known_labels]


def facts(spec: Spec, input_size: tuple[int, ...]) -> Network:
    """Return what a network costs, for one input of a size, batch included."""
    from blnet import profile

    with torch.device("meta"):
        model = spec.build()
    cost = profile(model, input_size=input_size)
    return Network(
        label=spec.label,
        name=spec.name,
        alpha=spec.alpha,
        beta=spec.beta,
        baseline=spec.baseline,
        parameters=cost.parameters,
        macs=cost.macs,
    )


def instance(spec: Spec, images: Tensor, settings: Settings) -> nn.Module:
    """Return a network ready for inference, on the CPU in float32.

    Its weights are random, its BN statistics are those of the input: with the initial ones
    activations grow from block to block, and in half precision they would overflow.

    Args:
        spec: which one.
        images: a float32 batch of images or maps; its first eight are used.
        settings: of the run.
    """
    torch.manual_seed(settings.seed)
    model = spec.build().train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        # Blocks that start silent, as some are initialised to, would hide a wrong result.
        if norm.affine:
            nn.init.ones_(norm.weight)
    # Statistics of one image at one position are undefined: two images at least.
    sample = images[:CALIBRATION_IMAGES] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    with torch.no_grad():
        model(sample)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def known() -> ModuleType:
    """Return the registry, with the networks for images and for speech in it."""
    import blnet.speech.models
    import blnet.vision.models  # noqa: F401
    from blnet import registry

    return registry
