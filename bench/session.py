"""One run: its settings, its input, and what was measured so far."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from blnet.bench import measure
from blnet.bench.images import load_pictures, make_batch
from blnet.bench.memory import peak_bytes
from blnet.bench.results import Measurement, Results
from blnet.bench.settings import Settings, resolve
from blnet.environment import collect, command_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

T = TypeVar("T")
BUSY = 0.5  # load average a core above which something else is running
Watch = Callable[[str, float], None]


class Case(NamedTuple):
    """One test of a suite: an implementation in a group."""

    group: str
    family: str
    implementation: str

    @property
    def id(self) -> str:
        """What pytest calls it. Square brackets would end pytest's own."""
        return " | ".join(self)


class Suite(Protocol):
    """What a suite module holds beside its test."""

    NAME: str

    def cases(self, settings: Settings) -> list[Case]:
        """Return what it measures, groups one after the other."""

    def build(self, group: str, session: Session) -> measure.Group:
        """Return a group, its inputs made."""


class Session:
    """One run of suites.

    Args:
        settings: of the run; `resolve` fills in what is missing.
        watch: is told the group and step that comes next, and its share of the work.
        folder: where studies keep their training runs; None for a new folder under results/.

    Attributes:
        settings: of the run, complete.
        results: what was found so far.
        cache: what groups share, such as networks.

    Raises:
        ValueError: if a setting is wrong or the images cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        watch: Watch = lambda step, share: None,
        folder: Path | None = None,
    ) -> None:
        self.settings = resolve(settings)
        self.watch = watch
        self.folder = folder or Path("results") / f"study-{datetime.now():%Y%m%d-%H%M%S}"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self._pictures = load_pictures(self.settings.images)
        if self.settings.threads:
            import torch

            torch.set_num_threads(self.settings.threads)
        self.results = Results(
            environment=collect(self.settings.device).as_dict(),
            settings=self.settings.as_dict(),
            command=command_line(),
            notes=[str(w.message) for w in said if w.category is UserWarning],
        )
        self._note_load()
        self.cache: dict[Any, Any] = {}
        self._groups: dict[tuple[str, str], list[Measurement]] = {}
        self._clock: measure.Clock | None = None

    def _note_load(self) -> None:
        load, cores = self.results.environment["load"], self.results.environment["cores"]
        if load is not None and load > BUSY * cores:
            self.results.notes.append(
                f"the machine was busy when the run began (load {load:.1f} on {cores} cores), so "
                "times are noisy; measure again when it is idle"
            )

    @property
    def clock(self) -> measure.Clock:
        """Times calls on the run's device."""
        if self._clock is None:
            self._clock = measure.make_clock(self.settings.device)
        return self._clock

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """Return what `make` gave the first time this key was asked for."""
        if key not in self.cache:
            self.cache[key] = make()
        value: T = self.cache[key]
        return value

    def budget(self, suite: str) -> measure.BuildBudget:
        """Return the time that the builds of a suite may take, shared by its groups."""
        each, total = self.settings.build_seconds
        return self.cached(("budget", suite), lambda: measure.BuildBudget(each, total))

    def images(self, batch: int) -> Tensor:
        """Return the batch of images that every network gets, float32 on the CPU."""
        settings = self.settings
        return self.cached(
            ("images", batch),
            lambda: make_batch(self._pictures, batch, settings.size, settings.seed),
        )

    def measured(self, suite: Suite, case: Case) -> Measurement:
        """Return the measurement of a case; its whole group is measured the first time.

        Raises:
            KeyError: if the suite's group has no such implementation.
        """
        key = (suite.NAME, case.group)
        if key not in self._groups:
            self._groups[key] = []
            self._measure(suite, case.group, self._groups[key])
        for measurement in self._groups[key]:
            if (measurement.family, measurement.implementation) == (
                case.family,
                case.implementation,
            ):
                return measurement
        raise KeyError(f"{suite.NAME}, {case.id}")

    def _measure(self, suite: Suite, name: str, measurements: list[Measurement]) -> None:
        study = getattr(suite, "study", None)
        if study is not None:
            self._study(study, measurements)
            return
        self.watch(f"{suite.NAME}, {name}: making the input", 0.0)
        group = suite.build(name, self)
        measurements += measure.declare(group)
        self.results.measurements += measurements
        device = self.settings.device
        with full_precision():
            measure.measure(
                group,
                measurements,
                self.clock,
                lambda call: peak_bytes(call, device),
                lambda step, share: self.watch(f"{suite.NAME}, {name}: {step}", share),
            )

    def _study(self, study: Any, measurements: list[Measurement]) -> None:
        """Let a suite train; each run is kept as soon as it is finished."""

        def add(measurement: Measurement) -> None:
            measurements.append(measurement)
            self.results.measurements.append(measurement)

        study(self, add)


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep float32 products in float32: with TF32 they would not be what the dtype says."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
