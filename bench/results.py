"""What a run found: dataclasses, and writing them so that a file is whole or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from blnet.bench.catalogue import STUDIES
from blnet.bench.intervals import percentile
from blnet.bench.reading import fits, read_as
from blnet.bench.settings import RESULTS, Settings
from blnet.files import written_aside

SCHEMA = 1
# What reports, comparisons and --continue need of a run's own.
ENVIRONMENT = ("date", "device", "cpu", "threads")
SETTINGS = ("device", "dtype", "batch", "size")

# ok: measured and right; the only one that has a time to report.
# wrong: its result differed from the reference. error: it raised. Both fail the run.
# dropped: too slow to build or to run. skipped: cannot run on this machine.
Status = Literal["pending", "ok", "wrong", "error", "dropped", "skipped"]
FAILED: tuple[Status, ...] = ("wrong", "error")
SCORES = ("accuracy", "wer", "cer", "ngram_wer")  # facts of a trained network, 0 to 1
ELSEWHERE = "elsewhere"  # fact of what was trained in another environment: what that had instead
# Facts that tables, plots and comparisons count with -> what they are.
FACTS: dict[str, Any] = {
    **dict.fromkeys(("batch", "bytes", "flops", "seed", "macs", "parameters", "epochs"), int),
    **dict.fromkeys(("steps", "evaluation_images"), int),
    **dict.fromkeys(("alpha", "beta"), int | None),
    **dict.fromkeys((*SCORES, "cost", "real_time_factor", "leash", "late"), float),
    "baseline": str | bool | None,
    "ours": bool,
    "kept_bytes_an_image": dict[str, int],
    ELSEWHERE: dict[str, str],
    "counted": str,
    "dtype": str,
    "replays": str,
}
# What every trained network has of them; one score of two beside.
STUDY_FACTS = ("network", "alpha", "beta", "baseline", "parameters", "macs", "epochs", "seed")
REPLAYS = "replays"  # fact of a CUDA graph: the rung whose run it replays
LATE = "late"  # fact of what was dropped for its build and first call: their limit, seconds
LEASHED = "leash"  # fact of what was dropped for its times: the best of them, seconds


@dataclass
class Check:
    """How far a result was from the reference.

    Attributes:
        error: norm(result - reference) / norm(reference); NaN if either holds a NaN.
        tolerance: largest error that passes.
        reference: what the reference was.
    """

    error: float
    tolerance: float
    reference: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN never is."""
        return self.error <= self.tolerance


@dataclass
class Measurement:
    """One implementation in one group.

    Attributes:
        suite: name of the suite, such as "models".
        group: what runs interleaved with it, such as "batch 8".
        family: what computes the same thing, such as "bl_resnet50 a2 b4": its rungs compete.
        implementation: name, such as "eager, channels-last".
        description: one sentence on it.
        facts: what the suite knows of it: batch, network, bytes, ...
        status: see `Status`.
        note: why there is no time, or what a reader must know of it.
        samples: seconds, one a round.
        check: how far its result was from the reference; None if it never ran.
        build_seconds: to make it ready, compiling included, the first call too.
        peak_memory: bytes; see `blnet.bench.memory`. None if not measured.
    """

    suite: str
    group: str
    family: str
    implementation: str
    description: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    status: Status = "pending"
    note: str = ""
    samples: list[float] = field(default_factory=list)
    check: Check | None = None
    build_seconds: float | None = None
    peak_memory: int | None = None

    @property
    def timed(self) -> bool:
        """Whether there is a time to report: it ran, and its result was right."""
        return self.status == "ok" and bool(self.samples)

    @property
    def failed(self) -> bool:
        """Whether it raised, or its result was wrong."""
        return self.status in FAILED

    def quantile(self, percent: float) -> float:
        """Return a percentile of its samples, seconds.

        Raises:
            ValueError: if there is no time to report.
        """
        if not self.timed:
            raise ValueError(f"{self.family}, {self.implementation}: {self.status}, no time")
        return percentile(self.samples, percent)

    @property
    def median(self) -> float:
        """Median time, seconds."""
        return self.quantile(50)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, with the percentiles that a reader wants."""
        values = asdict(self)
        values["quantiles"] = (
            {f"p{p}": self.quantile(p) for p in (20, 50, 90)} if self.timed else None
        )
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], what: str = "a measurement") -> Measurement:
        """Return the measurement that `as_dict` gave; what it does not know is left out.

        Args:
            values: as read from JSON.
            what: names it in messages.

        Raises:
            ValueError: if a value is missing or can be none of its field.
        """
        found = read_as(cls, values, what)
        what = ", ".join((found.suite, found.group, found.family, found.implementation))
        if found.check is not None:
            check = {"error": None, **values["check"]}
            if check["error"] is None:  # JSON has no NaN
                check["error"] = math.nan
            found.check = read_as(Check, check, f"the check of {what}")
        if not all(0 < sample < math.inf for sample in found.samples):
            raise ValueError(f"a time of {what} is no positive number")
        for name, kind in FACTS.items():
            value = found.facts.get(name)
            endless = isinstance(value, float) and not math.isfinite(value)
            if name in found.facts and (endless or not fits(value, kind)):
                raise ValueError(f"{what} has {value!r} as its {name!r}")
        if found.timed and found.suite in STUDIES:
            _check_study(found, what)
        return found


def _check_study(run: Measurement, what: str) -> None:
    """Check that a trained network has the figures that tables and plots of studies count with."""
    needed = {*STUDY_FACTS, *(("steps",) if run.suite == "speech" else ())}
    lacking = sorted(needed - set(run.facts))
    if not {"accuracy", "wer"} & set(run.facts):
        lacking.append("accuracy or wer")
    if lacking:
        raise ValueError(f"{what} lacks {', '.join(lacking)}")
    for name in ("macs", "steps"):  # by which others are divided
        if run.facts.get(name, 1) < 1:
            raise ValueError(f"{what} has {run.facts[name]!r} as its {name!r}")


@dataclass(frozen=True)
class Network:
    """A network that was measured.

    Attributes:
        label: what the rows of the table call it: name, and alpha and beta where it has them.
        name: as the registry knows it.
        alpha: see the paper; None for a plain network.
        beta: see the paper; None for a plain network.
        baseline: label of the plain network it is compared with; its own for a plain network.
        parameters: elements of its parameters.
        macs: multiply-adds for one image or clip.
    """

    label: str
    name: str
    alpha: int | None
    beta: int | None
    baseline: str
    parameters: int
    macs: int


@dataclass(frozen=True)
class Layer:
    """What a layer of a network must move and multiply, and what it takes.

    Attributes:
        name: its path in the network.
        kind: its class.
        shape: of its output, batch included.
        flops: of its matrix products and convolutions, two a multiply-add.
        bytes: that any implementation must move: input, weights and output, each once.
        bound: the least time that the run's measured rates allow, seconds.
        seconds: median time measured, layer by layer; None if it was not measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    flops: int
    bytes: int
    bound: float
    seconds: float | None = None


@dataclass
class Results:
    """Everything that a run found.

    Attributes:
        environment: `blnet.environment.Environment.as_dict`.
        settings: `blnet.bench.settings.Settings.as_dict`.
        command: the command line.
        networks: the networks of the models suite.
        measurements: in the order they were declared.
        ceilings: rates measured in the run, such as "copy_bandwidth" in bytes/s.
        layers: suite and batch, such as "models, batch 8" -> label of a network -> its layers.
        finished: "SUITE, GROUP" of every group that was measured to its end.
        left_out: "SUITE, GROUP" -> implementations that it lacks on purpose -> why.
        notes: sentences for the reader about the whole run.
        seconds: how long it took.
        interrupted: whether it was stopped before its end.
        schema: version of this format.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    command: str = ""
    networks: list[Network] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, list[Layer]]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False
    schema: int = SCHEMA

    def of(self, suite: str) -> Iterator[Measurement]:
        """Return the measurements of one suite."""
        return (m for m in self.measurements if m.suite == suite)

    @property
    def failures(self) -> list[Measurement]:
        """Measurements that raised or whose result was wrong."""
        return [m for m in self.measurements if m.failed]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, fit for JSON."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        values["networks"] = [asdict(network) for network in self.networks]
        values["measurements"] = [m.as_dict() for m in self.measurements]
        values["layers"] = {
            group: {label: [asdict(layer) for layer in found] for label, found in networks.items()}
            for group, networks in self.layers.items()
        }
        return {"schema": self.schema, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Results:
        """Return the results that `as_dict` gave; what it does not know is left out.

        Raises:
            ValueError: if they are of another version of the format, or no results at all.
        """
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema is not None and schema != SCHEMA:
            raise ValueError(
                f"these results have format version {schema}, this blnet reads {SCHEMA}; "
                "measure again, or use the blnet that wrote them"
            )
        found = read_as(cls, values, "it")
        for needed, names in (("environment", ENVIRONMENT), ("settings", SETTINGS)):
            lacking = [name for name in names if name not in getattr(found, needed)]
            if lacking:
                raise ValueError(f"it lacks {', '.join(lacking)} of its {needed}")
        for name in ("schema", "networks", "measurements"):
            if name not in values:
                raise ValueError(f"it lacks {name!r}")
        Settings.from_dict(found.settings)
        found.networks = [read_as(Network, network, "a network") for network in values["networks"]]
        found.measurements = [
            Measurement.from_dict(m, f"measurement {number}")
            for number, m in enumerate(values["measurements"], 1)
        ]
        for networks in found.layers.values():
            for label, layers in networks.items():
                read = [read_as(Layer, layer, f"a layer of {label}") for layer in layers]
                networks[label] = [replace(layer, shape=tuple(layer.shape)) for layer in read]
        if not all(0 < rate < math.inf for rate in found.ceilings.values()):
            raise ValueError("one of its ceilings is no positive number")
        return found


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, results: Results) -> None:
    """Write results as JSON. NaN (an error that was not a number) becomes null."""
    write_text(path, json.dumps(_finite(results.as_dict()), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Results:
    """Return the results in a file that `write_json` wrote, or in a folder's results.json.

    Raises:
        ValueError: if it cannot be read, is no such file, or of another version; one sentence that
            names the file.
    """
    path = path / RESULTS if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give a {RESULTS} or its folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a {RESULTS}: {error}") from None
    try:
        return Results.from_dict(values)
    except ValueError as error:
        do = "" if "measure again" in str(error) else "; measure again"
        raise ValueError(
            f"{path} is not a {RESULTS} that this 'blnet bench' reads: {error}{do}"
        ) from None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
