"""One run: its settings, its input, and what was measured so far."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from blnet.bench import measure
from blnet.bench.clocks import read_clocks
from blnet.bench.continuing import check_same, group_key, take_over
from blnet.bench.images import load_pictures, make_images
from blnet.bench.memory import peak_bytes
from blnet.bench.results import Measurement, Results, write_json
from blnet.bench.settings import RESULTS, Settings, resolve
from blnet.environment import collect, command_line
from blnet.limits import one_line, out_of_memory
from blnet.modes import exact_products

if TYPE_CHECKING:
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
        folder: of the run: results.json is written there after every group, and studies keep their
            training runs there. None keeps nothing, and gives studies a new folder under results/.
        before: what the run measured before it was interrupted; None for a new run.

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
        before: Results | None = None,
    ) -> None:
        self.settings = resolve(settings)
        self.watch = watch
        self._keeps = folder is not None
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
        self.results.environment["clocks_before"] = read_clocks(self.settings.device)
        self._note_load()
        self.cache: dict[Any, Any] = {}
        self._groups: dict[str, list[Measurement]] = {}
        self._batches: dict[str, int] = {}
        self._limits: dict[str, int] = {}
        self._clock: measure.Clock | None = None
        if before is not None:
            check_same(before, self.results.environment)
            take_over(self.results, before)
            for m in self.results.measurements:
                self._groups.setdefault(group_key(m.suite, m.group), []).append(m)

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
            lambda: make_images(self._pictures, batch, settings.image_shape, settings.seed),
        )

    def batch(self, suite: str, group: str, wanted: int) -> int:
        """Return the batch that a group is measured at: as wanted, or what fits into memory."""
        key = group_key(suite, group)
        self._batches[key] = min(wanted, self._limits.get(key, wanted))
        return self._batches[key]

    def measured(self, suite: Suite, case: Case) -> Measurement:
        """Return the measurement of a case; its whole group is measured the first time.

        Raises:
            KeyError: if the suite's group has no such implementation.
        """
        key = group_key(suite.NAME, case.group)
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
        before = len(self.results.measurements)
        while True:
            try:
                self._attempt(suite, name, measurements)
                break
            except measure.TooLargeError as error:
                self._halve(group_key(suite.NAME, name), str(error))
                measurements.clear()
                del self.results.measurements[before:]
            free_memory()
        self._look_closer(suite, name)
        self.results.finished.append(group_key(suite.NAME, name))
        self.keep()

    def _attempt(self, suite: Suite, name: str, measurements: list[Measurement]) -> None:
        """Measure a group.

        Raises:
            TooLargeError: if it does not fit into memory and its batch can be halved.
        """
        self.watch(f"{suite.NAME}, {name}: making the input", 0.0)
        key, device = group_key(suite.NAME, name), self.settings.device
        try:
            group = suite.build(name, self)
        except Exception as error:
            if out_of_memory(error) and self._batches.get(key, 1) > 1:
                raise measure.TooLargeError(one_line(error)) from error
            measurements += _failed(suite, name, self.settings, one_line(error))
            self.results.measurements += measurements
            return
        group.halves = self._batches.get(key, 1) > 1
        measurements += measure.declare(group)
        self.results.measurements += measurements
        with exact_products():
            measure.measure(
                group,
                measurements,
                measure.covering(self.clock) if group.covered else self.clock,
                lambda call: peak_bytes(call, device),
                lambda step, share: self.watch(f"{suite.NAME}, {name}: {step}", share),
            )

    def _look_closer(self, suite: Suite, name: str) -> None:
        """Let a suite add to what was measured of a group. It is extra, and fails no run."""
        after = getattr(suite, "after", None)
        if after is None:
            return
        try:
            with exact_products():
                after(name, self)
        except Exception as error:
            self.results.notes.append(f"{group_key(suite.NAME, name)}: {one_line(error)}")

    def _halve(self, key: str, reason: str) -> None:
        self._limits[key] = self._batches[key] // 2
        self.results.notes.append(
            f"{key}: batch {self._batches[key]} does not fit into memory ({reason}), so it is "
            f"measured at {self._limits[key]}"
        )

    def keep(self) -> None:
        """Write what was measured so far, marked as interrupted until the run ends.

        A disk that is full for a while is no reason to lose what is measured.
        """
        if not self._keeps:
            return
        try:
            write_json(self.folder / RESULTS, replace(self.results, interrupted=True))
        except OSError as error:
            self.note(
                f"{self.folder / RESULTS} could not be written between groups "
                f"({error.strerror or error}), so a run that died then would have lost them"
            )

    def note(self, text: str) -> None:
        """Add a sentence for the reader about the whole run, once."""
        if text not in self.results.notes:
            self.results.notes.append(text)

    def leave_out(self, suite: str, group: str, names: Iterable[str], reason: str) -> None:
        """Note what a group does not measure on purpose, so that no comparison misses it."""
        self.note(reason)
        self.results.left_out[group_key(suite, group)] = dict.fromkeys(names, reason)

    def _study(self, study: Any, measurements: list[Measurement]) -> None:
        """Let a suite train; each run is kept as soon as it is finished."""

        def add(measurement: Measurement) -> None:
            measurements.append(measurement)
            self.results.measurements.append(measurement)

        study(self, add)


def _failed(suite: Suite, group: str, settings: Settings, note: str) -> list[Measurement]:
    """Return the measurements of a group that could not be made."""
    return [
        Measurement(suite.NAME, group, case.family, case.implementation, status="error", note=note)
        for case in suite.cases(settings)
        if case.group == group
    ]


def free_memory() -> None:
    """Give back what nothing holds any more, so that a smaller batch finds room."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
