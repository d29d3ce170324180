"""The networks that are measured: which ones, what they cost, and instances fit to be timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from blnet.bench.results import Network
from blnet.bench.settings import DEFAULT_BRANCHINGS, Settings
from blnet.conversion import convert
from blnet.limits import one_line, out_of_memory

if TYPE_CHECKING:
    from blnet.bench.session import Session

DEFAULT_BASELINE = "resnet50"
CALIBRATION_IMAGES = 8


@dataclass(frozen=True)
class Spec:
    """A network to measure.

    Attributes:
        name: as the registry knows it; a plain network's with alpha and beta is converted.
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
        if self.alpha is None or self.beta is None:
            made: nn.Module = registry.build(self.name)
        elif registry.is_big_little(self.name):
            made = registry.build(self.name, alpha=self.alpha, beta=self.beta)
        else:
            made = convert(registry.build(self.name), self.alpha, self.beta)
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
    pairs = settings.branchings or branchings
    if settings.baseline and registry.is_big_little(settings.baseline):
        raise ValueError(
            f"--baseline {settings.baseline} is a Big-Little network; name a plain one, such as "
            f"{baseline_of(settings.baseline)}"
        )
    found: list[Spec] = []
    for name in (settings.model,) if settings.model else settings.models:
        big_little = registry.is_big_little(name)
        if big_little and settings.model:
            raise ValueError(
                f"--model {name} is a Big-Little network already; measure it with --models {name}"
            )
        baseline = settings.baseline or (baseline_of(name) if big_little else name)
        if not big_little:
            found.append(Spec(name, None, None, baseline))
        if big_little or settings.model:
            found += [Spec(name, alpha, beta, baseline) for alpha, beta in pairs]
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
        if settings.model is None:
            with torch.device("meta"):
                spec.build()
        elif spec.alpha is None:  # code of one's own may read weights, which "meta" has none of
            spec.build()


@dataclass(frozen=True)
class Built:
    """The networks of a group.

    Attributes:
        models: specification -> network, ready to be timed.
        failures: specification -> why there is no network.
    """

    models: dict[Spec, nn.Module]
    failures: dict[Spec, str]

    @property
    def specs(self) -> list[Spec]:
        """All of them, those that failed last."""
        return [*self.models, *self.failures]

    def model(self, spec: Spec) -> nn.Module:
        """Return a network.

        Raises:
            ValueError: if there is none; the message says why.
        """
        if spec in self.failures:
            raise ValueError(self.failures[spec])
        return self.models[spec]


def built(
    session: Session, found: Sequence[Spec], inputs: Tensor, dtype: torch.dtype = torch.float32
) -> Built:
    """Return networks on the run's device, and note in the results what they cost.

    What cannot be built, or does not take the input, leaves the others as they are.

    Args:
        session: of the run; it keeps the networks for its next group.
        found: which networks.
        inputs: a float32 batch; see `instance`.
        dtype: precision of the weights.
    """
    made = Built({}, {})
    for spec in found:
        try:
            made.models[spec] = session.cached(
                (spec, dtype), partial(_ready, session, spec, inputs, dtype)
            )
        except ValueError as error:
            made.failures[spec] = str(error)
    return made


def _ready(session: Session, spec: Spec, inputs: Tensor, dtype: torch.dtype) -> nn.Module:
    settings, results = session.settings, session.results
    model = instance(spec, inputs, settings)
    if spec.label not in {network.label for network in results.networks}:
        results.networks.append(facts(spec, model, (1, *inputs.shape[1:])))
    return model.to(settings.device, dtype)


def facts(spec: Spec, model: nn.Module, input_size: tuple[int, ...]) -> Network:
    """Return what a network costs, for one input of a size, batch included."""
    from blnet import profile

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

    Raises:
        ValueError: if it cannot be built, or does not take the input.
    """
    torch.manual_seed(settings.seed)
    shape = "x".join(map(str, images.shape[1:]))
    with _told(f"{spec.label} cannot be built", ours=ValueError):
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
    with torch.no_grad(), _told(f"{spec.label} does not take an input of {shape}"):
        model(sample)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


@contextmanager
def _told(what: str, ours: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Say in a ValueError what went wrong in somebody's code, unless memory ran out.

    Args:
        what: went wrong.
        ours: errors that name the network by themselves.
    """
    try:
        yield
    except Exception as error:
        if out_of_memory(error) or isinstance(error, ours):
            raise
        raise ValueError(f"{what}: {one_line(error)}") from error


def known() -> ModuleType:
    """Return the registry, with the networks for images and for speech in it."""
    import blnet.speech.models
    import blnet.vision.models  # noqa: F401
    from blnet import registry

    return registry
