"""Speech suite: whole acoustic models, inference, every rung, batch 1 and throughput batch.

Clips are as long as each other, so that nothing is padded and no rung needs a mask. Maps of
normalised features are numbers of mean 0 and variance 1 whatever was said; here they are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blnet.bench import layers
from blnet.bench.continuing import group_key
from blnet.bench.measure import Group
from blnet.bench.networks import Built, Spec, built, known
from blnet.bench.replay import replay, virtual_clock
from blnet.bench.results import Measurement
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings
from blnet.bench.suites.test_models import batch_of, group_of, ladder

NAME = "speech_models"
SECONDS = 3
FRAMES = 100 * SECONDS  # a frame every 10 ms
BINS = 64
CLASSES = 29  # letters, space, apostrophe and the blank of CTC
TIME_REDUCTION = 2
PLAIN = "resnet22"


@dataclass(frozen=True)
class SpeechSpec(Spec):
    """An acoustic model to measure.

    Attributes:
        pyramid: whether it has a pyramid of its branches' outputs.
    """

    pyramid: bool = False

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{super().label}{' pyramid' if self.pyramid else ''}"

    def build(self) -> nn.Module:
        """Return a new network with random weights, in train mode, that takes whole clips."""
        options: dict[str, Any] = {} if self.alpha is None else {
            "alpha": self.alpha, "beta": self.beta, "pyramid": self.pyramid,
        }  # fmt: skip
        network: Any = known().build(
            self.name,
            head="ctc",
            num_classes=CLASSES,
            time_reduction=TIME_REDUCTION,
            bins=BINS,
            **options,
        )
        network.fc.reset_parameters()  # it starts at zero, which would hide a wrong result
        return Clips(network)


class Clips(nn.Module):
    """A speech network for clips of one length: one tensor in, one out, as the ladder needs it."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of maps (N, 1, bins, frames)."""
        logits: Tensor = self.network.forward_head(self.network.forward_features(x))
        return logits


# The settings of the paper's table of acoustic models.
SPECS = (
    SpeechSpec(PLAIN, None, None, PLAIN),
    SpeechSpec("bl_resnet22", 4, 1, PLAIN),
    SpeechSpec("bl_resnet22", 4, 2, PLAIN),
    SpeechSpec("bl_resnet22", 4, 3, PLAIN),
    SpeechSpec("bl_resnet22", 2, 3, PLAIN),
    SpeechSpec("bl_resnet22", 4, 1, PLAIN, pyramid=True),
)


def cases(settings: Settings) -> list[Case]:
    """Return every network on every rung at every batch."""
    return [
        Case(group_name(batch), spec.label, rung.name)
        for batch in settings.batches
        for spec in SPECS
        for rung in ladder(settings, batch)
    ]


def group_name(batch: int) -> str:
    """Return the name of the group with this batch."""
    return f"{batch} x {SECONDS} s"


def build(group: str, session: Session) -> Group:
    """Return all networks on all rungs at one batch."""
    rungs = ladder(session.settings, batch_of(session.settings, group, group_name))
    return group_of(NAME, group, session, rungs, *_inputs(group, session))


def after(group: str, session: Session) -> None:
    """Time the layers of all networks, at the throughput batch."""
    if group == group_name(session.settings.throughput_batch):
        layers.record(session, group_key(NAME, group), *_inputs(group, session))


def _inputs(group: str, session: Session) -> tuple[Built, Tensor]:
    """Return the networks of a group and their input."""
    settings = session.settings
    batch = batch_of(settings, group, group_name)
    maps = torch.randn(
        settings.throughput_batch, 1, BINS, FRAMES,
        generator=torch.Generator().manual_seed(settings.seed),
    )  # fmt: skip
    found = built(session, SPECS, maps, settings.torch_dtype)
    return found, maps[: session.batch(NAME, group, batch)]


@pytest.mark.benchmark(timer=virtual_clock)
def test_speech_models(case: Case, measured: Callable[[Case], Measurement], benchmark: Any) -> None:
    replay(benchmark, measured(case))
